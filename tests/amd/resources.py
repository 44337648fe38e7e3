"""Reads the AMD kernels in a built extension: python resources.py flash_ext/_C.abi3.so [gfx90a ...]

Prints the registers, spills and memory of every kernel. Fails where one of the architectures named lacks a kernel of
another, where a CDNA kernel of head_dim <= 128 spills vector registers, where a kernel has more than 64 KB of shared
memory, and where the extension lacks a function of its own.
"""

import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

CDNA = ("gfx90a", "gfx942", "gfx950")
SHARED = 64 * 1024
BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"


def tool(name):
    home = os.environ.get("ROCM_HOME", "/opt/rocm")
    return next((str(p) for p in (Path(home, "bin", name), Path(home, "llvm/bin", name)) if p.exists()), name)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def code_objects(library):
    """(architecture, bytes) of each code object in the bundles, one of which each .hip file has."""
    data = library.read_bytes()
    for match in re.finditer(re.escape(BUNDLE), data):
        start = match.start()
        at = match.end()
        (count,) = struct.unpack_from("<Q", data, at)
        at += 8
        for _ in range(count):
            offset, size, length = struct.unpack_from("<QQQ", data, at)
            target = data[at + 24 : at + 24 + length].decode()
            at += 24 + length
            if size and "gfx" in target:
                yield target.split("--")[-1], data[start + offset : start + offset + size]


def kernels(code):
    """The facts of each kernel in a code object, from its metadata."""
    with tempfile.NamedTemporaryFile(suffix=".co") as file:
        file.write(code)
        file.flush()
        text = run(tool("llvm-readelf"), "--notes", file.name)
    for block in re.split(r"^  - ", text[: text.rfind("amdhsa.target:")], flags=re.M)[1:]:
        facts = dict(re.findall(r"^ *\.(\w+): +(\S+)$", block, flags=re.M))
        if "vgpr_count" in facts:
            yield facts


FLAGS = {"attn_fwd": ("few-rows", "general"), "attn_bwd": ("general",)}
DTYPES = ("float16", "bfloat16", "float32", "float64")  # DType in csrc/attn/params.h


def name_of(mangled):
    """attn_fwd 128 bfloat16 few-rows general, for a kernel of a table; else the function's name and dtype."""
    name = re.search(r"\d([a-z_]+)_kernel", mangled)[1]
    variant = re.search(r"VariantE?LNS_5DTypeE(\d)ELi(\d+)E((?:Lb[01]E)*)", mangled)
    if variant:
        flags = [word for word, bit in zip(FLAGS[name], re.findall("Lb([01])", variant[3]), strict=False) if bit == "1"]
        return " ".join([name, variant[2], DTYPES[int(variant[1])], *flags])
    dtype = re.search(r"_kernelI(6__half|14__hip_bfloat16|f)", mangled)
    return f"{name} {dict(zip('61f', DTYPES, strict=False))[dtype[1][0]]}" if dtype else name


def main(library, *archs):
    table, problems = defaultdict(dict), []
    for arch, code in code_objects(Path(library)):
        for facts in kernels(code):
            table[name_of(facts["name"])][arch] = facts
    archs = archs or sorted({arch for row in table.values() for arch in row})
    print(f"vector registers, + spilled ones; {len(table)} kernels of {Path(library).name}")
    width = max(map(len, table), default=0)
    print(" " * width, *(f"{arch:>9}" for arch in archs), "   shared")
    for name, row in sorted(table.items(), key=lambda item: [int(x) if x.isdigit() else x for x in item[0].split()]):
        cells, shared = [], 0
        for arch in archs:
            if arch not in row:
                problems.append(f"{name} is not there for {arch}")
                cells.append("-")
                continue
            registers, spilled = (int(row[arch][fact]) for fact in ("vgpr_count", "vgpr_spill_count"))
            shared = max(shared, int(row[arch]["group_segment_fixed_size"]))
            cells.append(f"{registers}+{spilled}" if spilled else str(registers))
            head_dim = next((int(word) for word in name.split() if word.isdigit() and int(word) > 1), 0)
            if spilled and arch in CDNA and head_dim <= 128:
                problems.append(f"{name} spills {spilled} registers on {arch}")
        if shared > SHARED:
            problems.append(f"{name} has {shared} bytes of shared memory")
        print(f"{name:{width}}", *(f"{cell:>9}" for cell in cells), f"{shared or '':>9}")
    lacking = re.findall(r" U (\S*9flash_ext\S*)", run("nm", "-D", "--undefined-only", library))
    problems += [f"{symbol} is defined nowhere" for symbol in lacking]
    if not table:
        problems.append("there is no AMD kernel in it")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
