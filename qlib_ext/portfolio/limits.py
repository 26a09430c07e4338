"""The limits of a portfolio, one class a kind.

A limit owns its rows, its slack, its excess and its words; see `Limit`. `Limits` are
the figures that a workflow names.

Glossary: n stocks, k exposures, m parts of a limit, c columns of the programme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from qlib.utils import init_instance_by_config
from scipy import sparse

from data_handlers.arguments import NonNegative, Share, check_arguments, check_number
from qlib_ext.portfolio.programme import Limit, Numbers, Programme
from qlib_ext.portfolio.risk_model import COUNTRY, INDUSTRY

__all__ = [
    "RELAX_ORDER",
    "Industry",
    "Invested",
    "Limit",
    "Limits",
    "LinearLimit",
    "MemberShare",
    "Style",
    "TrackingError",
    "Turnover",
    "Weight",
]

RELAX_ORDER = (
    "turnover",
    "member_share",
    "style",
    "industry",
    "tracking_error",
    "weight",
    "invested",
)
"""Groups of limits in the order in which they give way."""


# ------------------------------------------------------------------------------- kinds
class LinearLimit(Limit):
    """A sum of weights, each times a number of its stock: at most the value.

    With `sign` -1 at least the value. A subclass says in `bind` what the numbers are:
    ``self.bound(value, numbers=...)`` with an array [n].
    """

    numbers: np.ndarray

    def excess(self, x: Numbers, w: np.ndarray) -> Any:
        """Sum minus value, or value minus sum."""
        return self.sign * (self.numbers @ w - self.value)

    def rows(self, form: Programme, slack: sparse.sparray) -> None:
        """One row."""
        room = self.value - self.numbers @ form.base
        row = self.sign * form.sum(self.numbers)
        form.add(self.group, "nonneg", row - slack, self.sign * room)


class MemberShare(LinearLimit):
    """Least weight of index members together."""

    group = "member_share"
    sign = -1

    def __init__(self, least: float | None) -> None:
        self.least = least

    def bind(self, x: Numbers) -> Limit | None:
        """Count members with 1, others with 0."""
        if self.least is None:
            return None
        return self.bound(self.least, numbers=x.members.astype(float))


class Invested(Limit):
    """Sum of the weights; where it gives way, money stays in cash."""

    group = "invested"
    sign = -1

    def bind(self, x: Numbers) -> Limit | None:
        """Take the sum that the problem asks for."""
        return self.bound(x.problem.invested)

    def excess(self, x: Numbers, w: np.ndarray) -> Any:
        """Either side of the sum."""
        return abs(w.sum() - self.value)

    def rows(self, form: Programme, slack: sparse.sparray) -> None:
        """One equality."""
        left = self.value - form.base.sum()
        form.add(self.group, "zero", form.sum(1.0) + slack, left)

    def cost(self) -> np.ndarray:
        """1: a share of the account."""
        return np.ones(1)


class Turnover(Limit):
    """One-sided turnover of one rebalancing; a first purchase is free."""

    group = "turnover"
    most = 2.0

    def __init__(self, limit: float | None) -> None:
        self.limit = limit

    def bind(self, x: Numbers) -> Limit | None:
        """Nothing is limited where nothing is held."""
        first = x.problem.current.sum() <= 0
        return None if self.limit is None or first else self.bound(self.limit)

    def excess(self, x: Numbers, w: np.ndarray) -> Any:
        """Half the sum of changes over the limit."""
        return np.abs(w - x.problem.current).sum() / 2 - self.value

    def rows(self, form: Programme, slack: sparse.sparray) -> None:
        """One row: twice the limit, less what bars and bounds trade already."""
        used = np.abs(form.x.problem.current - form.base).sum()
        row = form.sum(1.0, traded=True) - 2 * slack
        form.add(self.group, "nonneg", row, 2 * self.value - used)


class _Exposure(Limit):
    """Exposure differences of factors, on both sides."""

    of: np.ndarray  # [m] places of the factors

    def __init__(self, limit: float | None, named: Mapping[str, float]) -> None:
        self.limit, self.named = limit, named

    def _value(self, x: Numbers, place: int, name: str) -> float | None:
        raise NotImplementedError

    def bind(self, x: Numbers) -> Limit | None:
        """Take the factors that have a limit of this kind."""
        names = list(x.problem.factors)
        values = {j: self._value(x, j, name) for j, name in enumerate(names)}
        kept = {j: v for j, v in values.items() if v is not None}
        if not kept:
            return None
        parts = [names[j] for j in kept]
        return self.bound([*kept.values()], parts, of=np.array([*kept]))

    def excess(self, x: Numbers, w: np.ndarray) -> Any:
        """Absolute difference over the limit."""
        difference = x.exposures.T @ (w - x.problem.benchmark)
        return np.abs(difference[self.of]) - self.value

    def rows(self, form: Programme, slack: sparse.sparray) -> None:
        """Two rows a factor."""
        picked = form.exposure(self.of)
        form.add(f"{self.group}_high", "nonneg", picked - slack, self.value)
        form.add(f"{self.group}_low", "nonneg", -picked - slack, self.value)

    def words(self, form: Programme, hit: dict[str, np.ndarray]) -> list[str]:
        """Name factors and sides."""
        return [
            f"{self.group} {self.parts[i]} ({side})"
            for side in ("high", "low")
            for i in np.flatnonzero(hit[f"{self.group}_{side}"]).tolist()
        ]


class Style(_Exposure):
    """Differences of style exposures; factors named singly have their own limit."""

    group = "style"

    def _value(self, x: Numbers, place: int, name: str) -> float | None:
        if name in self.named:
            return self.named[name]
        other = name == COUNTRY or name.startswith(INDUSTRY)
        risky = np.any(x.problem.covariance[place])
        return self.limit if risky and not other else None


class Industry(_Exposure):
    """Differences of industry weights."""

    group = "industry"

    def _value(self, x: Numbers, place: int, name: str) -> float | None:
        single = name.startswith(INDUSTRY) and name not in self.named
        return self.limit if single else None


class TrackingError(Limit):
    """Annualised standard deviation of the return over the benchmark."""

    group = "tracking_error"

    def __init__(self, limit: float | None) -> None:
        self.limit = limit

    def bind(self, x: Numbers) -> Limit | None:
        """Take the limit as it is."""
        return None if self.limit is None else self.bound(self.limit)

    def excess(self, x: Numbers, w: np.ndarray) -> Any:
        """Predicted tracking error over the limit."""
        return np.sqrt(x.variance(w)) - self.value

    def rows(self, form: Programme, slack: sparse.sparray) -> None:
        """Add a second-order cone, in units of the limit."""
        unit, (factor, single, still) = self.unit(), form.risk
        moving = np.zeros(len(still), bool)
        moving[form.moving] = True
        fixed = np.sqrt((still[~moving] ** 2).sum())
        last = sparse.csr_array((1, form.columns))
        a = sparse.vstack([-slack, -factor / unit, -single / unit, last])
        b: list = [self.value, np.zeros(factor.shape[0]), still[form.moving], [fixed]]
        form.add(self.group, "soc", a, np.concatenate(b) / unit)

    def unit(self) -> float:
        """Return the limit itself, so that the cone is well scaled."""
        return max(float(self.value[0]), 1e-6)

    def cost(self) -> np.ndarray:
        """1: the limit once more."""
        return np.ones(1)


class Weight(Limit):
    """Cap of each stock: the larger of `most_each` and its benchmark weight.

    Members also stay within `multiple` times their benchmark weight. A weight that
    cannot be sold is no breach.
    """

    group = "weight"
    most = np.inf
    of: np.ndarray  # [m] stocks

    def __init__(self, most_each: float | None, multiple: float | None) -> None:
        self.most_each, self.multiple = most_each, multiple

    def bind(self, x: Numbers) -> Limit | None:
        """Take the stocks whose cap is below what they may weigh anyway."""
        p = x.problem
        cap = np.ones(len(p.names))
        if self.most_each is not None:
            cap = np.maximum(self.most_each, p.benchmark)
        if self.multiple is not None:
            cap = np.where(x.members, np.minimum(cap, self.multiple * p.benchmark), cap)
        cap = np.maximum(cap, x.low)
        of = np.flatnonzero(cap < x.high)
        if not len(of):
            return None
        return self.bound(cap[of], [p.names[i] for i in of.tolist()], of=of)

    def excess(self, x: Numbers, w: np.ndarray) -> Any:
        """Weight over the cap."""
        return w[self.of] - self.value

    def tighten(self, high: np.ndarray) -> np.ndarray:
        """Bound the weights: rows are needed only to give way."""
        high = high.copy()
        high[self.of] = np.minimum(high[self.of], self.value)
        return high

    def rows(self, form: Programme, slack: sparse.sparray) -> None:
        """One row a stock, where the caps give way."""
        if self in form.relax:
            room = self.value - form.base[self.of]
            form.add(self.group, "nonneg", form.change[self.of] - slack, room)

    def words(self, form: Programme, hit: dict[str, np.ndarray]) -> list[str]:
        """Name stocks: at a cap that gives way, at the cap, sold because of one."""
        if self in form.relax:
            return form.shown("weight cap", self.of[hit[self.group]])
        high = form.buys[hit["high"]]
        out = form.shown("weight cap", high[np.isin(high, self.of)])
        sold = form.sells[hit["sell_low"]]
        return out + form.shown("weight cap", sold[form.base[sold] > form.high[sold]])


# ------------------------------------------------------------------------------ figures
@dataclass(frozen=True)
class Limits:
    """What a portfolio must keep to; None switches a limit off.

    Parameters
    ----------
    tracking_error : float, optional
        Annualised standard deviation of the return over the benchmark.
    style : float, optional
        Difference of each style exposure from the benchmark's, in standard deviations.
    industry : float, optional
        Difference of each industry weight.
    turnover : float, optional
        One-sided, of one rebalancing. Not applied to a first purchase.
    max_weight : float, optional
        Cap of a stock (its benchmark weight if that is larger).
    max_multiple : float, optional
        Cap of a member in multiples of its benchmark weight, at least 1.
    member_share : float, optional
        Least weight of index members together.
    named : dict of str to float
        Limits of single styles or characteristics, in place of `style`.
    more : sequence of Limit
        Limits of other kinds.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    # Above 1 a share is a figure in percent.
    tracking_error: Share | None = 0.05
    style: NonNegative | None = 0.5
    industry: Share | None = 0.02
    turnover: Share | None = 0.20
    max_weight: Share | None = 0.03
    max_multiple: Annotated[float, Ge(1)] | None = None
    member_share: Share | None = None
    named: Mapping[str, float] = field(default_factory=dict)
    more: Sequence[Limit] = ()

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if not isinstance(self.named, Mapping):
            raise ValueError(f"`named` must map names to limits, got {self.named!r}.")
        for name, value in self.named.items():
            check_number(name, value, 0.0)
        groups = list(RELAX_ORDER)
        for limit in self.more:
            if not isinstance(limit, Limit):
                raise ValueError(f"`more` must hold limits, got {limit!r}.")
            if not limit.group or limit.group in groups:
                raise ValueError(
                    f"`more`: `group` of {type(limit).__name__} must be a new name, "
                    f"got {limit.group!r}."
                )
            groups.append(limit.group)

    def describe(self) -> dict[str, Any]:
        """Return the figures as plain values, for a report."""
        out = {**vars(self), "named": dict(self.named)}
        more = {limit.group: dict(vars(limit)) for limit in out.pop("more")}
        return {**out, "more": more} if more else out

    def kinds(self) -> list[Limit]:
        """Return the limits as objects, each its own kind."""
        return [
            Invested(),
            Style(self.style, self.named),
            Industry(self.industry, self.named),
            Turnover(self.turnover),
            MemberShare(self.member_share),
            TrackingError(self.tracking_error),
            Weight(self.max_weight, self.max_multiple),
            *self.more,
        ]

    @classmethod
    def preset(cls, name: str, market: str = "", **changes: Any) -> Limits:
        """Take the reports' limits for an index (docs/enhancement.md).

        Parameters
        ----------
        name : {"wide", "strict"}
            `strict` adds narrow limits on size, volatility, ROE and earnings surprise,
            0.1 standard deviations each `[gap]`; those that the risk model does not
            have are left out, and the result says so.
        market : str
            Index: "csi300" allows a tracking error of 4 %, others 5 %.
        **changes
            Fields to set otherwise. A limit in `more` may be a config with ``class``,
            ``module_path`` and ``kwargs``.

        Raises
        ------
        ValueError
            If a name is unknown.
        """
        if name not in ("wide", "strict"):
            raise ValueError(f"`limits` must be 'wide' or 'strict', got {name!r}.")
        known = set(cls.__dataclass_fields__)
        for change in changes:
            if change not in known:
                raise ValueError(
                    f"`limits` has no {change!r}; choose from {sorted(known)}."
                )
        named: dict[str, float] = {}
        if name == "strict":
            named = dict.fromkeys(
                ("size", "volatility", "roe", "earnings_surprise"), 0.1
            )
        values: dict[str, Any] = {
            "tracking_error": 0.04 if market == "csi300" else 0.05,
            **changes,
        }
        values["named"] = {**named, **dict(changes.get("named", {}))}
        values["more"] = [
            init_instance_by_config(limit, accept_types=Limit)
            for limit in changes.get("more", ())
        ]
        return cls(**values)
