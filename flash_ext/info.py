"""What `python -m flash_ext info` prints."""

import platform

import torch

from . import backends
from .measure import cpu_name, usable_cores


def describe():
    built = backends.build_info()
    lines = [f"flash_ext {built.pop('flash_ext')}", ""]

    def section(title, facts):
        lines.append(title)
        width = max(len(name) for name in facts)
        lines.extend(f"  {name.ljust(width)}  {value}" for name, value in facts.items())
        lines.append("")

    section("build", {name: value for name, value in built.items() if name not in ("torch", "version")})
    section("running on", machine())
    section("backends", {name: verdict(name) for name in backends.BACKENDS})
    return "\n".join(lines).rstrip()


def machine():
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    facts["cpu"] = f"{cpu_name()}, {usable_cores()} cores usable, {torch.get_num_threads()} threads"
    if backends.native is not None:
        chosen = backends.native.cpu_isa()
        others = [name for name in backends.native.cpu_isas() if name != chosen]
        facts["cpu isa"] = f"{chosen} (also usable: {', '.join(others) or 'none'}; FLASH_EXT_CPU_ISA chooses)"
    if torch.version.cuda or torch.version.hip:
        facts["gpu toolkit"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    facts["gpus"] = ", ".join(gpu(i) for i in range(torch.cuda.device_count())) or no_gpu()
    return facts


def gpu(index):
    properties = torch.cuda.get_device_properties(index)
    arch = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
    return f"{properties.name} ({arch}, {properties.total_memory / 2**30:.0f} GB)"


def no_gpu():
    if torch.version.cuda or torch.version.hip:
        return "none visible"
    return "none that this torch can use: it is built for CPUs"


def verdict(name):
    """Whether the backend runs an ordinary call here, and if not why."""
    device = "cuda" if name in ("gpu", "sm90") and torch.cuda.is_available() else "cpu"
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    obstacle = backends.obstacle(name, backends.Call(query, query, query))
    if obstacle is None:
        return f"usable: {backends.BACKENDS[name]}"
    if name in ("gpu", "sm90") and device == "cpu":
        obstacle = "no GPU that torch can use"
    return f"not usable: {obstacle}"
