"""Rolling retraining: what is kept, joined, tried again and reported."""

import copy
import shutil
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_handlers.sharing import FrameShare, shared_frames
from qlib_ext.dataset import PanelDataset
from qlib_ext.models import MultiFactorRNN
from qlib_ext.rolling import join_scores, plan, retrain, roll
from qlib_ext.rolling import tasks as rolling_tasks
from qlib_ext.rolling.windows import label_reach_of

WORKFLOW = {
    "experiment_name": "tiny",
    "qlib_init": {"region": "cn", "logging_level": 30},
    "task": {
        "model": {
            "class": "MultiFactorRNN",
            "module_path": "qlib_ext.models",
            "kwargs": {
                "n_factors": 2,
                "n_epochs": 2,
                "hidden_size": 4,
                "num_layers": 1,
                "step_len": 5,
                "seed": 3,
                "GPU": -1,
            },
        },
        "dataset": {
            "class": "PanelDataset",
            "module_path": "qlib_ext.dataset",
            "kwargs": {
                "handler": {
                    "class": "DayHandler",
                    "module_path": "data_handlers.day",
                    "kwargs": {
                        "instruments": "csi300",
                        "start_time": "2018-01-01",
                        "end_time": "2020-12-31",
                        "fit_start_time": "2018-01-01",
                        "fit_end_time": "2018-12-14",
                        "styles": [],
                    },
                },
                "segments": {
                    "train": ["2018-01-01", "2018-12-14"],
                    "valid": ["2019-01-01", "2019-12-14"],
                    "test": ["2020-01-01", "2020-12-31"],
                },
            },
        },
        "record": [
            {
                "class": "SignalRecord",
                "module_path": "qlib.workflow.record_temp",
                "kwargs": {"model": "<MODEL>", "dataset": "<DATASET>"},
            },
            {
                "class": "SigAnaRecord",
                "module_path": "qlib.workflow.record_temp",
                "kwargs": {"ana_long_short": False, "ann_scaler": 252},
            },
        ],
    },
}
WINDOWS = {"step": "quarter", "train_months": 6, "valid_months": 3}
TEST = "2020-07-01:2020-12-31"


def workflow(market, **model):
    config = copy.deepcopy(WORKFLOW)
    config["qlib_init"]["provider_uri"] = str(market)
    config["task"]["model"]["kwargs"].update(model)
    return config


def run(market, folder, seeds=2, test=TEST, config=None, **options):
    made = plan(
        config or workflow(market),
        test,
        seeds=seeds,
        uri=f"sqlite:///{folder}/mlruns.db",
        **WINDOWS,
    )
    return made, roll(made, threads=1, work=folder / "work", **options)


def recorders(made):
    from qlib.workflow import R
    from qlib.workflow.exp import MLflowExperiment

    experiment = R.get_exp(experiment_name=f"{made.experiment}_tasks", create=False)
    return experiment.list_recorders(rtype=MLflowExperiment.RT_L)


def joined_of(made, result):
    from qlib.workflow import R

    experiment = R.get_exp(experiment_name=made.experiment, create=False)
    return experiment.get_recorder(recorder_id=result.recorder, create=False)


def truncate(recorder, name):
    path = Path(recorder.artifact_uri.removeprefix("file://")) / name
    path.write_bytes(path.read_bytes()[:10])


@pytest.fixture(scope="module")
def rolled(market_small, tmp_path_factory, fresh_database):
    """Two windows with two seeds each, in this process: (plan, result, folder)."""
    folder = fresh_database(tmp_path_factory.mktemp("rolled"))
    made, result = run(market_small, folder)
    return made, result, folder


@pytest.fixture
def folder(tmp_path, fresh_database):
    """Folder with a tracking database of its own."""
    return fresh_database(tmp_path)


@pytest.fixture
def on_rolled(rolled):
    """The same, and Qlib initialised on its store and tracking database."""
    rolling_tasks.init_qlib(rolled[0].qlib_init)
    return rolled


def test_data_of_the_joined_records_learn_from_no_day_of_the_test(market_small):
    """Later windows train on days that earlier ones were judged on."""
    made = plan(workflow(market_small), "2020-01-01:2020-12-31", **WINDOWS)
    first, last = made.windows[0], made.windows[-1]
    assert last.train[1] > first.test[0]
    rolling_tasks.init_qlib(made.qlib_init)
    span = ("2019-01-01", "2020-12-31")
    context = rolling_tasks.Context("run", made.qlib_init, "x", span, "")
    data = retrain._joined_dataset(made, "2020-01-02", "2020-12-31", context)
    assert data.panel.dates[-1] == pd.Timestamp("2020-12-31")
    fitted = [
        p for p in data.handler.get_all_processors() if hasattr(p, "fit_end_time")
    ]
    assert fitted
    for processor in fitted:
        assert pd.Timestamp(processor.fit_end_time) < pd.Timestamp("2020-01-01")


class TestRoll:
    def test_every_task_has_a_recorder_with_year_and_seed(self, on_rolled):
        made, result, _ = on_rolled
        assert [out.status for out in result.outcomes] == ["finished"] * 4
        tags = [recorder.list_tags() for recorder in recorders(made)]
        found = {(t["year"], t["seed"], t["test_start"]) for t in tags}
        assert found == {
            ("2020-07", "3", "2020-07-01"),
            ("2020-07", "4", "2020-07-01"),
            ("2020-10", "3", made.windows[1].test[0]),
            ("2020-10", "4", made.windows[1].test[0]),
        }

    def test_store_is_read_once_for_all_tasks(self, on_rolled):
        loads = {o.figures["store_loads"] for o in on_rolled[1].outcomes}
        assert loads == {1.0}

    def test_joined_score_is_the_mean_of_standardised_parts(self, on_rolled):
        made, result, _ = on_rolled
        parts = {r.id: r.load_object("pred.pkl")["score"] for r in recorders(made)}
        expected = []
        for name in ("2020-07", "2020-10"):
            pairs = zip(result.tasks, result.outcomes, strict=True)
            seeds = [parts[o.recorder] for t, o in pairs if t.window.name == name]
            z = [
                s.groupby("datetime").transform(
                    lambda x: (x - x.mean()) / x.std(ddof=0)
                )
                for s in seeds
            ]
            expected.append((z[0] + z[1]) / 2)
        joined = joined_of(made, result).load_object("pred.pkl")["score"]
        pd.testing.assert_series_equal(
            joined,
            pd.concat(expected).sort_index(),
            check_names=False,
            rtol=1e-5,
            atol=1e-6,
        )
        days = joined.index.get_level_values("datetime")
        assert f"{days.min():%Y-%m-%d}" == "2020-07-01"
        assert result.metrics["Rank IC"] == pytest.approx(
            joined_of(made, result).list_metrics()["Rank IC"]
        )

    def test_a_second_call_keeps_everything(self, on_rolled, market_small):
        _, result, folder = on_rolled
        _, again = run(market_small, folder)
        assert {out.status for out in again.outcomes} == {"kept"}
        assert again.recorder == result.recorder

    def test_a_task_whose_data_have_changed_is_trained_again(
        self, market_small, folder, tmp_path
    ):
        store = tmp_path / "store"
        shutil.copytree(market_small, store)
        _, first = run(store, folder, seeds=1)
        # A close of the second window's test days is corrected.
        files = sorted((store / "features").glob("*/close.day.bin"))
        file = max(files, key=lambda f: f.stat().st_size)  # of a stock never delisted
        values = np.fromfile(file, "<f4")
        values[-5] *= 1.01
        values.tofile(file)
        _, again = run(store, folder, seeds=1)
        kept, other = again.outcomes
        assert (kept.status, other.status) == ("kept", "finished")
        assert kept.recorder == first.outcomes[0].recorder
        assert kept.why == "settings, days and data are those of its training"
        old = first.outcomes[1].recorder
        assert other.why == (
            "trained again: the data up to 2020-12-31 have changed since recorder "
            f"{old[:8]}"
        )
        assert again.recorder != first.recorder

    def test_damaged_results_are_made_again(self, market_small, folder):
        test = "2020-07-01:2020-09-30"
        made, first = run(market_small, folder, seeds=1, test=test)
        joined = joined_of(made, first)
        score = joined.load_object("pred.pkl")
        truncate(joined, "parts.json")
        made, second = run(market_small, folder, seeds=1, test=test)
        assert second.outcomes[0].status == "kept"
        assert second.recorder != first.recorder
        (task,) = recorders(made)
        truncate(task, "label.pkl")
        made, third = run(market_small, folder, seeds=1, test=test)
        assert third.outcomes[0].status == "finished"
        assert third.outcomes[0].recorder != task.id
        pd.testing.assert_frame_equal(
            joined_of(made, third).load_object("pred.pkl"), score
        )
        states = {r.id: r.status for r in recorders(made)}
        assert states == {task.id: "FAILED", third.outcomes[0].recorder: "FINISHED"}

    def test_same_seed_gives_the_same_scores(self, rolled, market_small, folder):
        made, result, _ = rolled
        other, again = run(market_small, folder, seeds=1, test="2020-07-01:2020-09-30")
        first = again.tasks[0]
        twin = next(i for i, t in enumerate(result.tasks) if t.key == first.key)
        ours = joined_of(other, again).load_object("pred.pkl")["score"]
        rolling_tasks.init_qlib(made.qlib_init)
        theirs = next(
            r for r in recorders(made) if r.id == result.outcomes[twin].recorder
        )
        pd.testing.assert_series_equal(ours, theirs.load_object("pred.pkl")["score"])

    def test_model_and_data_of_a_task_are_those_of_qrun(self, on_rolled):
        """Shared frames change nothing: the moved task run by itself is the same."""
        made, result, _ = on_rolled
        task = result.tasks[0]
        dataset = PanelDataset(**_instances(task.config["dataset"]["kwargs"]))
        model = MultiFactorRNN(**task.config["model"]["kwargs"])
        import torch

        torch.set_num_threads(1)
        model.fit(dataset)
        theirs = next(
            r for r in recorders(made) if r.id == result.outcomes[0].recorder
        ).load_object("pred.pkl")["score"]
        pd.testing.assert_series_equal(model.predict(dataset), theirs, rtol=1e-4)


def _instances(kwargs):
    from qlib.utils import init_instance_by_config

    return {**kwargs, "handler": init_instance_by_config(kwargs["handler"])}


class TestSharing:
    def test_a_cut_handler_equals_one_that_reads_the_store(self, qlib_market):
        from data_handlers.day import DayHandler

        config = dict(
            start_time="2019-01-01",
            end_time="2020-03-31",
            fit_start_time="2019-01-01",
            fit_end_time="2019-06-30",
        )
        alone = DayHandler(**config)
        share = FrameShare("2018-01-01", "2020-12-31")
        with shared_frames(share):
            cut = DayHandler(**config)
            later = DayHandler(**{**config, "fit_end_time": "2019-09-30"})
        assert share.loads == 1
        for key in (alone.DK_R, alone.DK_I, alone.DK_L):
            pd.testing.assert_frame_equal(
                cut._get_df_by_key(key),
                alone._get_df_by_key(key),
                rtol=1e-4,
                atol=1e-5,
                check_like=True,
            )
        assert not np.allclose(
            later.infer_processors[0].mean_, cut.infer_processors[0].mean_
        )

    def test_a_handler_beyond_the_span_reads_the_store(self, qlib_market):
        from data_handlers.day import DayHandler

        share = FrameShare("2019-01-01", "2019-12-31")
        with shared_frames(share):
            handler = DayHandler(
                start_time="2018-06-01",
                end_time="2019-12-31",
                fit_start_time="2018-06-01",
                fit_end_time="2018-12-31",
                styles=[],
            )
        assert share.loads == 0
        assert handler._infer.index[0][0] < pd.Timestamp("2019-01-01")

    def test_handlers_of_qlib_share_and_still_pickle(self, qlib_market):
        import pickle

        from qlib.contrib.data.handler import Alpha360

        config = {
            "class": "Alpha360",
            "module_path": "qlib.contrib.data.handler",
            "kwargs": {
                "instruments": ["SH600000", "SH600001"],
                "start_time": "2020-01-01",
                "end_time": "2020-03-31",
                "infer_processors": [],
            },
        }
        share = FrameShare("2020-01-01", "2020-06-30")
        with shared_frames(share):
            handler = rolling_tasks._handler(config)
        assert share.loads == 1
        assert type(handler) is Alpha360
        assert type(pickle.loads(pickle.dumps(handler))) is Alpha360
        assert label_reach_of({"dataset": {"kwargs": {"handler": config}}}) == 2

    def test_frames_are_kept_for_models_and_records_that_read_them(self):
        task = WORKFLOW["task"]
        signal, analysis = task["record"]
        forest = {"class": "LGBModel", "module_path": "qlib.contrib.model.gbdt"}
        table = {"class": "DatasetH", "module_path": "qlib.data.dataset"}
        for change, panel_alone in (
            ({"record": [signal]}, True),
            ({"record": [signal, analysis]}, False),
            ({"record": [signal], "model": forest}, False),
            ({"record": [signal], "dataset": table}, False),
        ):
            assert rolling_tasks._reads_panel({**task, **change}) is panel_alone

    def test_a_data_set_for_panels_holds_no_processed_frame(self, on_rolled):
        made, result, folder = on_rolled
        context = rolling_tasks.Context(
            run="r",
            qlib_init=made.qlib_init,
            experiment="e",
            span=("2018-01-01", "2020-12-31"),
            work=str(folder),
        )
        config = result.tasks[0].config["dataset"]
        full = rolling_tasks.make_dataset(config, context)
        small = rolling_tasks.make_dataset(config, context, panel_only=True)
        rolling_tasks.forget()
        assert isinstance(full.handler._infer, pd.DataFrame)
        assert not isinstance(small.handler._infer, pd.DataFrame)
        assert small.panel.fingerprint() == full.panel.fingerprint()
        label = {"col_set": "label", "data_key": "raw"}
        pd.testing.assert_frame_equal(
            small.prepare("test", **label), full.prepare("test", **label)
        )


@pytest.fixture
def flaky(monkeypatch):
    """Module whose model fails as often as `fail` says for a seed."""
    module = types.ModuleType("flaky_model")
    module.fail, module.error = {}, RuntimeError("out of luck")

    class Flaky(MultiFactorRNN):
        def fit(self, dataset, **kwargs):
            if module.fail.get(self.seed, 0) > 0:
                module.fail[self.seed] -= 1
                raise module.error
            super().fit(dataset)

    Flaky.__module__, Flaky.__qualname__ = "flaky_model", "Flaky"
    module.Flaky = Flaky
    monkeypatch.setitem(sys.modules, "flaky_model", module)
    return module


class TestFailure:
    def test_a_wrong_value_is_not_tried_again(
        self, market_small, folder, flaky, caplog
    ):
        config = workflow(market_small)
        config["task"]["model"].update({"class": "Flaky", "module_path": "flaky_model"})
        flaky.fail, flaky.error = {3: 9}, ValueError("at http://me:s3cret@host: no")
        test = "2020-07-01:2020-09-30"
        _, result = run(
            market_small, folder, seeds=1, test=test, config=config, retries=3
        )
        ((_, outcome),) = result.failed
        assert outcome.attempts == 1
        assert outcome.error == "ValueError: at http://me:***@host: no"
        assert "s3cret" not in caplog.text

    def test_a_failed_task_is_tried_again_reported_and_sinks_no_other(
        self, market_small, folder, flaky
    ):
        config = workflow(market_small)
        config["task"]["model"].update({"class": "Flaky", "module_path": "flaky_model"})
        flaky.fail = {3: 1, 4: 2}  # seed 3 succeeds at the second attempt, 4 fails
        test = "2020-07-01:2020-09-30"
        _, result = run(market_small, folder, test=test, config=config)
        assert [(o.status, o.attempts) for o in result.outcomes] == [
            ("finished", 2),
            ("failed", 2),
        ]
        ((task, outcome),) = result.failed
        assert task.seed == 4
        assert outcome.error == "RuntimeError: out of luck"
        assert result.recorder == ""
        # What failed is tried again by the same command, what is finished is kept.
        _, again = run(market_small, folder, test=test, config=config)
        assert [o.status for o in again.outcomes] == ["kept", "finished"]
        assert again.recorder

    def test_partial_joins_what_there_is(self, market_small, folder, flaky):
        config = workflow(market_small)
        config["task"]["model"].update({"class": "Flaky", "module_path": "flaky_model"})
        flaky.fail = {4: 9}
        test = "2020-07-01:2020-09-30"
        _, result = run(
            market_small, folder, test=test, config=config, partial=True, retries=0
        )
        assert len(result.failed) == 1
        assert result.recorder

    def test_command_ends_with_one_and_names_the_failure(
        self, market_small, folder, flaky, monkeypatch
    ):
        import yaml
        from click.testing import CliRunner

        from qlib_ext.cli import main

        config = workflow(market_small)
        config["task"]["model"].update({"class": "Flaky", "module_path": "flaky_model"})
        flaky.fail = {3: 9}
        monkeypatch.chdir(folder)
        (folder / "w.yaml").write_text(yaml.safe_dump(config))
        options = "--step quarter --train-months 6 --valid-months 3 --seeds 1 --quiet"
        command = ["roll", "w.yaml", "--test", "2020-07-01:2020-09-30"]
        with monkeypatch.context() as patched:  # a dry run reads no number of the store
            patched.setattr("qlib_ext.rolling.retrain.fingerprints", None)
            done = CliRunner().invoke(main, [*command, *options.split(), "--dry-run"])
        assert done.exit_code == 0, done.output
        assert "2020-07-01 to 2020-09-30" in done.output
        done = CliRunner().invoke(
            main, [*command, *options.split(), "--threads", "1", "--retries", "0"]
        )
        assert done.exit_code == 1
        assert "FAILED 2020-07 seed 3 (1 attempts): RuntimeError: out of luck" in (
            done.output
        )

    def test_two_processes_do_not_work_on_one_run(self, on_rolled):
        import fcntl

        made, _, folder = on_rolled
        lock = folder / "work" / made.run / "lock"
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match="being worked on by another process"):
                roll(made, work=folder / "work")


def test_windows_that_share_a_day_and_seeds_that_differ_are_refused():
    days = pd.bdate_range("2020-01-01", periods=3)
    index = pd.MultiIndex.from_product(
        [days, ["A", "B"]], names=["datetime", "instrument"]
    )
    score = pd.Series(np.arange(6.0), index=index)
    with pytest.raises(ValueError, match="two windows score 2020-01-01"):
        join_scores([[score], [score]])
    with pytest.raises(ValueError, match="score different stocks"):
        join_scores([[score, score.iloc[1:]]])
    # Worked by hand: each day is (-1, 1) after standardising, whatever its scale.
    both = join_scores([[score, 10 * score]])
    assert both.tolist() == pytest.approx([-1, 1] * 3)


def test_what_records_print_is_not_shown(tmp_path, monkeypatch, capsys):
    text = """\
        class Loud:
            def __init__(self, recorder, model=None, dataset=None):
                self.recorder = recorder

            def generate(self):
                print("The following are prediction results")
                self.recorder.append("done")
    """
    (tmp_path / "loud_record.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    done = []
    rolling_tasks.run_records(
        [{"class": "Loud", "module_path": "loud_record"}], done, None, None
    )
    assert done == ["done"] and capsys.readouterr().out == ""
