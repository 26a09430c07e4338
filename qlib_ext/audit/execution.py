"""Whether what the label earns, and what the back-test trades, can be had."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from qlib.data import D
from tqdm import tqdm

from data_handlers.traded import no_volume
from qlib_ext.audit.stores import SPIKE
from qlib_ext.audit.subject import Subject, quiet_recorder
from qlib_ext.audit.verdict import Verdict

__all__ = ["execution", "fewer"]

UNTRADED = 0.001  # share of labels that may be bought on a day without a trade
BACKTEST_DAYS = 14
JUDGED_DAYS, BEST = 120, 0.9  # days and share of a price no worse than open and close
TRIED = 5  # days of which the scores are changed, one at a time
PARTED, PARTED_DAYS = 2, 6  # further days after which bars are others; days before each


def execution(subject: Subject) -> Verdict:
    """Labels are bought after the signal's day, where there is trade; so is the rest.

    One day's prices are raised by a tenth and the labels around it are looked at: a
    return falls by as much where that day is its entry. The workflow's back-test, if it
    has one, runs over a few days with random scores; other scores of a day must not
    move the positions of that day, nor other bars after it those up to it.
    """
    rows: list[dict[str, str]] = []
    wrong: list[str] = []
    notes: list[str] = []
    entry = _entry(subject, rows, wrong, notes)
    if entry:
        _untraded(subject, entry, rows, wrong)
    for config in _backtests(subject.task):
        _deal_price(subject, config, rows, wrong, notes)
        fewer(config, len(subject.stores.stocks), notes)
        _same_day(subject, config, rows, wrong)
        _later_bars(subject, config, rows, wrong)
    table = pd.DataFrame(rows).set_index("looked at")
    styles = {"found": ("found", "s")}
    if wrong:
        return Verdict.fail("; ".join(wrong), table, notes, styles)
    return Verdict.passed("; ".join(r["found"] for r in rows), table, notes, styles)


# ------------------------------------------------------------------------- the label
def _entry(subject, rows, wrong, notes) -> int | None:
    """Trading days from the signal to the label's entry, measured."""
    full, spike = subject.label("full"), subject.label("spike")
    calendar = subject.calendar
    at = calendar.searchsorted(subject.day)
    first = full.columns[0]
    effect: dict[int, float] = {}
    for lag in range(0, min(at, 90) + 1):
        day = calendar[at - lag]
        if day not in full.index.get_level_values("datetime"):
            continue
        one, two = (f.xs(day, level="datetime")[first] for f in (full, spike))
        both = one.notna() & two.notna()
        if both.sum() < min(3, len(one)):
            continue
        one, two = one[both].astype(float), two[both].astype(float)
        # A simple return, or a log return: either falls by the rise of its entry.
        with np.errstate(invalid="ignore"):
            simple = np.log1p(two) - np.log1p(one)
        moves = {float(np.nanmedian(x)) / np.log(SPIKE) for x in (simple, two - one)}
        if any(abs(m) > 1e-6 for m in moves):
            effect[lag] = min(moves, key=lambda m: min(abs(m + 1), abs(m - 1)))
    entries = [lag for lag, m in effect.items() if abs(m + 1) < 0.05]
    exits = [lag for lag, m in effect.items() if abs(m - 1) < 0.05]
    if not effect:
        rows.append(
            {
                "looked at": "label's entry",
                "found": "the label does not depend on one day's prices",
            }
        )
        notes.append("the label is no return between two prices: entry not judged")
        return None
    entry = min(entries) if entries else None
    if entry == 0 or (entry is None and 0 in effect and 1 not in effect):
        rows.append({"looked at": "label's entry", "found": "at a price of the day t"})
        wrong.append(
            "the label is bought at a price of the day t itself, which the signal of "
            "t is made of: enter at t+1 or later"
        )
        return None
    if entry is None:
        rows.append({"looked at": "label's entry", "found": "no single day"})
        notes.append("the label is no return between two prices: entry not judged")
        return None
    out = f", sold at t+{max(exits)}" if exits else ""
    rows.append(
        {"looked at": "label's entry", "found": f"label bought at t+{entry}{out}"}
    )
    return entry


def _untraded(subject, entry, rows, wrong) -> None:
    """Labels whose entry lies on a day without trade, or at a limit."""
    label = subject.label("full").iloc[:, 0]
    bars = subject.stores.bars
    bars = bars[bars["instrument"].isin(subject.stores.stocks)]
    price = bars.pivot(index="datetime", columns="instrument", values="close")
    price = price.reindex(subject.calendar)
    traded = price > 0
    if "volume" in bars:
        volume = bars.pivot(index="datetime", columns="instrument", values="volume")
        traded &= ~no_volume(volume.reindex(subject.calendar))
    y = label.unstack().reindex(index=traded.index, columns=traded.columns)
    known = y.notna()
    after = traded.shift(-entry, fill_value=False)
    total = int(known.to_numpy().sum())
    without = int((known & ~after).to_numpy().sum())
    text = f"{without:,} of {total:,} labels bought on a day without trade"
    if "limit_up" in bars:
        top = bars.pivot(index="datetime", columns="instrument", values="limit_up")
        top = top.reindex(subject.calendar)
        shut = (price >= top * (1 - 1e-6)).shift(-entry, fill_value=False)
        text += f", {int((known & shut).to_numpy().sum()):,} at the upper limit"
    rows.append({"looked at": "labels", "found": text})
    if total and without / total > UNTRADED:
        wrong.append(f"{without / total:.1%} of the labels: {text}")


# ---------------------------------------------------------------------- the back-test
def _backtests(task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Back-test configs among the records."""
    records = task.get("record") or []
    for record in records if isinstance(records, list) else [records]:
        config = (record.get("kwargs") or {}).get("config")
        if isinstance(config, Mapping) and "backtest" in config:
            yield copy.deepcopy(dict(config))


def _deal_price(subject, config, rows, wrong, notes) -> None:
    exchange = config["backtest"].get("exchange_kwargs") or {}
    inner = exchange.get("exchange")
    if isinstance(inner, Mapping):
        inner = inner.get("kwargs") or {}
        exchange = {**exchange, "deal_price": inner.get("deal_price", "close")}
    deal = exchange.get("deal_price", "close")
    limit = exchange.get("limit_threshold")
    deals = [deal] if isinstance(deal, str) else list(deal)
    names = ", ".join(str(d).lstrip("$") for d in deals)
    wrong += _best_prices(subject, deals)
    if exchange.get("exchange") is not None:
        rows.append(
            {
                "looked at": "back-test",
                "found": f"deals at {names} on an exchange of its own",
            }
        )
        return
    rows.append({"looked at": "back-test", "found": f"deals at {names}, limit {limit}"})
    early = [d for d in deals if str(d).lstrip("$") != "close"]
    if isinstance(limit, (int, float)) and early:
        wrong.append(
            f"deals are made at {names}, but `limit_threshold` {limit} looks at the "
            "close of that day: a stock is left alone for what it does later"
        )
    if isinstance(limit, (int, float)) and limit > 0.1:
        notes.append(
            f"`limit_threshold` {limit} lets through main-board stocks at their 10 % "
            "limit"
        )


def _best_prices(subject, deals) -> list[str]:
    """Prices that are better than any order could count on, such as the day's low."""
    prices = [d if str(d).startswith("$") or "(" in str(d) else f"${d}" for d in deals]
    days = subject.calendar[subject.calendar <= subject.day][-JUDGED_DAYS:]
    subject.use(subject.store("full"))
    fields = ["$open", "$close", prices[0], prices[-1]]
    found = D.features(subject.stores.stocks, fields, days[0], days[-1]).dropna()
    first, last, buy, sell = found.to_numpy(float).T
    moved = first != last
    out = []
    for price, what, best in (
        (prices[0], "bought", buy <= np.minimum(first, last)),
        (prices[-1], "sold", sell >= np.maximum(first, last)),
    ):
        if moved.any() and (share := best[moved].mean()) > BEST:
            out.append(
                f"shares are {what} at {price}, on {share:.0%} of the days no worse "
                "than both open and close, which is known afterwards only"
            )
    return out


def fewer(config, stocks: int, notes: list[str]) -> None:
    """Hold a third of the audited stocks where the workflow would hold them all."""
    kwargs = config["strategy"].get("kwargs") or {}
    for name in ("k", "topk"):
        held = kwargs.get(name)
        if isinstance(held, int) and held >= stocks:
            kwargs[name] = max(1, stocks // 3)
            if isinstance(kwargs.get("n_drop"), int):
                kwargs["n_drop"] = min(kwargs["n_drop"], kwargs[name])
            notes.append(
                f"`{name}` is {held}, and {stocks} stocks were audited: {kwargs[name]} "
                "of them were held instead of all"
            )


def _same_day(subject, config, rows, wrong) -> None:
    """Change the scores of one day: positions of that day must stay."""
    days = subject.calendar[subject.calendar <= subject.day][-BACKTEST_DAYS:]
    rng = np.random.default_rng(subject.settings.seed)
    frames = subject.frames("full")["raw"].index
    frames = frames[frames.get_level_values("datetime").isin(days)]
    score = pd.Series(rng.normal(size=len(frames)), index=frames, name="score")
    before = _positions(subject, config, score, days)
    moved = False
    for day in days[3 : 3 + TRIED]:
        other = score.copy()
        today = other.index.get_level_values("datetime") == day
        other[today] = rng.permutation(other[today].to_numpy())[::-1]
        after = _positions(subject, config, other, days)
        if not _same_position(before[day], after[day]):
            rows.append({"looked at": "execution", "found": "on the signal's own day"})
            wrong.append(
                f"scores of {day:%Y-%m-%d} move the positions of {day:%Y-%m-%d}: the "
                "back-test trades before the scores can be known"
            )
            return
        moved |= any(not _same_position(before[d], after[d]) for d in before)
    if not moved:
        raise RuntimeError(
            f"scores of {TRIED} days were changed and the back-test never traded "
            "otherwise: it does not depend on scores, or nothing can be traded"
        )
    rows.append(
        {
            "looked at": "execution",
            "found": "scores of a day move positions of later days only",
        }
    )


def _later_bars(subject, config, rows, wrong) -> None:
    """Change the bars after a day: positions up to it must stay.

    A strategy, or an exchange, that looks at later bars is seen on the last days before
    that day, so several days are taken.
    """
    kinds = {"noise": subject.day}
    kinds |= {f"noise@{p.day:%Y-%m-%d}": p.day for p in subject.partings() if p.test}
    index = subject.frames("full")["raw"].index
    rng = np.random.default_rng(subject.settings.seed)
    for kind, day in list(kinds.items())[: 1 + PARTED]:
        days = subject.calendar[subject.calendar <= day][-PARTED_DAYS:]
        rows_then = index[index.get_level_values("datetime").isin(days)]
        score = pd.Series(rng.normal(size=len(rows_then)), index=rows_then)
        known = set(subject.files.outside)
        with subject.reading("full"):
            one = _positions(subject, config, score, days)
        unknown = [
            f"{path}: {file.problem}"
            for path, file in subject.files.outside.items()
            if path not in known and file.problem and not file.config
        ]
        if unknown:
            raise RuntimeError(
                "the audit cannot vouch for what the back-test reads: "
                + "; ".join(unknown)
            )
        with subject.reading(kind):
            two = _positions(subject, config, score, days, kind)
        moved = [d for d in one if not _same_position(one[d], two[d])]
        if moved:
            rows.append({"looked at": "orders", "found": "made of later bars"})
            wrong.append(
                f"with other bars after {day:%Y-%m-%d} the back-test's positions of "
                f"{moved[0]:%Y-%m-%d} are others: the strategy or the exchange looks "
                "ahead"
            )
            return
    rows.append({"looked at": "orders", "found": "no position knows later bars"})


def _positions(
    subject, config, score, days, kind: str = "full"
) -> dict[pd.Timestamp, Any]:
    """Positions at the end of each day of the workflow's back-test."""
    from qlib.backtest import backtest
    from qlib.utils import fill_placeholder, init_instance_by_config

    subject.use(subject.store(kind))
    strategy = copy.deepcopy(config["strategy"])
    kwargs = strategy.setdefault("kwargs", {})
    if "riskmodel_root" in kwargs and str(strategy.get("module_path")).startswith(
        "qlib_ext.portfolio"
    ):
        kwargs["riskmodel_root"] = _risk_model(subject, days)
    strategy = fill_placeholder(strategy, {"<PRED>": score.to_frame("score")})
    executor = config.get("executor") or {
        "class": "SimulatorExecutor",
        "module_path": "qlib.backtest.executor",
        "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
    }
    arguments = {
        **config["backtest"],
        "start_time": days[0],
        "end_time": days[-1],
        "benchmark": pd.Series(0.0, days),  # any: positions are looked at
    }
    exchange = dict(arguments.get("exchange_kwargs") or {})
    if isinstance(inner := exchange.get("exchange"), Mapping):
        span = {"start_time": days[0], "end_time": days[-1]}
        built = {**inner, "kwargs": {**(inner.get("kwargs") or {}), **span}}
        arguments["exchange_kwargs"] = {
            **exchange,
            "exchange": init_instance_by_config(built),
        }
    quiet = functools.partial(tqdm, disable=True)
    with quiet_recorder(), mock.patch("qlib.backtest.backtest.tqdm", quiet):
        figures, _ = backtest(
            strategy=strategy, executor=copy.deepcopy(executor), **arguments
        )
    found = next(iter(figures.values()))[1]
    return {pd.Timestamp(day): position for day, position in found.items()}


def _risk_model(subject: Subject, days: pd.DatetimeIndex) -> str:
    """Build the risk models that the strategy asks for, on the store at hand."""
    from qlib_ext.portfolio import build_risk_model

    root = subject.stores.folder / f"riskmodel-{days[-1]:%Y%m%d}"
    at = subject.calendar.searchsorted(days[0])
    first = subject.calendar[max(0, int(at) - 10)]
    if not root.is_dir():
        build_risk_model(root, first, days[-1], overwrite=True)
    return str(root)


def _same_position(one: Any, two: Any) -> bool:
    def amounts(position):
        return {
            code: round(float(item["amount"]), 6)
            for code, item in position.position.items()
            if isinstance(item, Mapping)
        }

    return amounts(one) == amounts(two)
