"""The encoders of MultiFactorRNN inside the training loop."""

from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.models import GRUGAT, MultiFactorRNN, description
from qlib_ext.models.multi_factor_rnn import size_groups
from qlib_ext.nn.recurrent import ENCODERS

SMALL = dict(hidden_size=8, num_layers=2, step_len=6, n_epochs=1, GPU=-1, n_factors=2)
NEW = [name for name in ENCODERS if name not in ("GRU", "LSTM")]


def small(**changes):
    return MultiFactorRNN(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def data(toy_dataset):
    return toy_dataset()


@pytest.fixture(scope="module")
def fitted(data):
    @lru_cache
    def fit(rnn):
        model = small(rnn=rnn, bidirectional=rnn == "AGRU", head_size=3)
        model.fit(data)
        return model

    return fit


@pytest.mark.parametrize("rnn", NEW)
class TestEveryEncoder:
    def test_scores_do_not_change_when_the_future_changes(
        self, rnn, data, fitted, toy_dataset
    ):
        model = fitted(rnn)
        cut = data.panel.dates[105]

        def change(frame):
            frame = frame.copy()
            frame.loc[data.panel.dates[106] :] *= -3.0
            return frame

        before = model.predict(data)
        assert np.isfinite(before).all() and before.std() > 0.5
        after = model.predict(toy_dataset(change=change)).loc[:cut]
        pd.testing.assert_series_equal(before.loc[:cut], after, check_exact=True)
        assert model.predict_units(data).shape == (len(before), 2)

    def test_description_gives_the_same_scores(self, rnn, data, fitted):
        model = fitted(rnn)
        tensors = {}
        text = description._encode(model, tensors, ())
        again = description._decode(text, tensors)
        pd.testing.assert_series_equal(
            again.predict(data), model.predict(data), check_exact=True
        )

    def test_order_of_instruments_does_not_matter(self, rnn, data, fitted, toy_dataset):
        model = fitted(rnn)
        names = data.panel.instruments
        renamed = dict(zip(names, names[::-1], strict=True))

        def change(frame):
            return frame.rename(index=renamed, level="instrument").sort_index()

        two = model.predict(toy_dataset(change=change))
        two = two.rename(index=renamed, level="instrument").sort_index()
        np.testing.assert_allclose(model.predict(data), two, atol=1e-4)


@pytest.mark.slow
def test_encoders_find_what_the_gru_finds(toy_dataset, daily_rank_ic):
    """On equal budget, with a planted mean of three days."""
    data = toy_dataset(n_days=240, n_stocks=30, signal=1.0)
    many = dict(num_layers=1, chunk=8, n_factors=1, n_epochs=15, lr=0.01)

    def found(**options):
        model = small(**{**many, **options})
        model.fit(data)
        return float(daily_rank_ic(model, data).nanmean())

    linear, gru = found(rnn="DecompGRU"), found()
    agru, windows = (
        found(rnn=rnn, n_epochs=6, mode="windows", day_stride=4)
        for rnn in ("AGRU", "GRU")
    )
    print(f"linear {linear:.4f} of {gru:.4f}, AGRU {agru:.4f} of {windows:.4f}")
    assert linear > 0.9 * gru and agru > 0.9 * windows


def test_mode_follows_the_encoder():
    assert small().mode == small(rnn="DecompGRU").mode == "stream"
    assert small(rnn="ALSTM").mode == small(every=5).mode == "windows"
    assert GRUGAT(rnn="AGRU", graphs=[]).mode == "windows"
    with pytest.raises(ValueError, match="`mode` is 'stream', but this encoder reads"):
        small(rnn="AGRU", mode="stream")


def test_decomp_gru_streams_to_the_scores_of_windows(data):
    """With windows that reach back to the first day."""
    stream = small(rnn="DecompGRU", step_len=120, size_groups=3)
    stream.fit(data)
    windows = small(rnn="DecompGRU", step_len=120, size_groups=3, mode="windows")
    for name in ("states_", "d_feat_", "step_len_"):
        setattr(windows, name, getattr(stream, name))
    windows.on_panel(data.panel)
    np.testing.assert_allclose(stream.predict(data), windows.predict(data), atol=1e-4)


def test_stocks_absent_on_the_scored_day_count_on_earlier_ones(toy_dataset):
    def change(frame):
        gone = frame.index.get_level_values("datetime") >= pd.Timestamp("2020-05-18")
        return frame[~(gone & (frame.index.get_level_values(1) == "S000"))]

    data = toy_dataset(change=change)
    model = small(rnn="DecompGRU", size_groups=1, mode="windows")
    model.fit(data)
    day = data.panel.dates.get_loc(pd.Timestamp("2020-05-19"))
    batch = model._batch(data.panel, np.array([day]), torch.device("cpu"))
    assert "S000" in data.panel.instruments[batch.stocks] and not batch.mask[0, 0]
    assert (batch.x[:, 0, -1] == torch.tensor([1.0, 1, 1, 1, 0, 0])).all()
    assert len(model.predict(data).loc["2020-05-19"]) == 23


def test_size_groups_by_hand(toy_dataset):
    panel = toy_dataset(n_stocks=7, n_days=12).panel
    at = panel.risk_names.index("log_mcap")
    panel.risk[0, :, at] = torch.tensor([5.0, 1, float("nan"), 4, 3, 2, 9])
    panel.present[0, 6] = False
    # Five known stocks in two groups: ranks 0 1 | 2 by 2 * rank // 5, then 3 4.
    want = [2, 1, 3, 2, 1, 1, 0]
    assert size_groups(panel, 2)[0, :, 0].tolist() == want


def test_cross_section_makes_a_score_depend_on_others(data):
    assert small(rnn="DecompGRU", size_groups=0).reads_features_only
    assert small(rnn="DecompGRU", num_layers=1).reads_features_only
    assert not small(rnn="DecompGRU").reads_features_only
    assert not GRUGAT(rnn="DecompGRU", graphs=[]).reads_features_only
    assert small(rnn="ALSTM").reads_features_only


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bidirectional": True}, "`bidirectional` needs `rnn: AGRU`, got 'GRU'"),
        ({"every": 7}, "`step_len` 6 is shorter than a step of `every` 7 days"),
        ({"rnn": "DecompGRU", "block_size": 4}, "`block_size` is 4, but DecompGRU"),
        ({"rnn": "DecompGRU", "stock_parts": 2}, "`stock_parts` is 2, but DecompGRU"),
        ({"rnn": "DecompGRU", "parts": 2}, "`parts` 2 and `size_groups` exclude"),
        ({"parts": 2, "categories": {"x0": 2}}, "`parts` 2 and `categories` exclude"),
        ({"head_size": -1}, "`head_size` must be a whole number of at least 0"),
    ],
)
def test_constructor_names_the_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_data_that_do_not_fit_are_named(data, toy_dataset):
    with pytest.raises(ValueError, match="`parts` is 2, but the data has 3 features"):
        small(parts=2).fit(data)

    def change(frame):
        return frame.drop(columns=[("risk", "log_mcap")])

    with pytest.raises(ValueError, match="`size_groups` 20 need `log_mcap`"):
        small(rnn="DecompGRU").fit(toy_dataset(change=change))
