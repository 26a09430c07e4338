"""The compiled GRU is `nn.GRU`: values, gradients, states, dropout."""

import copy

import pytest
import torch

from qlib_ext.nn import gru
from qlib_ext.nn.gru import GRU


def pair(seed=0, **options):
    torch.manual_seed(seed)
    ours = GRU(5, 8, 2, **options)
    return ours, torch.nn.GRU(5, 8, 2, **options), torch.randn(7, 11, 5)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("stocks", [1024, 4])
def test_values_and_gradients_are_torchs(monkeypatch, both, stocks):
    monkeypatch.setattr(gru, "_STOCKS", stocks)  # 11 stocks in one or three blocks
    ours, theirs, x = pair(bidirectional=both)
    theirs.load_state_dict(ours.state_dict())
    state = torch.randn(4 if both else 2, 11, 8)
    weight = torch.randn(7, 11, 16 if both else 8)

    def grads(net, dtype):
        given = [v.to(dtype).requires_grad_() for v in (x, state)]
        h, last = net.to(dtype)(*given)
        loss = (h * weight.to(dtype)).sum() + (last**2).sum()
        return [h, last, *torch.autograd.grad(loss, [*given, *net.parameters()])]

    exact = grads(copy.deepcopy(theirs), torch.float64)
    for got, want in zip(grads(ours, torch.float32), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        h, last = ours(x, state)
    torch.testing.assert_close(h.double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.double(), exact[1], rtol=1e-5, atol=1e-6)


def test_dropout_between_layers_draws_what_torch_draws():
    ours, theirs, x = pair(dropout=0.5)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for net in (ours, theirs):
        torch.manual_seed(3)
        results.append(net.train()(x)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_pieces_by_the_state_equal_the_whole():
    ours, _, x = pair()
    whole, last = ours(x)
    first, state = ours(x[:3])
    rest, end = ours(x[3:], state)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(end, last)


def test_missing_values_stay_with_their_stock():
    ours, _, x = pair()
    x[2, 4, 1] = float("nan")
    h, _ = ours(x)
    bad = h.isnan().any(-1)
    assert bad[2:, 4].all() and int(bad.sum()) == 5


def test_other_types_are_torchs_own():
    ours, theirs, x = pair()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.double()(x.double())[0], theirs.double()(x.double())[0])
