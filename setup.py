"""pyproject.toml says everything about the package; this file only adds its one extension module."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))


class BuildNative(build_ext):
    def build_extension(self, ext):
        from native_build import build

        build(Path(self.get_ext_fullpath(ext.name)), self.distribution.get_version())


setup(
    # The sources are found by native_build: csrc/**/*.cpp, and csrc/**/*.cu for a GPU.
    ext_modules=[Extension("flash_ext._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
