"""RiskControl: a network whose loss is -IC, plus what the score leans on styles.

Minsheng Securities, Meta_RiskControl (2025-08): an ALSTM reads price features and style
exposures; the loss keeps its score away from the styles, and from those that ran. The
report gives no formulas; ours are `[gap]`. For every scored day, with corr over its
stocks, X_k the exposures and m_k the return of style k over the last 20 days in units
of its own deviation, known at the day's close::

    loss = -corr(score, label)
           + deviation * mean over k of corr(score, X_k)^2
           + momentum * corr(score, sum_k m_k X_k)^2

Glossary: t days, n instruments, c scored days, k styles.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch

from data_handlers.arguments import Count, NonNegative
from data_handlers.risk import RISK_HINT, STYLES
from qlib_ext.dataset import Panel
from qlib_ext.losses import day_ic, exposure_penalty, over_days
from qlib_ext.models.multi_factor_rnn import MultiFactorRNN
from qlib_ext.models.styles import style_returns, style_state

__all__ = ["RiskControl"]

MOMENTUM_DAYS = 20


class RiskControl(MultiFactorRNN):
    """Learn a score by its IC, penalised for leaning on styles.

    Let the handler's `style_features` be true for the network to read the exposures.

    Parameters
    ----------
    deviation : float, default 1.0
        Weight of the mean squared correlation with the styles; 0 is off.
    momentum : float, default 0.5
        Weight of the squared correlation with the styles that ran; 0 is off.
    rnn : str, default "ALSTM"
    mode : {"windows", "stream"}, default "windows"
        ALSTM reads whole windows.
    n_factors : int, default 1
    hidden_size, num_layers, dropout, lamb, categories, embedding_size, attributes, \
bidirectional, head_size, size_groups, every, parts
        See `MultiFactorRNN`; `lamb` has no effect.
    d_feat, step_len, chunk, day_stride, n_epochs, early_stop, lr, clip_value, \
n_seeds, seed, label, GPU, amp, block_size, checkpoint_dir
        See `TorchModel`.

    Raises
    ------
    ValueError
        On an argument out of range, or data without style exposures.

    References
    ----------
    docs/systems/adaptive.md.
    """

    def __init__(
        self,
        deviation: NonNegative = 1.0,
        momentum: NonNegative = 0.5,
        rnn: Any = "ALSTM",
        mode: Literal["stream", "windows"] = "windows",
        n_factors: Count = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(rnn=rnn, mode=mode, n_factors=n_factors, **kwargs)

    # What belongs to a panel is rebuilt from it and not pickled.
    _ran: torch.Tensor | None = None
    _ran_of: Any = None

    def _styles_that_ran(self, panel: Panel) -> torch.Tensor:
        """Return of each style over the last days, in its own deviations, [t, k]."""
        if self._ran is None or self._ran_of() is not panel:
            table = style_returns(panel, "`momentum`")
            state = style_state(table.to_numpy(), (MOMENTUM_DAYS,))
            self._ran, self._ran_of = torch.from_numpy(state), weakref.ref(panel)
        return self._ran

    def loss(self, out, batch):
        """Minus the mean IC of the batch's days, and the penalties."""
        label = batch.label[..., batch.panel.label_index(self.label)]
        value, counted = day_ic(out["score"], label, batch.mask)
        ic = over_days(value, counted)
        loss, parts = -ic, {"ic": ic.detach()}
        if not (self.deviation or self.momentum):
            return loss, parts
        names = batch.panel.risk_names
        at = [names.index(style) for style in STYLES if style in names]
        if batch.risk is None or not at:
            raise ValueError(
                f"`deviation` and `momentum` need style exposures, the risk group has "
                f"{names}: set the handler's `styles`. {RISK_HINT}"
            )
        styles = batch.risk[..., at]  # [c, n, k]
        enough = batch.mask.sum(1) >= 3
        if self.deviation:
            lean = exposure_penalty(out["score"], styles, batch.mask)
            lean = over_days(lean, enough)
            loss, parts["deviation"] = loss + self.deviation * lean, lean.detach()
        if self.momentum:
            ran = self._styles_that_ran(batch.panel)[batch.days].to(styles.device)
            ran = torch.einsum("cnk,ck->cn", torch.nan_to_num(styles), ran)
            chase = exposure_penalty(out["score"], ran.unsqueeze(-1), batch.mask)
            chase = over_days(chase, enough)
            loss, parts["momentum"] = loss + self.momentum * chase, chase.detach()
        return loss, parts
