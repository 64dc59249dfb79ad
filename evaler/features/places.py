"""Resolve a feature folder named on a command line."""

from pathlib import Path

from evaler.features.store import FeaturesError

SEARCHED = ("images", "database", "distractors")  # in a folder that is named without a collection


def find_collection(place: Path) -> tuple[Path, str]:
    """Folder and name of the collection that OUT_DIR/features/<set>, or <set>/<collection>, means.

    Raises `FeaturesError` where there is none, or several to choose from.
    """
    if not place.is_dir():
        if place.name and (place.parent / f"{place.name}.json").is_file():
            return place.parent, place.name
        raise FeaturesError(f"{place}: no such folder of descriptors; evaler/infer.py writes OUT_DIR/features/<set>")
    present = [name for name in SEARCHED if (place / f"{name}.json").is_file()]
    if not present:
        raise FeaturesError(f"{place}: no complete collection in it; extract one with evaler/infer.py first")
    if len(present) > 1:
        raise FeaturesError(f"{place}: holds {' and '.join(present)}; name one of them: {place / present[0]}")
    return place, present[0]
