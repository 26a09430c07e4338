"""The turning alpha: its strength by hand, and markets without it as they were."""

import numpy as np
import pytest

from qlib_ext.market.links import Switches
from qlib_ext.market.simulate import ALPHAS, HORIZON
from qlib_ext.market.turning import gains, strength


def test_strength_turns_and_comes_back():
    course = strength(401, 400)
    assert course[[0, 200, 400]] == pytest.approx([1, -1, 1])
    assert course[[100, 300]] == pytest.approx([0, 0], abs=1e-9)
    assert (strength(5, 0) == 1).all()


def test_gain_is_the_sum_of_the_days_ahead():
    alpha = ALPHAS[0]
    got = gains(alpha.kappa, alpha.phi, 30, 100, HORIZON)
    course = strength(60, 100)
    wanted = sum(alpha.kappa * alpha.phi**j * course[7 + 1 + j] for j in range(1, 11))
    assert got.shape == (30,) and got[7] == pytest.approx(wanted)
    still = gains(alpha.kappa, alpha.phi, 30, 0, HORIZON)
    assert still == pytest.approx(np.full(30, alpha.gain))


def test_settings_of_a_market_without_it_are_as_they_were():
    assert "turning" not in Switches().as_dict()
    assert Switches(turning=500).as_dict()["turning"] == 500
    with pytest.raises(ValueError, match="`turning` must be a whole number"):
        Switches(turning=-1)
