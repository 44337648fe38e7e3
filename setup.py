"""The extension module flash_ext._C: csrc/ compiled by torch.utils.cpp_extension. The rest is in pyproject.toml.

csrc/autograd becomes a library of its own, for the installed torch alone; flash_ext does without it under any other.

FLASH_EXT_DEVICE      auto (what the installed torch was built for), cpu, cuda or rocm; the last two need no GPU and no
                      GPU build of torch, only the toolkit
TORCH_CUDA_ARCH_LIST  CUDA architectures, as torch reads it: "8.0+PTX;9.0a"
PYTORCH_ROCM_ARCH     AMD architectures: "gfx90a;gfx942"
CUDA_HOME, ROCM_HOME  the toolkits, where they are not on PATH or in the usual place
CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as everywhere
FLASH_EXT_DEBUG=1     debug information and FX_DEBUG's checks
FLASH_EXT_SANITIZE    address,undefined: passed to -fsanitize
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
USUAL = "flash_ext._usual"  # the library of csrc/autograd
sys.path.insert(0, str(ROOT / "build_backend"))
from toolchain import choose_device, cuda_archs, fail, host_compiler, import_torch, note, rocm_archs  # noqa: E402


def host_flags():
    """How to build, in a word and in flags. No -march: the CPU kernels choose their instructions at run time."""
    sanitize = os.environ.get("FLASH_EXT_SANITIZE", "")
    if sanitize:
        mode, flags = f"sanitize={sanitize}", ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"]
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    elif os.environ.get("FLASH_EXT_DEBUG", "0") not in ("", "0"):
        mode, flags = "debug", ["-Og", "-g", "-UNDEBUG", "-DFX_DEBUG=1"]
    else:
        mode, flags = "release", ["-O3", "-g0", "-DNDEBUG"]
    return mode, [*flags, "-fvisibility=hidden", "-fno-wrapv"]  # -fwrapv is among Python's own flags


def hipify(copy, sources):
    """The sources for ROCm: a copy of csrc in the build directory, as torch's hipify rewrites it."""
    from torch.utils.hipify import hipify_python

    shutil.copytree(CSRC, copy, dirs_exist_ok=True)  # keeps the times, so that only what has changed is compiled again
    copies = [str(copy / path.relative_to(CSRC)) for path in sources if CSRC / "sm90" not in path.parents]
    done = hipify_python.hipify(
        project_directory=str(copy),
        output_directory=str(copy),
        header_include_dirs=[str(copy)],
        includes=[f"{copy}/*"],
        extra_files=copies,
        show_progress=False,
        is_pytorch_extension=True,
        hipify_extra_files_only=True,
    )
    return [Path(done[path].hipified_path or path) for path in copies]


def remove_libraries(folder):
    """Those of csrc/autograd: what is not built again is for another torch, or of older sources."""
    for path in (folder / "flash_ext").glob("_usual-*"):
        path.unlink()


def native():
    """setup()'s arguments for the extension; it needs torch."""
    torch, cpp_extension = import_torch()
    cxx = host_compiler()
    device, gpu = choose_device(torch, cpp_extension, any(CSRC.rglob("*.cu")))
    mode, flags = host_flags()
    flags += cxx.command[1:]
    os.environ["CXX"] = cxx.command[0]

    # One folder for each way to build, so that the next build compiles only what has changed.
    build_temp = ROOT / "build/native" / re.sub(r"[^\w.+-]+", "-", f"{device}-{mode}-torch{torch.__version__}")
    csrc, sources = CSRC, [*CSRC.rglob("*.cpp"), *(CSRC.rglob("*.cu") if gpu else [])]
    sources = [path for path in sources if CSRC / "autograd" not in path.parents]
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # torch's stable ABI, of version 2.10
    library_dirs, libraries, archs, gpu_flags = [], [], platform.machine(), []
    host_link_flags = [*flags, *(["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [])]
    link_flags = list(host_link_flags)
    if device == "cuda":
        cpp_extension.CUDA_HOME = gpu.home  # torch itself looks for it only where it is a CUDA build
        archs, gpu_flags = cuda_archs(gpu)
        gpu_flags += ["-O3", "-std=c++20", "-ccbin", cxx.command[0], *(["-lineinfo"] if mode == "debug" else [])]
        gpu_flags += [f"-Xcompiler={flag}".replace(",", r"\,") for flag in flags]
        link_flags += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]  # static, so that the module loads everywhere
    elif device == "rocm":
        cpp_extension.ROCM_HOME, cpp_extension.IS_HIP_EXTENSION = gpu.home, True
        csrc, sources = build_temp / "csrc", hipify(build_temp / "csrc", sources)
        archs, gpu_flags = rocm_archs(gpu)
        gpu_flags += ["-std=c++20", *(flag for flag in flags if "sanitize" not in flag)]
        libraries.append("amdhip64")
    includes = [str(csrc), str(build_temp)]
    if gpu:
        macros.append((f"FLASH_EXT_WITH_{device.upper()}", "1"))
        includes += cpp_extension.include_paths("cuda", torch_include_dirs=False)
        library_dirs += cpp_extension.library_paths("cuda")  # torch's comes first: a ROCm torch brings its own runtime
    if gpu and not torch.version.cuda:  # then BuildExtension does not see which headers a kernel includes
        headers = b"".join(path.read_bytes() for path in sorted(CSRC.rglob("*.*h")))
        gpu_flags.append(f"-DFLASH_EXT_HEADERS={hashlib.sha256(headers).hexdigest()}")
    cxx_flags = ["-std=c++20", *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    if cxx.name == "g++":
        cxx_flags.append("-Wno-maybe-uninitialized")  # false alarms by the thousand inside GCC's own AVX-512 intrinsics

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(build_temp)
            throw_away = Path(sys.exec_prefix, "include")  # of uv's build environment: another path in every build
            self.include_dirs = [path for path in self.include_dirs if Path(path) != throw_away]

        def get_ext_filename(self, name):
            path = super().get_ext_filename(name)
            if name not in (USUAL, USUAL.rpartition(".")[2]):  # it comes with and without the package
                return path
            # As flash_ext/usual.py looks for it. It knows nothing of Python, but is for this torch alone.
            commit = str(torch.version.git_version)[:8]
            return str(Path(path).with_name(f"_usual-{torch.__version__}-{commit}.so"))

        def copy_extensions_to_source(self):
            remove_libraries(ROOT)
            super().copy_extensions_to_source()

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                if extension.name != USUAL:
                    raise
                note(f"autograd's node in C++ is left out, the one in Python takes its place ({error})")

        def build_extensions(self):
            compilers = ", ".join(str(compiler) for compiler in (cxx, gpu) if compiler)
            note(f"building {device} ({archs}) with {compilers} for torch {torch.__version__}, {mode}")
            facts = {
                "VERSION": self.distribution.get_version(),
                "BUILD_TORCH": torch.__version__,
                "BUILD_DEVICE": device,
                "BUILD_ARCHS": archs,
                "BUILD_COMPILER": compilers,
                "BUILD_MODE": mode,
            }
            # For bindings.cpp; on the command line a new version or torch would recompile every file.
            header = build_temp / "flash_ext_build.h"
            text = "".join(f'#define FLASH_EXT_{name} "{value}"\n' for name, value in facts.items())
            if not header.is_file() or header.read_text() != text:
                build_temp.mkdir(parents=True, exist_ok=True)
                header.write_text(text)
            remove_libraries(Path(self.build_lib))
            try:
                super().build_extensions()
            except Exception as error:
                fail(f"the native build failed; the compiler's first message above says why ({error})")

    # A CppExtension for GPUs, too: the kernels know no torch, and a CUDAExtension would need a CUDA torch to load.
    extension = cpp_extension.CppExtension(
        "flash_ext._C",
        sorted(os.path.relpath(path, ROOT) for path in sources),
        include_dirs=includes,
        library_dirs=library_dirs,
        libraries=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": gpu_flags},
        extra_link_args=link_flags,
        py_limited_api=True,
    )
    usual = cpp_extension.CppExtension(
        USUAL,
        [os.path.relpath(path, ROOT) for path in (CSRC / "autograd").glob("*.cpp")],
        extra_compile_args={"cxx": cxx_flags},
        extra_link_args=host_link_flags,
        py_limited_api=True,
        optional=True,
    )
    return {"ext_modules": [extension, usual], "cmdclass": {"build_ext": Build}}


# The metadata and an sdist are made without torch.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
setup(options={"bdist_wheel": {"py_limited_api": "cp310"}}, **(native() if BUILDS & set(sys.argv) else {}))
