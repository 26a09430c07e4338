"""Record of a Qlib workflow: timing of one or a few instruments, and its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from qlib.data import D
from qlib.log import get_module_logger
from qlib.workflow.record_temp import SignalRecord

from data_handlers.arguments import Count, Positive
from qlib_ext.portfolio.page import text_of
from qlib_ext.portfolio.timing import Timing, by_group, regimes, summary, trade
from qlib_ext.report import plots
from qlib_ext.report.page import Page
from qlib_ext.report.record import FileRecord, first_column, footer

__all__ = ["TimingRecord"]

logger = get_module_logger("qlib_ext.portfolio")

_STYLES = {
    "calls": ("calls", "i"),
    "hit_rate": ("hit rate", "p1"),
    "low": ("from", "p1"),
    "high": ("to", "p1"),
    "long_hit_rate": ("always long", "p1"),
    "annual_return": ("annual return", "p2"),
    "sharpe": ("Sharpe", "n2"),
    "max_drawdown": ("max drawdown", "p2"),
    "long_return": ("held, a year", "p2"),
    "turnover": ("sides a year", "n1"),
    "profit": ("profit, CNY", "i"),
    "cost": ("cost, CNY", "i"),
    "p_value": ("p of shifts", "n3"),
}


class TimingRecord(FileRecord):
    """Trade ``pred.pkl`` instrument by instrument, and report on it.

    Writes under ``timing/``: ``account.parquet`` (a row an instrument and day, see
    `qlib_ext.portfolio.timing.trade`, with the `regime` of the day before),
    ``summary.json`` and ``report.html``. Figures are logged as ``timing <figure>``,
    with the instrument's code behind them where there are several.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    rules : dict, optional
        Of `Timing`: band, inside, short, lots, cost, multiplier, tick. Those of one
        instrument may stand under its code: ``{cost: 28, CFFEX.TS: {cost: 45}}``.
    regime_days : int, default 60
    regime_size : float, default 1
        See `qlib_ext.portfolio.timing.regimes`.
    skip_existing : bool, default False

    Raises
    ------
    ValueError
        If a rule is unknown or out of range, or the store has no prices of an
        instrument.
    """

    artifact_path = "timing"
    depend_cls = SignalRecord

    def __init__(
        self,
        recorder: Any,
        rules: dict | None = None,
        regime_days: Count = 60,
        regime_size: Positive = 1.0,
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        self.rules = dict(rules or {})
        for code in (None, *(k for k, v in self.rules.items() if isinstance(v, dict))):
            self._rules_of(code)

    def _rules_of(self, code: str | None) -> Timing:
        shared = {k: v for k, v in self.rules.items() if not isinstance(v, Mapping)}
        given = {**shared, **self.rules.get(code, {})} if code else shared
        unknown = sorted(set(given) - set(Timing.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"`rules` has no {unknown[0]!r}; it takes "
                f"{sorted(Timing.__dataclass_fields__)}."
            )
        return Timing(**given)

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = first_column(self.load("pred.pkl"), "score")
        codes = sorted(score.index.unique("instrument"))
        first = score.index.get_level_values("datetime").min()
        bars = D.features(codes, ["$open", "$close", "$factor"])
        accounts, figures = {}, {}
        for code in codes:
            if code not in bars.index.get_level_values("instrument"):
                raise ValueError(f"the store has no prices of {code}.")
            own = bars.xs(code, level="instrument").set_axis(
                ["open", "close", "factor"], axis=1
            )
            account = trade(
                score.xs(code, level="instrument").sort_index(),
                own,
                self._rules_of(code),
                code,
            )
            names = regimes(own["close"].dropna(), self.regime_days, self.regime_size)
            account["regime"] = names.shift().reindex(account.index).to_numpy()
            accounts[code] = account
            figures[code] = summary(account)
        for code, of in figures.items():
            behind = f" {code}" if len(codes) > 1 else ""
            named = {f"{k.replace('_', ' ')}{behind}": v for k, v in of.items()}
            self.log(named, "timing ")
            logger.info(f"{code}: {text_of(of)}")
        page = timing_page(accounts, figures, self._words(codes, first))
        table = pd.concat(accounts, names=["instrument", "datetime"])
        return {
            "account.parquet": table.swaplevel().sort_index(),
            "summary.json": {"figures": figures, "rules": self.rules},
            "report.html": page.render(footer(self.recorder, costs=True)),
        }

    def _words(self, codes: list[str], first: pd.Timestamp) -> dict[str, str]:
        rules = {code: self._rules_of(code) for code in codes}
        said = "; ".join(
            f"{code}: {how.lots} lot(s) of {how.contract(code)[0]:g} CNY a point, "
            f"{how.cost:g} CNY a lot and side"
            + (f", {how.inside} within {how.band:g}" if how.band else "")
            + ("" if how.short else ", long or flat")
            for code, how in rules.items()
        )
        return {
            "lead": f"Scores from {first:%Y-%m-%d} on, known at the close and traded "
            "at the next open; rolls at the closes of the day before.",
            "conditions": f"{said}. Returns on the value of the lots, without leverage "
            "and interest, after costs.",
            "regime": f"Rising or falling: the return of the {self.regime_days} days "
            f"up to the score is above {self.regime_size:g} standard deviations of a "
            "random walk of their volatility, or below as many.",
        }


def timing_page(
    accounts: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Mapping[str, float]],
    words: Mapping[str, str],
) -> Page:
    """Lay out the report.

    Parameters
    ----------
    accounts : mapping of str to DataFrame
        Of `trade`, with ``regime``, by instrument.
    figures : mapping of str to dict
        Of `summary`, by instrument.
    words : dict of str to str
        ``lead``, ``conditions``, ``regime``.
    """
    page = Page("Timing: " + ", ".join(accounts), words["lead"])
    for code, of in figures.items():
        if of["low"] <= of["long_hit_rate"] <= of["high"]:
            page.warn(
                f"{code}: the hit rate of {of['hit_rate']:.1%} can't be told from that "
                f"of always being long, {of['long_hit_rate']:.1%} (95 %: "
                f"{of['low']:.1%} to {of['high']:.1%})."
            )
    first = next(iter(figures.values()))
    for name, key, style in (
        ("Hit rate", "hit_rate", "p1"),
        ("Its p among shifts in time", "p_value", "n3"),
        ("Annual return", "annual_return", "p2"),
        ("Sharpe", "sharpe", "n2"),
        ("Max drawdown", "max_drawdown", "p2"),
        ("Sides a year", "turnover", "n1"),
    ):
        page.tile(name, first[key], style)
    page.tiles_note = (f"{next(iter(figures))}. " if len(figures) > 1 else "") + words[
        "conditions"
    ]
    page.section("All days")
    page.table("Figures", pd.DataFrame(figures).T, styles=_STYLES, wide=True)
    for code, account in accounts.items():
        page.section(code, words["regime"])
        curves = (1 + account[["return", "long"]]).cumprod()
        curves.columns = ["timed", "held long"]
        page.plot("Net value", plots.lines(curves, "net value"), wide=True)
        page.plot("Drawdown", plots.drawdown_curves(curves[["timed"]]))
        page.plot("Lots held", plots.lines(account[["position"]], "lots"))
        page.table(
            "By year",
            by_group(account, pd.DatetimeIndex(account.index).year.to_numpy()),
            styles=_STYLES,
            wide=True,
        )
        page.table(
            "By market before the score",
            by_group(account, account["regime"].to_numpy()),
            styles=_STYLES,
            wide=True,
        )
    return page
