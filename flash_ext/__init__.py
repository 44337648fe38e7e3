"""Exact attention, forward and backward, with one set of meanings on every backend."""

from ._version import __version__
from .attn import attn, attn_varlen
from .backends import build_info, explain, use_backend
from .math import math, math_varlen

__all__ = ["__version__", "attn", "attn_varlen", "build_info", "explain", "math", "math_varlen", "use_backend"]
