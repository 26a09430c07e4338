"""Genetic mining of factors: evolution over Qlib expressions (`qlib-ext mine`)."""

from data_handlers.expression import Evaluator, Node
from qlib_ext.mining.evolve import MineConfig, Mined, Miner
from qlib_ext.mining.expression import Grammar, parse
from qlib_ext.mining.panel import MiningPanel, mining_panel
from qlib_ext.mining.result import write_result

__all__ = [
    "Evaluator",
    "Grammar",
    "MineConfig",
    "Mined",
    "Miner",
    "MiningPanel",
    "Node",
    "mining_panel",
    "parse",
    "write_result",
]
