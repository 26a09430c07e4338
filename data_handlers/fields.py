"""Which fields a Qlib store holds."""

from __future__ import annotations

from typing import Any

import numpy as np
from qlib.data import D

__all__ = ["known_fields"]


def known_fields(
    fields: list[str],
    instruments: Any = "all",
    start_time: Any = None,
    end_time: Any = None,
    freq: str = "day",
    sample: int = 12,
) -> list[str]:
    """Fields of which at least one sampled instrument has a value.

    Qlib answers a field that does not exist with NaN, so asking is the only test that
    works with every data provider.

    Parameters
    ----------
    fields : list of str
        Names without `$`.
    instruments : str, dict or list
        Universe, as a handler takes it.
    start_time, end_time : str or Timestamp, optional
    freq : str, default "day"
    sample : int, default 12
        Instruments looked at, evenly spread over the sorted universe.

    Raises
    ------
    ValueError
        If the universe has no instrument in the time range.
    """
    if isinstance(instruments, (list, tuple)):
        names = sorted(instruments)
    else:
        if instruments is None or isinstance(instruments, str):
            config = D.instruments(instruments or "all")
        else:
            config = instruments
        names = sorted(
            D.list_instruments(config, start_time, end_time, freq=freq, as_list=True)
        )
    if not names:
        raise ValueError(
            f"`instruments` {instruments!r} has no member between {start_time} and "
            f"{end_time}: check the name, the dates and `provider_uri`."
        )
    at = np.unique(np.linspace(0, len(names) - 1, sample).astype(int))
    loaded = D.features(
        [names[i] for i in at],
        [f"${name}" for name in fields],
        start_time,
        end_time,
        freq=freq,
    )
    found = loaded.notna().any()
    return [name for name in fields if found[f"${name}"]]
