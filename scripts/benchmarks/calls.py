"""Every table of docs/performance.md: each command several times in fresh processes, medians and ranges over these."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from core.base.errors import UserError
from core.base.json_files import write_json
from scripts.benchmarks.timing import conditions, machine, spread

COMMAND = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
# So many seconds and pairs a call that three calls of all take about twelve minutes on two idle cores.
TABLES = (
    ("head", "--seconds", "6"),
    ("loader", "--mode", "exact", "--seconds", "6"),
    ("loader", "--mode", "fast", "--seconds", "6"),
    ("step", "--mode", "fp32", "--seconds", "0"),
    ("step", "--mode", "bf16", "--seconds", "0"),
    ("extract", "--mode", "fp32", "--seconds", "0", "--pairs", "1"),
    ("extract", "--mode", "bf16", "--seconds", "0", "--pairs", "1"),
    ("evaluate", "--mode", "1m", "--pairs", "1"),
    ("search", "--seconds", "0"),
)
ONCE = (("evaluate", "--mode", "10m"),)  # its two sides are both ours: a load cannot flatter one of them


def all_tables(*, calls: int, truth: Path | None = None, path: Path | None = None) -> str:
    """The tables as text, with a row a case; all that was measured as JSON in `path`."""
    before = machine()
    records = []
    for number in range(calls):  # in turn, so that the calls of one command lie minutes apart
        for arguments in (*TABLES, *(ONCE if number == 0 else ())):
            extra = ("--truth", str(truth)) if truth and arguments[0] == "evaluate" else ()
            records.append(_call((*arguments, *extra)))
            print(f"{number + 1}/{calls} {' '.join(arguments)}: {records[-1]['ratio']:.2f}", file=sys.stderr)
    if path is not None:
        write_json(path, {"machine": before, "calls": records})
    return "\n".join([*rows(records), "", *conditions({**records[-1], "machine": before})])


def _call(arguments: tuple[str, ...]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(COMMAND), *arguments, "--json", str(result)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise UserError(f"benchmark.py {' '.join(arguments)}: {ended.stderr.strip()[-500:]}")
        return json.loads(result.read_text())


def rows(records: list[dict]) -> list[str]:
    """Lines of a Markdown table: a row for each case of each benchmark, over all calls of it."""
    by_row: dict[tuple[str, str, str], list[dict]] = {}
    for record in records:
        for case in record["cases"]:
            by_row.setdefault((record["name"], record["mode"], case["case"]), []).append(case)
    lines = ["| benchmark | case | ours, s | against, s | ratio | calls x pairs | |", "|---|---|---|---|---|---|---|"]
    for (name, mode, case), same in by_row.items():
        ours, against = (spread([one[side] for one in same], 3) for side in ("ours", "baseline"))
        ratio = spread([one["ratio"] for one in same], 2)
        pairs = statistics.median_low(one["pairs"] for one in same)
        title = f"{name}, {mode}" if mode else name
        note = same[-1]["note"]
        lines.append(f"| {title} | {case} | {ours} | {against} | {ratio} | {len(same)} x {pairs} | {note} |")
    return lines
