"""Attention and convolution over relations against loops and torch-geometric."""

import pytest
import torch

from qlib_ext.nn import graph_attention
from qlib_ext.nn.graph_attention import (
    GraphAttention,
    Neighbors,
    RelationalAttention,
    RelationalConv,
)


def random_edges(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, size, (2, count), generator=generator)
    pairs = pairs[:, pairs[0] != pairs[1]]
    return torch.unique(pairs, dim=1)


def naive_attention(layer, x, edges, self_loops=True):
    """One node at a time, one head at a time."""
    size, heads = len(x), layer.heads
    z = (x @ layer.weight.T).view(size, heads, -1)
    out = torch.zeros_like(z)
    for i in range(size):
        near = edges[0][edges[1] == i].tolist() + ([i] if self_loops else [])
        for h in range(heads):
            logits = [
                torch.nn.functional.leaky_relu(
                    z[j, h] @ layer.att_src[h] + z[i, h] @ layer.att_dst[h],
                    layer.negative_slope,
                )
                for j in near
            ]
            if near:
                alpha = torch.softmax(torch.stack(logits), 0)
                out[i, h] = sum(a * z[j, h] for a, j in zip(alpha, near, strict=True))
    return out.flatten(1) + layer.bias


def gradients(layer, out, x, seed=1):
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    wanted = [x, layer.weight, layer.att_src, layer.att_dst, layer.bias]
    return torch.autograd.grad((out * g.to(out)).sum(), wanted)


@pytest.fixture(params=["compiled", "sparse"])
def path(request, monkeypatch):
    """Run a test with the loops of the CPU, and with what accelerators run."""
    if request.param == "sparse":
        sparse = graph_attention._AttendSparse
        monkeypatch.setattr(graph_attention, "_Attend", sparse)


class TestGraphAttention:
    def test_attention_equals_a_naive_loop_with_gradients(self, path):
        torch.manual_seed(0)
        layer = GraphAttention(5, 8, heads=2).double()
        x = torch.randn(9, 5, dtype=torch.double, requires_grad=True)
        edges = random_edges(9, 25)
        out = layer(x, Neighbors.of(edges, 9))
        want = naive_attention(layer, x, edges)
        torch.testing.assert_close(out, want)
        for a, b in zip(
            gradients(layer, out, x), gradients(layer, want, x), strict=True
        ):
            torch.testing.assert_close(a, b)

    def test_attention_equals_gatconv_with_gradients(self, path):
        torch.manual_seed(0)
        layer = GraphAttention(16, 32, heads=4)
        from torch_geometric.nn import GATConv  # a second to import

        conv = GATConv(16, 8, heads=4)  # adds self-loops itself
        with torch.no_grad():
            conv.lin.weight.copy_(layer.weight)
            conv.att_src.copy_(layer.att_src[None])
            conv.att_dst.copy_(layer.att_dst[None])
            conv.bias.copy_(layer.bias)
        x = torch.randn(60, 16, requires_grad=True)
        edges = random_edges(60, 400)
        out, want = layer(x, Neighbors.of(edges, 60)), conv(x, edges)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        g = torch.randn_like(out)
        got = torch.autograd.grad(
            (out * g).sum(), [x, layer.weight, layer.att_src, layer.att_dst]
        )
        ref = torch.autograd.grad(
            (want * g).sum(), [x, conv.lin.weight, conv.att_src, conv.att_dst]
        )
        for a, b in zip(got, ref, strict=True):
            torch.testing.assert_close(a, b.view_as(a), atol=2e-5, rtol=1e-4)

    def test_attention_passes_gradcheck(self, path):
        torch.manual_seed(0)
        layer = GraphAttention(3, 4, heads=2).double()
        near = Neighbors.of(random_edges(6, 12), 6)
        x = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
        torch.autograd.gradcheck(lambda x: layer(x, near), (x,))

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_compiled_attention_equals_the_sparse_one(self, monkeypatch, dropout):
        torch.manual_seed(0)
        layer = GraphAttention(16, 64, 4, dropout)
        edges = random_edges(200, 4000)
        edges = torch.cat([edges, edges[:, ::7], edges[:, :50]], 1)  # repeated: add up
        near = Neighbors.of(edges, 200)
        x = torch.randn(200, 16, requires_grad=True)
        found = []
        for _ in range(2):
            torch.manual_seed(1)
            out, alpha = layer(x, near, return_attention=True)
            found.append([out, alpha, *gradients(layer, out, x)])
            sparse = graph_attention._AttendSparse
            monkeypatch.setattr(graph_attention, "_Attend", sparse)
        for a, b in zip(*found, strict=True):
            atol = 1e-6 * b.detach().abs().max().item()
            torch.testing.assert_close(a, b, atol=atol, rtol=0)

    def test_neighbors_are_sorted_and_edges_checked(self):
        edges = random_edges(30, 200)
        edges = edges[:, torch.randperm(edges.shape[1])]
        near = Neighbors.of(edges.flip(0), 30, self_loops=False)
        want = torch.sort(edges[0] * 30 + edges[1]).values
        torch.testing.assert_close(near.row.long() * 30 + near.col, want)
        begins = torch.searchsorted(near.row, torch.arange(31, dtype=torch.int32))
        assert near.ptr.tolist() == begins.tolist()
        for bad in (-1, 30):
            with pytest.raises(ValueError, match="not there"):
                Neighbors.of(torch.tensor([[0], [bad]]), 30)

    def test_attention_sums_to_one_and_survives_extreme_logits(self, path):
        layer = GraphAttention(4, 8, heads=2)
        near = Neighbors.of(random_edges(10, 30), 10)
        x = torch.randn(10, 4) * 1e4
        out, alpha = layer(x, near, return_attention=True)
        assert torch.isfinite(out).all()
        total = torch.zeros(10, 2).index_add_(0, near.row, alpha)
        torch.testing.assert_close(total, torch.ones(10, 2))

    def test_attention_without_edges_is_each_stock_by_itself(self, path):
        layer = GraphAttention(4, 8, heads=2)
        x = torch.randn(3, 4)
        none = torch.empty(2, 0, dtype=torch.long)
        torch.testing.assert_close(layer(x, Neighbors.of(none, 3)), x @ layer.weight.T)
        bare = layer(x, Neighbors.of(none, 3, self_loops=False))
        torch.testing.assert_close(bare, torch.zeros(3, 8))

    def test_attention_dropout_keeps_the_mean_and_acts_in_training_only(self):
        torch.manual_seed(0)
        layer = GraphAttention(4, 8, heads=2, dropout=0.5)
        near = Neighbors.of(random_edges(10, 30), 10)
        x = torch.randn(10, 4)
        many = torch.stack([layer(x, near) for _ in range(1000)])
        layer.eval()
        calm = layer(x, near)
        assert many.std(0).max() > 0.1
        torch.testing.assert_close(many.mean(0), calm, atol=0.15, rtol=0)
        torch.testing.assert_close(layer(x, near), calm)

    def test_attention_memory_is_linear_in_edges_not_in_pairs(self):
        saved = 0

        def pack(t):
            nonlocal saved
            saved += t.nbytes
            return t

        layer = GraphAttention(16, 16, heads=2)
        size = 5000
        near = Neighbors.of(random_edges(size, 50_000), size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(size, 16, requires_grad=True), near)
        edges = len(near.col)
        assert saved < 60 * edges + 2000 * size  # all pairs would be 25 million

    def test_heads_must_divide_the_width(self):
        with pytest.raises(ValueError, match=r"`d_out` 10.*`heads` 4"):
            GraphAttention(4, 10, heads=4)


def two_days(seed=0, n=7):
    """Edges of two relations over two days of n stocks."""
    one, two = random_edges(n, 20, seed), random_edges(n, 14, seed + 1)
    return [torch.cat([one, two + n], 1), torch.cat([two, one + n], 1)]


@pytest.mark.parametrize("kind", [RelationalAttention, RelationalConv])
class TestRelations:
    def make(self, kind, d_in=4, d_out=6):
        torch.manual_seed(0)
        if kind is RelationalAttention:
            return kind(d_in, d_out, 2, heads=2)
        return kind(d_in, d_out, 2)

    def near(self, kind, edges, size):
        loops = kind is RelationalAttention
        return [Neighbors.of(e, size, self_loops=loops) for e in edges]

    def test_days_do_not_mix(self, kind):
        layer, edges = self.make(kind), two_days()
        h = torch.randn(2, 7, 4)
        out = layer(h, self.near(kind, edges, 14))
        changed = h.clone()
        changed[1] = 0
        again = layer(changed, self.near(kind, edges, 14))
        torch.testing.assert_close(out[0], again[0])

    def test_output_follows_the_order_of_stocks(self, kind):
        layer, edges = self.make(kind), two_days()
        h = torch.randn(2, 7, 4)
        order = torch.randperm(7)
        place = torch.argsort(order)
        moved = [torch.where(e < 7, place[e % 7], 7 + place[e % 7]) for e in edges]
        out = layer(h, self.near(kind, edges, 14))
        again = layer(h[:, order], self.near(kind, moved, 14))
        torch.testing.assert_close(again, out[:, order])

    def test_weights_choose_the_relation_of_a_day(self, kind):
        layer, edges = self.make(kind), two_days()
        h = torch.randn(2, 7, 4)
        near = self.near(kind, edges, 14)
        first = layer(h, near, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        second = layer(h, near, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        mixed = layer(h, near, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))
        equal = layer(h, near)
        torch.testing.assert_close(equal, (first + second) / 2)

    def test_weights_get_a_gradient(self, kind):
        layer, edges = self.make(kind), two_days()
        weights = torch.full((2, 2), 0.5, requires_grad=True)
        out = layer(torch.randn(2, 7, 4), self.near(kind, edges, 14), weights)
        out.square().sum().backward()
        assert (weights.grad != 0).all()

    def test_one_stock_and_no_edges(self, kind):
        layer = self.make(kind)
        none = torch.empty(2, 0, dtype=torch.long)
        h = torch.randn(1, 1, 4, requires_grad=True)
        out = layer(h, self.near(kind, [none, none], 1))
        assert out.shape == (1, 1, 6)
        out.sum().backward()
        assert torch.isfinite(h.grad).all()

    def test_shapes_are_checked(self, kind):
        layer, edges = self.make(kind), two_days()
        near = self.near(kind, edges, 14)
        with pytest.raises(ValueError, match="2 relations, got 1"):
            layer(torch.randn(2, 7, 4), near[:1])
        with pytest.raises(ValueError, match="14 nodes"):
            layer(torch.randn(3, 7, 4), near)
        with pytest.raises(ValueError, match="`weights`"):
            layer(torch.randn(2, 7, 4), near, torch.ones(2, 3))
        with pytest.raises(ValueError, match="`relations`"):
            kind(4, 6, 0)


def test_conv_equals_a_naive_mean():
    torch.manual_seed(0)
    layer, edges = RelationalConv(4, 6, 2), two_days()
    h = torch.randn(2, 7, 4)
    got = layer(h, [Neighbors.of(e, 14, self_loops=False) for e in edges])
    x = h.view(14, 4)
    want = layer.root(x)
    for e, conv in zip(edges, layer.conv.convs.values(), strict=True):
        for i in range(14):
            near = e[0][e[1] == i]
            if len(near):
                want[i] = want[i] + 0.5 * conv.lin_l(x[near].mean(0))
    torch.testing.assert_close(got.view(14, 6), want)
