import contextlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import socket
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlib_ext import recorders


class _Attack:
    def __reduce__(self):
        return os.system, ("echo attacked > /tmp/should-not-exist",)


def _frame():
    days = pd.date_range("2020-01-01", periods=2, freq="B", name="datetime")
    index = pd.MultiIndex.from_product(
        [days, ["SH600000", "SZ000001"]], names=["datetime", "instrument"]
    )
    return pd.DataFrame({"score": np.arange(4, dtype="f4")}, index)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_frames_and_series_load_as_they_were(protocol):
    frame = _frame()
    for value in (frame, frame["score"], frame.reset_index(), frame["score"].unstack()):
        file = io.BytesIO(pickle.dumps(value, protocol))
        got = recorders.FrameUnpickler(file).load()
        assert type(got) is type(value)
        assert got.equals(value)


def test_a_pickle_that_runs_code_is_refused():
    file = io.BytesIO(pickle.dumps(_Attack()))
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load (posix|nt)"):
        recorders.FrameUnpickler(file).load()


def test_a_frame_that_hides_code_is_refused():
    frame = pd.DataFrame({"score": [_Attack()]})
    with pytest.raises(pickle.UnpicklingError, match="refused to load"):
        recorders.FrameUnpickler(io.BytesIO(pickle.dumps(frame))).load()


def test_absent_database_is_named_and_not_created(tmp_path):
    uri = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(ValueError, match=r"none\.db does not exist"):
        recorders.list_recorders(uri, "any")
    assert not (tmp_path / "none.db").exists()
    for uri in (f"{tmp_path}/mlruns", f"file:{tmp_path}/mlruns"):
        with pytest.raises(ValueError, match="mlruns does not exist"):
            recorders.list_recorders(uri, "any")
        assert recorders.close_dead(uri) == []
    assert not (tmp_path / "mlruns").exists()


class TestRealRecorder:
    @pytest.fixture(scope="class")
    def recorder(self, qlib_market):
        from qlib.workflow import R

        with R.start(experiment_name="reading"):
            recorder = R.get_recorder()
            recorder.save_objects(
                **{"pred.pkl": _frame(), "label.pkl": None, "bad.pkl": _Attack()}
            )
            recorder.save_objects(**{"dict.pkl": {"a": 1}})
        return recorder

    def test_recorder_is_found_and_its_frame_read(self, recorder):
        found = recorders.list_recorders(recorder.uri, "reading")
        assert [r.id for r in found] == [recorder.id]
        assert recorders.load_frame(found[0], "pred.pkl").equals(_frame())
        assert recorders.load_frame(found[0], "label.pkl").empty

    @pytest.mark.parametrize(
        ("column", "params", "horizon"),
        [
            ("Ref($close, -6) / Ref($close, -1) - 1", {}, 5),
            ("RET20_open", {}, 20),
            ("LABEL0", {"dataset.kwargs.handler.module_path": "ours"}, None),
            (
                "LABEL0",
                {"dataset.kwargs.handler.module_path": "qlib.contrib.data.handler"},
                1,
            ),
            ("$close", {}, None),
            ("__import__('os').abort()", {}, None),
        ],
    )
    def test_horizon_is_read_from_the_label_alone(
        self, qlib_market, column, params, horizon
    ):
        from qlib.workflow import R

        with R.start(experiment_name="labels"):
            made = R.get_recorder()
            made.log_params(**params)
            made.save_objects(**{"label.pkl": _frame().set_axis([column], axis=1)})
        assert recorders.stated_horizon(made) == horizon

    def test_bad_artifacts_are_named(self, recorder):
        with pytest.raises(ValueError, match=r"bad\.pkl of recorder .*refused"):
            recorders.load_frame(recorder, "bad.pkl")
        with pytest.raises(ValueError, match="must be a DataFrame, got dict"):
            recorders.load_frame(recorder, "dict.pkl")
        with pytest.raises(ValueError, match=r"has no artifact none\.pkl"):
            recorders.load_frame(recorder, "none.pkl")

    def test_unknown_experiment_lists_the_known(self, recorder):
        with pytest.raises(ValueError, match=r"'nothing' is not in .*reading"):
            recorders.list_recorders(recorder.uri, "nothing")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_an_interrupted_run_is_no_finished_one(self, qlib_market, error):
        from qlib.workflow import R

        from qlib_ext.rolling.tasks import start_recorder

        name = f"interrupted {error.__name__}"
        for started in (
            lambda: R.start(experiment_name=name),
            lambda: start_recorder(name, "task", {}),
        ):
            with (
                pytest.raises(error),
                recorders.failed_if_interrupted(),
                started(),
            ):
                raise error
            assert R.exp_manager.active_experiment is None
        found = recorders.list_recorders(R.get_uri(), name, finished=False)
        assert [r.status for r in found] == ["FAILED", "FAILED"]

    def test_absent_report_names_the_remedy(self, recorder):
        with pytest.raises(ValueError, match="FactorRecord"):
            recorders.find_recorder(recorder.uri, "reading")

    def test_report_shows_a_run_without_factor_record(self, qlib_market, tmp_path):
        from click.testing import CliRunner
        from qlib.workflow import R

        from qlib_ext.cli import main

        (tmp_path / "report.html").write_text("<p>timed</p>")
        with R.start(experiment_name="timed"):
            made = R.get_recorder()
            made.log_metrics(**{"timing hit rate": 0.625})
            made.save_objects(str(tmp_path / "report.html"), artifact_path="timing")
        asked = ["--experiment", "timed", "--uri", made.uri, "--out", str(tmp_path)]
        shown = CliRunner().invoke(main, ["report", *asked])
        assert shown.exit_code == 0, shown.output
        assert "timing hit rate" in shown.output and "0.625" in shown.output
        copied = tmp_path / f"timed-{made.id[:8]}-timing.html"
        assert copied.read_text() == "<p>timed</p>" and str(copied) in shown.output

    @pytest.mark.parametrize("size", [0, 60])
    @pytest.mark.parametrize("kind", ["pkl", "parquet", "json"])
    def test_cut_files_are_named_with_the_remedy(self, recorder, tmp_path, kind, size):
        file = tmp_path / f"cut.{kind}"
        if kind == "json":
            file.write_text(json.dumps({"figures": list(range(100))}))
        else:
            write = {"pkl": "to_pickle", "parquet": "to_parquet"}[kind]
            getattr(_frame(), write)(file)
        file.write_bytes(file.read_bytes()[:size])
        recorder.save_objects(local_path=str(file))
        read = recorders.load_json if kind == "json" else recorders.load_frame
        with pytest.raises(
            ValueError, match=rf"cut\.{kind} of recorder .*empty or cut short; make"
        ) as error:
            read(recorder, file.name)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "what"), [("[1]", "is no mapping"), ('{"a": 1}', "lacks 'horizon'")]
    )
    def test_other_json_is_named(self, recorder, tmp_path, text, what):
        (tmp_path / "other.json").write_text(text)
        recorder.save_objects(local_path=str(tmp_path / "other.json"))
        with pytest.raises(ValueError, match=rf"other\.json of recorder .*{what}"):
            recorders.load_json(recorder, "other.json", "horizon")


class TestStore:
    @pytest.fixture
    def uri(self, tmp_path, fresh_database, monkeypatch):
        monkeypatch.chdir(tmp_path)
        return f"sqlite:///{fresh_database(tmp_path)}/mlruns.db"

    def test_runs_whose_process_is_gone_are_marked_killed(self, uri, caplog):
        client = MlflowClient(uri)
        experiment = client.create_experiment("e")
        gone = multiprocessing.get_context("fork").Process(target=int)
        gone.start()
        gone.join()
        ours, host = recorders.this_process(), socket.gethostname()

        def status(tag):
            tags = {} if tag is None else {recorders.PROCESS: tag}
            return client.create_run(experiment, tags=tags).info.run_id

        dead = [status(f"{host}:{gone.pid}:7"), status(f"{host}:{os.getpid()}:7")]
        alive = [status(ours), status(f"elsewhere:{gone.pid}:7"), status(None)]
        with caplog.at_level(logging.WARNING, logger="qlib.qlib_ext.recorders"):
            assert sorted(recorders.close_dead(uri)) == sorted(dead)
        assert "1 run(s) count as running and do not say" in caplog.text
        assert caplog.text.rstrip().endswith(f"may be dead: {alive[-1][:8]}")
        for runs, expected in ((dead, "KILLED"), (alive, "RUNNING")):
            assert {client.get_run(r).info.status for r in runs} == {expected}
        assert recorders.close_dead(uri) == []
        assert recorders.close_dead("sqlite:///absent.db") == []

    def test_runs_started_meanwhile_carry_the_process(self, uri):
        import mlflow

        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(uri)
        try:
            with recorders.tagged_runs(), mlflow.start_run() as run:
                pass
            with mlflow.start_run() as other:
                pass
        finally:
            mlflow.set_tracking_uri(before)
        tags = MlflowClient(uri).get_run(run.info.run_id).data.tags
        assert tags[recorders.PROCESS] == recorders.this_process()
        tags = MlflowClient(uri).get_run(other.info.run_id).data.tags
        assert recorders.PROCESS not in tags

    def test_processes_that_start_together_make_one_database(self, tmp_path):
        uri = f"sqlite:///{tmp_path}/new.db"
        context = multiprocessing.get_context("fork")
        both = [
            context.Process(target=recorders.prepare_store, args=(uri, "a", name))
            for name in ("b", "c")
        ]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        names = {x.name for x in MlflowClient(uri).search_experiments()}
        assert names == {"Default", "a", "b", "c"}
        assert not list(tmp_path.glob("*.lock"))

    def test_a_process_killed_while_it_makes_the_database_leaves_none(
        self, tmp_path, monkeypatch
    ):
        def killed(tracking_uri):
            Path(tracking_uri.removeprefix("sqlite:///")).write_bytes(b"half")
            os._exit(9)

        new = tmp_path / "new.db"
        monkeypatch.setattr(recorders, "MlflowClient", killed)
        process = multiprocessing.get_context("fork").Process(
            target=recorders.prepare_store, args=(f"sqlite:///{new}", "a")
        )
        process.start()
        process.join()
        assert process.exitcode == 9 and not new.exists()
        monkeypatch.undo()
        recorders.prepare_store(f"sqlite:///{new}", "a")
        assert MlflowClient(f"sqlite:///{new}").get_experiment_by_name("a")

    @pytest.mark.parametrize(
        "use", [recorders.prepare_store, recorders.close_dead, recorders.find_recorder]
    )
    def test_a_database_left_half_made_is_named(self, use, tmp_path):
        file = tmp_path / "half.db"
        with contextlib.closing(sqlite3.connect(file)) as half:
            half.execute("create table latest_metrics (x int)")
        match = r"half\.db was left half made .* move the file away and run again"
        with pytest.raises(ValueError, match=match):
            use(f"sqlite:///{file}")

    @pytest.mark.parametrize("use", [recorders.close_dead, recorders.find_recorder])
    def test_a_database_without_its_driver_is_named(self, use, monkeypatch):
        def absent(tracking_uri):
            raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

        monkeypatch.setattr(recorders, "MlflowClient", absent)
        match = r"me:\*\*\*@h/d needs the Python package psycopg, .* install psycopg"
        with pytest.raises(ValueError, match=match):
            use("postgresql://me:s3c@h/d")

    def test_a_run_of_plain_qrun_is_tagged_and_its_benchmark_checked(
        self, uri, qlib_market
    ):
        import mlflow

        before = mlflow.get_tracking_uri()
        client = MlflowClient(uri)
        gone = {recorders.PROCESS: f"{socket.gethostname()}:{os.getpid()}:7"}
        dead = client.create_run("0", tags=gone).info.run_id
        manager = recorders.RunManager(uri, "default")
        experiment = manager.start_exp(experiment_name="e")
        try:
            recorder = experiment.active_recorder
            tags = client.get_run(recorder.id).data.tags
            assert tags[recorders.PROCESS] == recorders.this_process()
            assert client.get_run(dead).info.status == "KILLED"

            def task(code):
                config = {"backtest": {"benchmark": code}}
                return {
                    "record": [{"class": "SignalRecord", "kwargs": {"config": config}}]
                }

            recorder.save_objects(task=task("SH000300"))
            with pytest.raises(ValueError, match="no close of SPY; set it to a code"):
                recorder.save_objects(task=task("SPY"))
            lacking = {"enhance": {"market": "csi30"}}
            match = "`task.enhance.market` is 'csi30', .* one of all, csi"
            with pytest.raises(ValueError, match=match):
                recorder.save_objects(task={**task("SH000300"), **lacking})
        finally:
            manager.end_exp(recorder_status="FAILED")
            mlflow.set_tracking_uri(before)
        assert client.get_run(recorder.id).info.status == "FAILED"
        assert client.get_experiment_by_name("e") is not None

    def test_a_file_store_beside_it_is_found_and_stays_as_it_is(self, uri, tmp_path):
        store = MlflowClient(f"file:{tmp_path}/mlruns")
        old = store.create_experiment("old")
        before = sorted(tmp_path.glob("mlruns/*"))
        recorders.prepare_store(uri, "new")
        client = MlflowClient(uri)
        run = client.create_run(client.get_experiment_by_name("new").experiment_id)
        client.log_text(run.info.run_id, "text", "a.txt")
        assert sorted(tmp_path.glob("mlruns/*")) == before
        assert len(list(tmp_path.glob("mlartifacts/*/artifacts/a.txt"))) == 1
        assert {x.name for x in store.search_experiments()} >= {"old"}
        hint = rf"--uri file:{tmp_path}/mlruns"
        with pytest.raises(ValueError, match=hint):
            recorders.list_recorders(uri, "old")
        with pytest.raises(ValueError, match=hint):
            recorders.find_recorder(uri)
        with pytest.raises(ValueError, match=hint):
            recorders.find_recorder("sqlite:///absent.db")
        assert old


class TestReport:
    def test_report_shows_a_run_without_a_page(self, tmp_path, fresh_database):
        from qlib_ext.cli.report import report_text

        uri = f"sqlite:///{fresh_database(tmp_path)}/mlruns.db"
        client = MlflowClient(uri)
        run = client.create_run(client.create_experiment("plain")).info.run_id
        with pytest.raises(ValueError, match=r"is running and holds nothing"):
            report_text(uri, tmp_path, "plain")  # no figure either
        for name in ("pred.pkl", "label.pkl"):
            client.log_text(run, "", name)
        with pytest.raises(ValueError, match=r"holds label\.pkl.*compare 'plain'"):
            report_text(uri, tmp_path, "plain")
        client.log_metric(run, "Rank IC", 0.0625)
        client.set_terminated(run)
        text = report_text(uri, tmp_path, "plain")
        assert "Rank IC" in text and "0.0625" in text
        assert "no page: FactorRecord" in text

    def test_a_run_whose_later_record_failed_shows_its_figures(
        self, tmp_path, fresh_database, monkeypatch
    ):
        from qlib_ext.cli.report import report_text

        monkeypatch.chdir(tmp_path)
        uri = f"sqlite:///{fresh_database(tmp_path)}/mlruns.db"
        client = MlflowClient(uri)
        run = client.create_run(client.create_experiment("e")).info.run_id
        context = {
            "figures": {"Rank IC 10d": 0.0712},
            "horizon": 10,
            "universe": "all",
            "start": "2020-01-02",
            "end": "2020-12-31",
            "days": 243,
            "stocks": 99.0,
            "label": "10 days",
        }
        client.log_text(run, json.dumps(context), "factor/context.json")
        client.log_text(run, "<html>", "factor/report.html")
        text = report_text(uri, tmp_path / "out")
        assert "running" in text and "may go on or be dead" in text
        client.set_tag(run, recorders.PROCESS, recorders.this_process())
        assert "the run still goes on" in report_text(uri, tmp_path / "out")
        client.set_terminated(run, "FAILED")
        text = report_text(uri, tmp_path / "out")
        assert "FAILED: the run ended before all its records were done" in text
        assert "7.12" in text
        client.set_terminated(run, "FINISHED")
        assert "FAILED" not in report_text(uri, tmp_path / "out")


def test_passwords_are_masked_in_log_lines_and_tracebacks():
    from qlib_ext.masking import mask_logs

    before = logging.getLogRecordFactory()
    log, stream = logging.getLogger("masked"), io.StringIO()
    log.addHandler(handler := logging.StreamHandler(stream))
    try:
        mask_logs()
        mask_logs()  # once is enough
        log.warning("at %s", "http://me:s3cret@host")
        try:
            raise RuntimeError("http://me:s3cret@host:5000")
        except RuntimeError:
            log.exception("failed")
        log.warning("50 % of it")
    finally:
        logging.setLogRecordFactory(before)
        log.removeHandler(handler)
    text = stream.getvalue()
    assert "s3cret" not in text
    assert "at http://me:***@host\n" in text
    assert "RuntimeError: http://me:***@host:5000" in text
    assert "50 % of it" in text


def test_passwords_are_masked_wherever_they_stand():
    from qlib_ext.masking import masked, redact

    assert redact("at http://me:s3:cr@t@host:5000/x, b@c") == (
        "at http://me:***@host:5000/x, b@c"
    )
    assert redact("postgresql://h/db?user=me&password=s3c&x=1") == (
        "postgresql://h/db?user=me&password=***&x=1"
    )
    assert (
        redact("sqlite:////a/b.db http://h:5000") == "sqlite:////a/b.db http://h:5000"
    )
    assert redact("mysql://me:s3/cr@h/d, http://h:80/x@y") == (
        "mysql://me:***@h/d, http://h:80/x@y"
    )
    assert redact("s3://k:s3'c@h") == "s3://k:***@h"
    # Of tokens the user's name is the secret, alone or before a constant.
    assert redact("https://ghp_t0ken@h/x is off") == "https://***@h/x is off"
    token = "ghp_0123456789abcdef"
    assert redact(f"git+https://{token}:x-oauth@h") == "git+https://***:***@h"
    assert redact(f"https://{token}:@h:443") == "https://***:***@h:443"
    for text in ("?access_token=s3c&x", "PGPASSWORD='s3c r'", "{'api_key': \"s3c\"}"):
        assert "s3c" not in redact(text) and "***" in redact(text)
    for text in ("no password: give one", "cannot start any token", "key=3 a@b.cn"):
        assert redact(text) == text
    for text in ("http://h?to=a@b.cn", '{"uri":"http://h","to":"a@b.cn"}'):
        assert redact(text) == text
    config = {"qlib_init": [{"uri": "http://me:s3c@h", "n": 3}], "x": None}
    assert masked(config) == {
        "qlib_init": [{"uri": "http://me:***@h", "n": 3}],
        "x": None,
    }


@pytest.mark.parametrize(
    "text",
    [
        "Ref($close, -2) / Ref($close, -1) - 1_seed0_loss",
        "a//b",
        "/a",
        "../a",
        "市值 %",
    ],
)
def test_any_text_becomes_a_name_that_mlflow_takes(text):
    from mlflow.utils.validation import _validate_metric_name

    with pytest.raises(MlflowException):
        _validate_metric_name(text)
    _validate_metric_name(recorders.metric_name(text))
    kept = "Rank IC 10d / csi300: 0.5-1"
    assert recorders.metric_name(kept) == kept
