"""The worked examples of docs/extend run as they stand there."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

EXTEND = Path(__file__).resolve().parents[2] / "docs" / "extend"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def example(request):
    """Run the Python blocks of a page as one module and return it."""
    made = []

    def run(page):
        module = types.ModuleType(f"docs_{page}")
        sys.modules[module.__name__] = module  # dataclasses and pickle look there
        made.append(module.__name__)
        text = (EXTEND / f"{page}.md").read_text(encoding="utf-8")
        code = "\n\n".join(BLOCK.findall(text))
        exec(compile(code, f"{page}.md", "exec"), module.__dict__)
        return module

    yield run
    for name in made:
        del sys.modules[name]


def test_a_model_of_one_page_trains_and_finds_the_planted_signal(example, toy_dataset):
    model = example("model").MeanModel(
        n_epochs=40, early_stop=40, lr=0.05, step_len=10, chunk=5, GPU=-1
    )
    dataset = toy_dataset(n_days=160, n_stocks=60)
    model.fit(dataset)
    score = model.predict(dataset)
    label = dataset.handler.fetch(col_set="label").iloc[:, 0].reindex(score.index)
    daily = score.groupby("datetime").corr(label, method="spearman")
    assert daily.mean() > 0.3


def test_a_feature_of_one_function_fills_its_own_place(example):
    features = example("feature").features

    class Day:
        first_r, last_r = 0.03, 0.01

    (definition,) = features.definitions
    assert definition.name == "ms_open_close"
    assert features._functions[0].py_func(Day) == pytest.approx(0.02)
    assert np.isneginf(definition.low) and np.isposinf(definition.high)


def test_a_vendor_of_one_file_gives_prices_and_volumes_in_our_units(example, tmp_path):
    text = (EXTEND / "vendor.md").read_text(encoding="utf-8")
    (mapping,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.yaml").write_text(mapping, encoding="utf-8")
    (tmp_path / "daily").mkdir()
    # A tenth is paid on the third day: the price falls, the factor makes it good.
    lines = ["code,day,o,h,l,c,lots,turnover_k,adj"]
    days = pd.bdate_range("2020-01-06", periods=4).strftime("%Y%m%d")
    for code in ("600519", "000001"):
        for day, price, factor in zip(
            days, (11.0, 11.0, 10.0, 10.0), (1.0, 1.0, 1.1, 1.1), strict=True
        ):
            row = f"{price},{price},{price},{price},300,{price * 30:.1f},{factor}"
            lines.append(f"{code},{day},{row}")
    (tmp_path / "daily" / "2020.csv").write_text("\n".join(lines), encoding="utf-8")

    bars = example("vendor").bars_of(tmp_path, ["SH600519", "SZ000001"])

    assert len(bars) == 8  # both codes found their exchange
    one = bars[bars["instrument"] == "SH600519"]
    np.testing.assert_allclose(one["close"], 11.0, rtol=1e-6)
    as_traded = one["close"] / one["factor"]
    np.testing.assert_allclose(as_traded, [11, 11, 10, 10], rtol=1e-6)
    np.testing.assert_allclose(one["volume"] * one["factor"], 30_000, rtol=1e-6)
    np.testing.assert_allclose(one["amount"], [330e3, 330e3, 300e3, 300e3], rtol=1e-6)


def test_a_limit_of_one_class_binds(example):
    from qlib_ext.portfolio import Limits, Optimiser, Problem

    limit, n = example("limit").WatchList, 4
    problem = Problem(
        names=[*"ABCD"],
        alpha=np.array([4.0, 3.0, 2.0, 1.0]),
        benchmark=np.full(n, 0.25),
        current=np.zeros(n),
        exposures=np.ones((n, 1)),
        factors=["country"],
        covariance=np.eye(1) * 0.04,
        specific=np.full(n, 0.3),
        can_buy=np.ones(n, bool),
        can_sell=np.ones(n, bool),
    )
    # The best two share a quarter (all in A), C takes the rest.
    limits = Limits(None, None, None, None, None, more=[limit(0.25, ["A", "B"])])
    hand = {"A": 0.25, "B": 0, "C": 0.75, "D": 0}
    found = Optimiser(limits).solve(problem)
    assert found.weights.to_dict() == pytest.approx(hand, abs=1e-6)
