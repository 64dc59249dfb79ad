"""The page as a file: what is in it, what is said of what is missing, and mistakes."""

import base64
import json
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from core.base.files import sha256_file
from core.base.version import ROOT
from datasets.images.decode import decode
from evaler.extraction import command as extract
from evaler.features.provenance import Provenance
from evaler.features.store import load
from evaler.pages import report_page
from evaler.pages.attention_maps import AttentionError, attention_map, load_network
from evaler.pages.content import spread
from evaler.pages.report_page import main, without_places
from evaler.pages.thumbnails import heat, reduced
from evaler.scoring import revisited as score
from tests.evaler.test_describer import MODELS, write_weights
from tests.small_run import child_environment, overrides, photograph, retrieval_set, write_image

HOSTILE = "<script>alert(1)<"  # a folder's name


def content_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def make_runs(root):
    """Two runs of a Revisited set and of a folder; settings of the first."""
    retrieval_set(root / "data", "toy", queries=4, database=9)
    for seed in range(6):
        write_image(root / "photos" / (HOSTILE if seed < 3 else "b") / f"{seed}.png", photograph(seed, 48 + seed, 60))
    (root / "c.yaml").touch()
    common = {"NUM_GPUS": 0, "INFER.SCALES": "[1]", "INFER.DATASETS": "toy", "INFER.DATA_DIR": root / "data"}
    settings = []
    for run, model in (("one", "small"), ("two", "global")):
        weights = write_weights(root / f"{run}.pyth", MODELS[model])
        settings.append(overrides(MODELS[model], common, {"OUT_DIR": root / run}))
        for more in ([], ["INFER.IMAGES", str(root / "photos")]):
            extract.main(["--cfg", str(root / "c.yaml"), *settings[-1], "TEST.WEIGHTS", str(weights), *more])
    return ["--cfg", str(root / "c.yaml"), *settings[0]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return root, make_runs(root)


def with_options(arguments, *options):
    return [*arguments[:2], *map(str, options), *arguments[2:]]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_real_process_writes_a_page_that_loads_nothing(runs):
    root, arguments = runs
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaler" / "report.py"), *with_options(arguments, "--top", "4")],
        cwd=root,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    path = root / "one" / "reports" / "toy.html"
    assert done.returncode == 0 and f"{path}: 4 queries, " in done.stdout and "note" not in done.stderr
    text = path.read_text()
    assert "default-src 'none'" in text and not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    content = content_of(path)
    score.main(arguments)
    scored = json.loads((root / "one" / "scores" / "toy.json").read_text())
    rows = content["table"]["rows"]
    assert [row["values"] for row in rows] == [[[scored[s]["mAP"], *scored[s]["mP@k"]]] for s in "EMH"]
    assert str(root) not in text and scored["card"]["weights"] == str(root / "one.pyth")
    assert content["runs"][0]["card"] == scored["card"] | {"weights": "one.pyth"} and content["runs"][0][
        "line"
    ].startswith("toy | R50")
    assert [query["runs"][0]["aps"]["M"] for query in content["queries"]] == scored["M"]["aps"]
    for query in content["queries"]:
        assert len(query["runs"][0]["found"]) == 4
        height, width = cv2.imdecode(np.frombuffer(base64.b64decode(query["photo"]), np.uint8), 1).shape[:2]
        assert width == 37 and height in (42, 43, 44, 45, 46)  # cropped to its box
    stored = load(root / "one" / "features" / "toy", "database")
    queries = load(root / "one" / "features" / "toy", "queries")
    order = np.argsort(-(stored.vectors @ queries.vectors[2]))[:4]
    names = [content["images"][row[0]][0] for row in content["queries"][2]["runs"][0]["found"]]
    assert names == [stored.names[image] for image in order]


def test_the_attention_is_that_of_the_run_s_network(runs):
    root, arguments = runs
    main(with_options(arguments, "--against", root / "two", "--out", root / "two.html"))
    content = content_of(root / "two.html")
    network = load_network(load(root / "one" / "features" / "toy", "queries").provenance)
    picture = decode(root / "data" / "toy" / "jpg" / "query1.jpg")[2:45, 3:40]
    expected = attention_map(network, picture)
    assert expected.shape == (3, 3) and (expected > 0).all()
    features = {}
    network.localmodel.register_forward_hook(lambda module, inputs, output: features.update(f3=inputs[0]))
    attention_map(network, picture)
    with torch.no_grad():
        np.testing.assert_allclose(network.localmodel(features["f3"])[1][0, 0].numpy(), expected)
    shown = [query["heat"] for query in content["queries"]]
    assert base64.b64decode(shown[1][0]) == heat(expected)
    # The other network has no local branch, which is said and spoils nothing.
    assert all(of_run[1] is None for of_run in shown)
    assert content["notes"] == ["no attention maps: two.pyth: a global-only network has no local branch"]
    assert len(content["table"]["rows"][1]["values"]) == 2 and content["table"]["rows"][1]["difference"]["queries"] == 4


def test_no_local_branch_is_said_also_where_the_provenance_does_not_tell(tmp_path):
    path = write_weights(tmp_path / "w.pyth", MODELS["global"])
    with pytest.raises(AttentionError, match="no local branch"):
        load_network(Provenance(weights=str(path), weights_sha256=sha256_file(path)))


def test_a_map_of_attention_as_a_picture():
    image = cv2.imdecode(np.frombuffer(heat(np.array([[0.5, 1.5], [1.0, 0.5]])), np.uint8), cv2.IMREAD_UNCHANGED)
    assert image.shape == (2, 2, 4) and image[..., 3].tolist() == [[0, 216], [108, 0]]
    even = cv2.imdecode(np.frombuffer(heat(np.full((2, 3), 0.7)), np.uint8), cv2.IMREAD_UNCHANGED)
    assert not even[..., 3].any()


def test_pictures_are_made_smaller_and_never_larger():
    assert reduced(np.zeros((300, 100, 3), np.uint8), (60, 60)).shape == (60, 20, 3)
    assert reduced(np.zeros((2, 900, 3), np.uint8), (60, 60)).shape == (1, 60, 3)
    assert reduced(np.zeros((30, 40, 3), np.uint8), (60, 60)).shape == (30, 40, 3)


def test_a_folder_of_one_s_own_without_labels_and_with(runs, capsys):
    root, arguments = runs
    own = ["INFER.IMAGES", str(root / "photos")]
    main([*with_options(arguments, "--queries", "4"), *own])
    path = root / "one" / "reports" / "photos.html"
    content = content_of(path)
    assert HOSTILE not in path.read_text()
    assert content["settings"] == [] and content["table"] is None and "without labels" in content["counts"]
    names = [f"{HOSTILE if i < 3 else 'b'}/{i}.png" for i in (0, 1, 3, 4)]
    assert [query["name"] for query in content["queries"]] == names
    assert all(query["heat"][0] for query in content["queries"])
    for query in content["queries"]:
        found = [content["images"][row[0]][0] for row in query["runs"][0]["found"]]
        assert len(found) == 5 and query["name"] not in found
    main([*with_options(arguments, "--labels", "folders", "--against", root / "two"), *own])
    content = content_of(path)
    assert content["settings"][0]["right"] == ["same"] and len(content["queries"]) == 6
    assert content["table"]["columns"][0] == "recall@1" and len(content["table"]["rows"][0]["values"]) == 2
    assert [row[2] for row in content["queries"][0]["runs"][0]["found"]].count("same") == 2
    (root / "labels.csv").write_text(f"path,label\n{HOSTILE}/0.png,x\n")
    assert "no label of " in refused(capsys, *with_options(arguments, "--labels", root / "labels.csv"), *own)


def test_what_is_missing_is_said_and_left_blank(runs, tmp_path, capsys):
    root, arguments = runs
    shutil.copytree(root / "data", tmp_path / "data")
    for image in ("query0", "image3"):
        (tmp_path / "data" / "toy" / "jpg" / f"{image}.jpg").unlink()
    more = ["INFER.DATA_DIR", str(tmp_path / "data"), "TEST.WEIGHTS", str(tmp_path / "none.pyth")]
    (root / "one.pyth").rename(tmp_path / "moved.pyth")
    main([*with_options(arguments, "--out", tmp_path / "page.html"), *more])
    content = content_of(tmp_path / "page.html")
    assert content["queries"][0]["photo"] is None and content["queries"][1]["photo"]
    assert [name for name, photo in content["images"] if photo is None] == ["image3"]
    told = capsys.readouterr().err
    assert "note: 1 of 9 results have no picture here: " in told and "image3.jpg: no such file" in told
    assert "1 of 4 queries have no picture here" in told and "none.pyth: no such weights" in told
    assert len(content["notes"]) == 3
    for place in (root, tmp_path):  # the terminal tells the place, the page the name
        assert str(place) not in (tmp_path / "page.html").read_text()
    assert any("image3.jpg: no such file" in note for note in content["notes"]) and str(tmp_path) in told
    # Found where TEST.WEIGHTS says, if they are the same.
    for name, message in (("moved", ""), ("other", "not the weights the set was described with")):
        shutil.copy(root / "two.pyth", tmp_path / "other.pyth")
        main(
            [*with_options(arguments, "--out", tmp_path / "page.html"), "TEST.WEIGHTS", str(tmp_path / f"{name}.pyth")]
        )
        content = content_of(tmp_path / "page.html")
        assert bool(content["queries"][0]["heat"][0]) == (not message) and message in "".join(content["notes"])
    (tmp_path / "moved.pyth").rename(root / "one.pyth")
    # What is named for one run does not take the other's away.
    main([*with_options(arguments, "--out", tmp_path / "page.html"), "TEST.WEIGHTS", str(root / "two.pyth")])
    assert content_of(tmp_path / "page.html")["queries"][0]["heat"][0]


def test_before_and_after_post_processing(runs, capsys):
    root, arguments = runs
    processed = ["SCORE.RERANK", "5", "SCORE.RERANK_NEIGHBOURS", "2"]
    main([*with_options(arguments, "--unprocessed", "--no-attention"), *processed])
    content = content_of(root / "one" / "reports" / "toy_processed.html")
    assert [run["card"]["post_processing"] == [] for run in content["runs"]] == [True, False]
    assert content["queries"][0]["heat"] == []
    main(with_options(arguments, "--out", root / "plain.html"))
    before, after = (content["queries"][0]["runs"][i]["found"] for i in (0, 1))
    assert sorted(row[0] for row in before[:5]) == sorted(row[0] for row in after[:5])
    assert "--unprocessed compares one run" in refused(capsys, *with_options(arguments, "--unprocessed"))


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (["--labels", "folders"], [], "--labels is for INFER.IMAGES"),
        ([], ["INFER.DATASETS", "revisitop1m"], "nothing to show"),
        (["--out", "x.html"], ["INFER.DATASETS", "toy,other"], "--out names one page, INFER.DATASETS 2 sets"),
        ([], ["INFER.IMAGES", "photos", "SCORE.QE", "2"], "is not applied to INFER.IMAGES"),
        (["--against", "absent"], [], "no descriptors of 'queries' here"),
        ([], ["INFER.DATASETS", "roxford5k"], "there is no ground truth"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, monkeypatch, options, more, message):
    root, arguments = runs
    monkeypatch.chdir(root)
    assert message in refused(capsys, *with_options(arguments, *options), *more)
    assert not (root / "x.html").exists()


def test_runs_of_other_images_are_not_put_side_by_side(runs, tmp_path, capsys):
    root, arguments = runs
    write_image(tmp_path / "photos" / "z.png", photograph(1, 50, 50))
    weights = ["TEST.WEIGHTS", str(root / "one.pyth")]
    extract.main([*arguments, *weights, "INFER.IMAGES", str(tmp_path / "photos"), "OUT_DIR", str(tmp_path / "out")])
    options = with_options(arguments, "--against", tmp_path / "out")
    told = refused(capsys, *options, "INFER.IMAGES", str(root / "photos"))
    assert told.endswith(f"its images of photos are others than those in {root / 'one'}")


def test_distractors_are_among_the_results(runs):
    root, arguments = runs
    folder = root / "data" / "revisitop1m"
    for seed in range(3):
        write_image(folder / "jpg" / f"d{seed}.jpg", photograph(seed, 50, 50))  # like the queries
    (folder / "revisitop1m.txt").write_text("d0.jpg\nd1.jpg\nd2.jpg\n")
    sets = ["INFER.DATASETS", "toy,revisitop1m"]
    extract.main([*arguments, "TEST.WEIGHTS", str(root / "one.pyth"), *sets])
    main([*with_options(arguments, "--no-attention"), *sets])
    content = content_of(root / "one" / "reports" / "toy_with_distractors.html")
    assert content["title"].startswith("toy + 3 distractors")
    for query in content["queries"]:
        found = {content["images"][row[0]][0]: row[2] for row in query["runs"][0]["found"]}
        assert len(found) == 12 and found["d1.jpg"] == "negative"
    assert all(photo for _, photo in content["images"])


def test_queries_are_spread_over_a_set():
    assert spread(5, 0) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 1) == [0]


def test_the_page_s_script_is_the_one_it_allows(runs):
    page = report_page.page_bytes({"title": "a & b </script>", "runs": [], "notes": []}).decode()
    assert "<title>a &amp; b &lt;/script&gt;" in page and page.count("</script>") == 2 and "@@" not in page


def test_paths_are_left_out_of_what_is_mailed():
    card = {"weights": "/home/me/my runs/w.pyth", "set": "toy", "scales": [1.0]}
    notes = [
        "1 of 2 have none: /home/me/my photos/a.jpg: no such file",
        "~/x/y.pyth differs",
        "1/2 and/or",
        "none at ../b/c",
    ]
    runs = [{"name": name, "card": card, "line": ""} for name in ("/a/out", "/b/out")]
    made = without_places({"runs": runs, "notes": notes, "title": "a/b"})
    assert [run["name"] for run in made["runs"]] == ["out (1)", "out (2)"] and made["title"] == "a/b"
    assert made["runs"][0]["card"] == card | {"weights": "w.pyth"}
    assert made["notes"] == ["1 of 2 have none: a.jpg: no such file", "y.pyth differs", "1/2 and/or", "none at c"]
