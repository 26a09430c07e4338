"""What every record shares: files that anybody may open, and the page's last line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from qlib.log import get_module_logger
from qlib.workflow.record_temp import ACRecordTemp

from data_handlers.arguments import NamedArguments
from qlib_ext.recorders import metric_name, save_files

__all__ = ["FileRecord", "ModelRecord", "first_column", "flat", "footer"]

logger = get_module_logger("qlib_ext.report")


class FileRecord(NamedArguments, ACRecordTemp):
    """A record of frames, pages and figures in files that anybody may open.

    Attributes
    ----------
    leaves : tuple of str
        Artifacts that every run leaves.
    """

    leaves: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recorder: Any, skip_existing: bool = False) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return [*self.leaves]

    def log(self, figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
        """Log figures as metrics; return those that are finite, which alone count."""
        known = {k: float(v) for k, v in figures.items() if np.isfinite(v)}
        self.recorder.log_metrics(
            **{metric_name(f"{prefix}{k}"): v for k, v in known.items()}
        )
        return known

    def save(self, **objects: object) -> None:
        """Write frames as Parquet, text and JSON as such; nothing is pickled."""
        save_files(self.recorder, objects, self.get_path())
        if "report.html" in objects:
            logger.info(
                f"Report saved: recorder {self.recorder.id}, artifact "
                f"{self.get_path('report.html')}; `qlib-ext report` copies it out."
            )


class ModelRecord(FileRecord):
    """Base of the records of what one kind of model can tell of itself."""

    depend_cls = None
    asks: ClassVar[str]  # the model's method that is asked
    due: ClassVar[str]  # what the model must do or be, in words

    def __init__(
        self,
        recorder: Any,
        model: Any = None,
        dataset: Any = None,
        segment: str = "test",
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        if not hasattr(model, self.asks):
            raise ValueError(f"`model` must {self.due}, got {type(model).__name__}.")


def first_column(frame: pd.DataFrame | pd.Series, name: str) -> pd.Series:
    """Return the score of a prediction; an error where it holds none."""
    series = frame.iloc[:, 0] if isinstance(frame, pd.DataFrame) else frame
    if {"datetime", "instrument"} - set(series.index.names):
        raise ValueError(
            f"{name} must have the index levels datetime and instrument, got "
            f"{list(series.index.names)}; name them by `rename_axis`."
        )
    series = series.rename(name)
    if not np.isfinite(series.to_numpy(float)).any():
        raise ValueError(f"{name} holds no finite score; see the training log.")
    return series


def flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Join column levels by a slash: Parquet keeps plain names."""
    return frame.set_axis(["/".join(map(str, c)) for c in frame.columns], axis=1)


def footer(recorder: Any, costs: bool = False) -> str:
    """Say below a page which recorder it comes from, and whether costs are the rule."""
    free = "No costs and no price limits unless stated; research, not advice."
    return (
        f"Recorder {recorder.id}, experiment {recorder.experiment_id}. "
        f"{'Research, not advice.' if costs else free}"
    )
