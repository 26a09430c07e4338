"""ScoreAverage: standardised averages of recorders and models, missing sources."""

import pickle

import numpy as np
import pandas as pd
import pytest
from qlib.workflow import R

from qlib_ext.models import ScoreAverage
from qlib_ext.models.score_average import NoScore


class _Segments:
    segments = {"test": ("2020-01-01", "2020-01-03")}  # noqa: RUF012


def _score(values):
    """{day: {stock: score}} as a Series."""
    rows = {
        (pd.Timestamp(d), s): x for d, day in values.items() for s, x in day.items()
    }
    index = pd.MultiIndex.from_tuples(rows, names=["datetime", "instrument"])
    return pd.Series(list(rows.values()), index=index, name="score")


def _average(monkeypatch, parts, **kwargs):
    import qlib_ext.models.score_average as module

    monkeypatch.setattr(module, "_recorded", lambda name, source: parts[name])
    sources = {k: {"experiment": "e", "recorder": k} for k in parts}
    for name, weight in kwargs.pop("weights", {}).items():
        sources[name]["weight"] = weight
    return ScoreAverage(sources, **kwargs).predict(_Segments())


A = _score({"2020-01-01": {"x": 1, "y": 2, "z": 3}, "2020-01-02": {"x": 5, "y": 5}})
B = _score({"2020-01-01": {"x": 30, "y": 10}, "2020-01-02": {"x": 0, "y": 8}})
S = np.sqrt(1.5)  # 1, 2, 3 standardised: −S, 0, S


def test_score_average_hand_worked(monkeypatch):
    got = _average(monkeypatch, {"a": A, "b": B})
    want = {
        ("2020-01-01", "x"): (-S + 1) / 2,
        ("2020-01-01", "y"): (0 - 1) / 2,
        ("2020-01-01", "z"): S / 2,  # b counts as the day's mean
        ("2020-01-02", "x"): (0 - 1) / 2,  # a is flat that day
        ("2020-01-02", "y"): (0 + 1) / 2,
    }
    assert got.name == "score" and len(got) == 5
    for (day, stock), value in want.items():
        assert got[(pd.Timestamp(day), stock)] == pytest.approx(value)


def test_score_average_rules_for_missing_sources(monkeypatch):
    z = (pd.Timestamp("2020-01-01"), "z")
    assert _average(monkeypatch, {"a": A, "b": B}, missing="mean")[z] == pytest.approx(
        S
    )
    for kwargs in ({"missing": "drop"}, {"min_sources": 2}):
        got = _average(monkeypatch, {"a": A, "b": B}, **kwargs)
        assert z not in got.index and len(got) == 4
    weighted = _average(monkeypatch, {"a": A, "b": B}, weights={"a": 3})
    assert weighted[z] == pytest.approx(0.75 * S)


def test_score_average_leaves_a_silent_source_out_that_day(monkeypatch):
    late = B.loc["2020-01-02":]
    got = _average(monkeypatch, {"a": A, "b": late})
    assert got[(pd.Timestamp("2020-01-01"), "z")] == pytest.approx(S)
    with pytest.raises(ValueError, match="'b' has no score between"):
        _average(monkeypatch, {"a": A, "b": B[:0]})


def test_score_average_takes_the_segments_days_only(monkeypatch):
    longer = pd.concat([A, _score({"2020-02-03": {"x": 1, "y": 2}})])
    got = _average(monkeypatch, {"a": longer})
    assert got.index.get_level_values(0).max() == pd.Timestamp("2020-01-02")


def test_score_average_reads_recorders(qlib_market, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = {}
    for name, score in {"a": A, "b": B}.items():
        with R.start(experiment_name=f"average_{name}"):
            R.save_objects(**{"pred.pkl": score.to_frame("score")})
            ids[name] = R.get_recorder().id
    with R.start(experiment_name="average_b"):
        pass  # a newer run without a prediction
    with pytest.raises(KeyError), R.start(experiment_name="average_b"):
        R.save_objects(**{"pred.pkl": 2 * A.to_frame("score")})
        raise KeyError("a newer run that failed")
    sources = {
        "a": {"experiment": "average_a", "recorder": ids["a"]},
        "b": {"experiment": "average_b", "recorder": "latest"},
    }
    model = ScoreAverage(sources)
    model.fit(_Segments())
    got = model.predict(_Segments())
    pd.testing.assert_series_equal(got, _average(monkeypatch, {"a": A, "b": B}))
    monkeypatch.undo()
    sources["a"]["file"] = "other.pkl"
    with pytest.raises(ValueError, match=r"`sources\.a`: .* with other\.pkl"):
        ScoreAverage(sources).predict(_Segments())
    sources["a"] = {"experiment": "average_none", "recorder": "latest"}
    with pytest.raises(NoScore, match=r"`sources\.a`: .*'average_none' is not in"):
        ScoreAverage(sources).predict(_Segments())


def test_score_average_trains_models_and_beats_each(toy_dataset):
    def source(seed):
        return {
            "model": {
                "class": "MultiFactorRNN",
                "module_path": "qlib_ext.models",
                "kwargs": {
                    **{"hidden_size": 8, "num_layers": 1, "step_len": 5, "chunk": 8},
                    **{"n_factors": 1, "n_epochs": 4, "GPU": -1, "seed": seed},
                },
            }
        }

    data = toy_dataset()
    model = ScoreAverage({"one": source(0), "two": source(1)})
    with pytest.raises(ValueError, match="not trained"):
        model.predict(data)
    history = {}
    model.fit(data, evals_result=history)
    assert set(history) == {"one", "two"}
    score = model.predict(data)
    units = model.predict_units(data)
    assert score.index.equals(data.prepare("test", col_set="feature").index)
    pd.testing.assert_series_equal(score, units.mean(axis=1).rename("score"))
    day = units.groupby(level=0)
    assert abs(day.mean()).to_numpy().max() < 1e-6
    again = pickle.loads(pickle.dumps(model)).predict(data)
    pd.testing.assert_series_equal(score, again)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"sources": {}}, "`sources` must map"),
        ({"sources": {"a": {"path": "x"}}}, "either `experiment`"),
        ({"sources": {"a": {"experiment": "e"}}}, "lacks `recorder`"),
        ({"sources": {"a": {"model": {}, "recorder": 1}}}, "unknown key 'recorder'"),
        (
            {"sources": {"a": {"experiment": "e", "recorder": "r", "weight": -1}}},
            r"`sources\.a\.weight`",
        ),
        (
            {"sources": {"a": {"experiment": "e", "recorder": "r", "weight": "1e-1"}}},
            r"`sources\.a\.weight` .*YAML reads",
        ),
        (
            {"sources": {"a": {"experiment": "e", "recorder": "r"}}, "missing": "x"},
            "`missing` must be",
        ),
        (
            {"sources": {"a": {"experiment": "e", "recorder": "r"}}, "min_sources": 2},
            "`min_sources` must be a whole number from 1 to 1, got 2",
        ),
        (
            {
                "sources": {"a": {"experiment": "e", "recorder": "r"}},
                "min_sources": "1",
            },
            "`min_sources`",
        ),
    ],
)
def test_score_average_bad_arguments_are_named(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ScoreAverage(**kwargs)
