"""Features that are codes of states: embedded by name and checked."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.models import GRUGAT, MultiFactorRNN
from qlib_ext.models.multi_factor_rnn import RNNEncoder

SMALL = dict(hidden_size=8, num_layers=1, step_len=3, n_epochs=5, lr=0.03, GPU=-1)
CODES = {"x1": 6}


def with_codes(data):
    """x1 becomes a code 0 to 6 whose effect on the label is no line."""
    rng = np.random.default_rng(1)
    code = rng.integers(0, 7, len(data))
    effect = np.array([0.0, 2, -2, 2, -2, 2, -2])[code]
    data["feature", "x1"] = code.astype(float)
    data["label", "RET10"] = effect + 0.5 * rng.standard_normal(len(data))
    data.loc[data.index.get_level_values(0).unique()[-11] :, "label"] = np.nan
    return data


def last_rank_ic(model, data):
    hist: dict = {}
    model.fit(data, hist)
    return max(row["valid_rank_ic"] for row in hist["seeds"][0])


@pytest.mark.parametrize("cls", [MultiFactorRNN, GRUGAT])
def test_embedding_sees_an_effect_that_is_no_line_in_the_code(cls, toy_dataset):
    data = toy_dataset(change=with_codes)
    extra = {"graphs": []} if cls is GRUGAT else {}
    kwargs = {**SMALL, **extra, "n_factors": 1}
    embedded = last_rank_ic(cls(categories=CODES, **kwargs), data)
    # Under the same few steps a code read as a number shows little.
    assert embedded > 0.8
    assert embedded > last_rank_ic(cls(**kwargs), data) + 0.1


def test_encoder_by_hand():
    encoder = RNNEncoder(3, 4, 1, 0.0, "GRU", [(1, 2)], 5).eval()
    assert encoder.rnn.input_size == 2 + 5
    x = torch.tensor([[[0.5, 2.0, -1.0], [0.5, 0.0, -1.0]]])  # [l=1, n=2, f=3]
    got, _ = encoder(x)
    vector = encoder.embeddings[0].weight[2]
    first = torch.cat([torch.tensor([0.5, -1.0]), vector])
    second = torch.cat([torch.tensor([0.5, -1.0]), torch.zeros(5)])  # 0 is unknown
    want, _ = encoder.rnn(torch.stack([first, second]).unsqueeze(0))
    torch.testing.assert_close(got, want)


def test_position_of_the_column_does_not_matter_and_the_model_pickles(toy_dataset):
    data = toy_dataset(change=with_codes)

    def moved(frame):
        frame = with_codes(frame)
        names = [("feature", n) for n in ("x1", "x0", "x2")]
        return frame[names + [c for c in frame if c not in names]]

    model = MultiFactorRNN(categories=CODES, n_factors=1, **{**SMALL, "n_epochs": 1})
    model.fit(data)
    want = model.predict(data)
    again = pickle.loads(pickle.dumps(model))
    pd.testing.assert_series_equal(again.predict(data), want)
    pd.testing.assert_series_equal(again.predict(toy_dataset(change=moved)), want)


def test_wrong_categories_are_named(toy_dataset):
    data = toy_dataset(change=with_codes)
    kwargs = {**SMALL, "n_epochs": 1}
    with pytest.raises(ValueError, match="names 'nothing'"):
        MultiFactorRNN(categories={"nothing": 3}, **kwargs).fit(data)
    with pytest.raises(ValueError, match="'x1' must hold codes 0 to 4"):
        MultiFactorRNN(categories={"x1": 4}, **kwargs).fit(data)
    with pytest.raises(ValueError, match="'x0' must hold codes"):
        MultiFactorRNN(categories={"x0": 4}, **kwargs).fit(data)
    with pytest.raises(ValueError, match=r"`categories\.x1`"):
        MultiFactorRNN(categories={"x1": 0})
    with pytest.raises(ValueError, match="`categories` must be a mapping"):
        MultiFactorRNN(categories=["x1"])
