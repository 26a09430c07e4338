"""The checks of an audit: each looks for one way in which the future leaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset.handler import DataHandlerLP
from scipy.stats import t as student

from qlib_ext.audit.batches import SAME
from qlib_ext.audit.compare import (
    Difference,
    compare_frames,
    compare_rows,
    compare_scores,
)
from qlib_ext.audit.config import is_date
from qlib_ext.audit.execution import execution
from qlib_ext.audit.origin import check_reaction, foresight, history, over_time, sources
from qlib_ext.audit.subject import (
    Subject,
    are_few,
    groups_of,
    in_order,
    tensor_of,
    walk,
)
from qlib_ext.audit.verdict import Verdict
from qlib_ext.dataset import Panel, check_purge, handler_label_reach, segment_ends
from qlib_ext.graphs import EdgeSeries, Graph, make_graphs
from qlib_ext.ingest.store import read_instruments
from qlib_ext.metrics import newey_west_se, rank_ic

__all__ = ["CHECKS", "Check"]

# A hole pattern that predicts labels: correlation with a label or its size, and how
# many standard errors from zero.
HOLE_EFFECT, HOLE_T = 0.05, 4.0
_THREE_SIGMA = 0.00135  # of a normal variable above three standard deviations
FEWEST_DAYS = 20  # with a RankIC, to judge one
LONG = 400  # trading days after which an index has had reviews
# Of all stocks at least this share leaves a market within LONG days; A-shares: .3 to
# 1 % a year, and a store holds several.
SURVIVORS, FEWEST_STOCKS = 0.005, 50
EXPECTED = 5.0  # of a list of codes that had to leave, if none does by chance: e^-5


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes
    ----------
    title, question : str
        What the page says it looks for.
    run : callable
        Takes the `Subject`, returns a `Verdict`; an exception is "could not run".
    """

    title: str
    question: str
    run: Callable[[Subject], Verdict]


# ---------------------------------------------------------------- what the data know
def fit_windows(subject: Subject) -> Verdict:
    """Processors learn within the training segment and nowhere else."""
    rows, wrong = [], []
    days = subject.calendar
    for name, dataset in subject.datasets().items():
        handler = dataset.handler
        if not isinstance(handler, DataHandlerLP):
            continue
        spans = {k: segment_ends(v) for k, v in dataset.segments.items()}
        start, end = spans.pop("train")
        moved = _moved_states(subject) if dataset is subject.dataset("full") else {}
        for at, processor in enumerate(handler.get_all_processors()):
            what = f"{name} {type(processor).__name__}".strip()
            learned = hasattr(processor, "fit_end_time")
            window = tuple(
                getattr(processor, f"fit_{k}_time", None) for k in ("start", "end")
            )
            problem = moved.get(at, "")
            if learned:
                window_problem = _window_problem(window, (start, end), spans, days)
                problem = window_problem or problem
            if not learned and not problem:
                continue
            rows.append(
                {
                    "processor": what,
                    "fit from": _day(window[0]) if learned else "no window",
                    "fit to": _day(window[1]) if learned else "no window",
                    "train": f"{_day(start)} to {_day(end)}",
                    "problem": problem or "–",
                }
            )
            if problem:
                wrong.append(f"{what}: {problem}")
    table = pd.DataFrame(rows).set_index("processor") if rows else None
    if wrong:
        return Verdict.fail("; ".join(wrong), table)
    if not rows:
        return Verdict.skip("no processor learns from a fit window")
    return Verdict.passed(
        f"{len(rows)} learned processor(s), all fitted within train; none changes when "
        f"the bars after {subject.day:%Y-%m-%d} do",
        table,
    )


def _window_problem(window, train, later, days) -> str:
    if window[1] is None:
        return "no `fit_end_time`: it learns from the test segment too"
    end = pd.Timestamp(window[1])
    over = days[(days > train[1]) & (days <= end)] if train[1] is not None else days[:0]
    if len(over):
        return f"fitted until {_day(end)}, {len(over)} trading days beyond train"
    first = pd.Timestamp.min if window[0] is None else pd.Timestamp(window[0])
    for name, (start, stop) in later.items():
        inside = days[(days >= first) & (days <= end)]
        if start is not None:
            inside = inside[inside >= start]
        if stop is not None:
            inside = inside[inside <= stop]
        if len(inside):
            return f"fitted on {len(inside)} days of `{name}`"
    return ""


def _moved_states(subject: Subject) -> dict[int, str]:
    """Processors whose learned state depends on days after the audit's day."""
    both = [subject.dataset(k).handler.get_all_processors() for k in ("full", "noise")]
    found = {}
    for at, (one, two) in enumerate(zip(*both, strict=True)):
        for name, value in vars(one).items():
            other = vars(two).get(name)
            if _numbers(value) and not _equal(value, other):
                found[at] = (
                    f"`{name}` changes with the bars after {subject.day:%Y-%m-%d}"
                )
                break
    return found


def _numbers(value: Any) -> bool:
    return isinstance(
        value, (int, float, np.ndarray, np.generic, pd.Series, pd.DataFrame)
    ) and not isinstance(value, bool)


def _equal(one: Any, two: Any) -> bool:
    try:
        a, b = np.asarray(one, float), np.asarray(two, float)
    except (TypeError, ValueError):
        return True  # texts and objects: not numbers that were learned
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=True))


def purge(subject: Subject) -> Verdict:
    """Between segments lie as many trading days as a label reaches ahead."""
    notes, wrong, rows = [], [], []
    declared, measured = None, None
    try:
        declared, measured = subject.reach()
    except ValueError as error:
        notes.append(str(error))
        declared = handler_label_reach(subject.dataset("full").handler)
    if measured is not None and declared is not None and measured > declared:
        wrong.append(
            f"labels change with bars {measured} trading days ahead, but the handler "
            f"says {declared}"
        )
    for name, dataset in subject.datasets().items():
        reach = max(
            (r for r in (handler_label_reach(dataset.handler), declared) if r),
            default=0,
        )
        reach = max(reach, measured or 0)
        if not reach:
            raise RuntimeError(
                "it cannot be told how far the labels reach: " + "; ".join(notes)
            )
        short = {
            (earlier, later): (gap, last)
            for earlier, later, gap, last in check_purge(
                dataset.segments, subject.calendar, reach
            )
        }
        for (earlier, later), gap in _gaps(dataset.segments, subject.calendar).items():
            border = f"{name} {earlier} | {later}".strip()
            rows.append({"border": border, "days between": gap, "reach": reach})
            if (earlier, later) in short:
                last = short[earlier, later][1]
                wrong.append(
                    f"{gap} trading days between `{earlier}` and `{later}`, the label "
                    f"reaches {reach}: end `{earlier}` at {_day(last)} or earlier"
                )
    table = pd.DataFrame(rows).set_index("border") if rows else None
    styles = {"days between": ("days between", "i"), "reach": ("label reaches", "i")}
    if wrong:
        return Verdict.fail("; ".join(wrong), table, notes, styles)
    told = "" if measured is None else f", measured {measured}"
    return Verdict.passed(
        f"labels reach {max(declared or 0, measured or 0)} trading days ahead{told}; "
        + ", ".join(f"{row['days between']} between {row['border']}" for row in rows),
        table,
        notes,
        styles,
    )


def _gaps(segments, days: pd.DatetimeIndex) -> dict[tuple[str, str], int]:
    spans = sorted(
        (*days.slice_locs(*segment_ends(segment)), name)
        for name, segment in segments.items()
    )
    return {(a[2], b[2]): int(b[0] - a[1]) for a, b in itertools.pairwise(spans)}


def membership(subject: Subject) -> Verdict:
    """Who is a member after a day has no say in which rows there are before it."""
    from qlib_ext.audit.subject import _universe

    found = subject.drawn_rows()
    rows = compare_rows("rows", found["full"], found["members"], subject.day)
    universe = _universe(subject.task["dataset"])
    notes, wrong = [], []
    if rows.leaks:
        wrong.append(
            f"with other members and delistings after {subject.day:%Y-%m-%d}, "
            f"{rows.lost} earlier rows are gone and {rows.added} are new"
        )
    spans = read_instruments(subject.source)
    last = subject.calendar[-1]
    end = spans.groupby("instrument")["end"].max()
    if isinstance(universe, str) and universe.lower() != "all":
        members = read_instruments(subject.source, universe)
        trades_on = members["instrument"].map(end)
        left = (members["end"] < trades_on) & (members["end"] < last)
        if not left.any() and len(subject.calendar) >= LONG:
            wrong.append(
                f"no stock ever left {universe!r} while it still traded, in "
                f"{len(subject.calendar)} trading days: the file holds one day's "
                "members for all days"
            )
        else:
            notes.append(f"{int(left.sum())} removals from {universe!r}")
    gone = int((end < last).sum())
    if isinstance(universe, (list, tuple)):
        own = end[end.index.isin({str(code).upper() for code in universe})]
        expected = gone / max(1, len(end)) * len(own)
        if expected >= EXPECTED and not (own < last).any():
            wrong.append(
                f"none of the {len(own)} codes that are listed leaves the store before "
                f"its last day, of all {len(end)} stocks {gone} do: chosen by survival"
            )
        notes.append(
            "the universe is a list of codes: whether it was known at the time cannot "
            "be told from here"
        )
    if gone < SURVIVORS * len(end) and len(subject.calendar) >= LONG:
        text = (
            f"{gone} of {len(end)} stocks leave the store before its last day, in "
            f"{len(subject.calendar)} trading days: survivors only, which flatters "
            "every figure"
        )
        # Of a few stocks none may have left.
        (wrong if len(end) >= FEWEST_STOCKS else notes).append(text)
    if wrong:
        return Verdict.fail("; ".join(wrong), None, notes)
    return Verdict.passed(
        f"{rows.values:,} rows up to {subject.day:%Y-%m-%d} stay when members and "
        "delistings after it change",
        None,
        notes,
    )


def truncation(subject: Subject) -> Verdict:
    """With the store cut at a day nothing before it changes."""
    return _other_future(subject, "cut", "full")


def perturbation(subject: Subject) -> Verdict:
    """With other numbers after a day nothing before it changes."""
    check_reaction(subject)
    early = _unknown_labels(subject)
    if early:
        return Verdict.fail(early)
    fitted = "noise" if subject.settings.refit else "full"
    return _other_future(subject, "noise", fitted)


def _unknown_labels(subject: Subject) -> str:
    """Say what is wrong with the labels that a model which learns on has used."""
    model = subject.fit("full")
    if not hasattr(model, "last_labels"):
        return ""
    days = pd.DatetimeIndex(subject.scores("full").index.unique("datetime"))
    label = pd.DatetimeIndex(model.last_labels(subject.calendar, days)["label"])
    declared, measured = subject.reach()
    known = subject.calendar.get_indexer(label) + max(declared or 0, measured)
    wrong = np.flatnonzero(known >= subject.calendar.get_indexer(days))
    if not len(wrong):
        return ""
    at = wrong[0]
    return (
        f"the scores of {len(wrong)} day(s) learnt from labels that were not known: "
        f"that of {_day(days[at])} from those of {_day(label[at])}, which reach "
        f"{max(declared or 0, measured)} trading days ahead"
    )


def _other_future(subject: Subject, kind: str, fitted: str) -> Verdict:
    notes: list[str] = []
    try:
        back = subject.label_until()
    except ValueError as error:
        back = None
        notes.append(f"labels were not compared: {error}")
    full = subject.frames("full")
    found = compare_frames(full, subject.frames(kind), subject.day, back)
    if not any(d.leaks for d in found):
        # Where the data leak, scores do too, and training again would show no more.
        found.append(_scores(subject, kind, fitted, notes))
    looked = []
    for number, part in enumerate([*subject.partings(), *subject.refits()]):
        if any(d.leaks for d in found):
            break
        # Other numbers at every day; nothing at all at every second, and not before
        # the test segment: data sets refuse segments without a day.
        skipped = number % 2 and "predict" not in part.why
        if kind == "cut" and (skipped or not part.test):
            continue
        at = f"{kind}@{part.day:%Y-%m-%d}"
        until = None if back is None else subject.label_until(part.day)
        more = compare_frames(full, subject.frames(at), part.day, until)
        if part.test and not any(d.leaks for d in more):
            want, got = subject.scores("full"), subject.scores(at)
            more.append(compare_scores("scores", want, got, part.day))
        looked.append(f"{part.day:%Y-%m-%d} ({part.why})")
        if any(d.leaks for d in more):
            notes.append(f"seen with a store that parts on {looked[-1]}")
        found += more
        subject.forget(at)
    if looked:
        notes.append("the same was asked at " + ", ".join(looked))
    if subject.stores.left_alone:
        notes.append(f"copied as it is: {', '.join(subject.stores.left_alone)}")
    return _differences(subject, found, notes)


def _scores(subject: Subject, kind: str, fitted: str, notes: list[str]) -> Difference:
    want = subject.scores("full")
    what = "scores, trained again" if fitted == kind else "scores"
    result = compare_scores(
        what, want, subject.scores(kind, fitted=fitted), subject.day
    )
    if not result.leaks or fitted == "full":
        return result
    again = compare_scores("", want, subject.scores("full", again=1), subject.day)
    if not again.leaks:
        return result
    notes.append(
        "training twice on the same data gives other scores (set the model's `seed`): "
        "one trained model was compared on both stores instead"
    )
    return compare_scores("scores", want, subject.scores(kind), subject.day)


def _differences(subject: Subject, found: list[Difference], notes) -> Verdict:
    rows = pd.DataFrame([d.row() for d in found], index=[d.what for d in found])
    table = rows.rename_axis("compared")
    styles = {
        **{c: (c, "s") for c in ("until", "largest, std", "what differs")},
        **{
            c: (c, "i")
            for c in ("values", "not equal", "beyond rounding", "rows gone", "rows new")
        },
    }
    leaks = [f"{d.what}: {d.text()}" for d in found if d.leaks]
    if leaks:
        return Verdict.fail("; ".join(leaks), table, notes, styles)
    values = sum(d.values for d in found)
    rounded = [d for d in found if d.differing]
    text = f"{values:,} values up to {subject.day:%Y-%m-%d}"
    if others := len({d.until for d in found if "label" not in d.what}) - 1:
        text += f" and {others} other days"
    if not rounded:
        return Verdict.passed(f"{text} equal bit for bit", table, notes, styles)
    return Verdict.passed(
        f"{text} equal; bit for bit but for "
        + ", ".join(
            f"{d.differing:,} of {d.what} (rounding, at most {d.largest:.0e} std)"
            for d in rounded
        ),
        table,
        notes,
        styles,
    )


# -------------------------------------------------------------------- missing rows
def missing_rows(subject: Subject) -> Verdict:
    """Which rows are there says nothing about labels."""
    used = subject.predicts_from()
    full = subject.frames("full")
    key = used if used in full else "raw"
    wrong, notes, rows = [], [], []
    for kind in ("noise", "cut"):
        other = subject.frames(kind)[key]
        diff = compare_rows(key, full[key].index, other.index, subject.day)
        rows.append({"compared": f"{key} rows, store {kind}", "found": diff.text()})
        if diff.leaks:
            wrong.append(
                f"which rows of the {key} frame there are up to "
                f"{subject.day:%Y-%m-%d} depends on what comes after "
                f"({diff.lost} gone, {diff.added} new with the store {kind})"
            )
    label = _raw_label(full)
    if label is not None:
        dropped = full["raw"].index.difference(full[key].index)
        text = _absence(label, dropped)
        rows.append({"compared": f"rows of raw that {key} lacks", "found": text})
        if wrong:
            notes.append(text)
    if "learn" in full and key != "learn" and label is not None:
        dropped = full["infer"].index.difference(full["learn"].index)
        if len(dropped):
            text = _absence(label, dropped)
            rows.append({"compared": "rows of infer that learn lacks", "found": text})
        if len(dropped) and subject.trace().learn_windows:
            effect = _hole_effect(subject, label, full["learn"].index, dropped)
            rows.append({"compared": "holes in windows", "found": effect["text"]})
            if effect["leaks"]:
                wrong.append(
                    "the fit gets windows over the learning frame, and the rows that "
                    f"are missing in them tell the label: {effect['text']}. Mask the "
                    "labels instead of dropping the rows"
                )
        elif len(dropped):
            notes.append(
                f"{len(dropped):,} rows are dropped for learning only; no window "
                "over them and no score sees that"
            )
    table = pd.DataFrame(rows).set_index("compared")
    styles = {"found": ("found", "s")}
    if wrong:
        return Verdict.fail("; ".join(wrong), table, notes, styles)
    return Verdict.passed(
        f"the {key} frame's rows up to {subject.day:%Y-%m-%d} are the same whatever "
        "comes after",
        table,
        notes,
        styles,
    )


def _raw_label(frames: dict[str, pd.DataFrame]) -> pd.Series | None:
    for key in ("raw", "infer", "learn"):
        if key in frames and "label" in groups_of(frames[key]):
            label: pd.DataFrame = frames[key]["label"]  # type: ignore[assignment]
            return label.iloc[:, 0].astype(float)
    return None


def _absence(label: pd.Series, dropped: pd.Index) -> str:
    """Say how labels of absent rows compare with the day's others."""
    day = label.groupby(level="datetime")
    size = (label - day.transform("median")).abs()
    size = size / size.groupby(level="datetime").transform("mean")
    inside = label.index.isin(dropped)
    known = size.notna().to_numpy()
    if not len(dropped):
        return "no row is absent"
    text = f"{len(dropped):,} rows absent, {int((inside & known).sum()):,} with a label"
    if (inside & known).sum() >= 10:
        text += (
            f": {size[inside & known].mean():.1f} times as far from the day's median "
            f"as usual"
        )
    return text


def _hole_effect(subject, label, present, dropped) -> dict[str, Any]:
    """RankIC of the number of recent holes with a label, and with its size.

    Of all days: one rule makes the holes, and the training segment alone may be short.
    """
    step = getattr(subject.dataset("full"), "step_len", 20)
    reach = max(r or 0 for r in subject.reach())
    hole = pd.Series(1.0, index=dropped).unstack()
    y = label[label.index.isin(present)].unstack()
    hole = hole.reindex(index=label.unstack().index, columns=y.columns).fillna(0.0)
    recent = hole.shift(1).rolling(max(1, min(step - 1, reach)), min_periods=1).sum()
    recent = recent.reindex(y.index)
    size = y.sub(y.median(axis=1), axis=0).abs()
    parts, leaks = [], False
    for name, target in (("label", y), ("label's size", size)):
        daily = rank_ic(tensor_of(recent), tensor_of(target), 5)
        known = daily[torch.isfinite(daily)]
        if len(known) < FEWEST_DAYS:
            parts.append(f"{name}: too few holes to tell")
            continue
        mean, error = float(known.mean()), newey_west_se(daily, 2 * reach)
        t = mean / error if error > 0 else np.inf
        leaks |= abs(mean) > HOLE_EFFECT and abs(t) > HOLE_T
        parts.append(f"with the {name} {mean:.3f} (t {t:.1f})")
    return {
        "leaks": bool(leaks),
        "text": "RankIC of recent holes " + ", ".join(parts),
    }


# --------------------------------------------------------------------------- graphs
def graphs(subject: Subject) -> Verdict:
    """Edges of a day are the same whatever comes after it."""
    kwargs = subject.task["model"].get("kwargs") or {}
    for name in ("stock2concept",):
        if kwargs.get(name):
            raise RuntimeError(
                f"`{name}` is a file of relations without dates: when they were known "
                "cannot be told"
            )
    relations = _relations(subject.fit("full"))
    if not relations:
        return Verdict.skip("the model names no graph")
    built = {}
    for kind in ("full", "noise", "cut"):
        subject.use(subject.store(kind))
        panel = Panel.from_dataset(subject.dataset(kind))
        built[kind] = [graph.build(panel) for graph in relations]
    rows, wrong = [], []
    for at, graph in enumerate(relations):
        for kind in ("noise", "cut"):
            days, first, share = _edges_differ(
                built["full"][at], built[kind][at], subject.day
            )
            rows.append(
                {
                    "graph": f"{graph.name}, store {kind}",
                    "days that differ": days,
                    "most edges changed": share,
                    "first": _day(first),
                }
            )
            # Equal distances may be ordered otherwise when rows are summed otherwise.
            if days and share > 0.01:
                wrong.append(
                    f"edges of {graph.name!r} differ on {days} days before "
                    f"{subject.day:%Y-%m-%d} (store {kind}), up to {share:.0%} of them"
                )
    table = pd.DataFrame(rows).set_index("graph")
    styles = {
        "days that differ": ("days that differ", "i"),
        "most edges changed": ("most edges changed", "p1"),
        "first": ("first", "s"),
    }
    if wrong:
        return Verdict.fail("; ".join(wrong), table, styles=styles)
    names = ", ".join(graph.name for graph in relations)
    return Verdict.passed(
        f"edges of {names} up to {subject.day:%Y-%m-%d} stay whatever comes after",
        table,
        styles=styles,
    )


def _relations(model: Any) -> list[Graph]:
    """Distinct graphs that a model or its sub-models name in `graphs`."""
    found: dict[str, Graph] = {}
    for _, part in walk(model, object, depth=4):
        configs = vars(part).get("graphs") if hasattr(part, "__dict__") else None
        if not isinstance(configs, list) or not configs:
            continue
        if isinstance(configs[0], EdgeSeries):
            continue
        for graph in make_graphs(configs):
            found.setdefault(f"{type(graph).__name__}{vars(graph)}", graph)
    return list(found.values())


def _edges_differ(one: EdgeSeries, two: EdgeSeries, day: pd.Timestamp):
    names = one.instruments.union(two.instruments)
    days = one.dates[one.dates <= day].intersection(two.dates)
    count, first, most = 0, None, 0.0
    known: dict[tuple[int, int], float] = {}
    for date in days:
        i, j = int(one.dates.searchsorted(date)), int(two.dates.searchsorted(date))
        key = (int(one.state[i]), int(two.state[j]))
        if key not in known:
            a, b = _codes(one, i, names), _codes(two, j, names)
            either = len(np.union1d(a, b))
            known[key] = len(np.setxor1d(a, b)) / either if either else 0.0
        if known[key]:
            count += 1
            first = first or date
            most = max(most, known[key])
    return count, first, most


def _codes(series: EdgeSeries, at: int, names: pd.Index) -> np.ndarray:
    place = names.get_indexer(series.instruments)
    source, target = place[series.at(at)]
    return np.unique(source.astype(np.int64) * len(names) + target)


# -------------------------------------------------------------------------- training
def batches(subject: Subject) -> Verdict:
    """Where rows of a batch see each other, they are of one day."""
    trace = subject.trace()
    if trace.own:
        return _own_batches(trace.own)
    if not trace.calls:
        return Verdict.skip(
            "the fit calls no torch module on batches: rows are treated separately"
        )
    rows, mixed, crossing, norms = [], 0, 0.0, 0.0
    untraced = total = 0
    for layer, args in trace.calls:
        x = next(a for a in args if isinstance(a, torch.Tensor))
        days, size = trace.days_of(x)
        total += size
        untraced += size - len(days)
        across = trace.crosses(layer, args, training=False)
        in_training = trace.crosses(layer, args, training=True)
        crossing, norms = np.fmax(crossing, across), np.fmax(norms, in_training)
        distinct = len(np.unique(days))
        mixed = max(mixed, distinct)
        rows.append(
            {
                "module": type(layer).__name__,
                "rows": size,
                "days": distinct,
                "traced": len(days) / size,
                "moved": across,
                "moved in training": in_training,
            }
        )
    table = pd.DataFrame(rows).set_index("module")
    styles = {
        "rows": ("rows in the batch", "i"),
        "days": ("different days", "i"),
        "traced": ("rows traced", "p0"),
        "moved": ("moved by other rows, std", "n3"),
        "moved in training": ("with batch statistics", "n3"),
    }
    if np.isnan(crossing):
        raise RuntimeError(
            "whether rows of a batch see each other cannot be told: the outermost "
            "module does not return one row a row"
        )
    if crossing <= SAME:
        notes = []
        if norms > SAME and mixed > 1:
            notes.append(
                "batch normalisation takes its statistics from batches that mix days; "
                "fixed statistics are used when predicting"
            )
        return Verdict.passed(
            f"rows of a batch are computed separately (up to {mixed} days in one)",
            table,
            notes,
            styles,
        )
    if untraced > 0.5 * total:
        raise RuntimeError(
            f"rows of a batch see each other, and {untraced} of {total} rows could not "
            "be traced to their day"
        )
    if mixed > 1:
        return Verdict.fail(
            f"rows of a batch see each other, but a batch holds up to {mixed} "
            "different days: its 'cross-section' is no day's",
            table,
            styles=styles,
        )
    return Verdict.passed(
        "rows of a batch see each other, and each batch is one day",
        table,
        styles=styles,
    )


def _own_batches(own: list[dict[str, Any]]) -> Verdict:
    table = pd.DataFrame(own).set_index("model")
    styles = {
        "days": ("days in a batch", "i"),
        "consecutive": ("consecutive", "s"),
        "difference": ("a day alone against in its batch, std", "n3"),
    }
    wrong = table[(table["difference"] > SAME) & (table["days"] > 1)]
    if len(wrong):
        return Verdict.fail(
            f"{wrong.index[0]}: a day's scores change with the other days of the batch",
            table,
            styles=styles,
        )
    days = int(table["days"].max())
    return Verdict.passed(
        f"a batch is a run of up to {days} days, and each day is scored by itself",
        table,
        styles=styles,
    )


def label_shuffle(subject: Subject) -> Verdict:
    """Trained on labels that belong to other stocks, the model ranks nothing."""
    score = subject.scores("shuffle", fitted="shuffle")
    label = _raw_label(subject.frames("shuffle"))
    assert label is not None
    return _no_rank_ic(
        subject,
        score,
        label,
        "labels exchanged among the stocks of each day",
        independent=True,
    )


def no_signal(subject: Subject) -> Verdict:
    """In a market where nothing can be known, the model ranks nothing."""
    score = subject.scores("none", fitted="none")
    label = _raw_label(subject.frames("none"))
    if label is None:
        raise RuntimeError("the handler has no column group `label`")
    return _no_rank_ic(subject, score, label, "a simulated market without signal")


def _no_rank_ic(
    subject: Subject, score, label, where: str, independent: bool = False
) -> Verdict:
    declared, reach = None, 0
    try:
        declared, reach = subject.reach()
    except ValueError:
        declared = handler_label_reach(subject.dataset("full").handler)
    reach = max(declared or 0, reach, 1)
    label = in_order(label.to_frame("label"))["label"]
    common = score.index.intersection(label.index)
    few = are_few(label.index)
    x, y = (tensor_of(s.loc[common].unstack()) for s in (score, label))
    daily = rank_ic(x, y, 5)
    if few:  # a day has no cross-section: of each instrument over the days
        daily = torch.where((torch.isfinite(x) & torch.isfinite(y)).any(1), 1.0, np.nan)
    known = daily[torch.isfinite(daily)]
    table = None
    scores = score if few else score.groupby(level="datetime")
    if np.max(scores.nunique()) <= 1 and (few or len(known) == 0):
        return Verdict.passed(f"{where}: all scores of a day are equal")
    if len(known) < FEWEST_DAYS:
        raise RuntimeError(
            f"only {len(known)} days of the test segment have scores and labels"
        )
    mean = float(known.mean())
    # The larger of three estimates: overlapping labels make the days depend on each
    # other, and a short series underestimates that.
    error = max(
        float(known.std()) / len(known) ** 0.5,
        newey_west_se(daily, reach - 1),
        newey_west_se(daily, 2 * reach),
    )
    # Three standard errors, and as improbable with the few periods that do not overlap.
    periods = len(known) if independent else len(known) / reach
    if few:
        mean, error, periods = over_time(x, y, 1 if independent else reach)
    limit = float(student.isf(_THREE_SIGMA, max(periods - 1, 2)))
    table = pd.DataFrame(
        {
            "days": [len(known)],
            "stocks": [float(score.groupby(level="datetime").size().mean())],
            "mean": [mean],
            "error": [error],
            "errors": [mean / error],
            "limit": [limit],
        },
        index=pd.Index([where], name="on"),
    )
    styles = {
        "days": ("days", "n0"),
        "stocks": ("stocks", "n0"),
        "mean": ("mean RankIC", "p2"),
        "error": ("standard error", "p2"),
        "errors": ("errors from 0", "n2"),
        "limit": ("allowed", "n2"),
    }
    text = (
        f"{where}: mean RankIC {mean:.2%}, standard error {error:.2%}, "
        f"{len(known)} days ({abs(mean) / error:.1f} errors, {limit:.1f} allowed)"
    )
    if abs(mean) > limit * error:
        return Verdict.fail(
            f"{text}: something other than the past ranks these stocks",
            table,
            (),
            styles,
        )
    return Verdict.passed(text, table, (), styles)


# ------------------------------------------------------------------------------ parts
def _day(value: Any) -> str:
    if value is None or (not isinstance(value, pd.Timestamp) and not is_date(value)):
        return "–" if value is None else str(value)
    return f"{pd.Timestamp(value):%Y-%m-%d}"


CHECKS: dict[str, Check] = {
    "windows": Check(
        "fit windows", "Do processors learn from training days only?", fit_windows
    ),
    "purge": Check(
        "purge and embargo",
        "Do labels of one segment reach into the next?",
        purge,
    ),
    "membership": Check(
        "membership as of its date",
        "Do later index members or delistings decide who is there today?",
        membership,
    ),
    "history": Check(
        "codes and prices as of their date",
        "Are industries those of the day, and price levels known on it?",
        history,
    ),
    "sources": Check(
        "files outside the store",
        "Is all that is read known by date?",
        sources,
    ),
    "foresight": Check(
        "columns too good to be true",
        "Does one column rank returns better than what is known can?",
        foresight,
    ),
    "truncation": Check(
        "truncation",
        "Does anything before a day change when the store ends there?",
        truncation,
    ),
    "perturbation": Check(
        "future perturbation",
        "Does anything before a day change when every later number does?",
        perturbation,
    ),
    "rows": Check(
        "missing-row pattern",
        "Can the absence of rows tell the label?",
        missing_rows,
    ),
    "graphs": Check(
        "graphs as of their date", "Do edges of a day know later days?", graphs
    ),
    "execution": Check(
        "tradability at execution",
        "Is the label bought after the signal, at a price that could be had?",
        execution,
    ),
    "batches": Check(
        "day-pure batches",
        "Do stocks of different days see each other in training?",
        batches,
    ),
    "shuffle": Check(
        "label shuffle",
        "Does a model trained on other stocks' labels still rank?",
        label_shuffle,
    ),
    "no_signal": Check(
        "market without signal",
        "Does the model find something where there is nothing?",
        no_signal,
    ),
}
"""Checks by the name that `--checks` takes, in the order in which they run."""
