"""Runs a program with the installed torch posing as a ROCm build: ROCM_HOME=... python rocm_torch.py setup.py ...

torch.version.hip is all that torch.utils.cpp_extension and setup.py ask for. Nothing can be run that way.
"""

import os
import re
import runpy
import sys
from pathlib import Path

import torch

assert "torch.utils.cpp_extension" not in sys.modules  # it looks once, when it is imported
header = Path(os.environ["ROCM_HOME"], "include/hip/hip_version.h").read_text()
torch.version.hip = ".".join(re.findall(r"#define HIP_VERSION_(?:MAJOR|MINOR|PATCH) +(\d+)", header))
torch.version.cuda = None
sys.argv.pop(0)
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
