"""Expressions evaluated a second: `qlib-ext mine` against Qlib's own engine.

python benchmarks/mine.py --store DIR [--quick] [--json FILE] [--threads 1]

The expressions are those that a search really meets: its first generation, and one
after some evolution. Both sides give every expression's value on every stock and day
of the range. Qlib's side is `D.features` on the same store in one process
(`kernels=1`), all expressions of a chunk in one call, its memory cache for the fields
and subexpressions of a stock as by default and emptied before each chunk, its disk
caches off (as by default). It works stock by stock, so it is timed on a sample of the
expressions and of the stocks, and its time multiplied by all stocks over those sampled.
Ours is timed on all of both, starting with an empty cache as well. A third row is the
search as a whole: early rejection, RankIC, similarity to the pool and variation
included, against Qlib's engine giving the values alone.

Times are processor seconds of this process (the machine may be shared); values of both
sides are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import qlib
from harness import environment, parser, show
from numpy.random import RandomState
from qlib.data import D
from qlib.data.cache import H

from data_handlers.arguments import parse_range
from qlib_ext.market import make_market
from qlib_ext.mining import Evaluator, MineConfig, Miner, mining_panel, parse
from qlib_ext.mining.search import default_fields


def qlib_seconds(texts, panel, stocks, chunk=10):
    """Seconds that D.features takes an expression, and the values of the last chunk."""
    D.features(stocks[:1], texts[:1], panel.days[0], panel.days[-1])
    spent = 0.0
    for i in range(0, len(texts), chunk):
        H.clear()
        began = time.process_time()
        values = D.features(stocks, texts[i : i + chunk], panel.days[0], panel.days[-1])
        spent += time.process_time() - began
    return spent / len(texts) * len(panel.instruments) / len(stocks), values


def our_seconds(nodes, panel, cache_mib, rounds):
    """Least seconds an expression over the rounds, each with an empty cache."""
    best = float("inf")
    for _ in range(rounds):
        evaluator = Evaluator(panel, cache_mib)
        began = time.process_time()
        for i in range(0, len(nodes), 100):
            evaluator.evaluate(nodes[i : i + 100])
        best = min(best, time.process_time() - began)
    return best / len(nodes), evaluator.computed / evaluator.n_blocks / len(nodes)


def difference(nodes, frame, panel):
    """Median and largest difference, relative to an expression's own spread.

    Relative to single values it is unbounded: where a sum cancels, running sums that
    began on another day leave other last digits behind, in Qlib as well as here.

    Qlib reads days before the panel's first one for the windows of its first days, so
    the days are compared that have the longest window behind them on both sides.
    """
    later = panel.days[panel.dates[0]]
    frame = frame[frame.index.get_level_values("datetime") >= later]
    values = Evaluator(panel).evaluate(nodes)
    day = panel.days.get_indexer(frame.index.get_level_values("datetime"))
    place = {code: k for k, code in enumerate(panel.instruments)}
    stock = frame.index.get_level_values("instrument").map(place).to_numpy()
    ours = values[:, day, stock].astype(float)
    theirs = frame.to_numpy(float).T
    if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        raise SystemExit("the two sides differ in what is missing: not comparable.")
    gaps = []
    for a, b in zip(ours, theirs, strict=True):
        known = np.isfinite(b)
        if known.any() and b[known].std() > 0:
            gaps.append(np.abs(a - b)[known].max() / b[known].std())
    return float(np.median(gaps)), float(np.max(gaps))


def main() -> None:
    p = parser(__doc__, threads=1)
    p.add_argument("--store", help="Qlib day store (default: a simulated one)")
    p.add_argument("--range", default="2013:2016", help="days (default %(default)s)")
    args = p.parse_args()
    env = environment(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = args.store
        if store is None:
            store = make_market(Path(folder) / "market", stocks=300, years=8)
        qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=40)
        start, end = parse_range(args.range, "range")
        names = default_fields("all", start, end)
        panel = mining_panel(names, "all", start, end)
        population = 100 if args.quick else 200
        config = MineConfig(fields=names, population=population, subset_t=0.5)
        miner = Miner(panel, config)
        warm = [parse(t) for t in ("Mean($close,5)", "Std($close,5)")]
        Evaluator(panel).evaluate(warm)
        began = time.process_time()
        mined = miner.run(population * (3 if args.quick else 10))
        search = (time.process_time() - began) / mined.tries
        rng = RandomState(0)
        generations = {
            "first generation": [miner.grammar.draw(rng) for _ in range(population)],
            f"generation {mined.generations}": miner.last_generation,
        }
        rows = []
        sample = 20 if args.quick else 60
        few = min(len(panel.instruments), 60 if args.quick else 150)
        stocks = list(rng.choice(panel.instruments, few, replace=False))
        for name, nodes in generations.items():
            some = [nodes[k] for k in rng.choice(len(nodes), sample, replace=False)]
            theirs, frame = qlib_seconds([n.text for n in some], panel, stocks)
            middle, gap = difference(some[-len(frame.columns) :], frame, panel)
            rounds = 1 if args.quick else 3
            ours, operators = our_seconds(nodes, panel, 512.0, rounds)
            rows.append(
                {
                    "expressions": name,
                    "operators each": float(np.mean([_operators(n) for n in nodes])),
                    "calculated each": operators,
                    "Qlib, a second": 1 / theirs,
                    "ours, a second": 1 / ours,
                    "times": theirs / ours,
                    "difference, median": f"{middle:.1e}",
                    "largest": f"{gap:.1e}",
                }
            )
        last = rows[-1]
        rows.append(
            {
                "expressions": "search as a whole",
                "Qlib, a second": last["Qlib, a second"],
                "ours, a second": 1 / search,
                "times": 1 / search / last["Qlib, a second"],
            }
        )
        show(
            f"Expressions evaluated a second, {len(panel.instruments)} stocks, "
            f"{len(panel.days)} days, one process",
            rows,
            env,
            args.json,
        )


def _operators(node) -> int:
    return sum(1 for _, n in node.walk() if n.args)


if __name__ == "__main__":
    main()
