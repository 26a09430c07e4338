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
sales variable, and an industry costs one number a stock. Each limit writes its own rows
of the cone form (`limits`, `programme`) and not a modelling language: compiling it with
cvxpy's parameters took 22 s for 800 stocks and made every industry column dense; tests
solve the same problems with cvxpy. Interior-point solvers (Clarabel) have no warm start
and need none.

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

`[gap]` What the reports leave open is decided here:

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from data_handlers.arguments import NamedArguments, NonNegative
from qlib_ext.portfolio.limits import RELAX_ORDER, Limit, Limits
from qlib_ext.portfolio.programme import TOLERANCE, Numbers, Problem, Programme
from qlib_ext.portfolio.risk_model import COUNTRY, INDUSTRY, DayRisk
from qlib_ext.portfolio.solvers import CALLS, SOLVERS, Answer

__all__ = ["Optimiser", "Solution", "make_problem"]

Missing = Literal["neutral", "exclude"]

_GOOD = ("optimal", "inaccurate")


# --------------------------------------------------------------------------- problem
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


# ----------------------------------------------------------------------------- solver
class Optimiser(NamedArguments):
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
        Groups that may give way, in this order; those of `Limits.more` too. One that is
        left out never does; an impossible problem then ends as "failed".
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
        risk_aversion: NonNegative = 0.0,
        missing: Missing = "neutral",
        relax_order: Sequence[str] = RELAX_ORDER,
        solvers: Sequence[str] = SOLVERS,
    ) -> None:
        self.limits = limits or Limits()
        groups = (*RELAX_ORDER, *(limit.group for limit in self.limits.more))
        for name, values, known in (
            ("relax_order", relax_order, groups),
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
        x = Numbers.of(p, list(self.limits.named), self.missing, self.risk_aversion)
        bound = [limit.bind(x) for limit in self.limits.kinds()]
        limits = [limit for limit in bound if limit is not None]
        messages: list[str] = []
        relaxations: list[Relaxation] = []
        conflict: list[str] = []
        weights, solver, infeasible = self._try(x, limits, messages)
        status = "optimal"
        if weights is None and infeasible:
            found = self._relaxed(x, limits, messages)
            if found is not None:
                weights, solver, relaxations, conflict = found
                status = "relaxed"
        if weights is None:
            status, solver, weights = "failed", "none", p.current.copy()
        d = weights - p.benchmark
        variance = x.variance(weights)
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

    def _run(
        self, programme: Programme, messages: list[str]
    ) -> Iterator[tuple[str, Answer]]:
        """Give each solver's answer in turn, until the caller has what it needs."""
        for solver in self.solvers:
            try:
                answer = CALLS[solver](programme)
            except (RuntimeError, ValueError, ArithmeticError) as error:
                messages.append(f"{solver}: {error}")
                continue
            yield solver, answer

    def _try(
        self, x: Numbers, limits: list[Limit], messages: list[str]
    ) -> tuple[np.ndarray | None, str, bool]:
        """Weights within the limits, the solver, and whether there are none."""
        programme = Programme(x, limits)
        if not len(programme.moving):
            weights = programme.base.copy()
            kept = max(programme.excess(weights).values()) <= TOLERANCE
            return (weights, "fixed", False) if kept else (None, "", True)
        for solver, answer in self._run(programme, messages):
            if answer.status == "infeasible":
                return None, "", True
            status = answer.status
            if status in _GOOD and answer.x is not None:
                weights = programme.weights(answer.x)
                weights = np.clip(weights, x.low, programme.high)
                worst = programme.excess(weights)
                if max(worst.values()) <= TOLERANCE:
                    return weights, solver, False
                name = max(worst, key=lambda g: worst[g])
                status += f", {name} missed by {worst[name]:.1e}"
            messages.append(f"{solver}: {status}")
        return None, "", False

    def _relaxed(
        self, x: Numbers, limits: list[Limit], messages: list[str]
    ) -> tuple[np.ndarray, str, list[Relaxation], list[str]] | None:
        """Let groups give way, one more at a time, until there is a portfolio."""
        groups = {limit.group: limit for limit in limits}
        relax: list[Limit] = []
        for group in self.relax_order:
            if group not in groups:
                continue
            relax.append(groups[group])
            programme = Programme(x, limits, relax)
            for _solver, answer in self._run(programme, messages):
                if answer.status in (*_GOOD, "infeasible"):
                    break
            else:
                continue
            if answer.status not in _GOOD or answer.x is None or answer.z is None:
                continue
            # At the smallest excess the set is a point; the portfolio needs room.
            for room in (1e-3, 1e-2):
                wider, found = _widened(programme, answer.x, room)
                weights, solver, _ = self._try(x, wider, messages)
                if weights is not None:
                    return weights, solver, found, programme.conflict(answer.z)
        return None


def _widened(
    programme: Programme, values: np.ndarray, room: float
) -> tuple[list[Limit], list[Relaxation]]:
    """Limits that gave way by more than rounding, with `room` on top."""
    limits, told = {limit.group: limit for limit in programme.limits}, []
    for limit in programme.relax:
        extra = values[programme.slack[limit.group]] * limit.unit()
        more = np.where(extra > 1e-7, extra * (1 + room) + TOLERANCE, 0.0)
        wider = limit.value + limit.sign * more
        limits[limit.group] = limit.bound(wider, limit.parts)
        told += [
            Relaxation(
                limit.group, limit.parts[int(i)], float(limit.value[i]), float(wider[i])
            )
            for i in np.flatnonzero(more)
        ]
    return list(limits.values()), told
