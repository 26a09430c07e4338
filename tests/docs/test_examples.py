"""The worked examples of docs/extend run as they stand there."""

import re
import sys
import types
from pathlib import Path

import numpy as np
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
