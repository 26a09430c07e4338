"""Somebody's own Qlib setup serves a model of ours and never imports this package.

A fresh process with its own `qlib.init` and YAML finds the recorder that a workflow
left, and updates its predictions through Qlib's online classes.
"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from qlib.model.trainer import task_train
from qlib.utils import init_instance_by_config

from qlib_ext.rolling.tasks import init_qlib

TASK = """
model:
  class: MultiFactorRNN
  module_path: qlib_ext.models
  kwargs: {n_factors: 2, n_epochs: 1, hidden_size: 4, num_layers: 1, step_len: 10,
           mode: HOW, seed: 0, GPU: -1}
dataset:
  class: PanelDataset
  module_path: qlib_ext.dataset
  kwargs:
    handler:
      class: DayHandler
      module_path: data_handlers.day
      kwargs:
        instruments: csi300
        start_time: 2019-01-02
        end_time: 2020-12-31
        fit_start_time: 2019-01-02
        fit_end_time: 2019-12-16
        styles: []
    segments:
      train: [2019-01-02, 2019-12-16]
      valid: [2020-01-02, 2020-03-16]
      test: [2020-04-01, 2020-06-30]
record:
  - class: SignalRecord
    module_path: qlib.workflow.record_temp
    kwargs: {model: <MODEL>, dataset: <DATASET>}
"""

# Nothing below names a package of ours: the YAML and the pickles do.
PROGRAM = """
import pickle
import sys
import qlib, yaml
from qlib.model.trainer import TrainerR
from qlib.workflow import R
from qlib.workflow.online.manager import OnlineManager
from qlib.workflow.online.strategy import RollingStrategy
from qlib.workflow.online.update import LabelUpdater, PredUpdater
from qlib.workflow.online.utils import OnlineToolR
from qlib.workflow.task.gen import RollingGen

store, uri, step = sys.argv[1:]

if __name__ == "__main__":
    qlib.init(
        provider_uri=store, region="cn", kernels=1, logging_level=30,
        exp_manager={
            "class": "MLflowExpManager", "module_path": "qlib.workflow.expm",
            "kwargs": {"uri": uri, "default_exp_name": "mine"},
        },
    )
    import torch
    torch.set_num_threads(1)
    task = yaml.safe_load(open("task.yaml"))
    if step == "update":
        (recorder,) = R.list_recorders(experiment_name="mine").values()
        PredUpdater(recorder, to_date="2020-09-30").update()
        LabelUpdater(recorder, to_date="2020-09-30").update()
        tool = OnlineToolR("mine")
        tool.reset_online_tag(recorder)
        tool.update_online_pred(to_date="2020-12-30")
        recorder.load_object("pred.pkl").to_pickle("updated.pkl")
        pickle.dump(recorder.load_object("params.pkl"), open("model.pkl", "wb"))
    else:
        strategy = RollingStrategy(
            "ours", [task], RollingGen(step=120, rtype="sliding", trunc_days=12)
        )
        manager = OnlineManager(
            strategy, trainer=TrainerR(experiment_name="ours"),
            begin_time="2020-05-04",
        )
        manager.first_train()
        manager.routine(cur_time="2020-08-03")
        for recorder in R.list_recorders(experiment_name="ours").values():
            frame = recorder.load_object("pred.pkl")
            days = frame.index.get_level_values(0)
            known = frame.notna().all().all()
            print("DAYS", days.min().date(), days.max().date(), known)
    assert "qlib_ext.cli" not in sys.modules
"""


def manager(folder):
    return {
        "class": "MLflowExpManager",
        "module_path": "qlib.workflow.expm",
        "kwargs": {"uri": f"sqlite:///{folder}/mlruns.db", "default_exp_name": "mine"},
    }


def write(folder, mode):
    (folder / "task.yaml").write_text(TASK.replace("HOW", mode))


@pytest.mark.parametrize(
    "mode", ["stream", pytest.param("windows", marks=pytest.mark.slow)]
)
def test_pred_updater_continues_our_scores_as_the_batch_would(
    market_small, tmp_path, fresh_database, run_fresh, mode
):
    write(fresh_database(tmp_path), mode)
    task = yaml.safe_load(TASK.replace("HOW", mode))
    init_qlib(
        {
            "provider_uri": str(market_small),
            "region": "cn",
            "kernels": 1,
            "exp_manager": manager(tmp_path),
        }
    )
    torch.set_num_threads(1)
    task_train(copy.deepcopy(task), experiment_name="mine")
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    run_fresh(PROGRAM, tmp_path, market_small, uri, "update")
    updated = pd.read_pickle(tmp_path / "updated.pkl")["score"]
    days = updated.index.get_level_values("datetime")
    assert days.min() == pd.Timestamp("2020-04-01")
    assert days.max() == pd.Timestamp("2020-12-30")
    # The same model over the whole range at once, here, with this package.
    kwargs = task["dataset"]["kwargs"]
    kwargs["segments"]["test"] = ["2020-04-01", "2020-12-30"]
    dataset = init_instance_by_config(task["dataset"])
    model = pd.read_pickle(tmp_path / "model.pkl")
    whole = model.predict(dataset)
    assert updated.index.equals(whole.index)
    assert np.abs(updated - whole).max() <= 1e-5


@pytest.mark.slow
def test_online_manager_trains_and_updates(
    market_small, tmp_path, fresh_database, run_fresh
):
    write(fresh_database(tmp_path), "windows")
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    text = run_fresh(PROGRAM, tmp_path, market_small, uri, "manager")
    lines = [line.split() for line in text.splitlines() if line.startswith("DAYS")]
    assert lines
    assert all(line[3] == "True" for line in lines)
    assert max(line[2] for line in lines) >= "2020-08-03"
