"""Two scores of one set: by how much they differ, whether chance would do as much, and which queries changed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.base.json_files import write_json
from revisitop.protocol import SETTING_NAMES

SAMPLES = 10_000
CONFIDENCE = 95  # percent
# What makes two scores incomparable; everything else on the card is what one may want to compare.
SAME = ("set", "gallery", "distractors", "ground_truth_sha256")
TELLS_NOTHING = ("weights", "extracted_by", "scored_by")  # where the file lay, and which code


@dataclass(frozen=True)
class Difference:
    """B - A in points of mAP over the queries that have positives, with the bounds of the interval."""

    a: float
    b: float
    low: float
    high: float
    better: int  # queries
    worse: int
    queries: int

    @property
    def mean(self) -> float:
        return self.b - self.a


def compare_aps(a: np.ndarray, b: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> Difference:
    """AP in percent of the same queries, [Q] each. Raises UserError without a query.

    The interval is the percentile bootstrap over queries, drawn in pairs (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13; for retrieval Sakai, SIGIR 2006). It tells how much depends on which queries the set
    happens to have, and nothing of what another training run would give.
    """
    if not len(a):
        raise UserError("there is no query to compare")
    change = b - a
    drawn = np.random.default_rng(seed).integers(0, len(change), (samples, len(change)))
    edge = (100 - CONFIDENCE) / 2
    low, high = np.percentile(change[drawn].mean(axis=1), [edge, 100 - edge])
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return Difference(float(a.mean()), float(b.mean()), float(low), float(high), better, worse, len(change))


def read_score(path: Path) -> dict:
    """A score that evaler/evaluate.py has written. Raises UserError naming the file."""
    try:
        score = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; evaler/evaluate.py writes OUT_DIR/scores/<set>.json") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: not the JSON of a score") from None
    if not _is_score(score):
        raise UserError(f"{path}: not a score of evaler/evaluate.py, or one of an older version; score again")
    return score


def _is_score(score: object) -> bool:
    if not (isinstance(score, dict) and isinstance(score.get("card"), dict) and set(SAME) <= score["card"].keys()):
        return False
    names = score.get("query_names")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        return False
    return all(_are_aps(score.get(setting), len(names)) for setting in SETTING_NAMES)


def _are_aps(scores: object, count: int) -> bool:
    aps = scores.get("aps") if isinstance(scores, dict) else None
    fits = isinstance(aps, list) and len(aps) == count
    return fits and all(ap is None or (type(ap) in (int, float) and 0 <= ap <= 100) for ap in aps)


def compare(a: dict, b: dict) -> dict:
    """Two scores -> setting -> `difference` and `queries` (name, AP in A, AP in B, most changed first), and `card`:
    what differs on the two cards, key -> [A's, B's].

    Raises UserError for scores of other sets, labels or numbers of distractors.
    """
    for key in SAME:
        if a["card"][key] != b["card"][key]:
            raise UserError(
                f"the scores cannot be compared: {key} is {a['card'][key]} in one, {b['card'][key]} in the other"
            )
    if a["query_names"] != b["query_names"]:
        raise UserError("the scores cannot be compared: their queries are others")
    keys = sorted((a["card"].keys() | b["card"].keys()) - set(TELLS_NOTHING))
    cards = [(key, a["card"].get(key), b["card"].get(key)) for key in keys]
    result: dict = {"card": {key: [one, other] for key, one, other in cards if one != other}}
    for setting in SETTING_NAMES:
        pairs = zip(a["query_names"], a[setting]["aps"], b[setting]["aps"], strict=True)
        counted = [(name, one, other) for name, one, other in pairs if one is not None and other is not None]
        if counted:
            aps = np.array([row[1:] for row in counted], dtype=np.float64).T
            changed = sorted(counted, key=lambda row: (-abs(row[2] - row[1]), row[0]))
            result[setting] = {"difference": asdict(compare_aps(*aps)), "queries": changed}
    return result


def table(result: dict, *, most: int) -> str:
    """For a terminal: a line a setting, then for each the `most` queries that changed most."""
    lines = [f"{'':<10}{'A':>8}{'B':>8}{'B - A':>9}   {CONFIDENCE} % of resampled queries   better / worse / of"]
    for setting, name in SETTING_NAMES.items():
        if setting not in result:
            lines.append(f"  {name:<8}{'-':>8}{'-':>8}{'-':>9}   no query has positives")
            continue
        found = Difference(**result[setting]["difference"])
        interval = f"{found.low:+.2f} to {found.high:+.2f}"
        sure = "" if found.low > 0 or found.high < 0 else "   holds 0: not told apart by these queries"
        counts = f"{found.better} / {found.worse} / {found.queries}"
        lines.append(f"  {name:<8}{found.a:>8.2f}{found.b:>8.2f}{found.mean:>+9.2f}   {interval:<27}{counts:<18}{sure}")
    for key, (one, other) in result["card"].items():
        lines.append(f"  differs: {key}  {one} -> {other}")
    for setting, name in SETTING_NAMES.items():
        changed = [row for row in result.get(setting, {}).get("queries", [])[:most] if row[1] != row[2]]
        if changed:
            lines += ["", f"{name}: queries that changed most (AP)"]
            lines += [f"  {query:<32}{one:>8.2f}{other:>8.2f}{other - one:>+9.2f}" for query, one, other in changed]
    return "\n".join(line.rstrip() for line in lines)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Compare two scores of one set, query by query.")
    parser.add_argument("a", type=Path, metavar="A.json", help="OUT_DIR/scores/<set>.json of one run")
    parser.add_argument("b", type=Path, metavar="B.json", help="and of the other")
    parser.add_argument(
        "--queries", type=int, default=5, metavar="N", help="show so many that changed most (default 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")
    args = parser.parse_args(argv)
    if args.queries < 0:
        parser.error(f"--queries {args.queries}: must be 0 or more")
    result = compare(read_score(args.a), read_score(args.b))
    print(f"A: {args.a}\nB: {args.b}\n\n{table(result, most=args.queries)}")
    if args.json:
        write_json(args.json, result)
