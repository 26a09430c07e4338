"""Who belongs to a universe on which days, whatever spells it for Qlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from qlib.data import D
from qlib.log import get_module_logger

from data_handlers.codes import is_index, spelt

__all__ = ["instrument_spans", "membership_mask", "membership_spans", "universe"]


def instrument_spans(
    instruments: str | dict | Sequence[str] | None,
    start_time: pd.Timestamp | None = None,
    end_time: pd.Timestamp | None = None,
    freq: str = "day",
    filter_pipe: list | None = None,
) -> dict[str, list] | None:
    """Resolve what Qlib accepts as `instruments` to membership spans.

    Returns
    -------
    dict or None
        ``{code: [(start, end), ...]}``, an empty list meaning "always"; None means
        no restriction at all. A-share codes are in upper case, however the store
        writes them.
    """
    found = _spans(instruments, start_time, end_time, freq, filter_pipe)
    if found is None:
        return None
    out: dict[str, list] = {}
    for code, spans in found.items():
        out.setdefault(spelt(code), []).extend(spans)
    return out


def universe(
    instruments: Any,
    freq: str = "day",
    filter_pipe: list | None = None,
    stocks_only: bool = True,
) -> Any:
    """Spell a universe as the rest of the package does, without indices.

    Index pools, boards and saved factors are looked up by codes in upper case, and an
    index is no stock to rank among others. A list names what is meant: it keeps its
    indices.

    Parameters
    ----------
    instruments : str, dict, list or None
        As Qlib takes them.
    freq, filter_pipe
        As in `instrument_spans`.
    stocks_only : bool, default True
        Whether indices among the stocks of a market are left out, with a warning.

    Returns
    -------
    str, dict, list or None
        `instruments` itself where nothing is to be changed, else spans by code or a
        list.
    """
    found = _spans(instruments, None, None, freq, filter_pipe)
    if found is None:
        return instruments
    spans = instrument_spans(found)
    assert spans is not None
    log = get_module_logger("data_handlers")
    indices: list[str] = []
    if stocks_only and not isinstance(instruments, (list, tuple)):
        indices = sorted(code for code in spans if is_index(code))
    if indices and len(indices) < len(spans):
        log.warning(
            f"{len(indices)} of {len(spans)} members of `instruments` {instruments!r} "
            f"are indices, left out of the cross-section: {_some(indices)}. Take them "
            "out of its file in instruments/, or give the codes as a list to keep them."
        )
        spans = {code: s for code, s in spans.items() if code not in indices}
    elif not found.keys() - spans.keys():
        return instruments
    if lower := sorted(found.keys() - spans.keys() - set(indices)):
        log.warning(
            f"`instruments` {instruments!r} has codes in lower case, read in upper "
            f"case: {_some(lower)}."
        )
    return list(spans) if isinstance(instruments, (list, tuple)) else spans


def _some(codes: list[str]) -> str:
    return ", ".join(codes[:10]) + (", ..." if len(codes) > 10 else "")


def _spans(instruments, start_time, end_time, freq, filter_pipe) -> dict | None:
    """`instrument_spans` in the store's own spelling."""
    if instruments is None:
        return None
    if isinstance(instruments, str):
        instruments = D.instruments(instruments, filter_pipe=filter_pipe)
    if isinstance(instruments, Mapping):
        if "market" in instruments:
            try:
                return D.list_instruments(
                    instruments=dict(instruments),
                    start_time=start_time,
                    end_time=end_time,
                    freq=freq,
                    as_list=False,
                )
            except ValueError as error:
                raise ValueError(
                    f"Market {instruments['market']!r}: {error}. A market is a file "
                    "instruments/<market>.txt in Qlib's data folder."
                ) from error
        return {str(k): list(v) for k, v in instruments.items()}
    if not isinstance(instruments, Iterable):
        raise ValueError(
            "`instruments` must be a market name, a list of codes, a Qlib instrument "
            f"config or None, got {instruments!r}."
        )
    return {str(code): [] for code in instruments}


def membership_mask(
    spans: Mapping[str, Sequence[tuple]] | None,
    days: pd.DatetimeIndex,
    instruments: Iterable[str],
) -> np.ndarray:
    """Whether each instrument is a member on each day.

    Parameters
    ----------
    spans : mapping or None
        As `instrument_spans` gives them; an instrument that is not there never belongs.
    days : DatetimeIndex [t]
    instruments : iterable of str [n]

    Returns
    -------
    ndarray of bool [t, n]
    """
    names = list(instruments)
    if spans is None:
        return np.ones((len(days), len(names)), bool)
    mask = np.zeros((len(days), len(names)), bool)
    for column, name in enumerate(names):
        parts = spans.get(name, ())
        mask[:, column] = name in spans and not parts
        for start, end in parts:
            first = days.searchsorted(pd.Timestamp(start), "left")
            last = days.searchsorted(pd.Timestamp(end), "right")
            mask[first:last, column] = True
    return mask


def membership_spans(
    member: np.ndarray, codes: Sequence[str], days: pd.DatetimeIndex
) -> pd.DataFrame:
    """Membership by day as spans, the lines of a market's file.

    Parameters
    ----------
    member : ndarray of bool [t, n]
    codes : sequence of str [n]
    days : DatetimeIndex [t]

    Returns
    -------
    DataFrame
        ``instrument``, ``start``, ``end``, both days included.
    """
    edge = np.diff(np.pad(member.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    starts, ends = np.nonzero(edge.T == 1), np.nonzero(edge.T == -1)
    return pd.DataFrame(
        {
            "instrument": np.asarray(codes, dtype=object)[starts[0]],
            "start": days[starts[1]],
            "end": days[ends[1] - 1],
        }
    )
