"""Studies: one workflow, some settings varied, everything else equal.

A study file names a workflow and the values to try::

    study: lr
    workflow: ../rnn_day_multi.yaml
    vary:
      task.model.kwargs.lr: [0.001, 0.0001]
    seeds: 3

Several keys under `vary` make every combination. The tasks run like those of
`qlib-ext roll`: on the workflow's own segments, or window by window; what is finished
is kept. The result is one table and one HTML page.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from qlib.log import get_module_logger
from qlib.workflow import R

from data_handlers.arguments import check_whole
from qlib_ext.recorders import load_frame
from qlib_ext.report import plots
from qlib_ext.report.compare import Comparison, Run, compare, compare_page
from qlib_ext.report.page import Page
from qlib_ext.rolling.retrain import absolute_init, make_tasks, plan, split_records
from qlib_ext.rolling.run import run_locked
from qlib_ext.rolling.tasks import Context, Outcome, Task, init_qlib
from qlib_ext.rolling.windows import label_horizon_of, own_window
from qlib_ext.workflow import load_workflow, read_yaml

__all__ = ["StudyResult", "load_study", "run_study"]

logger = get_module_logger("qlib_ext.rolling.study")

_KEYS = {"study", "workflow", "vary", "set", "seeds", "roll"}
#: What a study itself says, of the arguments of `plan`.
_STUDYS = {"workflow", "seeds", "experiment", "uri"}


@dataclass
class Study:
    """A study file, read.

    Attributes
    ----------
    name : str
    config : dict
        The workflow, with the study's `set` in it.
    vary : dict
        Dotted key to the values to try.
    seeds : int
    roll : dict
        Arguments of `rolling.plan`, `test` among them; empty for the workflow's own
        segments.
    """

    name: str
    config: dict
    vary: dict[str, list]
    seeds: int
    roll: dict[str, Any]

    def variants(self) -> dict[str, dict]:
        """Name and workflow of every combination."""
        found = {}
        for values in itertools.product(*self.vary.values()):
            config = copy.deepcopy(self.config)
            words = []
            for key, value in zip(self.vary, values, strict=True):
                set_key(config, key, value)
                words.append(f"{key.rpartition('.')[2]} {value}")
            found[", ".join(words)] = config
        return found


@dataclass
class StudyResult:
    """What a study found.

    Attributes
    ----------
    comparison : Comparison or None
        None if no task finished.
    curves : dict of str to DataFrame
        Metric to a frame of epochs by variant, mean over seeds (and windows).
    tasks, outcomes : list
    """

    comparison: Comparison | None
    curves: dict[str, pd.DataFrame]
    tasks: list[Task]
    outcomes: list[Outcome]


def load_study(path: str | os.PathLike[str]) -> Study:
    """Read a study file.

    Parameters
    ----------
    path : path
        The workflow is looked up beside it.

    Raises
    ------
    ValueError
        If a key is unknown or missing, or a varied key is not in the workflow.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`path`: there is no study file {path}.")
    given = read_yaml(path)
    if unknown := sorted(set(given) - _KEYS):
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r}; it takes {sorted(_KEYS)}."
        )
    for key in ("workflow", "vary"):
        if not given.get(key):
            raise ValueError(f"{path}: `{key}` is missing.")
    for key in ("vary", "set", "roll"):
        if not isinstance(given.get(key) or {}, Mapping):
            raise ValueError(f"{path}: `{key}` must be a mapping, got {given[key]!r}.")
    roll = dict(given.get("roll") or {})
    takes = sorted(set(inspect.signature(plan).parameters) - _STUDYS)
    if unknown := sorted(set(roll) - set(takes)):
        raise ValueError(f"{path}: unknown `roll.{unknown[0]}`; it takes {takes}.")
    if roll and "test" not in roll:
        raise ValueError(f"{path}: `roll.test` is missing, such as '2018:2020'.")
    config = load_workflow(path.parent / str(given["workflow"]))
    vary = dict(given["vary"])
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: `vary.{key}` must be a list, got {values!r}.")
        if len({str(value) for value in values}) < len(values):
            raise ValueError(f"{path}: `vary.{key}` has a value twice: {values!r}.")
    for key, value in dict(given.get("set") or {}).items():
        set_key(config, key, value)
    seeds = given.get("seeds", 3)
    check_whole("seeds", seeds, 1)
    return Study(
        name=str(given.get("study") or path.stem),
        config=config,
        vary=vary,
        seeds=seeds,
        roll=roll,
    )


def set_key(config: dict, key: str, value: Any) -> None:
    """Set a dotted key; all but its last part must exist.

    Raises
    ------
    ValueError
        Naming the part that does not exist.
    """
    *parents, last = key.split(".")
    node: Any = config
    for i, part in enumerate(parents):
        if not isinstance(node, dict) or part not in node:
            raise ValueError(
                f"`{key}`: the workflow has no `{'.'.join(parents[: i + 1])}`."
            )
        node = node[part]
    if not isinstance(node, dict):
        raise ValueError(f"`{key}`: `{'.'.join(parents)}` is no mapping.")
    node[last] = value


def run_study(
    study: Study,
    *,
    uri: str | None = None,
    horizon: int | None = None,
    n_layers: int = 20,
    **running: Any,
) -> StudyResult:
    """Train every variant with every seed, and compare what they score.

    Parameters
    ----------
    study : Study
    uri : str, optional
        MLflow store instead of the workflow's.
    horizon, n_layers : int
        See `report.compare.compare`; `horizon` is by default that of the label.
    **running
        `workers`, `backend`, `address`, `threads`, `retries`, `work` and `progress`;
        see `run.run_locked`.

    Raises
    ------
    ValueError
        On a wrong option, or another process at work on the same study.
    """
    qlib_init = absolute_init(study.config, Path.cwd(), uri)
    init_qlib(qlib_init)
    if horizon is None:
        try:
            horizon = label_horizon_of(study.config["task"])
        except ValueError as error:
            horizon = 10
            logger.warning(f"RankIC is taken every 10 days: {error}")
    each, _ = split_records([])
    tasks: list[Task] = []
    windows: list = []
    for name, config in study.variants().items():
        if study.roll:
            made = plan(config, uri=uri, seeds=study.seeds, numbers=False, **study.roll)
            windows = made.windows
        else:
            windows = [own_window(config["task"])]
        tasks += make_tasks(
            config["task"],
            windows,
            study.seeds,
            each,
            qlib_init["provider_uri"],
            variant=name,
        )
    ran = run_locked(
        tasks,
        windows,
        qlib_init,
        [f"study_{study.name}"],
        f"study {study.name}",
        **running,
    )
    with ran as (context, outcomes):
        runs, histories = _runs(tasks, outcomes, context)
    comparison = compare(runs, horizon, n_layers) if runs else None
    return StudyResult(comparison, _curves(histories), tasks, outcomes)


def _runs(
    tasks: Sequence[Task], outcomes: Sequence[Outcome], context: Context
) -> tuple[list[Run], list[dict[str, Any]]]:
    """Score of each variant and seed, windows joined; and the epochs of each task."""
    experiment = R.get_exp(experiment_name=context.experiment, create=False)
    parts: dict[tuple[str, int], list] = {}
    histories = []
    for task, out in zip(tasks, outcomes, strict=True):
        if out.status == "failed":
            continue
        recorder = experiment.get_recorder(recorder_id=out.recorder, create=False)
        parts.setdefault((task.variant, task.seed), []).append(recorder)
        for name in recorder.list_metrics():
            if not name.startswith(f"seed{task.seed}_"):
                continue
            epochs = recorder.client.get_metric_history(recorder.id, name)
            histories.append(
                {
                    "variant": task.variant,
                    "metric": name.partition("_")[2],
                    "values": {e.step: e.value for e in epochs},
                }
            )
    runs = []
    for (variant, seed), recorders in parts.items():
        score = pd.concat([load_frame(r, "pred.pkl").iloc[:, 0] for r in recorders])
        label = pd.concat([load_frame(r, "label.pkl").iloc[:, 0] for r in recorders])
        runs.append(
            Run(
                experiment=variant,
                recorder=recorders[0].id,
                name=f"{variant} seed {seed}",
                params={"model.kwargs.seed": str(seed)},
                logged={},
                score=score.sort_index().rename("score"),
                label=label.sort_index().rename("label"),
            )
        )
    return runs, histories


def _curves(histories: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """Metric to a frame of epochs by variant, mean over the tasks that got there."""
    rows = [
        (h["metric"], h["variant"], epoch, value)
        for h in histories
        for epoch, value in h["values"].items()
    ]
    table = pd.DataFrame(rows, columns=["metric", "variant", "epoch", "value"])
    return {
        str(metric): part.pivot_table(
            index="epoch", columns="variant", values="value", sort=False
        ).sort_index()
        for metric, part in table.groupby("metric")
    }


def study_page(study: Study, result: StudyResult) -> Page:
    """Lay out the comparison, then the learning curves."""
    assert result.comparison is not None
    page = compare_page(result.comparison, f"Study: {study.name}")
    page.section(
        "Learning curves",
        "Mean over the seeds that reached the epoch; validation RankIC is daily, "
        "against the raw return.",
    )
    for metric, frame in result.curves.items():
        page.plot(
            metric.replace("_", " "),
            plots.lines(frame, metric, percent="rank_ic" in metric),
            "by epoch",
        )
    return page
