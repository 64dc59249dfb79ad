"""Which files of a folder or an archive are taken for photographs: by their extension, and none that is hidden."""

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# What systems put beside photographs (previews, deleted and earlier versions) under names without a dot; lower case.
_SYSTEM_NAMES = frozenset(
    (
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),  # network disks
        *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found"),
        *("__macosx", "network trash folder", "temporary items"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)


def is_hidden(path: str) -> bool:
    """Whether a relative path, `/` between its parts, has a part that begins with a dot or is a system's.

    Such as `._a.jpg` and `__MACOSX` (macOS), `.thumbnails`, `.Trash-1000`, `.ipynb_checkpoints`, `@eaDir` (Synology).
    """
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in _SYSTEM_NAMES for part in parts)


def hidden_note(number: int, first: str, place: object) -> str:
    """What users are told of hidden files, folders and members."""
    return f"{number} hidden or system files and folders in {place} are left out, the first is {first!a}"
