"""What a process shares (PyTorch's threads, TF32, seeds, the current GPU, OpenCV's threads) is set in few places."""

import ast
import re

import pytest

from tests.test_imports import our_sources

CALLS = re.compile(
    r"(set_num_threads|set_num_interop_threads|set_float32_matmul_precision|setNumThreads|set_device|manual_seed"
    r"|set_default_dtype|set_default_device|use_deterministic_algorithms|set_float32_precision)$"
)
ASSIGNED = re.compile(r"torch\.backends\.|cudnn\.(allow_tf32|benchmark|deterministic)|.*\.fp32_precision$")
# Where, and whose process it is. Nothing that a program calls for descriptors may be added.
ALLOWED = {
    "core/step.py set_float32_precision": "called by what is listed here",
    "core/trainer.py train": "training's process",
    "core/processes/launch.py": "training's processes",
    "evaler/network.py claim_process": "called by a command's main",
    "evaler/network.py _tf32_off": "for the time of a call, and put back",
    "evaler/during_training.py _untimed": "training's process; put back afterwards",
    "datasets/worker.py": "a worker's process",
    "datasets/loader.py": "a worker's process",
    "datasets/toy/landmarks.py": "a worker's process",
    "scripts/": "benchmarks, in their own process",
}


def set_in(source: str) -> list[tuple[int, str]]:
    """(line, function) of each place that sets something shared; the function is empty at a module's top."""
    found = []

    def walk(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                walk(child, child.name)
                continue
            targets = child.targets if isinstance(child, ast.Assign) else []
            parts = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
            if any(isinstance(part, ast.Attribute) and ASSIGNED.match(ast.unparse(part)) for part in parts):
                found.append((child.lineno, function))
            called = ast.unparse(child.func) if isinstance(child, ast.Call) else ""
            if CALLS.search(called) and "enerator" not in called:  # a generator of one's own is nobody else's
                found.append((child.lineno, function))
            walk(child, function)

    walk(ast.parse(source), "")
    return found


def test_only_known_places_set_what_a_process_shares():
    places = {
        f"{path} {function}": line
        for path, source in our_sources().items()
        if not path.startswith("tests/")
        for line, function in set_in(source)
        if function != "main"
    }
    unknown = [place for place in places if not any(place.startswith(allowed) for allowed in ALLOWED)]
    assert unknown == []


@pytest.mark.parametrize("call", ["claim_process"])
def test_it_is_called_by_commands_alone(call):
    callers = [
        (path, node.name)
        for path, source in our_sources().items()
        if not path.startswith("tests/")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and re.search(rf"\b{call}\(", ast.unparse(node))
    ]
    assert {name for _, name in callers} == {"main", call} and len(callers) == 4


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n    torch.backends.cudnn.allow_tf32 = False", [(2, "f")]),
        ("def f():\n    a, torch.backends.cudnn.benchmark = 1, False", [(2, "f")]),
        ("cv2.setNumThreads(0)", [(1, "")]),
        ("def main():\n    torch.cuda.set_device(0)", [(2, "main")]),
        ("x = torch.Generator().manual_seed(1)\nallowed = torch.backends.cudnn.allow_tf32", []),
    ],
)
def test_what_sets_it_is_seen(source, expected):
    assert set_in(source) == expected
