import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from qlib_ext import metrics
from qlib_ext.cli import main
from qlib_ext.report.compare import Run, compare, compare_page
from qlib_ext.report.reported import reported_for

DAYS = pd.bdate_range("2019-01-01", periods=120)
NAMES = [f"S{i:03d}" for i in range(60)]
INDEX = pd.MultiIndex.from_product([DAYS, NAMES], names=["datetime", "instrument"])


def _label(seed=0):
    rng = np.random.default_rng(seed)
    return pd.Series(0.05 * rng.standard_normal(len(INDEX)), INDEX)


def _run(experiment, noise, seed, label=None, **params):
    label = _label() if label is None else label
    rng = np.random.default_rng(100 + seed)
    score = _label() / 0.05 + noise * rng.standard_normal(len(INDEX))
    return Run(
        experiment=experiment,
        recorder=f"{experiment}{seed}".ljust(32, "0"),
        name="run",
        params={"model.class": "M", "model.kwargs.seed": str(seed), **params},
        logged={"Top hedged Sharpe": 1.0 + seed},
        score=score.astype("f4"),
        label=label,
    )


@pytest.fixture(scope="module")
def comparison():
    runs = [_run("good", 5.0, seed) for seed in range(3)]
    runs += [_run("poor", 20.0, seed) for seed in range(3, 5)]
    return compare(runs, horizon=5, n_layers=5)


class TestCompare:
    def test_seeds_of_a_model_are_one_row(self, comparison):
        models = comparison.models
        assert models["recorders"].to_dict() == {"good": 3, "poor": 2}
        runs = comparison.runs
        good = runs[runs["model"] == "good"]["rank_ic"]
        assert models.at["good", "rank_ic"] == pytest.approx(good.mean())
        assert models.at["good", "rank_ic_std"] == pytest.approx(good.std())
        assert models.at["good", "hedged_top_sharpe"] == pytest.approx(2.0)

    def test_recorder_figures_equal_the_metrics(self, comparison):
        run = _run("good", 5.0, 0)
        score, label = (
            torch.from_numpy(x.unstack().to_numpy()) for x in (run.score, run.label)
        )
        daily = metrics.rank_ic(score, label)
        expected = torch.stack([daily[k::5].mean() for k in range(5)]).mean()
        got = comparison.runs.at["good0000", "rank_ic"]
        assert got == pytest.approx(float(expected))

    def test_the_better_model_wins_the_paired_test(self, comparison):
        (row,) = comparison.paired.itertuples()
        assert row.Index == "good less poor"
        assert row.low > 0 and row.p < 0.01
        assert row.low < row.difference < row.high

    def test_equal_models_are_not_told_apart(self):
        result = compare(
            [_run("a", 10.0, 0), _run("b", 10.0, 1)], horizon=5, n_layers=5
        )
        (row,) = result.paired.itertuples()
        assert row.low < 0 < row.high and row.p > 0.05

    def test_curves_start_at_one_and_end_with_the_product(self, comparison):
        values = comparison.values
        assert (values.iloc[0] == 1).all()
        assert values.at[values.index[-1], "good"] > values.at[values.index[-1], "poor"]

    def test_score_correlation_is_square_with_ones(self, comparison):
        table = comparison.correlation
        np.testing.assert_allclose(np.diag(table), 1)
        # Independent noise around a small common part.
        assert abs(table.at["poor", "good"]) < 0.1

    def test_models_of_one_experiment_are_told_apart_by_their_parameters(self):
        runs = [
            _run("same", 5.0, 0, **{"model.kwargs.lr": "0.1"}),
            _run("same", 5.0, 1, **{"model.kwargs.lr": "0.2"}),
        ]
        names = list(compare(runs, horizon=5, n_layers=5).models.index)
        assert names == ["same: M 1", "same: M 2"]

    def test_another_label_is_said_and_kept_out_of_the_tests(self):
        runs = [_run("a", 5.0, 0), _run("b", 5.0, 1, label=_label(9))]
        result = compare(runs, horizon=5, n_layers=5)
        assert len(result.paired) == 0
        assert any("another label" in text for text in result.warnings)

    def test_missing_label_is_taken_from_the_others(self):
        bare = _run("b", 5.0, 1)
        bare.label = None
        result = compare([_run("a", 5.0, 0), bare], horizon=5, n_layers=5)
        assert any("no raw label" in text for text in result.warnings)
        assert len(result.paired) == 1

    def test_partial_overlap_is_said(self):
        late = _run("b", 5.0, 1)
        late.score = late.score[late.score.index.get_level_values(0) >= DAYS[60]]
        result = compare([_run("a", 5.0, 0), late], horizon=5, n_layers=5)
        assert any(text.startswith("a: 50%") for text in result.warnings)

    def test_no_overlap_and_no_label_are_errors(self):
        other = _run("b", 5.0, 1)
        other.score.index = other.score.index.set_levels(
            [f"X{i:03d}" for i in range(60)], level="instrument"
        )
        with pytest.raises(ValueError, match="no day and stock in common"):
            compare([_run("a", 5.0, 0), other], horizon=5)
        bare = _run("a", 5.0, 0)
        bare.label = None
        with pytest.raises(ValueError, match="no recorder has a raw label"):
            compare([bare], horizon=5)
        with pytest.raises(ValueError, match="`horizon` must be a whole number"):
            compare([_run("a", 5.0, 0)], horizon=0)


def test_bootstrap_interval_covers_a_known_mean():
    # Means of 200 independent draws have a standard error of 1 / sqrt(200).
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)).double() + 0.3
    draws = metrics.block_bootstrap(x, 5, 4000)
    assert float(draws.mean()) == pytest.approx(float(x.mean()), abs=0.01)
    assert float(draws.std()) == pytest.approx(1 / np.sqrt(200), rel=0.25)
    assert torch.equal(draws, metrics.block_bootstrap(x, 5, 4000))


def test_bootstrap_of_blocks_sees_autocorrelation():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)).double()
    smooth = x.unfold(0, 10, 1).sum(-1)
    alone = metrics.block_bootstrap(smooth, 1, 500).std()
    blocks = metrics.block_bootstrap(smooth, 40, 500).std()
    assert blocks > 2 * alone
    assert float(blocks) == pytest.approx(10 / np.sqrt(2000), rel=0.3)


def test_bootstrap_of_one_block_rotates_the_series():
    x = torch.arange(7.0)
    assert torch.allclose(metrics.block_bootstrap(x, 7, 20), x.double().mean())
    assert len(metrics.block_bootstrap(x * torch.nan, 3)) == 0


def test_layer_means_of_hand_worked_labels():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0, torch.nan]])
    label = torch.tensor([[0.1, torch.nan, 0.2, 0.6, 9.0]])
    got = metrics.layer_means(score, label, 2)
    np.testing.assert_allclose(got, [[0.1, 0.4, 0.3]], atol=1e-7)


def test_reported_figures_go_to_the_model_they_belong_to():
    params = {
        "model.class": "MultiFactorRNN",
        "dataset.kwargs.handler.class": "DayHandler",
        "model.kwargs.n_factors": "1",
    }
    found = reported_for(params)
    assert found is not None and found.rank_ic == 0.1342
    found = reported_for({**params, "model.kwargs.n_factors": "64"})
    assert found is not None and found.rank_ic == 0.1328
    assert reported_for({"model.class": "LGBModel"}) is None


def test_page_marks_reported_figures_as_not_comparable(comparison):
    comparison.models.loc["good", "reported"] = "13.42 %"
    html = compare_page(comparison, "Comparison").render()
    assert "reported, not comparable" in html and "13.42 %" in html
    assert "good less poor" in html and "2,000 draws" in html


def test_compare_command_reads_recorders_of_any_model(qlib_market, tmp_path):
    from qlib.workflow import R

    for run in (_run("cli one", 5.0, 0), _run("cli two", 20.0, 1)):
        with R.start(experiment_name=run.experiment):
            R.log_params(**run.params)
            recorder = R.get_recorder()
            recorder.save_objects(
                **{
                    "pred.pkl": run.score.to_frame("score"),
                    "label.pkl": run.label.to_frame("LABEL0"),
                }
            )
    args = ["compare", "cli one", "cli two", "--uri", recorder.uri]
    args += ["--out", str(tmp_path), "--horizon", "5"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert "cli one less cli two" in done.output
    page = tmp_path / "compare-cli-one-cli-two.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    with R.start(experiment_name="cli two"):  # a newer run, cut short
        damaged = R.get_recorder()
        damaged.save_objects(**{"pred.pkl": {"a": 1}})
    again = CliRunner().invoke(main, args)
    assert again.exit_code == 0, again.output
    assert f"note: cli two {damaged.id[:8]} is left out: pred.pkl of" in again.output
    assert all(line in again.output for line in done.output.splitlines()[:4])
    other = MlflowClient(f"sqlite:///{tmp_path}/other.db")
    own = other.create_experiment("elsewhere", (tmp_path / "own").as_uri())
    score = _run("elsewhere", 9.0, 2).score.to_frame("score")
    score.to_pickle(tmp_path / "pred.pkl")
    run = other.create_run(own).info.run_id
    other.log_artifact(run, str(tmp_path / "pred.pkl"))
    other.set_terminated(run)
    both = [*args, "elsewhere", "--uri", f"sqlite:///{tmp_path}/other.db"]
    done = CliRunner().invoke(main, both)
    assert done.exit_code == 0, done.output
    assert "cli one less elsewhere" in done.output
    done = CliRunner().invoke(main, ["compare", "absent", "--uri", recorder.uri])
    assert done.exit_code == 1 and "'absent' is not in" in done.output
