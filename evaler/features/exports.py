"""Collections in the forms that other code reads."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.base.files import atomic_write
from core.processes.progress import progress
from evaler.features.store import Features, FeaturesError, feature_path, load

FORMS = ("mat", "npz")
_MOST_MAT_BYTES = 2**31 - 1  # of one variable, in the version of the format that everything reads


def export(folder: str | os.PathLike, collection: str, forms: Sequence[str]) -> list[Path]:
    """Write a collection beside itself in these forms; return the files.

    mat: MATLAB 5, `X` float32 [N, D] in the order of the `.tsv`, as published for the distractors.
    npz: one float32 [D] a name, as the published pickle of the Revisited sets; read by `np.load`, without pickle.
    Raises `FeaturesError` as `load` does, and for more than a `.mat` holds.
    """
    if not forms:
        return []
    features = load(folder, collection)
    writers = {"mat": _write_mat, "npz": _write_npz}
    paths = []
    for form in forms:
        paths.append(feature_path(folder, collection, f".{form}"))
        writers[form](paths[-1], features)
    return paths


def _write_mat(path: Path, features: Features) -> None:
    import scipy.io  # not at the top: few want this form, and it is slow to load

    vectors = np.asarray(features.vectors, np.float32)
    if vectors.nbytes > _MOST_MAT_BYTES:
        raise FeaturesError(f"{path}: {len(vectors)} descriptors are more than a .mat holds (2 GiB); use npz")
    with atomic_write(path) as file:
        scipy.io.savemat(file, {"X": vectors})


def _write_npz(path: Path, features: Features) -> None:
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        rows = zip(features.names, features.vectors, strict=True)
        for name, vector in progress(rows, path.name, unit="image", total=len(features.names), leave=False):
            # A fixed date, so that equal descriptors are equal files.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(vector, np.float32), allow_pickle=False)
