"""A rebalancing as arrays, and its cone form ``min x'Px/2 + q'x``, b - Ax in cones.

A `Problem` is what is asked; `Numbers` are its arrays once its rules are applied; a
`Limit` writes its own rows; a `Programme` puts the rows of all of them together.

Glossary: n stocks, k exposures, m parts of a limit (its factors or stocks), c columns
(variables) of the programme.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from scipy import sparse

__all__ = ["TOLERANCE", "Limit", "Numbers", "Problem", "Programme"]

TOLERANCE = 1e-6
"""By which a limit may be missed, in its own unit."""
_FIXED = 1e-12  # bounds closer than this leave no choice


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


# ----------------------------------------------------------------------------- numbers
@dataclass(frozen=True)
class Numbers:
    """A problem after its rules: nothing unknown is left.

    Attributes
    ----------
    problem : Problem
        What was asked; the attributes below stand in for its own.
    alpha : ndarray [n]
        In standard deviations of the day's scores; 0 where unknown.
    exposures : ndarray [n, k]
        0 where unknown.
    specific : ndarray [n]
    root : ndarray [k, k]
        R with RᵀR = covariance.
    low, high : ndarray [n]
        Bounds of the weights that never give way: short sales and trading bars.
    members : ndarray of bool [n]
    risk_aversion : float
    counts : dict of str to int
        See `Solution`.
    """

    problem: Problem
    alpha: np.ndarray
    exposures: np.ndarray
    specific: np.ndarray
    root: np.ndarray
    low: np.ndarray
    high: np.ndarray
    members: np.ndarray
    risk_aversion: float
    counts: dict[str, int]

    @classmethod
    def of(
        cls, p: Problem, named: Sequence[str], missing: str, risk_aversion: float
    ) -> Numbers:
        """Apply the rules of `Optimiser` to a problem.

        Parameters
        ----------
        p : Problem
        named : sequence of str
            Factors with a limit of their own; those unknown are counted.
        missing, risk_aversion
            As `Optimiser` takes them.

        Raises
        ------
        ValueError
            If no specific risk is known at all.
        """
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
        low = np.where(p.can_sell, 0.0, p.current)
        high = np.where(p.can_buy, 1.0, p.current)
        passive = ~scored
        if missing == "exclude":
            passive |= unknown.any(1)
        # Neither sold by this rule: what is held above may stay.
        most = np.maximum(p.benchmark, np.minimum(p.current, 1.0))
        high = np.where(passive & p.can_buy, most, high)
        return cls(
            problem=p,
            alpha=alpha,
            exposures=np.where(unknown, 0.0, x),
            specific=np.where(lost, np.nanmax(specific), specific),
            root=_root(p.covariance),
            low=low,
            high=np.maximum(high, low),
            members=p.benchmark > 0
            if p.members is None
            else np.asarray(p.members, bool),
            risk_aversion=risk_aversion,
            counts={
                "stocks": len(p.names),
                "without_score": int((~scored).sum()),
                "without_exposure": int(unknown.any(1).sum()),
                "without_specific_risk": int(lost.sum()),
                "barred": int((~(p.can_buy & p.can_sell)).sum()),
                "limits_left_out": len(set(named) - set(p.factors)),
            },
        )

    def variance(self, w: np.ndarray) -> float:
        """Annualised variance of the return of weights [n] over the benchmark."""
        d = w - self.problem.benchmark
        factor = self.root @ (self.exposures.T @ d)
        return float((factor**2).sum() + ((self.specific * d) ** 2).sum())


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with RᵀR = covariance; negative eigenvalues (rounding) count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T


# ------------------------------------------------------------------------------- limit
class Limit:
    """One kind of limit: its rows, its slack, its excess and its words.

    A new limit is a subclass with a `group`, and `bind`, `excess` and `rows`; give it
    to `Limits` in `more`. It gives way where its group stands in `relax_order`.

    Attributes
    ----------
    group : str
        Its name in `relax_order`, in the history and in the report.
    sign : int
        1: giving way raises the value; -1: lowers it.
    most : float
        An excess counts relative to the value, taken between 0.001 and this.
    value : ndarray [m]
        Limits of the parts, once bound.
    parts : sequence of str [m]
        What the parts are called: factors, stocks, or the group itself.
    """

    group: ClassVar[str] = ""
    sign: ClassVar[int] = 1
    most: ClassVar[float] = 1.0
    value: np.ndarray
    parts: Sequence[str]

    def bind(self, x: Numbers) -> Limit | None:
        """Return the limit of one problem (see `bound`); None if nothing is limited."""
        raise NotImplementedError

    def excess(self, x: Numbers, w: np.ndarray) -> Any:
        """By how much weights [n] miss each part [m]; 0 or below: kept."""
        raise NotImplementedError

    def rows(self, form: Programme, slack: sparse.sparray) -> None:
        """Add the rows to the programme.

        Parameters
        ----------
        form : Programme
        slack : sparse [m, c]
            Picks each part's excess; all zero while the limit does not give way.
        """
        raise NotImplementedError

    def bound(self, value: Any, parts: Sequence[str] = (), **more: Any) -> Any:
        """Return a copy with the value and parts of one problem, and other arrays."""
        out = copy.copy(self)
        value = np.atleast_1d(np.asarray(value, float))
        vars(out).update(value=value, parts=parts or [self.group], **more)
        return out

    def tighten(self, high: np.ndarray) -> np.ndarray:
        """Upper bounds of weights [n], where the limit is no more than such a bound."""
        return high

    def unit(self) -> Any:
        """Return what an excess of 1 in the rows means, in the limit's own unit."""
        return 1.0

    def cost(self) -> np.ndarray:
        """Cost [m] of an excess of 1 in the search for the smallest relaxation."""
        return 1 / np.clip(np.abs(self.value), 1e-3, self.most)

    def words(self, form: Programme, hit: dict[str, np.ndarray]) -> list[str]:
        """Name what is part of a conflict.

        Parameters
        ----------
        form : Programme
        hit : dict of str to ndarray of bool
            Rows with a multiplier, by name: the group and the side.
        """
        tight = any(hit[r].any() for r in form.rows_of(self))
        return [self.group.replace("_", " ")] if tight else []


# --------------------------------------------------------------------------- cone form
class Programme:
    """The cone form of one problem under its limits.

    Variables: purchases of stocks that may rise, sales of those that may fall, the
    exposure differences, then the excesses of the limits in `relax`. With such limits
    it is the search for the smallest relaxation; without, the portfolio problem.

    Parameters
    ----------
    x : Numbers
    limits : sequence of Limit
        Bound ones.
    relax : sequence of Limit
        Those of them that may give way.

    Attributes
    ----------
    buys, sells : ndarray
        Stocks of the purchases and of the sales.
    high, base : ndarray [n]
        Upper bounds of the weights, and the weights from which stocks move.
    columns : int
        c.
    slack : dict of str to ndarray
        Columns of each group's excesses.
    P, q
        Of the objective.
    """

    def __init__(
        self, x: Numbers, limits: Sequence[Limit], relax: Sequence[Limit] = ()
    ) -> None:
        self.x, self.limits, self.relax = x, tuple(limits), tuple(relax)
        high = x.high
        for limit in limits:
            if limit not in self.relax:
                high = np.maximum(limit.tighten(high), x.low)
        self.high = high
        current = x.problem.current
        self.base = base = np.where(high - x.low > _FIXED, current, x.low)
        self.buys = np.flatnonzero(high - base > _FIXED)
        self.sells = np.flatnonzero(base - x.low > _FIXED)
        self.moving = np.union1d(self.buys, self.sells)
        at = len(self.buys) + len(self.sells) + x.exposures.shape[1]
        self.slack: dict[str, np.ndarray] = {}
        for limit in self.relax:
            self.slack[limit.group] = np.arange(at, at + len(limit.value))
            at += len(limit.value)
        self.columns = at
        self._blocks: list[tuple[str, str, Any, np.ndarray]] = []
        self._bounds()
        self._rows: dict[str, list[str]] = {}
        for limit in self.limits:
            before = len(self._blocks)
            limit.rows(self, self._slack(limit))
            self._rows[limit.group] = [b[0] for b in self._blocks[before:]]
        for group, own in self.slack.items():
            self.add(f"{group}_slack", "nonneg", -self.eye[own], np.zeros(len(own)))
        self._objective()

    # ------------------------------------------------------------- what limits build on
    @cached_property
    def eye(self) -> sparse.csr_array:
        """Identity [c, c]: its rows pick variables."""
        return sparse.eye_array(self.columns, format="csr")

    @cached_property
    def difference(self) -> np.ndarray:
        """`base` minus benchmark [n]."""
        return self.base - self.x.problem.benchmark

    @property
    def _signs(self) -> np.ndarray:
        return np.r_[np.ones(len(self.buys)), -np.ones(len(self.sells))]

    def sum(self, values: Any, traded: bool = False) -> sparse.csr_array:
        """Row [1, c] of the sum of ``values * (w - base)`` over stocks.

        Parameters
        ----------
        values : ndarray [n] or float
        traded : bool, default False
            Of ``|w - base|`` instead.
        """
        values = np.broadcast_to(np.asarray(values, float), self.base.shape)
        values = values[np.r_[self.buys, self.sells]]
        values = values if traded else values * self._signs
        places = (np.zeros(len(values), int), np.arange(len(values)))
        return sparse.csr_array((values, places), shape=(1, self.columns))

    @cached_property
    def change(self) -> sparse.csr_array:
        """Rows [n, c] of ``w - base``."""
        stocks = np.r_[self.buys, self.sells]
        shape = (len(self.base), self.columns)
        return sparse.csr_array((self._signs, (stocks, np.arange(len(stocks)))), shape)

    def exposure(self, factors: Any) -> sparse.csr_array:
        """Rows of the exposure differences ``Xᵀd`` of factors, by their places."""
        first = len(self.buys) + len(self.sells)
        return self.eye[first + np.asarray(factors, int)]

    @cached_property
    def risk(self) -> tuple[sparse.csr_array, sparse.csr_array, np.ndarray]:
        """Risk of the difference, annualised: what its squares add up to the variance.

        Rows [k, c] of the factors; rows [moving, c] of single stocks' change, and
        their constants [n] at `base`.
        """
        x = self.x
        factor = sparse.csr_array(x.root) @ self.exposure(np.arange(len(x.root)))
        single = sparse.diags_array(x.specific[self.moving]) @ self.change[self.moving]
        return factor, single, x.specific * self.difference

    def add(self, name: str, cone: str, a: Any, b: Any) -> None:
        """Add rows: ``b - a x`` in a cone, "zero", "nonneg" or "soc" (second order)."""
        b = np.atleast_1d(np.asarray(b, float))
        self._blocks.append((name, cone, sparse.csr_array(a), b))

    def rows_of(self, limit: Limit) -> list[str]:
        """Names of the rows that a limit has added."""
        return self._rows[limit.group]

    def shown(self, words: str, stocks: Any) -> list[str]:
        """Words and the first five of some stocks; nothing if there are none."""
        names = [str(self.x.problem.names[i]) for i in stocks]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return [f"{words} {', '.join(names[:5])}{more}"] if names else []

    # ---------------------------------------------------------------------------- parts
    def _slack(self, limit: Limit) -> sparse.csr_array:
        if limit.group in self.slack:
            return self.eye[self.slack[limit.group]]
        return sparse.csr_array((len(limit.value), self.columns))

    def _bounds(self) -> None:
        """Definition of the exposure differences; bounds of purchases and sales."""
        x, base, eye = self.x, self.base, self.eye
        u, m, k = len(self.buys), len(self.sells), x.exposures.shape[1]
        load = x.exposures[np.r_[self.buys, self.sells]].T.copy()
        load[:, u:] *= -1
        both = [sparse.csr_array(load), -sparse.eye_array(k)]
        exposure = sparse.hstack(both, format="csr")
        exposure.resize((k, self.columns))
        self.add("exposure", "zero", exposure, -x.exposures.T @ self.difference)
        self.add("buy_low", "nonneg", -eye[:u], np.zeros(u))
        self.add("high", "nonneg", eye[:u], (self.high - base)[self.buys])
        # A cap below what is held forces a sale.
        forced = np.maximum(base - self.high, 0.0)[self.sells]
        self.add("sell_low", "nonneg", -eye[u : u + m], -forced)
        self.add("low", "nonneg", eye[u : u + m], (base - x.low)[self.sells])

    def _objective(self) -> None:
        x = self.x
        self.q = np.zeros(self.columns)
        self.P = sparse.csc_array((self.columns, self.columns))
        if self.relax:
            for limit in self.relax:
                self.q[self.slack[limit.group]] = limit.cost()
            return
        moved = len(self.buys) + len(self.sells)
        self.q[:moved] = -x.alpha[np.r_[self.buys, self.sells]] * self._signs
        if x.risk_aversion > 0:
            factor, single, still = self.risk
            factor, single = factor.tocsc(), single.tocsc()
            hessian = single.T @ single + factor.T @ factor
            self.P = sparse.triu(2 * x.risk_aversion * hessian, format="csc")
            self.q += 2 * x.risk_aversion * (single.T @ still[self.moving])

    # -------------------------------------------------------------------------- results
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

    def excess(self, w: np.ndarray) -> dict[str, float]:
        """By how much weights [n] miss the bounds and each limit; 0 or below: kept."""
        out = {"bounds": float(np.max([self.x.low - w, w - self.x.high]))}
        for limit in self.limits:
            out[limit.group] = float(np.max(limit.excess(self.x, w)))
        return out

    def conflict(self, multipliers: np.ndarray) -> list[str]:
        """Name the constraints with a multiplier in the search for a relaxation."""
        rows = self.matrices()[3]
        values = {name: np.abs(multipliers[at]) for name, at in rows.items()}
        del values["exposure"]
        least = 1e-5 * max(v.max(initial=0.0) for v in values.values())
        hit = {name: v > least for name, v in values.items()}
        # Those of the whole portfolio first.
        whole = sorted(self.limits, key=lambda x: list(x.parts) != [x.group])
        out = [words for limit in whole for words in limit.words(self, hit)]
        held = self.sells[hit["low"]]
        out += self.shown("no short sale", held[self.x.low[held] <= 0])
        # Fixed weights are constants of the problem and stand behind what is tight.
        p = self.x.problem
        still = np.setdiff1d(np.flatnonzero(~(p.can_buy & p.can_sell)), self.moving)
        out += self.shown("cannot trade", still[self.difference[still] != 0])
        return out
