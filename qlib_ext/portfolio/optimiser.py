r"""Index enhancement as a second-order cone programme in factor form.

Over the weights w of n stocks, with d = w - benchmark::

    maximise    alpha · d  [- risk_aversion * (|R Xᵀd|² + |s∘d|²)]
    subject to  sum(w) = invested;  no short sale; no purchase or sale where barred
                |Xᵀd| <= limit of each style and industry
                sqrt(|R Xᵀd|² + |s∘d|²) <= tracking error, annualised
                |w - w0|₁ / 2 <= turnover
                sum of w over index members >= member share
                w <= cap of each stock

X holds the exposures, RᵀR is the factor covariance and s the specific risk, so nothing
is n x n. Stocks whose weight is fixed are taken out, a stock that is not held has no
sales variable, and an industry costs one number a stock. The cone form is written down
here and not by a modelling language: compiling it with cvxpy's parameters took 22 s
for 800 stocks and made every industry column dense; tests solve the same problems with
cvxpy. Interior-point solvers (Clarabel) have no warm start and need none.

When the limits cannot all be met
---------------------------------
They are relaxed in a stated order (`RELAX_ORDER`; first what costs least): the first
group alone, then the first two, and so on until a solution exists; of the last such
problem the smallest sum of excesses relative to the limits is taken, the limits become
what it needs (and a thousandth of the excess more, to leave more than one point), and
the portfolio is optimised again under them. The result lists every
relaxed limit with its old and new value, and the constraints whose multipliers make up
the proof that there was no solution. Trading bars and the ban on short sales are never
relaxed. If every solver fails, the result says so and holds the current weights.

`[gap]` of SPEC section 9, decided here:

- An industry's or style's difference is that of weighted sums over all stocks, the
  rest of the money being cash with exposure 0.
- One-sided turnover is half the sum of absolute changes of weight.
- A cap of 3 % would force an index's larger members below their weight: a stock may
  always weigh as much as in the benchmark. `max_multiple` caps members at a multiple
  of their benchmark weight too.
- Unknown exposures count as 0, the cap-weighted mean of the market (`missing:
  neutral`); with `missing: exclude` such a stock is not bought above its benchmark
  weight. An unknown specific risk takes the highest known. The result counts them.
- A stock without score has alpha 0 (the mean) and is not bought above its benchmark
  weight. If no two scores differ, tracking error is minimised instead.

Glossary: n stocks, k exposures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from qlib.log import get_module_logger
from scipy import sparse

from data_handlers.arguments import check_number
from qlib_ext.portfolio.risk_model import COUNTRY, INDUSTRY, DayRisk

__all__ = [
    "RELAX_ORDER",
    "SOLVERS",
    "Limits",
    "Optimiser",
    "Problem",
    "Relaxation",
    "Solution",
    "make_problem",
]

logger = get_module_logger("qlib_ext.portfolio")

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
SOLVERS = ("CLARABEL", "OSQP", "SCS")
"""Tried in turn; OSQP takes no tracking-error limit and is passed over then."""
TOLERANCE = 1e-6  # by which a limit may be missed, in its own unit
_FREE = 1e3  # stands for "no limit"
_FIXED = 1e-12  # bounds closer than this leave no choice


# ---------------------------------------------------------------------------- limits
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
        Cap of a member in multiples of its benchmark weight.
    member_share : float, optional
        Least weight of index members together.
    named : dict of str to float
        Limits of single styles or characteristics, in place of `style`.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    tracking_error: float | None = 0.05
    style: float | None = 0.5
    industry: float | None = 0.02
    turnover: float | None = 0.20
    max_weight: float | None = 0.03
    max_multiple: float | None = None
    member_share: float | None = None
    named: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {k: v for k, v in vars(self).items() if k != "named"}
        if not isinstance(self.named, Mapping):
            raise ValueError(f"`named` must map names to limits, got {self.named!r}.")
        for name, value in {**numbers, **self.named}.items():
            if value is None and name not in self.named:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < np.inf:
                raise ValueError(f"`{name}` must be a limit >= 0, got {value!r}.")
        if self.max_multiple is not None and self.max_multiple < 1:
            raise ValueError(
                f"`max_multiple` must be at least 1, got {self.max_multiple}: the "
                "benchmark itself must be allowed."
            )
        if self.member_share is not None and self.member_share > 1:
            raise ValueError(
                f"`member_share` is a share of at most 1, got {self.member_share}."
            )

    @classmethod
    def preset(cls, name: str, market: str = "", **changes: Any) -> Limits:
        """Limits of SPEC section 9 for an index.

        Parameters
        ----------
        name : {"wide", "strict"}
            `strict` adds narrow limits on size, volatility, ROE and earnings surprise,
            0.1 standard deviations each `[gap]`; those that the risk model does not
            have are left out, and the result says so.
        market : str
            Index: "csi300" allows a tracking error of 4 %, others 5 %.
        **changes
            Fields to set otherwise.

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
        return cls(**values)


# --------------------------------------------------------------------------- problem
@dataclass(frozen=True)
class Problem:
    """One rebalancing as arrays; `make_problem` builds it from frames.

    Attributes
    ----------
    names : list of str [n]
        Stocks.
    alpha : ndarray [n]
        Expected return in any unit; NaN: no score.
    benchmark : ndarray [n]
        Weights in the index, not negative.
    current : ndarray [n]
        Weights held now; all 0 means a first purchase.
    exposures : ndarray [n, k]
        NaN unknown.
    factors : list of str [k]
        Their names.
    covariance : ndarray [k, k]
        Annualised; zero for what is no risk factor.
    specific : ndarray [n]
        Annualised standard deviation, NaN unknown.
    can_buy, can_sell : ndarray of bool [n]
    members : ndarray of bool [n], optional
        Default: where the benchmark weight is positive.
    invested : float, default 1
        Sum of the weights wanted.
    """

    names: Sequence[str]
    alpha: np.ndarray
    benchmark: np.ndarray
    current: np.ndarray
    exposures: np.ndarray
    factors: Sequence[str]
    covariance: np.ndarray
    specific: np.ndarray
    can_buy: np.ndarray
    can_sell: np.ndarray
    members: np.ndarray | None = None
    invested: float = 1.0

    def __post_init__(self) -> None:
        n, k = len(self.names), len(self.factors)
        shapes = {
            "alpha": (n,),
            "benchmark": (n,),
            "current": (n,),
            "exposures": (n, k),
            "covariance": (k, k),
            "specific": (n,),
            "can_buy": (n,),
            "can_sell": (n,),
        }
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                raise ValueError(
                    f"`{name}` must have shape {shape}, got "
                    f"{np.shape(getattr(self, name))}."
                )
        for name in ("benchmark", "current"):
            values = getattr(self, name)
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"`{name}` must be known and not negative.")
        if self.benchmark.sum() > 1 + TOLERANCE or self.benchmark.sum() <= 0:
            raise ValueError(
                f"`benchmark` must sum to at most 1 and above 0, got "
                f"{self.benchmark.sum():.6f}."
            )
        if not np.isfinite(self.covariance).all():
            raise ValueError("`covariance` must be known for every factor.")
        if not 0 < self.invested <= 1:
            raise ValueError(f"`invested` must be in (0, 1], got {self.invested}.")


def make_problem(
    risk: DayRisk,
    score: pd.Series,
    benchmark: pd.Series,
    current: pd.Series,
    *,
    barred: Sequence[str] = (),
    invested: float = 1.0,
) -> Problem:
    """Put scores, weights and a day's risk model on one list of stocks.

    Parameters
    ----------
    risk : DayRisk
    score : Series
        Expected return by stock, any unit.
    benchmark : Series
        Index weights.
    current : Series
        Weights held, cash left out.
    barred : sequence of str
        Stocks that can be neither bought nor sold.
    invested : float, default 1

    Returns
    -------
    Problem
        Of all stocks with a score, an index weight or a holding. One that the risk
        model does not know has no exposures.
    """
    benchmark = benchmark[benchmark > 0]
    current = current[current > 0]
    names = score.index[np.isfinite(score.to_numpy(float))]
    names = names.union(benchmark.index).union(current.index).sort_values()
    x = pd.concat([risk.exposures, risk.characteristics], axis=1).reindex(names)
    factors = [str(c) for c in x.columns]
    k, m = len(factors), risk.covariance.shape[0]
    covariance = np.zeros((k, k))
    covariance[:m, :m] = risk.covariance.to_numpy()
    exposures = x.to_numpy(float)
    industries = [j for j, f in enumerate(factors) if f.startswith(INDUSTRY)]
    exposures[:, [j for j, f in enumerate(factors) if f == COUNTRY]] = 1.0
    exposures[:, industries] = np.nan_to_num(exposures[:, industries])
    free = ~names.isin(list(barred))
    return Problem(
        names=[str(x) for x in names],
        alpha=score.reindex(names).to_numpy(float),
        benchmark=benchmark.reindex(names).fillna(0.0).to_numpy(float),
        current=current.reindex(names).fillna(0.0).to_numpy(float),
        exposures=exposures,
        factors=factors,
        covariance=covariance,
        specific=risk.specific.reindex(names).to_numpy(float),
        can_buy=free,
        can_sell=free,
        invested=invested,
    )


# ------------------------------------------------------------------------------ result
@dataclass(frozen=True)
class Relaxation:
    """One limit that gave way.

    Attributes
    ----------
    group : str
        Of `RELAX_ORDER`.
    name : str
        The limit: a factor, a stock, or the group itself.
    limit, applied : float
        Asked for, and allowed instead.
    """

    group: str
    name: str
    limit: float
    applied: float

    def __str__(self) -> str:
        what = self.group if self.group == self.name else f"{self.group} {self.name}"
        return f"{what} {self.limit:.4g} -> {self.applied:.4g}"


@dataclass(frozen=True)
class Solution:
    """Weights and what must be said about them.

    Attributes
    ----------
    weights : Series [n]
    status : str
        "optimal"; "relaxed": optimal under relaxed limits; "failed": no solver gave a
        portfolio within the tolerance and `weights` are those held before.
    solver : str
        That gave the weights.
    objective : float
        alpha · d (less risk aversion times variance).
    tracking_error : float
        Predicted, annualised.
    turnover : float
        One-sided.
    exposures : Series [k]
        Portfolio minus benchmark.
    member_share : float
    relaxations : list of Relaxation
    conflict : list of str
        Constraints that together had no solution; empty if there was one.
    counts : dict of str to int
        Stocks without exposures, score or specific risk, barred ones, names not in the
        risk model.
    seconds : float
        Wall time.
    messages : list of str
        What solvers said when they failed.
    """

    weights: pd.Series
    status: str
    solver: str
    objective: float
    tracking_error: float
    turnover: float
    exposures: pd.Series
    member_share: float
    relaxations: list[Relaxation]
    conflict: list[str]
    counts: dict[str, int]
    seconds: float
    messages: list[str]


# ----------------------------------------------------------------------------- numbers
@dataclass
class _Numbers:
    """The problem after its rules: what is fixed is taken out."""

    alpha: np.ndarray  # [n] 0 where unknown
    exposures: np.ndarray  # [n, k] 0 where unknown
    specific: np.ndarray  # [n]
    root: np.ndarray  # [k, k], RᵀR = covariance
    low: np.ndarray  # [n] hard bounds of w
    high: np.ndarray  # [n]
    cap: np.ndarray  # [n] soft bound of w
    limit: np.ndarray  # [k] of |Xᵀd|, _FREE without
    group: list[str]  # [k] "style", "industry" or ""
    tracking_error: float
    turnover: float
    member_share: float
    members: np.ndarray  # [n] bool
    invested: float
    risk_aversion: float
    counts: dict[str, int]

    def limited(self, relaxations: Sequence[Relaxation], names, factors) -> _Numbers:
        """Return the same numbers under relaxed limits."""
        out = replace(self, limit=self.limit.copy(), cap=self.cap.copy())
        for r in relaxations:
            if r.group in ("style", "industry"):
                out.limit[factors.index(r.name)] = r.applied
            elif r.group == "weight":
                out.cap[names.index(r.name)] = r.applied
            else:
                setattr(out, r.group, r.applied)
        return out


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with RᵀR = covariance; negative eigenvalues (rounding) count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T


def _numbers(
    p: Problem, limits: Limits, missing: str, risk_aversion: float
) -> _Numbers:
    x = np.asarray(p.exposures, float)
    unknown = ~np.isfinite(x)
    specific = np.asarray(p.specific, float)
    lost = ~np.isfinite(specific)
    if lost.all():
        raise ValueError("`specific` must be known for at least one stock.")
    scored = np.isfinite(p.alpha)
    alpha = np.where(scored, p.alpha, 0.0)
    spread = alpha[scored].std() if scored.any() else 0.0
    if spread <= 1e-12 * np.abs(alpha).max(initial=0.0) or spread == 0:
        alpha, risk_aversion = np.zeros_like(alpha), max(risk_aversion, 100.0)
    else:
        # In standard deviations, so that tolerances mean the same for any score.
        alpha = np.where(scored, (alpha - alpha[scored].mean()) / spread, 0.0)
    members = p.benchmark > 0 if p.members is None else np.asarray(p.members, bool)
    low = np.where(p.can_sell, 0.0, p.current)
    high = np.where(p.can_buy, 1.0, p.current)
    passive = ~scored
    if missing == "exclude":
        passive |= unknown.any(1)
    # Neither sold by this rule: what is held above may stay.
    high = np.where(
        passive & p.can_buy, np.maximum(p.benchmark, np.minimum(p.current, 1.0)), high
    )
    high = np.maximum(high, low)
    cap = np.full(len(p.names), 1.0)
    if limits.max_weight is not None:
        cap = np.maximum(limits.max_weight, p.benchmark)
    if limits.max_multiple is not None:
        cap = np.where(members, np.minimum(cap, limits.max_multiple * p.benchmark), cap)
    # A weight that cannot be sold is no breach of the cap.
    cap = np.maximum(cap, low)
    limit, group = np.full(len(p.factors), _FREE), []
    for j, name in enumerate(p.factors):
        value = None
        if name in limits.named:
            value, kind = limits.named[name], "style"
        elif name.startswith(INDUSTRY):
            value, kind = limits.industry, "industry"
        elif name != COUNTRY and np.any(p.covariance[j]):
            value, kind = limits.style, "style"
        if value is not None:
            limit[j] = value
        group.append("" if value is None else kind)
    first = p.current.sum() <= 0
    return _Numbers(
        alpha=alpha,
        exposures=np.where(unknown, 0.0, x),
        specific=np.where(lost, np.nanmax(specific), specific),
        root=_root(p.covariance),
        low=low,
        high=high,
        cap=cap,
        limit=limit,
        group=group,
        tracking_error=_FREE
        if limits.tracking_error is None
        else limits.tracking_error,
        turnover=_FREE if limits.turnover is None or first else limits.turnover,
        member_share=-_FREE if limits.member_share is None else limits.member_share,
        members=members,
        invested=p.invested,
        risk_aversion=risk_aversion,
        counts={
            "stocks": len(p.names),
            "without_score": int((~scored).sum()),
            "without_exposure": int(unknown.any(1).sum()),
            "without_specific_risk": int(lost.sum()),
            "barred": int((~(p.can_buy & p.can_sell)).sum()),
            "limits_left_out": len(set(limits.named) - set(p.factors)),
        },
    )


def _variance(x: _Numbers, d: np.ndarray) -> float:
    return float(
        ((x.root @ (x.exposures.T @ d)) ** 2).sum() + ((x.specific * d) ** 2).sum()
    )


def _excess(x: _Numbers, p: Problem, w: np.ndarray) -> dict[str, float]:
    """By how much weights miss each limit; 0 or below: kept."""
    d = w - p.benchmark
    return {
        "invested": abs(float(w.sum()) - x.invested),
        "bounds": float(np.max([x.low - w, w - x.high])),
        "weight": float(np.max(w - x.cap)),
        "exposure": float(np.max(np.abs(x.exposures.T @ d) - x.limit, initial=-1.0)),
        "tracking_error": np.sqrt(_variance(x, d)) - x.tracking_error,
        "turnover": float(np.abs(w - p.current).sum()) / 2 - x.turnover,
        "member_share": x.member_share - float(w[x.members].sum()),
    }


# --------------------------------------------------------------------------- cone form
class _Programme:
    """The problem as ``min x'Px/2 + q'x`` with ``b - Ax`` in a product of cones.

    Variables: purchases of stocks that may rise, sales of those that may fall, the
    exposure differences, then the excesses of the groups in `relax`. With such groups
    it is the search for the smallest relaxation; without, the portfolio problem.
    """

    def __init__(self, x: _Numbers, p: Problem, relax: Sequence[str] = ()) -> None:
        self.relax = tuple(relax)
        soft = "weight" in relax
        self.high = high = (
            x.high if soft else np.maximum(np.minimum(x.high, x.cap), x.low)
        )
        self.base = base = np.where(high - x.low > _FIXED, p.current, x.low)
        self.buys = np.flatnonzero(high - base > _FIXED)
        self.sells = np.flatnonzero(base - x.low > _FIXED)
        u, m, k = len(self.buys), len(self.sells), x.exposures.shape[1]
        moving = np.union1d(self.buys, self.sells)
        self.capped = moving[x.cap[moving] < x.high[moving]]
        many = {"style": k, "industry": k, "weight": len(self.capped)}
        places = np.cumsum([u, m, k, *(many.get(g, 1) for g in relax)])
        self.slack = {
            g: np.arange(places[2 + i], places[3 + i]) for i, g in enumerate(relax)
        }
        self.columns = n = int(places[-1])
        self.v = u + m + np.arange(k)
        self._blocks: list[tuple[str, str, sparse.spmatrix, np.ndarray]] = []
        difference = base - p.benchmark
        eye = sparse.eye_array(n, format="csr")
        load = x.exposures[np.r_[self.buys, self.sells]].T.copy()
        load[:, u:] *= -1

        def row(columns: np.ndarray, values: Any) -> sparse.spmatrix:
            columns = np.atleast_1d(columns)
            values = np.broadcast_to(np.asarray(values, float), columns.shape)
            return sparse.csr_array(
                (values, (np.zeros(len(columns), int), columns)), shape=(1, n)
            )

        def minus_slack(group: str) -> Any:
            # `A x - excess <= b`
            if group not in self.slack:
                return sparse.csr_array((1, n))
            return -row(self.slack[group], 1.0)

        # Equalities.
        exposure = sparse.hstack(
            [sparse.csr_array(load), -sparse.eye_array(k)], format="csr"
        )
        exposure.resize((k, n))
        self._add("exposure", "zero", exposure, -x.exposures.T @ difference)
        moved = np.r_[np.ones(u), -np.ones(m)]
        total = row(np.arange(u + m), moved)
        short = -minus_slack("invested")
        net = x.invested - base.sum()
        self._add("invested", "zero", total + short, [net])
        # Bounds of purchases and sales; a cap below what is held forces a sale.
        self._add("buy_low", "nonneg", -eye[:u], np.zeros(u))
        self._add("high", "nonneg", eye[:u], (high - base)[self.buys])
        forced = np.maximum(base - high, 0.0)[self.sells]
        self._add("sell_low", "nonneg", -eye[u : u + m], -forced)
        self._add("low", "nonneg", eye[u : u + m], (base - x.low)[self.sells])
        place = np.full(len(base), -1)
        place[moving] = np.arange(len(moving))
        change = sparse.csr_array(
            (moved, (place[np.r_[self.buys, self.sells]], np.arange(u + m))),
            shape=(len(moving), n),
        )
        if soft:
            self._add(
                "weight",
                "nonneg",
                change[place[self.capped]] - eye[self.slack["weight"]],
                (x.cap - base)[self.capped],
            )
        # Limits of exposures.
        for group in ("style", "industry"):
            of = np.array([j for j, g in enumerate(x.group) if g == group], int)
            extra = eye[self.slack[group][of]] if group in self.slack else 0 * eye[of]
            for side, sign in (("high", 1.0), ("low", -1.0)):
                self._add(
                    f"{group}_{side}", "nonneg", sign * eye[self.v[of]] - extra,
                    x.limit[of],
                )  # fmt: skip
        if x.turnover < _FREE:
            used = np.abs(p.current - base).sum()
            both = row(np.arange(u + m), 1.0) + 2 * minus_slack("turnover")
            self._add("turnover", "nonneg", both, [2 * x.turnover - used])
        if x.member_share > -_FREE:
            inside = x.members[np.r_[self.buys, self.sells]] * moved
            share = -row(np.arange(u + m), inside) + minus_slack("member_share")
            rest = base[x.members].sum() - x.member_share
            self._add("member_share", "nonneg", share, [rest])
        for group, own in self.slack.items():
            self._add(f"{group}_slack", "nonneg", -eye[own], np.zeros(len(own)))
        # Risk, in units of its limit.
        still = np.ones(len(base), bool)
        still[moving] = False
        fixed = np.sqrt(((x.specific * difference)[still] ** 2).sum())
        if x.tracking_error < _FREE:
            unit = max(x.tracking_error, 1e-6)
            factor = sparse.csr_array(x.root) @ eye[self.v]
            single = sparse.diags_array(x.specific[moving]) @ change
            self._add(
                "tracking_error",
                "soc",
                sparse.vstack(
                    [minus_slack("tracking_error"), -factor / unit, -single / unit,
                     sparse.csr_array((1, n))]
                ),
                np.r_[
                    x.tracking_error / unit,
                    np.zeros(k),
                    (x.specific * difference)[moving] / unit,
                    fixed / unit,
                ],
            )  # fmt: skip
        # Objective.
        self.q = np.zeros(n)
        self.P = sparse.csc_array((n, n))
        if relax:
            for group, own in self.slack.items():
                self.q[own] = 1.0
                if group in ("style", "industry"):
                    # An excess of a factor that is not limited costs, and stays 0.
                    self.q[own] = 1 / np.clip(x.limit, 1e-3, 1.0)
                elif group == "weight":
                    self.q[own] = 1 / np.maximum(x.cap[self.capped], 1e-3)
                elif group in ("turnover", "member_share"):
                    self.q[own] = 1 / np.clip(abs(getattr(x, group)), 1e-3, 2.0)
        else:
            self.q[: u + m] = -x.alpha[np.r_[self.buys, self.sells]] * moved
            if x.risk_aversion > 0:
                single = (sparse.diags_array(x.specific[moving]) @ change).tocsc()
                factor = (sparse.csr_array(x.root) @ eye[self.v]).tocsc()
                hessian = single.T @ single + factor.T @ factor
                self.P = sparse.triu(2 * x.risk_aversion * hessian, format="csc")
                pull = x.specific[moving] * difference[moving]
                self.q += 2 * x.risk_aversion * (single.T @ pull)

    def _add(self, name: str, cone: str, a: Any, b: Any) -> None:
        self._blocks.append((name, cone, sparse.csr_array(a), np.asarray(b, float)))

    def matrices(
        self,
    ) -> tuple[sparse.csc_array, np.ndarray, dict[str, list[int]], dict[str, slice]]:
        """Return A, b, sizes of the cones in order, and each block's rows."""
        order = ("zero", "nonneg", "soc")
        blocks = sorted(self._blocks, key=lambda x: order.index(x[1]))
        rows, at = {}, 0
        cones: dict[str, list[int]] = {c: [] for c in order}
        for name, cone, _, b in blocks:
            rows[name] = slice(at, at + len(b))
            cones[cone].append(len(b))
            at += len(b)
        a = sparse.csc_array(sparse.vstack([x[2] for x in blocks], format="csc"))
        a.eliminate_zeros()
        a.sort_indices()
        return a, np.concatenate([x[3] for x in blocks]), cones, rows

    def weights(self, solution: np.ndarray) -> np.ndarray:
        """Weights [n] of the variables' values."""
        out = self.base.copy()
        u = len(self.buys)
        np.add.at(out, self.buys, solution[:u])
        np.subtract.at(out, self.sells, solution[u : u + len(self.sells)])
        return out


@dataclass(frozen=True)
class _Answer:
    status: str  # "optimal", "inaccurate", "infeasible" or the solver's own word
    x: np.ndarray | None
    z: np.ndarray | None  # multipliers of the rows


def _clarabel(programme: _Programme) -> _Answer:
    import clarabel

    a, b, cones, _ = programme.matrices()
    kinds = [clarabel.ZeroConeT(sum(cones["zero"]))]
    kinds.append(clarabel.NonnegativeConeT(sum(cones["nonneg"])))
    kinds += [clarabel.SecondOrderConeT(size) for size in cones["soc"]]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    solver = clarabel.DefaultSolver(programme.P, programme.q, a, b, kinds, settings)
    done = solver.solve()
    said = str(done.status)
    status = {
        "Solved": "optimal",
        "AlmostSolved": "inaccurate",
        "PrimalInfeasible": "infeasible",
        "AlmostPrimalInfeasible": "infeasible",
    }.get(said, said)
    return _Answer(status, np.array(done.x), np.array(done.z))


def _scs(programme: _Programme) -> _Answer:
    import scs

    a, b, cones, _ = programme.matrices()
    data = {
        "P": sparse.csc_matrix(programme.P),
        "A": sparse.csc_matrix(a),
        "b": b,
        "c": programme.q,
    }
    cone = {"z": sum(cones["zero"]), "l": sum(cones["nonneg"]), "q": cones["soc"]}
    done = scs.SCS(
        data, cone, verbose=False, eps_abs=1e-9, eps_rel=1e-9, max_iters=100_000
    ).solve()
    said = done["info"]["status"]
    status = {
        "solved": "optimal",
        "solved (inaccurate - reached max_iters)": "inaccurate",
        "infeasible": "infeasible",
    }.get(said, said)
    return _Answer(status, done["x"], done["y"])


def _osqp(programme: _Programme) -> _Answer:
    import osqp

    a, b, cones, _ = programme.matrices()
    if cones["soc"]:
        return _Answer("takes no tracking-error limit", None, None)
    equal = sum(cones["zero"])
    low = np.r_[b[:equal], np.full(len(b) - equal, -np.inf)]
    solver = osqp.OSQP()
    solver.setup(
        sparse.csc_matrix(programme.P),
        programme.q,
        sparse.csc_matrix(a),
        low,
        b,
        verbose=False,
        eps_abs=1e-9,
        eps_rel=1e-9,
        max_iter=200_000,
        polishing=True,
    )
    done = solver.solve(raise_error=False)
    said = str(done.info.status)
    status = {
        "solved": "optimal",
        "solved inaccurate": "inaccurate",
        "primal infeasible": "infeasible",
        "primal infeasible inaccurate": "infeasible",
    }.get(said, said)
    return _Answer(status, np.asarray(done.x), np.asarray(done.y))


_CALLS = {"CLARABEL": _clarabel, "OSQP": _osqp, "SCS": _scs}


# ----------------------------------------------------------------------------- solver
class Optimiser:
    """Solve index-enhancement problems, one after the other.

    Parameters
    ----------
    limits : Limits, default Limits()
    risk_aversion : float, default 0
        Weight of the variance of the return over the benchmark, for alphas in standard
        deviations of the day's scores.
    missing : {"neutral", "exclude"}, default "neutral"
        What an unknown exposure means, see the module's text.
    relax_order : sequence of str, default `RELAX_ORDER`
        Groups that may give way, in this order. One that is left out never does; an
        impossible problem then ends as "failed".
    solvers : sequence of str, default `SOLVERS`
        Tried in turn.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        risk_aversion: float = 0.0,
        missing: str = "neutral",
        relax_order: Sequence[str] = RELAX_ORDER,
        solvers: Sequence[str] = SOLVERS,
    ) -> None:
        if missing not in ("neutral", "exclude"):
            raise ValueError(
                f"`missing` must be 'neutral' or 'exclude', got {missing!r}."
            )
        check_number("risk_aversion", risk_aversion, 0.0)
        for name, values, known in (
            ("relax_order", relax_order, RELAX_ORDER),
            ("solvers", solvers, SOLVERS),
        ):
            wrong = [v for v in values if v not in known]
            if wrong or len(set(values)) != len(values):
                raise ValueError(
                    f"`{name}` must list some of {list(known)} once each, got "
                    f"{list(values)}."
                )
        if not solvers:
            raise ValueError("`solvers` must name at least one solver.")
        self.limits = limits or Limits()
        self.risk_aversion = risk_aversion
        self.missing = missing
        self.relax_order = tuple(relax_order)
        self.solvers = tuple(solvers)

    def solve(self, problem: Problem) -> Solution:
        """Optimise; every outcome is in the result, see `Solution`.

        Raises
        ------
        ValueError
            If the problem is not well posed (no specific risk known at all).
        """
        began = time.perf_counter()
        p = problem
        x = _numbers(p, self.limits, self.missing, self.risk_aversion)
        messages: list[str] = []
        relaxations: list[Relaxation] = []
        conflict: list[str] = []
        weights, solver, infeasible = self._try(x, p, messages)
        status = "optimal"
        if weights is None and infeasible:
            found = self._relaxed(x, p, messages)
            if found is not None:
                weights, solver, relaxations, conflict = found
                status = "relaxed"
        if weights is None:
            status, solver, weights = "failed", "none", p.current.copy()
        d = weights - p.benchmark
        variance = _variance(x, d)
        return Solution(
            weights=pd.Series(weights, list(p.names), name="weight"),
            status=status,
            solver=solver,
            objective=float(x.alpha @ d) - x.risk_aversion * variance,
            tracking_error=float(np.sqrt(variance)),
            turnover=float(np.abs(weights - p.current).sum()) / 2,
            exposures=pd.Series(x.exposures.T @ d, list(p.factors)),
            member_share=float(weights[x.members].sum()),
            relaxations=relaxations,
            conflict=conflict,
            counts=x.counts,
            seconds=time.perf_counter() - began,
            messages=messages,
        )

    # ------------------------------------------------------------------- one attempt
    def _run(self, programme: _Programme, messages: list[str]):
        """Give each solver's answer in turn, until the caller has what it needs."""
        for solver in self.solvers:
            try:
                answer = _CALLS[solver](programme)
            except (RuntimeError, ValueError, ArithmeticError) as error:
                messages.append(f"{solver}: {error}")
                continue
            yield solver, answer

    def _try(
        self, x: _Numbers, p: Problem, messages: list[str]
    ) -> tuple[np.ndarray | None, str, bool]:
        """Weights within the limits, the solver, and whether there are none."""
        programme = _Programme(x, p)
        if not len(programme.buys) and not len(programme.sells):
            weights = programme.base.copy()
            kept = max(_excess(x, p, weights).values()) <= TOLERANCE
            return (weights, "fixed", False) if kept else (None, "", True)
        for solver, answer in self._run(programme, messages):
            if answer.status == "infeasible":
                return None, "", True
            status = answer.status
            if status in ("optimal", "inaccurate") and answer.x is not None:
                weights = programme.weights(answer.x)
                weights = np.clip(weights, x.low, programme.high)
                worst = _excess(x, p, weights)
                if max(worst.values()) <= TOLERANCE:
                    return weights, solver, False
                name = max(worst, key=lambda g: worst[g])
                status += f", {name} missed by {worst[name]:.1e}"
            messages.append(f"{solver}: {status}")
        return None, "", False

    # -------------------------------------------------------------------- relaxation
    def _relaxed(
        self, x: _Numbers, p: Problem, messages: list[str]
    ) -> tuple[np.ndarray, str, list[Relaxation], list[str]] | None:
        groups: list[str] = []
        for group in self.relax_order:
            if not self._exists(group, x):
                continue
            groups.append(group)
            programme = _Programme(x, p, groups)
            good = ("optimal", "inaccurate")
            for _solver, answer in self._run(programme, messages):
                if answer.status in (*good, "infeasible"):
                    break
            else:
                continue
            if answer.status not in good or answer.x is None or answer.z is None:
                continue
            # At the smallest excess the set is a point; the portfolio needs room.
            for room in (1e-3, 1e-2):
                found = self._excesses(programme, answer.x, x, p, room)
                numbers = x.limited(found, list(p.names), list(p.factors))
                weights, solver, _ = self._try(numbers, p, messages)
                if weights is not None:
                    conflict = self._conflict(programme, answer.z, x, p)
                    return weights, solver, found, conflict
        return None

    @staticmethod
    def _exists(group: str, x: _Numbers) -> bool:
        """Whether the group limits anything in this problem."""
        if group in ("style", "industry"):
            return group in x.group
        if group == "weight":
            return bool((x.cap < x.high).any())
        return abs(getattr(x, group)) < _FREE

    @staticmethod
    def _excesses(
        programme: _Programme, values: np.ndarray, x: _Numbers, p: Problem, room: float
    ) -> list[Relaxation]:
        """Limits that gave way by more than rounding, with `room` on top."""
        out = []
        factors = list(p.factors)

        def add(group: str, name: str, limit: float, extra: float, sign: int = 1):
            if extra > 1e-7:
                applied = limit + sign * (extra * (1 + room) + TOLERANCE)
                out.append(Relaxation(group, name, float(limit), float(applied)))

        for group, at in programme.slack.items():
            value = values[at]
            if group in ("style", "industry"):
                for j, name in enumerate(factors):
                    if x.group[j] == group:
                        add(group, name, x.limit[j], value[j])
            elif group == "weight":
                for i, stock in enumerate(programme.capped.tolist()):
                    add(group, p.names[stock], x.cap[stock], value[i])
            elif group == "tracking_error":
                unit = max(x.tracking_error, 1e-6)
                add(group, group, x.tracking_error, value[0] * unit)
            else:
                sign = -1 if group in ("member_share", "invested") else 1
                add(group, group, getattr(x, group), value[0], sign)
        return out

    @staticmethod
    def _conflict(
        programme: _Programme, z: np.ndarray, x: _Numbers, p: Problem
    ) -> list[str]:
        """Name the constraints with a multiplier in the search for a relaxation."""
        rows = programme.matrices()[3]
        values = {name: np.abs(z[at]) for name, at in rows.items()}
        del values["exposure"]
        least = 1e-5 * max(v.max(initial=0.0) for v in values.values())
        out = [
            name.replace("_", " ")
            for name in ("invested", "turnover", "member_share", "tracking_error")
            if name in values and values[name].max(initial=0.0) > least
        ]
        for group in ("style", "industry"):
            of = [f for f, g in zip(p.factors, x.group, strict=True) if g == group]
            for side in ("high", "low"):
                hit = values[f"{group}_{side}"] > least
                out += [
                    f"{group} {name} ({side})"
                    for name, h in zip(of, hit, strict=True)
                    if h
                ]

        def stocks(words: str, at: Sequence[int] | np.ndarray) -> None:
            if len(at):
                shown = ", ".join(str(p.names[i]) for i in at[:5])
                more = f" and {len(at) - 5} more" if len(at) > 5 else ""
                out.append(f"{words} {shown}{more}")

        high = programme.buys[values["high"] > least]
        capped = x.cap < x.high
        stocks("weight cap", [*high[capped[high]]])
        if "weight" in values:
            stocks("weight cap", programme.capped[values["weight"] > least])
        stocks("weight cap", programme.sells[values["sell_low"] > least])
        held = programme.sells[values["low"] > least]
        stocks("no short sale", held[x.low[held] <= 0])
        # Fixed weights are constants of the problem and stand behind what is tight.
        barred = ~(p.can_buy & p.can_sell)
        moving = np.r_[programme.buys, programme.sells]
        still = np.setdiff1d(np.flatnonzero(barred), moving)
        stocks("cannot trade", still[programme.base[still] != p.benchmark[still]])
        return out
