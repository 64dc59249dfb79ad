"""Two scores of one set: by how much they differ, whether chance would do as much, and which queries changed."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.base.json_files import write_json
from evaler.scoring.score import SAME, Score, read

SAMPLES = 10_000
PER_QUERY = {"mAP": "AP", "mAP@100": "AP@100"}  # what a metric is the mean of
AT_ONCE = 2**20  # values drawn at once: a labelled set has as many queries as images
CONFIDENCE = 95  # percent
TELLS_NOTHING = ("weights", "extracted_by", "scored_by")  # where the file lay, and which code


@dataclass(frozen=True)
class Difference:
    """B - A in points of the metric over the queries that count, with the bounds of the interval."""

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


def compare_queries(a: np.ndarray, b: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> Difference:
    """Values in percent of the same queries, [Q] each. Raises UserError without a query.

    The interval is the percentile bootstrap over queries, drawn in pairs (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13; for retrieval Sakai, SIGIR 2006). It tells how much depends on which queries the set
    happens to have, and nothing of what another training run would give.
    """
    if not len(a):
        raise UserError("there is no query to compare")
    change = b - a
    random, rows = np.random.default_rng(seed), max(1, AT_ONCE // len(change))
    means = [
        change[random.integers(0, len(change), (min(rows, samples - start), len(change)))].mean(axis=1)
        for start in range(0, samples, rows)
    ]
    edge = (100 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [edge, 100 - edge])
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return Difference(float(a.mean()), float(b.mean()), float(low), float(high), better, worse, len(change))


def compare(a: Score, b: Score) -> dict:
    """Two scores -> setting -> `difference` and `queries` (name, value in A, value in B, most changed first), and
    `card`: what differs on the two cards, key -> [A's, B's].

    Raises UserError for scores of other protocols, sets, labels or numbers of distractors.
    """
    pairs = {"protocol": (a.protocol, b.protocol)} | {key: (a.card[key], b.card[key]) for key in SAME}
    for key, (one, other) in pairs.items():
        if one != other:
            raise UserError(f"the scores cannot be compared: {key} is {one} in one, {other} in the other")
    if a.query_names != b.query_names:
        raise UserError("the scores cannot be compared: their queries are others")
    keys = sorted((a.card.keys() | b.card.keys()) - set(TELLS_NOTHING))
    cards = [(key, a.card.get(key), b.card.get(key)) for key in keys]
    result: dict = {"card": {key: [one, other] for key, one, other in cards if one != other}}
    for setting in [key for key in a.settings if key in b.settings]:
        of_query = zip(a.query_names, a.settings[setting].per_query, b.settings[setting].per_query, strict=True)
        counted = [(name, one, other) for name, one, other in of_query if one is not None and other is not None]
        if counted:
            values = np.array([row[1:] for row in counted], dtype=np.float64).T
            changed = sorted(counted, key=lambda row: (-abs(row[2] - row[1]), row[0]))
            result[setting] = {"difference": asdict(compare_queries(*values)), "queries": changed}
    return result


def table(result: dict, score: Score, *, most: int) -> str:
    """For a terminal: a line for each setting of the scores, of which one is given, then for each the `most` queries
    that changed most."""
    width = max(8, *(len(setting.name) for setting in score.settings.values()))
    lines = [
        f"{'':<{width + 2}}{'A':>8}{'B':>8}{'B - A':>9}   {CONFIDENCE} % of resampled queries   better / worse / of"
    ]
    for key, setting in score.settings.items():
        name = f"  {setting.name:<{width}}"
        if key not in result:
            lines.append(f"{name}{'-':>8}{'-':>8}{'-':>9}   no query has positives")
            continue
        difference = Difference(**result[key]["difference"])
        interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
        sure = "" if difference.low > 0 or difference.high < 0 else "   holds 0: not told apart by these queries"
        counts = f"{difference.better} / {difference.worse} / {difference.queries}"
        lines.append(
            f"{name}{difference.a:>8.2f}{difference.b:>8.2f}{difference.mean:>+9.2f}   {interval:<27}{counts:<18}{sure}"
        )
    for key, (one, other) in result["card"].items():
        lines.append(f"  differs: {key}  {one} -> {other}")
    for key, setting in score.settings.items():
        changed = [row for row in result.get(key, {}).get("queries", [])[:most] if row[1] != row[2]]
        if changed:
            lines += ["", f"{setting.name}: queries that changed most ({PER_QUERY.get(score.metric, score.metric)})"]
            lines += [f"  {query:<32}{one:>8.2f}{other:>8.2f}{other - one:>+9.2f}" for query, one, other in changed]
    return "\n".join(line.rstrip() for line in lines)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Compare two scores of one set, query by query.")
    parser.add_argument(
        "a", type=Path, metavar="A.json", help="score of one run: OUT_DIR/scores/<set>.json, or of --json"
    )
    parser.add_argument("b", type=Path, metavar="B.json", help="and of the other")
    parser.add_argument(
        "--queries", type=int, default=5, metavar="N", help="show so many that changed most (default 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")
    args = parser.parse_args(argv)
    if args.queries < 0:
        parser.error(f"--queries {args.queries}: must be 0 or more")
    a, b = read(args.a), read(args.b)
    result = compare(a, b)
    print(f"A: {args.a}\nB: {args.b}\n\n{table(result, a, most=args.queries)}")
    if args.json:
        write_json(args.json, result)
