"""The selective scan against a plain loop, closed forms, and in extremes."""

import importlib
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from qlib_ext.nn import selective_scan as module
from qlib_ext.nn.selective_scan import _sequential_scan, selective_scan

FORMS = ["zoh", "euler"]
NAMES = ("x", "delta", "A", "B", "C", "D", "state")


def make(length=13, n=5, d=6, s=4, seed=0, dtype=torch.float64, low=1e-3, high=0.5):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    span = torch.rand(length, n, d, generator=g, dtype=torch.float64)
    delta = low * (high / low) ** span
    A = -torch.exp(normal(d, s))
    values = (
        normal(length, n, d),
        delta,
        A,
        normal(length, n, s),
        normal(length, n, s),
        normal(d),
        normal(n, d, s),
    )
    return [v.to(dtype) for v in values]


def gradients(function, given, form):
    given = [v.clone().requires_grad_() for v in given]
    y, state = function(*given, discretisation=form)
    g = torch.Generator().manual_seed(99)
    weights = [
        torch.randn(v.shape, generator=g, dtype=torch.float64).to(v) for v in (y, state)
    ]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return y.detach(), state.detach(), torch.autograd.grad(loss, given)


def far(a, b):
    """Largest difference, as a share of the largest value."""
    return float((a.double() - b).abs().max() / b.abs().max())


class TestReferenceValues:
    def test_scan_of_one_step_is_the_zero_order_hold_worked_by_hand(self):
        # h = A^-1 (exp(delta A) - 1) B x = (1 - e^-1) / 2 * 3 * 5, y = 7 h
        one = torch.ones(1, 1, 1)
        y, state = selective_scan(
            5 * one, 0.5 * one, torch.tensor([[-2.0]]), 3 * one, 7 * one
        )
        h = (1 - math.exp(-1)) / 2 * 15
        assert float(state) == pytest.approx(h, rel=1e-6)
        assert float(y) == pytest.approx(7 * h, rel=1e-6)

    def test_euler_of_two_steps_is_worked_by_hand(self):
        x = torch.tensor([1.0, 2.0]).view(2, 1, 1)
        delta = torch.tensor([0.5, 1.0]).view(2, 1, 1)
        one = torch.ones(2, 1, 1)
        y, _ = selective_scan(
            x, delta, torch.tensor([[-1.0]]), one, one, discretisation="euler"
        )
        torch.testing.assert_close(
            y.flatten(), torch.tensor([0.5, math.exp(-1) * 0.5 + 2.0])
        )

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("length", [1, 9, 13])
    def test_scan_matches_the_plain_loop_in_float64(self, form, length):
        given = make(length)
        ours = gradients(selective_scan, given, form)
        loop = gradients(_sequential_scan, given, form)
        assert far(ours[0], loop[0]) < 1e-12
        assert far(ours[1], loop[1]) < 1e-12
        for name, a, b in zip(NAMES, ours[2], loop[2], strict=True):
            assert far(a, b) < 1e-11, name

    @pytest.mark.parametrize("form", FORMS)
    def test_float32_keeps_values_and_gradients_to_a_millionth(self, form):
        given = make(60, 20, 16, 8, low=1e-4, high=0.1)
        single = [v.float() for v in given]
        loop = gradients(_sequential_scan, [v.double() for v in single], form)
        ours = gradients(selective_scan, single, form)
        assert far(ours[0], loop[0]) < 1e-6
        for name, a, b in zip(NAMES, ours[2], loop[2], strict=True):
            assert far(a, b) < 1e-6, name

    @pytest.mark.parametrize("form", FORMS)
    def test_gradcheck_passes(self, form):
        given = [v.requires_grad_() for v in make(5, 2, 3, 2)]
        assert torch.autograd.gradcheck(
            lambda *v: selective_scan(*v, discretisation=form), given
        )


class TestProperties:
    @pytest.mark.parametrize("form", FORMS)
    def test_carried_state_equals_one_pass(self, form):
        *given, D, state = make(12)
        x, delta, A, B, C = given
        whole, last = selective_scan(*given, D, state, form)
        parts = []
        for a, b in pairwise((0, 1, 5, 12)):
            y, state = selective_scan(
                x[a:b], delta[a:b], A, B[a:b], C[a:b], D, state, form
            )
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts), whole)
        torch.testing.assert_close(state, last)

    def test_gradient_through_a_carried_state_equals_one_pass(self):
        given = [v.requires_grad_() for v in make(8)]
        x, delta, A, B, C, D, state = given
        y, last = selective_scan(*given)
        whole = torch.autograd.grad(y.square().sum() + last.sum(), given)
        y1, middle = selective_scan(x[:3], delta[:3], A, B[:3], C[:3], D, state)
        y2, last = selective_scan(x[3:], delta[3:], A, B[3:], C[3:], D, middle)
        loss = y1.square().sum() + y2.square().sum() + last.sum()
        for a, b in zip(torch.autograd.grad(loss, given), whole, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("path", ["compiled", "torch"])
    def test_float32_is_good_to_a_millionth(self, monkeypatch, form, path):
        if path == "torch":
            monkeypatch.setattr(module, "compiled", lambda x: False)
        given = make(20, 37, 150, 5, dtype=torch.float32)  # 150 channels: 64, 64, 22
        y, last, grads = gradients(selective_scan, given, form)
        exact = gradients(_sequential_scan, [v.double() for v in given], form)
        assert far(y, exact[0]) < 1e-6 and far(last, exact[1]) < 1e-6
        for name, got, want in zip(NAMES, grads, exact[2], strict=True):
            assert far(got, want) < 1e-6, name

    @pytest.mark.parametrize("form", FORMS)
    def test_threads_do_not_change_anything(self, form):
        given = make(7, 40, 6, 3, dtype=torch.float32)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(gradients(selective_scan, given, form))
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(*found, rtol=0, atol=0)

    def test_nan_reaches_later_steps_of_its_stock_only(self):
        given = make(6, 3, dtype=torch.float32)
        given[1][2, 1, 0] = torch.nan
        y, last = selective_scan(*given)
        bad = torch.zeros_like(y, dtype=torch.bool)
        bad[2:, 1, 0] = True
        assert torch.equal(torch.isnan(y), bad)
        assert torch.isnan(last[1, 0]).all() and torch.isfinite(last[[0, 2]]).all()

    def test_future_input_changes_no_earlier_output(self):
        given = make(10)
        y, _ = selective_scan(*given)
        given[0][6:] += 100.0
        changed, _ = selective_scan(*given)
        assert torch.equal(changed[:6], y[:6])
        assert not torch.equal(changed[6:], y[6:])

    @pytest.mark.parametrize("compiled", [True, False], ids=["cpu", "any device"])
    @pytest.mark.parametrize("form", FORMS)
    def test_extreme_steps_and_rates_stay_finite(self, form, compiled, monkeypatch):
        if not compiled:
            monkeypatch.setattr(module, "compiled", lambda x: False)
        x, _, _, B, C, D, state = make(20, 8, 6, 5, dtype=torch.float32)
        delta = torch.logspace(-30, 6, 20 * 8 * 6).view(20, 8, 6)
        A = -torch.logspace(-30, 30, 6 * 5).view(6, 5)
        if form == "euler":  # its input term is delta B itself and grows with delta
            delta = delta.clamp(max=10.0)
        given = [x, delta, A, B, C, D, state]
        y, last, grads = gradients(selective_scan, given, form)
        assert torch.isfinite(y).all() and torch.isfinite(last).all()
        exact = _sequential_scan(*(v.double() for v in given), discretisation=form)[0]
        assert far(y, exact) < 1e-5
        for name, g in zip(NAMES, grads, strict=True):
            if name == "A":  # what reaches A_log
                g = g * A
            assert torch.isfinite(g).all(), name

    def test_zero_step_keeps_the_state_and_huge_step_forgets_it(self):
        x, delta, A, B, C, _, state = make(3, dtype=torch.float32)
        _, kept = selective_scan(x, delta * 0, A, B, C, None, state)
        torch.testing.assert_close(kept, state, rtol=1e-6, atol=1e-6)
        _, gone = selective_scan(x, delta * 0 + 1e8, A, B, C, None, state)
        _, other = selective_scan(x, delta * 0 + 1e8, A, B, C, None, state + 5.0)
        torch.testing.assert_close(gone, other, rtol=1e-5, atol=1e-5)

    def test_zero_rate_integrates_the_input(self):
        x, delta, A, B, C, _, _ = make(4)
        _, state = selective_scan(x, delta, A * 0, B, C)
        exact = torch.einsum("lnd,lnd,lns->nds", x, delta, B)
        torch.testing.assert_close(state, exact)

    def test_autocast_keeps_float32(self):
        given = make(4, dtype=torch.float32)
        plain = gradients(selective_scan, given, "zoh")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = gradients(selective_scan, given, "zoh")
        torch.testing.assert_close(cast, plain)

    def test_inference_keeps_no_states(self):
        given = make(4)
        y, _ = selective_scan(*given)
        assert y.grad_fn is None

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_cuda_equals_the_cpu(self, form, dtype):
        given = make(60, 20, 150, 16, dtype=dtype)  # in float32, Triton's kernels
        here = gradients(selective_scan, given, form)
        there = gradients(selective_scan, [v.cuda() for v in given], form)
        for a, b in zip([*there[:2], *there[2]], [*here[:2], *here[2]], strict=True):
            assert far(a.cpu(), b.double()) < (
                1e-5 if dtype == torch.float32 else 1e-10
            )


def trials():
    """Errors of Triton's kernels by case; for a process with TRITON_INTERPRET=1."""
    from qlib_ext.nn.scan_triton import TritonScan

    module._scan_of = lambda x: TritonScan
    shapes = {
        "one": (1, 1, 1, 1),
        "channels of two programs": (13, 3, 70, 5),
        "powers of two": (9, 2, 64, 16),
    }
    given = {name: make(*shape, dtype=torch.float32) for name, shape in shapes.items()}
    given["near zero"] = make(8, 3, 6, 4, dtype=torch.float32, low=1e-7, high=50.0)
    given["near zero"][2][0, 0] = -1e-30
    found = {}
    for form in FORMS:
        for name, values in given.items():
            y, last, grads = gradients(selective_scan, values, form)
            exact = gradients(_sequential_scan, [v.double() for v in values], form)
            off = {"y": far(y, exact[0]), "last": far(last, exact[1])}
            pairs = zip(NAMES, grads, exact[2], strict=True)
            off |= {key: far(*pair) for key, *pair in pairs}
            if name == "near zero":
                del off["A"]  # grows as 1 / A: see `selective_scan`
            with torch.no_grad():
                y, last = selective_scan(*values, discretisation=form)
            off |= {"y alone": far(y, exact[0]), "last alone": far(last, exact[1])}
            found[f"{name}, {form}"] = off
        values = make(8, 3, 6, 4, dtype=torch.float32)
        values[0][3, 1, 2] = torch.nan
        y, _ = selective_scan(*values, discretisation=form)
        found[f"lost, {form}"] = y.isnan().nonzero().tolist()
    print(json.dumps(found))


class TestTriton:
    """The kernels for a GPU, without one: interpreted, compiled, and chosen."""

    CPU = torch.device("cpu")
    KERNELS = "qlib_ext.nn.scan_triton"
    REASON = "Triton is not installed: it comes with PyTorch's CUDA builds"

    def test_values_and_gradients_are_those_of_the_plain_loop(self):
        if importlib.util.find_spec("triton") is None:
            pytest.skip(self.REASON)
        # Triton decides when it is first imported: another process.
        code = (
            "import importlib.util as u\n"
            f"spec = u.spec_from_file_location('cases', {__file__!r})\n"
            "cases = u.module_from_spec(spec)\n"
            "spec.loader.exec_module(cases)\n"
            "cases.trials()"
        )
        path = os.pathsep.join(sys.path)
        env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found) == 10
        for name, off in found.items():
            if name.startswith("lost"):
                assert off == [[t, 1, 2] for t in range(3, 8)]
            else:
                assert max(off.values()) < 2e-6, (name, off)

    @pytest.mark.parametrize(("capability", "states"), [(80, 16), (90, 16), (90, 1)])
    @pytest.mark.parametrize("zoh", [True, False])
    @pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
    def test_kernels_compile_for_gpus(self, capability, states, zoh, name):
        triton = pytest.importorskip("triton", reason=self.REASON)
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.KERNELS), name)
        constants = {"zoh": zoh, "S": states, "CHANNELS": 64}
        if name == "forward_kernel":
            constants["keep"] = True
        numbers = ("length", "n", "d", "s", "stretch", "stretches")
        signature = {
            arg: "constexpr"
            if arg in constants
            else "i32"
            if arg in numbers
            else "*fp32"
            for arg in kernel.arg_names
        }
        made = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
        )
        assert len(made.asm["cubin"]) > 0

    @pytest.fixture
    def chosen(self, monkeypatch):
        """Choose for kernels of a class."""

        def choose(kernels):
            there = SimpleNamespace(TritonScan=kernels) if kernels else None
            monkeypatch.setitem(sys.modules, self.KERNELS, there)
            module.triton_scan.cache_clear()
            return module.triton_scan(self.CPU)

        yield choose
        module.triton_scan.cache_clear()

    def test_kernels_that_agree_are_taken(self, chosen):
        class Same(module._SelectiveScan):
            pass

        assert chosen(Same) is Same

    def test_without_triton_steps_are_taken(self, chosen):
        assert chosen(None) is None

    @pytest.mark.parametrize("factor", [1.001, math.nan])
    def test_kernels_that_do_not_agree_are_left_with_a_word(
        self, chosen, caplog, factor
    ):
        class Wrong(module._SelectiveScan):
            @staticmethod
            def backward(ctx, *given):
                dx, *rest = module._SelectiveScan.backward(ctx, *given)
                return dx * factor, *rest

        with caplog.at_level(logging.WARNING):
            assert chosen(Wrong) is None
        assert "values differ by a share of" in caplog.text

    def test_kernels_that_do_not_compile_are_left_with_a_word(self, chosen, caplog):
        class Broken(module._SelectiveScan):
            @staticmethod
            def forward(ctx, *given):
                raise RuntimeError("Failed to find C compiler")

        with caplog.at_level(logging.WARNING):
            assert chosen(Broken) is None
        assert "Failed to find C compiler" in caplog.text


class TestBadInput:
    @pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "state"])
    def test_wrong_shape_names_the_argument(self, name):
        given = dict(zip(NAMES, make(), strict=True))
        given[name] = given[name][:-1]
        with pytest.raises(ValueError, match=f"`{name}`"):
            selective_scan(**given)

    def test_unknown_discretisation_is_refused(self):
        with pytest.raises(ValueError, match="`discretisation`"):
            selective_scan(*make(), discretisation="bilinear")
