"""What Qlib's own classes need of a task, said before they fail in other words."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from qlib.data.dataset import TSDatasetH
from qlib.utils import get_callable_kwargs

__all__ = ["check_classes", "check_model"]

# Where Qlib looks for a class without `module_path`.
_HOME = {
    "infer_processors": "qlib.data.dataset.processor",
    "learn_processors": "qlib.data.dataset.processor",
    "shared_processors": "qlib.data.dataset.processor",
    "data_loader": "qlib.data.dataset.loader",
    "record": "qlib.workflow.record_temp",
}
_MODELS = "qlib.contrib.model."


def check_classes(value: Any, where: str = "task", home: str | None = None) -> None:
    """Refuse classes of a task that cannot be imported.

    Parameters
    ----------
    value : mapping, list or other
        A task, or a part of it.
    where : str, default "task"
        Its name, for the message.
    home : str, optional
        Module of classes that name none.

    Raises
    ------
    ValueError
        For a module, package or class that is not there.
    """
    if isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            check_classes(item, f"{where}[{at}]", home)
    if not isinstance(value, Mapping):
        return
    named, module = value.get("class"), value.get("module_path", home)
    if isinstance(named, str) and isinstance(module, str):
        if "." in named:
            module, _, named = named.rpartition(".")
        # a file would be run twice, and its first classes be others than its second
        if not module.endswith(".py"):
            _find(where, module, named)
    for key, item in value.items():
        check_classes(item, f"{where}.{key}", _HOME.get(str(key)))


def _find(where: str, module: str, named: str) -> None:
    try:
        get_callable_kwargs({"class": named, "module_path": module})
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"`{where}.module_path` is {module!r}, and there is no module "
                f"{error.name!r}: see to the name, or install its package."
            ) from error
        raise ValueError(
            f"`{where}`: {module} needs the Python package {error.name}, which is not "
            f"installed: pip install {error.name}, or take another class."
        ) from error
    except ImportError as error:
        if "failed to map segment" in str(error):
            raise  # no memory for a library
        raise ValueError(
            f"`{where}`: {module} cannot be imported: {error}; install a version of "
            "that package that it works with, or take another class."
        ) from error
    except AttributeError as error:
        if error.name not in (named, None):
            raise  # of something inside the module
        if error.obj is None:  # in the module's own words
            raise ValueError(f"`{where}`: {error}") from error
        known = [n for n in dir(error.obj) if not n.startswith("_")]
        near = difflib.get_close_matches(named, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "set its `module_path`."
        raise ValueError(
            f"`{where}`: the module {module} has no class {named}; {hint}"
        ) from error


def check_model(task: Mapping[str, Any]) -> None:
    """Refuse one of Qlib's models on data that it cannot read.

    Raises
    ------
    ValueError
        For windows where the model reads a table, a table where it reads windows, and
        a default that the installed PyTorch does not take.
    """
    model, dataset = task.get("model"), task.get("dataset")
    if not isinstance(model, Mapping) or not isinstance(dataset, Mapping):
        return
    made, kwargs = get_callable_kwargs(dict(model))
    if not made.__module__.startswith(_MODELS):
        return
    from qlib.contrib.data.dataset import MTSDatasetH

    data, _ = get_callable_kwargs(dict(dataset))
    kind = made.__module__.removeprefix(_MODELS)
    windows = issubclass(data, (TSDatasetH, MTSDatasetH))
    of = f"`task.dataset` is {data.__name__}, and Qlib's {made.__name__} of {kind} "
    if kind == "pytorch_tra":
        if not issubclass(data, MTSDatasetH):
            raise ValueError(f"{of}reads MTSDatasetH of qlib.contrib.data.dataset.")
    elif kind.endswith("_ts"):
        if not issubclass(data, TSDatasetH):
            raise ValueError(
                f"{of}reads windows of days: take TSDatasetH of qlib.data.dataset, "
                "with `step_len`, or a model that reads tables."
            )
    elif windows and kind != "pytorch_general_nn":
        raise ValueError(
            f"{of}reads a table, not windows of days: take DatasetH of "
            "qlib.data.dataset, or PanelDataset of qlib_ext.dataset."
        )
    if kind == "pytorch_nn" and (kwargs or {}).get("scheduler", "default") == "default":
        _check_plateau(made.__name__)


def _check_plateau(model: str) -> None:
    import torch  # `qlib-ext report` needs none

    plateau = inspect.signature(torch.optim.lr_scheduler.ReduceLROnPlateau)
    # Qlib compares versions as text: "2.13" stands before "2.6"
    old = torch.__version__.split("+")[0] <= "2.6.0"
    if old and "verbose" not in plateau.parameters:
        raise ValueError(
            f"`task.model`: the default `scheduler` of {model} fails with PyTorch "
            f"{torch.__version__}; set `scheduler: null` in its kwargs."
        )
