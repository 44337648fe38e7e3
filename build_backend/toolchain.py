"""What to build for, and with what. What is missing ends the build in one sentence (SystemExit), not a traceback."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch_probe import REQUIREMENT, new_enough

# The portable kernels use sm_80's instructions: one binary serves 8.x, its PTX every later GPU. Hopper's own kernels
# need 9.0a, which runs on nothing else; for the others they are empty (__CUDA_ARCH_FEAT_SM90_ALL).
CUDA_ARCHS = "8.0+PTX;9.0a"
ROCM_ARCHS = {"gfx90a": (5, 0), "gfx942": (6, 0), "gfx950": (7, 0), "gfx1100": (5, 3), "gfx1201": (6, 4)}  # since ROCm
OLDEST = {"g++": 11, "clang++": 14, "nvcc": 12, "hipcc": 5}

TOOLKITS = {
    "cuda": ("nvcc", r"release (\d+)\.(\d+)", "/usr/local/cuda"),
    "rocm": ("hipcc", r"HIP version: (\d+)\.(\d+)", "/opt/rocm"),
}


@dataclass
class Compiler:
    command: list[str]
    name: str
    version: tuple[int, int]

    def __post_init__(self):
        oldest = OLDEST[self.name]
        if self.version[0] < oldest:
            fail(f"{shlex.join(self.command)} is {self}; C++20 needs {self.name} {oldest} or newer")

    @property
    def home(self) -> str:
        return str(Path(self.command[0]).parents[1])

    def __str__(self) -> str:
        return f"{self.name} {self.version[0]}.{self.version[1]}"


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"flash_ext: {sentence}")


def note(sentence: str) -> None:
    print(f"flash_ext: {sentence}", file=sys.stderr, flush=True)


def import_torch():
    """torch and torch.utils.cpp_extension of the environment that we build in."""
    if sys.platform not in ("linux", "darwin"):
        fail(f"building on {sys.platform} is not supported; Linux and macOS are")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        fail(f"Python.h is not in {include}; install Python's development files (python3-dev, python3-devel)")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(f"no {REQUIREMENT} can be imported in this environment ({error}); install it first")
    if not new_enough(torch.__version__):
        fail(f"torch {torch.__version__} is too old; {REQUIREMENT} is needed")
    return torch, cpp_extension


def choose_device(torch, cpp_extension, kernels: bool) -> tuple[str, Compiler | None]:
    """The device to build for and its compiler. An explicit wish that cannot be had fails; auto settles for the CPU."""
    theirs = {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    wish = os.environ.get("FLASH_EXT_DEVICE", "").strip().lower() or "auto"
    if wish not in ("auto", "cpu", "cuda", "rocm"):
        fail(f"FLASH_EXT_DEVICE={wish}: expected auto, cpu, cuda or rocm")
    device = next((name for name in theirs if theirs[name]), "cpu") if wish == "auto" else wish
    if device == "cpu":
        return "cpu", None

    home = f"{device.upper()}_HOME"
    compiler = gpu_compiler(device, getattr(cpp_extension, home)) if kernels else None
    if compiler is None:
        missing = f"no {TOOLKITS[device][0]} was found; install the toolkit or set {home}"
        if not kernels:
            missing = "this version of flash_ext has no GPU kernels (no .cu file in csrc)"
        if wish != "auto":
            fail(f"FLASH_EXT_DEVICE={device}: {missing}")
        note(f"torch {torch.__version__} is a {device} build, but {missing}; building for the CPU only")
        return "cpu", None
    if theirs[device] and int(theirs[device].split(".")[0]) != compiler.version[0]:
        fail(
            f"torch {torch.__version__} is for {device} {theirs[device]}, but {compiler.command[0]} is {compiler};"
            f" set {home} to a toolkit of the same major version, or FLASH_EXT_DEVICE=cpu to build without GPU kernels"
        )
    return device, compiler


def host_compiler() -> Compiler:
    """CXX without a leading ccache (torch puts that in front itself), else the first of g++, clang++, c++."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command and Path(command[0]).name in ("ccache", "sccache"):
        command.pop(0)
    if command and not shutil.which(command[0]):
        fail(f"CXX={os.environ['CXX']}: there is no such compiler")
    if not command:
        command = [next(filter(shutil.which, ("g++", "clang++", "c++")), "")]
    if not command[0]:
        fail("no C++ compiler was found; install g++ 11 or clang 14 or newer, or set CXX")
    text = output_of([*command, "--version"])
    clang = re.search(r"clang version (\d+)\.(\d+)", text)
    gcc = re.match(r"(\d+)\.?(\d*)", output_of([*command, "-dumpfullversion", "-dumpversion"]))
    match = clang or gcc or fail(f"{shlex.join(command)} does not work: {text.strip() or 'it prints no version'}")
    return Compiler(command, "clang++" if clang else "g++", (int(match[1]), int(match[2] or 0)))


def gpu_compiler(device: str, home_of_torch: str | None) -> Compiler | None:
    """The toolkit's nvcc or hipcc: in CUDA_HOME or ROCM_HOME, on PATH, where torch found it, in the usual place."""
    name, version, usual = TOOLKITS[device]
    for variable in (f"{device.upper()}_HOME", f"{device.upper()}_PATH"):
        if os.environ.get(variable):
            if not Path(os.environ[variable], "bin", name).is_file():
                fail(f"{variable}={os.environ[variable]}: there is no bin/{name} in it")
            homes = [os.environ[variable]]
            break
    else:
        homes = [home for home in (home_on_path(name), home_of_torch, usual) if home]
    command = next((str(Path(home, "bin", name)) for home in homes if Path(home, "bin", name).is_file()), None)
    if command is None:
        return None
    text = output_of([command, "--version"])
    match = re.search(version, text) or fail(f"{command} does not work: {text.strip() or 'it prints no version'}")
    return Compiler([command], name, (int(match[1]), int(match[2])))


def home_on_path(name: str) -> Path | None:
    """The command on PATH may be a link or a script outside of its toolkit, like /usr/local/bin/nvcc; nvcc can say."""
    command = shutil.which(name)
    if command is None:
        return None
    said = output_of([command, "--dryrun", "-E", "-x", "cu", "/dev/null"]) if name == "nvcc" else ""
    top = re.search(r"TOP=(.+)", said)
    return Path(top[1]).resolve() if top else Path(command).resolve().parents[1]


def output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        fail(f"{shlex.join(command)} does not work: {error}")
    return done.stdout


def cuda_archs(nvcc: Compiler) -> tuple[str, list[str]]:
    """TORCH_CUDA_ARCH_LIST in words and as flags. 9.0 means 9.0a, less than 8.0 is left out: no kernel runs there."""
    known = set(output_of([*nvcc.command, "--list-gpu-arch"]).split())
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
    codes, ptx = {}, {}
    for item in re.findall(r"[^;,\s]+", wish):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            fail(f"TORCH_CUDA_ARCH_LIST={wish}: expected something like {CUDA_ARCHS}, got {item}")
        number = match[1] + match[2]
        if int(number) < 80:
            note(f"TORCH_CUDA_ARCH_LIST: {item} is left out, the kernels need 8.0 or newer")
            continue
        if f"compute_{number}" not in known:
            fail(f"TORCH_CUDA_ARCH_LIST={wish}: {nvcc.command[0]} ({nvcc}) does not know {item}")
        suffix = "a" if number == "90" else match[3]
        codes[f"sm_{number}{suffix}"] = f"compute_{number}{suffix}"
        if match[4]:
            ptx[f"compute_{number}"] = f"compute_{number}"  # PTX with a suffix would run on no other GPU
    if not codes:
        fail(f"TORCH_CUDA_ARCH_LIST={wish}: no architecture of 8.0 or newer in it")
    codes |= ptx
    return ";".join(codes), [f"-gencode=arch={arch},code={code}" for code, arch in codes.items()]


def rocm_archs(hipcc: Compiler) -> tuple[str, list[str]]:
    """PYTORCH_ROCM_ARCH in words and as flags. What lacks the matrix instructions of CDNA2 or RDNA3 is left out."""
    default = ";".join(arch for arch, since in ROCM_ARCHS.items() if hipcc.version >= since)
    wish = os.environ.get("PYTORCH_ROCM_ARCH") or default
    archs = []
    for arch in re.findall(r"[^;,\s]+", wish):
        if not re.fullmatch(r"gfx[0-9a-f]+(:[a-z]+[+-])*", arch):
            fail(f"PYTORCH_ROCM_ARCH={wish}: expected something like {default}, got {arch}")
        if re.match(r"gfx(90a|942|950|1[12]\d\d)(:|$)", arch):
            archs.append(arch)
        else:
            note(f"PYTORCH_ROCM_ARCH: {arch} is left out, the kernels need gfx90a, gfx942, gfx950, gfx11 or gfx12")
    if not archs:
        fail(f"PYTORCH_ROCM_ARCH={wish}: no architecture in it that the kernels are for")
    return ";".join(archs), [f"--offload-arch={arch}" for arch in archs]
