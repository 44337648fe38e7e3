"""flash_ext under the names of other libraries."""

from .stand_in import install, uninstall

__all__ = ["install", "uninstall"]
