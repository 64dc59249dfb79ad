"""Which files of a long list are not there, without asking for each of them."""

import errno
import os

import numpy as np
from tqdm import tqdm


def missing_files(paths: list[str]) -> np.ndarray:
    """Which of the paths (bool [N]) are no files.

    Reads every folder once instead of asking for every file: over a network that is 4096 requests for GLDv2-clean
    instead of 1.58 million. Raises OSError for a folder that is there and cannot be listed.
    """
    wanted: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        wanted.setdefault(os.path.dirname(path), []).append(i)
    missing = np.zeros(len(paths), bool)
    for folder, indices in tqdm(wanted.items(), desc="checking images", unit="folder", leave=False, delay=2):
        present = _files_of(folder)
        missing[[i for i in indices if os.path.basename(paths[i]) not in present]] = True
    return missing


def _files_of(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # no folder can be called so
            return set()
        raise
