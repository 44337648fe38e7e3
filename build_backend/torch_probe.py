"""Where is torch? Found without importing it, so that a build costs no second and needs no numpy, no GPU.

pip's build isolation hides the packages of the environment that flash_ext is being installed into, but it runs
the build with that environment's interpreter. So we ask the interpreter again, outside of the isolation. uv and
`python -m build` use an interpreter of their own; then the activated environment is asked. A wrong guess is
harmless: the extension uses torch's stable ABI and runs with any torch from 2.10 on.

Run as a script, it prints the directory of torch (CMakeLists.txt does that).
"""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST = (2, 10)
REQUIREMENT = "torch>=2.10"

_ASK = """
import importlib.util, sys
sys.path.pop(0)  # the current directory
spec = importlib.util.find_spec("torch")
print(spec.origin if spec and spec.origin else "")
"""


@dataclass(frozen=True)
class Torch:
    root: Path  # the directory of the package
    version: str
    cuda: str | None  # the CUDA version it was built for
    hip: str | None  # the ROCm version it was built for

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch() -> Torch | None:
    """The torch to build against: the build's own (no isolation, or a build requirement), else the target's."""
    spec = importlib.util.find_spec("torch")
    found = _read(spec.origin) if spec and spec.origin else None
    for python in _interpreters():
        if found:
            break
        found = _read(_ask(python))
    return found


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


def _ask(python: Path) -> str:
    """The file torch/__init__.py as the interpreter sees it; -E leaves the isolation (PYTHONPATH) behind."""
    try:
        asked = subprocess.run([python, "-E", "-c", _ASK], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def _read(origin: str) -> Torch | None:
    """The facts in torch/version.py; None where it is missing or torch is too old for us."""
    version_py = Path(origin).parent / "version.py"
    if not origin or not version_py.is_file():
        return None
    facts = runpy.run_path(str(version_py))
    numbers = re.match(r"(\d+)\.(\d+)", facts["__version__"])
    if not numbers or tuple(map(int, numbers.groups())) < OLDEST:
        return None
    return Torch(version_py.parent, str(facts["__version__"]), facts.get("cuda"), facts.get("hip"))


if __name__ == "__main__":
    torch = find_torch()
    sys.exit(f"flash_ext: no {REQUIREMENT} was found; install it first") if torch is None else print(torch.root)
