"""Attributes of the day: the block, and a model that reads them."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from qlib_ext.models import GRUGAT, MultiFactorRNN
from qlib_ext.nn.attributes import DayAttributes

TINY = dict(hidden_size=8, num_layers=1, step_len=5, n_epochs=15, GPU=-1, lr=0.02)


def with_attribute(data):
    """The label is the day's attribute; the features are noise."""
    rng = np.random.default_rng(3)
    a = rng.normal(size=len(data))
    data = data.copy()
    data["label"] = np.where(
        data["label"].notna().to_numpy(), a[:, None] + 0.3 * data["label"], np.nan
    )
    data[("attribute", "a")] = np.where(rng.random(len(data)) < 0.1, np.nan, a)
    return data


@pytest.fixture(scope="module")
def data(toy_dataset):
    return toy_dataset(change=with_attribute, signal=0.0)


def test_unknown_is_zero_and_marked():
    torch.manual_seed(0)
    block = DayAttributes(2, width=3)
    values = torch.tensor([[[1.5, float("nan")]]])
    linear = block[0]
    want = torch.relu(linear(torch.tensor([[[1.5, 0.0, 1.0, 0.0]]])))
    assert torch.equal(block(values), want)
    assert list(block.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("cls", [MultiFactorRNN, GRUGAT])
def test_a_model_learns_from_the_attribute_only_if_it_is_asked_to(cls, data):
    own = {"graphs": []} if cls is GRUGAT else {"n_factors": 1}
    ranks = []
    for attributes in (True, False):
        model = cls(attributes=attributes, **TINY, **own)
        model.fit(data)
        score = model.predict(data)
        label = data.prepare("test", col_set="label").iloc[:, 0].reindex(score.index)
        keep = label.notna()
        ranks.append(spearmanr(score[keep], label[keep]).statistic)
        assert model.reads_features_only is not attributes
    assert ranks[0] > 0.7 > abs(ranks[1]) + 0.4


def test_the_panel_keeps_attributes_without_frames_and_in_the_fingerprint(
    data, toy_dataset
):
    other = toy_dataset(change=with_attribute, signal=0.0)
    want = other.prepare("test", col_set="attribute")
    mark = other.panel.fingerprint()
    assert mark["attributes"] == ["a"]
    other.free_frames()
    got = other.prepare("test", col_set="attribute")
    pd.testing.assert_frame_equal(
        got.sort_index(), want.sort_index().astype(np.float32), check_names=False
    )
    other.panel.attributes[3, 2, 0] = 9.0
    assert other.panel.fingerprint()["values"] != mark["values"]
    assert "attributes" not in toy_dataset().panel.fingerprint()


def test_a_handler_without_the_group_is_named(toy_dataset):
    with pytest.raises(ValueError, match="no column group `attribute`"):
        MultiFactorRNN(attributes=True, **TINY).fit(toy_dataset())
