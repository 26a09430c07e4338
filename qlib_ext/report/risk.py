"""Record of the risk factors of a handler: their daily returns, and coverage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from qlib.data import D

from data_handlers.risk import DAILY_RETURN, factor_return_frame, style_coverage
from qlib_ext.report import market_data
from qlib_ext.report.record import FileRecord

__all__ = ["RiskRecord"]


class RiskRecord(FileRecord):
    """Keep the daily returns of country, industry and style factors, and coverage.

    Writes ``risk/factor_returns.parquet`` (see `data_handlers.risk.factor_returns`; row
    t is known at the close of t) and ``risk/coverage.parquet`` (share of known values
    of each risk column by year), over the whole range of the handler.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    dataset : DatasetH
        Whose handler has a `risk` group; `<DATASET>` in a workflow.
    skip_existing : bool, default False
        Leave finished files as they are.
    """

    artifact_path = "risk"
    depend_cls = None

    def __init__(
        self, recorder: Any, dataset: Any = None, skip_existing: bool = False
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        self.dataset = dataset

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        risk = market_data.risk_frame(self.dataset, slice(None))
        if risk is None:
            raise ValueError(
                "`dataset` must have a handler with a `risk` group; use one of "
                "data_handlers."
            )
        frame = pd.concat({"risk": risk}, axis=1)
        dates = frame.index.get_level_values("datetime")
        names = list(frame.index.unique("instrument"))
        returns = D.features(names, [DAILY_RETURN], dates.min(), dates.max())
        table = factor_return_frame(frame, returns.iloc[:, 0].swaplevel())
        annual = {
            f"{name} return": float(value) * 252
            for name, value in table.drop(columns="r2").mean().items()
            if np.isfinite(value) and not str(name).startswith("industry")
        }
        self.recorder.log_metrics(**annual)
        return {
            "factor_returns.parquet": table,
            "coverage.parquet": style_coverage(frame),
        }

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return ["factor_returns.parquet", "coverage.parquet"]
