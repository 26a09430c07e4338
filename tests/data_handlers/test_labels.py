import numpy as np
import pandas as pd
import pytest
from qlib.data import D
from qlib.data.data import ExpressionD

from data_handlers.labels import forward_return, label_config, label_reach


def test_forward_return_reaches_as_far_as_label_reach_says(qlib_market):
    for horizon in (1, 5, 10, 3):
        expression = ExpressionD.get_expression_instance(forward_return(horizon))
        assert expression.get_extended_window_size()[1] == label_reach(horizon)


def test_label_config_names_every_horizon():
    assert label_config([10, 5], "open") == (
        [
            "LastTraded($open, -11) / Ref(Traded($open), -1) - 1",
            "LastTraded($open, -6) / Ref(Traded($open), -1) - 1",
        ],
        ["RET10_open", "RET5_open"],
    )


def test_each_horizon_may_have_its_price():
    assert label_config([1, 5], ["open", "close"])[1] == ["RET1_open", "RET5"]
    expressions, names = label_config(1, ["open", "close"])
    assert names == ["RET1_open", "RET1"]
    assert expressions[0] == "LastTraded($open, -2) / Ref(Traded($open), -1) - 1"


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("price", ["close", "open", "vwap"])
def test_label_equals_a_pandas_computation(qlib_market, price, carry):
    names = D.list_instruments(D.instruments("all"), as_list=True)[:5]
    fields = [f"${price}", forward_return(5, price, carry)]
    frame = D.features(names, fields)
    frame.columns = ["price", "label"]
    wide = frame["price"].unstack("datetime").astype(np.float64)
    wide = wide.reindex(columns=pd.DatetimeIndex(D.calendar()))
    end = wide.ffill(axis=1) if carry else wide
    expected = end.shift(-6, axis=1) / wide.shift(-1, axis=1) - 1
    label = frame["label"].unstack("datetime").reindex(columns=expected.columns)
    outside = frame["price"].unstack("datetime").reindex(columns=expected.columns)
    np.testing.assert_allclose(label, expected.where(label.notna()), atol=1e-6)
    assert (label.isna() == expected.isna()).to_numpy()[outside.notna()].all()
    assert label.notna().to_numpy().mean() > 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizon": 0}, "`horizon` must be a whole number of at least 1"),
        ({"horizon": 2.5}, "`horizon` must be a whole number of at least 1"),
        ({"horizon": True}, "`horizon` must be a whole number of at least 1"),
        ({"horizon": []}, "`horizon` is an empty list"),
        ({"horizon": [5, 5]}, "`horizon` names a period twice"),
        ({"price": ["open", "open"]}, "`horizon` names a period twice"),
        ({"horizon": [1, 5], "price": ["open"] * 3}, "`price` must be one price, or"),
        ({"price": []}, "`price` must be one price, or"),
        (
            {"price": "high"},
            "`price` must be one of 'close', 'open', 'vwap', got 'high'",
        ),
    ],
)
def test_label_config_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        label_config(**kwargs)
