r"""Switches of the embedded market beyond its three alphas, all off by default.

- **Style premium** (`style_alpha`): calm stocks earn more. The expected 10-day return
  falls by `style_alpha` per unit of volatility exposure, so a model of raw returns
  loads on that style, whose returns vary much more than they pay.
- **Lead-lag** (`lead_lag`): a stock follows its neighbours' news. Each stock has an
  exponentially fading memory of its own news; a stock's expected return is the mean
  memory of its neighbours on one of three graphs. A hidden regime (each lasts about 60
  days) decides which graph counts, and shows in the style returns: in the industry
  regime small companies do well, in the financial regime cheap ones, in the flow regime
  illiquid ones. The strength is the std of the expected 10-day return.

      industry    all members of the stock's industry
      financial   10 nearest by announced indicators and valuation
      flow        10 nearest by two slow traits of their order flow: how strongly buyers
                  press, and how much more so the large ones

- **Fundamental alpha** (`fundamental_alpha`): announced earnings growth and cash return
  on equity, in equal parts, carry an expected return that lasts until the next
  statement. The strength is the std of the expected 10-day return.
- **Order flow** (`order_flow`, implied by lead-lag): the traits above enter the ticks,
  and the store gets the daily flow table summed over all of them.

- **Turning** (`turning`): the day alpha turns into its opposite and back; see
  `qlib_ext.market.turning`.

As with the alphas, the price moves against a lead-lag when it arises, so that a
follower's own past returns do not show it.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree
from scipy.stats import rankdata

from data_handlers.arguments import check_arguments
from qlib_ext.market.draws import ar1, draw

__all__ = [
    "GRAPHS",
    "LeadLag",
    "Switches",
    "flow_traits",
    "fundamental_score",
    "graph_of_values",
    "industry_graph",
    "regime_chance",
    "regime_premium",
    "regimes",
]

GRAPHS = ("industry", "financial", "flow")
REGIME_STYLE = ("size", "value", "liquidity")
"""The style that shows each graph's regime."""

REGIME_SIGN = (-1.0, 1.0, -1.0)
REGIME_PREMIUM = 0.25
"""Mean return of that style in its regime, daily standard deviations; the other two
styles lose half of it, so that no style pays in the long run."""

MEMORY = 0.9
NEIGHBOURS = 10
_LEAVE = 1 / 60
_HOLD = 20  # days between two updates of the graphs
_KEPT = 0.92  # measured: what is left of a signal when neighbours change on the way
_Strength = Annotated[float, Ge(0), Le(0.1)]  # 0.01 is 1 % in ten days


@dataclass(frozen=True)
class Switches:
    """What a market has besides its three alphas.

    Attributes
    ----------
    style_alpha : float
        Expected 10-day log return per unit of (minus) volatility exposure; 0 to 0.1.
    lead_lag : float
        Std of the expected 10-day log return from neighbours' news; 0 to 0.1.
    fundamental_alpha : float
        Std of the expected 10-day log return from statements; 0 to 0.1.
    order_flow : bool
        Put flow traits into ticks, and a daily flow table into the store.
    attribute_alpha : float
        Std of the expected 10-day log return from what funds hold, see `funds`; 0 to
        0.1.
    turning : int
        Trading days in which the day alpha turns into its opposite and back; 0 never.
    """

    style_alpha: _Strength = 0.0
    lead_lag: _Strength = 0.0
    fundamental_alpha: _Strength = 0.0
    order_flow: bool = False
    attribute_alpha: _Strength = 0.0
    turning: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if self.lead_lag > 0:
            object.__setattr__(self, "order_flow", True)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for meta.json."""
        made = asdict(self)
        if not self.attribute_alpha:  # markets from before it say nothing of it
            del made["attribute_alpha"]
        if not self.turning:  # as it was before there was a choice
            del made["turning"]
        return made


def regimes(seed: int, t: int, purpose: str = "regime") -> np.ndarray:
    """Draw which of three, by default `GRAPHS`, counts on each day, [t]."""
    rng = draw(seed, purpose)
    leave = rng.random(t) < _LEAVE
    other = rng.integers(1, 3, t)
    out = np.empty(t, dtype=np.int64)
    now = int(rng.integers(0, 3))
    for d in range(t):
        if d and leave[d]:
            now = (now + int(other[d])) % 3
        out[d] = now
    return out


def regime_chance(steps: int) -> tuple[float, float]:
    """Probability that a regime holds `steps` days later, and of each other one."""
    fade = (1 - 1.5 * _LEAVE) ** steps
    return 1 / 3 + 2 / 3 * fade, 1 / 3 - 1 / 3 * fade


def regime_premium(style_std: np.ndarray, styles: tuple[str, ...]) -> np.ndarray:
    """Mean daily style returns [regime, style]."""
    out = np.zeros((3, len(styles)))
    for k in range(3):
        at = styles.index(REGIME_STYLE[k])
        size = REGIME_SIGN[k] * REGIME_PREMIUM * style_std[at]
        out[:, at] = -size / 2
        out[k, at] = size
    return out


def flow_traits(seed: int, t: int, n: int) -> np.ndarray:
    """Draw the two traits of order flow [t, n, 2]; half of one is gone in 350 days."""
    return ar1(draw(seed, "flow"), t, (n, 2), 0.998)


def industry_graph(code: np.ndarray, live: np.ndarray) -> csr_matrix:
    """Weights [n, n] of all other members, 1 / sqrt(count) each."""
    n = len(code)
    rows, cols = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for value in np.unique(code[live]):
        member = np.flatnonzero(live & (code == value))
        i, j = np.meshgrid(member, member, indexing="ij")
        off = i != j
        rows.append(i[off])
        cols.append(j[off])
    return _weights(np.concatenate(rows), np.concatenate(cols), n)


def graph_of_values(x: np.ndarray, live: np.ndarray) -> csr_matrix:
    """Weights [n, n] of the nearest stocks in x [n, f], symmetric.

    Values are standardised over the day's stocks and clipped at 3; unknown ones count
    as the mean.
    """
    row = np.flatnonzero(live & np.isfinite(x).any(axis=1))
    if len(row) < 3:
        return csr_matrix((len(x), len(x)))
    known = x[row]
    with np.errstate(invalid="ignore"):
        mean, std = np.nanmean(known, axis=0), np.nanstd(known, axis=0)
    z = np.nan_to_num((known - mean) / np.where(std > 0, std, 1.0))
    z = np.clip(z, -3, 3)
    k = min(NEIGHBOURS + 1, len(row))
    # Away from zero: where torch flushes subnormal floats, the tree's step to the next
    # float above 0 stays at 0 and never ends.
    z += 4.0
    near = cKDTree(z).query(z, k)[1]
    i = np.repeat(np.arange(len(row)), k)
    j = near.ravel()
    off = i != j
    i, j = row[i[off]], row[j[off]]
    return _weights(np.concatenate([i, j]), np.concatenate([j, i]), len(x))


class LeadLag:
    """News, graphs and expected returns of the lead-lag, day by day.

    Parameters
    ----------
    seed, t, n : int
        The market's seed, days and stocks.
    strength : float
        Std of the expected 10-day return; 0 for none.
    horizon : int
        Days of the oracle's return.

    Attributes
    ----------
    regime : ndarray of int, shape (t,)
        Which of `GRAPHS` counts.
    oracle : ndarray, shape (t, n)
        Expected log return, close t+1 to close t+11.
    """

    def __init__(
        self, seed: int, t: int, n: int, strength: float, horizon: int
    ) -> None:
        self.regime = regimes(seed, t)
        self.traits = flow_traits(seed, t, n)
        self.oracle = np.zeros((t, n))
        steps = np.arange(1, horizon + 1)
        # what a unit of signal on a graph gives over the horizon, by whether the graph
        # counts today
        chance = np.array([regime_chance(int(k) + 1) for k in steps])
        self._gain = MEMORY**steps @ chance
        size = np.sqrt(self._gain[0] ** 2 + 2 * self._gain[1] ** 2)
        self._kappa = strength / (size * _KEPT)
        self._gain *= self._kappa * _KEPT
        self._memory = np.zeros(n)
        self._signal = np.zeros((len(GRAPHS), n))
        self._graphs: list[csr_matrix] = []

    def drift(
        self,
        d: int,
        news: np.ndarray,
        live: np.ndarray,
        listed: np.ndarray,
        industry: np.ndarray,
        indicators: np.ndarray,
    ) -> np.ndarray:
        """Return day d's part of the log return [n], and take its news in.

        Parameters
        ----------
        d : int
            Day, called once each in order.
        news : ndarray, shape (n,)
            The day's own news in standard deviations.
        live : ndarray of bool, shape (n,)
            Stocks that trade: only they have news.
        listed : ndarray of bool, shape (n,)
            Stocks of the graphs.
        industry : ndarray, shape (n,)
            Industry codes.
        indicators : ndarray, shape (n, f)
            Announced indicators and valuation before the day.
        """
        now = self.regime[d]
        if d % _HOLD == 0:
            self._graphs = [
                industry_graph(industry, listed),
                graph_of_values(indicators, listed),
                graph_of_values(self.traits[max(d - 1, 0)], listed),
            ]
        fade = 1 - MEMORY**2
        fresh = np.sqrt(fade) * np.where(live, np.clip(news, -4, 4), 0.0)
        out = self._kappa * (
            self._signal[now] - MEMORY / fade * (self._graphs[now] @ fresh)
        )
        self._memory = MEMORY * self._memory + fresh
        self._signal = np.stack([w @ self._memory for w in self._graphs])
        by_graph = np.where(np.arange(len(GRAPHS)) == now, *self._gain)
        self.oracle[d] = by_graph @ self._signal
        return out


def _weights(i: np.ndarray, j: np.ndarray, n: int) -> csr_matrix:
    """Scale unit edges so that a sum over independent unit news has variance 1."""
    w = csr_matrix((np.ones(len(i)), (i, j)), shape=(n, n))
    w.data[:] = 1.0
    degree = np.maximum(np.diff(w.indptr), 1)
    w.data /= np.repeat(np.sqrt(degree), np.diff(w.indptr))
    return w


def fundamental_score(known: dict[str, np.ndarray]) -> np.ndarray:
    """Score announced statements, [t, n]: unit variance each day, 0 where unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        cash = known["cash_ttm"] / known["equity"]
    total = np.zeros_like(cash)
    for x in (known["earnings_growth"], cash):
        rank = rankdata(x, axis=1, nan_policy="omit")
        count = np.isfinite(x).sum(axis=1, keepdims=True)
        # ranks as a uniform of unit variance
        z = ((rank - 0.5) / np.maximum(count, 1) - 0.5) * np.sqrt(12)
        total += np.nan_to_num(z)
    return total / np.sqrt(2)
