"""The record behind the factor report: what it reads, evaluates and keeps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from qlib.config import C
from qlib.workflow.record_temp import SignalRecord

from data_handlers.arguments import Count, Whole
from data_handlers.loaders import read_factors
from qlib_ext import metrics
from qlib_ext.dataset import handler_label_horizon
from qlib_ext.recorders import own_name
from qlib_ext.report import market_data, studies, tables
from qlib_ext.report.factor import factor_page
from qlib_ext.report.record import FileRecord, first_column, footer, logger

__all__ = ["FactorRecord", "forward_return"]

# Label and store agree when their returns correlate so closely on the days of overlap.
_SAME_RETURN = 0.999
# Horizons that a label of unknown reach is held against, the usual ones first.
_HORIZONS = tuple(dict.fromkeys([10, 1, 5, 20, *range(1, 61)]))


class FactorRecord(FileRecord):
    """Evaluate a score as sell-side factor reports do, beside SigAnaRecord.

    Reads ``pred.pkl`` and ``label.pkl`` of `SignalRecord` and closes from the Qlib
    store. Logs the figures as metrics, saves frames as Parquet and one HTML page, all
    under ``factor/``. Works after any Qlib model.

    Conventions: RankIC every `horizon` trading days, mean over the possible first days,
    IC_IR not annualised; layers are rebalanced weekly at the close after the signal,
    without costs; returns annualised over 252 days, geometric unless called a mean. A
    score or label that is NaN or infinite leaves the stock out for that day.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    model, dataset : optional
        Given by Qlib. A model with ``predict_units(dataset, segment)`` has its units
        analysed and saved as ``factor/units.parquet``.
    horizon : int, optional
        Trading days from entry to exit of the label. Default: that of the handler's
        label, or where that cannot be told of the closes whose return label.pkl is;
        else 10. Another one than the label's, and 10 taken so, are warned about on the
        page.
    n_layers : int, default 20
        Groups; fewer where the pool leaves under 5 stocks to a group.
    label_col : int, default 0
        Column of ``label.pkl`` to score against.
    oracle_path : str or None, default "auto"
        Parquet with ``datetime``, ``instrument`` and the true expected return in
        column ``total``, shown as an upper bound. "auto" takes the file that the
        embedded market writes beside its store, ``<provider_uri>.oracle.parquet``, if
        there is one.
    universe : str, optional
        Name of the pool in the report. Default: the handler's ``instruments``.
    label : str, optional
        Words for the label. Default: found by comparing ``label.pkl`` to the store.
    pools : list of str, optional
        Markets of the store in which the score is also judged, members point in time.
        Default: all of them.
    factors_path : str, optional
        Parquet with ``datetime``, ``instrument`` and one column per factor, such as
        the 20-day means of `ms` features: correlation and incremental RankIC are
        reported for them beside the classic price and volume factors.
    risk_path : str, optional
        Parquet with ``datetime``, ``instrument``, ``industry`` (code) and style
        columns. Default: the ``risk`` group of the dataset's handler, if it has one.
    monthly : bool, default False
        Also hold the top and bottom 10 % of each pool for a month, the score net of
        industry means: ``factor/monthly.parquet``.
    segment : str, default "test"
        Segment for which units are predicted; that of ``pred.pkl``.
    skip_existing : bool, default False
        Leave a finished report as it is.

    Raises
    ------
    ValueError
        If an argument is out of range, `oracle_path` does not exist, or the recorder's
        predictions and labels have no day in common.
    """

    artifact_path = "factor"
    leaves = ("report.html", "context.json", "rank_ic.parquet", "layers.parquet")
    depend_cls = SignalRecord

    def __init__(
        self,
        recorder: Any,
        model: Any = None,
        dataset: Any = None,
        horizon: Count | None = None,
        n_layers: Annotated[int, Ge(2)] = 20,
        label_col: Whole = 0,
        oracle_path: str | None = "auto",
        universe: str | None = None,
        label: str | None = None,
        pools: list[str] | None = None,
        factors_path: str | None = None,
        risk_path: str | None = None,
        segment: str = "test",
        skip_existing: bool = False,
        monthly: bool = False,
    ) -> None:
        of_label = handler_label_horizon(getattr(dataset, "handler", None), label_col)
        self.mismatch = ""
        # None where the handler can't tell: then the label's values do.
        self.horizon: Any = of_label if horizon is None else horizon
        if horizon is not None and of_label not in (None, horizon):
            self.mismatch = (
                f"`horizon` is {horizon} days, but the handler's label is the return "
                f"over {of_label}: figures called {horizon}d are of {of_label}-day "
                "returns. Leave `horizon` out of FactorRecord."
            )
            logger.warning(self.mismatch)
        if oracle_path == "auto":
            beside = Path(f"{C.dpm.get_data_uri('day')}.oracle.parquet")
            oracle_path = self.oracle_path = str(beside) if beside.is_file() else None
        if pools is not None and not isinstance(pools, list | tuple):
            raise ValueError(
                f"`pools` must be a list of market names, got {pools!r}; [] for none."
            )
        for name, path in (("factors_path", factors_path), ("risk_path", risk_path)):
            if path is not None and not Path(path).exists():
                raise ValueError(
                    f"`{name}` must be an existing Parquet file or folder, got "
                    f"{path!r}."
                )
        if oracle_path is not None and not Path(oracle_path).is_file():
            raise ValueError(
                f"`oracle_path` must be an existing Parquet file, got {oracle_path!r}. "
                "The embedded market writes one beside its store; leave it out "
                "elsewhere."
            )
        super().__init__(recorder=recorder, skip_existing=skip_existing)

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = first_column(self.load("pred.pkl"), "pred.pkl")
        bars = market_data.load_bars(score)
        days, instruments = bars.days, bars.instruments
        panel = tables.panel_of(score, days, instruments)
        if self.horizon is None:
            self.horizon = self._fitting_horizon(bars)
        label, label_words = self._label(bars)
        context = tables.Context(
            universe=self.universe or _universe_of(self.dataset),
            label=label_words,
            start=f"{days[0]:%Y-%m-%d}",
            end=f"{days[-1]:%Y-%m-%d}",
            horizon=self.horizon,
            days=len(days),
            stocks=float(torch.isfinite(panel).sum(1).double().mean()),
        )
        evaluation = tables.evaluate(
            panel,
            label,
            days,
            context,
            close=bars.during("close"),
            n_layers=self.n_layers,
            oracle=self._oracle(days, instruments),
            carried=self._carried(bars),
        )
        evaluation.warnings += [self.mismatch] if self.mismatch else []
        self._add_studies(evaluation, panel, label, bars)
        objects: dict[str, object] = {}
        units, parts = self._units_and_parts()
        if units is not None:
            objects["units.parquet"] = units
            if units.shape[1] > 1:
                self._add_units(evaluation, units, panel, label, bars)
        if parts is not None:
            objects["parts.parquet"] = parts
            self._add_parts(evaluation, parts, label, bars)
        known = self.log(evaluation.figures)
        for name, frame in evaluation.frames.items():
            # `units.parquet` holds the units' values, their table goes beside it.
            objects[f"{'unit_table' if name == 'units' else name}.parquet"] = frame
        objects["context.json"] = {**asdict(context), "figures": known}
        page = factor_page(evaluation, self._title())
        objects["report.html"] = page.render(footer(self.recorder))
        return objects

    def _add_studies(
        self,
        evaluation: tables.Evaluation,
        score: torch.Tensor,
        label: torch.Tensor,
        bars: market_data.Bars,
    ) -> None:
        """Pools, trading, other factors and exposures, as far as data allow."""
        days, instruments = bars.days, bars.instruments
        close = bars.during("close")
        names = market_data.market_names() if self.pools is None else self.pools
        pools = {
            name: market_data.membership(name, days, instruments)
            for name in names
            if name != evaluation.context.universe
        }
        studies.add_pools(evaluation, score, label, close, days, pools, self.n_layers)
        studies.add_tradability(
            evaluation,
            score,
            close,
            days,
            self.n_layers,
            market_data.price_limits(bars),
        )

        def panels(frame: pd.DataFrame, given: str = "") -> dict[str, torch.Tensor]:
            out = {
                str(name): tables.panel_of(column, days, instruments)
                for name, column in frame.items()
            }
            blank = [k for k, x in out.items() if not torch.isfinite(x).any()]
            if given and len(blank) == len(out):
                raise ValueError(
                    f"`{given}` has no value on the days and stocks of pred.pkl, "
                    f"{days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}, such as "
                    f"{instruments[0]}; the file begins with "
                    f"{tuple(map(str, frame.index[0]))}."
                )
            if given and blank:
                logger.warning(f"`{given}` has no value of {blank} there.")
            return out

        at = torch.arange(bars.scored.start, bars.scored.stop)
        factors = market_data.classic_factors(bars, at)
        factors |= market_data.intraday_factors(bars)
        # In the pool only: the score decides which stocks a factor is ranked among.
        inside = torch.isfinite(score)
        factors = {
            name: torch.where(inside, values.float(), torch.nan)
            for name, values in factors.items()
            if torch.isfinite(values).any()
        }
        if self.factors_path is not None:
            given = read_factors(self.factors_path, "factors_path")
            factors |= panels(given, "factors_path")
        studies.add_factor_relations(evaluation, score, label, factors)
        risk = (
            market_data.risk_frame(self.dataset, self.segment)
            if self.risk_path is None
            else read_factors(self.risk_path, "risk_path")
        )
        own = "" if self.risk_path is None else "risk_path"
        styles = {} if risk is None else panels(risk, own)
        industry = styles.pop("industry", None)
        if self.monthly:
            studies.add_monthly_tenths(evaluation, score, close, days, pools, industry)
        if risk is None:
            logger.info(
                "no exposures in the report: the handler has no `risk` group; give "
                "`risk_path` or a handler of data_handlers."
            )
            return
        studies.add_exposures(
            evaluation,
            score,
            label,
            industry,
            styles,
            market_data.industry_names(),
            self.n_layers,
        )

    def _add_units(
        self,
        evaluation: tables.Evaluation,
        units: pd.DataFrame,
        score: torch.Tensor,
        label: torch.Tensor,
        bars: market_data.Bars,
    ) -> None:
        table, correlation, figures = tables.unit_table(
            (
                (str(name), tables.panel_of(column, bars.days, bars.instruments))
                for name, column in units.items()
            ),
            label,
            score,
            tables.starts_of(evaluation),
        )
        evaluation.frames |= {"units": table, "unit_correlation": correlation}
        evaluation.figures |= figures

    def _add_parts(self, evaluation, parts, label, bars) -> None:
        """Judge what a tilted score is made of, each part as a factor of its own."""
        table, _, _ = tables.unit_table(
            (
                (str(name), tables.panel_of(part, bars.days, bars.instruments))
                for name, part in parts.items()
            ),
            label,
            starts=tables.starts_of(evaluation),
        )
        weights = pd.Series(self.model.style_weights_, name="weight").to_frame()
        evaluation.frames |= {"part_table": table, "style_weights": weights}
        evaluation.figures |= {
            f"Rank IC of part {name}": float(value)
            for name, value in table["rank_ic"].items()
        }

    def _title(self) -> str:
        model = type(self.model).__name__ if self.model is not None else "score"
        name = own_name(self.recorder)
        return f"Factor report: {model}" + (f" ({name})" if name else "")

    def _fitting_horizon(self, bars: market_data.Bars) -> int:
        """Days between the closes whose return ``label.pkl`` is; 10 if none fit."""
        frame = self.load("label.pkl")
        if frame is None or frame.shape[1] <= self.label_col:
            return 10
        series = frame.iloc[:, self.label_col]
        label = tables.panel_of(series, bars.days, bars.instruments)
        for h in _HORIZONS:
            if _same(label, forward_return(bars.fields["close"], h)[bars.scored]):
                return h
        self.mismatch = (
            "over how many days the label reaches is not known: RankIC is taken every "
            "10; set `horizon` of FactorRecord."
        )
        logger.warning(self.mismatch)
        return 10

    def _label(self, bars: market_data.Bars) -> tuple[torch.Tensor, str]:
        h = self.horizon
        days, instruments = bars.days, bars.instruments
        words = f"close of t+1 to close of t+{1 + h}, raw arithmetic return"
        implied = forward_return(bars.fields["close"], h)[bars.scored]
        frame = self.load("label.pkl")
        if frame is None or frame.empty:
            logger.warning(
                "`label.pkl` is empty (the handler has `drop_raw=True`); returns of "
                "the store's closes take its place."
            )
            return implied, self.label or f"{words}, from the store"
        if self.label_col >= frame.shape[1]:
            raise ValueError(
                f"`label_col` must be below {frame.shape[1]}, the number of columns in "
                f"label.pkl, got {self.label_col}."
            )
        series = frame.iloc[:, self.label_col]
        label = tables.panel_of(series, days, instruments)
        if not torch.isfinite(label).any():
            named = series.index.get_level_values("instrument")
            if len(named) and not named.isin(instruments).any():
                raise ValueError(
                    "label.pkl and pred.pkl have no instrument in common: "
                    f"{named[0]!r} and {instruments[0]!r}; write the store's codes in "
                    "both."
                )
            raise ValueError(
                f"label.pkl has no value on the {len(days)} days of pred.pkl "
                f"({days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}); give the test segment "
                f"at least {h + 1} trading days before the end of the data."
            )
        if self.label is not None:
            return label, self.label
        if _same(label, implied):
            return label, words
        logger.warning(
            f"label.pkl is not the return from {words}. The report uses label.pkl; "
            "set `horizon` (it spaces the sampled dates) and `label` (its words)."
        )
        name = series.name[-1] if isinstance(series.name, tuple) else series.name
        return label, f"column {name} of label.pkl (not close t+1 to close t+{1 + h})"

    def _carried(self, bars: market_data.Bars) -> torch.Tensor:
        """Whether the stock does not trade on the label's exit day, ``[t, n]``."""
        gone = ~torch.isfinite(bars.fields["close"])
        out = torch.zeros_like(gone)
        out[: -self.horizon - 1] = gone[self.horizon + 1 :]
        return out[bars.scored]

    def _oracle(
        self, days: pd.DatetimeIndex, instruments: pd.Index
    ) -> torch.Tensor | None:
        if self.oracle_path is None:
            return None
        frame = pd.read_parquet(self.oracle_path)
        missing = {"datetime", "instrument", "total"} - set(frame.columns)
        if missing:
            raise ValueError(
                f"`oracle_path` must have the columns datetime, instrument and total; "
                f"{self.oracle_path} lacks {sorted(missing)}."
            )
        series = frame.set_index(["datetime", "instrument"])["total"]
        return tables.panel_of(series, days, instruments)

    def _units_and_parts(self) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
        """Units of the score and its parts, as far as the model has them."""
        model, units, parts = self.model, None, None
        if self.dataset is None:
            return None, None
        where = {"dataset": self.dataset, "segment": self.segment}
        tilted = getattr(model, "tilt", None) is not None
        if tilted and hasattr(model, "predict_units_and_parts"):
            units, parts = model.predict_units_and_parts(**where)
        else:
            if hasattr(model, "predict_units"):
                units = model.predict_units(**where)
            if tilted:
                parts = model.predict_parts(**where)
        if units is not None:
            units = units.astype(np.float32, copy=False)
            # Sorting copies; a unit frame can be the largest thing in memory.
            if not units.index.is_monotonic_increasing:
                units = units.sort_index()
        return units, parts


def _same(label: torch.Tensor, implied: torch.Tensor) -> bool:
    """Whether two labels are one return, but for other closes of a few rows."""
    match = metrics.ic(label, implied)
    match = match[torch.isfinite(match)]
    return len(match) > 0 and float(match.mean()) > _SAME_RETURN


def forward_return(close: torch.Tensor, horizon: int) -> torch.Tensor:
    """Arithmetic return from the close of t+1 to the close of t+1+h, ``[t, n]``.

    On an exit day without a trade the last close before it stands, as in
    `data_handlers.labels`; NaN where the stock does not trade at t+1.
    """
    out = torch.full_like(close, torch.nan)
    if len(close) > horizon + 1:
        held = metrics.forward_fill(close)
        out[: -horizon - 1] = held[horizon + 1 :] / close[1:-horizon] - 1
    return out


def _universe_of(dataset: Any) -> str:
    """Name of the pool as the handler was given it."""
    instruments = getattr(getattr(dataset, "handler", None), "instruments", None)
    if isinstance(instruments, str):
        return instruments
    if isinstance(instruments, dict) and "market" in instruments:
        return str(instruments["market"])
    return "stocks with a score"
