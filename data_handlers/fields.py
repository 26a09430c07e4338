"""Which fields a Qlib store holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data import D

__all__ = ["calendar_days", "check_store", "known_fields", "require_fields"]

_STRAY = (
    0.05  # of a calendar on weekends; more of them are an exchange that trades then
)
_FIELD = re.compile(r"(?<!\$)\$([A-Za-z_]\w*)")


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
    spans = isinstance(instruments, Mapping) and "market" not in instruments
    if spans or isinstance(instruments, (list, tuple)):
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
    asked = [names[i] for i in at]
    # Most fields are those of any instrument: one is asked alone, in this process.
    one = asked.pop(len(asked) // 2)
    left = list(fields)
    for group in ([one], asked):
        if group and left:
            columns = [f"${name}" for name in left]
            loaded = D.features(group, columns, start_time, end_time, freq=freq)
            left = [
                n for n, x in zip(left, columns, strict=True) if loaded[x].isna().all()
            ]
    if len(left) == len(fields):
        check_store(freq)  # the cause, if it is the store's
    return [name for name in fields if name not in left]


def require_fields(
    needs: Mapping[str, str],
    instruments: Any = "all",
    start_time: Any = None,
    end_time: Any = None,
    freq: str = "day",
) -> None:
    """Raise if an expression names a field of which the store has no value.

    Qlib answers such a field with NaN, and a feature made of it is 0 throughout once
    it is standardised.

    Parameters
    ----------
    needs : mapping of str to str
        What is wanted, for the message, to its Qlib expression.
    instruments, start_time, end_time, freq
        As in `known_fields`.

    Raises
    ------
    ValueError
        Naming the field, what needs it, and the cause where the store shows it.
    """
    check_store(freq)
    by_field: dict[str, list[str]] = {}
    for name, expression in needs.items():
        for field in dict.fromkeys(_FIELD.findall(expression)):
            by_field.setdefault(field, []).append(name)
    where = (instruments, start_time, end_time, freq)
    absent = set(by_field) - set(known_fields(list(by_field), *where))
    if absent:  # a field that few stocks have may have been missed
        absent -= set(known_fields(sorted(absent), *where, sample=1_000_000))
    if absent:
        told = "; ".join(
            f"`${field}`, which {', '.join(by_field[field][:5])} needs"
            for field in sorted(absent)
        )
        raise ValueError(
            f"the store has no value of {told}, for `instruments` {_short(instruments)}"
            f" between {start_time} and {end_time}: add the field to the store, or "
            "leave out what needs it."
        )


def check_store(freq: str = "day") -> None:
    """Raise on what makes Qlib read a local store wrongly or not at all.

    Raises
    ------
    ValueError
        For a calendar that `calendar_days` refuses, lines of instruments without their
        days, or feature folders that are not in lower case.
    """
    folder = Path(C.dpm.get_data_uri(freq))
    file = folder / "calendars" / f"{freq}.txt"
    if file.is_file():  # Qlib may drop the second line, and the bins count lines
        calendar_days(file)
    for file in sorted((folder / "instruments").glob("*.txt")):
        _check_instruments(file)
    if (folder / "features").is_dir():
        upper = sorted(
            path.name
            for path in (folder / "features").iterdir()
            if path.name != path.name.lower() and path.is_dir()
        )
        if upper:
            raise ValueError(
                f"{folder / 'features'} has {len(upper)} folder(s) in upper case, "
                f"first {upper[0]}: Qlib looks for {upper[0].lower()} and finds no "
                "value there. Rename them to lower case."
            )


def _check_instruments(file: Path) -> None:
    """Refuse lines from which Qlib would read no days, leaving them out in silence."""
    lines = file.read_bytes().decode("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip() and line.count("\t") < 2:
            raise ValueError(
                f"{file}, line {number}, is no instrument with its first and last day: "
                f"{line[:60]!r}. Write the three with tabs between them."
            )


def calendar_days(file: Path) -> pd.DatetimeIndex:
    """Read a calendar file of a Qlib store.

    Raises
    ------
    ValueError
        If it has no days, a line that is no date, a day twice, days out of order, or a
        stray weekend; the message names the file and what to do.
    """
    text = file.read_bytes().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.split("\n")]
    days = pd.to_datetime(pd.Series(lines), errors="coerce", format="mixed")
    wrong = [n for n, x in enumerate(lines) if x and pd.isna(days[n])]
    if wrong:
        at = wrong[0]
        mark = ", with a byte-order mark before it" if lines[at][:1] == "\ufeff" else ""
        raise ValueError(
            f"{file}, line {at + 1}, is no date: {lines[at].lstrip(chr(0xFEFF))[:40]!r}"
            f"{mark}. Write one day a line, such as 2020-01-02, in plain UTF-8."
        )
    calendar = pd.DatetimeIndex(days.dropna())
    if calendar.empty:
        raise ValueError(f"{file} has no day; write the store again.")
    if len(twice := calendar[calendar.duplicated()]):
        raise ValueError(
            f"{file} has {twice[0]:%Y-%m-%d} twice: every value behind it is read a "
            "day off. Take the second line out if the feature files were written "
            "without it, else write the store again."
        )
    if not calendar.is_monotonic_increasing:
        at = int(np.argmax(np.diff(calendar.to_numpy()) < np.timedelta64(0)))
        raise ValueError(
            f"{file} has {calendar[at + 1]:%Y-%m-%d} behind {calendar[at]:%Y-%m-%d}: "
            "Qlib sorts the days, and the bins count lines, so values are read on "
            "other days. Write the store again."
        )
    weekend = calendar[(calendar == calendar.normalize()) & (calendar.dayofweek >= 5)]
    if 0 < len(weekend) <= max(_STRAY * len(calendar), 1):
        raise ValueError(
            f"{file} has {weekend[0]:%A} {weekend[0]:%Y-%m-%d}, when no exchange "
            "trades: if the feature files were written without it, every value behind "
            "it is read a day off. Take the line out, or write the store again."
        )
    return calendar


def _short(instruments: Any) -> str:
    text = repr(instruments)
    return text if len(text) <= 60 else text[:57] + "..."
