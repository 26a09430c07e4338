"""The GRU with attributes finds the mispricing of the embedded market's bonds."""

import pandas as pd
import pytest

from data_handlers.convertible import ConvertibleHandler
from qlib_ext.dataset import PanelDataset
from qlib_ext.market import make_bonds, oracle_path
from qlib_ext.models import MultiFactorRNN


def daily_rank(score, label):
    both = pd.concat({"score": score, "label": label}, axis=1).dropna()
    return both.groupby(level="datetime").corr("spearman").xs("label", level=1)["score"]


@pytest.mark.slow
def test_planted_mispricing_is_recovered(market, tmp_path, use_store):
    store = make_bonds(market, bonds=200, out=tmp_path / "bonds")
    use_store(store)
    handler = ConvertibleHandler(
        start_time="2018-01-01",
        end_time="2020-12-31",
        fit_start_time="2018-01-01",
        fit_end_time="2019-09-30",
    )
    segments = {
        "train": ("2018-01-01", "2019-09-30"),
        "valid": ("2019-10-15", "2020-01-15"),
        "test": ("2020-02-03", "2020-12-31"),
    }
    data = PanelDataset(handler, segments, purge="trim")
    model = MultiFactorRNN(
        attributes=True, n_factors=1, hidden_size=16, num_layers=1, step_len=20,
        n_epochs=15, early_stop=5, lr=3e-3, GPU=-1,
    )  # fmt: skip
    model.fit(data)
    score = model.predict(data)
    label = data.prepare("test", col_set="label", data_key="raw").iloc[:, 0]
    oracle = pd.read_parquet(oracle_path(store))
    true = oracle.set_index(["datetime", "instrument"])["total"].reindex(score.index)
    ours, best = (daily_rank(x, label).mean() for x in (score, true))
    print(f"RankIC {ours:.4f}, oracle {best:.4f}, share {ours / best:.2f}")
    assert best > 0.08
    assert ours > 0.3 * best
