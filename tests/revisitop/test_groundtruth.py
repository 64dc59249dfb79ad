"""Ground-truth files: the real ones load, and every mistake gets one line that names file and query."""

import copy
import pickle

import numpy as np
import pytest

from revisitop.groundtruth import GroundTruthError, load, unlabelled_queries

GOOD = {
    "imlist": ["a", "b", "sub/c", "d"],
    "qimlist": ["q0", "q1"],
    "gnd": [
        {"bbx": [0, 1.5, 10, 20], "easy": [0], "hard": [2, 1], "junk": []},
        {"bbx": None, "easy": [], "hard": [], "junk": [3]},
    ],
}


def write(tmp_path, data, protocol=2):
    path = tmp_path / "gnd_x.pkl"
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_loads(tmp_path, protocol):
    truth = load(write(tmp_path, GOOD, protocol))
    assert truth.imlist == ("a", "b", "sub/c", "d")
    assert truth.qimlist == ("q0", "q1")
    first, second = truth.gnd
    assert first.bbx == (0.0, 1.5, 10.0, 20.0)
    assert second.bbx is None
    assert [first.easy.tolist(), first.hard.tolist(), first.junk.tolist()] == [[0], [2, 1], []]
    assert second.junk.tolist() == [3]
    assert {labels.dtype for labels in (first.easy, first.junk, second.easy)} == {np.dtype(np.int64)}
    with pytest.raises(ValueError, match="read-only"):
        first.easy[0] = 1


def test_tuples_and_other_keys_are_accepted(tmp_path):
    data = {**GOOD, "simlist": ["x"], "imlist": tuple(GOOD["imlist"])}
    data["gnd"] = tuple({**query, "easy": tuple(query["easy"])} for query in GOOD["gnd"])
    assert load(write(tmp_path, data)).imlist == tuple(GOOD["imlist"])


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("revisitop/gnd_roxford5k.pkl", (4993, 70)),
        ("revisitop/gnd_rparis6k.pkl", (6322, 70)),
        ("landmarks-retrieval/gnd_landmarks-retrieval.pkl", (258, 163)),
    ],
)
def test_real_files_load_as_the_standard_machine_loads_them(shared, path, count):
    truth = load(shared / path)
    with open(shared / path, "rb") as file:
        expected = pickle.load(file)
    assert (len(truth.imlist), len(truth.gnd)) == count
    assert list(truth.imlist) == expected["imlist"]
    assert list(truth.qimlist) == expected["qimlist"]
    for query, raw in zip(truth.gnd, expected["gnd"], strict=True):
        assert list(query.bbx) == raw["bbx"]
        for label in ("easy", "hard", "junk"):
            assert getattr(query, label).tolist() == raw[label]


def changed(*steps, value):
    """GOOD with the value at a path of keys replaced, or removed if it is `...`."""
    data = copy.deepcopy(GOOD)
    node = data
    for step in steps[:-1]:
        node = node[step]
    if value is ...:
        del node[steps[-1]]
    else:
        node[steps[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "a ground truth is a dict, this is a list"),
        (changed("imlist", value=...), "lacks the key imlist"),
        ({}, "lacks the key imlist and qimlist and gnd"),
        (changed("imlist", value="abcd"), "imlist is not a list but a str"),
        (changed("imlist", value=[]), "imlist is empty"),
        (changed("imlist", 1, value=7), r"imlist\[1\] is not text but a int"),
        (changed("imlist", 2, value="a"), r"imlist\[2\] a is there twice"),
        (changed("qimlist", 1, value="q0"), r"qimlist\[1\] q0 is there twice"),
        (changed("imlist", 0, value=""), r"imlist\[0\] '' cannot be the name"),
        (changed("imlist", 0, value="../../secret"), r"imlist\[0\] '../../secret' cannot be the name"),
        (changed("qimlist", 0, value="/etc/x"), r"qimlist\[0\] '/etc/x' cannot be the name"),
        (changed("imlist", 0, value="a\tb"), r"imlist\[0\] 'a\\tb' cannot be the name"),
        (changed("imlist", 0, value="a\ud800"), r"imlist\[0\] 'a\\ud800' cannot be the name"),
        (changed("gnd", value=GOOD["gnd"][:1]), "labels of 1 queries in gnd, but 2 names in qimlist"),
        (changed("gnd", value={}), "gnd is not a list but a dict"),
        (changed("gnd", 1, value=None), r"query 1 \(q1\): its labels are not a dict but a NoneType"),
        (changed("gnd", 1, "junk", value=...), r"query 1 \(q1\): lacks the key junk"),
        (changed("gnd", 0, "easy", value=3), r"query 0 \(q0\): easy is not a list but a int"),
        (changed("gnd", 0, "easy", value=[4]), r"query 0 \(q0\): easy\[0\] is not an index into the 4 images"),
        (changed("gnd", 0, "easy", value=[-1]), r"easy\[0\] is not an index"),
        (changed("gnd", 0, "easy", value=[10**6000]), r"easy\[0\] is not an index"),
        (changed("gnd", 0, "easy", value=[0.0]), r"easy\[0\] is not an index"),
        (changed("gnd", 0, "easy", value=[False]), r"easy\[0\] is not an index"),
        (changed("gnd", 0, "hard", value=[3, 3]), r"query 0 \(q0\): image 3 is in hard and already in hard"),
        (changed("gnd", 0, "junk", value=[0]), r"query 0 \(q0\): image 0 is in junk and already in easy"),
        (changed("gnd", 0, "bbx", value=[0, 0, 1]), r"query 0 \(q0\): bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value=[0, 0, float("nan"), 5]), "bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value=[0, 0, float("inf"), 5]), "bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value=[0, 0, "5", 5]), "bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value=[0, 0, 10**400, 5]), "bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value=[0, 0, -(10**400), 5]), "bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value=[0, 0, 1e300, 5]), "bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value=[0, 0, True, 5]), "bbx is not 4 numbers of pixels"),
        (changed("gnd", 0, "bbx", value="0123"), "bbx is not a list but a str"),
        (changed("gnd", 0, "bbx", value=[5, 0, 5, 9]), "bbx .* holds no pixel"),
        (changed("gnd", 0, "bbx", value=[5.1, 0, 5.9, 9]), "bbx .* holds no pixel"),
        (changed("gnd", 0, "bbx", value=[0, 9, 5, 2]), "bbx .* holds no pixel"),
        (changed("gnd", 0, "bbx", value=[-2, 0, 5, 9]), "begins outside the picture"),
        (np.arange(3), "nothing was executed"),
        (changed("gnd", 0, "easy", value=np.array([0])), r"numpy.* nothing was executed; .*\.tolist\(\)"),
        (pickle.dumps(changed("gnd", 0, "easy", value=np.array([0])), 4), r"numpy.*\.tolist\(\)"),
        (pickle.dumps(GOOD)[:-20], "damaged or not a pickle"),
        (b"", "damaged or not a pickle"),
    ],
)
def test_mistakes_get_one_line(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(GroundTruthError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_file_says_where_it_comes_from(tmp_path):
    with pytest.raises(GroundTruthError, match=r"gnd_no\.pkl: there is no ground truth; datasets/DATA\.md"):
        load(tmp_path / "gnd_no.pkl")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(GroundTruthError, match="Is a directory"):
        load(tmp_path)


def test_shared_lists_do_not_multiply(tmp_path, monkeypatch):
    """Two lists in a file can stand for any number of labels: there is a limit, and it counts all queries."""
    monkeypatch.setattr("revisitop.groundtruth.MAX_LABELS", 10)
    labels = {"bbx": None, "easy": [0, 1, 2, 3], "hard": [], "junk": []}
    data = {"imlist": list("abcd"), "qimlist": ["q0", "q1"], "gnd": [labels] * 2}
    load(write(tmp_path, data))
    data = {"imlist": list("abcd"), "qimlist": ["q0", "q1", "q2"], "gnd": [labels] * 3}
    with pytest.raises(GroundTruthError, match=r"query 2 \(q2\): the file holds more than 10 labels"):
        load(write(tmp_path, data))


def test_queries_that_are_database_images_without_a_label_for_themselves(tmp_path):
    """Ranked first, and wrong: told of. Labelled junk they are taken out of the ranking."""
    assert unlabelled_queries(load(write(tmp_path, GOOD))) == []
    data = {**GOOD, "qimlist": ["d", "a"]}  # d has the label of no image for itself, nor has a
    assert unlabelled_queries(load(write(tmp_path, data))) == ["d", "a"]
    data = {**GOOD, "qimlist": ["q0", "d"]}  # junk: [3]
    assert unlabelled_queries(load(write(tmp_path, data))) == []
