"""Misspelt arguments of what a YAML names."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

__all__ = ["NamedArguments"]


class NamedArguments:
    """Mixin: refuse arguments that the constructor does not have.

    Python's own TypeError would make Qlib construct a second time and would not say
    which name was meant.

    Raises
    ------
    ValueError
        Naming the argument, its value and the nearest known name.
    """

    def __new__(cls, *_: Any, **given: Any) -> Any:
        """Look at the names before any work is done."""
        parameters = inspect.signature(cls.__init__).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            names = [name for name in parameters if name != "self"]
            for name, value in given.items():
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1)
                    raise ValueError(
                        f"{cls.__name__} has no parameter {name!r} (given {value!r}); "
                        + (f"is `{near[0]}` meant?" if near else f"it takes {names}.")
                    )
        return super().__new__(cls)
