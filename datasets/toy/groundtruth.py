"""Which database pictures of the toy set a query should find: the ground truth in the Revisited format."""

from pathlib import Path

import numpy as np

EASY_VISIBLE = 0.7  # part of the landmark that an easy picture shows at least
JUNK_VISIBLE = 0.42  # a picture that shows less of it is neither right nor wrong
JUNK_AREA = 0.02  # nor is one of which the landmark covers less than this part
EASY_CHANGE = 0.35  # most change of look that is still easy


def grade(query: dict, image: dict) -> str:
    """easy, hard or junk: how well a database picture of the query's landmark can be matched to it, by its record."""
    if image["visible"] < JUNK_VISIBLE or image["area"] < JUNK_AREA:
        return "junk"
    change = image["severity"] + 0.3 * abs(image["yaw"] - query["yaw"]) / 50
    return "easy" if image["visible"] >= EASY_VISIBLE and change <= EASY_CHANGE else "hard"


def ground_truth(seed: int, records: dict[str, dict]) -> dict:
    """The Revisited dictionary imlist, qimlist, gnd; the database in a random order, so that no tie favours anybody."""
    queries = sorted(path for path, r in records.items() if r["role"] == "query")
    database = sorted(path for path, r in records.items() if r["role"] in ("database", "distractor"))
    database = [database[i] for i in np.random.default_rng(seed).permutation(len(database))]
    gnd = []
    for path in queries:
        query = records[path]
        entry: dict = {"bbx": [float(v) for v in query["box"]], "easy": [], "hard": [], "junk": []}
        for i, name in enumerate(database):
            if records[name]["role"] == "database" and records[name]["landmark"] == query["landmark"]:
                entry[grade(query, records[name])].append(i)
        gnd.append(entry)
    return {"imlist": [Path(n).stem for n in database], "qimlist": [Path(n).stem for n in queries], "gnd": gnd}
