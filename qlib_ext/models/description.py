"""A trained model and its data set as JSON and tensors, to be read without a pickle.

`fit` leaves ``model.json`` and ``model.pt`` with the recorder it runs in: what Qlib
would pickle, as plain values, objects of the classes of `_PACKAGES` and `_MODULES`, and
tensors. Reading them runs no code but those classes' own, whoever wrote the files.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.data.data import ExpressionProvider
from qlib.data.dataset import Dataset
from qlib.data.dataset.handler import DataHandler
from qlib.data.dataset.loader import DataLoader
from qlib.data.dataset.processor import Processor
from qlib.log import get_module_logger
from qlib.model.base import Model
from qlib.utils.serial import Serializable
from qlib.workflow.recorder import MLflowRecorder

from data_handlers.expression import Unsupported
from data_handlers.expression.loading import node_of
from data_handlers.files import torch_bytes
from qlib_ext.graphs import Graph
from qlib_ext.recorders import (
    active_recorder,
    fetched,
    load_json,
    save_files,
    tag_process,
)

__all__ = ["FILES", "described", "only_expressions", "read", "write"]

logger = get_module_logger("qlib_ext.models")

#: Artifacts: the values, and the tensors that they name.
FILES = ("model.json", "model.pt")
_VERSION = 1

_PACKAGES = ("qlib_ext.models.", "qlib_ext.graphs.", "data_handlers.")
# Of Qlib only what neither reads pickles nor takes functions from its arguments.
_MODULES = {
    "qlib_ext.dataset": {"PanelDataset"},
    "qlib.data.dataset": {"DatasetH", "TSDatasetH"},
    "qlib.data.dataset.handler": {"DataHandler", "DataHandlerLP"},
    "qlib.data.dataset.loader": {"QlibDataLoader", "NestedDataLoader"},
    "qlib.contrib.data.handler": {
        "Alpha158", "Alpha158vwap", "Alpha360", "Alpha360vwap",
    },
    "qlib.contrib.data.loader": {"Alpha158DL", "Alpha360DL"},
    "qlib.data.dataset.processor": {
        "CSRankNorm", "CSZFillna", "CSZScoreNorm", "DropCol", "DropnaLabel",
        "DropnaProcessor", "Fillna", "FilterCol", "MinMaxNorm", "ProcessInf",
        "RobustZScoreNorm", "TanhProcess", "ZScoreNorm",
    },
}  # fmt: skip
_KINDS = (Model, Dataset, DataHandler, DataLoader, Processor, Graph)
_GRAPHS = "qlib_ext.graphs.relations"  # where a class without `module_path` is sought


class Undescribable(ValueError):
    """A value that is no plain one and of no class known here."""


_fitting: ContextVar[bool] = ContextVar("fitting", default=False)


def described(fit: Callable[..., None]) -> Callable[..., None]:
    """Decorate a model's `fit`: the outermost one leaves a description.

    It goes to the active recorder, which also learns which process writes it.
    """

    @functools.wraps(fit)
    def wrapper(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
        recorder = active_recorder()
        if _fitting.get() or recorder is None:
            fit(self, dataset, *args, **kwargs)
            return
        tag_process(recorder)
        token = _fitting.set(True)
        try:
            fit(self, dataset, *args, **kwargs)
        finally:
            _fitting.reset(token)
        try:
            write(recorder, self, dataset)
        except Undescribable as error:
            logger.info(f"`qlib-ext score` will need --trust for this run: {error}")

    return wrapper


def write(recorder: MLflowRecorder, model: Any, dataset: Any) -> None:
    """Save a fitted model and its data set with a recorder.

    Raises
    ------
    Undescribable
        If a part is of no class that `read` would make; nothing is saved.
    """
    tensors: dict[str, torch.Tensor] = {}
    content = {
        "version": _VERSION,
        "model": _encode(model, tensors, ()),
        "dataset": _encode(dataset, tensors, ()),
    }
    for name in ("model", "dataset"):
        _decode(content[name], tensors)  # or it could not be read
    files = {FILES[0]: json.dumps(content), FILES[1]: torch_bytes(tensors)}
    save_files(recorder, files)


def read(recorder: MLflowRecorder) -> tuple[Any, Any]:
    """Make the model and data set that a recorder describes.

    Raises
    ------
    ValueError
        If the files are cut short, name a class that is not allowed, or describe
        another model than the recorder's `params.pkl`.
    """
    content = load_json(recorder, FILES[0])
    where = f"{FILES[0]} of recorder {recorder.id}"
    with fetched(recorder, FILES[1]) as path:
        try:
            # weights_only refuses anything but tensors and plain containers.
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in a dozen ways
            raise ValueError(
                f"{FILES[1]} of recorder {recorder.id} is cut short or no file of "
                "tensors; train again."
            ) from error
    try:
        if content["version"] != _VERSION:
            raise ValueError(
                f"{where} has version {content['version']!r}, this program reads "
                f"{_VERSION}; train again."
            )
        model, dataset = (_decode(content[n], tensors) for n in ("model", "dataset"))
    except Undescribable as error:
        raise ValueError(f"{where}: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is no description of a model "
            f"({type(error).__name__}: {error}); train again."
        ) from error
    params = recorder.client.get_run(recorder.id).data.params
    named = str(params.get("model.class", params.get("class", ""))).rpartition(".")[2]
    if named and named != type(model).__name__:
        raise ValueError(
            f"recorder {recorder.id} ran {named}, but {FILES[0]} describes the "
            f"{type(model).__name__} inside it."
        )
    return model, dataset


@contextlib.contextmanager
def only_expressions() -> Iterator[None]:
    """Have Qlib evaluate nothing but what is an expression, meanwhile.

    Qlib hands the text of a feature to Python's `eval`.
    """
    kept = ExpressionProvider.get_expression_instance

    def checked(self: Any, field: Any) -> Any:
        with contextlib.suppress(Unsupported):  # by our engine; Qlib knows it
            node_of(field)
        return kept(self, field)

    ExpressionProvider.get_expression_instance = checked
    try:
        yield
    finally:
        ExpressionProvider.get_expression_instance = kept


# ---- values as JSON ----------------------------------------------------------------


def _encode(value: Any, tensors: dict[str, torch.Tensor], above: tuple) -> Any:
    """JSON of a value; what JSON lacks is ``{"is": kind, "of": content}``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) and not isinstance(value, np.datetime64):
        return value.item()
    if id(value) in above:
        raise Undescribable(f"{type(value).__name__} holds itself.")
    above = (*above, id(value))

    def each(values: Any) -> list:
        return [_encode(v, tensors, above) for v in values]

    kind: str
    content: Any
    if type(value) is list:
        return each(value)
    if type(value) in (tuple, set, frozenset):
        kind, content = type(value).__name__, each(value)
    elif type(value) is slice:
        kind, content = "slice", each((value.start, value.stop, value.step))
    elif isinstance(value, Mapping):
        kind, content = "dict", [each(pair) for pair in value.items()]
    elif isinstance(value, (datetime.date, np.datetime64)):
        kind, content = "time", pd.Timestamp(value).isoformat()
    elif isinstance(value, torch.Tensor):
        kind, content = "tensor", f"t{len(tensors)}"
        tensors[content] = value.detach().cpu()
    elif isinstance(value, np.ndarray):
        kind, content = "array", [str(value.dtype), each(value.tolist())]
    elif isinstance(value, pd.Index):
        kind, content = "index", each(value.tolist())
    else:
        cls = type(value)
        name = f"{cls.__module__}:{cls.__qualname__}"
        _find(cls.__module__, cls.__qualname__)
        held = value.__getstate__() if isinstance(value, Serializable) else vars(value)
        kind, content = "object", [name, {k: each([v])[0] for k, v in held.items()}]
    return {"is": kind, "of": content}


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        if isinstance(value, str) and value.startswith("file:"):
            raise Undescribable(f"{value[:80]!r} would be read as a pickle.")
        return value
    kind, content = value["is"], value["of"]
    if kind == "object":
        name, held = content
        made: Any = object.__new__(_find(*name.split(":")))
        made.__dict__.update({k: _decode(v, tensors) for k, v in held.items()})
        return made
    if kind == "tensor":
        return tensors[content]
    if kind == "time":
        return pd.Timestamp(content)
    if kind == "array":
        return np.array(_decode(content[1], tensors), dtype=np.dtype(content[0]))
    parts = [_decode(v, tensors) for v in content]
    if kind == "dict":
        return _checked({_key(k): v for k, v in parts})
    if kind == "slice":
        return slice(*parts)
    makers: dict[str, Callable] = {
        "tuple": tuple, "set": set, "frozenset": frozenset, "index": pd.Index,
    }  # fmt: skip
    return makers[kind](parts)


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _checked(config: dict) -> dict:
    """Refuse configurations from which Qlib or a model would make other classes."""
    if "class" in config or "module_path" in config:
        module, name = config.get("module_path"), str(config.get("class"))
        if module is None and "." in name:
            module, _, name = name.rpartition(".")
        if module is None:
            module = next((m for m in _MODULES if name in _MODULES[m]), _GRAPHS)
        _find(str(module), name)
    function = config.get("function")
    if isinstance(function, str) and not function.startswith("data_handlers."):
        raise Undescribable(f"function {function!r} is not one that is read here.")
    return config


def _find(module: str, name: str) -> type:
    """Class of that name, if it may be made."""
    ours = f"{module}.".startswith(_PACKAGES) and "__" not in module
    if ours or name in _MODULES.get(module, ()):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, _KINDS):
            home = found.__module__
            if home.startswith(_PACKAGES) or found.__name__ in _MODULES.get(home, ()):
                return found
    raise Undescribable(f"class {module}.{name} is not one that is read here.")
