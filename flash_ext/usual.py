"""The usual call in C++, csrc/autograd: compiled for one torch, and loaded only where that torch runs.

Elsewhere the call takes the way through Python (registration.AttnPlain), which is slower on the host and else the same.
"""

import os
from pathlib import Path

import torch

from . import backends


def file_name(torch) -> str:
    """Of the library for this torch: of its version and, as builds from source share theirs, its commit."""
    return f"_usual-{torch.__version__}-{str(torch.version.git_version)[:8]}.so"


def load():
    """The op, and None; or None, and why it is not used."""
    if backends.native is None:
        return None, "the extension flash_ext._C did not load"
    if os.environ.get("FLASH_EXT_AUTOGRAD", "") == "python":
        return None, "FLASH_EXT_AUTOGRAD=python"
    library = Path(__file__).with_name(file_name(torch))
    if not library.is_file():
        return None, f"flash_ext was not built for torch {torch.__version__}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return None, f"{library.name} did not load: {error}"
    op = torch.ops.flash_ext.attn_usual.default
    return getattr(op, "_op", op), None  # without a frame of Python around it


call, obstacle = load()
