"""Recurrent encoders of a stock's window: plain, attentive, and linear in the state.

Each reads x [l, n, f], time first, and a state, and gives h and the state after the
last day. Those that `streams` give h of every day and go on from the state; the others
read a whole window from its beginning and give h of its last day only.

Equations, sources and what they leave open: docs/systems/recurrent.md.

Glossary: l look-back days, n instruments of the day, f features, d hidden width, g size
groups, p steps a day.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlib_ext.nn import kernels
from qlib_ext.nn.gru import GRU
from qlib_ext.nn.selective_scan import compiled, cut, each_block, selective_scan

__all__ = [
    "ENCODERS",
    "AttentiveGRU",
    "AttentiveLSTM",
    "DecompGRU",
    "Encoder",
    "RNNEncoder",
    "ResidualAttentionLSTM",
    "gated_layer",
    "linear_recurrence",
]

# Days that the longest memory of a new linear recurrence spans. More, 60, hides what
# the last days say: on embedded markets it learnt less in the epochs of a GRU.
_MEMORY = 10
# Values of a compiled layer's gates and candidate that stay in the cache: 4 MiB.
_VALUES = 1 << 20


class Encoder(nn.Module):
    """What the recurrent encoders share: steps, embedded codes, dropout at the end.

    Subclasses define `build` and `read`.

    Parameters
    ----------
    d_feat : int
        Features `f` of a day.
    hidden_size, num_layers : int
    dropout : float
        Between the layers and after the last.
    rnn : str
        Name in `ENCODERS`.
    categories : sequence of (int, int)
        Position among the features, and number of codes, of each feature that is a
        code of a state; it is replaced by a learnt vector, code 0 by zeros.
    embedding_size : int
        Length of these vectors.
    every : int
        Days a step: of a window the last day and every `every`-th before it are read.
    parts : int
        Steps `p` a day: the columns are f / p features of each step, feature by
        feature, the day's first step first.
    options : dict
        Of the encoder at hand: `bidirectional`, `size_groups`.

    Attributes
    ----------
    streams : bool
        Whether a run of days can be read in pieces, by the state, to the same h.
    width : int
        Length of h.
    """

    streams: ClassVar[bool] = True

    def __init__(
        self,
        d_feat: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        rnn: str = "GRU",
        categories: Sequence[tuple[int, int]] = (),
        embedding_size: int = 4,
        every: int = 1,
        parts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.d_feat, self.every, self.parts = d_feat, every, parts
        self.coded = [at for at, _ in categories]
        self.numbers = [at for at in range(d_feat // parts) if at not in self.coded]
        inputs = len(self.numbers) + embedding_size * len(self.coded)
        between = dropout if num_layers > 1 else 0.0
        self.width = self.build(inputs, hidden_size, num_layers, between, rnn, options)
        self.dropout = nn.Dropout(dropout)
        self.embeddings = nn.ModuleList(
            nn.Embedding(count + 1, embedding_size, padding_idx=0)
            for _, count in categories
        )

    def build(
        self, inputs: int, hidden: int, layers: int, between: float, rnn: str, options
    ) -> int:
        """Make the layers; `between` is the dropout between them. Returns the width."""
        raise NotImplementedError

    def read(self, x: torch.Tensor, state: Any, beside: torch.Tensor):
        """Map x [l, n, inputs] to (h [l or 1, n, width], state).

        beside [l, n, k] is what the model hands over with the features.
        """
        raise NotImplementedError

    def forward(self, x: torch.Tensor, state: Any = None):
        """Map x [l, n, f] to (h [l or 1, n, width], state after the last day)."""
        beside = x[..., self.d_feat :]
        if beside.shape[-1]:  # else the gradient of x would be copied
            x = x[..., : self.d_feat]
        if self.every > 1:
            x = x[(len(x) - 1) % self.every :: self.every]
        if self.parts > 1:
            days, n, _ = x.shape
            x = x.reshape(days, n, -1, self.parts).permute(0, 3, 1, 2).flatten(0, 1)
        if self.coded:
            vectors = [
                embed(x[..., at].long())
                for embed, at in zip(self.embeddings, self.coded, strict=True)
            ]
            x = torch.cat([x[..., self.numbers], *vectors], dim=-1)
        h, state = self.read(x, state, beside)
        if self.parts > 1 and len(h) > 1:
            h = h[self.parts - 1 :: self.parts]
        return self.dropout(h), state


class RNNEncoder(Encoder):
    """GRU, LSTM or plain RNN, as `rnn` says; h is the last layer's of each day."""

    def build(self, inputs, hidden, layers, between, rnn, options) -> int:
        """Make one of PyTorch's own; the GRU as compiled loops on the CPU."""
        cell: Any = {"GRU": GRU, "LSTM": nn.LSTM, "RNN": nn.RNN}[rnn]
        self.rnn = cell(inputs, hidden, layers, dropout=between)
        return hidden

    def read(self, x, state, beside):
        """Run it; see `Encoder.read`."""
        return self.rnn(x, state)


class AdditiveAttention(nn.Module):
    """Weights of the days of a window, and their weighted sum.

    ``e_t = v' tanh(W h_t + b)``, ``a = softmax(e)`` over the window, ``sum_t a_t h_t``;
    asked by the last state, ``e_t = v' tanh(W h_t + Q h_L + b)``.

    Parameters
    ----------
    width : int
        Length of h.
    asked : bool, default False
        Whether the last state asks. Without it a day's weight depends on its own state
        alone, so nothing tells the window's last days from its first: a network that
        keeps no last state beside the pooled one then begins as the plain mean, and
        learns little in the epochs a GRU needs. Asked, it begins near the last state.
    """

    def __init__(self, width: int, asked: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.query = nn.Linear(width, 1, bias=False)
        self.last = nn.Linear(width, width, bias=False) if asked else None
        if asked:
            self._begin_near_the_last()

    @torch.no_grad()
    def _begin_near_the_last(self) -> None:
        """Let e_t begin to fall with the distance of h_t from h_L.

        Along each of d / 2 directions r, two rows make the bump ``tanh(1 + z) + tanh(1
        - z)`` of ``z = 4 d^(1/2) r'(h_t - h_L)``. New states of whatever width d differ
        by about a half in all, so that after some days z is about 2 and e_t has fallen
        by 6.
        """
        width = self.project.in_features
        half = width // 2
        nn.init.orthogonal_(self.project.weight[:half], 4.0 * math.sqrt(width))
        self.project.weight[half : 2 * half] = self.project.weight[:half]
        assert self.last is not None
        self.last.weight.copy_(-self.project.weight)
        for rows, sign in ((slice(half), 1.0), (slice(half, 2 * half), -1.0)):
            self.project.bias[rows] = sign
            self.query.weight[0, rows] = sign * 5.0 / max(half, 1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map h [l, n, d] to [1, n, d]."""
        key = self.project(h)
        if self.last is not None:
            key = key + self.last(h[-1:])
        logits = self.query(torch.tanh(key))  # [l, n, 1]
        weights = torch.softmax(logits.float(), dim=0).to(h.dtype)
        return (weights * h).sum(0, keepdim=True)


class AttentiveGRU(Encoder):
    """AGRU: a GRU, `bidirectional` or not, and the attention of its last state."""

    streams = False

    def build(self, inputs, hidden, layers, between, rnn, options) -> int:
        """Make GRU and attention; both directions side by side are twice as wide."""
        both = options.get("bidirectional", False)
        self.rnn = GRU(inputs, hidden, layers, dropout=between, bidirectional=both)
        width = hidden * (2 if both else 1)
        self.attention = AdditiveAttention(width, asked=True)
        return width

    def read(self, x, state, beside):
        """Give the pooled h; see `Encoder.read`."""
        h, _ = self.rnn(x)
        return self.attention(h), None


class AttentiveLSTM(Encoder):
    """ALSTM: linear and tanh, LSTM, and the last state beside the pooled ones.

    Feng et al. (2019), https://arxiv.org/abs/1810.09936, and Qlib's `ALSTM`.
    """

    streams = False

    def build(self, inputs, hidden, layers, between, rnn, options) -> int:
        """Make the input layer, LSTM and attention."""
        self.embed = nn.Linear(inputs, hidden)
        self.rnn = nn.LSTM(hidden, hidden, layers, dropout=between)
        self.attention = AdditiveAttention(hidden)
        return 2 * hidden

    def read(self, x, state, beside):
        """Give [last, pooled]; see `Encoder.read`."""
        h, _ = self.rnn(torch.tanh(self.embed(x)))
        return torch.cat([h[-1:], self.attention(h)], dim=-1), None


class ResidualAttentionLSTM(Encoder):
    """LSTM; what attention gathers from the window is added to the last state."""

    streams = False

    def build(self, inputs, hidden, layers, between, rnn, options) -> int:
        """Make LSTM and attention."""
        self.rnn = nn.LSTM(inputs, hidden, layers, dropout=between)
        self.attention = AdditiveAttention(hidden)
        return hidden

    def read(self, x, state, beside):
        """Give last + pooled; see `Encoder.read`."""
        h, _ = self.rnn(x)
        return h[-1:] + self.attention(h), None


class DecompGRU(Encoder):
    """Layers whose gates see the input only, so that the state is linear in the past.

    A layer reads u and v [l, n, ·], the features in layer 1::

        f, o = sigmoid(W u + b),   c = SiLU(V v + b)
        h_t = f * h_{t-1} + (1 - f) * c,   y = o * h

    From layer 2 on v is the output y of the layer below, and u is y less its mean over
    the stocks of equal size group that day. With `size_groups` 0 u is y too: then every
    stock is read by itself.

    The size group [l, n] comes beside the features: 1 to g, g + 1 for a stock of
    unknown size, 0 for one that is absent, whose u is 0.
    """

    def build(self, inputs, hidden, layers, between, rnn, options) -> int:
        """Make the projections; biases of f give memories of 1 to 10 days."""
        self.size_groups = options.get("size_groups", 0)
        wide = [inputs] + [hidden] * (layers - 1)
        self.gates = nn.ModuleList(nn.Linear(w, 2 * hidden) for w in wide)
        self.inputs = nn.ModuleList(nn.Linear(w, hidden) for w in wide)
        self.between = nn.Dropout(between)
        for gate in self.gates:
            assert isinstance(gate, nn.Linear)
            # sigmoid(b) = 1 - 1 / memory, as Tallec and Ollivier (2018) start an LSTM,
            # but log-uniform, as Mamba's steps are: short memories are not rare.
            longest = math.log(_MEMORY - 1.0)
            gate.bias.data[:hidden].uniform_(-longest, longest)
        return hidden

    def read(self, x, state, beside):
        """Run the layers; see `Encoder.read`."""
        states = []
        u = y = x
        groups = None
        if self.size_groups and len(self.gates) > 1:
            # One column a group: products with it are sums over its stocks.
            numbers = torch.arange(1, self.size_groups + 2, device=x.device)
            groups = (beside[..., -1:] == numbers).float()  # [l, n, g + 1]
        for i, (gate, candidate) in enumerate(
            zip(self.gates, self.inputs, strict=True)
        ):
            if i:
                y = self.between(y)
                u = y if groups is None else _demean(y, groups)
            before = None if state is None else state[i]
            y, last = gated_layer(gate, candidate, u, y, before)
            states.append(last)
        return y, states


def _demean(y: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Take the mean of its group off y [l, n, d]; 0 for stocks of no group."""
    with torch.autocast(y.device.type, enabled=False):
        y = y.float()
        count = groups.sum(1).clamp_min(1.0).unsqueeze(-1)  # [l, g, 1]
        mean = torch.bmm(groups.transpose(1, 2), y) / count  # [l, g, d]
        return groups.sum(-1, keepdim=True) * y - torch.bmm(groups, mean)


def gated_layer(
    gate: Any,
    candidate: Any,
    u: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a layer of `DecompGRU`.

    In float32 on the CPU one compiled loop takes a stock through all days behind the
    projections, functions of the gates included; elsewhere it is `linear_recurrence`
    between them.

    Parameters
    ----------
    gate : Linear
        To f, then o, before the logistic function.
    candidate : Linear
        To c before SiLU.
    u, v : Tensor [l, n, ·]
        What gates and candidate read; if it is one tensor, one product serves both.
    state : Tensor [n, d], optional
        h before the first step; default zero.

    Returns
    -------
    y : Tensor [l, n, d]
    state : Tensor [n, d]
    """
    if compiled(u):
        if state is None:
            state = u.new_zeros((u.shape[1], candidate.out_features))
        maps = (gate.weight, gate.bias), (candidate.weight, candidate.bias)
        given = [u, *maps[0], v, *maps[1]]
        if u is v:
            given = [u, *(torch.cat(pair) for pair in zip(*maps, strict=True))]
        with torch.autocast("cpu", enabled=False):
            return _CompiledLayer.apply(state, *given)
    f, o = gate(u).chunk(2, dim=-1)
    h, last = linear_recurrence(f, F.silu(candidate(v)), state)
    return torch.sigmoid(o) * h, last


class _CompiledLayer(torch.autograd.Function):
    """Products of each (x, weight, bias), then `kernels.gated`, and their gradients.

    A few days at a time, so that what one makes the other finds in the cache. The gates
    hold the outputs of their functions then, and y tells the states: the way back needs
    no second pass forward.
    """

    @staticmethod
    def forward(ctx, state, *given):
        state = state.contiguous()
        y, last = state.new_empty((len(given[0]), *state.shape)), state.clone()
        made = [y.new_empty((*y.shape[:2], len(bias))) for bias in given[2::3]]
        for days in _stretches(*y.shape):
            for (x, weight, bias), out in zip(_triples(given), made, strict=True):
                out = out[days].flatten(0, 1)
                torch.addmm(bias, x[days].flatten(0, 1), weight.t(), out=out)
            _each(kernels.gated, [v[days] for v in made], last, y[days])
        ctx.save_for_backward(state, y, *given, *made)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        with torch.autocast("cpu", enabled=False):
            return _CompiledLayer._gradients(ctx, dy, dlast)

    @staticmethod
    def _gradients(ctx, dy, dlast):
        state, y, *rest = ctx.saved_tensors
        many, dy = len(rest) // 4, dy.contiguous()
        given, made = _triples(rest[: 3 * many]), rest[3 * many :]
        dstate = dlast.clone(memory_format=torch.contiguous_format)
        sums = dy.new_zeros(-(-len(state) // 64), 3 * state.shape[1])
        dx = [
            x.new_empty(x.shape) if needed else None
            for (x, _, _), needed in zip(given, ctx.needs_input_grad[1::3], strict=True)
        ]
        dweight = [torch.zeros_like(weight) for _, weight, _ in given]
        stretches = _stretches(*dy.shape)
        grads = [torch.empty_like(v[stretches[0]]) for v in made]
        for days in reversed(stretches):
            here = [v[: days.stop - days.start] for v in grads]
            before = state
            if t := days.start:
                before = y[t - 1] / made[0][t - 1].split(state.shape[1], -1)[1]
            inside = [v[days] for v in made], before, y[days], dy[days], dstate
            _each(kernels.gated_backward, *inside, here[0], here[-1], sums)
            for i, (x, weight, _) in enumerate(given):
                grad = here[i].flatten(0, 1)
                dweight[i].addmm_(grad.t(), x[days].flatten(0, 1))
                if (of_x := dx[i]) is not None:
                    torch.mm(grad, weight, out=of_x[days].flatten(0, 1))
        dbias = sums.sum(0).split([v.shape[2] for v in made])
        parts = zip(dx, dweight, dbias, strict=True)
        return dstate, *(v for part in parts for v in part)


def _triples(given: Sequence[torch.Tensor]):
    """Each x, weight and bias."""
    return [given[i : i + 3] for i in range(0, len(given), 3)]


def _stretches(length: int, n: int, d: int) -> list[slice]:
    """Cut the days into pieces of about `_VALUES`."""
    return cut(length, max(1, _VALUES // max(1, 3 * d * n)))


def _each(kernel, made, *others) -> None:
    """Call a kernel on gates, candidate, the column it begins at, and the others.

    Threads pay only for stretches of many stocks. Their shares are multiples of 64, as
    the sums are, which so do not depend on the number of threads.
    """
    gates, a, *arrays = (v.numpy() for v in (made[0], made[-1], *others))
    at = 0 if len(made) > 1 else gates.shape[2] // 3 * 2
    share = 64 * max(1, _VALUES // max(1, 256 * len(gates) * gates.shape[2]))

    def run(_, block):
        kernel(gates, a, at, *arrays, block.start, block.stop)

    each_block(run, gates.shape[1], share)


def linear_recurrence(
    f: torch.Tensor, c: torch.Tensor, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run h_t = s h_{t-1} + (1 - s) c_t with s = sigmoid(f) over time.

    That is the selective scan of one state a channel, exactly: with A = -1, B = C = 1
    and a step of -log s, `zoh` has exp(delta A) = s and b = 1 - s.

    Parameters
    ----------
    f, c : Tensor [l, n, d]
    state : Tensor [n, d], optional
        h before the first step; default zero.

    Returns
    -------
    h : Tensor [l, n, d]
    state : Tensor [n, d]
    """
    length, n, d = c.shape
    one = c.new_ones((1, 1, 1)).expand(length, n, 1)
    A = c.new_full((d, 1), -1.0)
    state = None if state is None else state.unsqueeze(-1)
    h, last = selective_scan(c, F.softplus(-f), A, one, one, state=state)
    return h, last.squeeze(-1)


ENCODERS: dict[str, type[Encoder]] = {
    "GRU": RNNEncoder,
    "LSTM": RNNEncoder,
    "AGRU": AttentiveGRU,
    "ALSTM": AttentiveLSTM,
    "ResidualAttentionLSTM": ResidualAttentionLSTM,
    "DecompGRU": DecompGRU,
}
