"""Records for Qlib workflows, under the one name that workflows give them.

Each is defined beside its page in `qlib_ext.report`.
"""

from qlib_ext.report.columns import ColumnRecord
from qlib_ext.report.factor_record import FactorRecord
from qlib_ext.report.graph import GraphRecord
from qlib_ext.report.group_record import GroupRecord
from qlib_ext.report.mamba import MambaRecord
from qlib_ext.report.record import FileRecord
from qlib_ext.report.risk import ReversalRecord, RiskRecord
from qlib_ext.report.weights import WeightRecord

__all__ = [
    "ColumnRecord",
    "FactorRecord",
    "FileRecord",
    "GraphRecord",
    "GroupRecord",
    "MambaRecord",
    "ReversalRecord",
    "RiskRecord",
    "WeightRecord",
]
