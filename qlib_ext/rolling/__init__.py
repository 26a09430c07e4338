"""Retrain a workflow year by year and seed by seed; keep what is finished.

`plan` lays out the windows and tasks of a workflow, `roll` trains them and joins their
scores; `qlib-ext roll` does both.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlib_ext.rolling.retrain import Plan, RollResult, join_scores, plan, roll
    from qlib_ext.rolling.windows import Window, make_windows

__all__ = [
    "Plan",
    "RollResult",
    "Window",
    "join_scores",
    "make_windows",
    "plan",
    "roll",
]


def __getattr__(name: str) -> Any:
    # Imported at first use: the command line names its options without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "windows" if name in ("Window", "make_windows") else "retrain"
    return getattr(import_module(f"{__name__}.{module}"), name)
