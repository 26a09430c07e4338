"""Rules of the mainland Chinese boards: daily price limits and lots, by code.

=====================  ======================================================
main board             10 %, ST stocks 5 %
ChiNext (SZ30)         20 % since 2020-08-24, also ST; before as the main board
STAR (SH68)            20 %
Beijing                30 %
convertible bonds      none until 2022-08-01, then 20 %
=====================  ======================================================

`[gap]` A newly listed stock is taken to have no limit on the first day (the main board
had one of 44 % until 2023-04-10), and none on the first five days on STAR, on ChiNext
since 2020-08-24 and on the main board since 2023-04-10.

Lots: multiples of 100 shares; STAR at least 200, then single shares; Beijing at least
100, then single shares; bonds tens. A whole holding may be sold whatever its size.

Bonds are bought and sold on the same day (T+0). Since 2022-08-01 the first day of a
listing has limits of its own, 57.3 % above and 43.3 % below the issue price.

Glossary: t days.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

__all__ = [
    "AT_LIMIT",
    "BOND_FIRST_DAY",
    "BOND_REFORM",
    "CHINEXT_REFORM",
    "NEAR_LIMIT",
    "Lots",
    "board_of",
    "free_days",
    "limit_prices",
    "limit_ratio",
    "lot_rule",
]

CHINEXT_REFORM = pd.Timestamp("2020-08-24")
BOND_REFORM = pd.Timestamp("2022-08-01")
#: Limits of a bond's first day since then, as fractions of the issue price of 100.
BOND_FIRST_DAY = (1.573, 0.567)
_REGISTRATION = pd.Timestamp("2023-04-10")
# A price within this fraction of a limit stands at it: prices are float32.
AT_LIMIT = 1e-5
# Without a factor the cent is unknown; a move so close to the limit has reached it.
NEAR_LIMIT = 0.0015


def board_of(instrument: str) -> str:
    """Board of a Qlib code: main, chinext, star, beijing or convertible."""
    exchange, number = instrument[:2].upper(), instrument[2:]
    if number.startswith("11" if exchange == "SH" else "12") and exchange != "BJ":
        return "convertible"
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
        "convertible": Lots(10, 10),
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
    if board == "convertible":
        return np.where(days >= BOND_REFORM, 0.20, np.inf)
    return main


def limit_prices(
    reference: np.ndarray, ratio: np.ndarray, factor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give the adjusted prices of both limits, rounded to the fen.

    The exchanges round the previous close times (1 ± ratio) to 0.01 CNY, half a fen up;
    below 3.3 CNY that moves the limit by more than 0.15 %.

    Parameters
    ----------
    reference : ndarray
        Adjusted previous close.
    ratio : ndarray
        As `limit_ratio` gives it.
    factor : ndarray
        Adjusted price over price. Where it is unknown (NaN or 0) so is the fen, and the
        limits lie `NEAR_LIMIT` inside the ratio.

    Returns
    -------
    up, down : ndarray
        NaN where reference or ratio is.

    Examples
    --------
    >>> limit_prices(np.array([2.03]), np.array([0.1]), np.array([1.0]))[0].round(2)
    array([2.23])
    """
    known = np.isfinite(factor) & (factor > 0)
    with np.errstate(invalid="ignore"):
        raw = np.round(reference / np.where(known, factor, 1.0), 2)
        # 1e-6 makes up for binary fractions.
        up = np.floor(100 * raw * (1 + ratio) + 0.5 + 1e-6) / 100 * factor
        down = np.floor(100 * raw * (1 - ratio) + 0.5 + 1e-6) / 100 * factor
    return (
        np.where(known, up, reference * (1 + ratio - NEAR_LIMIT)),
        np.where(known, down, reference * (1 - ratio + NEAR_LIMIT)),
    )


def free_days(board: str, days: pd.DatetimeIndex) -> np.ndarray:
    """First trading days of a listing that have no limit, by the rule of each day."""
    if board == "star":
        return np.full(len(days), 5)
    if board in ("beijing", "convertible"):
        return np.full(len(days), 1)
    since = CHINEXT_REFORM if board == "chinext" else _REGISTRATION
    return np.where(days >= since, 5, 1)
