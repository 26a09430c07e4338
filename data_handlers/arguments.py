"""Arguments of what a YAML names: passed on without repetition, checked by name."""

from __future__ import annotations

import difflib
import inspect
import math
from numbers import Integral, Real
from typing import Any, ClassVar

__all__ = ["NamedArguments", "check_number", "check_whole"]


class NamedArguments:
    """Mixin: show the arguments that a constructor hands on, and refuse all others.

    A constructor that takes ``**kwargs`` hands them on to its base class, or to another
    class that `_receiver` names. Its signature then holds the receiver's parameters in
    their place, less those in `_kept_back`: Qlib's users, `help`, and the rolling and
    audit tools read it.

    Raises
    ------
    ValueError
        On an argument that is not in the signature, naming it, its value and the
        nearest name. Python's own TypeError would make Qlib construct a second time
        and would not say which name was meant.
    """

    _receiver: ClassVar[type | None] = None
    _kept_back: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Write the signature out."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            return
        own = inspect.signature(cls.__init__)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        if len(named) == len(own.parameters):
            return
        receiver: Any = vars(cls).get("_receiver") or super(cls, cls)
        taken = {p.name for p in named} | cls._kept_back
        handed_on = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(receiver.__init__).parameters.values()
            if p.name not in taken
        ]
        signature = own.replace(parameters=[*named, *handed_on])
        setattr(cls.__init__, "__signature__", signature)  # noqa: B010

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


def check_whole(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is a whole number in [low, high]."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be a whole number {bounds}, got {value!r}.")


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, exclusive: bool = False
) -> None:
    """Raise ValueError unless `value` is a number in [low, high], or (low, high].

    Infinity is no number here. Text raises as well, and no TypeError, which Qlib would
    hide: it constructs a second time.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(
            f"`{name}` must be a number, got {value!r}"
            + (
                " (YAML reads 1e-3 as text; write 0.001)."
                if isinstance(value, str)
                else "."
            )
        )
    if not (low < value if exclusive else low <= value) or not value <= high:
        bound = "above" if exclusive else "at least"
        upper = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"`{name}` must be {bound} {low}{upper}, got {value!r}.")
