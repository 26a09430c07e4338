"""Qlib's Alpha158 and Alpha360, and any list of expressions, through the one engine.

The handlers take the arguments of Qlib's own and give the same columns: the same names,
NaN in the same places, values equal to float32 rounding. They read each bin once and
evaluate all expressions together (`data_handlers.expression`), so a handler takes
seconds and little more memory than its result.

See ``docs/alphas.md`` for the catalogue and what differs from Qlib in corner cases.
"""

from __future__ import annotations

import inspect
from typing import Any

from qlib.contrib.data.handler import Alpha158, Alpha360
from qlib.data.dataset.handler import DataHandler, DataHandlerLP

from data_handlers.arguments import NamedArguments, refuse_unknown
from data_handlers.catalogue import expressions_of
from data_handlers.expression.loading import ExpressionLoader
from data_handlers.handler import fitted
from data_handlers.labels import given_labels
from data_handlers.sharing import SharedLoading

__all__ = ["ExpressionHandler", "ExpressionLoader", "FastAlpha158", "FastAlpha360"]


class _FastLoading(SharedLoading):
    """Puts `ExpressionLoader` in the place of `QlibDataLoader`."""

    def __init__(self, *args: Any, data_loader: Any = None, **kwargs: Any) -> None:
        if isinstance(data_loader, dict) and data_loader["class"] == "QlibDataLoader":
            data_loader = {
                **data_loader,
                "class": "ExpressionLoader",
                "module_path": "data_handlers.expression.loading",
            }
        known: dict[str, Any] = {}
        for cls in (type(self), DataHandlerLP, DataHandler):
            known |= inspect.signature(cls.__init__).parameters
        refuse_unknown(
            type(self).__name__,
            kwargs,
            inspect.Signature(
                [
                    p.replace(kind=p.KEYWORD_ONLY)
                    for p in known.values()
                    if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                ]
            ),
        )
        super().__init__(*args, data_loader=data_loader, **kwargs)


class FastAlpha158(Alpha158, _FastLoading):
    """Qlib's `Alpha158`, through the engine: the same arguments, columns and values.

    Examples
    --------
    In a workflow, in the place of Alpha158::

        handler:
          class: FastAlpha158
          module_path: data_handlers.alpha
          kwargs:
            instruments: csi300
            start_time: 2012-01-01
            end_time: 2020-12-31
    """


class FastAlpha360(Alpha360, _FastLoading):
    """Qlib's `Alpha360`, through the engine: the same arguments, columns and values."""


class ExpressionHandler(NamedArguments, _FastLoading):
    """Handler of a list of Qlib expressions, cross-sectional operators included.

    Parameters
    ----------
    expressions : list of str, dict of str to str, or str
        Expressions, which name their columns; or expressions by name; or a list of the
        catalogue: "alpha158", "alpha360", "alpha101".
    instruments, start_time, end_time, freq
        As in Qlib.
    label : str, list of str or (list of str, list of str), optional
        Label expressions, and their names; default Qlib's,
        ``Ref($close, -2)/Ref($close, -1) - 1``.
    infer_processors, learn_processors : list, optional
        Default none, and Qlib's ``DropnaLabel`` and ``CSZScoreNorm`` of the label.
    fit_start_time, fit_end_time, filter_pipe, inst_processors
        As in Qlib.
    shared_processors, process_type, drop_raw
        As in Qlib.

    Raises
    ------
    ValueError
        For an unknown name of a list, an empty list, or what `ExpressionLoader` raises.

    Examples
    --------
    In a workflow::

        handler:
          class: ExpressionHandler
          module_path: data_handlers.alpha
          kwargs:
            expressions:
              reversal: "CSRank(Ref($close, 5) / $close)"
              quiet: "CSDemean(-1 * Std($close / Ref($close, 1), 20), $industry)"
            instruments: csi300
            start_time: 2012-01-01
            end_time: 2020-12-31
    """

    def __init__(
        self,
        expressions: Any,
        instruments: Any = "csi500",
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        label: Any = None,
        infer_processors: list | None = None,
        learn_processors: list | None = None,
        shared_processors: list | None = None,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        filter_pipe: list | None = None,
        inst_processors: Any = None,
        process_type: str = SharedLoading.PTYPE_A,
        drop_raw: bool = False,
    ) -> None:
        if learn_processors is None:
            learn_processors = [
                {"class": "DropnaLabel"},
                {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
            ]
        if label is None:
            label = ["Ref($close, -2)/Ref($close, -1) - 1"]
        *pair, _ = given_labels(label)
        window = fit_start_time, fit_end_time

        super().__init__(
            instruments=instruments,
            start_time=start_time,
            end_time=end_time,
            data_loader={
                "class": "QlibDataLoader",
                "kwargs": {
                    "config": {
                        "feature": expressions_of(expressions),
                        "label": tuple(pair),
                    },
                    "filter_pipe": filter_pipe,
                    "freq": freq,
                    "inst_processors": inst_processors,
                },
            },
            infer_processors=fitted(infer_processors or [], *window),
            learn_processors=fitted(learn_processors, *window),
            shared_processors=shared_processors or [],
            process_type=process_type,
            drop_raw=drop_raw,
        )
