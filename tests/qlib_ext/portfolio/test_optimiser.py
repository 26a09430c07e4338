"""The optimiser against cvxpy on full covariance matrices, and by properties."""

import pickle
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pandas as pd
import pytest

from qlib_ext.portfolio import limits as limits_module
from qlib_ext.portfolio import solvers as module
from qlib_ext.portfolio.limits import RELAX_ORDER, Limits, LinearLimit, MemberShare
from qlib_ext.portfolio.optimiser import Optimiser, make_problem
from qlib_ext.portfolio.programme import Problem
from qlib_ext.portfolio.risk_model import DayRisk


def random_problem(seed, n=None):
    """A problem with suspended stocks, unknown exposures, drifted or no holdings."""
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(20, 70))
    styles, industries = 4, 5
    industry = rng.integers(0, industries, n)
    dummies = (industry[:, None] == np.arange(industries)).astype(float)
    style = rng.standard_normal((n, styles))
    style[rng.random((n, styles)) < 0.02] = np.nan
    x = np.column_stack([np.ones(n), style, dummies])
    k = x.shape[1]
    a = rng.standard_normal((k, 2 * k)) * np.r_[0.15, 0.05 * np.ones(k - 1)][:, None]
    covariance = a @ a.T / (2 * k)
    specific = rng.uniform(0.15, 0.5, n)
    specific[rng.random(n) < 0.02] = np.nan
    members = rng.permutation(n)[: max(5, n // 2)]
    benchmark = np.zeros(n)
    benchmark[members] = rng.lognormal(0, 0.8, len(members))
    benchmark /= benchmark.sum()
    current = np.zeros(n)
    if rng.random() < 0.85:
        current = benchmark * rng.uniform(0.2, 2, n)
        other = rng.permutation(n)[:5]
        current[other] += rng.uniform(0, 0.1, 5)
        current /= current.sum()
    alpha = rng.standard_normal(n)
    alpha[rng.random(n) < 0.03] = np.nan
    free = rng.random(n) > 0.05
    return Problem(
        names=[f"S{i:03d}" for i in range(n)],
        alpha=alpha,
        benchmark=benchmark,
        current=current,
        exposures=x,
        factors=["country", *"abcd", *(f"industry_{i}" for i in range(industries))],
        covariance=covariance,
        specific=specific,
        can_buy=free & (rng.random(n) > 0.02),
        can_sell=free & (rng.random(n) > 0.02),
    )


def random_limits(seed):
    """Limits that can be kept in most problems and cannot in some."""
    rng = np.random.default_rng([seed, 1])
    maybe = lambda share, value: value if rng.random() < share else None  # noqa: E731
    return Limits(
        tracking_error=maybe(0.9, float(rng.uniform(0.01, 0.06))),
        style=maybe(0.9, float(rng.uniform(0.02, 0.5))),
        industry=maybe(0.9, float(rng.uniform(0.005, 0.05))),
        turnover=maybe(0.9, float(rng.uniform(0.05, 0.4))),
        max_weight=maybe(0.9, float(rng.uniform(0.03, 0.1))),
        max_multiple=maybe(0.2, 5.0),
        member_share=maybe(0.5, 0.8),
        named={"b": 0.05} if rng.random() < 0.3 else {},
    )


def allowed(limits, solution):
    """Limits as applied: (by group, by factor, by stock)."""
    groups = {r.group: r.applied for r in solution.relaxations if r.group == r.name}
    single = {r.name: r.applied for r in solution.relaxations if r.group != r.name}
    return groups, single


def model(p, limits, groups, single, w):
    """Constraints in cvxpy, written from the reports, with an n x n covariance."""
    x = np.nan_to_num(p.exposures)
    s = np.where(np.isnan(p.specific), np.nanmax(p.specific), p.specific)
    sigma = x @ p.covariance @ x.T + np.diag(s**2)
    values, vectors = np.linalg.eigh(sigma)
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    d = w - p.benchmark
    scored = np.isfinite(p.alpha)
    z = np.where(scored, p.alpha, 0.0)
    z = np.where(scored, (z - z[scored].mean()) / z[scored].std(), 0.0)
    out = [w >= 0, cp.sum(w) == groups.get("invested", 1.0)]
    for i, name in enumerate(p.names):
        if not p.can_sell[i]:
            out.append(w[i] >= p.current[i])
        if not p.can_buy[i]:
            out.append(w[i] <= p.current[i])
        elif not scored[i]:
            out.append(w[i] <= max(p.benchmark[i], p.current[i]))
        cap = 1.0
        if limits.max_weight is not None:
            cap = max(limits.max_weight, p.benchmark[i])
        if limits.max_multiple is not None and p.benchmark[i] > 0:
            cap = min(cap, limits.max_multiple * p.benchmark[i])
        if not p.can_sell[i]:
            cap = max(cap, p.current[i])
        out.append(w[i] <= single.get(name, cap))
    for j, name in enumerate(p.factors):
        limit = limits.industry if name.startswith("industry") else limits.style
        limit = limits.named.get(name, limit)
        if name != "country" and limit is not None:
            out.append(cp.abs(x[:, j] @ d) <= single.get(name, limit))
    te = groups.get("tracking_error", limits.tracking_error)
    if te is not None:
        out.append(cp.norm(root @ d) <= te)
    if limits.turnover is not None and p.current.sum() > 0:
        turnover = groups.get("turnover", limits.turnover)
        out.append(cp.norm1(w - p.current) / 2 <= turnover)
    if limits.member_share is not None:
        share = groups.get("member_share", limits.member_share)
        out.append(cp.sum(w[p.benchmark > 0]) >= share)
    return out, z @ d


def check_one(seed):
    p, limits = random_problem(seed), random_limits(seed)
    found = Optimiser(limits).solve(p)
    assert found.status in ("optimal", "relaxed"), (seed, found.messages)
    assert (found.status == "relaxed") == bool(found.relaxations), seed
    assert bool(found.conflict) == bool(found.relaxations), seed
    groups, single = allowed(limits, found)
    w = cp.Variable(len(p.names))
    rows, gain = model(p, limits, groups, single, w)
    w.value = found.weights.to_numpy()
    worst = max(float(np.max(row.violation())) for row in rows)
    assert worst <= 1e-6, (seed, worst)
    problem = cp.Problem(cp.Maximize(gain), rows)
    if "ECOS" in cp.installed_solvers():
        # Not a dependency (GPL), but faster by far; the thousand were run with it.
        problem.solve(cp.ECOS, abstol=1e-9, reltol=1e-9, feastol=1e-9)
    if problem.status != "optimal":
        # SCS shares no algorithm with Clarabel: a first-order method.
        problem.solve(cp.SCS, eps_abs=1e-8, eps_rel=1e-8, max_iters=400_000)
    assert problem.status == "optimal", (seed, problem.status)
    return found, abs(found.objective - problem.value), problem.value


def check_many(seeds):
    relaxed = 0
    for seed in seeds:
        found, miss, value = check_one(seed)
        relaxed += found.status == "relaxed"
        assert miss <= 1e-5 * max(1, abs(value)), (seed, miss, found.relaxations)
    return relaxed


class TestAgainstAnIndependentSolver:
    def test_random_problems_keep_every_limit_and_reach_its_objective(self):
        relaxed = check_many(range(12))
        assert 1 <= relaxed < 12

    @pytest.mark.slow
    def test_a_thousand_random_problems(self):
        relaxed = check_many(range(1000))
        print(f"{relaxed} of 1000 problems were relaxed")
        assert 10 <= relaxed < 500


def small(**changes):
    """Six stocks, two industries, one style; the first four are the index."""
    n = 6
    industry = np.array([0, 0, 1, 1, 0, 1])
    style = np.array([1.0, -1.0, 1.0, -1.0, 2.0, 0.0])
    values = {
        "names": list("ABCDEF"),
        "alpha": np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        "benchmark": np.array([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]),
        "current": np.zeros(n),
        "exposures": np.column_stack(
            [np.ones(n), style, industry == 0, industry == 1]
        ).astype(float),
        "factors": ["country", "size", "industry_0", "industry_1"],
        "covariance": np.diag([0.04, 0.01, 0.01, 0.01]),
        "specific": np.full(n, 0.3),
        "can_buy": np.ones(n, bool),
        "can_sell": np.ones(n, bool),
    }
    return Problem(**{**values, **changes})


OFF = Limits(None, None, None, None, None)


class TestByHand:
    def test_without_limits_all_goes_into_the_best_stock(self):
        found = Optimiser(OFF).solve(small())
        assert found.weights.round(6).to_dict() == {**dict.fromkeys("ABCDE", 0), "F": 1}
        assert found.status == "optimal" and found.turnover == pytest.approx(0.5)

    def test_industry_and_cap_and_members_bind_where_they_should(self):
        limits = replace(OFF, industry=0.02, max_weight=0.3, member_share=0.8)
        alpha = np.array([0.0, 1.0, 2.0, 3.0, 4.5, 5.0])
        found = Optimiser(limits).solve(small(alpha=alpha))
        # 20 % outside the index: E, for F would take industry 1 (at most 52 %) from
        # C and D; D at its cap, C the rest of the industry, B what is left.
        hand = {"A": 0.0, "B": 0.28, "C": 0.22, "D": 0.3, "E": 0.2, "F": 0.0}
        assert found.weights.to_dict() == pytest.approx(hand, abs=1e-6)
        assert found.exposures["industry_1"] == pytest.approx(0.02, abs=1e-6)

    def test_tracking_error_of_a_known_deviation(self):
        current = np.array([0.15, 0.25, 0.25, 0.25, 0.0, 0.1])
        fixed = np.zeros(6, bool)
        found = Optimiser(OFF).solve(
            small(current=current, can_buy=fixed, can_sell=fixed)
        )
        # d = -0.1 A, +0.1 F: size -0.1, industries -0.1 and +0.1, specific 2 x 0.03².
        variance = 0.01 * (0.01 + 0.01 + 0.01) + 2 * 0.03**2
        assert found.tracking_error == pytest.approx(variance**0.5)
        assert found.solver == "fixed"

    def test_turnover_is_half_the_sum_of_changes(self):
        current = np.array([0.5, 0.5, 0, 0, 0, 0])
        found = Optimiser(replace(OFF, turnover=0.2)).solve(small(current=current))
        hand = {"A": 0.3, "B": 0.5, "C": 0, "D": 0, "E": 0, "F": 0.2}
        assert found.weights.to_dict() == pytest.approx(hand, abs=1e-6)
        assert found.turnover == pytest.approx(0.2, abs=1e-6)

    def test_what_cannot_be_bought_or_sold_stays(self):
        current = np.array([0.5, 0.5, 0, 0, 0, 0])
        buy = np.array([1, 1, 1, 1, 1, 0], bool)
        sell = np.array([0, 1, 1, 1, 1, 1], bool)
        found = Optimiser(OFF).solve(small(current=current, can_buy=buy, can_sell=sell))
        hand = {"A": 0.5, "B": 0, "C": 0, "D": 0, "E": 0.5, "F": 0}
        assert found.weights.to_dict() == pytest.approx(hand, abs=1e-6)
        assert found.counts["barred"] == 2

    def test_equal_scores_track_the_index(self):
        current = np.array([0.5, 0.5, 0, 0, 0, 0])
        found = Optimiser(Limits(turnover=None)).solve(
            small(alpha=np.full(6, 0.7), current=current)
        )
        assert found.weights[list("ABCD")].to_numpy() == pytest.approx(0.25, abs=1e-5)

    def test_a_stock_without_score_is_not_bought_above_its_benchmark_weight(self):
        alpha = np.array([0.0, 1.0, 2.0, np.nan, 4.0, np.nan])
        found = Optimiser(OFF).solve(small(alpha=alpha))
        assert found.weights["E"] == pytest.approx(1, abs=1e-6)
        current = np.array([0, 0, 0, 0, 0, 1.0])
        stays = Optimiser(replace(OFF, turnover=0.0)).solve(
            small(alpha=alpha, current=current)
        )
        assert stays.status == "optimal"  # held already: may stay
        assert stays.counts["without_score"] == 2

    def test_unknown_exposures_are_neutral_or_keep_a_stock_out(self):
        x = small().exposures.copy()
        x[5, 1] = np.nan
        p = small(exposures=x)
        assert Optimiser(OFF).solve(p).weights["F"] == pytest.approx(1, abs=1e-6)
        out = Optimiser(OFF, missing="exclude").solve(p)
        assert out.weights["F"] == 0 and out.weights["E"] == pytest.approx(1, abs=1e-6)
        assert out.counts["without_exposure"] == 1
        # Neutral is an exposure of 0: all of it in F is a size difference of 0.
        assert Optimiser(OFF).solve(p).exposures["size"] == pytest.approx(0, abs=1e-6)


class TestRelaxation:
    current = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])

    def test_names_the_conflict_and_gives_way_in_order(self):
        limits = replace(OFF, turnover=0.2, style=0.5)
        p = small(current=self.current)  # size 2 against 0: needs to sell much of E
        first = Optimiser(limits).solve(p)
        (only,) = first.relaxations
        assert (only.group, only.limit) == ("turnover", 0.2)
        # Size from 2 to 0.5 by swapping E for a stock with size -1: half of it.
        assert only.applied == pytest.approx(0.5, abs=1e-3)
        assert "turnover" in first.conflict and "style size (high)" in first.conflict
        other = Optimiser(limits, relax_order=("style", "turnover")).solve(p)
        (only,) = other.relaxations
        assert (only.group, only.name) == ("style", "size")
        # A fifth of E for size -1: 0.8 x 2 - 0.2.
        assert only.applied == pytest.approx(1.4, abs=2e-3)
        assert str(only) == f"style size 0.5 -> {only.applied:.4g}"

    def test_caps_are_named_in_a_conflict_only_where_they_bind(self):
        # No cap at all: stocks that are not sold are no evidence of one.
        limits = replace(OFF, turnover=0.2, style=0.5)
        found = Optimiser(limits).solve(small(current=self.current))
        assert not any("weight cap" in words for words in found.conflict)
        # E from 1 to its cap of 0.7 needs a turnover of 0.3.
        limits = replace(OFF, turnover=0.2, max_weight=0.7)
        found = Optimiser(limits).solve(small(current=self.current))
        assert found.conflict == ["invested", "turnover", "weight cap E"]
        assert found.relaxations[0].applied == pytest.approx(0.3, abs=1e-3)

    def test_the_relaxation_is_the_smallest_there_is(self):
        seen = 0
        for seed in range(22):
            p, limits = random_problem(seed, 25), random_limits(seed)
            found = Optimiser(limits).solve(p)
            if len(found.relaxations) != 1:
                continue
            (only,) = found.relaxations
            sign = 1 if only.applied > only.limit else -1
            excess = cp.Variable(nonneg=True)
            groups, single = {}, {}
            place = groups if only.group == only.name else single
            place[only.name] = only.limit + sign * excess
            w = cp.Variable(len(p.names))
            rows, _ = model(p, limits, groups, single, w)
            problem = cp.Problem(cp.Minimize(excess), rows)
            problem.solve(cp.SCS, eps_abs=1e-7, eps_rel=1e-7, max_iters=200_000)
            given = sign * (only.applied - only.limit)
            assert given == pytest.approx(1.001 * problem.value, rel=1e-3, abs=1e-5)
            seen += 1
        assert seen >= 2

    def test_a_group_not_listed_never_gives_way(self):
        limits = replace(OFF, turnover=0.2, style=0.5)
        found = Optimiser(limits, relax_order=()).solve(small(current=self.current))
        assert found.status == "failed" and not found.relaxations
        assert found.weights.to_numpy() == pytest.approx(self.current)

    def test_too_few_stocks_for_the_caps_leave_cash_only_at_the_end(self):
        found = Optimiser(
            replace(OFF, max_weight=0.3, max_multiple=1.0), relax_order=("invested",)
        ).solve(small(can_buy=np.array([0, 1, 1, 1, 1, 1], bool)))
        # B, C, D at a quarter each, E and F at 0.3: more than 1, so feasible.
        assert found.status == "optimal"
        none = Optimiser(OFF, relax_order=RELAX_ORDER).solve(
            small(can_buy=np.zeros(6, bool), current=np.array([0.4, 0, 0, 0, 0, 0]))
        )
        assert none.status == "relaxed" and none.weights["A"] <= 0.4 + 1e-9
        assert [r.group for r in none.relaxations] == ["invested"]

    def test_the_index_itself_is_always_allowed(self):
        for seed in range(10):
            p = random_problem(seed, 40)
            free = np.ones(40, bool)
            p = replace(p, can_buy=free, can_sell=free, current=np.zeros(40))
            limits = Limits(0.001, 0.001, 0.001, 0.01, 0.01, 1.0, 1.0)
            assert Optimiser(limits).solve(p).status == "optimal", seed


class WatchList(LinearLimit):
    """Weight of the stocks on a list together, at most `share`."""

    group = "watch_list"

    def __init__(self, share, stocks):
        self.share, self.stocks = share, list(stocks)

    def bind(self, x):
        """Count the stocks on the list with 1, others with 0."""
        on_list = np.isin(x.problem.names, self.stocks)
        return self.bound(self.share, numbers=on_list.astype(float))


class TestALimitOfOnesOwn:
    def test_binds_like_any_other(self):
        limits = replace(OFF, more=[WatchList(0.25, ["F", "E"])])
        found = Optimiser(limits).solve(small())
        # The best two stocks share a quarter (all in F), D takes the rest.
        hand = {"A": 0, "B": 0, "C": 0, "D": 0.75, "E": 0, "F": 0.25}
        assert found.weights.to_dict() == pytest.approx(hand, abs=1e-6)

    def test_gives_way_where_its_group_stands(self):
        current = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
        limits = replace(OFF, turnover=0.2, more=[WatchList(0.25, ["F", "E"])])
        p = small(current=current)
        found = Optimiser(limits, relax_order=("watch_list",)).solve(p)
        (only,) = found.relaxations
        assert (only.group, only.limit) == ("watch_list", 0.25)
        assert only.applied == pytest.approx(0.8, abs=1e-3)  # a fifth of E is sold
        assert "watch list" in found.conflict and "turnover" in found.conflict
        assert Optimiser(limits, relax_order=()).solve(p).status == "failed"

    def test_comes_from_a_config(self, monkeypatch):
        monkeypatch.setattr(limits_module, "WatchList", WatchList, raising=False)
        config = {
            "class": "WatchList",
            "module_path": "qlib_ext.portfolio.limits",
            "kwargs": {"share": 0.1, "stocks": ["A"]},
        }
        (limit,) = Limits.preset("wide", more=[config]).more
        assert (limit.share, limit.stocks) == (0.1, ["A"])
        told = Limits.preset("wide", more=[config]).describe()
        assert told["more"] == {"watch_list": {"share": 0.1, "stocks": ["A"]}}
        assert "more" not in Limits().describe()

    def test_needs_a_new_name(self):
        for wrong in (3, MemberShare(0.5)):
            with pytest.raises(ValueError, match="more"):
                Limits(more=[wrong])


class TestSolvers:
    def test_a_failing_solver_is_followed_by_the_next_and_said(self, monkeypatch):
        def fails(programme):
            raise RuntimeError("out of order")

        monkeypatch.setitem(module.CALLS, "CLARABEL", fails)
        p = random_problem(3)
        found = Optimiser(random_limits(3)).solve(p)
        assert found.solver == "SCS" and found.status == "optimal"
        assert any("out of order" in m for m in found.messages)
        assert any("OSQP: takes no" in m for m in found.messages)
        monkeypatch.undo()
        other = Optimiser(random_limits(3)).solve(p)
        assert found.objective == pytest.approx(other.objective, abs=1e-5)

    def test_osqp_solves_what_has_no_tracking_error_limit(self):
        p = random_problem(5)
        limits = replace(random_limits(5), tracking_error=None)
        found = Optimiser(limits, 2.0, solvers=("OSQP",)).solve(p)
        other = Optimiser(limits, 2.0).solve(p)
        assert (found.solver, other.solver) == ("OSQP", "CLARABEL")
        assert found.objective == pytest.approx(other.objective, abs=1e-5)

    def test_if_all_fail_the_result_says_so_and_holds(self, monkeypatch):
        wrong = module.Answer("NumericalError", None, None)
        for name in module.SOLVERS:
            monkeypatch.setitem(module.CALLS, name, lambda programme: wrong)
        p = random_problem(0)
        found = Optimiser().solve(p)
        assert (found.status, found.solver) == ("failed", "none")
        assert found.weights.to_numpy() == pytest.approx(p.current)
        assert len(found.messages) == 3

    def test_a_solver_that_misses_a_limit_is_not_believed(self, monkeypatch):
        def wrong(programme):
            n = len(programme.q)
            return module.Answer("optimal", np.full(n, 0.01), np.zeros(n))

        monkeypatch.setitem(module.CALLS, "CLARABEL", wrong)
        found = Optimiser(random_limits(3)).solve(random_problem(3))
        assert found.solver == "SCS"
        assert "missed by" in found.messages[0]

    def test_risk_aversion_against_cvxpy(self):
        p = random_problem(11, 30)
        found = Optimiser(OFF, risk_aversion=3.0).solve(p)
        w = cp.Variable(30)
        rows, gain = model(p, OFF, {}, {}, w)
        x = np.nan_to_num(p.exposures)
        s = np.where(np.isnan(p.specific), np.nanmax(p.specific), p.specific)
        sigma = x @ p.covariance @ x.T + np.diag(s**2)
        risk = cp.quad_form(w - p.benchmark, cp.psd_wrap(sigma))
        value = cp.Problem(cp.Maximize(gain - 3 * risk), rows).solve(cp.OSQP)
        assert found.objective == pytest.approx(value, abs=1e-4)


class TestProperties:
    def test_order_of_stocks_and_scale_of_scores_do_not_matter(self):
        p = random_problem(4)
        order = np.random.default_rng(0).permutation(len(p.names))
        moved = replace(
            p,
            names=[p.names[i] for i in order],
            exposures=p.exposures[order],
            **{
                k: 3 * p.alpha[order] + 1 if k == "alpha" else getattr(p, k)[order]
                for k in (
                    "alpha", "benchmark", "current", "specific", "can_buy", "can_sell"
                )
            },
        )  # fmt: skip
        one, two = (Optimiser(random_limits(4)).solve(q) for q in (p, moved))
        assert one.objective == pytest.approx(two.objective, abs=1e-6)
        together = pd.concat([one.weights, two.weights], axis=1)
        assert together.diff(axis=1).iloc[:, 1].abs().max() < 1e-4

    def test_pickles(self):
        optimiser = Optimiser(random_limits(2))
        before = optimiser.solve(random_problem(2)).objective
        again = pickle.loads(pickle.dumps(optimiser))
        assert again.solve(random_problem(2)).objective == pytest.approx(before)

    def test_frames_of_different_stocks_meet(self):
        risk = DayRisk(
            pd.Timestamp("2020-01-03"),
            pd.DataFrame(
                {"country": 1.0, "size": [0.5, np.nan, 1.0], "industry_1": [1.0, 0, 1]},
                index=["A", "B", "C"],
            ),
            pd.DataFrame(np.eye(3) / 100, *[["country", "size", "industry_1"]] * 2),
            pd.Series([0.2, 0.3, 0.4], ["A", "B", "C"]),
            pd.DataFrame({"roe": [1.0, 2.0, 3.0]}, index=["A", "B", "C"]),
        )
        p = make_problem(
            risk,
            score=pd.Series({"A": 1.0, "C": np.nan, "D": 2.0}),
            benchmark=pd.Series({"A": 0.5, "B": 0.5, "Z": 0.0}),
            current=pd.Series({"A": 0.98, "E": 0.02}),
            barred=["E"],
        )
        assert list(p.names) == ["A", "B", "D", "E"]
        assert p.factors == ["country", "size", "industry_1", "roe"]
        assert p.exposures[:, 0].tolist() == [1, 1, 1, 1]
        assert np.isnan(p.exposures[2, 1]) and p.exposures[2, 2] == 0
        assert not p.covariance[3].any()
        assert p.can_sell.tolist() == [True, True, True, False]
        # `roe` is no risk factor: only a limit of its own name holds it.
        limits = replace(OFF, style=0.1, named={"roe": 0.05, "surprise": 0.1})
        found = Optimiser(limits).solve(p)
        assert abs(found.exposures["roe"]) <= 0.05 + 1e-6
        assert found.counts["limits_left_out"] == 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "word"),
        [
            ({"missing": "guess"}, "missing"),
            ({"risk_aversion": -1}, "risk_aversion"),
            ({"risk_aversion": "7"}, "risk_aversion"),
            ({"relax_order": ["turnover", "turnover"]}, "relax_order"),
            ({"solvers": ["ECOS"]}, "solvers"),
            ({"solvers": []}, "solvers"),
        ],
    )
    def test_optimiser(self, kwargs, word):
        with pytest.raises(ValueError, match=word):
            Optimiser(**kwargs)

    @pytest.mark.parametrize(
        ("kwargs", "word"),
        [
            ({"style": -0.1}, "style"),
            ({"turnover": "much"}, "turnover"),
            ({"max_multiple": 0.5}, "max_multiple"),
            ({"member_share": 80}, "member_share"),
            ({"tracking_error": 5}, "tracking_error"),
            ({"industry": 2}, "industry"),
            ({"turnover": 20}, "turnover"),
            ({"max_weight": 3}, "max_weight"),
            ({"named": {"size": None}}, "size"),
            ({"named": 3}, "named"),
        ],
    )
    def test_limits(self, kwargs, word):
        with pytest.raises(ValueError, match=word):
            Limits(**kwargs)

    def test_presets(self):
        assert Limits.preset("wide", "csi300").tracking_error == 0.04
        assert Limits.preset("wide", "csi500").tracking_error == 0.05
        strict = Limits.preset("strict", "csi500", turnover=0.1, named={"size": 0.2})
        assert strict.named["size"] == 0.2 and strict.named["roe"] == 0.1
        assert strict.turnover == 0.1
        for name, more, word in (
            ("narrow", {}, "limits"),
            ("wide", {"tracking": 1}, "tracking"),
        ):
            with pytest.raises(ValueError, match=word):
                Limits.preset(name, **more)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"alpha": np.zeros(5)}, "alpha"),
            ({"benchmark": np.full(6, 0.3)}, "benchmark"),
            ({"current": np.full(6, -0.1)}, "current"),
            ({"invested": 0.0}, "invested"),
            ({"covariance": np.full((4, 4), np.nan)}, "covariance"),
        ],
    )
    def test_problem(self, changes, word):
        with pytest.raises(ValueError, match=word):
            small(**changes)
