"""MASTER: the gate and the pooling by hand; order and absent stocks play no part."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from qlib_ext.losses import day_mse, long_side
from qlib_ext.models import MASTER
from qlib_ext.models.master import (
    AttentionBlock,
    MarketGate,
    MasterNetwork,
    _attend,
    positions,
)

TINY = {"d_model": 8, "step_len": 4, "n_epochs": 2, "early_stop": 2, "GPU": -1}


@pytest.fixture(scope="module")
def data(toy_dataset):
    """The toy data with a state of the market, three numbers a day."""
    data = toy_dataset(n_stocks=12)
    state = torch.randn(
        len(data.panel.dates), 3, generator=torch.Generator().manual_seed(1)
    )
    data._panel = replace(data.panel, market=state, market_names=["a", "b", "c"])
    return data


@pytest.fixture(scope="module")
def fitted(data):
    model = MASTER(**TINY)
    model.fit(data)
    return model


@pytest.fixture
def scored(fitted):
    """Function that scores a day of a panel by the fitted network."""
    network = fitted.rebuild_network(fitted.states_[0])

    @torch.no_grad()
    def score(panel, day=60):
        batch = fitted._batch(panel, np.array([day]), torch.device("cpu"))
        h = network.encoder(batch.x)[0]
        return network.head(h, batch)["score"][0], batch.stocks

    return score


class TestReferenceValues:
    def test_gate_is_the_papers_softmax(self):
        gate = MarketGate(3, 2, 5.0)
        market, x = torch.tensor([1.0, -2.0]), torch.randn(4, 5, 3)
        logits = (gate.linear.weight @ market + gate.linear.bias) / 5.0
        wanted = 3 * logits.exp() / logits.exp().sum() * x
        torch.testing.assert_close(gate(x, market), wanted)

    def test_attention_is_softmax_of_scaled_products(self):
        torch.manual_seed(0)
        block = AttentionBlock(4, 2, 0.5).eval()
        x = torch.randn(1, 3, 4)
        there = torch.tensor([[True, False, True]])
        got = block(x, there)
        normed = block.norm(x)[0]
        q, k, v = (normed @ w.T for w in block.qkv.weight.split(4))
        parts = []
        for head in (slice(0, 2), slice(2, 4)):
            logits = q[:, head] @ k[:, head].T / 2**0.5
            logits[:, 1] = -torch.inf
            parts.append(torch.softmax(logits, -1) @ v[:, head])
        wanted = block.norm_ff(normed + torch.cat(parts, -1))
        wanted = wanted + block.feed_forward(wanted)
        torch.testing.assert_close(got[0], wanted)

    @pytest.mark.parametrize("dropout", [0.25, 0.5])
    def test_dropout_between_stocks_keeps_the_mean(self, dropout):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 40, 4)
        there = torch.arange(40) < 30
        drawn = torch.stack([_attend(q, k, v, there, dropout) for _ in range(400)])
        exact = functional.scaled_dot_product_attention(q, k, v, there.expand(40, 40))
        error = drawn.std(0) / 400**0.5
        assert ((drawn.mean(0) - exact).abs() < 5 * error).all()
        # One weight w of a mean varies by w^2 p / (1 - p).
        w = torch.softmax((q @ k.mT / 2).masked_fill(~there, -torch.inf), -1)
        variance = w.square() @ v.square() * dropout / (1 - dropout)
        assert drawn.var(0).mean() == pytest.approx(variance.mean().item(), rel=0.05)

    def test_positions(self):
        got = positions(3, 4)
        assert got[0].tolist() == [0, 1, 0, 1]
        assert got[2, 0] == pytest.approx(np.sin(2))
        assert got[2, 3] == pytest.approx(np.cos(2 / 100))

    def test_long_side_weighs_the_best_fifth(self):
        label = torch.tensor([[1.0, 2, 3, 4, 5, float("nan"), 9]])
        mask = torch.ones(1, 7, dtype=torch.bool)
        mask[0, 6] = False  # absent: 9 does not move the quantile
        weight = long_side(label, mask)
        assert weight.tolist() == [[1, 1, 1, 1, 2, 1, 1]]
        error, counted = day_mse(torch.zeros(1, 7), label, mask, weight)
        assert error.item() == pytest.approx((1 + 4 + 9 + 16 + 2 * 25) / 6)
        assert counted.item()


class TestProperties:
    def test_equivariant_to_the_order_of_stocks(self, data, scored):
        panel = data.panel
        order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
        other = replace(
            panel,
            instruments=panel.instruments[order.numpy()],
            **{
                name: getattr(panel, name)[:, order]
                for name in ("features", "present", "labels", "raw_labels", "risk")
            },
        )
        one, _ = scored(panel)
        two, _ = scored(other)
        torch.testing.assert_close(one[order], two, rtol=1e-4, atol=1e-5)

    def test_absent_stocks_are_ignored(self, data, scored):
        panel = data.panel
        present, features = panel.present.clone(), panel.features.clone()
        present[60, 5] = False  # gone today, whatever it did in the window
        one, stocks = scored(replace(panel, present=present))
        assert 5 not in stocks
        features[55:61, 5] = 9.0
        two, _ = scored(replace(panel, present=present, features=features))
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        present[58, 7] = False  # suspended in the window: nobody attends it then
        three, _ = scored(replace(panel, present=present))
        assert not torch.allclose(one, three)

    def test_market_guides_and_tomorrows_does_not(self, data, scored):
        panel = data.panel
        one, _ = scored(panel)
        later, today = panel.market.clone(), panel.market.clone()
        later[61:], today[60] = 9.0, -9.0
        torch.testing.assert_close(one, scored(replace(panel, market=later))[0])
        assert not torch.allclose(one, scored(replace(panel, market=today))[0])

    def test_without_the_gate_the_market_is_not_read(self, toy_dataset):
        model = MASTER(gate=False, long_weight=2.0, **TINY)
        model.fit(toy_dataset(n_stocks=12))
        assert model.build_network(3).gate is None


class TestBadInput:
    def test_a_gate_needs_the_market(self, toy_dataset):
        with pytest.raises(ValueError, match="`gate` is true, but the data have no"):
            MASTER(**TINY).fit(toy_dataset(n_stocks=12))

    def test_another_market_state_than_the_fits(self, data, fitted):
        other = replace(data.panel, market_names=["a", "b", "d"])
        with pytest.raises(ValueError, match="fitted with the market state"):
            fitted.on_panel(other)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"t_heads": 3}, "`t_heads` must divide `d_model`"),
            ({"mode": "stream"}, "`mode` is 'stream', but this encoder"),
            ({"beta": 0}, "`beta` must be above 0"),
            ({"stock_parts": 2}, "`stock_parts` must be 1"),
        ],
    )
    def test_arguments(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            MASTER(**{**TINY, **arguments})


def test_network_takes_a_short_window():
    network = MasterNetwork(3, 0, 8, 4, 2, 0.0, 5.0)
    assert network.encoder(torch.zeros(2, 5, 3))[0].shape == (1, 5, 6)
