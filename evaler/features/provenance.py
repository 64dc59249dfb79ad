"""How descriptors were made, and what may differ between two collections for each use of them together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any


class Decides(Enum):
    """What a setting of an extraction decides about its descriptors."""

    MEANING = "meaning"  # descriptors that differ in it are not comparable
    ROUNDING = "rounding"  # small deviations of each descriptor
    CROP = "crop"  # whether queries are cropped to their box
    MACHINE = "machine"  # the last digits: where and by which version of the code
    PLACE = "place"  # nothing: where a file lay, whose sha256 is compared
    LIST = "list"  # which images are described


class Purpose(Enum):
    """What two collections are wanted for; the value holds what may differ between them."""

    SAME_COLLECTION = frozenset({Decides.PLACE})
    SAME_RUN = frozenset({Decides.LIST})  # the queries and the database of one extraction
    REUSABLE = frozenset({Decides.PLACE, Decides.LIST})  # an image that both have has the same bytes in both
    ADDABLE = frozenset({*REUSABLE, Decides.MACHINE})
    SAME_SPACE = frozenset({*ADDABLE, Decides.CROP})  # scored together; whitened by what the other taught
    SEARCHABLE = frozenset({*SAME_SPACE, Decides.ROUNDING})


def _setting(decides: Decides, *types: type):
    return field(default=None, metadata={"decides": decides, "types": types})


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What descriptors were made from and how. None: not recorded, as in collections of an older version."""

    weights: str | None = _setting(Decides.PLACE, str)
    weights_sha256: str | None = _setting(Decides.MEANING, str)
    backbone: str | None = _setting(Decides.MEANING, str)  # where it is no ResNet
    depth: int | None = _setting(Decides.MEANING, int)
    with_ma: bool | None = _setting(Decides.MEANING, bool)
    fusion: str | None = _setting(Decides.MEANING, str)
    stride_1x1: bool | None = _setting(Decides.MEANING, bool)
    bn_eps: float | None = _setting(Decides.MEANING, float, int)
    scales: tuple[float, ...] | None = _setting(Decides.MEANING, list)
    resize: str | None = _setting(Decides.MEANING, str)
    crop_query: bool | None = _setting(Decides.CROP, bool)
    precision: str | None = _setting(Decides.ROUNDING, str)
    max_level_pixels: int | None = _setting(Decides.ROUNDING, int)
    decoder: str | None = _setting(Decides.ROUNDING, str)  # where it is another than OpenCV
    compiled: bool | None = _setting(Decides.MACHINE, bool)
    batch_size: int | None = _setting(Decides.MACHINE, int)
    chunk_size: int | None = _setting(Decides.MACHINE, int)  # in batches: which images share one
    device: str | None = _setting(Decides.MACHINE, str)  # GPU or CPU
    threads: int | None = _setting(Decides.MACHINE, int)  # of a CPU
    torch: str | None = _setting(Decides.MACHINE, str)
    code_version: str | None = _setting(Decides.MACHINE, str)
    list_sha256: str | None = _setting(Decides.LIST, str)
    limits: tuple[float, ...] | None = _setting(Decides.LIST, list)  # least side, largest aspect, most pixels
    # What another version wrote and this one does not know, or under a known key another type: it is kept, and
    # decides the meaning.
    other: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> "Provenance":
        """Of the object in a file; nothing of it is lost."""
        fitting = {key: value for key, value in record.items() if key in _SETTINGS and _fits(key, value)}
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fitting.items()}
        other = {key: value for key, value in record.items() if key not in known}
        return cls(**known, other=other)

    def to_json(self) -> dict[str, object]:
        """The object in a file, sorted by key."""
        known = {key: value for key in _SETTINGS if (value := getattr(self, key)) is not None}
        record = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
        return dict(sorted((record | dict(self.other)).items()))

    def differing(self, other: "Provenance", purpose: Purpose) -> dict[str, tuple[object, object]]:
        """Key -> both values (None: not recorded) of what must not differ for a purpose, and does; sorted."""
        a, b = self.relevant(purpose).to_json(), other.relevant(purpose).to_json()
        keys = [key for key in sorted(a.keys() | b.keys()) if (key in a) != (key in b) or a[key] != b[key]]
        return {key: (a.get(key), b.get(key)) for key in keys}

    def relevant(self, purpose: Purpose) -> "Provenance":
        """Without what may differ for a purpose."""
        record = self.to_json().items()
        return Provenance.from_json({key: value for key, value in record if _decides(key) not in purpose.value})


_SETTINGS = {setting.name: setting.metadata for setting in fields(Provenance) if setting.name != "other"}


def _decides(key: str) -> Decides:
    return _SETTINGS[key]["decides"] if key in _SETTINGS else Decides.MEANING


def _fits(key: str, value: object) -> bool:
    numbers = type(value) is not list or all(type(number) in (int, float) for number in value)
    return type(value) in _SETTINGS[key]["types"] and numbers
