"""What mypyc must be told where the core is compiled (``setup.py``); nothing to plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

__all__ = ["mypyc_attr"]

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_: object) -> Callable[[type], type]:
        """``allow_interpreted_subclasses``: yours may inherit from a compiled one; ``native_class``: no C struct."""
        return lambda cls: cls
