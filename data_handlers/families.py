"""The feature families PV, HF and DP as handlers; G and C have modules of their own.

Kaiyuan Securities, microstructure 32 (docs/systems/gru_gat.md). Each family trains one
factor, and `qlib_ext.models.FamilyComposite` joins them.

| family | handler | features |
|---|---|---|
| PV | `PVHandler` | open, high, low, close, vwap, volume: those of `DayHandler` |
| G | `data_handlers.technical.TechnicalHandler` | indicators and K-line states |
| C | `data_handlers.flow.FlowHandler` | capital flow by order size |
| HF | `HFHandler` | the 22 `ms` features, and the `l2` ones that need trades only |
| DP | `MinedHandler` | Qlib expressions mined by `qlib-ext mine` |

Formula, unit, range, NaN rule and the moment a feature is known: PV in
`data_handlers.day`, G in `TECHNICAL_FEATURES`, C in `FLOW_FEATURES`, HF in
`data_handlers.aggregate.minute.MINUTE_FEATURES` and `TRADE_FEATURES`, DP in the file of
expressions, each an arithmetic of fields known at the close of t.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qlib.data.ops import Operators

from data_handlers.aggregates import TRADE_FEATURES, HFHandler
from data_handlers.arguments import Count, Universe
from data_handlers.day import DayHandler
from data_handlers.expression import CROSS
from data_handlers.handler import FeatureHandler, on_traded_days
from data_handlers.labels import days_ahead
from data_handlers.loaders import expand_store
from data_handlers.vendor.mapping import load_yaml, settings_text

__all__ = [
    "TRADE_FEATURES",
    "HFHandler",
    "MinedHandler",
    "PVHandler",
    "mined_expressions",
]

_TOKEN = re.compile(r"(?<![\w.])[$A-Za-z_]\w*")
_ALLOWED = re.compile(r"[\w\s$().,+\-*/<>=&|]*")


class PVHandler(DayHandler):
    """Family PV, price and volume: `DayHandler` by the report's name."""


def mined_expressions(path: str | Path) -> tuple[list[str], list[str]]:
    """Read a file of mined expressions.

    Parameters
    ----------
    path : str or Path
        YAML with ``expressions: [{name: …, expression: …}, …]``, as `qlib-ext mine`
        writes it; other keys are passed over.

    Returns
    -------
    (list of str, list of str)
        Expressions and names.

    Raises
    ------
    ValueError
        If there is no such file, it has no expressions, a name repeats, an expression
        is not made of fields, numbers and Qlib's operators, or one looks ahead.
    """
    found = _texts_of(path)
    for name, text in found.items():
        _check(text, f"`path` {path}: {name}")
    return list(found.values()), list(found)


def _texts_of(path: str | Path) -> dict[str, str]:
    """Read the texts of a file of expressions by name, in its order and unchecked.

    Qlib evaluates expressions as Python code: whoever hands them to it checks them.

    Raises
    ------
    ValueError
        If there is no such file, it has no expressions, or a name repeats.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"`path`: there is no file {path}; `qlib-ext mine` writes one, or list "
            "expressions of your own under `expressions:`."
        )
    where = f"`path` {path}"
    content = load_yaml(settings_text(path, where), where)
    found = content.get("expressions") if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise ValueError(f"`path` {path} has no list `expressions`.")
    out: dict[str, str] = {}
    for k, entry in enumerate(found):
        if not isinstance(entry, dict) or not {"name", "expression"} <= set(entry):
            raise ValueError(
                f"`path` {path}: entry {k} of `expressions` needs `name` and "
                f"`expression`, got {entry!r}."
            )
        name = str(entry["name"])
        if name in out:
            raise ValueError(f"`path` {path}: the name {name!r} is given twice.")
        out[name] = str(entry["expression"])
    return out


def _check(text: str, where: str) -> None:
    """Refuse what is no expression: Qlib evaluates these strings as Python code."""
    words = [t for t in _TOKEN.findall(text) if not t.startswith("$")]
    unknown = [w for w in words if w not in Operators._ops and w not in CROSS]
    if unknown or not _ALLOWED.fullmatch(text) or "__" in text:
        raise ValueError(
            f"{where} is not made of fields, numbers and Qlib's operators: {text!r}"
            + (f" ({unknown[0]!r} is not known)." if unknown else ".")
        )
    try:
        ahead = days_ahead([text])
    except (ValueError, SyntaxError, NameError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} cannot be read: {text!r} ({error}).") from error
    if ahead > 0:
        raise ValueError(f"{where} looks {ahead} days ahead: {text!r}.")


class MinedHandler(FeatureHandler):
    """Family DP: mined expressions, with DayHandler's labels and risk exposures.

    Values are those of Qlib's engine, on days with a close; a row whose every
    expression is unknown counts as not traded.

    Parameters
    ----------
    path : str, default "{store}/mined.yaml"
        File of expressions, see `mined_expressions`; ``{store}`` is Qlib's data folder.
    top : int, optional
        Take the first so many; the miner lists its best first. Default all.
    instruments, start_time, …
        As in `FeatureHandler`, without `features`.

    Examples
    --------
    In a workflow::

        handler:
          class: MinedHandler
          module_path: data_handlers.families
          kwargs:
            path: data/mined.yaml
            instruments: all
            start_time: 2013-01-01
            end_time: 2020-12-31
            fit_start_time: 2013-01-01
            fit_end_time: 2017-12-31
            horizon: 10
    """

    def __init__(
        self,
        instruments: Universe = "all",
        *,
        path: str = "{store}/mined.yaml",
        top: Count | None = None,
        **kwargs: Any,
    ) -> None:
        expressions, names = mined_expressions(
            expand_store(str(path), kwargs.get("freq", "day"))
        )
        if top is not None:
            expressions, names = expressions[:top], names[:top]
        super().__init__(
            features={
                "expressions": [on_traded_days(e) for e in expressions],
                "names": names,
            },
            instruments=instruments,
            **kwargs,
        )
