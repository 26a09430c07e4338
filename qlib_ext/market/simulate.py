r"""The path of the embedded market, day by day, and the bars that it leaves.

Shape letters: t trading days, n stocks, i industries, k style factors.

Returns
-------
Log return of a stock on day t, before limits and rounding to the tick::

    r = beta * market + industry + sum_k exposure_k(t-1) * style_k + noise + alpha

Market, industry, style and noise are symmetric around zero given the past, so that
without alpha any two stocks are equally likely to beat each other: the expected rank of
every stock is the same, whatever is known about it. (In arithmetic terms a volatile
stock then has a slightly higher mean; the project measures ranks.)

Alpha
-----
Three unobserved states s (`day`, `minute`, `tick`), independent AR(1) processes of unit
variance for every stock. Each adds to the return of day t

    kappa * s(t-1) - kappa * phi / (1 - phi^2) * innovation(t)

The first term makes returns predictable: the expected log return from the close of t+1
to the close of t+11 is ``kappa * (phi + ... + phi^10) * s(t)``, the oracle. The second
is the price falling when its expected return rises (the discount-rate effect). It makes
returns serially uncorrelated, so that past returns say nothing about s: each state
is visible only through the footprint meant for its level of data.

- `day`: when s is high the stock opens lower for the same return (weak overnight,
  strong intraday), trades below its close (vwap low within the bar) and on more volume.
  Each trace is small beside that day's noise, and in proportion to the day's volatility
  or range; it takes a few weeks of bars to see the state.
- `minute` and `tick`: written by the intraday generators, which fill given day bars, so
  day bars are independent of them by construction.

Bars
----
Prices are whole cents, volumes whole lots of 100 shares, and amounts whole CNY (a lot
times a cent is one yuan). The amount always leaves room for at least one lot at each of
open, high, low and close, so trades that add up to the bar exist.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from tqdm import tqdm

from qlib_ext.market import turning
from qlib_ext.market.draws import ar1, draw, student
from qlib_ext.market.funds import attribute_returns
from qlib_ext.market.links import (
    LeadLag,
    Switches,
    fundamental_score,
    regime_chance,
    regime_premium,
    regimes,
)
from qlib_ext.market.statements import RATIOS, Statements, as_announced, make_statements

__all__ = [
    "ALPHAS",
    "HORIZON",
    "INDUSTRIES",
    "STYLES",
    "Alpha",
    "Bars",
    "Universe",
    "alpha_states",
    "make_bars",
    "make_universe",
    "simulate",
]

HORIZON = 10
"""Days of the oracle's return: close of t+1 to close of t+11."""

STYLES = ("size", "momentum", "volatility", "liquidity", "value")
_STYLE_STD = np.array([0.0035, 0.0030, 0.0035, 0.0025, 0.0025])  # a day

INDUSTRIES = (
    "Agriculture",
    "Chemicals",
    "Steel",
    "Metals",
    "Electronics",
    "Appliances",
    "Food",
    "Textiles",
    "Light industry",
    "Pharmaceuticals",
    "Utilities",
    "Transport",
    "Real estate",
    "Retail",
    "Services",
    "Materials",
    "Construction",
    "Electrical equipment",
    "Defence",
    "Computers",
    "Media",
    "Telecom",
    "Banks",
    "Brokers",
    "Cars",
    "Machinery",
    "Coal",
    "Oil",
)


@dataclass(frozen=True)
class Alpha:
    """One planted signal.

    Attributes
    ----------
    name : str
        Level of data that shows it.
    phi : float
        Daily persistence of the state.
    kappa : float
        Expected log return of the next day per unit of state.
    """

    name: str
    phi: float
    kappa: float

    @property
    def gain(self) -> float:
        """Expected log return, close t+1 to close t+11, per unit of state at t."""
        return self.kappa * sum(self.phi**j for j in range(1, HORIZON + 1))


def _alpha(name: str, phi: float, ten_day_std: float) -> Alpha:
    return Alpha(name, phi, ten_day_std / sum(phi**j for j in range(1, HORIZON + 1)))


# The 10-day std sets each RankIC at about 0.14 with the noise below.
ALPHAS = (
    _alpha("day", 0.93, 0.0110),
    _alpha("minute", 0.93, 0.0110),
    _alpha("tick", 0.90, 0.0110),
)


def alpha_states(
    seed: int, alpha: Alpha, t: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a state s and its innovations, each [t, n]; s has unit variance."""
    rng = draw(seed, "alpha", alpha.name)
    z = rng.standard_normal((t, n))
    innovation = np.sqrt(1 - alpha.phi**2) * z
    s = np.empty((t, n))
    s[0] = z[0]
    for day in range(1, t):
        s[day] = alpha.phi * s[day - 1] + innovation[day]
    innovation[0] = 0.0
    return s, innovation


@dataclass
class Universe:
    """What is fixed before the first price: codes, listings, industries, shares.

    Attributes
    ----------
    days : DatetimeIndex, shape (t,)
        Trading days.
    codes : list of str
        Sorted Qlib codes: SH60 and SZ00 main board, SZ30 and SH68 wide limits.
    wide : ndarray of bool, shape (n,)
        True where the price limit is 20 %, else 10 %.
    listed, delisted : ndarray of int, shape (n,)
        First trading slot, and the first slot without the stock (t: never).
    suspended : ndarray of bool, shape (t, n)
        Halted days.
    industry : ndarray of int, shape (t, n)
        Point-in-time industry code.
    price : ndarray of int, shape (n,)
        Price before the first day, cents.
    float_shares, total_shares : ndarray, shape (n,)
        Shares at listing.
    beta : ndarray, shape (n,)
        Market beta.
    """

    days: pd.DatetimeIndex
    codes: list[str]
    wide: np.ndarray
    listed: np.ndarray
    delisted: np.ndarray
    suspended: np.ndarray
    industry: np.ndarray
    price: np.ndarray
    float_shares: np.ndarray
    total_shares: np.ndarray
    beta: np.ndarray


_SECOND = {
    "SH600": "SH603",
    "SZ000": "SZ001",
    "SZ300": "SZ301",
    "SH688": "SH689",
    "SH601": "SH605",
    "SZ002": "SZ003",
}
_WIDE = ("300", "301", "688", "689")


def _codes(rng: np.random.Generator, n: int) -> list[str]:
    boards = np.array(["SH600", "SZ000", "SZ300", "SH688", "SH601", "SZ002"])
    weights = np.array([0.3, 0.15, 0.17, 0.05, 0.13, 0.2])
    codes = []
    per_board = rng.multinomial(n, weights)
    for board, count in zip(boards, per_board, strict=True):
        numbers = np.sort(rng.permutation(1000)[:count])
        codes += [f"{board}{i:03d}" for i in numbers]
        # a full board goes on under its second prefix
        codes += [f"{_SECOND[board]}{i:03d}" for i in range(count - len(numbers))]
    return sorted(codes)


def make_universe(seed: int, days: pd.DatetimeIndex, n: int) -> Universe:
    """Draw listings, delistings, suspensions, industries and shares."""
    t = len(days)
    rng = draw(seed, "universe")
    codes = _codes(rng, n)
    wide = np.array([c[2:5] in _WIDE for c in codes])

    listed = np.zeros(n, dtype=np.int64)
    new = rng.permutation(n)[: max(1, round(0.18 * n)) if n > 1 else 0]
    listed[new] = rng.integers(20, max(21, t - 80), len(new))
    delisted = np.full(n, t, dtype=np.int64)
    old = np.setdiff1d(np.arange(n), new)
    gone = rng.permutation(old)[: max(1, round(0.03 * n)) if n > 5 else 0]
    delisted[gone] = rng.integers(t // 3, t - 20, len(gone))

    suspended = np.zeros((t, n), dtype=bool)
    # short halts about once in five years, long ones (restructuring) for one in eight
    for i, j in zip(*np.nonzero(rng.random((t, n)) < 0.0008), strict=True):
        suspended[i : i + rng.integers(1, 11), j] = True
    halted = rng.permutation(n)[: max(1, n // 8)] if n > 2 else np.array([], dtype=int)
    for j in halted:
        begin = rng.integers(20, max(21, t - 60))
        suspended[begin : begin + rng.integers(40, 150), j] = True
    slots = np.arange(t)[:, None]
    # the first and the last day of a listing are trading days
    suspended[(slots == listed) | (slots == delisted - 1)] = False

    n_ind = int(np.clip(n // 10, 3, len(INDUSTRIES)))
    industry = np.repeat(rng.integers(0, n_ind, n)[None], t, axis=0).astype(np.int64)
    for j in rng.permutation(n)[: max(1, n // 25)]:
        industry[rng.integers(t // 5, t) :, j] = rng.integers(0, n_ind)

    price = np.rint(100 * np.exp(np.log(14) + 0.6 * rng.standard_normal(n)))
    total_cap = np.exp(np.log(1.1e10) + 1.0 * rng.standard_normal(n))
    total = np.round(total_cap / (price / 100), -4)
    free = np.round(total * np.clip(0.6 + 0.25 * rng.standard_normal(n), 0.2, 1.0), -2)
    free[new] = np.round(total[new] * 0.25, -2)
    beta = np.clip(1 + 0.25 * rng.standard_normal(n), 0.3, 1.8)
    return Universe(
        days,
        codes,
        wide,
        listed,
        delisted,
        suspended,
        industry,
        price.astype(np.int64),
        free,
        total,
        beta,
    )


@dataclass
class Bars:
    """The simulated market; arrays [t, n], NaN or 0 where `traded` is False.

    Attributes
    ----------
    universe : Universe
        Its `delisted` includes companies removed for a price below one yuan.
    traded : ndarray of bool
        Listed and not suspended.
    open, high, low, close, ref, up, down : ndarray of int64
        Raw prices, cents. `ref` is the exchange's reference (previous close after
        dividends and splits); `up` and `down` the limits, 0 on a first day.
    lots, amount : ndarray of int64
        Volume in lots of 100 shares; amount in CNY.
    factor : ndarray
        Adjustment factor, 1 at listing, never falling.
    float_shares, total_shares : ndarray
        Shares on that day.
    change : ndarray
        close / ref - 1.
    states : dict of str to ndarray
        The three unobserved states.
    oracle : dict of str to ndarray
        True expected log return, close t+1 to close t+11, by alpha.
    statements : Statements
        Quarterly reports.
    known : dict of str to ndarray
        What has been announced by each day, see `as_announced`.
    style_returns : ndarray, shape (t, k)
        Returns of the `STYLES`.
    regime : ndarray of int, shape (t,), or None
        Which graph's lead-lag counts, see `links`.
    """

    universe: Universe
    traded: np.ndarray
    open: np.ndarray
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    ref: np.ndarray
    up: np.ndarray
    down: np.ndarray
    lots: np.ndarray
    amount: np.ndarray
    factor: np.ndarray
    float_shares: np.ndarray
    total_shares: np.ndarray
    change: np.ndarray
    states: dict[str, np.ndarray]
    oracle: dict[str, np.ndarray]
    statements: Statements
    known: dict[str, np.ndarray]
    style_returns: np.ndarray = field(repr=False)
    regime: np.ndarray | None = field(default=None, repr=False)


def _corporate_actions(
    seed: int, u: Universe
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cash dividend yield, bonus ratio and unlocked float share, each [t, n]."""
    t, n = u.suspended.shape
    rng = draw(seed, "actions")
    cash, bonus, unlock = np.zeros((t, n)), np.zeros((t, n)), np.zeros((t, n))
    payer = rng.random(n) < 0.7
    yield_ = np.exp(np.log(0.015) + 0.6 * rng.standard_normal(n))
    years = u.days.year.to_numpy()
    for year in np.unique(years):
        # after the annual meeting: mid May to end of July
        season = np.flatnonzero((years == year) & np.isin(u.days.month, (6, 7)))
        slot = rng.choice(season, n)
        pays = payer & (rng.random(n) < 0.85)
        cash[slot[pays], np.flatnonzero(pays)] = (
            yield_[pays] * np.exp(0.3 * rng.standard_normal(n))[pays]
        )
        splits = rng.random(n) < 0.1
        ratio = rng.choice([0.2, 0.3, 0.5, 0.8, 1.0], n)
        bonus[slot[splits], np.flatnonzero(splits)] = ratio[splits]
        free = rng.random(n) < 0.12
        when = rng.choice(np.flatnonzero(years == year), n)
        share = 0.05 + 0.35 * rng.random((n,))
        unlock[when[free], np.flatnonzero(free)] = share[free]
    return cash, bonus, unlock


def simulate(
    seed: int,
    u: Universe,
    *,
    planted: bool,
    switches: Switches | None = None,
    progress: bool = False,
) -> Bars:
    """Run the market from its first to its last day.

    With ``planted=False`` every draw is the same, footprints included, and alpha is
    left out of the returns. `switches` add what `links` describes; each only adds draws
    of its own.
    """
    t, n = u.suspended.shape
    strength = 1.0 if planted else 0.0
    sw = switches or Switches()
    states, drift, oracle = {}, np.zeros((t, n)), {}
    for alpha in ALPHAS:
        s, innovation = alpha_states(seed, alpha, t, n)
        states[alpha.name] = s
        k, phi = alpha.kappa, alpha.phi
        term = k * s[:-1] - k * phi / (1 - phi**2) * innovation[1:]
        gain: float | np.ndarray = alpha.gain
        if sw.turning and alpha.name == "day":
            term *= turning.strength(t, sw.turning)[1:, None]
            gain = turning.gains(k, phi, t, sw.turning, HORIZON)[:, None]
        drift[1:] += strength * term
        oracle[alpha.name] = strength * gain * s

    rng = draw(seed, "returns")
    market_vol = 0.012 * np.exp(0.35 * ar1(rng, t, (), 0.985))
    market = market_vol * student(rng, (t,), 6)
    calm = np.sqrt(market_vol / 0.012)  # unrest spreads to every source of risk
    ind = 0.008 * calm[:, None] * student(rng, (t, len(INDUSTRIES)), 6)
    style = _STYLE_STD * calm[:, None] * student(rng, (t, len(STYLES)), 6)
    premium = np.zeros((t, len(STYLES)))
    if sw.style_alpha > 0:
        premium[:, STYLES.index("volatility")] -= strength * sw.style_alpha / HORIZON
    by_regime = strength * regime_premium(_STYLE_STD, STYLES)
    if sw.lead_lag > 0:
        premium += by_regime[regimes(seed, t)]
    style = style + premium
    base = np.log(0.0188) + 0.22 * rng.standard_normal(n) + 0.12 * u.wide
    log_vol = base + 0.38 * ar1(rng, t, (n,), 0.97) + 0.5 * np.log(calm)[:, None]
    z = student(rng, (t, n), 4)
    noise = np.exp(log_vol) * z
    day_vol = np.sqrt(np.exp(2 * log_vol) + 0.012**2 * calm[:, None] ** 2)

    # turnover: own level, slow swings, volatility and the size of today's news, and the
    # footprint of the day alpha
    rng = draw(seed, "turnover")
    surprise = np.log(np.abs(z) + 0.3)
    log_turn = (
        np.log(0.011)
        + 0.45 * rng.standard_normal(n)
        + 0.35 * ar1(rng, t, (n,), 0.97)
        + 0.25 * ar1(rng, t, (), 0.97)[:, None]
        + 0.8 * (log_vol - base)
        + 0.45 * surprise
        + 0.22 * rng.standard_normal((t, n))
        + 0.10 * states["day"]
    )
    cash, bonus, unlock = _corporate_actions(seed, u)
    st = make_statements(
        draw(seed, "statements"), u.days, u.listed, u.price / 100 * u.total_shares
    )
    known = as_announced(st, u.days)
    if sw.fundamental_alpha > 0:
        size = strength * sw.fundamental_alpha
        score = fundamental_score(known)
        drift[1:] += size / HORIZON * score[:-1]
        oracle["fundamental"] = size * score
    if sw.attribute_alpha > 0:
        size = strength * sw.attribute_alpha
        gain, oracle["attribute"] = attribute_returns(seed, t, n, size, HORIZON)
        drift += gain
    links = None
    if sw.lead_lag > 0:
        links = LeadLag(seed, t, n, strength * sw.lead_lag, HORIZON)
    exposures = np.zeros((t + 1, n, len(STYLES)), dtype=np.float32)

    out = {
        name: np.zeros((t, n), dtype=np.int64)
        for name in ("close", "ref", "up", "down")
    }
    traded = np.zeros((t, n), dtype=bool)
    factor = np.full((t, n), np.nan)
    free_t, total_t = np.full((t, n), np.nan), np.full((t, n), np.nan)
    target = np.zeros((t, n))  # the log return before limits
    path = np.zeros((t + 1, n))  # cumulative log return
    price, free, total = u.price.copy(), u.float_shares.copy(), u.total_shares.copy()
    f = np.ones(n)
    var = day_vol[0] ** 2 * np.ones(n)
    liquid = log_turn[0].copy()
    below = np.zeros(n, dtype=np.int64)
    delisted = u.delisted.copy()
    owed_cash, owed_bonus = np.zeros(n), np.zeros(n)
    num = np.where(u.wide, 12, 11)  # limits as tenths of the reference
    bar = tqdm(range(t), desc="market", unit="day", disable=None if progress else True)
    for d in bar:
        alive = (u.listed <= d) & (d < delisted)
        live = alive & ~u.suspended[d]
        first = live & (u.listed == d)
        # actions that fall on a halt wait for the next trading day
        due = alive & ~first
        owed_cash = np.where(due & (cash[d] > 0), cash[d], owed_cash)
        owed_bonus = np.where(due & (bonus[d] > 0), bonus[d], owed_bonus)
        pays = live & ((owed_cash > 0) | (owed_bonus > 0))
        ref = price.copy()
        if pays.any():
            paid = np.rint(price * owed_cash)
            new_ref = np.rint((price - paid) / (1 + owed_bonus)).astype(np.int64)
            pays &= new_ref >= 100
            f = np.where(pays, f * price / np.maximum(new_ref, 1), f)
            ref = np.where(pays, new_ref, ref)
            free = np.where(pays, np.round(free * (1 + owed_bonus), -2), free)
            total = np.where(pays, np.round(total * (1 + owed_bonus), -2), total)
            owed_cash, owed_bonus = (
                np.where(live, 0, owed_cash),
                np.where(live, 0, owed_bonus),
            )
        free = np.where(
            alive & (unlock[d] > 0),
            np.minimum(total, free + np.round(unlock[d] * total, -2)),
            free,
        )

        exposure = _exposures(
            d, live, u, path, free * price, var, liquid, total * price, known
        )
        exposures[d] = exposure
        if links is not None:
            day = max(d - 1, 0)
            indicators = _indicators(known, day, total * price)
            drift[d] += links.drift(d, z[d], live, alive, u.industry[day], indicators)
        target[d] = (
            u.beta * market[d]
            + ind[d, u.industry[d]]
            + exposure @ style[d]
            + noise[d]
            + drift[d]
        )
        up = np.where(first, 0, (ref * num + 5) // 10)
        down = np.where(first, 0, (ref * (20 - num) + 5) // 10)
        close = np.rint(ref * np.exp(target[d])).astype(np.int64)
        close = np.where(first, close, np.clip(close, down, up))
        close = np.maximum(close, 1)
        got = np.where(live, np.log(close / ref), 0.0)
        path[d + 1] = path[d] + got
        centred = got - (got[live].mean() if live.any() else 0.0)
        var = np.where(live, 0.97 * var + 0.03 * centred**2, var)
        liquid = np.where(live, 0.97 * liquid + 0.03 * log_turn[d], liquid)
        price = np.where(live, close, price)
        below = np.where(live, np.where(close < 100, below + 1, 0), below)
        # the exchange removes a company after 20 closes below one yuan
        delisted = np.where(
            alive & (below >= 20), np.minimum(delisted, d + 1), delisted
        )
        traded[d], factor[d], free_t[d], total_t[d] = live, f, free, total
        for name, value in (("close", close), ("ref", ref), ("up", up), ("down", down)):
            out[name][d] = np.where(live, value, 0)
    alive = (u.listed < t) & (t <= delisted)
    exposures[t] = _exposures(
        t, alive, u, path, free * price, var, liquid, total * price, known
    )
    if links is not None:
        oracle["lead_lag"] = links.oracle
    if sw.style_alpha > 0 or sw.lead_lag > 0:
        oracle["style"] = _style_oracle(exposures[1:], sw, strength, by_regime, links)
    universe = Universe(**{**u.__dict__, "delisted": delisted})
    bars = make_bars(
        seed, out, traded, target, day_vol, np.abs(z), states["day"], log_turn, free_t
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.where(traded, out["close"] / out["ref"] - 1, np.nan)
    return Bars(
        universe=universe,
        traded=traded,
        **out,
        **bars,
        factor=factor,
        float_shares=free_t,
        total_shares=total_t,
        change=change,
        states=states,
        oracle=oracle,
        statements=st,
        known=known,
        style_returns=style,
        regime=None if links is None else links.regime,
    )


def _indicators(
    known: dict[str, np.ndarray], day: int, total_cap: np.ndarray
) -> np.ndarray:
    """Announced indicators and valuation ratios of one day, [n, f]."""
    columns = [known[name][day] for name in RATIOS]
    for name in ("equity", "profit_ttm", "revenue_ttm", "cash_ttm"):
        columns.append(known[name][day] / total_cap)
    return np.stack(columns, axis=1)


def _style_oracle(
    exposures: np.ndarray,
    sw: Switches,
    strength: float,
    by_regime: np.ndarray,
    links: LeadLag | None,
) -> np.ndarray:
    """Return the style premia's part of the oracle, at today's exposures."""
    t = len(exposures)
    mean = np.zeros((t, len(STYLES)))
    mean[:, STYLES.index("volatility")] -= strength * sw.style_alpha
    if links is not None:
        for k in range(2, HORIZON + 2):
            same, other = regime_chance(k)
            chance = np.full((t, 3), other)
            chance[np.arange(t), links.regime] = same
            mean += chance @ by_regime
    return np.einsum("tnk,tk->tn", exposures, mean)


def _exposures(
    d: int,
    live: np.ndarray,
    u: Universe,
    path: np.ndarray,
    cap: np.ndarray,
    var: np.ndarray,
    liquid: np.ndarray,
    total_cap: np.ndarray,
    known: dict[str, np.ndarray],
) -> np.ndarray:
    """Style exposures [n, k] known at the close before day `d`, standardised."""
    age = d - u.listed
    past = max(d - 120, 0)
    momentum = np.where(age > 120, path[max(d - 5, 0)] - path[past], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(known["equity"][max(d - 1, 0)] / total_cap)
    raw = np.stack([np.log(cap), momentum, 0.5 * np.log(var), liquid, value], axis=1)
    raw = np.where(np.isfinite(raw), raw, np.nan)
    if live.sum() < 3:
        return np.zeros_like(raw)
    seen = raw[live]
    mean, std = np.nanmean(seen, axis=0), np.nanstd(seen, axis=0)
    z = (raw - mean) / np.where(std > 1e-9, std, 1.0)
    return np.nan_to_num(np.clip(z, -3, 3))


def make_bars(
    seed: int,
    path: dict[str, np.ndarray],
    traded: np.ndarray,
    target: np.ndarray,
    day_vol: np.ndarray,
    shock: np.ndarray,
    state: np.ndarray,
    log_turn: np.ndarray,
    free: np.ndarray,
) -> dict[str, np.ndarray]:
    """Draw open, high, low, lots and amount around given closes, each int64 [t, n].

    Parameters
    ----------
    seed : int
        The market's seed.
    path : dict
        ``close``, ``ref``, ``up``, ``down`` in cents.
    traded : ndarray of bool
        Days with a bar.
    target : ndarray
        Log return before limits: how hard the price pressed against a limit.
    day_vol, shock : ndarray
        Volatility of the day, and size of its news in standard deviations.
    state : ndarray
        State of the day alpha.
    log_turn : ndarray
        Log of the day's turnover.
    free : ndarray
        Float shares.
    """
    shape = traded.shape
    rng = draw(seed, "bars")
    n_open, n_vwap = rng.standard_normal(shape), rng.standard_normal(shape)
    u_high, u_low = 1 - rng.random(shape), 1 - rng.random(shape)
    n_range = rng.standard_normal(shape)
    close, ref = path["close"], np.maximum(path["ref"], 1)
    free_price = path["up"] == 0  # a first day has no limits
    up = np.where(free_price, np.iinfo(np.int32).max, path["up"])
    down = np.where(free_price, 1, path["down"])
    got = np.log(np.maximum(close, 1) / ref)

    gap = 0.3 * got + day_vol * (0.33 * n_open - 0.18 * state)
    open_ = np.clip(np.rint(ref * np.exp(gap)).astype(np.int64), down, up)
    at_limit = (close == up) | (close == down)
    limit_size = np.abs(np.where(close == up, np.log(up / ref), np.log(down / ref)))
    # far beyond the limit: one price from the auction to the close
    locked = at_limit & (np.abs(target) > 1.5 * limit_size)
    open_ = np.where(locked, close, open_)

    lo, hi = np.log(np.maximum(open_, 1)), np.log(np.maximum(close, 1))
    # extremes of a Brownian bridge from open to close
    spread = (0.62 * day_vol * (0.75 + 0.25 * shock) * np.exp(0.25 * n_range)) ** 2
    root = np.sqrt((hi - lo) ** 2 - 2 * spread * np.log(u_high))
    high = np.rint(np.exp((lo + hi + root) / 2)).astype(np.int64)
    root = np.sqrt((hi - lo) ** 2 - 2 * spread * np.log(u_low))
    low = np.rint(np.exp((lo + hi - root) / 2)).astype(np.int64)
    high = np.maximum(np.clip(high, down, up), np.maximum(open_, close))
    low = np.minimum(np.clip(low, down, up), np.minimum(open_, close))
    high, low = np.where(locked, close, high), np.where(locked, close, low)

    # few sellers at a limit-up price: thin volume, thinnest when it never opened
    log_turn = log_turn - np.where(locked, 1.6, np.where(at_limit, 0.2, 0.0))
    turn = np.minimum(np.exp(log_turn), 0.6)
    lots = np.maximum(np.rint(np.nan_to_num(turn * free) / 100).astype(np.int64), 200)

    middle = (open_ + high + low + close) / 4
    width = (high - low).astype(float)
    vwap = middle + width * (0.10 * n_vwap - 0.055 * state)
    vwap = np.clip(vwap, low + 0.08 * width, high - 0.08 * width)
    amount = np.rint(vwap * lots).astype(np.int64)
    # with 200 lots or more, 8 % of the range always leaves a lot at each of the four
    out = {"open": open_, "high": high, "low": low, "lots": lots, "amount": amount}
    return {name: np.where(traded, value, 0) for name, value in out.items()}
