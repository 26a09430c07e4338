"""Scores of a new day: equal to the batch, without a refit, refused if incomplete."""

import contextlib
import io
import json
import os
import pickle
import shutil
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from qlib.data import D
from qlib.data.dataset.handler import DataHandlerLP

from data_handlers.day import DayHandler
from qlib_ext.cli.track import track_text
from qlib_ext.dataset import PanelDataset
from qlib_ext.ingest.store import (
    extend_store,
    read_bars,
    read_calendar,
    read_instruments,
    write_store,
)
from qlib_ext.models import IncrementalModel, Mamba, MultiFactorRNN, description
from qlib_ext.report.tracking import read_score
from qlib_ext.rolling import score as scoring
from qlib_ext.rolling.score import FOLDER, IncompleteDayError, score_day

HANDLER = dict(
    start_time="2019-06-03",
    fit_start_time="2019-06-03",
    fit_end_time="2019-12-16",
    styles=[],
)
SEGMENTS = {
    "train": ("2019-06-03", "2019-12-16"),
    "valid": ("2020-01-02", "2020-03-16"),
    "test": ("2020-04-01", "2020-06-30"),
}
TINY = dict(hidden_size=4, num_layers=2, step_len=10, n_epochs=1, n_seeds=2, GPU=-1)


FIELDS = ["open", "high", "low", "close", "vwap", "volume", "turnover", "market_cap"]


@pytest.fixture(scope="module")
def history(market):
    """Bars of thirty stocks from 2019 on, and their days."""
    codes = sorted(set(read_instruments(market)["instrument"]))[:30]
    bars = read_bars(market, codes, [*FIELDS, "industry"])
    bars = bars[bars["datetime"] >= "2019-03-01"]
    return bars, read_calendar(market)


def until(store, bars, day):
    """Append the bars after the store's end, up to `day`."""
    end = read_calendar(store)[-1]
    new = bars[(bars["datetime"] > end) & (bars["datetime"] <= day)]
    extend_store(store, new, expected_end=end)


@pytest.fixture(scope="module")
def short_store(history, tmp_path_factory):
    """The thirty stocks as they were on 2020-06-30: later days are not there yet."""
    store = tmp_path_factory.mktemp("short") / "store"
    write_store(store, history[0][history[0]["datetime"] <= "2020-06-30"])
    return store


@pytest.fixture
def use_store(use_store, tmp_path, fresh_database):
    """As in conftest, on a tracking database that is there already."""
    shutil.copy(fresh_database(tmp_path) / "mlruns.db", tmp_path / "mlflow.db")
    return use_store


def train(store, model, use_store, folder, handler=None, name="scored"):
    """Train as qrun does, on a store that ends 2020-06-30; return the recorder.

    A name of `MODELS` is trained on the default handler, once for all tests.
    """
    from qlib.workflow import R

    use_store(store)
    if model in _LEFT:
        with recording(name) as own:
            own.save_objects(local_path=_LEFT[model])
        return own
    kind, model = model, MODELS[model]() if isinstance(model, str) else model
    torch.set_num_threads(1)
    dataset = PanelDataset(
        handler or DayHandler(end_time="2020-06-30", **HANDLER), SEGMENTS
    )
    with R.start(experiment_name=name):
        model.fit(dataset)
        recorder = R.get_recorder()
        R.save_objects(**{"params.pkl": model})
        dataset.config(dump_all=False, recursive=True)
        R.save_objects(dataset=dataset)
        R.save_objects(**{"pred.pkl": model.predict(dataset).to_frame("score")})
    if kind is not model:
        files = recorder.client.download_artifacts(recorder.id, "")
        _LEFT[kind] = str(shutil.copytree(files, folder / kind))
    return recorder


_LEFT: dict = {}  # what qrun leaves, by the name of the model


def batch(recorder, days):
    """Scores of days by the whole history, as Qlib's own updater would make them."""
    dataset, model = (recorder.load_object(k) for k in ("dataset", "params.pkl"))
    dataset.config(
        handler_kwargs={"start_time": days[0], "end_time": days[-1]},
        segments={"test": (days[0], days[-1])},
    )
    dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})
    return model.predict(dataset)


def same(ours, theirs):
    theirs = theirs[theirs.index.isin(ours.index.get_level_values(0).unique(), level=0)]
    assert len(ours) == len(theirs) > 20
    difference = ours.sort_index() - theirs.sort_index()
    assert float(difference.abs().max()) <= 1e-5


MODELS = {
    "stream": lambda: MultiFactorRNN(n_factors=2, mode="stream", **TINY),
    "windows": lambda: MultiFactorRNN(
        n_factors=2, mode="windows", day_stride=9, **TINY
    ),
    "lstm": lambda: MultiFactorRNN(n_factors=1, rnn="LSTM", mode="stream", **TINY),
    "mamba": lambda: Mamba(
        task="alpha_raw", d_model=8, d_state=4, step_len=10, n_epochs=1, GPU=-1
    ),
}


SLOW = pytest.mark.slow


class TestEqualToBatch:
    @pytest.mark.parametrize(
        "kind",
        [
            "stream",
            "windows",
            *(pytest.param(k, marks=SLOW) for k in ("lstm", "mamba")),
        ],
    )
    def test_day_after_day(self, kind, short_store, history, use_store, tmp_path):
        bars, calendar = history
        store = tmp_path / "store"
        shutil.copytree(short_store, store)
        recorder = train(store, kind, use_store, tmp_path)
        later = calendar[calendar > "2020-06-30"]
        # One day, the next, then a jump over three.
        scored = {}
        for i in (0, 1, 5):
            until(store, bars, later[i])
            use_store(store)
            result = score_day(recorder, later[i])
            scored[later[i]] = result
            assert result.score.index.get_level_values(0).unique() == [later[i]]
        expected = batch(recorder, later[:6])
        for day, result in scored.items():
            same(result.score, expected[expected.index.get_level_values(0) == day])
            kept = recorder.list_artifacts(FOLDER)
            assert f"{FOLDER}/{day:%Y-%m-%d}.parquet" in kept
        if kind == "stream":
            self.tracked(store, recorder, later[:6], expected, tmp_path)
        if kind != "windows":
            # The first day had to read all history, the others one to four days.
            assert any("from the first day on" in n for n in scored[later[0]].notes)
            assert not any("from the first" in n for n in scored[later[5]].notes)

    def tracked(self, store, recorder, days, expected, folder):
        """The tracking page scores the three days that were jumped over."""
        file = folder / "track.yaml"
        file.write_text(
            f"factors: {{one: {{recorder: {recorder.id}, horizon: 10}}}}\n"
            "styles: false\n"
            f"store: {store}\nuri: {recorder.uri}\n"
        )
        assert "gap" not in track_text(file, folder)
        score, end = read_score(recorder)
        assert end == pd.Timestamp("2020-06-30")
        after = score[score.index.get_level_values("datetime") > end]
        assert list(after.index.unique("datetime").sort_values()) == list(days)
        same(after, expected)

    def test_a_new_listing_and_a_damaged_or_outdated_state(
        self, short_store, history, use_store, tmp_path
    ):
        bars, calendar = history
        store = tmp_path / "store"
        shutil.copytree(short_store, store)
        recorder = train(store, "stream", use_store, tmp_path)
        later = calendar[calendar > "2020-06-30"]
        twin = bars[bars["instrument"] == bars["instrument"].iloc[0]]
        listed = twin[twin["datetime"] >= later[1]].assign(instrument="SZ999999")
        bars = pd.concat([bars, listed])
        for day in later[:2]:
            until(store, bars, day)
            use_store(store)
            result = score_day(recorder, day)
        assert "SZ999999" in result.score.index.get_level_values(1)
        same(result.score, batch(recorder, later[:2]))
        # A state that was cut off is not used, and the answer is the same.
        files = recorder.client.download_artifacts(recorder.id, FOLDER)
        name = f"state-{later[1]:%Y-%m-%d}.npz"
        whole = (tmp_path / "cut.npz").parent / name
        data = open(f"{files}/{name}", "rb").read()
        whole.write_bytes(data[: len(data) // 2])
        recorder.save_objects(local_path=str(whole), artifact_path=FOLDER)
        until(store, bars, later[2])
        use_store(store)
        result = score_day(recorder, later[2])
        assert any("damaged" in note for note in result.notes)
        same(result.score, batch(recorder, later[:3]))

    def test_a_state_of_another_past_is_not_used(
        self, short_store, history, use_store, tmp_path
    ):
        bars, calendar = history
        store = tmp_path / "store"
        shutil.copytree(short_store, store)
        recorder = train(store, "stream", use_store, tmp_path)
        later = calendar[calendar > "2020-06-30"]

        def score(day, bars):
            shutil.rmtree(store)
            write_store(store, bars[bars["datetime"] <= day])
            use_store(store)
            return score_day(recorder, day)

        score(later[0], bars)
        # A split: all prices of a stock are halved, and no feature is another one.
        bars, stock = bars.copy(), bars["instrument"].iloc[0]
        prices = ["open", "high", "low", "close", "vwap"]
        of_stock = bars["instrument"] == stock
        bars.loc[of_stock, prices] /= 2
        result = score(later[1], bars)
        assert not any("built" in note for note in result.notes)
        same(result.score, batch(recorder, later[:2]))
        # A vendor corrects a turnover of last year; the state's own day stays.
        at = bars.index[of_stock & (bars["datetime"] > "2019-11-11")][0]
        bars.loc[at, "turnover"] *= 3
        day = bars.loc[at, "datetime"]
        result = score(later[2], bars)
        text = f"1 day(s), the first {day:%Y-%m-%d}, have changed"
        assert any(text in note for note in result.notes)
        same(result.score, batch(recorder, later[:3]))

    def test_general_path_of_a_model_that_reads_more(
        self, short_store, history, use_store, tmp_path
    ):
        bars, calendar = history
        store = tmp_path / "store"
        shutil.copytree(short_store, store)
        model = Mamba(
            task="dual",
            graphs=[],
            d_model=8,
            d_state=4,
            step_len=10,
            n_epochs=1,
            GPU=-1,
        )
        handler = DayHandler(end_time="2020-06-30", **{**HANDLER, "styles": ["size"]})
        recorder = train(store, model, use_store, tmp_path, handler=handler)
        day = calendar[calendar > "2020-06-30"][0]
        until(store, bars, day)
        use_store(store)
        result = score_day(recorder, day)
        assert any("reads more than features" in note for note in result.notes)
        same(result.score, batch(recorder, [day]))

    def test_general_path_of_features_neutralised_on_exposures(
        self, short_store, history, use_store, tmp_path
    ):
        bars, calendar = history
        store = tmp_path / "store"
        shutil.copytree(short_store, store)
        neutral = {
            "class": "CSNeutralize",
            "module_path": "data_handlers.processors",
            "kwargs": {"fields_group": "feature", "missing": "unknown"},
        }
        handler = DayHandler(
            end_time="2020-06-30",
            **{**HANDLER, "styles": ["size"], "infer_processors": [neutral]},
        )
        recorder = train(store, MODELS["stream"](), use_store, tmp_path, handler)
        day = calendar[calendar > "2020-06-30"][0]
        until(store, bars, day)
        use_store(store)
        result = score_day(recorder, day)
        assert any("a processor needs the whole frame" in n for n in result.notes)
        same(result.score, batch(recorder, [day]))


@pytest.mark.parametrize(
    "kind",
    ["rows", *(pytest.param(k, marks=SLOW) for k in ("windows", "stream", "panel"))],
)
def test_a_model_on_alpha158_costs_a_day_and_equals_the_batch(
    kind, short_store, history, use_store, tmp_path
):
    from qlib.contrib.model.linear import LinearModel
    from qlib.data.dataset import DatasetH, TSDatasetH
    from qlib.workflow import R

    from data_handlers.alpha import FastAlpha158

    bars, calendar = history
    store = tmp_path / "store"
    shutil.copytree(short_store, store)
    use_store(store)
    traded = {
        "class": "DropSuspended",
        "module_path": "data_handlers.processors",
        "kwargs": {"fields": ["KMID"]},
    }
    handler = FastAlpha158(
        instruments="all",
        start_time="2019-06-03",
        end_time="2020-06-30",
        fit_start_time="2019-06-03",
        fit_end_time="2019-12-16",
        shared_processors=[traded],
        infer_processors=[
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
    )
    dataset, model = DatasetH(handler, SEGMENTS), LinearModel("ridge", alpha=0.05)
    if kind == "panel":
        dataset = PanelDataset(handler, SEGMENTS)
        model = MultiFactorRNN(mode="stream", n_factors=1, hidden_size=8, n_epochs=1)
    elif kind != "rows":
        dataset = TSDatasetH(handler=handler, segments=SEGMENTS, step_len=8)
        model = MultiFactorRNN(mode=kind, n_factors=1, hidden_size=8, n_epochs=1)
    with R.start(experiment_name=kind):
        model.fit(dataset)
        recorder = R.get_recorder()
        R.save_objects(**{"params.pkl": model})
        dataset.config(dump_all=False, recursive=True)
        R.save_objects(dataset=dataset)
    days = calendar[calendar > "2020-06-30"][:3]
    until(store, bars, days[-1])
    use_store(store)
    result = score_day(recorder, days[-1], trust=True)
    assert not any("whole history" in n for n in result.notes)
    whole = recorder.load_object("dataset")
    whole.config(
        handler_kwargs={"start_time": "2019-06-03", "end_time": days[-1]},
        segments={"test": (days[-1], days[-1])},
    )
    whole.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})
    theirs = model.predict(whole).sort_index()
    assert len(theirs) > 20
    pd.testing.assert_series_equal(
        result.score.sort_index(),
        theirs,
        # One window is summed in another order than many.
        **({"check_exact": True} if kind == "rows" else {"rtol": 0, "atol": 1e-5}),
        check_names=False,
        check_index_type=False,
    )


@pytest.fixture(scope="module")
def trained_once(short_store, tmp_path_factory, fresh_database, init_on):
    """Recorder of a model of windows, and the folder of its database."""
    folder = fresh_database(tmp_path_factory.mktemp("trained"))
    shutil.copy(folder / "mlruns.db", folder / "mlflow.db")
    on = partial(init_on, folder=folder)
    return train(short_store, "windows", on, folder), folder


@pytest.fixture
def trained(trained_once, short_store, init_on, use_store):
    """A copy of that recorder, to be damaged; Qlib is on the store it learnt from."""
    recorder, folder = trained_once
    init_on(short_store, folder)
    with recording("copy") as own:
        files = recorder.client.download_artifacts(recorder.id, "")
        own.save_objects(local_path=files)
    return own


class TestRefusal:
    @pytest.fixture
    def scored(self, trained, short_store, history, tmp_path):
        """Recorder, store and bars; the store ends one day after training."""
        bars, calendar = history
        store = tmp_path / "store"
        shutil.copytree(short_store, store)
        later = calendar[calendar > "2020-06-30"]
        until(store, bars, later[0])
        return trained, store, bars, later

    def test_day_that_is_not_there(self, scored, use_store):
        recorder, store, _, later = scored
        use_store(store)
        with pytest.raises(IncompleteDayError, match="ingest STORE --update"):
            score_day(recorder, later[1])
        with pytest.raises(IncompleteDayError, match="2020-06-28 is no trading day"):
            score_day(recorder, "2020-06-28")

    def test_stocks_without_bars_are_named(self, scored, use_store):
        recorder, store, bars, later = scored
        stocks = sorted(bars.loc[bars["datetime"] == later[0], "instrument"].unique())
        until(store, bars[~bars["instrument"].isin(stocks[:10])], later[1])
        use_store(store)
        with pytest.raises(IncompleteDayError, match="stocks with a bar on") as error:
            score_day(recorder, later[1])
        assert stocks[0] in str(error.value)
        assert score_day(recorder, later[1], max_missing=0.5).notes

    def test_field_without_values_is_named(self, scored, use_store):
        recorder, store, bars, later = scored
        bars = bars.copy()
        bars.loc[bars["datetime"] == later[1], "turnover"] = np.nan
        until(store, bars, later[1])
        use_store(store)
        with pytest.raises(IncompleteDayError, match=r"field \$turnover has no value"):
            score_day(recorder, later[1])

    def test_minute_features_without_rows_are_named(self, scored, use_store, tmp_path):
        from data_handlers.ms import MsHandler

        recorder, store, bars, later = scored
        use_store(store)
        rows = bars[(bars["datetime"] >= "2019-06-01") & bars["close"].notna()]
        rows = rows[["datetime", "instrument", "open", "close"]].copy()
        rows["ms_a"] = rows["close"] / rows["open"] - 1
        (store / "ms").mkdir()

        def write(frame):
            for year, part in frame.groupby(frame["datetime"].dt.year):
                part.to_parquet(store / "ms" / f"{year}.parquet", index=False)

        columns = ["datetime", "instrument", "ms_a"]
        write(rows.loc[rows["datetime"] <= later[0], columns])
        config = {k: v for k, v in HANDLER.items()}
        handler = MsHandler(end_time="2020-06-30", columns=["ms_a"], **config)
        recorder = train(store, MODELS["stream"](), use_store, tmp_path, handler, "ms")
        assert len(score_day(recorder, later[0]).score) > 20
        until(store, bars, later[1])
        use_store(store)
        with pytest.raises(IncompleteDayError, match=r"no ms features .* build ms"):
            score_day(recorder, later[1])
        write(rows.loc[rows["datetime"] <= later[1], columns])
        same(score_day(recorder, later[1]).score, batch(recorder, later[:2]))


@contextlib.contextmanager
def recording(name):
    from qlib.workflow import R

    with R.start(experiment_name=name):
        yield R.get_recorder()


class _Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class TestForeignRecorder:
    """A recorder somebody else wrote runs nothing: no pickle, class or expression."""

    def test_pickles_are_not_opened(self, trained, tmp_path):
        expected = score_day(trained, "2020-06-30", save=False).score
        evil = _Attack(tmp_path / "attacked")
        trained.save_objects(**{"params.pkl": evil, "dataset": evil})
        again = score_day(trained, "2020-06-30", save=False).score
        pd.testing.assert_series_equal(again, expected)
        assert not (tmp_path / "attacked").exists()
        # Without the description the flag is named, and still nothing is opened.
        with recording("bare") as bare:
            bare.save_objects(**{"params.pkl": evil, "dataset": evil})
        with pytest.raises(ValueError, match=r"pickle only.*--trust"):
            score_day(bare, "2020-06-30")
        assert not (tmp_path / "attacked").exists()

    def test_qlibs_own_pickles_are_read_when_trusted(self, trained):
        expected = score_day(trained, "2020-06-30", save=False).score
        objects = {k: trained.load_object(k) for k in ("params.pkl", "dataset")}
        with recording("pickled") as bare:
            bare.save_objects(**objects)
        again = score_day(bare, "2020-06-30", save=False, trust=True).score
        pd.testing.assert_series_equal(again, expected)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("qlib_ext.models.multi_factor_rnn:MultiFactorRNN", "os:system", "os.sys"),
            ("qlib_ext.dataset:PanelDataset", "subprocess:Popen", "subprocess.Popen"),
            (
                "data_handlers.expression.loading:ExpressionLoader",
                "qlib.data.dataset.loader:StaticDataLoader",
                "StaticDataLoader",
            ),
            ('"all"', '"file:///tmp/evil.pkl"', "read as a pickle"),
            (
                "$turnover",
                "__import__('os').mkdir('attacked')",
                "only operators can be called",
            ),
        ],
    )
    def test_a_forged_description_is_refused(
        self, trained, tmp_path, monkeypatch, old, new, message
    ):
        monkeypatch.chdir(tmp_path)
        found = trained.client.download_artifacts(trained.id, "model.json")
        text = open(found).read()
        assert old in text
        (tmp_path / "model.json").write_text(text.replace(old, new))
        trained.save_objects(local_path=str(tmp_path / "model.json"))
        with pytest.raises(ValueError, match=message):
            _, dataset = description.read(trained)
            with description.only_expressions():
                dataset.config(handler_kwargs={"end_time": "2020-06-30"})
                dataset.setup_data(handler_kwargs={"init_type": "load_state"})
        assert not (tmp_path / "attacked").exists()

    @pytest.mark.parametrize("data", [b"", b"\x80", pickle.dumps({"a": 1})])
    @pytest.mark.parametrize("name", ["params.pkl", "dataset"])
    def test_a_damaged_pickle_is_named(self, trained, tmp_path, name, data):
        with recording("damaged") as bare:
            for other in ("params.pkl", "dataset"):
                bare.save_objects(**{other: trained.load_object(other)})
        (tmp_path / name).write_bytes(data)
        bare.save_objects(local_path=str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"{name} of recorder .*; train again"):
            score_day(bare, "2020-06-30", save=False, trust=True)

    def test_a_state_of_anything_else_is_none(self, trained):
        model, _ = description.read(trained)
        calendar = pd.DatetimeIndex(D.calendar())
        carried = scoring._blank_states(model, 2)
        names, prints = pd.Index(["SH600000", scoring._BLANK]), np.zeros((1, 7))
        state = scoring._State(3, calendar[3], names, carried, prints, "x")
        whole = scoring._write_state(state)
        assert scoring._read_state(whole, model, calendar).at == 3
        other = [[torch.zeros(1, 2, 99)] for _ in carried]
        for facts in ([1], {"version": 2}, {"version": 2, "date": "x", "shape": []}):
            file = io.BytesIO()
            text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
            np.savez(file, facts=text, prints=prints)
            assert scoring._read_state(file.getvalue(), model, calendar) is None
        for data in (
            b"",
            whole[:-40],
            scoring._write_state(replace(state, carried=other)),
            scoring._write_state(replace(state, instruments=names[:1])),
        ):
            assert scoring._read_state(data, model, calendar) is None

    @pytest.mark.parametrize("name", ["model.json", "model.pt"])
    def test_a_cut_file_is_named(self, trained, tmp_path, name):
        found = trained.client.download_artifacts(trained.id, name)
        data = open(found, "rb").read()
        for size in (0, len(data) // 2):
            (tmp_path / name).write_bytes(data[:size])
            trained.save_objects(local_path=str(tmp_path / name))
            with pytest.raises(ValueError, match=rf"{name} of recorder .* cut short"):
                score_day(trained, "2020-06-30")


def test_command_scores_a_joined_recorder(rolled_short, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from qlib_ext.cli import main

    result, store, uri = rolled_short
    options = ["--store", str(store), "--uri", uri, "--out", str(tmp_path / "s.csv")]
    done = CliRunner().invoke(main, ["score", result.recorder[:8], *options])
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "s.csv")
    assert list(frame) == ["datetime", "instrument", "score"]
    assert (frame["datetime"] == "2020-12-31").all()
    # Two seeds of the last window, each standardised, as the joined score has them.
    from qlib_ext.recorders import find_recorder, load_frame

    _, recorder = find_recorder(uri, None, result.recorder, "pred.pkl")
    joined = load_frame(recorder, "pred.pkl")["score"].xs(pd.Timestamp("2020-12-31"))
    ours = frame.set_index("instrument")["score"]
    assert np.abs(ours - joined.reindex(ours.index)).max() <= 1e-5


def score_in(folder, recorder, options):
    """Score from the command line, in the process that calls it."""
    from click.testing import CliRunner

    from qlib_ext.cli import main

    os.chdir(folder)
    done = CliRunner().invoke(main, ["score", recorder, *options])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_a_killed_score_ends_as_one_that_nobody_kills(rolled_short, fork, tmp_path):
    result, store, uri = rolled_short
    out = tmp_path / "s.csv"
    options = ["--store", str(store), "--uri", uri, "--out", str(out)]

    def start():
        return fork(score_in, tmp_path, result.recorder, options)

    began = time.monotonic()
    process = start()
    process.join()
    took = time.monotonic() - began
    assert process.exitcode == 0
    expected = out.read_bytes()
    for share in (0.3, 0.6, 0.8, 0.9, 0.97):
        out.unlink(missing_ok=True)
        for folder in tmp_path.rglob("artifacts/score"):
            shutil.rmtree(folder)
        process = start()
        process.join(share * took)
        process.kill()
        process.join()
        assert not out.exists() or out.read_bytes() == expected
        process = start()
        process.join()
        assert process.exitcode == 0 and out.read_bytes() == expected


@pytest.fixture
def rolled_short(market_small, tmp_path, fresh_database):
    import copy
    import runpy
    from pathlib import Path

    from qlib_ext.rolling import plan, roll

    here = runpy.run_path(str(Path(__file__).with_name("test_rolling.py")))
    config = copy.deepcopy(here["WORKFLOW"])
    config["qlib_init"]["provider_uri"] = str(market_small)
    config["task"]["record"] = []
    uri = f"sqlite:///{fresh_database(tmp_path)}/mlruns.db"
    made = plan(config, "2020-10-01:2020-12-31", seeds=2, uri=uri, **here["WINDOWS"])
    result = roll(made, threads=1, work=tmp_path / "work")
    return result, market_small, uri


@pytest.mark.parametrize(
    "adapt", ["naive", pytest.param("double_adapt", marks=pytest.mark.slow)]
)
def test_a_model_that_learns_on_is_taken_up_the_next_evening(
    adapt, short_store, history, use_store, tmp_path, monkeypatch
):
    tiny = {**TINY, "n_factors": 1, "n_seeds": 1}
    model = {"class": "MultiFactorRNN", "kwargs": tiny}
    bars, calendar = history
    days = calendar[(calendar > "2020-06-30")][:4]
    store = shutil.copytree(short_store, tmp_path / "store")
    recorder = train(
        store, IncrementalModel(model, adapt, 3, True), use_store, tmp_path
    )
    updates = []
    learn = IncrementalModel._update

    def counted(self, network, optimiser, panel, first, device):
        updates.append(panel.dates[first])
        learn(self, network, optimiser, panel, first, device)

    monkeypatch.setattr(IncrementalModel, "_update", counted)
    scores, notes, counts = [], [], []
    for day in days:
        until(store, bars, day)
        use_store(store)
        updates.clear()
        result = score_day(recorder)
        scores.append(result.score)
        notes.append(" ".join(result.notes))
        counts.append(len(set(updates)))
    assert "walk goes on" not in notes[0] and "walk goes on" in notes[-1]
    # The first evening walks from segment `valid`; a later one at most one step.
    assert counts[0] > 20 and max(counts[1:]) == 1 and min(counts[1:]) == 0
    same(pd.concat(scores), batch(recorder, days))
    labels = pd.read_parquet(
        recorder.client.download_artifacts(recorder.id, "last_labels.parquet", tmp_path)
    )
    assert (labels["known"] < labels.index).all()


@pytest.mark.slow
def test_a_walk_does_not_go_on_from_corrected_history(
    short_store, history, use_store, tmp_path
):
    tiny = {**TINY, "n_factors": 1, "n_seeds": 1, "num_layers": 1}
    model = {"class": "MultiFactorRNN", "kwargs": tiny}
    bars, calendar = history
    days = calendar[(calendar > "2020-06-30")][:3]
    recorder = train(
        short_store, IncrementalModel(model, "naive", 5, True), use_store, tmp_path
    )

    def score(day, bars, store=tmp_path / "store"):
        shutil.rmtree(store, ignore_errors=True)
        write_store(store, bars[bars["datetime"] <= day])
        use_store(store)
        return score_day(recorder, day)

    score(days[0], bars)
    # A split changes no return: the walk goes on.
    bars, stock = bars.copy(), bars["instrument"].iloc[0]
    of_stock = bars["instrument"] == stock
    bars.loc[of_stock, ["open", "high", "low", "close", "vwap"]] /= 2
    assert "walk goes on" in " ".join(score(days[1], bars).notes)
    # A close of May is corrected: features and the labels learnt from are others.
    at = bars.index[of_stock & (bars["datetime"] > "2020-05-11")][0]
    bars.loc[at, "close"] *= 1.05
    result = score(days[2], bars)
    notes = " ".join(result.notes)
    assert "walk goes on" not in notes and "does not go on from it" in notes
    first = calendar[calendar.get_loc(bars.loc[at, "datetime"]) - 11]
    assert f"the first {first:%Y-%m-%d}" in notes
    same(result.score, batch(recorder, days))
