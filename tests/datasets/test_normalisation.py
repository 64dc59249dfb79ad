"""A name that is not found because it differs in Unicode normalisation only: every message says so."""

import unicodedata

import numpy as np
import pytest

from datasets.images.decode import ImageError, decode
from datasets.landmark import ListError, check_files, read_list
from datasets.lists.command import main
from datasets.normalisation import note_on_name, note_on_path
from evaler.features.provenance import Provenance
from evaler.features.store import Features, FeaturesError, align
from evaler.scoring.labels import score_labelled
from evaler.sources.images import named_images
from tests.small_run import photograph, write_image

COMPOSED = unicodedata.normalize("NFC", "café/Vår vy.jpg")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
NOTE = "another Unicode normalisation is there"


@pytest.fixture(params=[(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)], ids=["listed NFC", "listed NFD"])
def listed(request, tmp_path):
    """A name; the photograph has the other one of the two."""
    name, other = request.param
    write_image(tmp_path / other, photograph(0))
    return name


def test_lists_and_files(tmp_path, listed):
    (tmp_path / "train_list.txt").write_text(f"{listed} 0\n")
    paths, _ = read_list(tmp_path / "train_list.txt", root=tmp_path)
    with pytest.raises(ListError, match=NOTE):
        check_files(tmp_path / "train_list.txt", paths)
    with pytest.raises(ImageError, match=NOTE):
        decode(tmp_path / listed)
    (tmp_path / "list.txt").write_text(listed)
    for name in ("list.txt", "train_list.txt"):
        with pytest.raises(ImageError, match=NOTE):
            named_images(tmp_path / name)[0].sha256()


def test_tables(tmp_path, listed, capsys):
    (tmp_path / "table.csv").write_text(f"path,label\n{listed},a\n")
    with pytest.raises(SystemExit):
        main(["--csv", str(tmp_path / "table.csv"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert NOTE in error and error.count("\n") == 1


def test_names_of_descriptors(tmp_path, listed):
    features = Features([listed, "b"], np.eye(2, dtype=np.float32), np.ones((2, 2), np.int64), Provenance())
    other = next(name for name in (COMPOSED, DECOMPOSED) if name != listed)
    with pytest.raises(FeaturesError, match=NOTE):
        align(features, [other, "b"], source="here")
    with pytest.raises(ValueError, match=NOTE):
        score_labelled(features, {other: "1", "b": "1"})


def test_what_is_missing_otherwise_is_not_explained_so(tmp_path, listed):
    assert note_on_name("é", ["e", "è"]) == note_on_name("a", ["b"]) == ""
    for name in ("Zürich.jpg", f"{listed}x", "a/b", "a\0é"):
        assert note_on_path(tmp_path / name) == ""
