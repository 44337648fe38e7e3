"""The PEP 517 backend: setuptools, plus "use the torch that is already there".

Were torch a plain build requirement, pip would download the newest one (gigabytes) into a throw-away environment
for every build. It is asked for only where there is none; an sdist and the metadata never need it.
"""

import shutil
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)
from toolchain import host_compiler
from torch_probe import REQUIREMENT, find_torch


def _native_requirements() -> list[str]:
    host_compiler()  # where there is none, say so before anything is downloaded
    torch = find_torch()
    print(f"flash_ext: building against {f'torch {torch.version}' if torch else REQUIREMENT}", file=sys.stderr)
    return ([] if torch else [REQUIREMENT]) + ([] if shutil.which("ninja") else ["ninja"])


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _native_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _native_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    for leftover in Path("build").glob("lib*"):  # Python files that are gone from the tree would stay in the wheel
        shutil.rmtree(leftover)
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)


def _make_torch_importable() -> None:
    """For setup.py; behind everything else, so that the build requirements come from the build environment."""
    torch = find_torch()
    sys.path.extend(folder for folder in (torch.path if torch else []) if folder not in sys.path)
