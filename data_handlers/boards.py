"""Rules of the mainland Chinese boards: daily price limits and lots, by code.

=====================  ======================================================
main board             10 %, ST stocks 5 %
ChiNext (SZ30)         20 % since 2020-08-24, also ST; before as the main board
STAR (SH68)            20 %
Beijing                30 %
=====================  ======================================================

`[gap]` A newly listed stock is taken to have no limit on the first day (the main board
had one of 44 % until 2023-04-10), and none on the first five days on STAR, on ChiNext
since 2020-08-24 and on the main board since 2023-04-10.

Lots: multiples of 100 shares; STAR at least 200, then single shares; Beijing at least
100, then single shares. A whole holding may be sold whatever its size.

Glossary: t days.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

__all__ = [
    "AT_LIMIT",
    "CHINEXT_REFORM",
    "NEAR_LIMIT",
    "Lots",
    "board_of",
    "free_days",
    "limit_ratio",
    "lot_rule",
]

CHINEXT_REFORM = pd.Timestamp("2020-08-24")
_REGISTRATION = pd.Timestamp("2023-04-10")
# A price within this fraction of a limit stands at it: prices are float32.
AT_LIMIT = 1e-5
# Without a factor the cent is unknown; a move so close to the limit has reached it.
NEAR_LIMIT = 0.0015


def board_of(instrument: str) -> str:
    """Board of a Qlib code: "main", "chinext", "star" or "beijing"."""
    exchange, number = instrument[:2].upper(), instrument[2:]
    if exchange == "BJ":
        return "beijing"
    if exchange == "SZ" and number.startswith("30"):
        return "chinext"
    if exchange == "SH" and number.startswith("68"):
        return "star"
    return "main"


class Lots(NamedTuple):
    """Smallest order and step above it, in shares."""

    least: int
    step: int


def lot_rule(instrument: str) -> Lots:
    """Lot size of a Qlib code."""
    return {
        "star": Lots(200, 1),
        "beijing": Lots(100, 1),
    }.get(board_of(instrument), Lots(100, 100))


def limit_ratio(
    board: str, days: pd.DatetimeIndex, st: np.ndarray | bool = False
) -> np.ndarray:
    """Daily price limit of a stock, as a fraction of the previous close.

    Parameters
    ----------
    board : str
        As `board_of` gives it.
    days : DatetimeIndex [t]
    st : bool or ndarray of bool [t], default False
        Days of special treatment.

    Returns
    -------
    ndarray [t]
    """
    main = np.where(np.broadcast_to(st, len(days)), 0.05, 0.10)
    if board == "star":
        return np.full(len(days), 0.20)
    if board == "beijing":
        return np.full(len(days), 0.30)
    if board == "chinext":
        return np.where(days >= CHINEXT_REFORM, 0.20, main)
    return main


def free_days(board: str, days: pd.DatetimeIndex) -> np.ndarray:
    """First trading days of a listing that have no limit, by the rule of each day."""
    if board == "star":
        return np.full(len(days), 5)
    if board == "beijing":
        return np.full(len(days), 1)
    since = CHINEXT_REFORM if board == "chinext" else _REGISTRATION
    return np.where(days >= since, 5, 1)
