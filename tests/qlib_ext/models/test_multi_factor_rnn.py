import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from qlib.data.dataset import DatasetH, TSDatasetH

from data_handlers import segments
from qlib_ext.models import MultiFactorRNN, _base
from qlib_ext.models._base import Batch, watch_epochs

SMALL = dict(
    hidden_size=8, num_layers=1, step_len=6, n_epochs=1, chunk=8, GPU=-1, n_factors=1
)


def small(**changes):
    return MultiFactorRNN(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("n_factors", "mode"),
    [
        (4, "stream"),
        (1, "windows"),
        pytest.param(1, "stream", marks=pytest.mark.slow),
        pytest.param(4, "windows", marks=pytest.mark.slow),
    ],
)
def test_rnn_finds_a_planted_signal(toy_dataset, mode, n_factors, daily_rank_ic):
    data = toy_dataset(n_days=180)
    # Each day is a step in windows.
    model = small(
        mode=mode, n_factors=n_factors, n_epochs=2 if mode == "windows" else 4, lr=0.02
    )
    model.fit(data)
    # Signal and noise have equal variance: the best possible IC is 0.71.
    assert daily_rank_ic(model, data).nanmean() > 0.4


def test_rnn_finds_nothing_where_there_is_nothing(toy_dataset, daily_rank_ic):
    data = toy_dataset(n_days=200, signal=0.0)
    model = small(n_epochs=4, lr=0.02)
    model.fit(data)
    daily = daily_rank_ic(model, data)
    daily = daily[torch.isfinite(daily)]
    assert abs(daily.mean()) < 3 * daily.std() / len(daily) ** 0.5


def test_stream_prediction_equals_one_pass_over_the_history(toy_dataset):
    data = toy_dataset()
    model = small(mode="stream")
    model.fit(data)
    network = model.build_network(3)
    network.load_state_dict(model.states_[0])
    network.eval()
    panel = data.panel
    days = panel.days(data.segments["test"])
    with torch.no_grad():
        h = network.encoder(panel.features)[0][days]
        batch = Batch(days, None, None, panel.present[days], None, None, None, panel)
        expected = network.head(h, batch)["score"]
    got = model.predict(data).unstack("instrument").to_numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_windows_prediction_equals_a_naive_loop(toy_dataset):
    data = toy_dataset()
    model = small(mode="windows")
    model.fit(data)
    network = model.build_network(3)
    network.load_state_dict(model.states_[0])
    network.eval()
    panel = data.panel
    raw = []
    days = panel.days(data.segments["test"])
    with torch.no_grad():
        for day in days:
            row = []
            for stock in range(len(panel.instruments)):
                x = panel.features[day - 5 : day + 1, stock].unsqueeze(1)
                row.append(network.linear(network.encoder(x)[0][-1])[0, 0])
            raw.append(torch.stack(row))
    raw = torch.stack(raw).double().numpy()
    expected = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    got = model.predict(data).unstack("instrument").to_numpy()
    np.testing.assert_allclose(got, expected, atol=2e-2)
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.9999


def test_prediction_of_a_day_does_not_depend_on_the_segment(toy_dataset):
    data = toy_dataset()
    for mode in ("stream", "windows"):
        model = small(mode=mode)
        model.fit(data)
        days = data.panel.dates
        one = model.predict(data, (days[100], days[110]))
        two = model.predict(data, slice(days[50], days[110])).loc[days[100] :]
        pd.testing.assert_series_equal(one, two, rtol=1e-5, atol=1e-6)


def test_last_day_without_label_is_scored(toy_dataset):
    data = toy_dataset()
    model = small()
    model.fit(data)
    last = data.panel.dates[-1]
    assert torch.isnan(data.panel.labels[-1]).all()
    assert len(model.predict(data).loc[last]) == 24


def test_units_are_named_and_their_mean_is_the_score(toy_dataset):
    data = toy_dataset()
    model = small(n_factors=12)
    model.fit(data)
    units = model.predict_units(data)
    assert list(units.columns[:2]) == ["unit_00", "unit_01"] and units.shape[1] == 12
    mean = units.mean(axis=1).groupby("datetime")
    expected = (units.mean(axis=1) - mean.transform("mean")) / mean.transform(
        "std", ddof=0
    )
    np.testing.assert_allclose(model.predict(data), expected, atol=5e-3)


def test_units_of_several_seeds_stay_apart(toy_dataset):
    data = toy_dataset()
    model = small(n_factors=2, n_seeds=2, seed=5)
    model.fit(data)
    names = ["seed5_unit_00", "seed5_unit_01", "seed6_unit_00", "seed6_unit_01"]
    assert list(model.predict_units(data).columns) == names


def test_seeds_are_averaged_after_standardising(toy_dataset):
    data = toy_dataset()
    together = small(n_seeds=2)
    together.fit(data)
    parts = []
    for seed in (0, 1):
        model = small(seed=seed)
        model.fit(data)
        parts.append(model.predict(data))
    np.testing.assert_allclose(
        together.predict(data), (parts[0] + parts[1]) / 2, atol=1e-4
    )


def test_penalty_lowers_the_correlation_of_units(toy_dataset):
    data = toy_dataset(n_days=160)
    mean = []
    for lamb in (0.0, 50.0):
        model = small(n_factors=6, lamb=lamb, n_epochs=4, lr=0.02)
        model.fit(data)
        table = model.predict_units(data).corr().to_numpy()
        mean.append(np.abs(table[np.triu_indices(6, 1)]).mean())
    assert mean[1] < mean[0] - 0.1


def test_loss_of_hand_worked_numbers(toy_dataset):
    panel = toy_dataset().panel
    score = torch.tensor([[1.0, -1.0]])
    units = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    batch = Batch(
        days=np.array([0]),
        stocks=np.arange(2),
        x=None,
        mask=torch.tensor([[True, True]]),
        label=torch.tensor([[[0.0], [1.0]]]),
        raw_label=None,
        risk=None,
        panel=panel,
    )
    loss, parts = small(n_factors=2, lamb=3.0).loss(
        {"score": score, "units": units}, batch
    )
    # mse ((1-0)^2 + (-1-1)^2) / 2; Z'Z is 2 everywhere, norm 4, over N K^2 = 8
    assert parts["mse"].item() == 2.5
    assert parts["penalty"].item() == 0.5
    assert loss.item() == 2.5 + 3.0 * 0.5


def test_blocks_give_the_same_gradient(toy_dataset):
    scores = []
    for block_size in (0, 7):
        model = small(dropout=0.0, block_size=block_size)
        model.fit(toy_dataset())
        scores.append(model.predict(toy_dataset()))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


def test_lstm_is_an_option(toy_dataset):
    data = toy_dataset()
    model = small(rnn="LSTM")
    model.fit(data)
    assert np.isfinite(model.predict(data)).all()


def test_day_stride_visits_every_day_over_the_epochs():
    model = small(mode="windows", day_stride=5)
    days = np.arange(50)
    seen = set()
    for epoch in range(40):
        chunks = model._batches(days, np.random.default_rng(epoch))
        assert len(chunks) == 10 and all(len(c.days) == 1 for c in chunks)
        seen |= {int(c.days[0]) for c in chunks}
    assert seen == set(range(50))


def test_stream_chunks_cover_each_day_once():
    model = small(chunk=8)
    for epoch in range(5):
        chunks = model._batches(np.arange(3, 50), np.random.default_rng(epoch))
        assert sorted(np.concatenate([c.days for c in chunks])) == list(range(3, 50))
        assert max(len(c.days) for c in chunks) == 8


def test_stock_parts_hold_each_day_of_each_stock_once(toy_dataset):
    panel = toy_dataset().panel
    count = len(panel.instruments)
    model = small(chunk=8, stock_parts=3)
    model.step_len_, model.d_feat_ = 6, 3
    seen = np.zeros((50, count), int)
    for draw in model._batches(np.arange(50), np.random.default_rng(0), count):
        batch = model._batch(panel, draw.days, torch.device("cpu"), draw.stocks)
        assert batch.x.shape[1] == len(batch.stocks) == batch.mask.shape[1]
        seen[np.ix_(batch.days, batch.stocks)] += batch.mask.numpy()
    np.testing.assert_array_equal(seen, panel.present[:50].numpy())


def test_parts_by_size_are_four_or_leave_300_stocks():
    model, days = small(chunk=8, stock_parts=0), np.arange(16)
    for count, parts in ((40, 4), (1499, 4), (3700, 12)):
        draws = model._batches(days, np.random.default_rng(0), count)
        sizes = [len(draw.stocks) for draw in draws]
        assert sum(sizes) % count == 0 and len(draws) == parts * sum(sizes) // count
        assert max(sizes) == -(-count // parts)


@pytest.mark.parametrize(("given", "threads"), [(None, 1), ("2", 2)])
def test_small_networks_train_on_one_thread_unless_told(
    toy_dataset, monkeypatch, given, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with watch_epochs(lambda epoch: seen.append(torch.get_num_threads())):
            small(n_epochs=1).fit(toy_dataset())
        assert seen == [threads] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_stock_parts_learn_as_well(toy_dataset, daily_rank_ic):
    data = toy_dataset(n_days=180)
    model = small(n_epochs=4, lr=0.02, stock_parts=2)
    model.fit(data)
    assert daily_rank_ic(model, data).nanmean() > 0.4


def test_several_units_have_no_dropout_to_hide_behind(caplog):
    assert MultiFactorRNN(n_factors=1).dropout == 0.1
    assert MultiFactorRNN(n_factors=2).dropout == 0.0
    assert not caplog.records
    assert MultiFactorRNN(n_factors=2, dropout=0.2).dropout == 0.2
    assert "look apart by its noise" in caplog.text


class TestAverageOfWeights:
    def test_it_is_the_one_written_down(self):
        model = small(ema=0.9)
        mean = torch.tensor(0.0)
        # (1 + n) / (10 + n) up to 0.9, which it would reach at n = 80.
        mean = model._average(mean, torch.tensor(1.0), 0)
        assert float(mean) == pytest.approx(0.9)
        mean = model._average(mean, torch.tensor(0.0), 1)
        assert float(mean) == pytest.approx(0.9 * 2 / 11)
        assert float(model._average(mean, torch.tensor(0.0), 1000)) == pytest.approx(
            0.9 * 2 / 11 * 0.9
        )

    def test_it_predicts_and_learns(self, toy_dataset, daily_rank_ic):
        data = toy_dataset(n_days=180)
        model = small(n_epochs=5, lr=0.02, ema=0.9)
        model.fit(data)
        assert daily_rank_ic(model, data).nanmean() > 0.4
        short, plain = small(n_epochs=1, lr=0.01, ema=0.9), small(n_epochs=1, lr=0.01)
        for each in (short, plain):
            each.fit(data)
        assert not short.predict(data).equals(plain.predict(data))

    def test_one_would_never_move(self):
        with pytest.raises(ValueError, match="`ema` must be less than 1"):
            small(ema=1.0)


def test_several_best_epochs_give_their_mean(toy_dataset, daily_rank_ic, monkeypatch):
    data, logged = toy_dataset(n_days=180), {}
    recorder = SimpleNamespace(log_metrics=lambda step, **named: logged.update(named))
    monkeypatch.setattr(_base, "active_recorder", lambda: recorder)

    class Watched(MultiFactorRNN):
        def _valid(self, network, *given):
            states.append({k: v.clone() for k, v in network.state_dict().items()})
            return super()._valid(network, *given)

    states: list = []
    chosen = {"n_epochs": 6, "lr": 0.02, "ema": 0.9, "best_epochs": 3}
    model = Watched(**{**SMALL, **chosen})
    model.fit(data)
    values = [row["valid_rank_ic"] for row in model.history_[0]]
    best = np.argsort(values)[-3:]
    for name, weight in model.states_[0].items():
        mean = sum(states[epoch][name] for epoch in best) / 3
        torch.testing.assert_close(weight, mean)
    # It is the seventh state that validation saw.
    torch.testing.assert_close(states[6], dict(model.states_[0]))
    monkeypatch.setattr(_base, "active_recorder", lambda: None)
    days = data.panel.days(data.segments["valid"])
    network = model.rebuild_network(model.states_[0])
    row = model._valid(network, data.panel, days, torch.device("cpu"))
    assert logged["mean_of_best_seed0_valid_rank_ic"] == row["valid_rank_ic"]
    assert daily_rank_ic(model, data).nanmean() > 0.4


class TestOtherDatasets:
    def test_ts_dataset_prescribes_the_look_back(self, toy_dataset):
        ours = toy_dataset()
        data = TSDatasetH(step_len=4, handler=ours.handler, segments=ours.segments)
        model = small(step_len=9, mode="windows")
        model.fit(data)
        assert model.step_len_ == 4
        assert len(model.predict(data)) == len(ours.prepare("test"))

    def test_flat_windows_are_unfolded_oldest_first(self, toy_dataset):
        series = toy_dataset(n_features=2)
        frame = series.handler.fetch(col_set="__raw", data_key="raw")
        names = [f"x{k}" for k in range(2)]
        by_stock = frame["feature"].groupby("instrument")
        flat = pd.concat(
            {
                ("feature", f"{name}{lag}"): by_stock[name].shift(lag)
                for name in names
                for lag in range(5, -1, -1)
            },
            axis=1,
        ).fillna(0.0)
        flat = pd.concat([flat, frame[["label"]]], axis=1)

        def unfold(_):
            return flat

        data = toy_dataset(n_features=2, change=unfold)
        data = DatasetH(handler=data.handler, segments=data.segments)
        one = small(d_feat=2, mode="windows")
        one.fit(data)
        two = small(d_feat=2, mode="windows")
        two.fit(series)
        # From day 6 on, both see the same windows; before, flat rows are zero-padded.
        two.states_ = one.states_
        np.testing.assert_allclose(one.predict(data), two.predict(series), atol=1e-5)

    @pytest.mark.parametrize(
        ("reach", "words"),
        [(11, "End `train` at 2020-"), (100, "No day of the data is early enough")],
    )
    def test_segments_of_a_plain_dataset_too_close_are_warned_about(
        self, toy_dataset, monkeypatch, reach, words
    ):
        data = toy_dataset()
        data.handler.label_reach = reach
        data = DatasetH(handler=data.handler, segments=data.segments)
        said = []
        monkeypatch.setattr(segments.logger, "warning", said.append)
        small(n_epochs=1).fit(data)
        assert words in said[0] and f"so {reach} are needed" in said[0]

    def test_flat_windows_refuse_stream(self, toy_dataset):
        with pytest.raises(ValueError, match="set `mode: windows`"):
            small(d_feat=1, mode="stream").fit(toy_dataset(n_features=3))


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"mode": "days"}, "`mode` must be one of 'stream', 'windows'"),
            ({"step_len": 0}, "`step_len` must be a whole number of at least 1, got 0"),
            ({"n_factors": 1.5}, "`n_factors` must be a whole number"),
            ({"lr": "1e-3"}, "YAML reads 1e-3 as text"),
            ({"lr": 0}, "`lr` must be above 0"),
            ({"dropout": 1.5}, "`dropout` must be at least 0 and at most 1"),
            ({"lamb": -1}, "`lamb` must be at least 0"),
            ({"rnn": "gru"}, "`rnn` must be one of 'GRU', 'LSTM'"),
            ({"d_feat": 0}, "`d_feat` must be a whole number"),
            ({"day_stride": 5}, "`day_stride` must be 1 with `mode: stream`"),
            ({"seed": -1}, "`seed` must be a whole number of at least 0"),
            ({"GPU": "0"}, "`GPU` must be a whole number of at least -1, got '0'"),
            ({"amp": "no"}, "`amp` must be true or false, got 'no'"),
            ({"label": 0}, "`label` must be text, got 0"),
        ],
    )
    def test_constructor_names_the_argument(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            small(**kwargs)

    def test_missing_segment(self, toy_dataset):
        data = toy_dataset()
        del data.segments["valid"]
        with pytest.raises(ValueError, match="`segments` must have `valid`"):
            small().fit(data)

    def test_label_beyond_the_data(self, toy_dataset):
        data = toy_dataset()
        last = data.panel.dates[-5:]
        data.segments["valid"] = (last[0], last[-1])
        with pytest.raises(ValueError, match=r"segment `valid`.*no label 'RET10'"):
            small().fit(data)

    def test_unknown_label(self, toy_dataset):
        with pytest.raises(ValueError, match=r"`label` must be one of \['RET10'\]"):
            small(label="RET5").fit(toy_dataset())

    def test_loss_that_is_not_finite(self, toy_dataset):
        def change(frame):
            frame = frame.copy()
            frame.loc[frame.index[5], ("label", "RET10")] = np.float32(3e38)
            return frame

        with pytest.raises(ValueError, match="the loss is inf at epoch 0, days 2020"):
            small().fit(toy_dataset(change=change))

    def test_predict_before_fit(self, toy_dataset):
        with pytest.raises(ValueError, match="not fitted; call `fit` first"):
            small().predict(toy_dataset())

    def test_other_width_than_fitted(self, toy_dataset):
        model = small()
        model.fit(toy_dataset())
        with pytest.raises(ValueError, match="fitted with 3 features a day"):
            model.predict(toy_dataset(n_features=4))

    def test_unknown_segment(self, toy_dataset):
        model = small()
        model.fit(toy_dataset())
        with pytest.raises(ValueError, match="`segment` must be one of"):
            model.predict(toy_dataset(), "tset")

    def test_segment_outside_the_data(self, toy_dataset):
        model = small()
        model.fit(toy_dataset())
        with pytest.raises(ValueError, match="holds no trading day"):
            model.predict(toy_dataset(), ("2030-01-01", "2030-02-01"))

    def test_reweighter(self, toy_dataset):
        with pytest.raises(ValueError, match="`reweighter` is not supported"):
            small().fit(toy_dataset(), reweighter=object())


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import make_toy_dataset
from qlib_ext.models import MultiFactorRNN
model = MultiFactorRNN(hidden_size=8, num_layers=1, step_len=6, n_epochs=4, chunk=8,
    GPU=-1, n_factors=2, n_seeds=2, early_stop=4, best_epochs=2,
    checkpoint_dir={folder!r})
model.fit(make_toy_dataset())
model.predict(make_toy_dataset()).to_frame().to_parquet({out!r})
"""


@pytest.mark.parametrize(
    "waits", [(3,), pytest.param((2, 5), marks=pytest.mark.slow)], ids=str
)  # checkpoints seen before each kill
def test_killed_training_resumes_to_the_same_scores(waits, tmp_path, start_process):
    tests = str(Path(__file__).parents[2])

    def start(name):
        code = SCRIPT.format(
            tests=tests, folder=str(tmp_path / name), out=str(tmp_path / f"{name}.pq")
        )
        return start_process(code, tmp_path)

    undisturbed = start("undisturbed")
    killed = 0
    for wait in waits:
        process, _ = start("killed")
        written = 0
        stamp = None
        while process.is_alive() and written < wait:
            files = sorted((tmp_path / "killed").glob("*/seed*.pt"))
            now = [f.stat().st_mtime_ns for f in files]
            if now != stamp:
                stamp, written = now, written + bool(now)
            time.sleep(0.002)
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
    for process, log in (start("killed"), undisturbed):
        process.join()
        assert process.exitcode == 0, log.read_text()[-2000:]
    assert killed > 0
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "killed.pq"),
        pd.read_parquet(tmp_path / "undisturbed.pq"),
        check_exact=True,
    )
    assert not list((tmp_path / "killed").glob("*/seed*"))


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("mode", ["stream", "windows"])
def test_cuda_and_cpu_agree(toy_dataset, mode, amp):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    data = toy_dataset()
    model = small(mode=mode, GPU=0, amp=amp)
    model.fit(data)
    on_gpu = model.predict(data)
    model.GPU = -1
    on_cpu = model.predict(data)
    # bfloat16 keeps eight bits of the mantissa.
    np.testing.assert_allclose(on_gpu, on_cpu, atol=0.1 if amp else 1e-3)
    ranks = [s.unstack().rank(axis=1) for s in (on_gpu, on_cpu)]
    assert ranks[0].corrwith(ranks[1], axis=1).mean() > (0.99 if amp else 0.999)
