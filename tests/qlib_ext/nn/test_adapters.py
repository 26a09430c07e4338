"""The adapters against the paper's formulas, written out, and their gradients."""

import pytest
import torch

from qlib_ext.nn.adapters import FeatureAdapter, LabelAdapter, gates


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shuffled(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) + 1.5)
    return module.double()


def softmax_of_cosines(x, prototypes, tau):
    cosines = [x @ p / (x.norm() * p.norm()) for p in prototypes]
    return torch.softmax(torch.stack(cosines) / tau, 0)


class TestReferenceValues:
    def test_feature_adapter_is_the_papers_sum(self):
        adapter = shuffled(FeatureAdapter(4, 3, 10.0))
        x = torch.randn(5, 6, 4, dtype=torch.float64)
        got = adapter(x)
        for day in range(5):
            for stock in range(6):
                one = x[day, stock]
                s = softmax_of_cosines(one, adapter.prototypes, 10.0)
                wanted = one.clone()
                for i in range(3):
                    wanted = wanted + s[i] * (adapter.weight[i] @ one + adapter.bias[i])
                torch.testing.assert_close(got[day, stock], wanted)

    def test_label_adapter_gates_read_the_stocks_whole_window(self):
        adapter = shuffled(LabelAdapter(2, 3, 4, 5.0))
        x = torch.randn(5, 6, 2, dtype=torch.float64)  # 3 scored days of 3 each
        y = torch.randn(3, 6, dtype=torch.float64)
        weights = adapter.weights(x, 3)
        there, back = adapter(y, weights), adapter.inverse(y, weights)
        for day in range(3):
            for stock in range(6):
                window = adapter.linear.weight @ x[day : day + 3, stock].reshape(-1)
                s = softmax_of_cosines(window, adapter.prototypes, 5.0)
                one = y[day, stock]
                wanted = (s * (adapter.gamma * one + adapter.beta)).sum()
                torch.testing.assert_close(there[day, stock], wanted)
                wanted = (s * (one - adapter.beta) / adapter.gamma).sum()
                torch.testing.assert_close(back[day, stock], wanted)

    def test_days_before_the_data_count_as_zero(self):
        adapter = shuffled(LabelAdapter(2, 4, 4, 5.0))
        x = torch.randn(2, 6, 2, dtype=torch.float64)
        padded = torch.cat([torch.zeros(3, 6, 2, dtype=torch.float64), x])
        torch.testing.assert_close(adapter.weights(x, 2), adapter.weights(padded, 2))


class TestProperties:
    def test_both_begin_as_the_identity(self):
        x, y = torch.randn(7, 5, 3), torch.randn(3, 5)
        feature, label = FeatureAdapter(3, 8, 10.0), LabelAdapter(3, 5, 8, 10.0)
        weights = label.weights(x, 3)
        torch.testing.assert_close(feature(x), x)
        torch.testing.assert_close(label(y, weights), y)
        torch.testing.assert_close(label.inverse(y, weights), y)

    def test_one_head_goes_there_and_back(self):
        label = shuffled(LabelAdapter(3, 5, 1, 10.0))
        x, y = torch.randn(7, 5, 3).double(), torch.randn(3, 5).double()
        weights = label.weights(x, 3)
        torch.testing.assert_close(label.inverse(label(y, weights), weights), y)

    def test_gradients_agree_with_differences(self):
        feature = shuffled(FeatureAdapter(2, 3, 10.0))
        label = shuffled(LabelAdapter(2, 2, 3, 10.0))
        x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
        y = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(feature, x)
        assert torch.autograd.gradcheck(
            lambda x, y: label(y, label.weights(x, 2)), (x, y)
        )
        assert torch.autograd.gradcheck(
            lambda x, y: label.inverse(y, label.weights(x, 2)), (x, y)
        )

    def test_a_row_of_zeros_weighs_all_heads_alike(self):
        torch.testing.assert_close(
            gates(torch.zeros(2, 3), torch.randn(4, 3), 10.0), torch.full((2, 4), 0.25)
        )
