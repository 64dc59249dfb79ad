"""Time ours against the published way.

python scripts/benchmark.py all [--calls N] [--json FILE]
python scripts/benchmark.py head|loader|step|extract|evaluate|search [--mode MODE] [--json FILE]
python scripts/benchmark.py drift --cfg FILE [--images N] [--compile] [--json FILE] [KEY VALUE ...]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from core.base.errors import entry_point
from core.config import load_cfg
from evaler.network import claim_process
from scripts.benchmarks import drift
from scripts.benchmarks.calls import all_tables
from scripts.benchmarks.evaluation import evaluate_cases, stream_cases
from scripts.benchmarks.extraction import extract_cases
from scripts.benchmarks.search import search_cases
from scripts.benchmarks.timing import Case, machine, report
from scripts.benchmarks.training import head_cases, loader_cases, step_cases

# The first is the default.
MODES = {
    "loader": ("exact", "fast"),
    "step": ("fp32", "bf16", "tf32", "fp16"),
    "extract": ("fp32", "bf16", "fp16"),
    "evaluate": ("1m", "10m"),
}


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Time ours against a plain implementation of the published way, side by side in one process.",
        epilog="Run it on an idle machine: the load from before is printed with the result.",
    )
    parser.add_argument(
        "name", choices=["all", "head", "loader", "step", "extract", "evaluate", "search", "drift"], help="what to time"
    )
    listed = "; ".join(f"{name}: {', '.join(choices)}" for name, choices in MODES.items())
    parser.add_argument("--mode", help=f"{listed}; the first is the default")
    parser.add_argument("--size", type=int, help="side of the images in pixels (loader: 512, step: 224, extract: 1024)")
    parser.add_argument("--batch", type=int, help="images a batch (head: 8 and 64, step: 8)")
    parser.add_argument("--depth", type=int, default=50, choices=[50, 101, 152], help="of the ResNet")
    parser.add_argument("--compile", action="store_true", help="compile our step; drift: compare that network too")
    parser.add_argument("--threads", type=int, help="of PyTorch, for both sides")
    parser.add_argument("--seconds", type=float, default=16.0, help="how long to time each case, about")
    parser.add_argument("--pairs", type=int, default=3, help="how often to time each case at least")
    parser.add_argument("--calls", type=int, default=3, help="all: how often to call each command, in fresh processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="evaluate: labels of this ground truth (gnd_*.pkl)")
    parser.add_argument("--cfg", metavar="FILE", help="drift: YAML file of settings, of the weights and the set")
    parser.add_argument("--images", type=int, help="drift: of each collection only so many, without scores")
    parser.add_argument("settings", nargs="*", metavar="KEY VALUE", help="drift: settings that win over FILE")
    args = parser.parse_intermixed_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.name == "drift":
        if args.cfg is None:
            parser.error("drift needs --cfg FILE")
        cfg = load_cfg(args.cfg, args.settings)
        claim_process(cfg)
        rows = drift.drift(cfg, most=args.images, compiled=args.compile)
        print(drift.table(rows))
        if args.json:
            drift.write(rows, args.json)
        return
    if args.name == "all":
        print(all_tables(calls=args.calls, truth=args.truth, path=args.json))
        return
    if args.settings:
        parser.error(f"{args.name} takes no settings: {' '.join(args.settings)}")
    modes = MODES.get(args.name, ("",))
    mode = args.mode or modes[0]
    if mode not in modes:
        parser.error(f"{args.name} has no --mode {mode}" + (f", but {', '.join(modes)}" if modes[0] else ""))
    before = machine()
    print(report(args.name, mode, cases(args, mode), before=before, path=args.json))


def cases(args: argparse.Namespace, mode: str) -> Iterator[Case]:
    timed = {"seconds": args.seconds, "least": args.pairs}
    if args.name == "head":
        return head_cases(batches=(args.batch,) if args.batch else (8, 64), **timed | {"seconds": args.seconds / 2})
    if args.name == "extract":
        side = args.size or 1024
        return extract_cases(mode, depth=args.depth, size=(side * 3 // 4, side), **timed)
    if args.name == "evaluate":
        return evaluate_cases(truth=args.truth, runs=args.pairs) if mode == "1m" else stream_cases()
    if args.name == "search":
        return search_cases(**timed)
    if args.name == "loader":
        return loader_cases(mode, size=args.size or 512, **timed)
    size, batch = args.size or 224, args.batch or 8
    return step_cases(depth=args.depth, size=size, batch=batch, precision=mode, compiled=args.compile, **timed)
