"""How descriptors were made, and whether two collections may be used together."""

from collections.abc import Mapping, Sequence

from evaler.features.store import Features, FeaturesError

# The list of images, and which of them are described: both differ between collections.
LIST_KEYS = ("list_sha256", "limits")
# Where the weights lie does not matter, their sha256 does.
PLACES = ("weights",)
# Where and by which version descriptors were made, and not what they mean.
MACHINE_KEYS = (*PLACES, "device", "threads", "torch", "code_version", "compiled", "batch_size", "chunk_size")


def differing_keys(a: dict, b: dict, *, but: Sequence[str] = ()) -> list[str]:
    """Keys of two provenances with different values, or in only one of them; those in `but` are not looked at."""
    absent = object()
    return sorted(key for key in a.keys() | b.keys() if key not in but and a.get(key, absent) != b.get(key, absent))


def check_alike(one_name: str, one: Features, other_name: str, other: Features, *, but: Sequence[str]) -> None:
    """Raise `FeaturesError` for descriptors of two dimensions, or made in two ways; keys in `but` are not looked at."""
    keys = differing_keys(one.provenance, other.provenance, but=but)
    if one.vectors.shape[1] != other.vectors.shape[1]:
        keys.append(f"dimension ({one.vectors.shape[1]} and {other.vectors.shape[1]})")
    if keys:
        raise FeaturesError(f"{one_name} and {other_name} differ in {', '.join(keys)}; extract both in the same way")


def without(provenance: Mapping, keys: Sequence[str]) -> dict:
    return {key: value for key, value in provenance.items() if key not in keys}
