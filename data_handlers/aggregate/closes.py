"""Whether stock-days end where the day bars of a store say: other days, other codes."""

from __future__ import annotations

import numpy as np
import pandas as pd

__all__ = ["Closes"]

#: A close is the store's up to here (Shanghai's official ones were means until 2018),
#: and another one's from there on.
_SAME, _FAR = 1e-4, 0.03
_ENOUGH = 20  # stock-days that are compared, or days of a stock
_MOST, _HARDLY, _HALF = 0.8, 0.2, 0.5
_AWAY = ("the day before", "the day after")


class Closes:
    """Compares partitions, one after the other, with the closes of a store.

    Parameters
    ----------
    daily : DataFrame
        Index (datetime, instrument), a column ``close``: as traded.
    """

    def __init__(self, daily: pd.DataFrame) -> None:
        same = daily["close"].dropna().sort_index(level=[1, 0])
        of = same.groupby(level=1, observed=True)
        self._store = pd.DataFrame(
            {"same": same, "before": of.shift(), "after": of.shift(-1)}
        )
        self._counts: list[pd.DataFrame] = []
        self._far: list[pd.DataFrame] = []

    def add(self, rows: pd.DataFrame) -> None:
        """Take in ``instrument``, ``datetime`` and ``close`` of stock-days."""
        keys = pd.MultiIndex.from_frame(rows[["datetime", "instrument"]])
        store = self._store.reindex(keys).to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            off = np.abs(np.log(rows["close"].to_numpy(float)[:, None] / store))
        known = np.isfinite(off[:, 0])
        table = pd.DataFrame(off[known] <= _SAME, columns=["same", *_AWAY])
        table["far"] = far = off[known, 0] > _FAR
        table["days"] = 1
        of = rows["instrument"].to_numpy(object)[known]
        self._counts.append(table.groupby(of).sum())
        self._far.append(rows.loc[known][["instrument", "datetime", "close"]][far])

    def check(self) -> list[str]:
        """Return the stock-days that end far from the store's closes.

        Raises
        ------
        ValueError
            If most do, or those of one stock, and it is plain why.
        """
        if not self._counts:
            return []
        counts = pd.concat(self._counts)
        counts = counts.groupby(level=0).sum().astype(float)
        far = pd.concat(self._far)
        odd = counts[counts["far"] > _HALF * counts["days"]]
        # of the whole, then of each stock that is another's on most days
        for of, what in (
            (counts.sum(), "the stock-days"),
            *((row, "the days of " + str(name)) for name, row in counts.iterrows()),
        ):
            if of["days"] < _ENOUGH or of["same"] > _HARDLY * of["days"]:
                continue
            for away in _AWAY:
                if of[away] > _MOST * of["days"]:
                    raise ValueError(
                        f"Days: {what} end at the store's closes of {away} "
                        f"({of[away]:.0f} of {of['days']:.0f}); mend their dates."
                    )
        for name in map(str, odd.index[odd["days"] >= _ENOUGH][:_ENOUGH]):
            own = far[far["instrument"] == name]
            if other := self._whose(own):
                raise ValueError(
                    f"Codes: {name} ends at the store's closes of {other} on most of "
                    f"{len(own)} days; mend the codes."
                )
        days, off = counts["days"].sum(), counts["far"].sum()
        if days >= _ENOUGH and off > _HALF * days:
            raise ValueError(
                f"Days: {off:,.0f} of {days:,.0f} stock-days end more than {_FAR:.0%} "
                "off the store's closes: of another year, under other codes, or with "
                "adjusted prices? Bars must be as traded."
            )
        return [f"{x.instrument} {x.datetime:%Y-%m-%d}" for x in far.itertuples()]

    def _whose(self, rows: pd.DataFrame) -> str:
        """Code whose closes these are; nothing if they are nobody's."""
        days = self._store.index.get_level_values(0).isin(rows["datetime"])
        store = self._store.loc[days, "same"].reset_index()
        store["tick"] = np.round(np.log(store["same"]), 4)
        rows = rows.assign(tick=np.round(np.log(rows["close"].astype(float)), 4))
        both = rows.merge(store, on=["datetime", "tick"], suffixes=("", "_store"))
        count = both["instrument_store"].value_counts()
        found = len(count) and count.iloc[0] > _MOST * len(rows)
        return str(count.index[0]) if found else ""
