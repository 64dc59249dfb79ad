"""Who may import whom (CONTRIBUTING.md), read from the source with `ast`, imports inside functions included."""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"model", "datasets", "revisitop"}
PACKAGES = LEAVES | {"core", "evaler", "scripts"}
# Who imports whom among the rooms of evaler: only downwards, and freely within a room.
FLOORS = {
    **{"sources": 0, "features": 1, "network": 2, "extraction": 3},
    **{"describer": 4, "during_training": 4, "refinement": 4, "scoring": 5, "indexing": 5, "pages": 6},
}
MOST_FILES = 18  # in one folder, so that it is taken in at a glance
TOP_LEVEL = PACKAGES | {
    *("configs", "docs", "pretrained", "tests"),
    *("train.py", "hubconf.py", "pyproject.toml"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"),
    *("requirements.txt", "requirements-cpu.txt", "requirements-dev.txt", "requirements-milvus.txt"),
}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield (node, dotted name) for every import; `from a import b` gives `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = [*parents, *([node.module] if node.module else [])]
            yield from ((node, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "run") and isinstance(node.args[0].value, str):
                yield node, node.args[0].value


def main_guard(tree: ast.Module) -> ast.If | None:
    """The `if __name__ == "__main__":` statement."""
    for node in tree.body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) and "__main__" in ast.unparse(node.test):
            return node
    return None


def is_entry(path: str, tree: ast.Module) -> bool:
    script = path.startswith("scripts/") and path.count("/") == 1 and path != "scripts/__init__.py"
    return path in ("train.py", "hubconf.py") or script or main_guard(tree) is not None


def run_when_imported(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those inside functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_when_imported(child)


def violations(sources: dict[str, str]) -> list[str]:
    """Check {path relative to the root: source}; return `path:line: what is wrong` for each broken rule."""
    trees = {path: ast.parse(source, path) for path, source in sources.items()}
    entries = {
        path.removesuffix(".py").replace("/", ".")
        for path, tree in trees.items()
        if not path.startswith("tests/") and is_entry(path, tree)
    }
    found = []
    for path, tree in trees.items():
        package = ".".join(path.split("/")[:-1])
        loaded = {id(node) for node in run_when_imported(tree)}
        for node, name in imports(tree, package):
            module = path.removesuffix(".py").replace("/", ".")
            problems = [import_problem(path, name, entries - {module})]
            if module in entries and name.startswith("core.base.door"):
                problems = []  # what starts a command is for the doors of leaves, too
            if name.split(".")[0] == "torchvision" and id(node) in loaded:
                problems.append("torchvision is imported at the module's top; a CPU machine does not have it")
            found += [f"{path}:{node.lineno}: {problem}" for problem in problems if problem]
        if "/" in path and not path.startswith("tests/") and is_entry(path, tree):
            found += [f"{path}:{line}: {problem}" for line, problem in entry_problems(path, tree)]
    return sorted(found)


def import_problem(path: str, name: str, entries: set[str]) -> str | None:
    """Say why `path` may not import `name`."""
    if path.startswith("tests/"):
        return None
    home, target = path.split("/")[0], name.split(".")[0]
    entry = next((entry for entry in entries if f"{name}.".startswith(f"{entry}.")), None)
    if entry is not None or target == "tests":
        return f"{entry or name} is imported; only tests import entry files and tests"
    foreign = target in ("torch", "yacs") or (target in PACKAGES and not f"{name}.".startswith("core.base."))
    if path.startswith("core/base/") and foreign:
        return f"core/base needs no torch, no yacs and nothing else of ours, but here {name}"
    if home in LEAVES and target == "yacs":
        return f"{home} is a leaf and knows no config, so no yacs"
    if home in LEAVES and target in PACKAGES - {home}:
        return f"{home} is a leaf and imports none of our packages, but here {target}"
    if target == "scripts" and home != "scripts":
        return "scripts is imported; only its own entry files and tests may"
    if home not in ("evaler", "scripts") and home in PACKAGES and target == "evaler":
        return f"{home} imports evaler; only entry files may"
    if home == "evaler" and target == "evaler" and (problem := floor_problem(path, name)):
        return problem
    if home == "core" and target == "revisitop":
        return "core imports revisitop; hand the score in as a callable"
    if home == "core" and target in ("model", "datasets"):
        weights = path.startswith("core/checkpoints/") and f"{name}.".startswith("model.weights.")
        table = f"{name}.".startswith("model.backbones.")
        if path != "core/builders.py" and not weights and not table:
            return f"{target} is imported; in core only builders.py may, besides model.backbones"
    return None


def floor_problem(path: str, name: str) -> str | None:
    """Say why a file of evaler may not import `name`, another module of evaler."""
    room = path.split("/")[1].removesuffix(".py")
    other = name.split(".")[1] if "." in name else ""
    if room == other or room not in FLOORS or other not in FLOORS or FLOORS[other] < FLOORS[room]:
        return None
    return f"{room} imports {other}, which does not lie below it"


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Circles of imports among the given files, those inside functions included."""
    modules = {path.removesuffix(".py").replace("/", "."): path for path in sources}
    uses: dict[str, set[str]] = {}
    for module, path in modules.items():
        package = ".".join(path.split("/")[:-1])
        names = {name for _, name in imports(ast.parse(sources[path], path), package)}
        named = {name if name in modules else name.rpartition(".")[0] for name in names}
        uses[module] = {name for name in named if name in modules and name != module}
    while True:  # until every module that is left uses one that is left, and is used by one
        left = {module: others & uses.keys() for module, others in uses.items()}
        used = set().union(*left.values())
        uses = {module: others for module, others in left.items() if others and module in used}
        if uses.keys() == left.keys():
            return [[module, *sorted(others)] for module, others in sorted(uses.items())]


def entry_problems(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A file in a folder that is run: no logic, and our packages only after the path line."""
    guard = main_guard(tree)
    if guard is None:
        yield 1, 'an entry file needs `if __name__ == "__main__":`'
        return
    if not ast.unparse(guard.body[0]).startswith("sys.path[0] ="):
        yield guard.lineno, "the first thing an entry file does is to set sys.path[0] to the repository's root"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name != "main":
            yield node.lineno, f"{node.name}: an entry file holds only the path line and main()"
    early = [node for top in tree.body[: tree.body.index(guard)] for node in run_when_imported(top)]
    for node, name in imports(tree, ".".join(path.split("/")[:-1])):
        if name.split(".")[0] in PACKAGES and any(node is other for other in early):
            yield node.lineno, f"{name} is imported before the path line"


# --------------------------------------------------------------------------------------------------- the repository


def our_sources() -> dict[str, str]:
    files = [*ROOT.glob("*.py")]
    for folder in sorted(PACKAGES | {"scripts", "tests"}):
        files += [file for file in (ROOT / folder).rglob("*.py") if not file.is_relative_to(ROOT / "datasets/data")]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_the_repository_keeps_the_rules():
    sources = our_sources()
    assert {path.split("/")[0] for path in sources} >= PACKAGES
    assert violations(sources) == []


def test_no_imports_form_a_circle():
    assert circles({path: source for path, source in our_sources().items() if not path.startswith("tests/")}) == []


def test_no_folder_is_crowded():
    counts = Counter(str(Path(path).parent) for path in our_sources() if not path.startswith("tests/"))
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_nothing_new_stands_at_the_top_level():
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    top = {name.split("/")[0] for name in listed if name}
    assert {name for name in top - TOP_LEVEL if not name.startswith(".")} == set()


def test_names_of_test_files_are_unique():
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


# -------------------------------------------------------------------------------------------------- the checker itself

GOOD = {
    "train.py": "from core.trainer import train\nfrom evaler.scoring.score import score\n",
    "hubconf.py": "from evaler.describer import describe\ndef dolg():\n    import torchvision\n",
    "core/trainer.py": "from core.builders import build\nfrom yacs.config import CfgNode\nfrom . import builders\n",
    "core/summary.py": "from model.backbones import BACKBONES\n",
    "core/builders.py": "import model\nfrom datasets.loader import make\nimport model.dolg\n",
    "core/checkpoints/resume.py": "import model.weights\nfrom model.weights import load\nfrom model import weights\n",
    "core/base/door.py": "import os\nfrom core.base.files import atomic_write\nfrom . import files\n",
    "core/base/files.py": "",
    "model/dolg.py": "import torch\nfrom model.gem import GeM\nfrom .gem import GeM\nfrom . import gem\n",
    "model/gem.py": "import modelling\n",
    "model/backbones.py": "from importlib import import_module\nload = lambda: import_module('model.gem').GeM\n",
    "model/weights.py": "",
    "datasets/loader.py": "def f():\n    import torchvision\n",
    "datasets/gldv2.py": (
        "import sys\nif __name__ == '__main__':\n    sys.path[0] = 'x'\n"
        "    from core.base.door import run\n    run('datasets.loader')\n"
    ),
    "revisitop/protocol.py": "import numpy\n",
    "evaler/describer.py": "import core.builders\nfrom evaler.extraction import job\n",
    "evaler/extraction/job.py": "import model.dolg, datasets.loader\nimport revisitop\nfrom . import chunks\n",
    "evaler/extraction/chunks.py": "from evaler.features.store import load\n",
    "evaler/features/store.py": "",
    "evaler/scoring/score.py": "from yacs.config import CfgNode\nfrom evaler.extraction.job import x\n",
    "evaler/infer.py": (
        "import sys\nfrom pathlib import Path\nif __name__ == '__main__':\n"
        "    sys.path[0] = str(Path(__file__).resolve().parents[1])\n    from evaler.describer import main\n"
        "    main()\n"
    ),
    "scripts/bench.py": (
        "import sys\nif __name__ == '__main__':\n    sys.path[0] = 'x'\nfrom core import builders\n"
        "def main():\n    pass\nif __name__ == '__main__':\n    main()\n"
    ),
    "scripts/plot.py": "import sys\nif __name__ == '__main__':\n    sys.path[0] = 'x'\n    import evaler.describer\n",
    "scripts/plots/panels.py": "import core.trainer, model.gem\nfrom evaler.scoring import score\n",
    "tests/test_x.py": "import train, evaler.infer, hubconf, core.trainer\nfrom datasets import gldv2\nimport yacs\n",
}


def test_permitted_imports_are_not_reported():
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("path", "source", "line", "what"),
    [
        ("model/gem.py", "import yacs", 1, "no yacs"),
        ("model/gem.py", "x = 1\ndef f():\n    from yacs.config import CfgNode", 3, "no yacs"),
        ("revisitop/protocol.py", "import yacs.config as c", 1, "no yacs"),
        ("model/gem.py", "import core", 1, "leaf"),
        ("model/gem.py", "from core.base.files import atomic_write", 1, "leaf"),
        ("model/gem.py", "import torch, datasets.loader", 1, "leaf"),
        ("datasets/loader.py", "class A:\n    def f(self):\n        import model.gem", 3, "leaf"),
        ("datasets/loader.py", "if True:\n    import revisitop", 2, "leaf"),
        ("datasets/loader.py", "import importlib\nimportlib.import_module('revisitop.protocol')", 2, "leaf"),
        ("revisitop/protocol.py", "__import__('core')", 1, "leaf"),
        ("model/gem.py", "from .. import core", 1, "leaf"),
        ("model/gem.py", "from core.base.door import run", 1, "leaf"),
        ("datasets/gldv2.py", GOOD["datasets/gldv2.py"].replace("datasets.loader", "revisitop.protocol"), 5, "leaf"),
        ("datasets/gldv2.py", GOOD["datasets/gldv2.py"].replace("core.base.door", "core.launch"), 4, "leaf"),
        ("revisitop/protocol.py", "from evaler.scoring.score import score", 1, "leaf"),
        ("core/trainer.py", "import model", 1, "only builders.py"),
        ("core/trainer.py", "from model.weights import load", 1, "only builders.py"),
        ("core/trainer.py", "import model.backbones_old", 1, "only builders.py"),
        ("core/base/files.py", "from model.backbones import BACKBONES", 1, "nothing else of ours"),
        ("core/trainer.py", "def f():\n    from datasets import loader", 2, "only builders.py"),
        ("core/checkpoints/resume.py", "import model", 1, "only builders.py"),
        ("core/checkpoints/resume.py", "from model.dolg import DOLG", 1, "only builders.py"),
        ("core/checkpoints/resume.py", "from model.weights_old import load", 1, "only builders.py"),
        ("core/checkpoints/resume.py", "import datasets.loader", 1, "only builders.py"),
        ("core/builders.py", "import evaler", 1, "only entry files"),
        ("core/builders.py", "def f():\n    from evaler.scoring.score import score", 2, "only entry files"),
        ("core/builders.py", "from revisitop.protocol import score", 1, "callable"),
        ("evaler/scoring/score.py", "import evaler.infer", 1, "only tests"),
        ("evaler/scoring/score.py", "from evaler import infer", 1, "only tests"),
        ("evaler/scoring/score.py", "from evaler.infer import main", 1, "only tests"),
        ("evaler/describer.py", "from . import infer", 1, "only tests"),
        ("evaler/scoring/score.py", "from datasets.gldv2 import main", 1, "only tests"),
        ("core/base/files.py", "import torch.nn", 1, "no torch"),
        ("core/base/files.py", "def f():\n    from yacs.config import CfgNode", 2, "no yacs"),
        ("core/base/files.py", "from core.trainer import train", 1, "nothing else of ours"),
        ("core/base/files.py", "from core import trainer", 1, "nothing else of ours"),
        ("evaler/features/store.py", "from evaler.extraction import job", 1, "below"),
        ("evaler/features/store.py", "import evaler.extraction.job", 1, "below"),
        ("evaler/extraction/job.py", "from evaler import describer", 1, "below"),
        ("evaler/extraction/job.py", "from ..scoring.score import score", 1, "below"),
        ("core/trainer.py", "from scripts.plots.panels import x", 1, "only its own entry files"),
        ("evaler/describer.py", "from scripts.plots.panels import x", 1, "only its own entry files"),
        ("core/trainer.py", "import train", 1, "only tests"),
        ("train.py", "import hubconf", 1, "only tests"),
        ("core/trainer.py", "from scripts.plot import main", 1, "only tests"),
        ("core/trainer.py", "from tests import golden_adapter", 1, "only tests"),
        ("model/gem.py", "import torchvision", 1, "torchvision"),
        ("core/trainer.py", "try:\n    from torchvision import ops\nfinally:\n    pass", 2, "torchvision"),
        ("tests/test_x.py", "class A:\n    import torchvision.ops", 2, "torchvision"),
        ("scripts/plot.py", "from core import trainer", 1, "__main__"),
        ("scripts/plot.py", "if __name__ == '__main__':\n    from core import trainer", 1, "sys.path[0]"),
        ("evaler/infer.py", GOOD["evaler/infer.py"] + "def crop():\n    pass\n", 7, "crop"),
        ("evaler/infer.py", "import core.trainer\n" + GOOD["evaler/infer.py"], 1, "before the path line"),
    ],
)
def test_each_broken_rule_is_reported_with_its_line(path, source, line, what):
    (problem,) = violations(GOOD | {path: source})
    assert re.match(rf"{re.escape(path)}:{line}: ", problem)
    assert what in problem


def test_a_circle_is_found():
    assert circles(GOOD) == []
    changed = GOOD | {"model/gem.py": "def f():\n    from model.dolg import DOLG\n"}
    assert circles(changed) == [["model.dolg", "model.gem"], ["model.gem", "model.dolg"]]
