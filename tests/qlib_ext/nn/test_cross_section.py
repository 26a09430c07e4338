import torch

from qlib_ext.nn.cross_section import masked_mean, standardize


def test_masked_mean_of_hand_worked_numbers():
    x = torch.tensor([[[1.0], [3.0], [100.0]]])
    mask = torch.tensor([[True, True, False]])
    assert masked_mean(x, mask).item() == 2.0
    assert masked_mean(x, torch.zeros(1, 3, dtype=torch.bool)).item() == 0.0


def test_standardize_equals_batch_norm_where_all_are_present():
    torch.manual_seed(0)
    x = torch.randn(1, 40, 5) * 3 + 7
    expected = torch.nn.BatchNorm1d(5, affine=False)(x[0])
    got = standardize(x, torch.ones(1, 40, dtype=torch.bool))[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_standardize_ignores_absent_stocks_and_other_days():
    torch.manual_seed(0)
    x = torch.randn(3, 20, 4)
    mask = torch.rand(3, 20) > 0.3
    changed = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, 1e6))
    torch.testing.assert_close(standardize(x, mask), standardize(changed, mask))
    alone = standardize(x[1:2], mask[1:2])
    torch.testing.assert_close(standardize(x, mask)[1:2], alone)
    assert (standardize(x, mask)[~mask] == 0).all()


def test_standardize_gradient_matches_finite_differences_with_nan_in_absent_rows():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 2, dtype=torch.double, requires_grad=True)
    mask = torch.tensor([[True] * 5 + [False], [True] * 6])
    assert torch.autograd.gradcheck(lambda v: standardize(v, mask), x)


def test_standardize_gives_zero_for_a_one_stock_day():
    x = torch.tensor([[[5.0], [9.0]]])
    mask = torch.tensor([[True, False]])
    assert standardize(x, mask).abs().max() == 0
