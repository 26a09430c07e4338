"""Records for Qlib workflows, under the one name that workflows give them.

Each is defined beside its page in `qlib_ext.report`.
"""

from typing import NoReturn

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

#: Where else records are, by the names that are looked for here.
_ELSEWHERE = {
    "EnhanceRecord": "qlib_ext.portfolio",
    "TopRecord": "qlib_ext.portfolio",
    "TimingRecord": "qlib_ext.portfolio",
}


def __getattr__(name: str) -> NoReturn:
    """Say what records there are, in place of Python's bare AttributeError."""
    where = _ELSEWHERE.get(name)
    raise AttributeError(
        f"`class`: there is no record {name!r} in {__name__}; "
        + (
            f"it is in `module_path: {where}`."
            if where
            else f"it has {', '.join(__all__)}; those of portfolios are in "
            "qlib_ext.portfolio, those of Qlib in qlib.workflow.record_temp."
        ),
        name=name,
    )
