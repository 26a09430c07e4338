import itertools

import numpy as np
import pytest
from numpy.random import RandomState

from data_handlers.expression import Evaluator
from qlib_ext.mining.expression import (
    CROSSED,
    OPERATORS,
    Grammar,
    crossover,
    mutate,
    parse,
    scale_of,
)

FIELDS = ("open", "high", "low", "close", "volume", "amount")


class TestReading:
    def test_what_is_written_is_read_back(self):
        grammar, rng = Grammar(FIELDS), RandomState(0)
        for _ in range(300):
            node = grammar.draw(rng)
            again = parse(node.text)
            assert again.text == node.text
            assert (again.size, again.depth, scale_of(again)) == (
                node.size,
                node.depth,
                scale_of(node),
            )

    def test_order_of_symmetric_operands_does_not_matter(self):
        assert parse("Add($open,$close)").text == parse("Add($close, $open)").text
        assert parse("Sub($open,$close)").text != parse("Sub($close,$open)").text

    def test_figures_of_a_tree(self):
        node = parse("Div(Mean(Ref($close,5),20),If(Gt($open,$low),$high,$close))")
        assert (node.size, node.depth, node.look_back) == (9, 3, 24)
        assert scale_of(node) == 0

    @pytest.mark.parametrize(
        "text",
        [
            "__import__('os').system('true')",
            "Mean($close,5) or exit()",
            "Mean($close.__class__,5)",
            "Operators.Mean($close,5)",
            "Mean($close,5);print(1)",
            "Mean($close,[5])",
            "Mean($close,5",
            "Mean($close,5))",
            "ChangeInstrument('SH600000',$close)",
            "EMA($close,5)",
            "Mask($close,'sh600000')",
            "Add($close,1)",
            "$close-$open",
            "Mean(close,5)",
            "Feature('close')",
            "IfGreater($close,$open,$close,$open)",
            "If($close,$close,$open)",
            "",
            "(" * 3000,
            "Abs(" * 5000 + "$close" + ")" * 5000,
        ],
    )
    def test_anything_else_is_refused(self, text):
        with pytest.raises(ValueError):
            parse(text)

    @pytest.mark.parametrize("days", ["-1", "0", "1.5", "251", "1e3", "$open"])
    def test_windows_are_whole_days_of_the_past(self, days):
        with pytest.raises(ValueError, match=r"window|number|expected"):
            parse(f"Ref($close,{days})")

    def test_text_is_required(self):
        with pytest.raises(ValueError, match="must be text"):
            parse(None)  # type: ignore[arg-type]


class TestScale:
    @pytest.mark.parametrize(
        ("text", "scale"),
        [
            ("$close", 1),
            ("$volume", -1),
            ("$amount", 0),
            ("Mean($close,5)", 1),
            ("Div($close,$open)", 0),
            ("Mul($close,$volume)", 0),
            ("Corr($close,$volume,10)", 0),
            ("Cov($close,$close,10)", 2),
            ("Add($close,$volume)", None),
            ("Log($close)", None),
            ("Log(Div($close,$open))", 0),
            ("If(Gt($close,$volume),$amount,$amount)", None),
            ("If(Gt($close,$open),$volume,Ref($volume,1))", -1),
        ],
    )
    def test_scale_of(self, text, scale):
        assert scale_of(parse(text)) == scale

    @pytest.mark.parametrize("count", [30, pytest.param(80, marks=pytest.mark.slow)])
    def test_split_adjustment_changes_no_drawn_expression(self, count):
        """Prices times f and volume over f, per stock: the values stay."""
        rng = np.random.default_rng(0)
        t, n = 150, 6
        base = np.exp(np.cumsum(rng.normal(size=(t, n)) * 0.02, 0)) * 10
        fields = {
            "$close": base,
            "$open": base * np.exp(rng.normal(size=(t, n)) * 0.01),
            "$volume": np.exp(rng.normal(size=(t, n))) * 1e6,
        }
        # A power of two, so that rounding is the same.
        other = {
            name: x * (8.0 if name != "$volume" else 0.125)
            for name, x in fields.items()
        }
        grammar, draws = Grammar(["close", "open", "volume"]), RandomState(1)
        nodes = [grammar.draw(draws) for _ in range(count)]
        # Windows that hardly move are left out by Qlib below an absolute bound.
        nodes = [
            n for n in nodes if not {"Corr", "Rsquare"} & {m.op for _, m in n.walk()}
        ]
        a, b = (
            Evaluator({k: v.astype(np.float32) for k, v in f.items()}).evaluate(nodes)
            for f in (fields, other)
        )
        np.testing.assert_array_equal(a, b)


class TestVariation:
    def test_children_obey_the_grammar(self):
        grammar, rng = Grammar(FIELDS, max_depth=4, max_size=12), RandomState(2)
        population = [grammar.draw(rng) for _ in range(60)]
        assert all(grammar.fits(n) for n in population)
        for a, b in itertools.pairwise(population):
            for child in (crossover(grammar, rng, a, b), mutate(grammar, rng, a)):
                assert grammar.fits(child)
                assert parse(child.text).text == child.text

    def test_every_operator_is_drawn(self):
        grammar, rng = Grammar(FIELDS), RandomState(3)
        seen = {m.op for _ in range(1500) for _, m in grammar.draw(rng).walk()}
        # Delta is written as a difference, see the module.
        assert seen - {f"${f}" for f in FIELDS} == set(OPERATORS) - {"Delta"}

    def test_comparisons_are_of_ratios_and_keep_to_their_groups(self):
        grammar, rng = Grammar(FIELDS, cross=True, group="industry"), RandomState(4)
        drawn = [grammar.draw(rng) for _ in range(600)]
        for a, b in itertools.pairwise(drawn[:200]):
            drawn += [crossover(grammar, rng, a, b), mutate(grammar, rng, a)]
        found = [m for n in drawn for _, m in n.walk() if m.op in CROSSED]
        assert {m.op for m in found} == set(CROSSED)
        assert {len(m.args) for m in found} == {1, 2}
        assert all(scale_of(m.args[0]) == 0 for m in found)
        assert all(m.args[1].op == "$industry" for m in found if len(m.args) == 2)
        groups = sum(m.op == "$industry" for n in drawn for _, m in n.walk())
        assert groups == sum(len(m.args) == 2 for m in found)
        assert all(parse(n.text).text == n.text for n in drawn)

    def test_a_store_of_prices_alone_will_do(self):
        grammar, rng = Grammar(["close"]), RandomState(4)
        assert all(scale_of(grammar.draw(rng)) == 0 for _ in range(20))

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"fields": []}, "`fields` is empty"),
            ({"fields": ["close)"]}, "not the name of a field"),
            ({"max_depth": 1}, "`max_depth`"),
            ({"max_depth": "5"}, "`max_depth`"),
            ({"max_size": 2}, "`max_size`"),
            ({"max_look_back": 0}, "`max_look_back`"),
        ],
    )
    def test_bad_arguments(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            Grammar(**{"fields": FIELDS, **arguments})
