"""Compare what two stores gave for the same days."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from qlib_ext.audit.subject import groups_of

__all__ = ["Difference", "compare_frames", "compare_rows", "compare_scores"]

# Differences up to this share of a column's spread are rounding: sums over another
# number of rows. Anything that another future moves is larger by orders of magnitude.
ROUNDING = 1e-5
# Scores pass through a whole network, and through a standardisation over the day.
SCORE_ROUNDING = 1e-3


@dataclass
class Difference:
    """How two versions of the same values differ.

    Attributes
    ----------
    what : str
    until : Timestamp
        Last day compared.
    values : int
        Compared; both missing counts as equal.
    differing : int
        Not bit for bit the same.
    beyond : int
        Different by more than rounding.
    largest : float
        In standard deviations of its column.
    lost, added : int
        Rows on one side only.
    columns : list of str
        The first few that differ beyond rounding.
    first : Timestamp or None
        Earliest day that does.
    """

    what: str
    until: pd.Timestamp
    values: int = 0
    differing: int = 0
    beyond: int = 0
    largest: float = 0.0
    lost: int = 0
    added: int = 0
    columns: tuple[str, ...] = ()
    first: pd.Timestamp | None = None

    @property
    def leaks(self) -> bool:
        """Whether the difference is more than rounding."""
        return bool(self.beyond or self.lost or self.added)

    def text(self) -> str:
        """Say it in a phrase."""
        if not self.values and not self.leaks:
            return "nothing to compare"
        parts = []
        if self.lost or self.added:
            parts.append(f"{self.lost} rows gone, {self.added} new")
        if self.beyond:
            names = ", ".join(self.columns)
            parts.append(
                f"{self.beyond:,} of {self.values:,} values differ"
                + (f" ({names})" if names else "")
                + (f", from {self.first:%Y-%m-%d} on" if self.first else "")
            )
        if parts:
            return "; ".join(parts)
        if self.differing:
            return (
                f"equal but for rounding: {self.differing:,} of {self.values:,} values "
                f"differ, by {self.largest:.0e} standard deviations at most"
            )
        return f"{self.values:,} values equal bit for bit"

    def row(self) -> dict:
        """Columns of a table."""
        return {
            "until": f"{self.until:%Y-%m-%d}",
            "values": self.values,
            "not equal": self.differing,
            "beyond rounding": self.beyond,
            "largest, std": f"{self.largest:.1e}" if self.differing else "0",
            "rows gone": self.lost,
            "rows new": self.added,
            "what differs": ", ".join(self.columns),
        }


def compare_rows(
    what: str, want: pd.Index, got: pd.Index, until: pd.Timestamp
) -> Difference:
    """Compare which rows there are up to a day."""
    want, got = (i[i.get_level_values("datetime") <= until] for i in (want, got))
    lost, added = want.difference(got), got.difference(want)
    days = lost.append(added).get_level_values("datetime")
    return Difference(
        what,
        until,
        values=len(want),
        lost=len(lost),
        added=len(added),
        first=None if len(days) == 0 else days.min(),
    )


def compare_frames(
    want: dict[str, pd.DataFrame],
    got: dict[str, pd.DataFrame],
    day: pd.Timestamp,
    label_until: pd.Timestamp | None,
) -> list[Difference]:
    """Compare raw, infer and learn frames, group by group.

    Parameters
    ----------
    want, got : dict
    day : Timestamp
        Features and what else is no label are compared up to it.
    label_until : Timestamp or None
        Labels, and which rows the learning frame has, up to it; None leaves them out.
    """
    found = []
    for key, frame in want.items():
        other = got[key]
        for group in groups_of(frame):
            until = label_until if group == "label" else day
            if until is None:
                continue
            what = f"{key} {group}"
            a, b = _of_group(frame, group), _of_group(other, group)
            if b is None or list(a.columns) != list(b.columns):
                missing = Difference(what, until, lost=len(a))
                missing.columns = ("the columns themselves",)
                found.append(missing)
                continue
            # Labels may decide which rows are learned from, not what is in them.
            rows = label_until if key == "learn" else until
            found.append(_compare(what, a, b, until, ROUNDING, rows, (frame, other)))
    return found


def compare_scores(
    what: str, want: pd.Series, got: pd.Series, until: pd.Timestamp
) -> Difference:
    """Compare scores up to a day."""
    return _compare(
        what, want.to_frame("score"), got.to_frame("score"), until, SCORE_ROUNDING
    )


def _of_group(frame: pd.DataFrame, group: str) -> pd.DataFrame:
    if frame.columns.nlevels < 2:
        return frame
    return frame.loc[:, frame.columns.get_level_values(0) == group]


def _held(frame: pd.DataFrame) -> pd.Index:
    """Rows with a feature.

    A stock that is suspended at the cut and trades again has rows without one, and none
    if nothing follows: what a processor or a model makes of them is compared itself.
    """
    return frame.index[_of_group(frame, "feature").notna().any(axis=1)]


def _compare(what, a, b, until, tolerance, rows_until=None, whole=None) -> Difference:
    rows_until = min(until, rows_until or until)
    rows = compare_rows(what, a.index, b.index, rows_until)
    if rows.leaks and whole is not None:
        rows = compare_rows(what, _held(whole[0]), _held(whole[1]), rows_until)
    common = a.index[a.index.get_level_values("datetime") <= until]
    common = common.intersection(b.index)
    result = Difference(what, until, lost=rows.lost, added=rows.added, first=rows.first)
    if not len(common):
        return result
    days = common.get_level_values("datetime")
    left, right = a.loc[common], b.loc[common]
    worst, names = 0.0, []
    for at in range(left.shape[1]):
        name = left.columns[at]
        x, y = left.iloc[:, at], right.iloc[:, at]
        result.values += len(x)
        if x.dtype.kind not in "fiub" or y.dtype.kind not in "fiub":
            off = ~((x == y) | (x.isna() & y.isna())).to_numpy(bool)
            far = off
        else:
            u, v = x.to_numpy(float), y.to_numpy(float)
            off = ~((u == v) | (np.isnan(u) & np.isnan(v)))
            if not off.any():
                continue
            finite = u[np.isfinite(u)]
            spread = float(finite.std()) if len(finite) else 0.0
            spread = spread or float(np.abs(finite).max(initial=1e-12))
            with np.errstate(invalid="ignore"):
                size = np.abs(u - v) / spread
            far = off & ~(size <= tolerance)  # a value on one side only is far
            known = size[off & np.isfinite(size)]
            worst = max(worst, float(known.max(initial=0.0)))
        result.differing += int(off.sum())
        result.beyond += int(far.sum())
        if far.any():
            names.append(str(name[-1] if isinstance(name, tuple) else name))
            first = days[far].min()
            result.first = first if result.first is None else min(result.first, first)
    result.largest, result.columns = worst, tuple(names[:4])
    return result
