import math

import pytest
import torch

from qlib_ext.nn import recurrent
from qlib_ext.nn.recurrent import (
    ENCODERS,
    AdditiveAttention,
    DecompGRU,
    RNNEncoder,
    gated_layer,
    linear_recurrence,
)

L, N, F, D = 7, 5, 3, 4


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(L, N, F)


def make(name, layers=1, **options):
    torch.manual_seed(1)
    return ENCODERS[name](F, D, layers, 0.0, name, **options).eval()


def attend(attention, h):
    """Additive attention of one stock, h [l, d], day by day."""
    v = attention.query.weight[0]
    w, b = attention.project.weight, attention.project.bias
    last = 0.0 if attention.last is None else attention.last.weight @ h[-1]
    e = [math.exp(float(v @ torch.tanh(w @ day + last + b))) for day in h]
    return sum(weight / sum(e) * day for weight, day in zip(e, h, strict=True))


def gru(rnn, x, layer="l0"):
    """Output of one layer of nn.GRU for one stock [l, f], step by step."""
    part = {k: getattr(rnn, f"{k}_{layer}") for k in ("weight_ih", "weight_hh")}
    b = [getattr(rnn, f"bias_{k}_{layer}") for k in ("ih", "hh")]
    h, out = torch.zeros(D), []
    for day in x:
        r, z, n = (part["weight_ih"] @ day + b[0]).chunk(3)
        hr, hz, hn = (part["weight_hh"] @ h + b[1]).chunk(3)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + r * hn) + z * h
        out.append(h)
    return torch.stack(out)


def lstm(rnn, x):
    h, c, out = torch.zeros(D), torch.zeros(D), []
    for day in x:
        parts = rnn.weight_ih_l0 @ day + rnn.bias_ih_l0 + rnn.weight_hh_l0 @ h
        i, f, g, o = (parts + rnn.bias_hh_l0).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
class TestAgainstAPlainLoop:
    def test_agru(self, x):
        encoder = make("AGRU")
        got, _ = encoder(x)
        for i in range(N):
            want = attend(encoder.attention, gru(encoder.rnn, x[:, i]))
            torch.testing.assert_close(got[0, i], want)

    def test_agru_in_both_directions(self, x):
        encoder = make("AGRU", bidirectional=True)
        got, _ = encoder(x)
        assert got.shape == (1, N, 2 * D) and encoder.width == 2 * D
        for i in range(N):
            back = gru(encoder.rnn, x[:, i].flip(0), "l0_reverse").flip(0)
            h = torch.cat([gru(encoder.rnn, x[:, i]), back], dim=-1)
            torch.testing.assert_close(got[0, i], attend(encoder.attention, h))

    def test_alstm(self, x):
        encoder = make("ALSTM")
        got, _ = encoder(x)
        for i in range(N):
            h = lstm(encoder.rnn, torch.tanh(encoder.embed(x[:, i])))
            want = torch.cat([h[-1], attend(encoder.attention, h)])
            torch.testing.assert_close(got[0, i], want)

    def test_residual_attention_lstm(self, x):
        encoder = make("ResidualAttentionLSTM")
        got, _ = encoder(x)
        for i in range(N):
            h = lstm(encoder.rnn, x[:, i])
            torch.testing.assert_close(got[0, i], h[-1] + attend(encoder.attention, h))

    def test_decomp_gru(self, x):
        encoder = make("DecompGRU", layers=2, size_groups=2)
        # Group 3 is of unknown size, 0 absent.
        group = torch.tensor([1, 1, 2, 3, 0]).repeat(L, 1)
        group[2] = torch.tensor([2, 1, 1, 2, 1])
        got, _ = encoder(torch.cat([x, group.unsqueeze(-1).float()], dim=-1))
        below, v = x, x
        for layer in range(2):
            y = torch.zeros(L, N, D)
            for i in range(N):
                h = torch.zeros(D)
                for t in range(L):
                    u = v[t, i]
                    if layer:
                        same = below[t][group[t] == group[t, i]].mean(0)
                        u = (u - same) * (group[t, i] > 0)
                    f, o = torch.sigmoid(encoder.gates[layer](u)).chunk(2)
                    c = encoder.inputs[layer](v[t, i])
                    h = f * h + (1 - f) * c * torch.sigmoid(c)
                    y[t, i] = o * h
            below = v = y
        torch.testing.assert_close(got, y)

    def test_absent_stocks_move_no_group(self, x):
        encoder = make("DecompGRU", layers=2, size_groups=2)
        group = torch.tensor([1.0, 1, 1, 1, 0]).repeat(L, 1).unsqueeze(-1)
        other = x.clone()
        other[:, 4] += 3
        one, two = (encoder(torch.cat([v, group], -1))[0] for v in (x, other))
        torch.testing.assert_close(one[:, :4], two[:, :4], rtol=0, atol=0)
        other[:, 3] += 3
        two = encoder(torch.cat([other, group], -1))[0]
        assert not torch.equal(one[:, 0], two[:, 0])


def test_linear_recurrence_has_the_gradients_of_a_plain_loop():
    torch.manual_seed(0)
    given = [torch.randn(L, N, D), torch.randn(L, N, D), torch.randn(N, D)]
    grads = []
    for plain in (True, False):
        f, c, h = (v.clone().requires_grad_() for v in given)
        leaves = f, c, h
        if plain:
            out = []
            for t in range(L):
                s = torch.sigmoid(f[t])
                h = s * h + (1 - s) * c[t]
                out.append(h)
            y = torch.stack(out)
        else:
            y, last = linear_recurrence(f, c, h)
            torch.testing.assert_close(last, y[-1])
        (y * torch.arange(1.0, L + 1).view(-1, 1, 1)).sum().backward()
        grads.append([y.detach(), *(v.grad for v in leaves)])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("days", [1, 2, L])
@pytest.mark.parametrize(("scale", "together"), [(1.0, False), (30.0, True)])
def test_compiled_layer_is_the_plain_one_in_float64(scale, together, days, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(recurrent, "_VALUES", days * 67 * 210)  # at a time
    # More stocks than a block and more channels than a row of the loops.
    n, d = 67, 70
    given = [scale * torch.randn(L, n, F) for _ in range(1 if together else 2)]
    given.append(scale * torch.randn(n, d))
    weight = torch.randn(L, n, d)
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        maps = [torch.nn.Linear(F, many).to(dtype) for many in (2 * d, d)]
        leaves = [v.to(dtype, copy=True).requires_grad_() for v in given]
        y, last = gated_layer(*maps, leaves[0], leaves[-2], leaves[-1])
        ((y * weight).sum() + (last * weight[0]).sum()).backward()
        leaves += [p for one in maps for p in one.parameters()]
        found.append([y.detach(), last.detach(), *(v.grad for v in leaves)])
    for one, two in zip(*found, strict=True):
        atol = 1e-5 * max(1.0, float(two.abs().max()))
        torch.testing.assert_close(one, two.float(), rtol=1e-4, atol=atol)


def test_gradients_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(recurrent, "_VALUES", 1)
    torch.manual_seed(0)
    x, found = torch.randn(L, 200, F), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            encoder = make("DecompGRU", layers=2)
            encoder(x)[0].square().sum().backward()
            found.append([p.grad for p in encoder.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_layer_reads_days_without_a_stock():
    encoder = make("DecompGRU", layers=2)
    y, states = encoder(torch.empty(L, 0, F))
    y.sum().backward()
    assert y.shape == (L, 0, D) and states[1].shape == (0, D)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, e in ENCODERS.items() if e.streams])
def test_a_stream_in_pieces_is_one_pass(x, name):
    encoder = make(name, layers=2, size_groups=2)
    x = torch.cat([x, torch.ones(L, N, 1)], -1)
    whole, _ = encoder(x)
    first, state = encoder(x[:3])
    second, _ = encoder(x[3:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)


@torch.no_grad()
def test_steps_of_several_days_end_at_the_last_one(x):
    encoder = make("AGRU", every=3)
    torch.testing.assert_close(encoder(x)[0], make("AGRU")(x[[0, 3, 6]])[0])
    torch.testing.assert_close(encoder(x[:5])[0], make("AGRU")(x[[1, 4]])[0])


@torch.no_grad()
def test_parts_of_the_day_are_steps():
    torch.manual_seed(0)
    steps = torch.randn(L, 2, N, F)  # [l, p, n, f]
    # Feature by feature, the first part first.
    columns = steps.permute(0, 2, 3, 1).reshape(L, N, F * 2)
    encoder = ENCODERS["GRU"](2 * F, D, 1, parts=2).eval()
    h = encoder.rnn(steps.reshape(2 * L, N, F))[0]
    torch.testing.assert_close(encoder(columns)[0], h[1::2])  # the day's last part


def test_attention_of_equal_days_is_their_mean():
    h = torch.randn(1, N, D).expand(L, N, D)
    torch.testing.assert_close(AdditiveAttention(D)(h), h[:1])


@torch.no_grad()
@pytest.mark.parametrize("width", [16, 64, 128])
def test_attention_begins_near_the_state_that_asks(width):
    torch.manual_seed(0)
    x = torch.randn(60, 100, 6)
    for t in range(1, len(x)):
        x[t] = 0.9 * x[t - 1] + 0.44 * x[t]  # of variance 1
    h, _ = torch.nn.GRU(6, width, 2)(x)
    asked, plain = (AdditiveAttention(width, asked)(h)[0] for asked in (True, False))
    apart = [(pooled - h[-1]).square().mean() for pooled in (asked, plain)]
    assert apart[0] < 0.1 * apart[1]


def test_memory_starts_between_one_and_ten_days():
    torch.manual_seed(0)
    encoder = DecompGRU(F, 400, 1)
    memory = 1 / (1 - torch.sigmoid(encoder.gates[0].bias[:400]))
    assert 1.1 < memory.min() < 1.2 and 9 < memory.max() < 10 and memory.std() > 2


def test_share_of_a_gru_s_weights():
    def count(encoder):
        return sum(p.numel() for p in encoder.parameters())

    ours, gru_ = DecompGRU(6, 64, 2, size_groups=20), RNNEncoder(6, 64, 2)
    # 3 (6 64 + 64) + 3 (64 64 + 64) of 13,824 + 24,960
    assert count(ours) == 1344 + 12480 and count(gru_) == 13824 + 24960
