"""What models know of style returns: the returns of the day, and their recent state.

Glossary: t days, k styles, s inputs from style returns.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import nn

from data_handlers.expression.loading import load_panel
from data_handlers.risk import DAILY_RETURN, RISK_HINT, STYLES, factor_returns
from qlib_ext.dataset import Panel

__all__ = ["style_gate", "style_returns", "style_state"]


STATE_DAYS = (5, 20, 60)
RISK_DAYS = 250  # of the trailing standard deviation of a style return


def style_gate(width: int, count: int) -> nn.Sequential:
    """Make the MLP from `width` inputs of style returns to `count` logits of weights.

    It begins with equal weights; what moves them must be in the data.
    """
    last = nn.Linear(32, count)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, 32), nn.Tanh(), last)


def style_returns(panel: Panel, user: str = "`weighting: sa`") -> pd.DataFrame:
    """Return the daily style returns of a panel's risk group.

    Parameters
    ----------
    panel : Panel
    user : str
        What needs them, for the message.

    Returns
    -------
    DataFrame
        Rows the panel's dates, columns its styles; row t is known at the close of t.

    Raises
    ------
    ValueError
        If the panel has no style exposures.
    """
    styles = [s for s in STYLES if s in panel.risk_names]
    risk = panel.risk
    industry = panel.risk_column("industry")
    if not styles or risk is None:
        raise ValueError(
            f"{user} needs style exposures in the risk group, which has "
            f"{panel.risk_names}: set the handler's `styles`, or do without ("
            f"`weighting` 'equal' or 'learned'). {RISK_HINT}"
        )
    log_mcap = panel.risk_column("log_mcap")
    exposures = risk[..., [panel.risk_names.index(s) for s in styles]].numpy()
    returns, _ = load_panel([DAILY_RETURN], panel.dates, panel.instruments)
    result = factor_returns(
        returns[..., 0],
        exposures,
        np.zeros(exposures.shape[:2]) if industry is None else industry,
        None if log_mcap is None else np.exp(log_mcap.astype(np.float64)),
    )
    return pd.DataFrame(result.style, index=panel.dates, columns=styles)


def style_state(
    returns: np.ndarray, windows: tuple[int, ...] = STATE_DAYS
) -> np.ndarray:
    """Turn daily style returns into the inputs of the relation weights.

    Parameters
    ----------
    returns : ndarray [t, k]
        Daily style returns, NaN unknown; row t is known at the close of t.
    windows : tuple of int, default (5, 20, 60)
        Days.

    Returns
    -------
    float32 ndarray [t, len(windows) k]
        Sums over the last days of each window of the returns in units of their root
        mean square over the last 250 days (at least 20 known), over the square root of
        the days, within ±4. Unknown is 0. Row t uses days up to t only.
    """
    table = pd.DataFrame(np.asarray(returns, np.float64))
    scale = (table**2).rolling(RISK_DAYS, min_periods=20).mean() ** 0.5
    unit = (table / scale.where(scale > 0)).fillna(0.0)
    sums = [
        unit.rolling(days, min_periods=1).sum().to_numpy() / np.sqrt(days)
        for days in windows
    ]
    return np.clip(np.hstack(sums), -4, 4).astype(np.float32)
