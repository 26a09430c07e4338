"""Optimiser: first and repeated solves against Qlib's and plain cvxpy, and a back-test.

One problem at a time, as weekly rebalancing poses them: scores and holdings move a
little, exposures and risk stay. "common" is the problem that Qlib's
`EnhancedIndexingOptimizer` solves (risk in the objective, bounds around the benchmark,
turnover), which ours and plain cvxpy solve too; "full" has all constraints of
the reports, which Qlib's does not have. Qlib's needs ECOS (GPL, no dependency of ours;
`pip install ecos`); without it the row says so.

    OMP_NUM_THREADS=1 python benchmarks/optimise.py [--quick] [--json FILE] [--backtest]

"cpu" is processor time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import environment, parser, show

from qlib_ext.portfolio import Limits, Optimiser, Problem

STYLES, INDUSTRIES = 10, 29  # with the country, 40 factors


def make(n: int, seed: int = 0) -> Problem:
    """Build a market of n stocks, an index of 3/8 of them, and holdings around it."""
    rng = np.random.default_rng(seed)
    industry = rng.integers(0, INDUSTRIES, n)
    x = np.column_stack(
        [
            np.ones(n),
            rng.standard_normal((n, STYLES)),
            industry[:, None] == np.arange(INDUSTRIES),
        ]
    ).astype(float)
    k = x.shape[1]
    scale = np.r_[0.2, np.full(STYLES, 0.04), np.full(INDUSTRIES, 0.1)]
    a = rng.standard_normal((k, 3 * k)) / np.sqrt(3 * k)
    covariance = (a @ a.T + np.eye(k)) / 2 * np.outer(scale, scale)
    benchmark = np.zeros(n)
    members = rng.permutation(n)[: n * 3 // 8]
    benchmark[members] = rng.lognormal(size=len(members))
    benchmark /= benchmark.sum()
    free = rng.random(n) > 0.01
    return Problem(
        names=[f"S{i:04d}" for i in range(n)],
        alpha=rng.standard_normal(n),
        benchmark=benchmark,
        current=benchmark,
        exposures=x,
        factors=[
            "country",
            *(f"style_{i}" for i in range(STYLES)),
            *(f"industry_{i}" for i in range(INDUSTRIES)),
        ],
        covariance=covariance,
        specific=rng.uniform(0.2, 0.4, n),
        can_buy=free,
        can_sell=free,
    )


def next_week(p: Problem, weights: np.ndarray, week: int) -> Problem:
    """Move the scores, and start from what was bought."""
    rng = np.random.default_rng([7, week])
    alpha = 0.9 * p.alpha + 0.44 * rng.standard_normal(len(p.alpha))
    held = np.where(weights > 1e-6, weights, 0.0)
    held = held * np.exp(0.03 * rng.standard_normal(len(held)))
    return replace(p, alpha=alpha, current=held / held.sum())


def ours(limits: Limits, risk_aversion: float) -> Any:
    """Return this package's optimiser as a function of a problem."""
    optimiser = Optimiser(limits, risk_aversion)

    def solve(p: Problem) -> tuple[np.ndarray, str]:
        found = optimiser.solve(p)
        return found.weights.to_numpy(), found.status

    return solve


def plain_cvxpy(limits: Limits, risk_aversion: float) -> Any:
    """Return the problem written anew in cvxpy every week, as most scripts do."""
    import cvxpy as cp

    def solve(p: Problem) -> tuple[np.ndarray, str]:
        z = (p.alpha - p.alpha.mean()) / p.alpha.std()
        w = cp.Variable(len(z), nonneg=True)
        d = w - p.benchmark
        v = d @ p.exposures
        values, vectors = np.linalg.eigh(p.covariance)
        root = vectors * np.sqrt(values.clip(0))
        risk = cp.hstack([v @ root, cp.multiply(p.specific, d)])
        stuck = ~(p.can_buy & p.can_sell)
        cap = np.maximum(limits.max_weight, p.benchmark)
        cap = np.where(stuck, np.maximum(cap, p.current), cap)
        rows = [cp.sum(w) == 1, w <= cap, w[stuck] == p.current[stuck]]
        if limits.turnover is not None:
            rows.append(cp.norm1(w - p.current) <= 2 * limits.turnover)
        if limits.tracking_error is not None:
            rows.append(cp.norm(risk) <= limits.tracking_error)
        for at, limit in (
            (slice(1, 1 + STYLES), limits.style),
            (slice(1 + STYLES, None), limits.industry),
        ):
            if limit is not None:
                rows.append(cp.abs(v[at]) <= limit)
        gain = z @ d
        if risk_aversion:
            gain = gain - risk_aversion * cp.sum_squares(risk)
        problem = cp.Problem(cp.Maximize(gain), rows)
        problem.solve(cp.CLARABEL)
        return np.asarray(w.value), problem.status

    return solve


def qlibs(limits: Limits, risk_aversion: float) -> Any:
    """Return Qlib's own optimiser; None without ECOS."""
    import cvxpy as cp

    if "ECOS" not in cp.installed_solvers():
        return None
    from qlib.contrib.strategy.optimizer import EnhancedIndexingOptimizer

    optimiser = EnhancedIndexingOptimizer(
        lamb=risk_aversion,
        delta=2 * limits.turnover,
        b_dev=limits.max_weight,
        scale_return=False,
        epsilon=0.0,
    )

    def solve(p: Problem) -> tuple[np.ndarray, str]:
        z = (p.alpha - p.alpha.mean()) / p.alpha.std()
        stuck = ~(p.can_buy & p.can_sell)
        w = optimiser(
            z, p.exposures, p.covariance, p.specific**2, p.current, p.benchmark, stuck
        )
        held = np.array_equal(w, p.current)
        return w, "held (failed)" if held else "optimal"

    return solve


def time_weeks(name: str, kind: str, p: Problem, solve: Any, weeks: int) -> dict:
    """Solve the same weeks one after the other."""
    row: dict[str, Any] = {"problem": kind, "stocks": len(p.names), "solver": name}
    if solve is None:
        return {**row, "note": "ECOS is not installed"}
    seconds, cpu, statuses = [], [], []
    for week in range(weeks):
        began = time.perf_counter(), time.process_time()
        weights, status = solve(p)
        seconds.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
        statuses.append(status)
        if week == 0:
            z = (p.alpha - p.alpha.mean()) / p.alpha.std()
            row["first objective"] = float(z @ (weights - p.benchmark))
        p = next_week(p, weights, week)
    row["first s"] = seconds[0]
    row["repeated s"] = statistics.median(seconds[1:])
    row["first cpu s"] = cpu[0]
    row["repeated cpu s"] = statistics.median(cpu[1:])
    row["note"] = ", ".join(sorted(set(statuses)))
    return row


def time_backtest(stocks: int, years: int) -> dict:
    """Weekly back-test of noise scores on a simulated market, risk model apart."""
    import logging

    import pandas as pd
    import qlib
    from qlib.backtest import backtest

    from qlib_ext.market import make_market
    from qlib_ext.portfolio import (
        BoardExchange,
        IndexEnhancementStrategy,
        build_risk_model,
    )

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "market"
        make_market(store, stocks=stocks, years=years + 2, seed=1)
        qlib.init(
            provider_uri=str(store), region="cn", kernels=1,
            logging_level=logging.ERROR,
        )  # fmt: skip
        oracle = pd.read_parquet(f"{store}.oracle.parquet")
        score = oracle.set_index(["datetime", "instrument"])["total"]
        end = score.index.get_level_values(0).max() - pd.Timedelta(days=5)
        start = end - pd.Timedelta(days=365 * years)
        began = time.perf_counter()
        root = Path(folder) / "model"
        build_risk_model(root, start - pd.Timedelta(days=10), end)
        risk = time.perf_counter() - began
        strategy = IndexEnhancementStrategy(
            signal=score, market="csi500", riskmodel_root=str(root)
        )
        began, cpu = time.perf_counter(), time.process_time()
        backtest(
            start,
            end,
            strategy,
            {
                "class": "SimulatorExecutor",
                "module_path": "qlib.backtest.executor",
                "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
            },
            benchmark="SH000905",
            account=1e8,
            exchange_kwargs={"exchange": BoardExchange(start_time=start, end_time=end)},
        )
        seconds = time.perf_counter() - began
        cpu = time.process_time() - cpu
        history = strategy.history_frame()
        return {
            "problem": f"back-test, {years} years weekly",
            "stocks": stocks,
            "solver": "ours",
            "repeated s": float(history["seconds"].median()),
            "total s": seconds,
            "total cpu s": cpu,
            "risk model s": risk,
            "note": ", ".join(
                f"{k} {v}" for k, v in history["status"].value_counts().items()
            ),
        }


def main() -> None:
    p = parser(__doc__ or "", threads=1)
    p.add_argument("--backtest", action="store_true", help="also the back-test")
    p.add_argument("--only-backtest", action="store_true", help="nothing else")
    args = p.parse_args()
    env = environment(args.threads)
    warnings.simplefilter("ignore")
    sizes = (200,) if args.quick else (800, 3000)
    weeks = 3 if args.quick else 6
    common = Limits(None, None, None, 0.2, 0.03)
    full = Limits(0.04)
    rows: list[dict] = []
    for n in () if args.only_backtest else sizes:
        market = make(n)
        # Bounds of ours are caps, of Qlib's a band around the benchmark: of interest
        # is the time, the objectives differ.
        for name, make_solver in (
            ("ours", ours),
            ("plain cvxpy", plain_cvxpy),
            ("Qlib, ECOS", qlibs),
        ):
            solver = make_solver(common, 10.0)
            rows.append(time_weeks(name, "common", market, solver, weeks))
        for name, make_solver in (("ours", ours), ("plain cvxpy", plain_cvxpy)):
            solver = make_solver(full, 0.0)
            rows.append(time_weeks(name, "full", market, solver, weeks))
    if args.backtest or args.only_backtest:
        rows.append(time_backtest(*(100, 1) if args.quick else (800, 5)))
    show("Index enhancement: 40 factors, seconds a rebalancing", rows, env, args.json)


if __name__ == "__main__":
    main()
