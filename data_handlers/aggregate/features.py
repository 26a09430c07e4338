"""A feature of an aggregate is one function with its definition above it.

`FeatureSet` collects them in the order of their columns and compiles one kernel that
fills a row, so nothing else knows which feature stands where::

    @MINUTE.feature("ms_rv", "sqrt(Σr²)", "log return a day", 0, INF, "never")
    def _(x):
        return np.sqrt(x.s2)

`x` is the summary of a stock's day, a named tuple that the loops of
`minute_kernels.py` and `tick_kernels.py` fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data_handlers.aggregate.schema import FeatureDef
from data_handlers.compiled import inner

__all__ = ["INF", "FeatureSet"]

INF = float("inf")


class FeatureSet:
    """The features of one aggregate, in the order of their columns."""

    def __init__(self) -> None:
        self.definitions: list[FeatureDef] = []
        self._functions: list[Callable] = []

    def feature(self, *args: Any, known: str = "close", needs: Sequence[str] = ()):
        """Add the decorated function as the next feature.

        Parameters
        ----------
        args, known, needs
            See `schema.FeatureDef`.

        Returns
        -------
        callable
            A decorator. The function takes the summary of a day and returns a float;
            numba compiles it, so it must not allocate or call plain Python.
        """
        definition = FeatureDef(*args, known=known, needs=needs)  # type: ignore[misc]
        if any(f.name == definition.name for f in self.definitions):
            raise ValueError(f"feature {definition.name!r} is defined twice.")

        def add(function: Callable) -> Callable:
            self.definitions.append(definition)
            self._functions.append(inner(function))
            return function

        return add

    def kernel(self) -> Callable:
        """Compile ``fill(x, row)``, which puts every feature into its place."""

        @inner
        def nothing(x, row):
            pass

        fill: Callable = nothing
        for k, function in enumerate(self._functions):
            fill = _then(fill, k, function)
        return fill


def _then(before: Callable, k: int, function: Callable) -> Callable:
    # A loop over functions would call each through a pointer; this chain is inlined.
    @inner
    def fill(x, row):
        before(x, row)
        row[k] = function(x)

    return fill
