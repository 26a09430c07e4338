import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from data_handlers.labels import forward_return as label_of
from qlib_ext.report.factor_record import FactorRecord, forward_return

HORIZON = 10


class _UnitModel:
    """Stands for a trained model with three factor units and a tilted score."""

    tilt = 0.5
    style_weights_ = {"size": -0.1}  # noqa: RUF012

    def __init__(self, score):
        self.score, self.passes = score, 0

    def predict_units_and_parts(self, dataset, segment="test"):
        self.passes += 1
        return self.predict_units(dataset), self.predict_parts(dataset)

    def predict_units(self, dataset, segment="test"):
        rng = np.random.default_rng(1)
        noise = rng.standard_normal((len(self.score), 3))
        units = self.score.to_numpy()[:, None] / self.score.std() + noise
        columns = [f"unit_{k:02d}" for k in range(3)]
        return pd.DataFrame(units, self.score.index, columns)

    def predict_parts(self, dataset, segment="test"):
        return pd.DataFrame({"learnt": self.score, "residual": -self.score})


@pytest.fixture(scope="module")
def factor_inputs(qlib_market):
    """Score that knows part of the oracle, and the raw label from the store."""
    from qlib.data import D

    oracle = pd.read_parquet(f"{qlib_market}.oracle.parquet")
    oracle = oracle.set_index(["datetime", "instrument"])["total"]
    oracle = oracle[oracle.index.get_level_values(0) >= "2020-01-02"]
    rng = np.random.default_rng(0)
    score = oracle + 2 * oracle.std() * rng.standard_normal(len(oracle))
    expression = f"Ref($close, -{HORIZON + 1}) / Ref($close, -1) - 1"
    names = list(score.index.unique("instrument"))
    label = D.features(names, [expression], start_time="2020-01-02")
    label = label.swaplevel().sort_index()
    label.columns = pd.MultiIndex.from_tuples([("label", "LABEL0")])
    return score.to_frame("score"), label


def _run(inputs, name="factor <i>test</i>", label_frame=None, **kwargs):
    from qlib.workflow import R

    score, label = inputs
    with R.start(experiment_name=name):
        recorder = R.get_recorder()
        label = label if label_frame is None else label_frame
        recorder.save_objects(**{"pred.pkl": score, "label.pkl": label})
        record = FactorRecord(recorder, **kwargs)
        record.generate()
    return recorder, record


@pytest.fixture(scope="module")
def factor_run(factor_inputs, qlib_market):
    model = _UnitModel(factor_inputs[0]["score"])
    recorder, record = _run(
        factor_inputs,
        model=model,
        dataset=object(),
        oracle_path=f"{qlib_market}.oracle.parquet",
    )
    assert model.passes == 1  # units and parts of one pass
    record.check(include_self=True)
    return recorder


def _parquet(recorder, name):
    return pd.read_parquet(recorder.client.download_artifacts(recorder.id, name))


class TestRoundTrip:
    def test_logged_rank_ic_equals_scipy_every_tenth_day(
        self, factor_run, factor_inputs
    ):
        score, label = factor_inputs
        both = pd.concat([score["score"], label.iloc[:, 0]], axis=1).dropna()
        both.columns = ["score", "label"]
        daily = both.groupby(level="datetime").apply(
            lambda x: stats.spearmanr(x["score"], x["label"])[0]
        )
        days = score.index.unique("datetime").sort_values()
        starts = [daily.reindex(days[k::HORIZON]).dropna() for k in range(HORIZON)]
        logged = factor_run.list_metrics()
        for name, figure in (
            ("Rank IC 10d", lambda x: x.mean()),
            ("Rank ICIR 10d", lambda x: x.mean() / x.std()),
            ("Rank IC positive 10d", lambda x: (x > 0).mean()),
        ):
            expected = np.mean([figure(x) for x in starts])
            assert logged[name] == pytest.approx(expected, abs=1e-5)
        assert logged["Rank IC dates 10d"] == round(np.mean([len(x) for x in starts]))
        assert logged["Rank IC daily"] == pytest.approx(daily.mean(), abs=1e-6)
        year = [x[x.index.year == 2020].mean() for x in starts]
        assert logged["Rank IC 10d 2020"] == pytest.approx(np.mean(year), abs=1e-6)

    def test_planted_signal_orders_the_layers(self, factor_run):
        logged = factor_run.list_metrics()
        assert logged["Oracle Rank IC 10d"] > logged["Rank IC 10d"] > 0
        assert logged["Top hedged annual return"] > 0
        assert logged["Bottom hedged annual return"] < 0
        assert logged["Rank IC 10d"] > abs(logged["Rank IC 10d lag 20"])

    def test_frames_and_units_are_parquet_with_their_index(
        self, factor_run, factor_inputs
    ):
        units = _parquet(factor_run, "factor/units.parquet")
        assert list(units.index.names) == ["datetime", "instrument"]
        assert list(units.columns) == ["unit_00", "unit_01", "unit_02"]
        assert (units.dtypes == np.float32).all()
        assert len(units) == len(factor_inputs[0])
        table = _parquet(factor_run, "factor/unit_table.parquet")
        assert (table["rank_ic"] > 0).all()
        layers = _parquet(factor_run, "factor/layers.parquet")
        assert {"pool", "hedged_top", "hedged_bottom"} <= set(layers.index)
        assert not any(
            name.endswith(".pkl") for name in factor_run.list_artifacts("factor")
        )

    def test_parts_of_a_tilted_score_are_kept_and_judged(self, factor_run):
        parts = _parquet(factor_run, "factor/parts.parquet")
        assert list(parts) == ["learnt", "residual"]
        logged = factor_run.list_metrics()
        learnt = logged["Rank IC of part learnt"]
        assert learnt == pytest.approx(logged["Rank IC 10d"], abs=1e-6)
        assert logged["Rank IC of part residual"] == pytest.approx(-learnt, abs=1e-6)
        weights = _parquet(factor_run, "factor/style_weights.parquet")
        assert weights["weight"].to_dict() == {"size": -0.1}

    def test_page_has_conditions_and_no_outside_address(self, factor_run):
        path = factor_run.client.download_artifacts(factor_run.id, "factor/report.html")
        with open(path, encoding="utf-8") as file:
            html = file.read()
        # plotly.js itself names addresses in strings; nothing may refer to one.
        shell = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
        assert not re.search(r"https?://|//cdn|@import|url\(", shell)
        assert "default-src 'none'" in shell
        assert html.count("Plotly.newPlot(element") == 1
        assert "close of t+1 to close of t+11" in shell
        # What holds for the whole page is said once, at its head.
        lead = re.search(r'<p class="lead">(.*?)</p>', shell, flags=re.S)[1]
        for words in ("2020-01-02 to", "Label:", "horizon 10 trading days"):
            assert words in lead and shell.count(words) == 1
        notes = re.findall(r'<p class="note">(.*?)</p>', shell, flags=re.S)
        assert len(notes) == len(set(notes))

    def test_figures_in_the_page_are_plain_json(self, factor_run):
        path = factor_run.client.download_artifacts(factor_run.id, "factor/report.html")
        with open(path, encoding="utf-8") as file:
            html = file.read()
        text = re.search(r'id="figures">(.*?)</script>', html, flags=re.S)[1]
        assert "<" not in text
        figures = json.loads(text)
        assert all(f'id="{name}"' in html for name in figures)

    def test_report_command_prints_figures_without_a_store(self, factor_run, tmp_path):
        from click.testing import CliRunner

        from qlib_ext.cli import main

        args = ["report", "--uri", factor_run.uri, "--out", str(tmp_path)]
        done = CliRunner().invoke(main, [*args, "--recorder", factor_run.id[:12]])
        assert done.exit_code == 0, done.output
        shown = f"{100 * factor_run.list_metrics()['Rank IC 10d']:.2f} %"
        assert shown in done.output
        page = tmp_path / f"factor-i-test-i-{factor_run.id[:8]}.html"
        assert str(page) in done.output
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


class TestStudies:
    """Given factors and exposures, in two pools of the store."""

    @pytest.fixture(scope="class")
    def study_run(self, factor_inputs, tmp_path_factory):
        folder = tmp_path_factory.mktemp("given")
        score = factor_inputs[0]["score"]
        rng = np.random.default_rng(3)
        # A factor that is the score but for noise, and a style the score leans on.
        noise = 0.3 * score.std() * rng.standard_normal(len(score))
        given = pd.DataFrame({"twin": score + noise})
        given.to_parquet(folder / "factors.parquet")
        rank = score.groupby(level="datetime").rank(pct=True)
        risk = pd.DataFrame({"industry": 1.0 * (rank > 0.5), "size": rank})
        risk.reset_index().to_parquet(folder / "risk.parquet")
        recorder, _ = _run(
            factor_inputs,
            "studies",
            pools=["csi300", "csi500"],
            factors_path=str(folder / "factors.parquet"),
            risk_path=str(folder / "risk.parquet"),
        )
        return recorder

    def test_pools_are_those_asked_for(self, study_run):
        table = _parquet(study_run, "factor/pools.parquet")
        assert list(table.index)[1:] == ["csi300", "csi500"]
        assert (table["stocks"].iloc[1:] < table["stocks"].iloc[0]).all()
        assert "Rank IC 10d csi300" in study_run.list_metrics()

    def test_a_score_over_its_noisy_twin_adds_little(self, study_run):
        table = _parquet(study_run, "factor/incremental.parquet")
        assert {"over ret", "over vol", "over lnamihud", "over twin"} <= set(
            table.index
        )
        alone = table.at["alone", "rank_ic"]
        # With 9 % of noise in the twin's variance 0.29 of the correlation is left.
        assert abs(table.at["over twin", "rank_ic"]) < alone / 2
        assert table.at["over twin", "own_rank_ic"] == pytest.approx(alone, rel=0.3)
        correlation = _parquet(study_run, "factor/factor_correlation.parquet")
        assert correlation.at["twin", "score"] > 0.9

    def test_exposures_show_what_the_score_leans_on(self, study_run):
        styles = _parquet(study_run, "factor/style_exposure.parquet")
        assert styles.at["size", "correlation"] == pytest.approx(1, abs=1e-3)
        assert styles.at["size", "top"] > 0.4 and styles.at["size", "bottom"] < -0.4
        industry = _parquet(study_run, "factor/industry_exposure.parquet")
        assert industry["top"].max() == pytest.approx(0.5, abs=0.05)
        assert industry["pool_share"].sum() == pytest.approx(1)
        neutral = _parquet(study_run, "factor/neutral.parquet")
        last = neutral["rank_ic"].iloc[-1]
        assert not abs(last) > neutral["rank_ic"].iloc[0] / 3

    def test_costs_lower_the_hedged_return(self, study_run):
        table = _parquet(study_run, "factor/tradability.parquet")
        assert len(table) == 4
        assert table.at["costs", "hedged_top"] < table["hedged_top"].iloc[0]
        logged = study_run.list_metrics()
        assert logged["Top hedged annual return after costs"] == pytest.approx(
            table["hedged_top"].iloc[-1]
        )


class TestInputs:
    def test_empty_label_is_replaced_by_the_store(self, factor_inputs, factor_run):
        from qlib.workflow import R

        with R.start(experiment_name="no label"):
            recorder = R.get_recorder()
            recorder.save_objects(**{"pred.pkl": factor_inputs[0], "label.pkl": None})
            FactorRecord(recorder, pools=[]).generate()
        assert recorder.list_metrics()["Rank IC 10d"] == pytest.approx(
            factor_run.list_metrics()["Rank IC 10d"], abs=1e-3
        )

    def test_label_of_another_horizon_is_named_in_the_report(
        self, factor_inputs, tmp_path
    ):
        recorder, _ = _run(factor_inputs, "other horizon", horizon=5, pools=[])
        context = recorder.client.download_artifacts(recorder.id, "factor/context.json")
        with open(context, encoding="utf-8") as file:
            assert "not close t+1 to close t+6" in json.load(file)["label"]

    def test_horizon_is_that_of_the_handlers_label(self, factor_inputs, caplog):
        class Handler:
            horizons = (5, 10)

        class Dataset:
            handler = Handler()

        assert FactorRecord(None, dataset=Dataset()).horizon == 5
        assert FactorRecord(None, dataset=Dataset(), label_col=1).horizon == 10
        other = FactorRecord(None, dataset=Dataset(), horizon=10)
        assert "handler's label is the return over 5" in other.mismatch

    def test_horizon_is_told_from_the_returns_where_no_handler_says_it(
        self, factor_inputs
    ):
        from qlib.data import D

        names = list(factor_inputs[0].index.unique("instrument")[:20])
        score = factor_inputs[0].loc[(slice("2020-09-01", None), names), :]
        expressions = [label_of(3), "Std($close, 7) / $close"]
        frame = D.features(names, expressions, start_time="2020-09-01")
        frame = frame.swaplevel().sort_index()
        for column, horizon, warned in ((0, 3, 0), (1, 10, 1)):
            recorder, _ = _run((score, frame.iloc[:, [column]]), f"h{column}", pools=[])
            assert f"Rank IC {horizon}d" in recorder.list_metrics()
            page = recorder.client.download_artifacts(recorder.id, "factor/report.html")
            with open(page, encoding="utf-8") as file:
                assert file.read().count("is not known: RankIC is taken") == warned

    def test_carried_labels_are_counted_and_left_out_beside(self, factor_inputs):
        from qlib.data import D

        names = list(factor_inputs[0].index.unique("instrument")[:40])
        score = factor_inputs[0].loc[(slice(None), names), :]
        both = [label_of(HORIZON), label_of(HORIZON, carry=False)]
        frame = D.features(names, both, start_time="2020-01-02")
        frame = frame.swaplevel().sort_index()
        carried, strict = frame.iloc[:, [0]], frame.iloc[:, [1]]
        shown = []
        for name, label in (("carried", carried), ("strict", strict)):
            recorder, _ = _run((score, label), name, pools=[])
            shown.append(recorder.list_metrics())
        rows = carried.reindex(score.index).dropna().index
        share = strict.reindex(rows).isna().to_numpy().mean()
        assert 0.001 < share < 0.2
        assert shown[0]["Labels carried"] == pytest.approx(share, rel=1e-6)
        assert shown[1]["Labels carried"] == 0
        left_out = shown[0]["Rank IC 10d without carried labels"]
        assert left_out == pytest.approx(shown[1]["Rank IC 10d"], abs=1e-6)
        assert left_out != shown[0]["Rank IC 10d"]

    def test_tiny_pool_gets_fewer_layers(self, factor_inputs):
        score, label = factor_inputs
        few = score.index.unique("instrument")[:12]
        score = score[score.index.get_level_values("instrument").isin(few)]
        recorder, _ = _run((score, label), "tiny pool", pools=[])
        assert recorder.list_metrics()["Layers"] == 2

    def test_label_outside_the_days_of_the_score_is_explained(self, factor_inputs):
        early = factor_inputs[1].copy()
        early.index = early.index.set_levels(
            early.index.levels[0] - pd.DateOffset(years=3), level=0
        )
        with pytest.raises(ValueError, match=r"label\.pkl has no value"):
            _run(factor_inputs, "no overlap", label_frame=early)

    def test_labels_of_other_spellings_are_explained(self, factor_inputs):
        lower = factor_inputs[1].rename(index=str.lower, level="instrument")
        with pytest.raises(ValueError, match=r"no instrument in common: 's.* and 'S"):
            _run(factor_inputs, "spelling", label_frame=lower)

    @pytest.mark.parametrize("path", ["factors_path", "risk_path"])
    def test_factors_of_other_days_are_refused(self, factor_inputs, tmp_path, path):
        frame = factor_inputs[0].reset_index()
        frame["datetime"] -= pd.DateOffset(years=3)
        frame.to_parquet(tmp_path / "f.parquet")
        with pytest.raises(ValueError, match=f"`{path}` has no value on the days"):
            _run(factor_inputs, pools=[], **{path: str(tmp_path / "f.parquet")})

    def test_score_without_names_of_its_index_is_explained(self, factor_inputs):
        score, label = factor_inputs
        with pytest.raises(ValueError, match="must have the index levels datetime and"):
            _run((score.rename_axis([None, None]), label))

    def test_score_without_a_number_is_explained(self, factor_inputs):
        score, label = factor_inputs
        with pytest.raises(ValueError, match=r"pred\.pkl holds no finite score"):
            _run((score * np.nan, label), "all nan")

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"horizon": 0}, "`horizon` must be a whole number of at least 1, got 0"),
            ({"horizon": "10"}, "`horizon` must be a whole number"),
            ({"horizon": True}, "`horizon` must be a whole number"),
            ({"n_layers": 1}, "`n_layers` must be a whole number of at least 2"),
            ({"label_col": -1}, "`label_col` must be a whole number"),
            ({"pools": "csi300"}, "`pools` must be a list of market names"),
            ({"factors_path": "no.parquet"}, "`factors_path` must be an existing"),
            ({"risk_path": "no.parquet"}, "`risk_path` must be an existing"),
            ({"oracle_path": "nowhere.parquet"}, "`oracle_path` must be an existing"),
        ],
    )
    def test_bad_arguments_are_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            FactorRecord(None, **kwargs)

    def test_label_column_beyond_the_frame_is_named(self, factor_inputs):
        with pytest.raises(ValueError, match="`label_col` must be below 1"):
            _run(factor_inputs, "label column", label_col=1)


def test_forward_return_enters_after_the_signal():
    close = torch.tensor([[1.0], [2.0], [4.0], [6.0]])
    got = forward_return(close, 1)
    # Entered at the close of t+1, left at the close of t+2.
    assert got[:2].flatten().tolist() == [1.0, 0.5]
    assert torch.isnan(got[2:]).all()
