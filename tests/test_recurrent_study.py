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


@pytest.mark.slow
def test_linear_recurrence_and_agru_reach_nine_tenths_of_the_gru(tmp_path, use_store):
    use_store(make_market(tmp_path / "market", stocks=120, years=5, seed=11))
    data = PanelDataset(DayHandler(**HANDLER), SEGMENTS)
    found = {}
    for mode, names in ((STREAM, ["DecompGRU"]), (WINDOWS, ["AGRU"])):
        base = figure(data, rnn="GRU", **mode)
        for name in names:
            found[name] = figure(data, rnn=name, **mode), base
    alone = figure(data, rnn="DecompGRU", size_groups=0, **STREAM)
    found["DecompGRU, no groups"] = alone, found["DecompGRU"][1]
    print({k: f"{a:.4f} of {b:.4f}" for k, (a, b) in found.items()})
    for name in ("DecompGRU, no groups", "AGRU"):
        ours, base = found[name]
        assert ours > 0.9 * base, found
