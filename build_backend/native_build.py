"""Compiles csrc/ into the extension module flash_ext._C. Environment variables that it reads:

FLASH_EXT_DEVICE      auto (what the installed torch was built for), cpu, cuda or rocm; the last two need no GPU and no
                      GPU build of torch, only the toolkit
TORCH_CUDA_ARCH_LIST  CUDA architectures, as torch reads it: "8.0+PTX;9.0a"
PYTORCH_ROCM_ARCH     AMD architectures: "gfx90a;gfx942"
CUDA_HOME, ROCM_HOME  the toolkits, where they are not on PATH or in the usual place
CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as everywhere
FLASH_EXT_DEBUG=1     debug information and FX_DEBUG's checks
FLASH_EXT_SANITIZE    address,undefined: passed to -fsanitize
VERBOSE=1             shows the commands

Every kernel is a translation unit of its own that knows no torch; only the binding includes torch's stable ABI. That is
why nothing of torch.utils.cpp_extension is needed. Objects are kept in build/native, so a second build compiles only
what changed. What goes wrong ends in one sentence (SystemExit), not in a traceback.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch_probe import REQUIREMENT, Torch, find_torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# The portable kernels use sm_80's instructions: one binary serves 8.x, its PTX every later GPU. Hopper's own kernels
# need 9.0a, which runs on nothing else.
CUDA_ARCHS = "8.0+PTX;9.0a"
ROCM_ARCHS = {"gfx90a": (5, 0), "gfx942": (6, 0), "gfx950": (7, 0), "gfx1100": (5, 3), "gfx1201": (6, 4)}  # since ROCm
OLDEST = {"g++": 11, "clang++": 14, "nvcc": 12, "hipcc": 5}


@dataclass
class Compiler:
    command: list[str]
    name: str
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} {self.version[0]}.{self.version[1]}"


@dataclass
class Step:
    """One command that makes one file."""

    output: Path
    inputs: list[Path]
    command: list[str | Path]


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"flash_ext: {sentence}")


def note(sentence: str) -> None:
    print(f"flash_ext: {sentence}", file=sys.stderr, flush=True)


def build(output: Path, version: str) -> None:
    """Makes the extension module `output`."""
    torch = find_torch() or fail(f"no {REQUIREMENT} was found in this environment; install it first")
    if sys.platform not in ("linux", "darwin"):
        fail(f"building on {sys.platform} is not supported; Linux and macOS are")
    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").is_file():
        fail(f"Python.h is not in {python_include}; install Python's development files (python3-dev, python3-devel)")

    cxx = host_compiler()
    device, gpu = choose_device(torch)
    sanitize = os.environ.get("FLASH_EXT_SANITIZE", "")
    mode = f"sanitize={sanitize}" if sanitize else "debug" if debugging() else "release"
    work = ROOT / "build" / "native" / re.sub(r"[^\w.+-]+", "-", f"{device}-{mode}-torch{torch.version}")
    work.mkdir(parents=True, exist_ok=True)

    archs, kernels = platform.machine(), []
    if device == "cuda":
        archs, kernels = cuda_steps(gpu, cxx, work)
    elif device == "rocm":
        archs, kernels = rocm_steps(gpu, torch, work)
    facts = {
        "FLASH_EXT_VERSION": version,
        "FLASH_EXT_BUILD_TORCH": torch.version,
        "FLASH_EXT_BUILD_DEVICE": device,
        "FLASH_EXT_BUILD_ARCHS": archs,
        "FLASH_EXT_BUILD_COMPILER": ", ".join(map(str, filter(None, (cxx, gpu)))),
        "FLASH_EXT_BUILD_MODE": mode,
    }
    note(f"building {device} ({archs}) with {facts['FLASH_EXT_BUILD_COMPILER']} for torch {torch.version}, {mode}")
    objects = cpp_steps(cxx, device, torch, python_include, facts, work) + kernels
    module = work / output.name
    run_steps([*objects, link_step(module, objects, cxx, gpu, torch)], work)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(module, output)


# ---------------------------------------------------------------------------------------------------------------------
# What to build with


def host_compiler() -> Compiler:
    if os.environ.get("CXX", "").strip():
        command = shlex.split(os.environ["CXX"])
        if not shutil.which(command[0]):
            fail(f"CXX={os.environ['CXX']}: there is no such compiler")
    else:
        command = [next(filter(shutil.which, ("g++", "clang++", "c++")), "")]
        if not command[0]:
            fail("no C++ compiler was found; install g++ 11 or clang 14 or newer, or set CXX")
    text = output_of([*command, "--version"])
    clang = re.search(r"clang version (\d+)\.(\d+)", text)
    gcc = re.match(r"(\d+)\.?(\d*)", output_of([*command, "-dumpfullversion", "-dumpversion"]))
    match = clang or gcc or fail(f"{shlex.join(command)} does not work: {text.strip() or 'it prints no version'}")
    return checked(Compiler(command, "clang++" if clang else "g++", (int(match[1]), int(match[2] or 0))))


def choose_device(torch: Torch) -> tuple[str, Compiler | None]:
    """The device to build for and its compiler. An explicit wish that cannot be had fails; auto settles for the CPU."""
    wish = os.environ.get("FLASH_EXT_DEVICE", "").strip().lower() or "auto"
    if wish not in ("auto", "cpu", "cuda", "rocm"):
        fail(f"FLASH_EXT_DEVICE={wish}: expected auto, cpu, cuda or rocm")
    device = wish
    if wish == "auto":
        device = "cuda" if torch.cuda else "rocm" if torch.hip else "cpu"
    if device == "cpu":
        return "cpu", None

    compiler, missing = None, None
    if not any(CSRC.rglob("*.cu")):
        missing = "this version of flash_ext has no GPU kernels (no .cu file in csrc)"
    else:
        compiler = nvcc() if device == "cuda" else hipcc()
    if compiler is None and missing is None:
        missing = (
            "no nvcc was found; install the CUDA toolkit or set CUDA_HOME"
            if device == "cuda"
            else "no hipcc was found; install ROCm or set ROCM_HOME"
        )
    if missing and wish == "auto":
        note(f"torch {torch.version} is a {device} build, but {missing}; building for the CPU only")
        return "cpu", None
    if missing:
        fail(f"FLASH_EXT_DEVICE={device}: {missing}")

    theirs = torch.cuda if device == "cuda" else torch.hip
    if theirs and int(theirs.split(".")[0]) != compiler.version[0]:
        home = "CUDA_HOME" if device == "cuda" else "ROCM_HOME"
        fail(
            f"torch {torch.version} was built for {device} {theirs}, but {shlex.join(compiler.command)} is {compiler};"
            f" set {home} to a toolkit of the same major version, or FLASH_EXT_DEVICE=cpu to do without GPU kernels"
        )
    return device, compiler


def nvcc() -> Compiler | None:
    """PYTORCH_NVCC (say, "ccache nvcc"), CUDA_HOME, PATH, the usual place. nvcc itself knows where its toolkit is."""
    command = toolkit_compiler("nvcc", "PYTORCH_NVCC", ("CUDA_HOME", "CUDA_PATH"), "/usr/local/cuda")
    if command is None:
        return None
    return checked(Compiler(command, "nvcc", version_in(command, r"release (\d+)\.(\d+)")))


def hipcc() -> Compiler | None:
    command = toolkit_compiler("hipcc", "HIPCC", ("ROCM_HOME", "ROCM_PATH", "HIP_PATH"), "/opt/rocm")
    if command is None:
        return None
    return checked(Compiler(command, "hipcc", version_in(command, r"HIP version: (\d+)\.(\d+)")))


def toolkit_compiler(name: str, command_var: str, home_vars: tuple[str, ...], usual: str) -> list[str] | None:
    if os.environ.get(command_var):
        return shlex.split(os.environ[command_var])
    for var in home_vars:
        if os.environ.get(var):
            compiler = Path(os.environ[var], "bin", name)
            if not compiler.is_file():
                fail(f"{var}={os.environ[var]}: there is no bin/{name} in it")
            return [str(compiler)]
    found = shutil.which(name) or shutil.which(f"{usual}/bin/{name}")
    return [found] if found else None


def version_in(command: list[str], pattern: str) -> tuple[int, int]:
    text = output_of([*command, "--version"])
    match = re.search(pattern, text) or fail(f"{shlex.join(command)} does not work: {text.strip() or 'no version'}")
    return int(match[1]), int(match[2])


def checked(compiler: Compiler) -> Compiler:
    oldest = OLDEST[compiler.name]
    if compiler.version[0] < oldest:
        fail(f"{shlex.join(compiler.command)} is {compiler}; C++20 needs {compiler.name} {oldest} or newer")
    return compiler


def output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        fail(f"{shlex.join(command)} does not work: {error}")
    return done.stdout


def debugging() -> bool:
    return os.environ.get("FLASH_EXT_DEBUG", "0") not in ("", "0")


# ---------------------------------------------------------------------------------------------------------------------
# The steps


def host_flags() -> list[str]:
    sanitize = os.environ.get("FLASH_EXT_SANITIZE")
    if sanitize:
        flags = ["-O1", "-g", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    elif debugging():
        flags = ["-Og", "-g", "-DFX_DEBUG=1"]
    else:
        flags = ["-O3", "-g0", "-DNDEBUG"]
    return [*flags, "-fvisibility=hidden"]


def cpp_steps(cxx, device, torch, python_include, facts, work) -> list[Step]:
    """The C++ sources. No -march: the CPU kernels choose their instructions per function, at run time."""
    flags = ["-std=c++20", "-fPIC", "-Wall", *host_flags(), f"-I{CSRC}", "-isystem", torch.include]
    flags += ["-isystem", python_include, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    if cxx.name == "g++":
        flags.append("-Wno-maybe-uninitialized")  # false alarms by the thousand inside GCC's own AVX-512 intrinsics
    if device != "cpu":
        flags.append(f"-DFLASH_EXT_WITH_{device.upper()}=1")
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    macros = [f'-D{name}="{value}"' for name, value in facts.items()]
    steps = []
    for source in sources("*.cpp"):
        mine = macros if source == CSRC / "bindings.cpp" else []  # so that a new torch does not recompile the kernels
        steps.append(compile_step(source, object_of(source, work), [*cxx.command, *flags, *mine]))
    return steps


def cuda_steps(nvcc, cxx, work) -> tuple[str, list[Step]]:
    archs = cuda_archs(nvcc)
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-O3", "-ccbin", shlex.join(cxx.command), f"-I{CSRC}"]
    flags += ["-DFLASH_EXT_WITH_CUDA=1", *through_nvcc(["-fPIC", *host_flags()])]
    flags += ["-lineinfo"] if debugging() else []
    steps = []
    for source in sources("*.cu"):
        codes = codes_for(source, archs)
        if codes:
            command = [*nvcc.command, *flags, *(f"-gencode=arch={arch},code={code}" for arch, code in codes)]
            steps.append(compile_step(source, object_of(source, work), command))
    return ";".join(code for _, code in archs), steps


def through_nvcc(flags: list[str]) -> list[str]:
    """The host compiler's flags as nvcc wants them: marked, and commas escaped because it splits at them."""
    linker = [f"-Xlinker={flag[4:]}" for flag in flags if flag.startswith("-Wl,")]
    return [f"-Xcompiler={flag}".replace(",", r"\,") for flag in flags if not flag.startswith("-Wl,")] + linker


def cuda_archs(nvcc) -> list[tuple[str, str]]:
    """TORCH_CUDA_ARCH_LIST as pairs for -gencode: (compute_80, sm_80). 9.0 means 9.0a, less than 8.0 is left out."""
    known = set(output_of([*nvcc.command, "--list-gpu-arch"]).split())
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
    codes, ptx = [], []
    for item in re.findall(r"[^;,\s]+", wish):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            fail(f"TORCH_CUDA_ARCH_LIST={wish}: expected something like {CUDA_ARCHS}, got {item}")
        number = match[1] + match[2]
        if int(number) < 80:
            note(f"TORCH_CUDA_ARCH_LIST: {item} is left out, the kernels need 8.0 or newer")
            continue
        if f"compute_{number}" not in known:
            fail(f"TORCH_CUDA_ARCH_LIST={wish}: {shlex.join(nvcc.command)} ({nvcc}) does not know {item}")
        suffix = "a" if number == "90" else match[3]
        codes.append((f"compute_{number}{suffix}", f"sm_{number}{suffix}"))
        if match[4]:
            ptx.append((f"compute_{number}", f"compute_{number}"))  # PTX with a suffix would run on no other GPU
    if not codes:
        fail(f"TORCH_CUDA_ARCH_LIST={wish}: no architecture of 8.0 or newer in it")
    return list(dict.fromkeys(codes + ptx))


def codes_for(source: Path, archs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A folder csrc/sm90 is compiled for the binaries of 9.x alone, everything else for all architectures."""
    family = re.fullmatch(r"sm(\d+)", source.relative_to(CSRC).parts[0])
    if family is None:
        return archs
    return [(arch, code) for arch, code in archs if re.fullmatch(rf"sm_{family[1]}[af]?", code)]


def rocm_steps(hipcc, torch, work) -> tuple[str, list[Step]]:
    """hipify makes HIP sources of a copy of csrc in the build directory; nothing is written into csrc."""
    default = ";".join(arch for arch, since in ROCM_ARCHS.items() if hipcc.version >= since)
    wish = os.environ.get("PYTORCH_ROCM_ARCH") or default
    archs = re.findall(r"[^;,\s]+", wish)
    for arch in archs:
        if not re.fullmatch(r"gfx[0-9a-f]+(:[a-z]+[+-])*", arch):
            fail(f"PYTORCH_ROCM_ARCH={wish}: expected something like {default}, got {arch}")
    copy = work / "csrc"
    copy_changed(CSRC, copy)
    skip = [source for source in sources("*.cu") if re.fullmatch(r"sm\d+", source.relative_to(CSRC).parts[0])]
    originals = [copy / source.relative_to(CSRC) for source in sources("*.cu") if source not in skip]
    hip = hipify(torch, copy, originals)
    debug = ["-g", "-DFX_DEBUG=1"] if debugging() else ["-g0", "-DNDEBUG"]
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *debug, f"-I{copy}", "-DFLASH_EXT_WITH_ROCM=1"]
    flags += ["-DUSE_ROCM=1", "-D__HIP_PLATFORM_AMD__=1", "-DHIP_ENABLE_WARP_SYNC_BUILTINS=1", "-fno-gpu-rdc"]
    flags += [f"--offload-arch={arch}" for arch in archs]
    return ";".join(archs), [compile_step(x, x.with_suffix(".hip.o"), [*hipcc.command, *flags]) for x in hip]


def hipify(torch: Torch, folder: Path, originals: list[Path]) -> list[Path]:
    """Runs torch's hipify, as torch's own build does. It is plain Python and is loaded without torch."""
    package = torch.root / "utils" / "hipify"
    spec = importlib.util.spec_from_file_location("torch_hipify", package / "__init__.py")
    sys.modules["torch_hipify"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["torch_hipify"])
    from torch_hipify import hipify_python

    done = hipify_python.hipify(
        project_directory=str(folder),
        output_directory=str(folder),
        header_include_dirs=[str(folder)],
        includes=[f"{folder}/*"],
        extra_files=[str(path) for path in originals],
        show_progress=False,
        is_pytorch_extension=True,
        hipify_extra_files_only=True,
    )
    return [Path(done[str(path)].hipified_path or path) for path in originals]


def copy_changed(source: Path, target: Path) -> None:
    """Copies a tree, touching only what differs: unchanged files keep their time and are not compiled again."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_file() and not (copy.is_file() and copy.read_bytes() == path.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def sources(pattern: str) -> list[Path]:
    return sorted(CSRC.rglob(pattern))


def object_of(source: Path, work: Path) -> Path:
    return work / source.relative_to(ROOT).with_suffix(source.suffix + ".o")


def compile_step(source: Path, output: Path, command: list) -> Step:
    return Step(output, [source], [*command, "-MD", "-MF", f"{output}.d", "-c", source, "-o", output])


def link_step(module: Path, steps: list[Step], cxx, gpu, torch) -> Step:
    """Only libtorch's stable part is linked. The CUDA runtime is linked in statically, so the module loads anywhere."""
    objects = [step.output for step in steps]
    linker = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    as_needed = [] if sys.platform == "darwin" else ["-Wl,--as-needed,--exclude-libs,ALL"]
    host = [*host_flags(), *as_needed, *shlex.split(os.environ.get("LDFLAGS", ""))]
    libraries = [f"-L{torch.lib}", "-ltorch_cpu", "-lc10"]
    if gpu and gpu.name == "nvcc":
        command = [*gpu.command, "-shared", "-cudart=static", "-ccbin", shlex.join(cxx.command)]
        command += through_nvcc(host)
    else:
        command = [*cxx.command, *linker, *host]
    if gpu and gpu.name == "hipcc":  # behind torch.lib: a ROCm torch brings its own runtime, and there must be one only
        libraries += [f"-L{Path(shutil.which(gpu.command[0])).resolve().parent.parent / 'lib'}", "-lamdhip64"]
    return Step(module, objects, [*command, *objects, "-o", module, *libraries])


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def run_steps(steps: list[Step], work: Path) -> None:
    jobs = os.environ.get("MAX_JOBS") or str(available_cores())
    if not jobs.isdigit() or int(jobs) < 1:
        fail(f"MAX_JOBS={jobs}: expected a positive number")
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    if shutil.which("ninja"):
        write_if_changed(work / "build.ninja", ninja_file(steps))
        verbose = ["-v"] if os.environ.get("VERBOSE", "0") != "0" else []
        ok = subprocess.run(["ninja", "-C", work, "-j", jobs, *verbose]).returncode == 0
    else:  # pip install --no-build-isolation without ninja: everything is compiled, every time
        with ThreadPoolExecutor(int(jobs)) as pool:
            ok = all(list(pool.map(run_step, steps[:-1]))) and run_step(steps[-1])
    if not ok:
        fail("the C++ build failed; the compiler's first message above says why (VERBOSE=1 shows the commands)")


def run_step(step: Step) -> bool:
    print(step.output, flush=True)
    return subprocess.run(step.command).returncode == 0


def ninja_file(steps: list[Step]) -> str:
    def path(p) -> str:
        return re.sub(r"([$: ])", r"$\1", str(p))

    lines = ["rule compile", "  command = $run", "  description = $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $run", "  description = $out"]
    for step in steps:
        rule = "compile" if "-MF" in step.command else "link"
        command = shlex.join(map(str, step.command)).replace("$", "$$")
        lines += [f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}", f"  run = {command}"]
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
