"""A store cut at t, or with another future, changes nothing up to t."""

import numpy as np
import pandas as pd
import pytest
from qlib.data import D

from data_handlers.day import DayHandler
from qlib_ext.dataset import PanelDataset
from qlib_ext.ingest.store import (
    read_bars,
    read_calendar,
    read_instruments,
    write_store,
)
from qlib_ext.models import MultiFactorRNN

HANDLER = dict(
    start_time="2018-01-01",
    fit_start_time="2018-01-01",
    fit_end_time="2019-03-29",
    horizon=[10, 5],
)
SEGMENTS = {
    "train": ("2018-01-01", "2019-03-29"),
    "valid": ("2019-05-06", "2019-08-30"),
    "test": ("2019-10-08", "2020-12-31"),
}
MODEL = dict(
    hidden_size=8, num_layers=1, n_epochs=1, step_len=20, n_factors=2, GPU=-1, chunk=16
)


def rewritten(store, out, change):
    """A copy of a store whose bars went through `change`."""
    every = sorted(f.name.upper() for f in (store / "features").iterdir())
    bars = change(read_bars(store, every))
    codes = sorted(set(every) - set(read_instruments(store)["instrument"]))
    markets = {}
    for name in ("csi300",):
        spans = read_instruments(store, name)
        spans = spans[spans["start"] <= bars["datetime"].max()].copy()
        spans["end"] = spans["end"].clip(upper=bars["datetime"].max())
        markets[name] = spans
    write_store(out, bars, markets=markets, index_codes=codes)
    return out


@pytest.fixture(scope="module")
def stores(market, tmp_path_factory):
    """The market, its copies that are cut and that have another future; the day."""
    folder = tmp_path_factory.mktemp("futures")
    calendar = read_calendar(market)
    cut = calendar[calendar <= "2020-06-30"][-1]

    def truncate(bars):
        return bars[bars["datetime"] <= cut]

    def perturb(bars):
        bars = bars.copy()
        later = (bars["datetime"] > cut).to_numpy()
        rng = np.random.default_rng(0)
        for field in bars.columns.difference(["datetime", "instrument", "industry"]):
            factor = np.exp(rng.normal(size=later.sum()))
            bars.loc[later, field] *= factor
        return bars

    return {
        "cut": cut,
        "before": calendar[calendar <= cut],
        "full": market,
        "truncated": rewritten(market, folder / "truncated", truncate),
        "perturbed": rewritten(market, folder / "perturbed", perturb),
    }


@pytest.fixture(scope="module")
def loaded():
    return {}


@pytest.fixture
def handler_on(stores, use_store, loaded):
    """Function that points Qlib at a store and gives the one handler on it."""

    def get(name):
        use_store(stores[name])
        if name not in loaded:
            loaded[name] = DayHandler(**HANDLER)
        return loaded[name]

    return get


def frames(handler, cut):
    return {
        (key, group): handler.fetch(
            slice(None, cut), col_set=group, data_key=key
        ).sort_index()
        for key in ("raw", "infer", "learn")
        for group in ("feature", "risk", "label")
    }


@pytest.mark.parametrize("kind", ["truncated", "perturbed"])
def test_features_risk_and_labels_ignore_the_future(kind, stores, handler_on):
    full = frames(handler_on("full"), stores["cut"])
    other = frames(handler_on(kind), stores["cut"])
    assert full["infer", "risk"].shape[1] > 5  # styles are among them
    for (key, group), want in full.items():
        got = other[key, group]
        assert got.index.equals(want.index)
        for name in want.columns:
            if group == "label":
                # Labels look ahead by design, up to their own horizon and no further.
                reach = int(name.removeprefix("RET")) + 1
                last = stores["before"][-1 - reach]
                pair = got.loc[:last, name], want.loc[:last, name]
            else:
                pair = got[name], want[name]
            pd.testing.assert_series_equal(*pair, rtol=2e-5, atol=2e-6)
            assert pair[0].notna().any()


def test_weeks_ignore_the_future_and_end_at_t(stores, use_store):
    codes = sorted(read_instruments(stores["full"])["instrument"])[:12]
    cut, seen = stores["cut"], {}
    for name in ("full", "truncated", "perturbed"):
        use_store(stores[name])
        weeks = DayHandler(
            codes, bar_days=5, styles=[], **{**HANDLER, "start_time": "2018-06-01"}
        )
        seen[name] = weeks.fetch(slice(None, cut), col_set="feature", data_key="infer")
    for name in ("truncated", "perturbed"):
        pd.testing.assert_frame_equal(seen[name], seen["full"], rtol=2e-5, atol=2e-6)
    assert seen["full"].loc[cut].notna().all(axis=None)


@pytest.mark.parametrize(
    "mode", ["windows", pytest.param("stream", marks=pytest.mark.slow)]
)
def test_predictions_ignore_the_future(mode, stores, handler_on):
    days = ("2020-05-01", stores["cut"])
    scores = {}
    model = MultiFactorRNN(mode=mode, **MODEL)
    for name in ("full", "truncated", "perturbed"):
        test_end = None if name == "full" else stores["cut"]
        segments = {**SEGMENTS, "test": (SEGMENTS["test"][0], test_end)}
        data = PanelDataset(handler_on(name), segments)
        if name == "full":
            model.fit(data)
        scores[name] = model.predict(data, days)
    assert len(scores["full"]) > 1000
    for name in ("truncated", "perturbed"):
        pd.testing.assert_series_equal(
            scores[name], scores["full"], rtol=1e-3, atol=1e-4
        )


def test_a_leak_would_be_seen(stores, use_store):
    """The comparison above fails for a feature that looks one day ahead."""
    values = []
    for name in ("full", "perturbed"):
        use_store(stores[name])
        values.append(
            D.features(
                D.instruments("all"),
                ["Ref($close, -1) / $close"],
                "2020-06-01",
                stores["cut"],
            )
        )
    assert not np.allclose(*values, equal_nan=True)
