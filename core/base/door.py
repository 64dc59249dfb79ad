"""Start a command, or say in one line that its packages are missing.

A command is often started before its environment: nothing here needs a package, or a Python newer than 3.6.
"""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("core", "datasets", "evaler", "model", "revisitop", "scripts", "tests", "train", "hubconf")
# Where the name to import is not the name to install.
INSTALLED_AS = {"cv2": "opencv-python", "yaml": "PyYAML", "faiss": "faiss-gpu (or faiss-cpu)"}
MINIMUM = (3, 10)


def run(module):
    """Import `module` and run its `main`."""
    if sys.version_info < MINIMUM:
        _leave("this is Python {}.{}; {}.{} or newer is needed".format(*sys.version_info[:2], *MINIMUM))
    # Before PyTorch is loaded, and for all processes that come from this one. Threads that spin while they wait make
    # anything beside them many times slower: loader workers, other processes of the run.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        main = importlib.import_module(module).main
    except (ImportError, OSError) as error:  # OSError: a shared library that a package of PyTorch's needs
        line = missing_package(error)
        if line is None:
            raise
        _leave(line)
    main()


def missing_package(error):
    """What to say of a package that is not installed, or does not work here; None for a defect of the code."""
    if isinstance(error, OSError) and "shared object" not in str(error):
        return None
    name = (getattr(error, "name", None) or "").split(".")[0]
    if name in OURS:
        return None
    if isinstance(error, ModuleNotFoundError):
        return f"the package {INSTALLED_AS.get(name, name)} is not installed: {_mend()}"
    reason = " ".join(str(error).split())
    if "libGL" in reason or "libgthread" in reason:
        return f"{reason}: install the package opencv-python-headless in place of opencv-python"
    return f"a package does not work here ({reason}): {_mend()}"


def _mend():
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix) != ROOT / ".venv":
        return f"start this with {python}"
    return (
        f"sh {ROOT / 'scripts' / 'test.sh'} makes .venv with all of them; or "
        f"pip install -r {ROOT / 'requirements.txt'} (requirements-cpu.txt without an NVIDIA GPU)"
    )


def _leave(line):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
