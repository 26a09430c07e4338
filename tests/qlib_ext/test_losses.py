import math

import numpy as np
import torch

from qlib_ext.losses import day_mse, long_mse, orthogonality
from qlib_ext.nn.cross_section import standardize


def test_day_mse_of_hand_worked_numbers():
    score = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    label = torch.tensor([[0.0, math.nan, 1.0], [math.nan, math.nan, 2.0]])
    mask = torch.tensor([[True, True, True], [True, True, True]])
    loss, counted = day_mse(score, label, mask)
    assert loss.tolist() == [(1 + 4) / 2, 4.0]
    assert counted.tolist() == [True, False]


def test_day_mse_gradient_is_finite_beside_nan_labels():
    score = torch.zeros(1, 3, requires_grad=True)
    label = torch.tensor([[math.nan, 1.0, -1.0]])
    day_mse(score, label, torch.ones(1, 3, dtype=torch.bool))[0].sum().backward()
    assert score.grad.tolist() == [[0.0, -1.0, 1.0]]


def test_long_side_counts_the_best_fifth_of_the_labels_more():
    label = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, math.nan]])
    score, mask = torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool)
    # The 80 % quantile of 1..5 is 4.2, so that 5 alone is above it.
    loss, _ = long_mse(score, label, mask, 3.0)
    assert loss.item() == (1 + 4 + 9 + 16 + 3 * 25) / (4 + 3)
    plain = day_mse(score, label, mask)[0]
    assert long_mse(score, label, mask, 1.0)[0].equal(plain)


def test_orthogonality_equals_the_formula_in_numpy():
    torch.manual_seed(0)
    n, k = 30, 4
    z = standardize(torch.randn(2, n, k), torch.ones(2, n, dtype=torch.bool))
    got = orthogonality(z, torch.ones(2, n, dtype=torch.bool))
    for day in range(2):
        gram = z[day].numpy().T @ z[day].numpy()
        expected = np.sqrt((gram**2).sum()) / (n * k**2)
        np.testing.assert_allclose(got[day], expected, rtol=1e-5)


def test_orthogonality_is_largest_for_equal_units_and_smallest_for_orthogonal():
    n, k = 64, 4
    mask = torch.ones(1, n, dtype=torch.bool)
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(n, k) - 0.0)
    orthogonal = (basis * n**0.5).unsqueeze(0)
    equal = orthogonal[..., :1].expand(1, n, k)
    torch.testing.assert_close(orthogonality(orthogonal, mask), torch.tensor([k**-1.5]))
    torch.testing.assert_close(orthogonality(equal, mask), torch.tensor([1 / k]))


def test_orthogonality_has_a_gradient_that_lowers_correlation():
    torch.manual_seed(0)
    common = torch.randn(1, 50, 1)
    raw = (common + 0.3 * torch.randn(1, 50, 3)).requires_grad_()
    mask = torch.ones(1, 50, dtype=torch.bool)
    before = orthogonality(standardize(raw, mask), mask)
    optimiser = torch.optim.Adam([raw], lr=0.05)
    for _ in range(50):
        optimiser.zero_grad()
        orthogonality(standardize(raw, mask), mask).backward()
        optimiser.step()
    # 1/3 if all three are equal, 3^-1.5 = 0.192 if they are uncorrelated.
    assert before > 0.3
    assert orthogonality(standardize(raw, mask), mask) < 0.2
