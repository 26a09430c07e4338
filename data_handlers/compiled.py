"""How the parts of our compiled loops are compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import numba as nb

__all__ = ["inner"]

#: Decorator of what only kernels call: without a way in from Python it compiles sooner,
#: and the kernel's own cache holds it.
inner: Any = partial(
    nb.njit, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
)
