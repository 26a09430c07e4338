"""Models: one file each; the name here is what a workflow's `class` takes."""

from qlib_ext.models.composite import FamilyComposite
from qlib_ext.models.dual_channel import DualChannel
from qlib_ext.models.gru_gat import GRUGAT
from qlib_ext.models.incremental import IncrementalModel
from qlib_ext.models.mamba import Mamba
from qlib_ext.models.mamba_moe import MambaMoE
from qlib_ext.models.master import MASTER
from qlib_ext.models.multi_factor_rnn import MultiFactorRNN
from qlib_ext.models.risk_control import RiskControl
from qlib_ext.models.score_average import ScoreAverage

__all__ = [
    "GRUGAT",
    "MASTER",
    "DualChannel",
    "FamilyComposite",
    "IncrementalModel",
    "Mamba",
    "MambaMoE",
    "MultiFactorRNN",
    "RiskControl",
    "ScoreAverage",
]
