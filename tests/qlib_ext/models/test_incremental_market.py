"""On a market whose day alpha turns, what learns on beats what was trained once."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_handlers.day import DayHandler
from qlib_ext.dataset import PanelDataset
from qlib_ext.market import make_market
from qlib_ext.metrics import rank_ic
from qlib_ext.models import IncrementalModel

SEGMENTS = {
    "train": ("2015-01-05", "2016-12-14"),
    "valid": ("2017-01-03", "2017-06-15"),
    "test": ("2017-07-03", "2020-12-15"),
}
BASE = {
    "hidden_size": 16,
    "num_layers": 1,
    "n_factors": 1,
    "step_len": 20,
    "n_epochs": 12,
    "early_stop": 4,
    "lr": 0.003,
    "GPU": -1,
}
WAYS = {"none": {}, "naive": {"step_lr": 0.01}, "double_adapt": {"step_lr": 0.003}}


class Impatient(IncrementalModel):
    """Takes a label for known on the day after its own, as if it had no horizon."""

    def _known_reach(self, handler):
        return 1


def daily(ways, seeds, tmp_path, use_store, cls=IncrementalModel, **market):
    """Daily RankIC of the test years by (way, seed)."""
    store = make_market(
        tmp_path / "market", stocks=80, years=6, seed=11, trades=20, **market
    )
    use_store(store)
    handler = DayHandler(
        start_time="2015-01-05",
        end_time="2020-12-31",
        fit_start_time="2015-01-05",
        fit_end_time="2016-12-14",
        styles=[],
    )
    data = PanelDataset(handler, SEGMENTS)
    panel, found = data.panel, {}
    days = panel.days(SEGMENTS["test"])
    for way in ways:
        for seed in seeds:
            config = {"class": "MultiFactorRNN", "kwargs": {**BASE, "seed": seed}}
            model = cls(config, way, 20, **WAYS[way])
            model.fit(data)
            wide = model.predict(data).unstack("instrument")
            wide = wide.reindex(index=panel.dates[days], columns=panel.instruments)
            truth = panel.raw_labels[days][..., 0]
            found[way, seed] = rank_ic(torch.tensor(wide.to_numpy()), truth).numpy()
            print(way, seed, f"RankIC {np.nanmean(found[way, seed]):.4f}", flush=True)
    return found


@pytest.mark.slow
def test_adapting_beats_training_once_where_the_alpha_turns(tmp_path, use_store):
    found = daily(WAYS, range(3), tmp_path, use_store, turning=2900)
    mean = pd.Series({key: np.nanmean(ic) for key, ic in found.items()}).unstack(0)
    for way in ("naive", "double_adapt"):
        gain = mean[way] - mean["none"]
        error = gain.std(ddof=1) / len(gain) ** 0.5
        print(f"{way} minus none: {gain.mean():.4f}, standard error {error:.4f}")
        assert gain.mean() >= 3 * error


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is(tmp_path, use_store):
    ways = ("naive", "double_adapt")
    found = daily(ways, range(1), tmp_path, use_store, turning=2900, signal="none")
    for (way, seed), ic in found.items():
        # Labels of 10 days overlap: one day in 11 counts.
        error = np.nanstd(ic) / (np.isfinite(ic).sum() / 11) ** 0.5
        print(f"{way} {seed}: {np.nanmean(ic):.4f}, standard error {error:.4f}")
        assert abs(np.nanmean(ic)) < 3 * error


@pytest.mark.slow
def test_scores_do_not_show_a_leak_of_the_horizon(tmp_path, use_store):
    """Few steps on overlapping labels buy nothing; the audit's own tests catch it."""
    market = {"turning": 2900, "signal": "none"}
    found = daily(["naive"], range(1), tmp_path, use_store, Impatient, **market)
    ic = found["naive", 0]
    error = np.nanstd(ic) / (np.isfinite(ic).sum() / 11) ** 0.5
    print(f"leaking: {np.nanmean(ic):.4f}, standard error {error:.4f}")
    assert abs(np.nanmean(ic)) < 3 * error
