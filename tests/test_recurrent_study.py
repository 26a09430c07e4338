"""Encoders on the embedded market: they find what the GRU finds, on equal budget."""

import pytest
import torch

from data_handlers.day import DayHandler
from qlib_ext.dataset import PanelDataset
from qlib_ext.market import make_market
from qlib_ext.metrics import rank_ic
from qlib_ext.models import MultiFactorRNN

HANDLER = dict(
    start_time="2016-01-01",
    fit_start_time="2016-01-01",
    fit_end_time="2018-12-14",
    styles=[],
)
SEGMENTS = {
    "train": ("2016-01-01", "2018-12-14"),
    "valid": ("2019-01-02", "2019-06-14"),
    "test": ("2019-07-02", "2020-12-31"),
}
MODEL = dict(
    hidden_size=32, num_layers=2, step_len=30, n_epochs=6, lr=0.003, GPU=-1, dropout=0.0
)
# The same mode, so the same number of steps, for each pair.
STREAM = {"mode": "stream"}
WINDOWS = {"mode": "windows", "day_stride": 10}


def figure(data, **options):
    model = MultiFactorRNN(n_factors=1, **MODEL, **options)
    model.fit(data)
    panel = data.panel
    days = panel.days(data.segments["test"])
    wide = model.predict(data).unstack("instrument")
    wide = wide.reindex(index=panel.dates[days], columns=panel.instruments)
    score = torch.tensor(wide.to_numpy(dtype=float))
    return float(rank_ic(score, panel.raw_labels[days][..., 0].double()).nanmean())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "market"
    return make_market(folder, stocks=120, years=5, seed=11)


def pair(store, use_store, name, mode, **options):
    """Figure of an encoder and of the GRU, in the same mode on the same data."""
    use_store(store)
    data = PanelDataset(DayHandler(**HANDLER), SEGMENTS)
    found = [
        figure(data, rnn=x, **mode, **o) for x, o in ((name, options), ("GRU", {}))
    ]
    print(f"{name} {options}: {found[0]:.4f} of {found[1]:.4f}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size_groups", [0, 20])
def test_linear_recurrence_finds_what_the_gru_finds(store, use_store, size_groups):
    ours, base = pair(store, use_store, "DecompGRU", STREAM, size_groups=size_groups)
    assert base > 0.08 and ours > 0.9 * base


@pytest.mark.slow
def test_agru_finds_what_the_gru_finds(store, use_store):
    ours, base = pair(store, use_store, "AGRU", WINDOWS)
    assert base > 0.08 and ours > 0.9 * base
