"""Record of a Qlib workflow: risk model, back-test and report of index enhancement."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from qlib.data import D
from qlib.log import get_module_logger

import data_handlers.traded  # noqa: F401 - registers the operators with Qlib
from data_handlers.universe import universe
from qlib_ext.portfolio.attribution import (
    attribute,
    benchmark_returns,
    daily_returns,
    holdings_frame,
    tracking_table,
    traded_closes,
)
from qlib_ext.portfolio.backtest import BacktestRecord, net_values, table_by_year
from qlib_ext.portfolio.page import enhance_page, text_of
from qlib_ext.portfolio.risk_model import (
    COUNTRY,
    INDUSTRY,
    RiskModel,
    bias_table,
    build_risk_model,
)
from qlib_ext.portfolio.strategy import IndexEnhancementStrategy
from qlib_ext.recorders import copy_artifact
from qlib_ext.report.record import first_column, footer
from qlib_ext.report.tables import performance_of

__all__ = ["EnhanceRecord"]

logger = get_module_logger("qlib_ext.portfolio")

CODES = {"csi300": "SH000300", "csi500": "SH000905", "csi1000": "SH000852"}
"""Codes of the indices' own bars."""


class EnhanceRecord(BacktestRecord):
    """Back-test `IndexEnhancementStrategy` on ``pred.pkl`` and report on it.

    Builds what is missing or out of date of the risk model, runs Qlib's back-test, and
    writes under ``enhance/``: ``account.parquet`` (daily return before costs, cost,
    index, turnover), ``history.parquet`` (one row a rebalancing), ``targets.parquet``
    and ``holdings.parquet`` (weights), ``attribution.parquet``, ``exposures.parquet``,
    ``tracking.parquet``, ``bias.parquet`` and ``report.html``. Qlib's own
    ``portfolio_analysis/report_normal_1day.pkl`` is written too. Figures are logged.

    Conventions: returns are geometric over 252 days unless called a mean; the excess is
    net of costs, from the first day after the first purchase.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    config : dict
        ``strategy`` (config of an `IndexEnhancementStrategy`, with ``<PRED>``) and
        ``backtest`` (`start_time`, `end_time`, `account`, `exchange_kwargs`), as
        `PortAnaRecord` takes them. An exchange without dates gets those of the
        back-test.
    risk_model : dict, optional
        Arguments of `build_risk_model` (`styles`, `extra`, half-lives …).
    recorder_factors : dict of str to str, optional
        Further risk factors from this recorder's own artifacts, by name: ``{learnt:
        mamba/risk_factor.parquet}`` takes the one that `MambaRecord` left.
    benchmark : {"members", "index"}, default "members"
        Return of the index: of its members, with dividends (total return), or of the
        index's own bars, which vendors give without dividends (price return). The
        account's return is always a total return.
    skip_existing : bool, default False

    Raises
    ------
    ValueError
        If the strategy is another one, or an argument is out of range.
    """

    artifact_path = "enhance"
    leaves = ("report.html", "account.parquet", "history.parquet", "summary.json")

    def __init__(
        self,
        recorder: Any,
        config: Mapping[str, Any] | None = None,
        risk_model: Mapping[str, Any] | None = None,
        recorder_factors: Mapping[str, str] | None = None,
        benchmark: Literal["members", "index"] = "members",
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder, config, skip_existing)
        self.risk_model = dict(risk_model or {})
        self.recorder_factors = dict(recorder_factors or {})

    # --------------------------------------------------------------------------- parts
    def _strategy(self, score: pd.Series) -> IndexEnhancementStrategy:
        strategy = self._made(score)
        if not isinstance(strategy, IndexEnhancementStrategy):
            raise ValueError(
                "`strategy` must be an IndexEnhancementStrategy, got "
                f"{type(strategy).__name__}; use PortAnaRecord for others."
            )
        return strategy

    def _extra(self, folder: str) -> dict[str, str]:
        extra = dict(self.risk_model.get("extra") or {})
        for name, artifact in self.recorder_factors.items():
            target = Path(folder) / name / Path(artifact).name
            extra[name] = str(copy_artifact(self.recorder, artifact, target))
        return extra

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = first_column(self.load("pred.pkl"), "pred.pkl")
        start, end = self._range(score)
        strategy = self._strategy(score)
        before = pd.DatetimeIndex(D.calendar(end_time=start))
        first = before[max(0, len(before) - 10)]
        with tempfile.TemporaryDirectory() as folder:
            extra = self._extra(folder)
            model = build_risk_model(
                strategy.riskmodel_root,
                first,
                end,
                **{**self.risk_model, "extra": extra, "overwrite": "changed"},
            )
        plan = self.config["backtest"]
        market = strategy.market
        weights, closes = _index_data(market, first, end)
        returns = daily_returns(closes)
        members = benchmark_returns(weights.weights, returns)
        own = _index_bars(plan.get("benchmark") or CODES.get(market), first, end)
        if self.benchmark == "index" and own is None:
            raise ValueError(
                "`benchmark: index` needs `backtest: benchmark` to name an index with "
                "bars in the store."
            )
        bench = members if self.benchmark == "members" else own
        assert bench is not None
        report, positions, dealt = self._run(strategy, bench, start, end)
        return self._report(
            strategy, model, report, positions, weights, returns, (members, own), dealt
        )

    def _report(
        self,
        strategy: IndexEnhancementStrategy,
        model: RiskModel,
        report: pd.DataFrame,
        positions: Mapping,
        weights: Any,
        returns: pd.DataFrame,
        indices: tuple[pd.Series, pd.Series | None],
        dealt: str,
    ) -> dict[str, object]:
        history = strategy.history_frame()
        holdings = holdings_frame(positions)
        bought = min(strategy.targets)
        account = report[report.index > bought]
        parts, exposures = attribute(
            model, holdings, weights.weights, returns, report[report.index >= bought]
        )
        parts, exposures = parts.iloc[1:], exposures.iloc[1:]
        net = account["return"] - account["cost"]
        excess = net - account["bench"]
        tracking = tracking_table(excess, history.loc[bought:])
        values = net_values(net, account["bench"], excess)
        traded = report["turnover"].reindex(history.index) / 2
        turnover = pd.DataFrame(
            {"optimised": history["turnover"], "traded": traded}
        ).iloc[1:]
        outcome = history["status"].value_counts().rename("weeks").to_frame()
        outcome["share"] = outcome["weeks"] / len(history)
        relaxed = history[history["status"] == "relaxed"]
        perf = performance_of(excess)
        figures = {
            "excess annual return": perf.annual_return,
            "excess annual mean": float(excess.mean() * 252),
            "tracking error realised": float(excess.std() * np.sqrt(252)),
            "tracking error predicted": float(history["tracking_error"].mean()),
            "information ratio": float(excess.mean() / excess.std() * np.sqrt(252)),
            "excess max drawdown": perf.max_drawdown,
            "weekly turnover": float(turnover["traded"].mean()),
            "cost annual": float(account["cost"].mean() * 252),
            "rebalancings": float(len(history)),
            "relaxed rebalancings": float(len(relaxed)),
            "failed rebalancings": float((history["status"] == "failed").sum()),
            "holdings": float(history["holdings"].mean()),
            "tracking bias": float(tracking["bias"].iloc[-1]),
        }
        for group in sorted(
            {g for text in relaxed["relaxed_groups"] for g in text.split(", ")}
        ):
            count = (
                relaxed["relaxed_groups"].str.split(", ").map(lambda x, g=group: g in x)
            )
            figures[f"relaxed {group}"] = float(count.sum())
        own = indices[1]
        if own is not None:
            gap = (indices[0] - own).reindex(account.index)
            figures["members minus index bars annual"] = float(gap.mean() * 252)
        figures |= {f"attribution {k}": float(v) * 252 for k, v in parts.mean().items()}
        figures = self.log(figures, "enhance ")
        logger.info(text_of(figures))
        limits = strategy.optimiser.limits
        styles = [c for c in exposures.columns if not str(c).startswith(INDUSTRY)]
        industries = [c for c in exposures.columns if str(c).startswith(INDUSTRY)]
        table = pd.DataFrame(
            {
                "limit": [limits.named.get(s, limits.style) for s in styles],
                "mean": exposures[styles].mean().to_numpy(),
                "largest": exposures[styles].abs().max().to_numpy(),
            },
            index=pd.Index(styles, name="style"),
        )
        table.loc["largest industry"] = [
            limits.industry,
            np.nan,
            exposures[industries].abs().max().max(),
        ]
        sums = parts.drop(columns="excess").cumsum()
        shown = ["alpha", "industries", "trading", "cost"]
        sums = sums[shown].assign(
            styles=sums.drop(columns=[*shown, COUNTRY]).sum(axis=1)
        )
        each = parts.mean() * 252
        annual = pd.DataFrame(
            {
                "annual": each,
                "error": parts.std() * np.sqrt(252 / len(parts)) * np.sqrt(252),
            }
        ).rename_axis("part")
        frames = {
            "values": values,
            "by_year": table_by_year(net, account["bench"], excess, turnover["traded"]),
            "tracking": tracking,
            "bias": bias_table(model, pd.DatetimeIndex(history["signal_date"])),
            "attribution_annual": annual,
            "attribution_sums": sums,
            "exposure_table": table,
            "outcomes": outcome.rename_axis("outcome"),
            "relaxations": relaxed[["relaxed", "conflict"]].set_axis(
                [f"{d:%Y-%m-%d}" for d in relaxed.index]
            ),
            "turnover": turnover,
        }
        words = self._words(strategy, report, bought, dealt)
        page = enhance_page(
            f"Index enhancement: {strategy.market}, {strategy.limits} limits",
            words,
            frames,
            figures,
            self._warnings(strategy, history, weights.source),
        )
        targets = pd.concat(strategy.targets).rename_axis(["datetime", "instrument"])
        return {
            "account.parquet": report,
            "history.parquet": history,
            "targets.parquet": targets.to_frame("weight"),
            "holdings.parquet": holdings,
            "attribution.parquet": parts,
            "exposures.parquet": exposures,
            "tracking.parquet": tracking,
            "bias.parquet": frames["bias"],
            "summary.json": {"figures": figures, **strategy.describe()},
            "report.html": page.render(footer(self.recorder, costs=True)),
        }

    def _words(
        self,
        strategy: IndexEnhancementStrategy,
        report: pd.DataFrame,
        bought: pd.Timestamp,
        dealt: str,
    ) -> dict[str, str]:
        limits = strategy.optimiser.limits.describe()
        kind = (
            "total return of the members (adjusted prices, weights of the day before)"
            if self.benchmark == "members"
            else "the index's own bars (price return, unless the vendor says otherwise)"
        )
        parts = [
            f"{k.replace('_', ' ')} {v:g}"
            for k, v in {**limits, **limits.pop("named")}.items()
            if isinstance(v, int | float)
        ]
        parts += [group.replace("_", " ") for group in limits.get("more", ())]
        given = "; ".join(parts)
        end = report.index[-1]
        return {
            "lead": f"{strategy.market}, {bought:%Y-%m-%d} to {end:%Y-%m-%d}, "
            "rebalanced on the first day of each week with the scores of the last day "
            "of the week before.",
            "index": f"Index: {kind}. Weights: {weights_words(strategy)}. The "
            "account's prices are adjusted, so it reinvests dividends.",
            "conditions": f"{strategy.market}; {bought:%Y-%m-%d} to {end:%Y-%m-%d}; "
            f"filled at {dealt or 'the deal price'}; after costs; geometric over 252 "
            "days.",
            "limits": f"{given}. Relaxed, where they cannot all be met, in the order "
            f"{', '.join(strategy.optimiser.relax_order)}.",
        }

    @staticmethod
    def _warnings(
        strategy: IndexEnhancementStrategy, history: pd.DataFrame, source: str
    ) -> list[str]:
        out = []
        counts = history["status"].value_counts()
        if counts.get("relaxed", 0):
            out.append(
                f"{counts['relaxed']} of {len(history)} rebalancings could not keep "
                "all limits; what gave way is listed below."
            )
        if counts.get("failed", 0):
            out.append(
                f"On {counts['failed']} days no solver gave a portfolio: the old one "
                "was held."
            )
        out += strategy.untraded()
        if "equal" in source:
            out.append(f"Index weights: {source}.")
        left = history.get("limits_left_out")
        if left is not None and left.max() > 0:
            named = set(strategy.optimiser.limits.named)
            known = {str(c).partition(":")[2] for c in history.columns}
            out.append(
                "Limits without data in this store, not applied: "
                f"{', '.join(sorted(named - known)) or 'on some days'}."
            )
        return out


def weights_words(strategy: IndexEnhancementStrategy) -> str:
    """Say where the index weights came from."""
    return str(strategy.describe()["index_weights"])


def _index_data(market: str, first: Any, end: Any) -> tuple[Any, pd.DataFrame]:
    from qlib_ext.portfolio.strategy import load_index_weights

    names = universe(D.instruments("all"), stocks_only=False)
    weights = load_index_weights(market, first, end)
    return weights, traded_closes(names, first, end)


def _index_bars(code: Any, first: Any, end: Any) -> pd.Series | None:
    if not isinstance(code, str):
        return None
    frame = D.features([code], ["$close/Ref($close,1)-1"], first, end)
    if frame.empty or not np.isfinite(frame.to_numpy()).any():
        return None
    return frame.iloc[:, 0].droplevel("instrument")
