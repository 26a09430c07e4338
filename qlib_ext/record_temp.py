"""Records for Qlib workflows: what is kept of a score, and the factor report."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.config import C
from qlib.data import D
from qlib.log import get_module_logger
from qlib.workflow.record_temp import ACRecordTemp, SignalRecord

from qlib_ext import metrics
from qlib_ext.report import tables
from qlib_ext.report.factor import factor_page

__all__ = ["FactorRecord"]

logger = get_module_logger("qlib_ext.record_temp")

# Label and store agree when their returns correlate so closely on the days of overlap.
_SAME_RETURN = 0.999


class FactorRecord(ACRecordTemp):
    """Evaluate a score as sell-side factor reports do, beside SigAnaRecord.

    Reads ``pred.pkl`` and ``label.pkl`` of `SignalRecord` and closes from the Qlib
    store. Logs the figures as metrics, saves frames as Parquet and one HTML page, all
    under ``factor/``. Works after any Qlib model.

    Conventions: RankIC every `horizon` trading days from the first scored day, IC_IR
    not annualised; layers are rebalanced weekly at the close after the signal, without
    costs; returns annualised over 252 days, geometric unless called a mean. A score or
    label that is NaN or infinite leaves the stock out for that day.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    model, dataset : optional
        Given by Qlib. A model with ``predict_units(dataset, segment)`` has its units
        analysed and saved as ``factor/units.parquet``.
    horizon : int, default 10
        Trading days from entry (close of t+1) to exit of the label.
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
    depend_cls = SignalRecord

    def __init__(
        self,
        recorder: Any,
        model: Any = None,
        dataset: Any = None,
        horizon: int = 10,
        n_layers: int = 20,
        label_col: int = 0,
        oracle_path: str | None = "auto",
        universe: str | None = None,
        label: str | None = None,
        segment: str = "test",
        skip_existing: bool = False,
    ) -> None:
        for name, value, least in (
            ("horizon", horizon, 1),
            ("n_layers", n_layers, 2),
            ("label_col", label_col, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, got {value!r}."
                )
        if oracle_path == "auto":
            beside = Path(f"{C.dpm.get_data_uri('day')}.oracle.parquet")
            oracle_path = str(beside) if beside.is_file() else None
        if oracle_path is not None and not Path(oracle_path).is_file():
            raise ValueError(
                f"`oracle_path` must be an existing Parquet file, got {oracle_path!r}. "
                "The embedded market writes one beside its store; leave it out "
                "elsewhere."
            )
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        self.model = model
        self.dataset = dataset
        self.horizon = horizon
        self.n_layers = n_layers
        self.label_col = label_col
        self.oracle_path = oracle_path
        self.universe = universe
        self.label = label
        self.segment = segment

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = _first_column(self.load("pred.pkl"), "pred.pkl")
        days, instruments, close = _closes(score)
        panel = tables.panel_of(score, days, instruments)
        label, label_words = self._label(days, instruments, close)
        context = tables.Context(
            universe=self.universe or _universe_of(self.dataset),
            label=label_words,
            start=f"{days[0]:%Y-%m-%d}",
            end=f"{days[-1]:%Y-%m-%d}",
            horizon=self.horizon,
            days=len(days),
            stocks=float(torch.isfinite(panel).sum(1).double().mean()),
        )
        scored = len(days)
        evaluation = tables.evaluate(
            panel,
            label,
            days,
            context,
            close=close[:scored],
            n_layers=self.n_layers,
            oracle=self._oracle(days, instruments),
        )
        objects: dict[str, object] = {}
        units = self._units()
        if units is not None:
            objects["units.parquet"] = units
            if units.shape[1] > 1:
                sampled = evaluation.frames["rank_ic"]["sampled"].to_numpy()
                table, correlation, figures = tables.unit_table(
                    {
                        str(name): tables.panel_of(column, days[sampled], instruments)
                        for name, column in units.items()
                    },
                    label[torch.from_numpy(sampled)],
                )
                evaluation.frames |= {"units": table, "unit_correlation": correlation}
                evaluation.figures |= figures
        known = {k: v for k, v in evaluation.figures.items() if np.isfinite(v)}
        self.recorder.log_metrics(**known)
        for name, frame in evaluation.frames.items():
            # `units.parquet` holds the units' values, their table goes beside it.
            objects[f"{'unit_table' if name == 'units' else name}.parquet"] = frame
        objects["context.json"] = {**asdict(context), "figures": known}
        page = factor_page(evaluation, self._title())
        objects["report.html"] = page.render(_footer(self.recorder))
        return objects

    def save(self, **objects: object) -> None:
        """Write frames as Parquet, text and JSON as such; nothing is pickled."""
        with tempfile.TemporaryDirectory() as folder:
            for name, value in objects.items():
                path = Path(folder) / name
                if isinstance(value, pd.DataFrame):
                    value.to_parquet(path)
                elif isinstance(value, str):
                    path.write_text(value, encoding="utf-8")
                else:
                    path.write_text(_json(value), encoding="utf-8")
            self.recorder.save_objects(local_path=folder, artifact_path=self.get_path())
        logger.info(
            f"Factor report saved: recorder {self.recorder.id}, artifact "
            f"{self.get_path('report.html')}; `qlib-ext report` copies it out."
        )

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return ["report.html", "context.json", "rank_ic.parquet", "layers.parquet"]

    def _title(self) -> str:
        model = type(self.model).__name__ if self.model is not None else "score"
        name = getattr(self.recorder, "name", "") or ""
        return f"Factor report: {model}" + (f" ({name})" if name else "")

    def _label(
        self, days: pd.DatetimeIndex, instruments: pd.Index, close: torch.Tensor
    ) -> tuple[torch.Tensor, str]:
        h = self.horizon
        words = f"close of t+1 to close of t+{1 + h}, raw arithmetic return"
        implied = forward_return(close, h)[: len(days)]
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
            raise ValueError(
                f"label.pkl has no value on the {len(days)} days of pred.pkl "
                f"({days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}); give the test segment "
                f"at least {h + 1} trading days before the end of the data."
            )
        if self.label is not None:
            return label, self.label
        match = metrics.ic(label, implied)
        match = match[torch.isfinite(match)]
        if len(match) and float(match.mean()) > _SAME_RETURN:
            return label, words
        logger.warning(
            f"label.pkl is not the return from {words}. The report uses label.pkl; "
            "set `horizon` (it spaces the sampled dates) and `label` (its words)."
        )
        name = series.name[-1] if isinstance(series.name, tuple) else series.name
        return label, f"column {name} of label.pkl (not close t+1 to close t+{1 + h})"

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

    def _units(self) -> pd.DataFrame | None:
        if self.dataset is None or not hasattr(self.model, "predict_units"):
            return None
        units = self.model.predict_units(self.dataset, segment=self.segment)
        return units.astype(np.float32).sort_index()


def forward_return(close: torch.Tensor, horizon: int) -> torch.Tensor:
    """Arithmetic return from the close of t+1 to the close of t+1+h, ``[t, n]``.

    NaN where either close is missing, as Qlib's ``Ref`` gives.
    """
    out = torch.full_like(close, torch.nan)
    if len(close) > horizon + 1:
        out[: -horizon - 1] = close[horizon + 1 :] / close[1:-horizon] - 1
    return out


def _closes(score: pd.Series) -> tuple[pd.DatetimeIndex, pd.Index, torch.Tensor]:
    """Trading days and instruments of the score, and closes up to the store's end."""
    dates = pd.DatetimeIndex(score.index.unique("datetime"))
    instruments = score.index.unique("instrument").sort_values()
    calendar = pd.DatetimeIndex(D.calendar(start_time=dates.min()))
    strange = dates.difference(calendar)
    if len(strange):
        raise ValueError(
            f"pred.pkl has {len(strange)} days that are not in the store's calendar, "
            f"first {strange[0]:%Y-%m-%d}; point `provider_uri` at the store the "
            "predictions were made on."
        )
    frame = D.features(list(instruments), ["$close"], start_time=dates.min())
    close = tables.panel_of(frame["$close"], calendar, instruments)
    scored = calendar[calendar <= dates.max()]
    return scored, instruments, close


def _first_column(frame: pd.DataFrame | pd.Series, name: str) -> pd.Series:
    series = frame.iloc[:, 0] if isinstance(frame, pd.DataFrame) else frame
    series = series.rename(name)
    if not np.isfinite(series.to_numpy(float)).any():
        raise ValueError(f"{name} holds no finite score; see the training log.")
    return series


def _universe_of(dataset: Any) -> str:
    """Name of the pool as the handler was given it."""
    instruments = getattr(getattr(dataset, "handler", None), "instruments", None)
    if isinstance(instruments, str):
        return instruments
    if isinstance(instruments, dict) and "market" in instruments:
        return str(instruments["market"])
    return "stocks with a score"


def _footer(recorder: Any) -> str:
    return (
        f"Recorder {recorder.id}, experiment {recorder.experiment_id}. No costs and no "
        "price limits unless stated; research, not advice."
    )


def _json(value: object) -> str:
    return json.dumps(value, indent=1, default=str)
