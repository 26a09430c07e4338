"""The Mamba block: parts against torch, streams, causality, initial values."""

import pytest
import torch
from torch.nn import functional as F

from qlib_ext.nn.mamba import CausalConv, MambaBlock, MambaEncoder


@pytest.fixture
def encoder_x():
    torch.manual_seed(0)
    return MambaEncoder(5, 16, 2, 4).eval(), torch.randn(30, 7, 5)


def test_causal_conv_matches_torch_conv1d():
    torch.manual_seed(0)
    conv, x = CausalConv(6, 4), torch.randn(9, 3, 6)
    y, seen = conv(x)
    weight = conv.weight.t().unsqueeze(1)  # [channel, 1, day]
    expected = F.conv1d(F.pad(x.permute(1, 2, 0), (3, 0)), weight, conv.bias, groups=6)
    torch.testing.assert_close(y, expected.permute(2, 0, 1))
    assert torch.equal(seen, x[-3:])


def test_block_is_the_paper_worked_step_by_step():
    torch.manual_seed(0)
    block, x = MambaBlock(8, 4), torch.randn(6, 2, 8)
    u, gate = block.project_in(x).chunk(2, -1)
    u = F.silu(block.conv(u)[0])
    dt, B, C = block.project_x(u).split([1, 4, 4], -1)
    delta = F.softplus(block.project_dt(dt))
    A = -block.A_log.exp()
    h, rows = torch.zeros(2, 16, 4), []
    for t in range(6):
        z = delta[t][..., None] * A
        h = z.exp() * h + torch.expm1(z) / A * B[t][:, None] * u[t][..., None]
        rows.append((h * C[t][:, None]).sum(-1) + block.D * u[t])
    expected = block.project_out(torch.stack(rows) * F.silu(gate))
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-4, atol=1e-6)


def test_block_starts_from_the_official_values():
    torch.manual_seed(0)
    block = MambaBlock(32, 16)
    torch.testing.assert_close(
        block.A_log.exp(), torch.arange(1.0, 17).expand(64, 16), rtol=1e-5, atol=0
    )
    step = F.softplus(block.project_dt.bias)
    step = step.detach()
    assert 0.9e-3 < float(step.min()) < float(step.max()) < 0.11
    assert torch.equal(block.D, torch.ones(64))


@pytest.mark.parametrize("pieces", [[1] * 30, [12, 18], [2, 1, 27]])
def test_stream_in_pieces_equals_one_window(encoder_x, pieces):
    encoder, x = encoder_x
    whole, _ = encoder(x)
    state, parts = None, []
    for piece in x.split(pieces):
        h, state = encoder(piece, state)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_future_days_change_no_earlier_output(encoder_x):
    encoder, x = encoder_x
    h, _ = encoder(x)
    x = x.clone()
    x[20:] = 9.0
    changed, _ = encoder(x)
    assert torch.equal(changed[:20], h[:20])
    assert not torch.equal(changed[20:], h[20:])


def test_stocks_do_not_see_each_other(encoder_x):
    encoder, x = encoder_x
    order = torch.randperm(7)
    torch.testing.assert_close(encoder(x[:, order])[0], encoder(x)[0][:, order])
    torch.testing.assert_close(encoder(x[:, :2])[0], encoder(x)[0][:, :2])


def test_every_parameter_gets_a_gradient(encoder_x):
    encoder, x = encoder_x
    encoder(x)[0].square().mean().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        if not name.endswith("embed.bias"):
            assert p.grad.abs().max() > 0, name
