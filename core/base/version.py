"""Which version of the code this is."""

import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def code_version() -> str:
    """The first 12 digits of the commit this code stands at, and `-dirty` if tracked files differ from it.

    `unknown` where the root is no git checkout of its own, or git cannot be run. The same commit gives the same answer
    in every clone, with or without tags, and whatever GIT_DIR and the like say in the environment (inside a hook, say).
    """
    # Given explicitly, or git would take a repository that this folder only happens to lie in.
    place = [f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    # A checkout of another user (in a container) is no danger: its code is running already.
    settings = ["-c", f"safe.directory={ROOT}", "-c", "core.fsmonitor=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        described = subprocess.run(
            ["git", *place, *settings, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    commit, dash, dirty = described.partition("-")
    return commit[:12] + dash + dirty
