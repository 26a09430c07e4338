"""The style part of a score, taken out and put back by decision.

The loss of a score is nearly flat along the styles of the day, so how far a network
leans on them (low volatility, small turnover) differs from epoch to epoch and from seed
to seed by chance, and early stopping keeps what one validation year paid. The residual
net of industries and styles hardly differs (docs/results.md). With `tilt` the score is

    z(residual) + tilt * z(sum_s w_s X_s)

where z standardises over the day, X_s are the exposures known at its close and w_s the
mean, over the training days, of the coefficients of a cross-sectional regression of the
standardised rank of the return on industries and styles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from data_handlers.cross_section import group_regression, neutralize
from data_handlers.risk import STYLES
from qlib_ext.dataset import Panel
from qlib_ext.nn.cross_section import standardize

__all__ = ["StyleTilt"]

_LEAST = 3  # stocks beyond the regressors, or a day tells nothing


@dataclass(frozen=True)
class StyleTilt:
    """Style exposures of a panel and what may be done with them.

    Shapes: c days, n instruments, s styles.

    Attributes
    ----------
    panel : Panel
        With a `risk` group: `industry` if known, and standardised styles. An unknown
        exposure counts as the average one, an unknown industry as one of its own.
    styles : tuple of str
        All styles of the panel; a residual is net of all of them.
    tilted : tuple of str
        Those that may be in the style part.
    """

    panel: Panel
    styles: tuple[str, ...]
    tilted: tuple[str, ...]

    @classmethod
    def of(cls, panel: Panel, tilted: list[str] | None = None) -> StyleTilt:
        """Read the styles of a panel.

        Raises
        ------
        ValueError
            If the panel has none, or lacks one of `tilted`.
        """
        styles = tuple(name for name in panel.risk_names if name in STYLES)
        if not styles:
            raise ValueError(
                "`tilt` and `stop_on: residual` need style exposures, but the data's "
                f"risk group is {panel.risk_names}: take a handler of data_handlers, "
                "or add the processors AddRisk and CSStyleExposure of "
                "data_handlers.risk to yours."
            )
        for name in tilted or ():
            if name not in styles:
                raise ValueError(
                    f"`tilt_styles` names {name!r}; the data has {list(styles)}."
                )
        return cls(panel, styles, styles if tilted is None else tuple(tilted))

    def residual(self, score: torch.Tensor, days: np.ndarray) -> torch.Tensor:
        """Residual [c, n, 1] of a score net of industries and styles, standardised.

        Parameters
        ----------
        score : Tensor [c, n, 1]
        days : int array [c]
        """
        mask = self.panel.present[days]
        y = torch.where(mask.unsqueeze(-1), score, torch.nan).numpy()
        left = neutralize(y, self._industry(days), self._exposures(days), None)
        return standardize(torch.from_numpy(np.nan_to_num(left)), mask)

    def learn(self, days: np.ndarray, returns: torch.Tensor) -> dict[str, float]:
        """Mean coefficient of each tilted style over the days.

        Parameters
        ----------
        days : int array [c]
            Training days.
        returns : Tensor [t, n]
            Forward returns of the panel, NaN where unknown.
        """
        sums, count = np.zeros(len(self.styles)), 0
        for day in days:
            y = returns[day].numpy().astype(np.float64)
            use = np.isfinite(y) & self.panel.present[day].numpy()
            code = self._industry(np.array([day]))[0]
            _, group = np.unique(code, return_inverse=True)
            if use.sum() < len(np.unique(group[use])) + len(self.styles) + _LEAST:
                continue
            rank = np.zeros(len(y))
            rank[use] = rankdata(y[use])
            deviation = rank[use].std()
            if deviation == 0:
                continue
            rank[use] = (rank[use] - rank[use].mean()) / deviation
            x = self._exposures(np.array([day]))
            _, beta, _ = group_regression(
                rank[None, :, None],
                use[None],
                group[None],
                int(group.max()) + 1,
                np.moveaxis(x, 2, 1).astype(np.float64),
            )
            sums += beta[0, :, 0]
            count += 1
        if not count:
            raise ValueError(
                "`tilt`: no training day has enough labelled stocks for a regression "
                f"on {len(self.styles)} styles and the industries."
            )
        mean = dict(zip(self.styles, (sums / count).tolist(), strict=True))
        return {name: mean[name] for name in self.tilted}

    def paid(self, weights: dict[str, float], days: np.ndarray) -> torch.Tensor:
        """Style part [c, n, 1] of some days, standardised over each."""
        x = self._exposures(days, tuple(weights))
        part = x @ np.array(list(weights.values()), np.float32)
        return standardize(
            torch.from_numpy(part.astype(np.float32)).unsqueeze(-1),
            self.panel.present[days],
        )

    def _exposures(self, days: np.ndarray, names: Any = None) -> np.ndarray:
        at = [self.panel.risk_names.index(name) for name in names or self.styles]
        assert self.panel.risk is not None
        return np.nan_to_num(self.panel.risk[days][..., at].numpy())

    def _industry(self, days: np.ndarray) -> np.ndarray:
        code = self.panel.risk_column("industry")
        shape = (len(days), len(self.panel.instruments))
        return np.zeros(shape) if code is None else np.nan_to_num(code[days], nan=-1.0)
