"""Evaluation figures as pure functions of panels, one for trainer and records.

Glossary of shapes: t days; n instruments; k factors; g groups (layers); h horizon in
days. A panel is ``[t, n]``: one row a day, one column an instrument, NaN where unknown.
Functions pool one day's cross-section at a time unless they say otherwise, so no value
of one day can depend on another day.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data_handlers.arguments import Count, Whole, checked
from qlib_ext import kernels

__all__ = [
    "DAYS_PER_YEAR",
    "LayerBacktest",
    "Performance",
    "Summary",
    "assign_layers",
    "block_bootstrap",
    "cs_correlation",
    "cs_rank",
    "forward_fill",
    "ic",
    "lagged_rank_ic",
    "latest_periods",
    "layer_backtest",
    "layer_means",
    "max_drawdown",
    "monotonicity",
    "month_ends",
    "newey_west_se",
    "non_overlapping",
    "over_starts",
    "pair_correlations",
    "performance",
    "portfolio_backtest",
    "rank_ic",
    "rank_mae",
    "summarise",
    "week_ends",
]

DAYS_PER_YEAR = 252

# Elements an accelerator works on at once: enough to fill it.
_BLOCK = 1 << 24


def cs_rank(x: Tensor) -> Tensor:
    """Rank each row, 1 for the smallest; ties share the average of their ranks.

    Pools one row (one day's cross-section). NaN and infinite values get NaN and do not
    count. Equals ``scipy.stats.rankdata(row[finite], method="average")``.

    Parameters
    ----------
    x : Tensor [..., n]
        Values of any real type, on any device.

    Returns
    -------
    Tensor [..., n]
        Ranks; float64 where `x` is float64, else float32.

    Examples
    --------
    >>> cs_rank(torch.tensor([[0.3, float("nan"), 0.1, 0.3]]))
    tensor([[2.5000,    nan, 1.0000, 2.5000]])
    """
    rows = _as_rows(_floating(x.detach()))
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if _compiled(rows):
        kernels.rank_rows(*_arrays(rows), out.numpy())  # type: ignore[call-arg]
    else:
        for part in _blocks(rows):
            block = rows[part]
            finite = torch.isfinite(block)
            ranks, _ = _rank_rows(torch.where(finite, block, torch.inf))
            out[part] = ranks.masked_fill_(~finite, torch.nan)
    return out.reshape(x.shape)


def ic(score: Tensor, label: Tensor, min_count: int = 2) -> Tensor:
    """Pearson correlation of score and label, one a day.

    Pools one day. A pair counts where both values are finite. Computed in float64.

    Parameters
    ----------
    score, label : Tensor [..., n]
        Broadcast against each other, so k factors ``[k, t, n]`` meet one label
        ``[t, n]``.
    min_count : int, default 2
        Fewest pairs, in instruments per day, for a day to count.

    Returns
    -------
    Tensor [...]
        float64; NaN on days with fewer than `min_count` pairs or without variance in
        either.

    Raises
    ------
    ValueError
        If `min_count` is below 2 or the shapes do not broadcast.
    """
    return _correlate(score, label, min_count, ranked=False)


def rank_ic(score: Tensor, label: Tensor, min_count: int = 2) -> Tensor:
    """Spearman correlation of score and label, one a day (RankIC).

    Pools one day. A pair counts where both values are finite and ranks are taken among
    the pairs that count, ties sharing their average rank.

    Takes, returns and raises what `ic` does.

    Examples
    --------
    >>> score = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> rank_ic(score, torch.tensor([[0.1, 0.2, 0.4, 0.3]]))
    tensor([0.8000], dtype=torch.float64)
    """
    return _correlate(score, label, min_count, ranked=True)


def rank_mae(score: Tensor, label: Tensor, min_count: int = 2) -> Tensor:
    """e^(-RankMAE), one a day: closeness of the ranks of score and label.

    RankMAE is the mean absolute difference of the day's ranks of score and label, each
    standardised to mean 0 and standard deviation 1. Without information it is 0.315
    (2 / sqrt(3) apart), for equal orders 1.

    Parameters
    ----------
    score, label : Tensor [..., n]
    min_count : int, default 2
        Fewest pairs, in instruments per day, for a day to count.

    Returns
    -------
    Tensor [...]
        float64; NaN on days with fewer pairs or without variance in either.

    Examples
    --------
    >>> rank_mae(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.2, 0.1]]))
    tensor([0.1353], dtype=torch.float64)
    """
    score, label = torch.broadcast_tensors(score, label)
    pair = torch.isfinite(score) & torch.isfinite(label)
    ranks = []
    for x in (score, label):
        rank = cs_rank(torch.where(pair, x.double(), torch.nan))
        rank = rank - rank.nanmean(-1, keepdim=True)
        scale = rank.square().nanmean(-1, keepdim=True).sqrt()
        ranks.append(rank / torch.where(scale > 0, scale, torch.nan))
    out = torch.exp(-(ranks[0] - ranks[1]).abs().nanmean(-1))
    return torch.where(pair.sum(-1) >= min_count, out, torch.nan)


# ---------------------------------------------------------------- series of one figure


@dataclass(frozen=True)
class Summary:
    """A series of daily correlations in a few figures; NaN days are left out.

    Attributes
    ----------
    count : int
        Days that count.
    mean, std : float
        Mean, and standard deviation with count - 1 in the denominator.
    ir : float
        mean / std, not annualised.
    positive : float
        Fraction of days above zero.
    """

    count: int
    mean: float
    std: float
    ir: float
    positive: float

    def row(self) -> dict[str, float]:
        """Give the cells of a table of RankICs."""
        return {
            "rank_ic": self.mean,
            "ic_ir": self.ir,
            "positive": self.positive,
            "dates": self.count,
        }


def summarise(series: Tensor) -> Summary:
    """Summarise ``[t]`` correlations; every figure is NaN where it is undefined."""
    x = series[torch.isfinite(series)].double()
    nan = float("nan")
    mean = float(x.mean()) if len(x) else nan
    std = float(x.std()) if len(x) > 1 else nan
    return Summary(
        count=len(x),
        mean=mean,
        std=std,
        ir=mean / std if std > 0 else nan,
        positive=float((x > 0).double().mean()) if len(x) else nan,
    )


@checked
def newey_west_se(series: Tensor, lags: Whole) -> float:
    """Estimate the standard error of an autocorrelated series' mean (HAC).

    Parameters
    ----------
    series : Tensor [t]
        Values in time order. NaN is left out and its neighbours count as adjacent.
    lags : int
        Autocovariances used, in days. Forward returns over h days that start daily
        overlap, so at least h - 1.

    Returns
    -------
    float
        Bartlett weights, no correction for small samples; NaN for fewer than two
        values.

    Raises
    ------
    ValueError
        If `lags` is negative.

    References
    ----------
    Newey & West (1987), A simple, positive semi-definite, heteroskedasticity and
    autocorrelation consistent covariance matrix, Econometrica 55(3), equation 5.
    """
    x = series[torch.isfinite(series)].double()
    if len(x) < 2:
        return float("nan")
    x = x - x.mean()
    variance = x @ x
    for lag in range(1, min(lags, len(x) - 1) + 1):
        variance = variance + 2 * (1 - lag / (lags + 1)) * (x[lag:] @ x[:-lag])
    return float(variance.clamp(min=0).sqrt() / len(x))


@checked
def non_overlapping(series: Tensor, horizon: Count, offset: Whole = 0) -> Tensor:
    """Positions of every `horizon`-th day from the first day with a finite value.

    Parameters
    ----------
    series : Tensor [t]
        One value a trading day.
    horizon : int
        Days between two positions.
    offset : int, default 0
        Days to start after the first finite value.

    Returns
    -------
    Tensor [m]
        int64 positions; empty where no value is finite.

    Raises
    ------
    ValueError
        If `horizon` is below 1 or `offset` is negative.
    """
    finite = torch.isfinite(series).nonzero().flatten()
    if not len(finite):
        return finite
    first, last = int(finite[0]) + offset, int(finite[-1]) + 1
    return torch.arange(first, max(first, last), horizon, device=series.device)


def over_starts(
    series: Tensor, starts: Sequence[Tensor]
) -> tuple[Summary, list[Summary]]:
    """Summarise a series on each of several sets of non-overlapping days.

    Which day the first set begins on is arbitrary; the mean over all starts is not.

    Parameters
    ----------
    series : Tensor [t]
    starts : sequence of Tensor [m]
        Positions, one set a start: `non_overlapping` at each offset.

    Returns
    -------
    mean : Summary
        Mean over the starts of each figure, those undefined left out; `count` rounded.
    each : list of Summary
        Of the starts that have a day.
    """
    each = [x for x in (summarise(series[at]) for at in starts) if x.count]
    if not each:
        return summarise(series[:0]), []
    means = pd.DataFrame([asdict(x) for x in each]).mean()
    mean = {str(k): float(v) for k, v in means.items()}
    count = round(mean.pop("count"))
    return Summary(count=count, **mean), each  # type: ignore[arg-type]


def week_ends(days: pd.DatetimeIndex) -> Tensor:
    """Positions of the last trading day of each calendar week (Monday to Sunday)."""
    week = days.to_period("W").asi8
    return torch.from_numpy(np.flatnonzero(np.append(week[1:] != week[:-1], True)))


def month_ends(days: pd.DatetimeIndex) -> Tensor:
    """Positions of the last trading day of each calendar month."""
    month = days.to_period("M").asi8
    return torch.from_numpy(np.flatnonzero(np.append(month[1:] != month[:-1], True)))


def latest_periods(days: pd.DatetimeIndex) -> dict[str, np.ndarray]:
    """Days of the week, month and year that the last day lies in, up to that day.

    Parameters
    ----------
    days : DatetimeIndex [t]
        Trading days in order.

    Returns
    -------
    dict of str to bool array [t]
        ``last week`` (Monday to Sunday), ``last month``, ``year to date``.

    Examples
    --------
    >>> days = pd.DatetimeIndex(["2019-12-31", "2020-01-02", "2020-01-06"])
    >>> {k: v.tolist() for k, v in latest_periods(days).items()}["last month"]
    [False, True, True]
    """
    names = {"last week": "W", "last month": "M", "year to date": "Y"}
    each = {name: days.to_period(unit) for name, unit in names.items()}
    return {
        name: np.asarray(period == period[-1]) if len(days) else np.zeros(0, bool)
        for name, period in each.items()
    }


def lagged_rank_ic(
    score: Tensor, label: Tensor, lags: tuple[int, ...], min_count: int = 2
) -> Tensor:
    """RankIC of the score of `lag` days earlier, for each lag (decay).

    Parameters
    ----------
    score, label : Tensor [t, n]
        Rows are consecutive trading days.
    lags : tuple of int
        Days of delay, 0 or more.
    min_count : int, default 2
        As in `rank_ic`.

    Returns
    -------
    Tensor [len(lags), t]
        float64; row j, day t is RankIC of ``score[t - lags[j]]`` and ``label[t]``,
        NaN where that day lies before the first.

    Raises
    ------
    ValueError
        If a lag is negative.
    """
    if any(lag < 0 for lag in lags):
        raise ValueError(f"`lags` must not be negative, got {lags}.")
    out = label.new_full((len(lags), len(label)), torch.nan, dtype=torch.float64)
    for row, lag in zip(out, lags, strict=True):
        if lag < len(label):
            row[lag:] = rank_ic(score[: len(score) - lag], label[lag:], min_count)
    return out


def cs_correlation(x: Tensor, ranked: bool = False) -> tuple[Tensor, Tensor]:
    """Correlations between factors, averaged over days.

    Pools one day at a time. An instrument counts on a day where all k factors are
    finite. A day on which a factor has no variance is left out for that factor.

    Parameters
    ----------
    x : Tensor [k, t, n]
        Factors.
    ranked : bool, default False
        Spearman rather than Pearson.

    Returns
    -------
    mean : Tensor [k, k]
        Mean over days of the correlation, float64; NaN where no day counts.
    mean_abs : Tensor [k, k]
        Mean over days of its absolute value.
    """
    k, t, _ = x.shape
    total = x.new_zeros(2, k, k, dtype=torch.float64)
    days = torch.zeros_like(total[0])
    for day in range(t):
        block = x[:, day]
        block = block[:, torch.isfinite(block).all(0)]
        if block.shape[1] < 2:
            continue
        block = cs_rank(block).double() if ranked else block.double()
        block = block - block[:, :1]
        block = block - block.mean(1, keepdim=True)
        norm = block.norm(dim=1, keepdim=True)
        unit = torch.where(norm > 0, block / norm, torch.nan)
        corr = (unit @ unit.T).clamp(-1.0, 1.0)
        known = torch.isfinite(corr)
        corr = torch.where(known, corr, 0.0)
        total += torch.stack([corr, corr.abs()])
        days += known
    mean, mean_abs = torch.where(days > 0, total / days, torch.nan)
    return mean, mean_abs


def pair_correlations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson and Spearman correlations between factors, averaged over days.

    Unlike `cs_correlation`, each pair uses every instrument that has both of its
    values, so one sparse factor does not thin out the others.

    Parameters
    ----------
    x : Tensor [k, t, n]
        Factors.

    Returns
    -------
    pearson, spearman : Tensor [k, k]
        float64; NaN where no day counts.
    """
    k = len(x)
    out = x.new_full((2, k, k), torch.nan, dtype=torch.float64)
    for i in range(k):
        for j in range(i, k):
            for matrix, daily in zip(
                out, (ic(x[i], x[j]), rank_ic(x[i], x[j])), strict=True
            ):
                matrix[i, j] = matrix[j, i] = daily.nanmean()
    return out[0], out[1]


@checked
def block_bootstrap(
    series: Tensor, block: Count, draws: Count = 2000, seed: int = 0
) -> Tensor:
    """Draw means of a series from resampled blocks of consecutive days.

    Circular moving blocks: every day is drawn equally often. Applied to the daily
    difference of two models it is paired.

    Parameters
    ----------
    series : Tensor [t]
        Values in time order; NaN is left out.
    block : int
        Days in a block, at least as long as neighbouring values depend on each other:
        twice the label's horizon for daily RankIC.
    draws : int, default 2000
    seed : int, default 0

    Returns
    -------
    Tensor [draws]
        float64 means; empty if `series` has no value.

    Raises
    ------
    ValueError
        If `block` or `draws` is below 1.

    References
    ----------
    Politis & Romano (1992), A circular block-resampling procedure for stationary data.
    """
    x = series[torch.isfinite(series)].double().cpu()
    if not len(x):
        return x
    block = min(block, len(x))
    starts = torch.randint(
        len(x),
        (draws, -(-len(x) // block)),
        generator=torch.Generator().manual_seed(seed),
    )
    total = torch.cat([x.new_zeros(1), torch.cat([x, x]).cumsum(0)])
    sums = total[starts + block] - total[starts]
    # The last block is cut so that every draw has as many days as the series.
    spare = starts.shape[1] * block - len(x)
    if spare:
        last = starts[:, -1]
        sums[:, -1] = total[last + block - spare] - total[last]
    return sums.sum(1) / len(x)


# ---------------------------------------------------------------- layers


@checked
def assign_layers(score: Tensor, n_layers: Count) -> Tensor:
    """Group each day's instruments by score, 0 the lowest.

    The instrument of average rank r among m goes to group floor((r - 1) * g / m), so
    groups differ by at most one member and ties stay together.

    Parameters
    ----------
    score : Tensor [..., n]
        NaN and infinite scores belong to no group.
    n_layers : int
        Number of groups g.

    Returns
    -------
    Tensor [..., n]
        int64 group, -1 for none.

    Raises
    ------
    ValueError
        If `n_layers` is below 1.
    """
    # float64: the product of a float32 rank and n_layers may round across a border.
    rank = cs_rank(score.double())
    finite = torch.isfinite(rank)
    count = finite.sum(-1, keepdim=True).clamp(min=1)
    group = ((torch.where(finite, rank, 1.0) - 1) * n_layers / count).floor().long()
    return torch.where(finite, group, -1)


def layer_means(score: Tensor, label: Tensor, n_layers: int) -> Tensor:
    """Mean label of each group of `assign_layers` and of the pool, one row a day.

    Grouping looks at the score alone; a stock without a label then counts for nothing.

    Parameters
    ----------
    score, label : Tensor [t, n]
    n_layers : int
        Number of groups g.

    Returns
    -------
    Tensor [t, g + 1]
        float64, the pool last; NaN for a group without a label.
    """
    layers = assign_layers(score, n_layers)
    label = label.double()
    groups = [layers == g for g in range(n_layers)] + [layers >= 0]
    return torch.stack(
        [torch.where(group, label, torch.nan).nanmean(-1) for group in groups], -1
    )


@dataclass(frozen=True)
class LayerBacktest:
    """Daily returns and turnover of g equal-weight groups and of their pool.

    Attributes
    ----------
    returns : Tensor [t, g + 1]
        Arithmetic return of each day, close to close, after costs if any; the last
        column is the pool, every scored instrument at equal weight. NaN up to the
        first fill, and for a group of no member from its fill to the next.
    turnover : Tensor [w, g + 1]
        One-sided turnover at each fill, half the sum of absolute weight changes, as a
        fraction; the first fill, which only buys, is NaN.
    fills : Tensor [w]
        Days of the fills.
    blocked : Tensor [w, g + 1]
        Weight that should have traded and could not.
    """

    returns: Tensor
    turnover: Tensor
    fills: Tensor
    blocked: Tensor


def layer_backtest(
    score: Tensor,
    close: Tensor,
    signal_days: Tensor,
    n_layers: int,
    *,
    fill_lag: int = 1,
    buyable: Tensor | None = None,
    sellable: Tensor | None = None,
    buy_cost: float = 0.0,
    sell_cost: float = 0.0,
) -> LayerBacktest:
    """Hold the groups of `assign_layers` between rebalancing days and let them drift.

    Orders come from the score of a signal day and fill at the close `fill_lag` days
    later. A day without close is a suspension: the position is held at its last price
    and cannot be traded. Weights that cannot be traded as wished stay, the rest of the
    group shares what is left equally. A position whose price never comes back within
    `close` (a delisting, or the end of the data) is closed at the last price at the
    next fill; this uses the future in the accounting only, never to choose.

    Parameters
    ----------
    score : Tensor [t, n]
        NaN: not in the pool that day.
    close : Tensor [t, n]
        Adjusted closing price, NaN on suspended days.
    signal_days : Tensor [w]
        Ascending positions of the days whose scores are traded; those whose fill
        would come after the last day are ignored.
    n_layers : int
        Number of groups g.
    fill_lag : int, default 1
        Trading days from signal to fill.
    buyable, sellable : bool Tensor [t, n], optional
        Whether the instrument can be bought (sold) at that day's close. Default: where
        it has a close.
    buy_cost, sell_cost : float, default 0
        Fraction of the amount traded. Counts in the return of the day after the fill.

    Raises
    ------
    ValueError
        If shapes disagree, `n_layers` or `fill_lag` is below 1, or a cost is not in
        [0, 1).
    """
    if score.shape != close.shape:
        raise ValueError(
            "`score` and `close` must have the same shape, got "
            f"{tuple(score.shape)} and {tuple(close.shape)}."
        )
    if fill_lag < 1:
        raise ValueError(
            f"`fill_lag` must be at least 1 day, got {fill_lag}: a score is known at "
            "the close, too late to trade at that close."
        )
    signal_days = signal_days[signal_days + fill_lag < len(close)]
    layers = assign_layers(score[signal_days], n_layers)
    groups = torch.arange(n_layers, device=close.device).unsqueeze(1)
    members = [
        torch.cat([row == groups, (row >= 0).unsqueeze(0)]) for row in layers.unbind()
    ]
    fills = signal_days + fill_lag
    test = portfolio_backtest(
        members,
        close,
        fills,
        n_layers + 1,
        buyable=buyable,
        sellable=sellable,
        buy_cost=buy_cost,
        sell_cost=sell_cost,
    )
    # A group without a member (equal scores, few stocks) is none, not one in cash.
    ends = [*fills.tolist(), len(close)]
    for k, wanted in enumerate(members):
        empty = ~wanted.any(-1)
        test.returns[ends[k] + 1 : ends[k + 1] + 1, empty] = torch.nan
        test.turnover[k, empty] = torch.nan
    return test


def portfolio_backtest(
    members: Iterable[Tensor],
    close: Tensor,
    fills: Tensor,
    count: int,
    *,
    buyable: Tensor | None = None,
    sellable: Tensor | None = None,
    buy_cost: float = 0.0,
    sell_cost: float = 0.0,
) -> LayerBacktest:
    """Hold sets of instruments at equal weight from fill to fill, by `layer_backtest`.

    Parameters
    ----------
    members : iterable of bool Tensor [g, n]
        Of each fill in turn: what each of the g portfolios wants to hold.
    close : Tensor [t, n]
        Adjusted closing price, NaN on suspended days.
    fills : Tensor [w]
        Ascending positions of the days at whose close orders fill.
    count : int
        Number of portfolios g.
    buyable, sellable, buy_cost, sell_cost : optional
        As in `layer_backtest`.

    Returns
    -------
    LayerBacktest
        One column a portfolio.

    Raises
    ------
    ValueError
        If a cost is not in [0, 1).
    """
    for name, rate in (("buy_cost", buy_cost), ("sell_cost", sell_cost)):
        if not 0 <= rate < 1:
            raise ValueError(f"`{name}` must be a fraction in [0, 1), got {rate}.")
    t, n = close.shape
    close = close.double()
    traded = torch.isfinite(close)
    can_buy = traded if buyable is None else traded & buyable
    can_sell = traded if sellable is None else traded & sellable
    held = forward_fill(close)
    day = torch.arange(t, device=close.device)
    # Last day with a price, -1 for none.
    last = torch.where(traded, day.unsqueeze(1), -1).amax(0) if t else day.new_zeros(n)

    shape = (len(fills), count)
    returns = close.new_full((t, count), torch.nan)
    turnover = close.new_full(shape, torch.nan)
    blocked = close.new_zeros(shape)
    weight = close.new_zeros(count, n)
    for i, (fill, member) in enumerate(zip(fills.tolist(), members, strict=True)):
        gone = last < fill
        wanted, new = _rebalance(weight, member, can_buy[fill], can_sell[fill] | gone)
        if i:
            turnover[i] = (new - weight).abs().sum(1) / 2
        blocked[i] = (new - wanted).abs().sum(1) / 2
        buys = (new - weight).clamp(min=0).sum(1)
        sells = (weight - new).clamp(min=0).sum(1)
        cost = buys * buy_cost + sells * sell_cost
        end = int(fills[i + 1]) if i + 1 < len(fills) else t - 1
        # Price of each day relative to the fill; instruments never priced have no
        # weight, so their NaN becomes no change.
        growth = (held[fill : end + 1] / held[fill]).nan_to_num(nan=1.0)
        cash = 1 - new.sum(1)
        value = growth @ new.T + cash
        returns[fill + 1 : end + 1] = value[1:] / value[:-1] - 1
        if end > fill:
            returns[fill + 1] = (1 + returns[fill + 1]) * (1 - cost) - 1
        weight = new * growth[-1] / value[-1].unsqueeze(1)
    return LayerBacktest(returns, turnover, fills, blocked)


def _rebalance(
    weight: Tensor, member: Tensor, can_buy: Tensor, can_sell: Tensor
) -> tuple[Tensor, Tensor]:
    """Wished and reached weights [g, n] of equal-weight groups."""
    equal = member.double() / member.sum(1, keepdim=True).clamp(min=1)
    stuck = torch.where(equal > weight, ~can_buy, ~can_sell) & (equal != weight)
    locked = torch.where(stuck, weight, 0.0)
    free = member & ~stuck
    share = (1 - locked.sum(1, keepdim=True)).clamp(min=0)
    reached = locked + free * share / free.sum(1, keepdim=True).clamp(min=1)
    return equal, reached


def forward_fill(x: Tensor) -> Tensor:
    """Carry the last finite value of each column downwards."""
    known = torch.isfinite(x)
    out = torch.where(known, x, torch.nan)
    # Row by row: a running maximum down the columns reads memory across its grain.
    for i in range(1, len(x)):
        torch.where(known[i], x[i], out[i - 1], out=out[i])
    return out


@dataclass(frozen=True)
class Performance:
    """A return series in a few figures, 252 days a year.

    Attributes
    ----------
    days : int
        Days that count.
    annual_return : float
        Geometric: growth of the compounded curve, as a rate per 252 days.
    annual_mean : float
        Arithmetic: mean daily return x 252.
    annual_volatility : float
        Daily standard deviation x sqrt(252).
    sharpe : float
        annual_mean / annual_volatility, without a risk-free rate.
    max_drawdown : float
        Largest fall of the compounded curve from its peak, a positive fraction.
    """

    days: int
    annual_return: float
    annual_mean: float
    annual_volatility: float
    sharpe: float
    max_drawdown: float


def performance(returns: Tensor) -> Performance:
    """Figures of daily arithmetic returns ``[t]``; NaN days are left out."""
    x = returns[torch.isfinite(returns)].double()
    nan = float("nan")
    if not len(x):
        return Performance(0, nan, nan, nan, nan, nan)
    growth = float((1 + x).prod())
    mean = float(x.mean()) * DAYS_PER_YEAR
    volatility = float(x.std()) * DAYS_PER_YEAR**0.5 if len(x) > 1 else nan
    return Performance(
        days=len(x),
        annual_return=growth ** (DAYS_PER_YEAR / len(x)) - 1 if growth > 0 else -1.0,
        annual_mean=mean,
        annual_volatility=volatility,
        sharpe=mean / volatility if volatility > 0 else nan,
        max_drawdown=max_drawdown(x),
    )


def max_drawdown(returns: Tensor) -> float:
    """Largest fall of the compounded curve, which starts at 1; a positive fraction.

    NaN days are left out; NaN where none is left.
    """
    x = returns[torch.isfinite(returns)].double()
    if not len(x):
        return float("nan")
    curve = torch.cat([x.new_ones(1), (1 + x).cumprod(0)])
    return float((1 - curve / curve.cummax(0).values).max())


def monotonicity(values: Tensor) -> float:
    """Spearman correlation of the groups' order and their figure, ``[g]``.

    1 where every group beats the one below it; NaN for fewer than two groups.
    """
    order = torch.arange(len(values), dtype=torch.float64, device=values.device)
    return float(rank_ic(order, values.double()))


# ---------------------------------------------------------------- kernels


def _correlate(score: Tensor, label: Tensor, min_count: int, ranked: bool) -> Tensor:
    if min_count < 2:
        raise ValueError(f"`min_count` must be at least 2, got {min_count}.")
    try:
        score, label = torch.broadcast_tensors(score.detach(), label.detach())
    except RuntimeError as error:
        raise ValueError(
            "`score` and `label` must broadcast against each other, got shapes "
            f"{tuple(score.shape)} and {tuple(label.shape)}."
        ) from error
    shape = score.shape[:-1]
    score, label = (_as_rows(_floating(x)) for x in (score, label))
    out = score.new_full((len(score),), torch.nan, dtype=torch.float64)
    if not score.numel():
        return out.reshape(shape)
    compiled = _compiled(score)
    moments = _compiled_moments if compiled else _moments
    for part in [slice(None)] if compiled else _blocks(score):
        count, cov, var_a, var_b = moments(score[part], label[part], ranked)
        defined = (count >= min_count) & (var_a > 0) & (var_b > 0)
        corr = cov / (var_a * var_b).sqrt()
        out[part] = torch.where(defined, corr, torch.nan).clamp(-1.0, 1.0)
    return out.reshape(shape)


def _compiled(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _arrays(*rows: Tensor) -> list[np.ndarray]:
    """Values as numpy arrays, then their bits as unsigned integers."""
    values = [x.contiguous().numpy() for x in rows]
    return values + [v.view(f"u{v.itemsize}") for v in values]


def _compiled_moments(a: Tensor, b: Tensor, ranked: bool) -> Tensor:
    out = torch.empty(4, len(a), dtype=torch.float64)
    kernels.correlate_rows(  # type: ignore[call-arg]
        *_arrays(a, b), ranked, *out.numpy()
    )
    return out


def _moments(a: Tensor, b: Tensor, ranked: bool) -> tuple[Tensor, ...]:
    """Count pairs; sum centred products a with b, a with a, b with b: each `[m]`."""
    # NaN and infinity less themselves are NaN; one comparison then does for both, and
    # costs half of two calls of isfinite.
    both = (a - a) + (b - b) == 0
    count = both.sum(-1).double()
    centred = _rank_moments if ranked else _value_moments
    return count, *centred(a, b, both, count)


def _value_moments(
    a: Tensor, b: Tensor, both: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    first = both.to(torch.uint8).argmax(-1, keepdim=True)
    missing = ~both
    spare = both.shape[-1] - count
    x, means = [], []
    for values in (a, b):
        # A value of the row is taken off first: a constant row then has exactly no
        # variance, where a rounded mean would leave some and give a false correlation.
        pivot = values.gather(-1, first).double()
        centred = (values.double() - pivot).masked_fill_(missing, 0.0)
        mean = centred.sum(-1) / count.clamp(min=1)
        x.append(centred.sub_(mean.unsqueeze(-1)))
        means.append(mean)
    # Each missing pair now adds the product of the two means: taken off again, which
    # is cheaper than masking once more.
    return (
        torch.linalg.vecdot(x[0], x[1]) - spare * means[0] * means[1],
        torch.linalg.vecdot(x[0], x[0]) - spare * means[0] ** 2,
        torch.linalg.vecdot(x[1], x[1]) - spare * means[1] ** 2,
    )


def _rank_moments(
    a: Tensor, b: Tensor, both: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Work on the ranks; their variance follows from count and ties."""
    mean = ((count + 1) / 2).unsqueeze(-1)
    rank_a, ties_a = _rank_rows(torch.where(both, a, torch.inf))
    rank_b, ties_b = _rank_rows(torch.where(both, b, torch.inf))
    # Zero in one of them is enough for a missing pair to count for nothing. Products of
    # float32 ranks are exact up to 4,096 stocks and good to 1e-7 beyond.
    rank_a = (rank_a - mean.to(rank_a.dtype)).masked_fill_(~both, 0.0)
    cov = rank_a.mul_(rank_b - mean.to(rank_b.dtype)).sum(-1, dtype=torch.float64)
    cube = count**3 - count
    return cov, (cube - ties_a) / 12, (cube - ties_b) / 12


def _rank_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Average ranks of rows that hold +inf, ranked last, for what is missing.

    Returns
    -------
    ranks : Tensor [m, n]
    ties : Tensor [m]
        float64 sum of l^3 - l over the runs of l equal values, which is 12 times what
        ties take off the ranks' sum of squares.
    """
    m, n = x.shape
    order = x.argsort(-1)
    ordered = x.gather(-1, order)
    ranks = torch.arange(1, n + 1, dtype=x.dtype, device=x.device).repeat(m, 1)
    ties = x.new_zeros(m, dtype=torch.float64)
    # `pair` holds the flat positions that equal their right neighbour. The last column
    # is never one, so a run of consecutive positions stays within its row.
    tied = torch.zeros(m, n, dtype=torch.bool, device=x.device)
    tied[:, :-1] = ordered[:, 1:] == ordered[:, :-1]
    pair = tied.flatten().nonzero().squeeze(-1)
    pair = pair[ordered.flatten()[pair] < torch.inf]
    if pair.numel():
        first = torch.ones_like(pair, dtype=torch.bool)
        first[1:] = pair[1:] != pair[:-1] + 1
        run = first.cumsum(0) - 1
        extra = torch.bincount(run)  # members of the run beyond its first
        start = pair[first]
        mean = (start % n + 1 + extra / 2).to(x.dtype)[run]
        flat = ranks.view(-1)
        flat[pair] = mean
        flat[pair + 1] = mean
        size = (extra + 1).double()
        ties.index_add_(0, start // n, size**3 - size)
    return torch.empty_like(ranks).scatter_(-1, order, ranks), ties


def _floating(x: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.to(torch.float64 if x.dtype == torch.int64 else torch.float32)


def _as_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _blocks(x: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // max(1, x.shape[-1]))
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]
