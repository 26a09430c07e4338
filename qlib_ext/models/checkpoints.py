"""What a killed `fit` goes on from: files named by arguments and data.

A run holds a lock on its folder. A second run of equal arguments and data takes a
folder of its own, so that the first to end removes nothing of the other's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from qlib.log import get_module_logger

from data_handlers.files import BusyError, locked, torch_bytes, write_bytes
from qlib_ext.dataset import Panel

__all__ = ["Checkpoints"]

logger = get_module_logger("qlib_ext.models")

_MOST_RUNS = 100  # of equal arguments and data at a time


class Checkpoints(AbstractContextManager):
    """Folder of a run's states: kept if the block fails, removed if it ends well.

    Parameters
    ----------
    model : object
        Its public attributes are the arguments; without a `checkpoint_dir` nothing is
        kept.
    panel : Panel
    segments : dict
        The data set's.

    Raises
    ------
    ValueError
        On entering, and by `save`: if the disk is full or the folder can't be written.
    """

    def __init__(self, model: Any, panel: Panel, segments: dict[str, Any]) -> None:
        self.folder: Path | None = None
        self._held = ExitStack()
        self._parent: Path | None = None
        if model.checkpoint_dir is None:
            return
        identity = {
            "class": type(model).__qualname__,
            "arguments": {
                k: v
                for k, v in sorted(vars(model).items())
                if not k.startswith("_")
                and not k.endswith("_")
                and k != "checkpoint_dir"
            },
            "segments": {k: str(v) for k, v in segments.items()},
            "data": panel.fingerprint(),
        }
        text = json.dumps(identity, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._parent = Path(model.checkpoint_dir)
        self._name = f"{type(model).__name__.lstrip('_')}-{key}"

    def __enter__(self) -> Checkpoints:
        parent = self._parent
        if parent is None:
            return self
        names = [self._name, *(f"{self._name}-{k}" for k in range(2, _MOST_RUNS))]
        # What a killed run has left comes first.
        names.sort(key=lambda name: not (parent / name).is_dir())
        for name in names:
            lock = parent / f".{name}.lock"
            try:
                self._held.enter_context(locked(lock, f"{name} is in use"))
            except BusyError:
                continue
            self.folder = parent / name
            return self
        raise ValueError(f"`checkpoint_dir` {parent}: {names[-1]} is in use.")

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._held:
            if kind is None and self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, name: str, take: Callable[[Any], None]) -> bool:
        """Hand a saved state to `take`; say whether there was one that it could take.

        A file that is cut short, no checkpoint, or of another network is set aside
        under the name ``<name>.broken``, with a warning.
        """
        if self.folder is None or not (path := self._path(name)).exists():
            return False
        try:
            # weights_only refuses anything but tensors and plain containers.
            take(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged file fails in a dozen ways
            aside = path.with_suffix(".broken")
            os.replace(path, aside)
            logger.warning(
                f"{path} is cut short or no checkpoint of this model "
                f"({type(error).__name__}): set aside as {aside.name}; training of "
                "this part begins anew."
            )
            return False
        return True

    def save(self, name: str, state: Any) -> None:
        """Write a state of tensors and plain containers, in one step."""
        if self.folder is not None:
            write_bytes(self._path(name), torch_bytes(state))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.pt"
