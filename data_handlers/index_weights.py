"""Weights of an index's members, point in time.

They are the store's `$weight_<market>`; without them the members of the day share 1
equally, and `IndexWeights.source` says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data import D
from qlib.log import get_module_logger

from data_handlers.expression.loading import read_values
from data_handlers.fields import known_fields
from data_handlers.panel import scatter
from data_handlers.universe import instrument_spans, membership_mask

__all__ = ["IndexWeights", "load_index_weights"]

logger = get_module_logger("data_handlers")


@dataclass(frozen=True)
class IndexWeights:
    """Weights of an index's members, and where they come from.

    Attributes
    ----------
    weights : DataFrame [t, n]
        At the close of each day; every row sums to 1, 0 for non-members.
    source : str
        In words.
    """

    weights: pd.DataFrame
    source: str

    def at(self, date: pd.Timestamp) -> pd.Series:
        """Weights of a day, or of the last day before it that has any.

        Raises
        ------
        ValueError
            If there is no such day.
        """
        row = self.weights.index.searchsorted(date, "right") - 1
        if row < 0:
            raise ValueError(
                f"there are no index weights up to {date:%Y-%m-%d}: the lists of the "
                f"index begin on {self.weights.index[0]:%Y-%m-%d}; set the back-test's "
                "`start_time` to the trading day after."
            )
        return self.weights.iloc[row]


def load_index_weights(market: str, start_time: Any, end_time: Any) -> IndexWeights:
    """Read an index's weights from the store, point in time.

    Parameters
    ----------
    market : str
        Name of a market of the store, "csi300" say.
    start_time, end_time : date

    Raises
    ------
    ValueError
        If the market has no member in the range.
    """
    calendar = pd.DatetimeIndex(D.calendar(start_time, end_time))
    spans = instrument_spans(market, start_time, end_time) or {}
    names = sorted(spans)
    if not names or not len(calendar):
        raise ValueError(
            f"`market` {market!r} has no member from {start_time} to {end_time}."
        )
    field = f"weight_{market}"
    source = "members of the day, equally weighted (the store has no index weights)"
    if known_fields([field], names, start_time, end_time, sample=len(names)):
        frame = read_values(names, [f"${field}"], calendar[0], calendar[-1])
        values = np.nan_to_num(scatter(frame.iloc[:, 0], calendar, names))
        told = _told_of(market)
        source = f"$weight_{market} of the store" + (f" ({told})" if told else "")
    else:
        values = membership_mask(spans, calendar, names).astype(np.float64)
        logger.warning(f"{market}: {source}.")
    total = values.sum(1, keepdims=True)
    some = total[:, 0] > 0
    weights = pd.DataFrame(values[some] / total[some], calendar[some], names)
    return IndexWeights(weights, source)


def _told_of(market: str) -> str:
    """Quote the store's own description of an index's weights."""
    path = Path(C.dpm.get_data_uri("day")) / "meta.json"
    if not path.is_file():
        return ""
    told = json.loads(path.read_text(encoding="utf-8")).get("index_members", {})
    about = told.get(market, {})
    words = f"{about['weights']} weights" if "weights" in about else ""
    held, listed = about.get("members_in_store"), about.get("members_listed")
    if held is not None and listed is not None and held < listed:
        words += f"; {held} of {listed} members are in the store"
    return words
