"""Portfolios: risk model, optimiser, Qlib strategies, exchange, timing, records."""

from qlib_ext.portfolio.exchange import BoardExchange
from qlib_ext.portfolio.limits import Limits
from qlib_ext.portfolio.optimiser import Optimiser, Solution
from qlib_ext.portfolio.programme import Problem
from qlib_ext.portfolio.record import EnhanceRecord
from qlib_ext.portfolio.risk_model import RiskModel, build_risk_model, read_day
from qlib_ext.portfolio.strategy import IndexEnhancementStrategy
from qlib_ext.portfolio.timing import Timing
from qlib_ext.portfolio.timing_record import TimingRecord
from qlib_ext.portfolio.top import TopRecord, TopStrategy

__all__ = [
    "BoardExchange",
    "EnhanceRecord",
    "IndexEnhancementStrategy",
    "Limits",
    "Optimiser",
    "Problem",
    "RiskModel",
    "Solution",
    "Timing",
    "TimingRecord",
    "TopRecord",
    "TopStrategy",
    "build_risk_model",
    "read_day",
]
