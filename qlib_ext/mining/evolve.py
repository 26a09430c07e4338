"""Evolution of Qlib expressions towards RankIC, novelty and brevity.

PyGAD (BSD, numpy only) runs the loop of selection and variation; trees, their
variation and their evaluation are this package's. PyGAD's genes are numbers, so an
individual is one number: its tree's place in a list. pymoo would need LGPL code
(moocore), DEAP is LGPL itself, gplearn's trees know no time axis.

An expression is worth ``performance x (1 - parsimony x nodes) x (1 - similarity)``:
performance is the size of its RankIC or of its information ratio on training dates,
similarity the largest rank correlation with a better expression of the pool. The pool
holds what was mined: an expression enters if it beats everything in the pool that it
resembles, and takes its place.

Every generation is one JSON file in the work folder. A later run with the same numbers
walks through the finished generations without evaluating anything and goes on, so the
result is that of a run which was never stopped.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from numpy.random import RandomState

from data_handlers.arguments import (
    Count,
    NonNegative,
    check_arguments,
    check_number,
    check_whole,
)
from data_handlers.expression import BLOCK, Evaluator
from data_handlers.files import write_json
from qlib_ext.mining.expression import Grammar, Node, crossover, mutate, parse
from qlib_ext.mining.fitness import Score, rank_vectors, score_values
from qlib_ext.mining.panel import MiningPanel

__all__ = ["MineConfig", "Mined", "Miner"]

# Memory for the values of one batch, in bytes.
_BATCH = 256 * 2**20
_MIN_STOCKS = 10

Part = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class MineConfig:
    """What decides which expressions are found; budgets do not belong to it.

    Attributes
    ----------
    fields : tuple of str
        Names without ``$``.
    population : int, default 200
        Expressions of a generation.
    mined : int, default 185
        Size of the pool (docs/systems/gru_gat.md).
    kept : int, default 48
        The best of them (docs/systems/gru_gat.md).
    fitness : {"icir", "rank_ic"}, default "icir"
        Information ratio of RankIC, or its mean.
    max_corr : float, default 0.7
        Two expressions of the pool resemble each other less than this.
    min_coverage, keep_coverage : float, default 0.5 and 0.8
        Share of stock-days with a value: to be scored at all, and to be kept.
    parsimony : float, default 0.01
        Share of the performance that a node costs.
    subset_t : float, default 0.5
        Expressions whose RankIC on a fifth of the stocks has a smaller t-statistic are
        not scored on the others; 0 scores all.
    max_depth, max_size, max_look_back : int
        Levels of operators, nodes, and days that a value looks back.
    seed : int, default 0
    cross : bool, default False
        Compare the day's members as well (`CSRank`, `CSZScore`, `CSDemean`); only this
        package's handlers evaluate such expressions.
    group : str, optional
        Field of a stock's group, without ``$``, for these comparisons.
    block : int, default 64
        Stocks evaluated at once.
    """

    fields: tuple[str, ...]
    population: Annotated[int, Ge(4)] = 200
    mined: Count = 185
    kept: Count = 48
    fitness: Literal["icir", "rank_ic"] = "icir"
    max_corr: Part = 0.7
    min_coverage: Part = 0.5
    keep_coverage: Part = 0.8
    parsimony: NonNegative = 0.01
    subset_t: NonNegative = 0.5
    max_depth: Annotated[int, Ge(2)] = 5
    max_size: Annotated[int, Ge(3)] = 16
    max_look_back: Annotated[int, Ge(2)] = 250
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    cross: bool = False
    group: str | None = None
    block: Count = BLOCK

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if self.kept > self.mined:
            raise ValueError(
                f"`kept` ({self.kept}) must not exceed `mined` ({self.mined})."
            )
        if self.parsimony * self.max_size >= 1:
            raise ValueError(
                f"`parsimony` x `max_size` must stay below 1, got {self.parsimony} x "
                f"{self.max_size}."
            )


@dataclass(frozen=True)
class Try:
    """One evaluated expression.

    Attributes
    ----------
    text : str
    verdict : str
        ``scored``, or why not: ``coverage``, ``constant``, ``infinite``, ``weak``.
    fitness : float
        -1 for what could not be scored.
    score : Score
        Of the stocks that were looked at.
    """

    text: str
    verdict: str
    fitness: float
    score: Score


@dataclass(frozen=True)
class Mined:
    """Result of a search on the training years.

    Attributes
    ----------
    pool : list of Try
        Best first, at most `MineConfig.mined`.
    kept : list of Try
        Best first, at most `MineConfig.kept`.
    tries : int
        Expressions evaluated, rejected ones too.
    generations : int
    verdicts : dict of str to int
        Tries by verdict.
    variance : float
        Of the information ratio over the random expressions of the first generation.
    finished : bool
        False if the time ran out before the budget.
    """

    pool: list[Try]
    kept: list[Try]
    tries: int
    generations: int
    verdicts: dict[str, int]
    variance: float
    finished: bool


class Miner:
    """Searches for expressions on one panel.

    Parameters
    ----------
    panel : MiningPanel
        Training years.
    config : MineConfig
    work : Path, optional
        Folder of the generations; without it nothing can be resumed.
    cache_mib : float
        See `Evaluator`.

    Raises
    ------
    ValueError
        If `work` belongs to a search with other numbers or other data.
    """

    def __init__(
        self,
        panel: MiningPanel,
        config: MineConfig,
        work: Path | None = None,
        cache_mib: float = 512.0,
    ) -> None:
        self.panel, self.config, self.work = panel, config, work
        self.evaluator = Evaluator(panel, cache_mib, config.block)
        self.grammar = Grammar(
            *(config.fields, config.max_depth, config.max_size, config.max_look_back),
            *(config.cross, config.group),
        )
        self._trees: list[Node] = []
        self._memo: dict[str, Try] = {}
        self._pool: dict[str, np.ndarray | None] = {}
        self._sizes: dict[str, int] = {}
        self._first: list[str] = []
        # What the last generation tried for the first time.
        self.last_generation: list[Node] = []
        self._generation = 0
        self._recorded: list[dict[str, Any]] = []
        if work is not None:
            self._open(work)

    # ---------------------------------------------------------------- the loop

    def run(
        self,
        budget: int,
        minutes: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Mined:
        """Search until `budget` expressions were evaluated, or `minutes` have passed.

        The generation that reaches the budget is finished. `progress` is called with
        the number of tries and of expressions in the pool.

        Raises
        ------
        ValueError
            If `budget` or `minutes` is not positive, or the work folder's generations
            cannot be walked through again (another version of numpy or PyGAD).
        """
        import pygad

        check_whole("budget", budget, 1)
        if minutes is not None:
            check_number("minutes", minutes, 0, exclusive=True)
        began = time.monotonic()
        done = finished = False

        def fitness(ga: Any, solutions: Any, indices: Any) -> list[float]:
            nonlocal done, finished
            nodes = [self._trees[int(s[0])] for s in solutions]
            if done:
                return [0.0] * len(nodes)
            self._advance(nodes)
            if progress is not None:
                progress(len(self._memo), len(self._pool))
            finished = len(self._memo) >= budget
            late = minutes is not None and time.monotonic() - began >= minutes * 60
            # Finished generations are walked through whatever the time.
            done = finished or (late and self._generation >= len(self._recorded))
            return [self._memo[n.text].fitness for n in nodes]

        rng = RandomState(self.config.seed)
        self._trees = [self.grammar.draw(rng) for _ in range(self.config.population)]
        logger = logging.getLogger("qlib_ext.mining.pygad")
        # It logs what it raises; the caller sees the exception once.
        logger.setLevel(logging.CRITICAL + 1)
        pygad.GA(
            num_generations=10**9,
            num_parents_mating=self.config.population,
            fitness_func=fitness,
            fitness_batch_size=self.config.population,
            initial_population=[[k] for k in range(self.config.population)],
            gene_type=int,
            parent_selection_type="tournament",
            K_tournament=3,
            keep_elitism=0,
            keep_parents=0,
            crossover_type=self._cross,
            mutation_type=self._mutate,
            random_seed=self.config.seed,
            on_generation=lambda ga: "stop" if done else None,
            suppress_warnings=True,
            logger=logger,
        ).run()
        return self._result(finished)

    def _cross(self, parents: np.ndarray, size: tuple[int, int], ga: Any) -> np.ndarray:
        rng = ga.numpy_random_generator
        out = np.empty(size, int)
        for k in range(size[0]):
            a = int(parents[k % len(parents), 0])
            b = int(parents[(k + 1) % len(parents), 0])
            out[k] = a
            if rng.random_sample() < 0.6:
                child = crossover(self.grammar, rng, self._trees[a], self._trees[b])
                out[k] = self._add(child)
        return out

    def _mutate(self, offspring: np.ndarray, ga: Any) -> np.ndarray:
        """Change children now and then; what was seen before, always."""
        rng = ga.numpy_random_generator
        out = offspring.copy()
        seen: set[str] = set()
        for k in range(len(out)):
            node = self._trees[int(out[k, 0])]
            if rng.random_sample() < 0.1:
                node = self.grammar.draw(rng)
            elif rng.random_sample() < 0.4:
                node = mutate(self.grammar, rng, node)
            for attempt in range(8):
                if node.text not in self._memo and node.text not in seen:
                    break
                node = (
                    mutate(self.grammar, rng, node)
                    if attempt < 4
                    else self.grammar.draw(rng)
                )
            seen.add(node.text)
            out[k] = self._add(node)
        return out

    def _add(self, node: Node) -> int:
        self._trees.append(node)
        return len(self._trees) - 1

    # ---------------------------------------------------------------- a generation

    def _advance(self, nodes: list[Node]) -> None:
        new = list({n.text: n for n in nodes if n.text not in self._memo}.values())
        for node in new:
            self._sizes[node.text] = node.size
        self.last_generation = new
        if self._generation == 0:
            self._first = [n.text for n in new]
        if self._generation < len(self._recorded):
            self._replay(new)
        else:
            self._evaluate(new)
        self._generation += 1

    def _replay(self, new: list[Node]) -> None:
        record = self._recorded[self._generation]
        tries = [_try_from(entry) for entry in record["tries"]]
        if [t.text for t in tries] != [n.text for n in new]:
            raise ValueError(
                f"generation {self._generation} of {self.work} cannot be repeated: "
                "numpy or PyGAD has changed since. Delete the folder to start over."
            )
        for one in tries:
            self._memo[one.text] = one
        if self._generation == len(self._recorded) - 1:
            self._pool = dict.fromkeys(record["pool"])

    def _evaluate(self, new: list[Node]) -> None:
        self._restore_vectors()
        # A comparison is made for all days of all stocks.
        cells = self.panel.label.numel()
        if self.config.cross:
            cells = next(iter(self.panel.fields.values())).size
        step = max(1, _BATCH // (4 * cells))
        tries: dict[str, Try] = {}
        vectors: dict[str, np.ndarray] = {}
        for i in range(0, len(new), step):
            for node, one, vector in self._score(new[i : i + step]):
                tries[node.text] = one
                if vector is not None:
                    vectors[node.text] = vector
            self.evaluator.forget()
        old = list(self._pool)
        if old and vectors:
            names = list(vectors)
            alike = np.abs(
                np.stack([vectors[n] for n in names])
                @ np.stack([v for v in self._pool.values() if v is not None]).T
            )
            strength = np.array([self._strength(self._memo[m]) for m in old])
            for k, name in enumerate(names):
                better = strength > self._strength(tries[name])
                similar = float(alike[k][better].max(initial=0.0))
                tries[name] = Try(
                    name,
                    "scored",
                    self._strength(tries[name]) * (1 - min(1.0, similar)),
                    tries[name].score,
                )
        for node in new:
            self._memo[node.text] = tries[node.text]
        self._update_pool(vectors)
        if self.work is not None:
            write_json(
                self.work / f"generation_{self._generation:05d}.json",
                {
                    "tries": [_entry(tries[n.text]) for n in new],
                    "pool": list(self._pool),
                },
            )

    def _score(self, nodes: list[Node]) -> list[tuple[Node, Try, np.ndarray | None]]:
        """Score in two steps: a fifth of the stocks first, where there are enough."""
        panel, evaluator = self.panel, self.evaluator
        few = evaluator.n_blocks // 5 if self.config.subset_t else 0
        width = evaluator.slices[few - 1].stop if few else 0
        if width < 2 * _MIN_STOCKS:
            few = width = 0
        out: dict[str, tuple[Node, Try, np.ndarray | None]] = {}
        alive = nodes
        first = np.empty((len(nodes), len(panel.dates), 0), np.float32)
        if few:
            first = evaluator.evaluate(nodes, panel.dates, range(few))
            tries = self._judge(nodes, first, slice(0, width), self.config.subset_t)
            going = [k for k, one in enumerate(tries) if one.verdict == "scored"]
            for node, one in zip(nodes, tries, strict=True):
                out[node.text] = (node, one, None)
            alive, first = [nodes[k] for k in going], first[going]
        if alive:
            rest = evaluator.evaluate(
                alive, panel.dates, range(few, evaluator.n_blocks)
            )
            values = np.concatenate([first, rest], axis=-1)
            tries = self._judge(alive, values, slice(None), 0.0)
            vectors = rank_vectors(values, panel.expected)
            for node, one, vector in zip(alive, tries, vectors, strict=True):
                scored = one.verdict == "scored"
                out[node.text] = (node, one, vector if scored else None)
        return [out[n.text] for n in nodes]

    def _judge(
        self, nodes: list[Node], values: np.ndarray, stocks: slice, least_t: float
    ) -> list[Try]:
        panel, config = self.panel, self.config
        scores, _ = score_values(
            values, panel.label[:, stocks], panel.expected[:, stocks], _MIN_STOCKS
        )
        tries = []
        # Infinite values are of no use to a model, and their sign may be a matter of
        # rounding: a division by a difference that is zero.
        infinite = (np.isinf(values) & panel.expected[:, stocks]).any((1, 2))
        for node, score, endless in zip(nodes, scores, infinite, strict=True):
            if endless or self.evaluator.is_unstable(node):
                verdict = "infinite"
            elif score.coverage < config.min_coverage:
                verdict = "coverage"
            elif score.dates < 0.8 * len(panel.dates) or not math.isfinite(score.ic_ir):
                verdict = "constant"
            elif abs(score.ic_ir) * math.sqrt(score.dates) < least_t:
                verdict = "weak"
            else:
                verdict = "scored"
            one = Try(node.text, verdict, -1.0, score)
            if verdict == "scored":
                one = Try(node.text, verdict, self._strength(one), score)
            elif verdict == "weak":
                one = Try(node.text, verdict, 0.0, score)
            tries.append(one)
        return tries

    def _strength(self, one: Try) -> float:
        """Reduce performance by the price of size, whatever it resembles."""
        figure = one.score.ic_ir if self.config.fitness == "icir" else one.score.rank_ic
        return abs(figure) * (1 - self.config.parsimony * self._sizes[one.text])

    # ---------------------------------------------------------------- the pool

    def _update_pool(self, vectors: dict[str, np.ndarray]) -> None:
        order = sorted(vectors, key=lambda n: (-self._strength(self._memo[n]), n))
        for name in order:
            strength = self._strength(self._memo[name])
            rivals = []
            if self._pool:
                stack = np.stack([v for v in self._pool.values() if v is not None])
                alike = np.abs(stack @ vectors[name])
                rivals = [
                    m
                    for m, a in zip(self._pool, alike, strict=True)
                    if a >= self.config.max_corr
                ]
            if any(self._strength(self._memo[m]) >= strength for m in rivals):
                continue
            for rival in rivals:
                del self._pool[rival]
            self._pool[name] = vectors[name]
            if len(self._pool) > self.config.mined:
                weakest = min(
                    self._pool, key=lambda n: (self._strength(self._memo[n]), n)
                )
                del self._pool[weakest]

    def _restore_vectors(self) -> None:
        missing = [n for n, v in self._pool.items() if v is None]
        step = max(1, _BATCH // (4 * self.panel.expected.size))
        for i in range(0, len(missing), step):
            part = missing[i : i + step]
            values = self.evaluator.evaluate([parse(n) for n in part], self.panel.dates)
            for name, vector in zip(
                part, rank_vectors(values, self.panel.expected), strict=True
            ):
                self._pool[name] = vector

    def _result(self, finished: bool) -> Mined:
        config = self.config
        pool = sorted(
            (self._memo[n] for n in self._pool),
            key=lambda t: (-self._strength(t), t.text),
        )
        # "Past performance and completeness": the report gives no formula. Both are
        # asked for, as a floor and as a factor.
        complete = [t for t in pool if t.score.coverage >= config.keep_coverage]
        complete.sort(key=lambda t: (-self._strength(t) * t.score.coverage, t.text))
        ratios = [
            self._memo[n].score.ic_ir
            for n in self._first
            if self._memo[n].verdict in ("scored", "weak")
        ]
        return Mined(
            pool=pool,
            kept=complete[: config.kept],
            tries=len(self._memo),
            generations=self._generation,
            verdicts=dict(
                sorted(Counter(t.verdict for t in self._memo.values()).items())
            ),
            variance=float(np.var(ratios)) if len(ratios) > 1 else 0.0,
            finished=finished,
        )

    # ---------------------------------------------------------------- on disk

    def _open(self, work: Path) -> None:
        """Read what an earlier run with the same numbers has finished."""
        own = json.loads(json.dumps(asdict(self.config)))
        own["days"] = [str(self.panel.days[0].date()), str(self.panel.days[-1].date())]
        own["data"] = self.panel.checksum
        file = work / "search.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            for name in [*own, *before]:
                if own.get(name) != before.get(name):
                    raise ValueError(
                        f"{work} belongs to another search: its `{name}` was "
                        f"{before.get(name)!r}, now {own.get(name)!r}. Give another "
                        "`out`, or start over (`--fresh`)."
                    )
        else:
            work.mkdir(parents=True, exist_ok=True)
            write_json(file, own)
        while (found := work / f"generation_{len(self._recorded):05d}.json").is_file():
            self._recorded.append(json.loads(found.read_text(encoding="utf-8")))


def _entry(one: Try) -> list[Any]:
    numbers = [getattr(one.score, f.name) for f in fields(Score)]
    safe = [
        None if isinstance(v, float) and not math.isfinite(v) else v for v in numbers
    ]
    return [one.text, one.verdict, one.fitness, *safe]


def _try_from(entry: list[Any]) -> Try:
    text, verdict, value, *numbers = entry
    names = [f.name for f in fields(Score)]
    known: list[Any] = [math.nan if v is None else v for v in numbers]
    score = Score(**dict(zip(names, known, strict=True)))
    return Try(text, verdict, value, score)
