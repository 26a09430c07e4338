"""Switch: a day alpha that turns into its opposite and back.

The footprint of the day alpha stays as it is, but what it foretells changes: its
strength on day d is multiplied by ``cos(2 pi d / turning)``. What was learnt in the
first quarter of a turn is worth nothing after it, and wrong in the second; a model has
to go on learning.
"""

import numpy as np

__all__ = ["gains", "strength"]


def strength(days: int, turning: int) -> np.ndarray:
    """Multiplier of the alpha's strength on each day, [days]; 1 without turning."""
    if turning == 0:
        return np.ones(days)
    return np.cos(2 * np.pi * np.arange(days) / turning)


def gains(kappa: float, phi: float, days: int, turning: int, horizon: int):
    """Sum up the log return, close t+1 to close t+horizon+1, per unit of state at t.

    Parameters
    ----------
    kappa, phi : float
        Of the alpha; see `qlib_ext.market.simulate.Alpha`.
    days, turning, horizon : int

    Returns
    -------
    ndarray [days]
    """
    ahead = np.lib.stride_tricks.sliding_window_view(
        strength(days + horizon + 1, turning)[2:], horizon
    )
    return kappa * (ahead[:days] @ phi ** np.arange(1, horizon + 1))
