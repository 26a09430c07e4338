"""Figures that sell-side reports print for the systems built here.

They come from licensed all-A-share data, other days and other costs (pages of
docs/systems): something to look at beside one's own, never comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["REPORTED", "Reported", "reported_for"]


@dataclass(frozen=True)
class Reported:
    """One reported result.

    Attributes
    ----------
    system, source : str
    rank_ic, ic_ir : float
        Mean RankIC as a fraction, and mean / standard deviation as that report states
        it (`annual` says whether annualised).
    annual : bool
    other : str
        Further figures in the report's words.
    model, handler : str
        Class names that this result belongs to; `handler` may be empty.
    multi : bool, optional
        More than one factor unit; None where it does not matter.
    """

    system: str
    source: str
    rank_ic: float
    ic_ir: float
    annual: bool
    other: str
    model: str
    handler: str = ""
    multi: bool | None = None

    def text(self) -> str:
        """RankIC and IC_IR in a few characters."""
        kind = "annual IR" if self.annual else "IR"
        return f"{100 * self.rank_ic:.2f} %, {kind} {self.ic_ir:g}"


_ORIENT = "Orient Securities, factor series 91, 2023-06; 2017-01 to 2023-04, all A"
_NORTHEAST = "Northeast Securities, machine learning 9, 2025-05"
_KAIYUAN = "Kaiyuan Securities, market microstructure 32, 2026-01"


def _rnn(handler: str, name: str, single: float, multi: float) -> list[Reported]:
    return [
        Reported(
            f"RNN {name}, {'multi' if many else 'single'}-factor",
            _ORIENT,
            value,
            1.4,
            False,
            "IC_IR is about 1.4 for all of them",
            "MultiFactorRNN",
            handler,
            many,
        )
        for many, value in ((False, single), (True, multi))
    ]


REPORTED: tuple[Reported, ...] = (
    *_rnn("DayHandler", "day", 0.1342, 0.1328),
    *_rnn("MsHandler", "ms", 0.1308, 0.1346),
    *_rnn("Level2Handler", "l2", 0.1095, 0.1121),
    Reported(
        "Mamba-MoE",
        _NORTHEAST,
        0.1322,
        1.28,
        False,
        "long-only 33.01 %, long-short Sharpe 9.25, drawdown 12.21 %",
        "MambaMoE",
    ),
    Reported(
        "GRU+GAT_SA",
        _KAIYUAN,
        0.115,
        5.9,
        True,
        "long-short 58.3 %, IR 5.3, drawdown 5.8 %, long-only 22.1 %",
        "GRUGAT",
    ),
)


def reported_for(params: Mapping[str, str]) -> Reported | None:
    """Find the reported result of the system that a recorder's parameters name.

    Parameters
    ----------
    params : mapping
        Flattened task configuration as Qlib logs it, such as ``model.class``.
    """
    model = params.get("model.class", "")
    handler = params.get("dataset.kwargs.handler.class", "")
    units = params.get("model.kwargs.n_factors", "64")
    many = units.isdigit() and int(units) > 1
    for item in REPORTED:
        if (
            item.model == model
            and item.handler in ("", handler)
            and item.multi in (None, many)
        ):
            return item
    return None
