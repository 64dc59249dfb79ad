"""Names that differ in Unicode normalisation only: they look alike, and a file system takes them for two.

An é may be one character (NFC, as it is typed) or an e with an accent behind it (NFD, as macOS used to name files).
"""

import os
import unicodedata
from collections.abc import Iterable

_NOTE = (
    "; one of this name in another Unicode normalisation is there (NFC or NFD, as macOS writes it): rename one of them"
)


def note_on_name(name: str, names: Iterable[str]) -> str:
    """What a message that `name` is not among `names` should add: why, if it is only this; else nothing."""
    if name.isascii():
        return ""
    composed = unicodedata.normalize("NFC", name)
    return _NOTE if any(_composed(other) == composed for other in names if not other.isascii()) else ""


def note_on_path(path: str | os.PathLike) -> str:
    """The same for a file that is not there."""
    path = os.fspath(path)
    if path.isascii() or "\0" in path:
        return ""
    folder = os.sep if path.startswith(os.sep) else "."
    for part in path.split(os.sep):
        inner = os.path.join(folder, part)
        if not os.path.lexists(inner):
            inner = next(
                (os.path.join(folder, name) for name in _listed(folder) if _composed(name) == _composed(part)), ""
            )
        if not inner:
            return ""
        folder = inner
    return _NOTE


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
