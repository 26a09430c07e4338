"""Arguments of what a YAML names: declared once, passed on without repetition, checked.

A constructor's annotations say what it takes: ``Literal["close", "open"]``, ``bool``,
``int``, ``float``, ``Annotated[int, Ge(1)]`` with the bounds of `annotated_types`,
``list``, ``dict``, `Text`, `Names`, `Day` and `Universe`, each with ``| None`` where
None has a meaning. `NamedArguments` checks them, sets the attributes and runs the body,
which holds what is left: arguments that depend on each other. `checked` does the same
for a function.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Count",
    "Day",
    "NamedArguments",
    "Names",
    "NonNegative",
    "Positive",
    "Share",
    "Text",
    "Universe",
    "Whole",
    "check_arguments",
    "check_day",
    "check_number",
    "check_whole",
    "checked",
    "parse_range",
    "refuse_unknown",
]

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]


def _check_text(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is text (or a path) that is not empty."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ValueError(f"`{name}` must be text, got {value!r}.")


def _check_names(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is text or a list of texts."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(
        isinstance(part, str) and part for part in parts
    ):
        raise ValueError(f"`{name}` must be text or a list of texts, got {value!r}.")
    if len(set(parts)) < len(parts):
        raise ValueError(f"`{name}` has a name twice: {value!r}.")


def check_day(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a date, as text or not."""
    import pandas as pd

    try:
        # pandas takes a number, such as the year 2015, as nanoseconds since 1970.
        known = not isinstance(value, Real) and not pd.isna(pd.Timestamp(value))
    except (TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"`{name}` must be a date such as 2015-12-31, got {value!r}.")


def _check_kind(name: str, value: Any, kinds: tuple, words: str) -> None:
    if not isinstance(value, kinds):
        raise ValueError(f"`{name}` must be {words}, got {value!r}.")


_check_list = functools.partial(_check_kind, kinds=(list, tuple), words="a list")
_check_mapping = functools.partial(_check_kind, kinds=(Mapping,), words="a mapping")
_check_universe = functools.partial(
    _check_kind,
    kinds=(str, list, tuple, Mapping, type(None)),
    words="a market of the store, such as 'all', a list of codes or a mapping",
)

Text = Annotated[str, _check_text]
Names = Annotated[Any, _check_names]
Day = Annotated[Any, check_day]
Universe = Annotated[Any, _check_universe]

_R = TypeVar("_R")
# What Qlib's own models, handlers and records take, and what stands for it here.
_HABITS = {
    "batch_size": "a batch is a day here, or `chunk` consecutive ones",
    "metric": "training stops by the validation RankIC",
    "loss": "the loss is part of the model",
    "loss_type": "the loss is part of the model",
    "optimizer": "training uses Adam, at the rate `lr`",
    "n_jobs": "one process trains; OMP_NUM_THREADS sets its threads",
    "num_workers": "one process trains; the data are one array in memory",
    "early_stopping_rounds": "it is called `early_stop` here",
    "early_stop_rounds": "it is called `early_stop` here",
    "max_steps": "`n_epochs` limits the training",
    "weight_decay": "the models are not decayed; `dropout` regularises them",
    "device": "`GPU` is the number of the CUDA device, -1 the CPU",
    "data_loader": "the handler makes its own; other features need another handler",
}
# Qlib offers these to every record and takes a TypeError for a no.
_OFFERED = ("model", "dataset")


class NamedArguments:
    """Mixin: check a constructor's arguments by its annotations and keep them.

    Before the body runs, each argument that the constructor names is checked (see the
    module) and set as the attribute of its name. A constructor that takes ``**kwargs``
    hands them on to its base class, or to another class that `_receiver` names. Its
    signature then holds the receiver's parameters in their place, less those in
    `_kept_back`: Qlib's users, `help`, and the rolling and audit tools read it.

    Raises
    ------
    ValueError
        On an argument out of range, and on those that are not in the signature, naming
        all with the nearest names. Python's own TypeError would make Qlib construct a
        second time and would not say which name was meant.
    """

    _receiver: ClassVar[type | None] = None
    _kept_back: ClassVar[frozenset[str]] = frozenset()

    if TYPE_CHECKING:  # the attributes that the constructor's arguments become

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Put the checks before the constructor."""
        super().__init_subclass__(**kwargs)
        body: Any = vars(cls).get("__init__")
        if body is None:
            return
        own = inspect.signature(body)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = named
        if len(named) < len(own.parameters):
            receiver: Any = vars(cls).get("_receiver") or super(cls, cls)
            taken = {p.name for p in named} | cls._kept_back
            parameters = named + [
                p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY)
                for p in inspect.signature(receiver.__init__).parameters.values()
                if p.name not in taken and p.kind is not p.VAR_POSITIONAL
            ]
        signature = own.replace(parameters=parameters)
        mine = {p.name for p in named[1:]}
        # What a property of this name makes of it is the class's own business.
        kept = [n for n in mine if not isinstance(getattr(cls, n, None), property)]

        @functools.wraps(body)
        def construct(self: Any, *args: Any, **given: Any) -> None:
            refuse_unknown(type(self).__name__, given, signature)
            bound = _bind(own, self, args, given)
            bound.apply_defaults()
            check_arguments(body, {n: bound.arguments[n] for n in mine})
            # Before the body, which may use what it hands on.
            rest = {n: value for n, value in given.items() if n not in mine}
            mro = type(self).__mro__
            below = mro[mro.index(cls) + 1 :]
            for other in (*below, *getattr(cls._receiver, "__mro__", ())):
                later = getattr(vars(other).get("__init__"), "__wrapped__", None)
                if rest and later is not None:
                    check_arguments(later, rest)
            for name in kept:
                setattr(self, name, bound.arguments[name])
            body(self, *args, **given)

        construct.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[method-assign]


def _bind(
    own: inspect.Signature, obj: Any, args: tuple, given: dict
) -> inspect.BoundArguments:
    try:
        return own.bind(obj, *args, **given)
    except TypeError:
        # What Qlib offers in vain raises here, as Qlib expects.
        bound = own.bind_partial(obj, *args, **given).arguments
        missing = [
            f"`{name}`"
            for name, p in own.parameters.items()
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD
            if name not in bound
        ]
        raise ValueError(
            f"{type(obj).__name__} needs {', '.join(missing)}: add to its `kwargs`."
        ) from None


def checked(function: Callable[..., _R]) -> Callable[..., _R]:
    """Decorate a function so that its annotations are checked at each call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_arguments(function, signature.bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    # `inspect.getfullargspec` does not look at what is wrapped.
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def check_arguments(owner: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError on a value that the annotation of its name does not allow.

    Parameters
    ----------
    owner : function or class
        What bears the annotations; a dataclass calls this in ``__post_init__`` with
        its type and ``vars(self)``.
    values : mapping of str to object
    """
    rules = _rules(owner)
    for name, value in values.items():
        if name in rules:
            rules[name](name, value)


@functools.cache
def _rules(owner: Any) -> dict[str, Callable[[str, Any], None]]:
    found = {}
    for name, hint in get_type_hints(owner, include_extras=True).items():
        rule = _rule(hint)
        if rule is not None:
            found[name] = rule
    return found


def _rule(hint: Any) -> Callable[[str, Any], None] | None:
    """Check of one annotation; None for a type that is not checked."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        inner = _rule(parts[0]) if len(parts) == 1 else None
        if inner is None or len(parts) == len(get_args(hint)):
            return inner

        def optional(name: str, value: Any) -> None:
            if value is not None:
                inner(name, value)

        return optional
    if get_origin(hint) is Literal:
        return functools.partial(_check_choice, choices=get_args(hint))
    bounds: dict[str, Any] = {}
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        for mark in marks:
            if callable(mark):
                return mark
            if isinstance(mark, Ge):
                bounds["low"] = mark.ge
            elif isinstance(mark, Gt):
                bounds |= {"low": mark.gt, "exclusive": True}
            elif isinstance(mark, Le):
                bounds["high"] = mark.le
            elif isinstance(mark, Lt):
                bounds |= {"high": mark.lt, "below": True}
    if hint is bool:
        return functools.partial(_check_choice, choices=(True, False))
    if hint in (list, dict):
        return _check_list if hint is list else _check_mapping
    if hint is int:
        if bounds.pop("below", False):
            bounds["high"] -= 1
        if bounds.pop("exclusive", False):
            bounds["low"] += 1
        return functools.partial(check_whole, **bounds)
    if hint is float:
        return functools.partial(check_number, **bounds)
    return None


def refuse_unknown(cls: str, given: Mapping, signature: inspect.Signature) -> None:
    """Raise ValueError that names all arguments that are not in a signature."""
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return
    names = [name for name in signature.parameters if name != "self"]
    told = []
    for name in given:
        if name in names or name in _OFFERED:
            continue
        near = difflib.get_close_matches(name, names, n=1)
        if name in _HABITS:
            reason = f"; {_HABITS[name]}."
        else:
            reason = f"; is `{near[0]}` meant?" if near else "."
        value = repr(given[name])
        value = value if len(value) < 80 else f"{value[:76]} ..."
        told.append(f"{name!r} (given {value}){reason}")
    if told:
        raise ValueError(
            f"{cls} has no parameter {' It has no parameter '.join(told)} "
            f"It takes {', '.join(names)}."
        )


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if all(isinstance(choice, bool) for choice in choices):
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    elif not isinstance(value, (str, int, type(None))) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def check_whole(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> None:
    """Raise ValueError unless `value` is a whole number in [low, high]."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        bounds = f" from {low} to {high}"
        if high == math.inf:
            bounds = "" if low == -math.inf else f" of at least {low}"
        raise ValueError(f"`{name}` must be a whole number{bounds}, got {value!r}.")


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive: bool = False,
    below: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number in [low, high].

    `exclusive` takes `low` out of the range, `below` takes `high` out. Infinity is no
    number here. Text raises as well, and no TypeError, which Qlib would hide: it
    constructs a second time.
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
    enough = low < value if exclusive else low <= value
    if not enough or not (value < high if below else value <= high):
        rules = []
        if low > -math.inf:
            rules.append(f"{'above' if exclusive else 'at least'} {low}")
        if high < math.inf:
            rules.append(f"{'below' if below else 'at most'} {high}")
        raise ValueError(f"`{name}` must be {' and '.join(rules)}, got {value!r}.")


def parse_range(text: Any, name: str) -> tuple[pd.Timestamp, pd.Timestamp]:
    """First and last day of ``2018``, ``2018:2020`` or ``2018-03-01:2019-02``.

    Raises
    ------
    ValueError
        If the text is no range of years, months or dates, or ends before it begins.
    """
    import pandas as pd

    parts = str(text).split(":")
    try:
        if len(parts) > 2:
            raise ValueError("more than two dates")
        periods = [pd.Period(p.strip()) for p in parts]
        first, last = periods[0].start_time, periods[-1].end_time.normalize()
        if last < first:
            raise ValueError("its end lies before its start")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"`{name}` must be a year (2018), years (2018:2020) or dates "
            f"(2018-03-01:2019-02-28), in order, got {text!r}."
        ) from error
    return first, last
