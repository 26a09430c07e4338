"""The search as a whole: planted and empty markets, truncation, resuming, files."""

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from data_handlers.families import mined_expressions
from qlib_ext.cli import main
from qlib_ext.ingest.store import read_bars, read_instruments, write_store
from qlib_ext.mining import MineConfig, parse
from qlib_ext.mining.expression import scale_of
from qlib_ext.mining.search import mine, work_folder

SEARCH = dict(
    train="2018:2019",
    holdout="2020",
    budget=200,
    horizon=5,
    population=40,
    mined=20,
    kept=6,
    fields=("open", "high", "low", "close", "vwap"),
    progress=False,
    init=False,
)
SHORT = SEARCH | {"budget": 60, "population": 20, "holdout": None, "block": 20}


def init(store, folder):
    import logging

    import qlib

    qlib.init(
        provider_uri=str(store), region="cn", kernels=1, logging_level=logging.WARNING
    )


@pytest.fixture(scope="module")
def found(qlib_market, tmp_path_factory):
    out = tmp_path_factory.mktemp("planted") / "factors.yaml"
    init(qlib_market, out.parent)
    text = mine(qlib_market, out, **SEARCH)
    return out, yaml.safe_load(out.read_text()), text


@pytest.fixture(scope="module")
def found_in_noise(market_none, qlib_market, tmp_path_factory):
    out = tmp_path_factory.mktemp("none") / "factors.yaml"
    init(market_none, out.parent)
    text = mine(market_none, out, **SEARCH)
    init(qlib_market, out.parent)
    return out, yaml.safe_load(out.read_text()), text


class TestLuck:
    def test_a_planted_market_has_significant_factors(self, found):
        _, result, _ = found
        held = result["search"]["holdout"]
        assert held["significant"] >= 1
        assert held["mean_rank_ic_in_direction"] > 0.02

    def test_a_market_without_signal_has_none(self, found_in_noise):
        _, result, text = found_in_noise
        # Training figures look good all the same: that is what the tries are for.
        assert abs(result["expressions"][0]["ic_ir"]) > 0.2
        assert result["search"]["beat_luck_in_training"] == 0
        held = result["search"]["holdout"]
        assert held["significant"] == 0
        assert held["mean_rank_ic_in_direction"] < 0.02
        assert "0 of 6 significant" in text

    def test_figures_of_the_file_are_those_of_the_values(self, found, qlib_market):
        """RankIC by scipy from Qlib's own values."""
        import pandas as pd
        from qlib.data import D
        from scipy import stats

        from data_handlers.labels import forward_return

        _, result, _ = found
        row = result["expressions"][0]
        label = forward_return(5)  # evaluated by Qlib
        frame = D.features(
            D.instruments("all"), [row["expression"], label, "$close"], "2018-01-01"
        )
        frame.columns = ["x", "y", "traded"]
        every = frame.index.get_level_values("datetime").unique().sort_values()
        for part, first, last in (
            (row, "2018-01-01", "2019-12-31"),
            (row["holdout"], "2020-01-01", "2020-12-31"),
        ):
            days = every[(every >= first) & (every <= last)]
            series = [
                stats.spearmanr(day["x"], day["y"])[0]
                for date in days[:-6:5]
                if len(day := frame.xs(date, level="datetime").dropna())
            ]
            assert part["dates"] == len(series)
            assert part["rank_ic"] == pytest.approx(np.mean(series), abs=2e-5)
        assert pd.notna(row["holdout"]["p_sidak"])


class TestFile:
    def test_expressions_are_qlibs_and_differ(self, found):
        out, result, text = found
        named = {name: e for e, name in zip(*mined_expressions(out), strict=True)}
        assert list(named)[:2] == ["dp_001", "dp_002"]
        assert len(named) == 6 == len(set(named.values()))
        assert len(named) + len(result["others"]) == result["search"]["mined"] <= 20
        for expression in named.values():
            assert scale_of(parse(expression)) == 0
        assert result["search"]["tries"] == sum(result["search"]["verdicts"].values())
        assert "dp_001" in text
        page = out.with_suffix(".html").read_text()
        assert "How much is luck" in page

    def test_qlib_returns_the_values_that_were_mined(self, found):
        """Through the family's handler, on a shorter range than the search saw."""
        from data_handlers.families import MinedHandler
        from qlib_ext.mining import Evaluator, mining_panel

        out, _, _ = found
        handler = MinedHandler(
            path=str(out),
            start_time="2019-03-01",
            end_time="2019-06-28",
            styles=[],
            neutralize=[],
            infer_processors=[],
        )
        frame = handler.fetch(col_set="feature", data_key="raw")
        panel = mining_panel(
            SEARCH["fields"], "all", "2019-03-01", "2019-06-28", horizon=5
        )
        day = panel.days.get_indexer(frame.index.get_level_values("datetime"))
        place = {c: k for k, c in enumerate(panel.instruments)}
        stock = frame.index.get_level_values("instrument").map(place)
        named = {name: e for e, name in zip(*mined_expressions(out), strict=True)}
        values = Evaluator(panel).evaluate([parse(e) for e in named.values()])
        values[:, ~np.isfinite(panel.fields["$close"])] = np.nan
        for name, value in zip(named, values, strict=True):
            # Sums that cancel keep other last digits where a query starts elsewhere.
            ours = value[day, stock]
            np.testing.assert_allclose(
                frame[name].to_numpy(),
                ours,
                rtol=1e-5,
                atol=1e-6 * np.nanstd(ours),
                err_msg=name,
            )


class TestSearch:
    def test_a_store_without_the_future_gives_the_same(
        self, market_small, use_store, tmp_path
    ):
        use_store(market_small)
        mine(market_small, tmp_path / "a.yaml", **SHORT | {"holdout": "2020"})
        codes = read_instruments(market_small)["instrument"].tolist()
        bars = read_bars(market_small, codes)
        cut = tmp_path / "cut"
        write_store(cut, bars[bars["datetime"] < "2020-01-01"])
        use_store(cut)
        mine(cut, tmp_path / "b.yaml", **SHORT)
        a, b = (
            yaml.safe_load((tmp_path / f"{n}.yaml").read_text()) for n in ("a", "b")
        )
        for row in a["expressions"]:
            assert row.pop("holdout")["dates"] > 30
        assert a["search"].pop("holdout")["tests"] == 6
        assert a["expressions"] == b["expressions"]
        assert a["others"] == b["others"]
        assert a["search"] == b["search"]
        assert a["provenance"]["data"] == b["provenance"]["data"]

    @pytest.mark.slow
    def test_comparisons_within_a_day(self, qlib_market, use_store, tmp_path):
        """The same without the future, and read by the handler as they were mined."""
        from data_handlers.alpha import ExpressionLoader
        from qlib_ext.mining import Evaluator, mining_panel

        numbers = SHORT | {"budget": 40, "cross": True}
        mine(qlib_market, tmp_path / "a.yaml", **numbers)
        bars = read_bars(
            qlib_market, read_instruments(qlib_market)["instrument"].tolist()
        )
        write_store(tmp_path / "cut", bars[bars["datetime"] < "2020-01-01"])
        use_store(tmp_path / "cut")
        mine(tmp_path / "cut", tmp_path / "b.yaml", **numbers)
        a, b = (
            yaml.safe_load((tmp_path / f"{n}.yaml").read_text()) for n in ("a", "b")
        )
        assert a["expressions"] == b["expressions"] and a["search"] == b["search"]
        expressions, _ = mined_expressions(tmp_path / "a.yaml")
        crossed = [e for e in expressions if "CS" in e]
        assert crossed
        frame = ExpressionLoader(crossed).load("all", "2019-03-01", "2019-04-30")
        fields = [*SEARCH["fields"], "industry"]
        panel = mining_panel(
            fields, "all", "2019-03-01", "2019-04-30", horizon=5, cross=True
        )
        day = panel.days.get_indexer(frame.index.get_level_values("datetime"))
        place = {c: k for k, c in enumerate(panel.instruments)}
        stock = frame.index.get_level_values("instrument").map(place)
        values = Evaluator(panel).evaluate([parse(e) for e in crossed])
        np.testing.assert_array_equal(frame.to_numpy().T, values[:, day, stock])

    def test_a_killed_search_ends_with_the_same_file(
        self, market_small, use_store, tmp_path, monkeypatch
    ):
        use_store(market_small)
        from qlib_ext.mining import evolve

        whole, part = tmp_path / "whole" / "f.yaml", tmp_path / "part" / "f.yaml"
        mine(market_small, whole, **SHORT)
        assert len(list(work_folder(whole).glob("generation_*.json"))) == 3
        write = evolve.write_json

        def killed(file, content):
            if file.name == "generation_00001.json":
                file.with_suffix(".tmp").write_text("{half of")
                raise KeyboardInterrupt
            write(file, content)

        monkeypatch.setattr(evolve, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            mine(market_small, part, **SHORT)
        assert not part.exists()
        monkeypatch.setattr(evolve, "write_json", write)
        evaluated = []
        evaluate = evolve.Miner._evaluate
        monkeypatch.setattr(
            evolve.Miner,
            "_evaluate",
            lambda self, new: evaluated.append(self._generation) or evaluate(self, new),
        )
        mine(market_small, part, **SHORT)
        assert evaluated == [1, 2]
        assert part.read_text() == whole.read_text()
        # Once more: nothing is evaluated. A larger budget goes on from there.
        mine(market_small, part, **SHORT)
        assert evaluated == [1, 2]
        mine(market_small, part, **SHORT | {"budget": 70})
        assert evaluated == [1, 2, 3]

    def test_other_numbers_or_a_changed_generation_are_noticed(
        self, market_small, use_store, tmp_path
    ):
        use_store(market_small)
        out = tmp_path / "f.yaml"
        few = SHORT | {"budget": 20}
        mine(market_small, out, **few)
        with pytest.raises(ValueError, match="`seed` was 0, now 1"):
            mine(market_small, out, **few | {"seed": 1})
        with pytest.raises(ValueError, match="`data` was"):
            mine(market_small, out, **few | {"horizon": 10})
        file = work_folder(out) / "generation_00000.json"
        record = json.loads(file.read_text())
        record["tries"][0][0] = "Mean($close,5)"
        file.write_text(json.dumps(record))
        with pytest.raises(ValueError, match="cannot be repeated"):
            mine(market_small, out, **few)
        mine(market_small, out, **few | {"seed": 1, "fresh": True})

    def test_weak_expressions_are_rejected_on_a_part_of_the_stocks(
        self, qlib_market, tmp_path
    ):
        few = SHORT | {"budget": 20}
        mine(qlib_market, tmp_path / "a.yaml", **few)
        mine(qlib_market, tmp_path / "b.yaml", **few | {"subset_t": 0.0})
        a, b = (
            yaml.safe_load((tmp_path / f"{n}.yaml").read_text())["search"]["verdicts"]
            for n in ("a", "b")
        )
        assert a["weak"] > 0 and "weak" not in b
        assert sum(a.values()) == sum(b.values())


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"kept": 30, "mined": 20}, "`kept`"),
            ({"population": 1}, "`population`"),
            ({"fitness": "ic"}, "`fitness`"),
            ({"max_corr": 0.0}, "`max_corr`"),
            ({"parsimony": 0.1}, "`parsimony`"),
            ({"subset_t": -1.0}, "`subset_t`"),
            ({"seed": -1}, "`seed`"),
            ({"population": "7"}, "`population`"),
            ({"max_corr": "0.7"}, "`max_corr`"),
            ({"max_size": "7"}, "`max_size`"),
            ({"subset_t": "7"}, "`subset_t`"),
        ],
    )
    def test_config(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            MineConfig(fields=("close",), **arguments)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"train": "soon"}, "`train` must be"),
            ({"train": "2019:2018"}, "`train` must be a year"),
            ({"holdout": "2019"}, "`holdout` must begin after"),
            ({"holdout": "2035"}, "no trading day"),
            ({"budget": 0}, "`budget`"),
            ({"minutes": 0.0}, "`minutes`"),
            ({"fields": ("nothing",)}, r"no value of \$nothing"),
            ({"universe": "csi9"}, "csi9"),
        ],
    )
    def test_command(self, qlib_market, tmp_path, arguments, match):
        with pytest.raises(ValueError, match=match):
            mine(qlib_market, tmp_path / "f.yaml", **SHORT | arguments)

    def test_no_store(self, tmp_path):
        done = CliRunner().invoke(
            main, ["mine", "--store", str(tmp_path), "--train", "2018"]
        )
        assert done.exit_code == 1
        assert "is no Qlib store" in done.output
