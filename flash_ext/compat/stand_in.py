"""`import flash_attn` that finds flash_ext, for code that cannot be edited."""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from importlib.abc import Loader
from pathlib import Path

from . import bert_padding, flash_attn

VERSION = "2.8.3"  # the flash_attn whose names, parameters and results these are
PACKAGE = "flash_attn"
FUNCTIONS = {name: getattr(flash_attn, name) for name in flash_attn.__all__ if name not in bert_padding.__all__}
MODULES = {
    PACKAGE: FUNCTIONS | {"__version__": VERSION},
    f"{PACKAGE}.flash_attn_interface": FUNCTIONS,
    f"{PACKAGE}.bert_padding": {name: getattr(bert_padding, name) for name in bert_padding.__all__},
}
FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n"
    "Summary: flash_ext, standing in for flash-attn (flash_ext.compat.install)\n",
    "top_level.txt": f"{PACKAGE}\n",
}


class Distribution(importlib.metadata.Distribution):
    """What importlib.metadata says of it."""

    def read_text(self, filename):
        return FILES.get(filename)

    def locate_file(self, path):
        return Path(__file__).parent / path


class StandIn(importlib.metadata.DistributionFinder, Loader):
    """An entry of sys.meta_path: the modules of MODULES, and their Distribution."""

    def find_spec(self, name, path=None, target=None):
        if name not in MODULES:
            return None
        # A package, though an empty one: `import flash_attn.layers` says that there is no such module.
        return importlib.util.spec_from_loader(name, self, origin=flash_attn.__file__, is_package=name == PACKAGE)

    def exec_module(self, module):
        module.__doc__ = "flash_ext.compat.flash_attn, standing in for flash-attn"
        module.__file__ = flash_attn.__file__
        module.__dict__.update(MODULES[module.__name__])
        if module.__name__ == PACKAGE:
            importlib.import_module(f"{PACKAGE}.flash_attn_interface")  # as flash_attn itself does

    def find_distributions(self, context=None):
        name = getattr(context, "name", None)
        if name is None or re.sub(r"[-_.]+", "-", name).lower() == "flash-attn":
            yield Distribution()


_stand_in = StandIn()


def install() -> None:
    """Makes `import flash_attn` find flash_ext, in this process, until `uninstall`.

    import flash_ext.compat; flash_ext.compat.install()  # before anything looks for flash_attn

    Covered: the modules flash_attn, flash_attn.flash_attn_interface and flash_attn.bert_padding with the names of
    flash_ext.compat.flash_attn; flash_attn.__version__; importlib.util.find_spec("flash_attn");
    importlib.metadata.version("flash_attn") and packages_distributions(). The version is 2.8.3. This is what
    transformers 5 asks before it takes attn_implementation="flash_attention_2". It asks once, and says no where torch
    sees no GPU: on a CPU use flash_ext.integrations.transformers.

    Not covered: all else of flash_attn, that is layers, modules, ops, losses, cute, flash_attn_2_cuda and private
    functions such as _flash_attn_forward. Importing these raises ImportError, also inside libraries that do so as soon
    as there is a flash_attn (ring-flash-attention). flash_attn_with_kvcache can be imported and raises
    NotImplementedError when it is called, as block_table does: transformers' continuous batching needs them. Not
    flash_attn_interface, which is FlashAttention-3. Not other processes: each has to call install().

    A flash-attn that is installed but not imported yet is hidden until `uninstall`. A second call does nothing.

    Raises RuntimeError where the real flash_attn has been imported already: who imported it would keep it.
    """
    module = sys.modules.get(PACKAGE)
    if module is not None and not _is_ours(module):
        raise RuntimeError(
            f"flash_attn: expected not to be imported yet, got {getattr(module, '__file__', None) or module!r}; call "
            "flash_ext.compat.install() before the first import of flash_attn"
        )
    if _stand_in not in sys.meta_path:
        sys.meta_path.insert(0, _stand_in)
        importlib.invalidate_caches()


def uninstall() -> None:
    """Undoes `install`: the next `import flash_attn` finds the real one, or none. Names already imported stay.

    Does nothing where nothing is installed.
    """
    if _stand_in in sys.meta_path:
        sys.meta_path.remove(_stand_in)
    for name in MODULES:
        if name in sys.modules and _is_ours(sys.modules[name]):
            del sys.modules[name]


def _is_ours(module):
    return getattr(module, "__loader__", None) is _stand_in
