"""Values are those of Qlib's own engine."""

import numpy as np
import pandas as pd
import pytest
from numpy.random import RandomState

from data_handlers.expression import Evaluator
from qlib_ext.mining.expression import OPERATORS, Grammar, parse
from qlib_ext.mining.panel import mining_panel

FIELDS = ("open", "high", "low", "close", "volume", "amount", "turnover")
# One expression an operator, on a price, a cancelling difference and on volume.
EACH = {
    "Ref": "Ref({x},5)",
    "Delta": "Delta({x},3)",
    "Mean": "Mean({x},10)",
    "Sum": "Sum({x},7)",
    "Std": "Std({x},10)",
    "Max": "Max({x},13)",
    "Min": "Min({x},60)",
    "Med": "Med({x},10)",
    "Quantile": "Quantile({x},9,0.2)",
    "Rank": "Rank({x},20)",
    "Slope": "Slope({x},10)",
    "Resi": "Resi({x},10)",
    "Rsquare": "Rsquare({x},20)",
    "Corr": "Corr({x},Ref($high,2),20)",
    "Cov": "Cov({x},$low,10)",
    "Abs": "Abs({x})",
    "Sign": "Sign({x})",
    "Log": "Log({x})",
    "Add": "Add({x},Ref({x},1))",
    "Sub": "Sub({x},Mean({x},5))",
    "Mul": "Mul({x},$close)",
    "Div": "Div($close,{x})",
    "Greater": "Greater({x},Mean({x},3))",
    "Less": "Less({x},Mean({x},3))",
    "IfGreater": "If(Gt($close,$open),{x},Mean({x},5))",
}


@pytest.fixture(scope="module")
def rough(market, tmp_path_factory):
    """A store with more holes: suspensions, late listings, constant and zero days."""
    from qlib_ext.ingest.store import read_bars, read_instruments, write_store

    codes = read_instruments(market)["instrument"].tolist()[:30]
    bars = read_bars(market, codes)
    bars = bars[bars["datetime"] < "2019-07-01"].copy()
    rng = np.random.default_rng(0)
    price = ["open", "high", "low", "close", "vwap", "volume", "amount", "turnover"]
    bars.loc[rng.random(len(bars)) < 0.04, price] = np.nan
    day = bars["datetime"].rank(method="dense").to_numpy()
    code = bars["instrument"]
    halted = code.isin(codes[:4]).to_numpy() & (day > 150) & (day < 240)
    bars.loc[halted, price] = np.nan
    flat = code.isin(codes[4:7]).to_numpy() & (day > 60) & (day < 130)
    bars.loc[flat, ["open", "high", "low", "close"]] = 12.34
    bars.loc[code.isin(codes[7:10]).to_numpy() & (day % 5 == 0), "volume"] = 0.0
    late = code.isin(codes[10:14]).to_numpy() & (day < 200)
    gone = code.isin(codes[14:17]).to_numpy() & (day > 250)
    bars = bars[~(late | gone)]
    out = tmp_path_factory.mktemp("rough") / "store"
    write_store(out, bars)
    return out


@pytest.fixture
def rough_panel(rough, use_store):
    use_store(rough)
    return mining_panel(FIELDS, "all", "2018-01-01", "2019-06-30")


def from_qlib(nodes, panel):
    """Values of Qlib's engine ``[k, rows]`` and where its rows are in a panel."""
    from qlib.data import D

    frame = D.features(
        panel.instruments, [n.text for n in nodes], panel.days[0], panel.days[-1]
    )
    day = panel.days.get_indexer(frame.index.get_level_values("datetime"))
    stock = pd.Index(panel.instruments).get_indexer(
        frame.index.get_level_values("instrument")
    )
    return frame.to_numpy().T, (slice(None), day, stock)


def assert_same(nodes, panel, share=0.0):
    theirs, rows = from_qlib(nodes, panel)
    ours = Evaluator(panel, block=7).evaluate(nodes)[rows]
    for node, a, b in zip(nodes, ours, theirs, strict=True):
        if "Slope(" in node.text or "Resi(" in node.text:
            # One known value in the window: 0 / 0, but in Qlib what is left over in
            # running sums, over 0.
            b = np.where(np.isnan(a) & np.isinf(b), np.nan, b)
        differ = np.isnan(a) != np.isnan(b)
        assert differ.mean() <= share, node.text
        a, b = a[~differ], b[~differ]
        # Running sums leave other last digits behind where values cancel.
        spread = np.std(b[np.isfinite(b)], dtype=float)
        near = np.isclose(a, b, rtol=1e-5, atol=1e-7 * spread, equal_nan=True)
        assert (~near).mean() <= share, node.text


def test_every_operator_agrees_with_qlib(rough_panel):
    assert set(EACH) == set(OPERATORS)
    assert np.isnan(rough_panel.fields["$close"]).mean() > 0.1
    inputs = ("$close", "$volume", "Delta($close,1)", "Sub($close,Ref($close,1))")
    nodes = [parse(text.format(x=x)) for text in EACH.values() for x in inputs]
    assert_same(nodes, rough_panel)


@pytest.mark.parametrize("count", [30, pytest.param(80, marks=pytest.mark.slow)])
def test_random_trees_agree_with_qlib(rough_panel, count):
    grammar, rng = Grammar(FIELDS), RandomState(5)
    nodes = []
    evaluator = Evaluator(rough_panel)
    while len(nodes) < count:
        node = grammar.draw(rng)
        evaluator.evaluate([node])
        if not evaluator.is_unstable(node):
            nodes.append(node)
    # Qlib's correlation of prices that hardly move is noise, and whether that noise
    # counts as constant, in an operator around it, is a matter of chance.
    assert_same(nodes, rough_panel, 0.002)


def test_sharing_cache_and_blocks_do_not_change_values(rough_panel):
    grammar, rng = Grammar(FIELDS), RandomState(6)
    nodes = [grammar.draw(rng) for _ in range(60)]
    alone = np.stack([Evaluator(rough_panel, 0.0, 64).evaluate([n])[0] for n in nodes])
    shared = Evaluator(rough_panel, 64.0, 5)
    for _ in range(2):
        np.testing.assert_array_equal(shared.evaluate(nodes), alone)
    assert shared.shared > 0
    small = Evaluator(rough_panel, 0.1, 5)
    np.testing.assert_array_equal(small.evaluate(nodes), alone)
    assert sum(v.nbytes for v in small._kept.values()) <= 0.1 * 2**20


def test_dates_and_blocks_are_parts_of_the_whole(rough_panel):
    nodes = [parse("Std($close,20)"), parse("Div($close,$open)")]
    evaluator = Evaluator(rough_panel, block=10)
    whole = evaluator.evaluate(nodes)
    part = evaluator.evaluate(nodes, rough_panel.dates, [1])
    np.testing.assert_array_equal(part, whole[:, rough_panel.dates, 10:20])


def test_a_regression_on_infinity_is_reported(rough_panel):
    node = parse("Slope(Div($close,Delta($close,1)),10)")
    evaluator = Evaluator(rough_panel)
    evaluator.evaluate([node])
    assert evaluator.is_unstable(node)
    assert evaluator.is_unstable(parse(f"Abs({node.text})"))
    assert not evaluator.is_unstable(parse("Mean($close,10)"))


class TestPanel:
    def test_labels_are_qlibs_and_end_before_the_panel_does(self, qlib_market):
        from qlib.data import D

        panel = mining_panel(("close",), "all", "2018-06-01", "2019-03-29", horizon=5)
        assert panel.days[-1] == pd.Timestamp("2019-03-29")
        dates = panel.days[panel.dates]
        assert dates[0] == pd.Timestamp("2018-06-01")
        assert dates[-1] <= panel.days[-7]
        assert set(np.diff(panel.dates)) == {5}
        label = panel.label.numpy()
        frame = D.features(
            panel.instruments,
            ["LastTraded($close, -6) / Ref(Traded($close), -1) - 1", "$close"],
            dates[0],
            dates[-1],
        )
        known = 0
        for (code, day), (value, close) in zip(
            frame.index, frame.to_numpy(), strict=True
        ):
            if day in dates:
                ours = label[dates.get_loc(day), panel.instruments.index(code)]
                expected = value if np.isfinite(close) else np.nan
                np.testing.assert_allclose(ours, expected, rtol=1e-6)
                known += np.isfinite(ours)
        assert known > 500

    def test_only_members_count(self, qlib_market):
        from qlib.data import D

        panel = mining_panel(("close",), "csi300", "2018-06-01", "2019-06-28")
        spans = D.list_instruments(D.instruments("csi300"), as_list=False)
        for s, code in enumerate(panel.instruments):
            for day, inside in zip(
                panel.days[panel.dates], panel.expected[:, s], strict=True
            ):
                if inside:
                    assert any(a <= day <= b for a, b in spans[code])
        assert not np.isfinite(panel.label.numpy()[~panel.expected]).any()

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"start": "2030-01-01", "end": "2031-01-01"}, "no trading day"),
            ({"start": "2019-01-01", "end": "2018-01-01"}, "no trading day"),
            ({"fields": ("nothing",)}, r"no value of \$nothing"),
            ({"start": "2019-03-01", "end": "2019-03-20"}, "do not overlap"),
        ],
    )
    def test_bad_arguments(self, qlib_market, arguments, match):
        given = {
            "fields": ("close",),
            "universe": "all",
            "start": "2018-06-01",
            "end": "2019-06-28",
        }
        with pytest.raises(ValueError, match=match):
            mining_panel(**{**given, **arguments})

    def test_unknown_fields_of_a_tree(self, qlib_market):
        panel = mining_panel(("close",), "all", "2018-06-01", "2019-06-28")
        with pytest.raises(ValueError, match=r"no field \$open"):
            Evaluator(panel).evaluate([parse("Div($close,$open)")])
