"""Scoring: known values through files and a real process, and one line for each thing that is wrong with them."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.base.files import sha256_file
from evaler.features.provenance import Provenance
from evaler.features.store import Features, FeaturesError, save
from evaler.scoring.card import make_card
from evaler.scoring.revisited import load_set, main, score_features, table
from evaler.scoring.score import Score, Setting
from revisitop import groundtruth
from revisitop.protocol import SETTING_NAMES

ROOT = Path(__file__).resolve().parents[3]
PROVENANCE = {
    "weights": "output/checkpoints/model_epoch_0003.pyth",
    "weights_sha256": "0123456789abcdef" * 4,
    "scales": [0.7071, 1.0],
    "crop_query": True,
    "code_version": "abc",
}
IMAGES = ["i0", "i1", "i2", "i3", "i4", "i5"]
QUERIES = ["q0", "q1"]
# Scores of the two queries with the six images: q0 ranks 0 1 2 3 4 5, q1 the other way round.
FALLING = np.linspace(0.9, 0.1, 6)
LABELS = [
    {"bbx": [0, 0, 9, 9], "easy": [1], "hard": [3], "junk": [0]},
    {"bbx": None, "easy": [], "hard": [5], "junk": []},
]
MEDIUM = 100 * np.mean([(1 + 1 + 1 / 2 + 2 / 3) / 4, 1])


def collection(names, vectors, **provenance):
    vectors = np.asarray(vectors, np.float32)
    return Features(
        list(names), vectors, np.full((len(names), 2), 8, np.int32), Provenance.from_json(PROVENANCE | provenance)
    )


def queries(**provenance):
    return collection(QUERIES, [[1, 0, 0], [0, 1, 0]], list_sha256="queries", **provenance)


def database(**provenance):
    first, second = FALLING * 0.7, FALLING[::-1] * 0.7
    rest = np.sqrt(1 - first**2 - second**2)
    return collection(IMAGES, np.stack([first, second, rest], axis=1), list_sha256="database", **provenance)


@pytest.fixture
def place(tmp_path):
    """A set `tiny` with ground truth and features, and a configuration that names it."""
    gnd = tmp_path / "data" / "tiny" / "gnd_tiny.pkl"
    gnd.parent.mkdir(parents=True)
    gnd.write_bytes(pickle.dumps({"imlist": IMAGES, "qimlist": QUERIES, "gnd": LABELS}))
    features = tmp_path / "out" / "features" / "tiny"
    save(features, "queries", queries())
    save(features, "database", database())
    (tmp_path / "cfg.yaml").write_text(
        f"OUT_DIR: {tmp_path / 'out'}\nINFER:\n  DATASETS: [tiny]\n  DATA_DIR: {tmp_path / 'data'}\n"
        f"  SCALES: {PROVENANCE['scales']}\n"
    )
    return tmp_path


def evaluate(place, *overrides):
    """The command, in this process."""
    arguments, code, out, err = ["--cfg", str(place / "cfg.yaml"), *overrides], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def evaluate_as_process(place, *, cwd):
    command = [sys.executable, str(ROOT / "evaler" / "evaluate.py"), "--cfg", str(place / "cfg.yaml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def test_the_command_prints_a_table_and_writes_json(place):
    result = evaluate_as_process(place, cwd=place)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines() if line]
    assert " ".join(lines[0]) == "tiny: 2 queries (cropped), 6 database images"
    assert " ".join(lines[1]) == "weights model_epoch_0003.pyth (sha256 01234567), scales 0.7071 1"
    assert lines[2] == ["mAP", "mP@1", "mP@5", "mP@10"]
    assert lines[3][:5] == ["Easy", "100.00", "100.00", "100.00", "100.00"]
    assert lines[4] == ["Medium", f"{MEDIUM:.2f}", "100.00", "83.33", "83.33"]
    assert lines[5] == ["Hard", "62.50", "50.00", "75.00", "75.00"]
    assert " ".join(lines[3][5:]) == "(1 of 2 queries have positives)"

    path = place / "out" / "scores" / "tiny.json"
    assert str(path) in result.stdout
    score = json.loads(path.read_text())
    assert score["unit"] == "percent" and score["dataset"] == "tiny" and score["kappas"] == [1, 5, 10]
    assert score["E"] == {"mAP": 100.0, "mAP_bracket": [100.0, 100.0], "mP@k": [100.0] * 3, "aps": [100.0, None]}
    assert score["M"]["mAP"] == pytest.approx(MEDIUM, abs=1e-12)
    assert score["H"]["mAP"] == pytest.approx(62.5, abs=1e-12) and score["H"]["aps"] == pytest.approx([25.0, 100.0])
    assert score["provenance"] == PROVENANCE
    assert score["ground_truth_sha256"] == sha256_file(place / "data" / "tiny" / "gnd_tiny.pkl")
    assert (score["queries"], score["database"]) == (2, 6)


def test_the_order_on_disk_does_not_matter(place):
    expected = evaluate(place).stdout
    whole, rows = database(), [3, 0, 5, 1, 4, 2]
    shuffled = Features([IMAGES[i] for i in rows], whole.vectors[rows], whole.sizes[rows], whole.provenance)
    save(place / "out" / "features" / "tiny", "database", shuffled)
    assert evaluate_as_process(place, cwd="/").stdout == expected


DISTRACTING = [[0.8, 0, 0.6], [0, 0, 1.0], [0.6, 0.8, 0]]  # first, nowhere, and first for q1 and second for q0


def test_distractors_are_scored_behind_the_database(place):
    alone = evaluate(place).stdout
    folder = place / "out" / "features" / "revisitop1m"
    other = {"crop_query": False, "torch": "2.11", "list_sha256": "distractors"}
    save(folder, "distractors", collection(["a", "b", "c"], DISTRACTING, **other))
    result = evaluate(place, "INFER.DATASETS", "tiny,revisitop1m")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(alone)
    assert "tiny + 3 distractors (not revisitop1m: that is 1,001,001): 2 queries" in result.stdout
    assert "+1M" not in result.stdout
    score = json.loads((place / "out" / "scores" / "tiny_with_distractors.json").read_text())
    assert score["card"]["distractors"] == 3
    # q0's database scores are 0.63 0.518 0.406 0.294 0.182 0.07: a stands first, c behind i0, which is junk.
    assert score["E"]["aps"][0] == pytest.approx(100 * (0 + 1 / 3) / 2)
    assert score["H"]["aps"][1] == pytest.approx(100 * (0 + 1 / 2) / 2)
    assert json.loads((place / "out" / "scores" / "tiny.json").read_text())["card"]["distractors"] == 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (collection(["a"], [[1, 0, 0]], scales=[1.0]), "database and revisitop1m differ in scales; extract both"),
        (collection(["a"], [[1, 0, 0]], weights_sha256="1"), "differ in weights_sha256"),
        (collection(["a"], [[1, 0]]), "database and revisitop1m differ in dimension (3 and 2)"),
        (collection(["a"], [[0, 0, 0]]), "the descriptor of a is zero (one of 1)"),
    ],
)
def test_distractors_that_do_not_fit_are_refused(place, capsys, features, message):
    save(place / "out" / "features" / "revisitop1m", "distractors", features)
    with pytest.raises(SystemExit):
        main(["--cfg", str(place / "cfg.yaml"), "INFER.DATASETS", "tiny,revisitop1m"])
    mistake(capsys.readouterr().err, message)


def test_distractors_that_are_absent_or_alone(place, capsys):
    for names, message in (("tiny,revisitop1m", "no descriptors of 'distractors' here"), ("revisitop1m", "no queries")):
        with pytest.raises(SystemExit):
            main(["--cfg", str(place / "cfg.yaml"), "INFER.DATASETS", names])
        mistake(capsys.readouterr().err, message)


def test_equal_scores_are_bracketed(place):
    vectors = database().vectors.copy()
    vectors[1] = vectors[2]  # the easy image of q0 and a negative
    save(place / "out" / "features" / "tiny", "database", collection(IMAGES, vectors, list_sha256="database"))
    text = evaluate(place).stdout
    assert "Easy       100.00" in text and "equal scores: 25.00 to 100.00, by their order" in text


def test_half_precision_on_disk(place):
    expected = evaluate(place).stdout
    save(place / "out" / "features" / "tiny", "database", database(), dtype="float16")
    assert evaluate(place).stdout == expected.replace("3-d float32", "3-d float16")


def test_several_sets_are_scored_and_a_setting_without_positives_is_a_dash(place):
    only_junk = [{"bbx": None, "easy": [], "hard": [], "junk": [0]}] * 2
    (place / "data" / "junk").mkdir()
    (place / "data" / "junk" / "gnd_junk.pkl").write_bytes(
        pickle.dumps({"imlist": IMAGES, "qimlist": QUERIES, "gnd": only_junk})
    )
    os.symlink("tiny", place / "out" / "features" / "junk")
    result = evaluate(place, "INFER.DATASETS", "['tiny', 'junk']")
    assert result.returncode == 0, result.stderr
    assert f"Medium{MEDIUM:11.2f}" in result.stdout
    assert "Hard            -        -        -        -   (0 of 2 queries have positives)" in result.stdout
    score = json.loads((place / "out" / "scores" / "junk.json").read_text())
    assert score["M"] == {"mAP": None, "mAP_bracket": [None, None], "mP@k": [None] * 3, "aps": [None, None]}


def test_a_configuration_that_says_otherwise_is_noted(place):
    result = evaluate(place, "INFER.SCALES", "[1.0]", "INFER.CROP_QUERY", "False")
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "note: tiny was extracted with INFER.SCALES [0.7071, 1.0], not [1.0] as configured",
        "note: tiny was extracted with INFER.CROP_QUERY True, not False as configured",
    ]
    assert "scales 0.7071 1" in result.stdout and "queries (cropped)" in result.stdout


def mistake(stderr, message):
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert message in lines[0]


def test_mistakes_get_one_line_from_the_command(place, capsys, monkeypatch):
    """The first through a real process, the others through main: they differ only in what is wrong."""
    result = evaluate(place, "OUT_DIR", str(place / "no"))
    assert (result.returncode, result.stdout) == (2, "")
    mistake(result.stderr, "no descriptors of 'queries' here; extract them with evaler/infer.py")
    assert not (place / "no").exists()

    def run(*overrides):
        with pytest.raises(SystemExit) as caught:
            main(["--cfg", str(place / "cfg.yaml"), *overrides])
        assert caught.value.code == 2
        return capsys.readouterr().err

    mistake(run("INFER.DATASETS", "['other']"), "gnd_other.pkl: there is no ground truth; datasets/DATA.md")
    mistake(run("INFER.IMAGES", "photos"), "a folder has no ground truth, so there is nothing to score")
    mistake(run("INFER.DATASETS", "[]"), "INFER.DATASETS is empty: there is nothing to score")
    (place / "data" / "tiny" / "gnd_tiny.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    monkeypatch.chdir(place)
    mistake(run(), "GLOBAL (os system); nothing was executed")
    assert not (place / "ran").exists() and not (place / "out" / "scores").exists()


def replace_row(features, row, vector):
    vectors = features.vectors.copy()
    vectors[row] = vector
    return Features(features.names, vectors, features.sizes, features.provenance)


def without(features, name):
    keep = [i for i, other in enumerate(features.names) if other != name]
    return Features(
        [features.names[i] for i in keep], features.vectors[keep], features.sizes[keep], features.provenance
    )


@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        ("queries", queries(weights_sha256="0"), "queries and database differ in weights_sha256; extract both"),
        ("database", database(scales=[1.0], crop_query=False), "differ in crop_query, scales; extract both"),
        (
            "queries",
            collection(QUERIES, [[1, 0], [0, 1]]),
            "and database differ in dimension (2 and 3); extract both",
        ),
        ("database", replace_row(database(), 4, 0), "database: the descriptor of i4 is zero (one of 1)"),
        ("queries", replace_row(queries(), 1, [0, 2, 0]), "queries: the descriptor of q1 has length 2, not 1"),
        ("database", without(database(), "i2"), "database: no descriptor of i2, of 6 asked for"),
        ("queries", collection(["q0", "q2"], np.eye(3)[:2]), "queries: no descriptor of q1, of 2 asked for"),
        ("database", collection([*IMAGES, "i6"], np.eye(3)[[0] * 7]), "descriptors of i6 that were not asked for"),
        ("database", collection([], np.empty((0, 3))), "database: no descriptor of i0, i1, i2 and 3 more"),
    ],
)
def test_features_that_do_not_fit_are_refused(place, name, features, message):
    folder = place / "out" / "features" / "tiny"
    truth = groundtruth.load(place / "data" / "tiny" / "gnd_tiny.pkl")
    assert score_features(load_set(folder, truth), truth)["M"].values["mAP"] == pytest.approx(MEDIUM)
    save(folder, name, features)
    with pytest.raises(FeaturesError) as caught:
        load_set(folder, truth)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_table_says_when_queries_were_not_cropped_and_does_without_provenance(place):
    how = Provenance(crop_query=False)
    card = make_card(
        "x", {"provenance": how, "count": 2, "dim": 4, "dtype": "float32"}, queries=1, ground_truth_sha256="0"
    )
    values = {"mAP": 12.345, "mAP_bracket": [12.345, 12.345], "mP@k": [1.0]}
    settings = {key: Setting(name, values, [1.0]) for key, name in SETTING_NAMES.items()}
    known = {"protocol": "revisited", "metric": "mAP", "dataset": "x", "query_names": ["q"], "card": card}
    counts = {"queries": 1, "database": 2, "kappas": [1]}
    text = table(Score(**known, settings=settings, provenance=how, counts=counts))
    assert text.splitlines()[:2] == ["x: 1 queries (not cropped), 2 database images", "weights unknown"]
    assert "Easy        12.35     1.00" in text or "Easy        12.34     1.00" in text


def test_post_processing_is_on_the_card_and_in_a_file_of_its_own(place, capsys):
    """Learned on the set itself: allowed, and told. The plain score stays."""
    plain = evaluate(place).stdout
    command = [sys.executable, str(ROOT / "evaler" / "whiten.py"), "out/features/tiny", "w.npz", "--dim", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "1 of 3 dimensions, by 6 images" in done.stdout
    settings = ["SCORE.WHITENING", str(place / "w.npz"), "SCORE.QE", "2", "SCORE.DBA", "1"]
    main(["--cfg", str(place / "cfg.yaml"), *settings])
    out = capsys.readouterr().out
    assert "PCA whitening to 1 (learned on tiny, THE SCORED SET ITSELF) + DBA 1 alpha 3 + QE 2 alpha 3" in out
    processed = json.loads((place / "out" / "scores" / "tiny_processed.json").read_text())
    assert len(processed["card"]["post_processing"]) == 3
    assert evaluate(place).stdout == plain

    save(place / "out" / "features" / "revisitop1m", "distractors", database())
    subprocess.run([*command[:2], "out/features/revisitop1m", *command[3:]], cwd=place, timeout=60, check=True)
    main(["--cfg", str(place / "cfg.yaml"), *settings[:2], "INFER.DATASETS", "tiny,revisitop1m"])
    cards = [line for line in capsys.readouterr().out.splitlines() if "PCA whitening" in line]
    assert len(cards) == 2 and "(learned on revisitop1m, THE SCORED SET ITSELF)" in cards[1]
    save(place / "out" / "features" / "tiny", "database", database(weights_sha256="0"))
    save(place / "out" / "features" / "tiny", "queries", database(weights_sha256="0"))
    with pytest.raises(SystemExit):
        main(["--cfg", str(place / "cfg.yaml"), "SCORE.WHITENING", str(place / "absent.npz")])
    assert "absent.npz: no such whitening" in capsys.readouterr().err
