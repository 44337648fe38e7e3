"""Where is torch? Found without importing it, so that asking costs no second and needs no numpy, no GPU.

pip's build isolation hides the packages of the environment that flash_ext is being installed into, but it runs
the build with that environment's interpreter. So we ask the interpreter again, outside of the isolation. uv and
`python -m build` use an interpreter of their own; then the activated environment is asked. A wrong guess is
harmless: the extension uses torch's stable ABI and runs with any torch from 2.10 on.

Run as a script, it prints the directory of torch (CMakeLists.txt does that).
"""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OLDEST = (2, 10)
REQUIREMENT = "torch>=2.10"

_ASK = """
import importlib.util, json, sys, sysconfig
sys.path.pop(0)  # the current directory
spec = importlib.util.find_spec("torch")
print(json.dumps([spec and spec.origin, sysconfig.get_config_var("SOABI"), sys.path]))
"""


@dataclass(frozen=True)
class Torch:
    root: Path  # the directory of the package
    version: str
    path: list[str]  # the sys.path with which it can be imported


def find_torch() -> Torch | None:
    """The torch to build against: the build's own (no isolation, or a build requirement), else the target's."""
    spec = importlib.util.find_spec("torch")
    found = _read(spec.origin, sys.path) if spec else None
    for python in _interpreters():
        if found:
            break
        found = _ask(python)
    return found


def new_enough(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return bool(numbers) and tuple(map(int, numbers.groups())) >= OLDEST


def _interpreters():
    """The interpreters whose environment may be the target, the likeliest first."""
    activated = [os.environ[var] for var in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(var)]
    activated.append(os.path.abspath(".venv"))  # where uv looks when nothing is activated
    candidates = [Path(sys.executable)] + [Path(prefix, "bin", "python") for prefix in activated]
    candidates += [Path(folder, "python3") for folder in os.get_exec_path()]
    seen = set()
    for python in candidates:
        if python.is_file() and (python.parent, python.resolve()) not in seen:
            seen.add((python.parent, python.resolve()))
            yield python


def _ask(python: Path) -> Torch | None:
    """torch as the interpreter sees it; -E leaves the isolation (PYTHONPATH) behind."""
    try:
        asked = subprocess.run([python, "-E", "-c", _ASK], capture_output=True, text=True, timeout=30, check=True)
        origin, abi, path = json.loads(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return _read(origin, path) if abi == sysconfig.get_config_var("SOABI") else None  # else we could not import it


def _read(origin: str | None, path: list[str]) -> Torch | None:
    """The facts in torch/version.py; None where it is missing or torch is too old for us."""
    version_py = Path(origin or "").parent / "version.py"
    if not origin or not version_py.is_file():
        return None
    version = str(runpy.run_path(str(version_py))["__version__"])
    root = version_py.parent
    return Torch(root, version, [*path, str(root.parent)]) if new_enough(version) else None


if __name__ == "__main__":
    torch = find_torch()
    sys.exit(f"flash_ext: no {REQUIREMENT} was found; install it first") if torch is None else print(torch.root)
