"""`qlib-ext track`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlib_ext.cli import options

if TYPE_CHECKING:
    import pandas as pd

    from qlib_ext.report.tracking import Plan, Tracking

__all__ = ["track"]

# Trading days of style returns, at least: what "mean x 252" is taken over.
_STYLE_DAYS = 252


@click.command()
@click.argument("file", type=options.FILE)
@options.pages
@click.option("--store", help="Qlib store instead of the file's.")
@click.option("--uri", help="MLflow store instead of the file's.")
@click.option(
    "--no-score", is_flag=True, help="Do not score the days that are missing."
)
@click.option(
    "--max-missing",
    type=click.FloatRange(0, 1),
    default=0.02,
    help="Share of the stocks that may lack data on a scored day.",
)
@click.option("--threads", type=click.IntRange(1), default=1, help="Of torch.")
def track(file: Path, **options: Any) -> None:
    """Write one page on the factors, portfolios and styles named in FILE.

    Each factor is first brought up to the store's last day, as `qlib-ext score` does.
    Any Qlib recorder with pred.pkl will do; one whose model was only pickled is shown
    as far as its scores go. What is missing, failed or behind is a named gap on the
    page, and printed here.

    The page shows IC and e^(-RankMAE) over all days and this year; long-short and
    long-only excess of the week, month and year; portfolios' net excess, tracking error
    and drawdown; style returns; and what changed since the last issue in the same
    folder. The figures are kept beside it as a CSV.

    \b
    FILE:
      title: Monday
      store: data/market
      factors:
        GRU: {experiment: rnn_day_single}
        GRU in the CSI 500: {experiment: rnn_day_single, pool: csi500}
        ours: {recorder: 3f2a91, horizon: 5}
      portfolios:
        CSI 500, wide: {experiment: enhance_csi500_wide}
      styles: true
      rebalance: week        # or month
      neutral: false         # true: scores net of industry means
      max_days: 20           # most days scored at once

    \b
    Every week:
      qlib-ext ingest data/cn --preset tushare --data new --update
      qlib-ext track monday.yaml
    """
    click.echo(track_text(file, **options))


def track_text(
    file: Path,
    out: Path = Path("reports"),
    *,
    store: str | None = None,
    uri: str | None = None,
    no_score: bool = False,
    max_missing: float = 0.02,
    threads: int = 1,
) -> str:
    """Write the page and its CSV; return the account for a terminal.

    Parameters
    ----------
    file : Path
        See `qlib_ext.report.tracking.Plan`.
    out : Path
        Directory, made if absent; the last issue is looked for there.
    store, uri : str, optional
        Instead of the file's.
    no_score : bool
        Take scores as they are.
    max_missing : float
        See `score_day`.
    threads : int
        Of torch.

    Raises
    ------
    ValueError
        If the file or the store is unusable, or nothing that it names can be shown.
    """
    import pandas as pd
    import torch
    from qlib.data import D

    from data_handlers.files import write_text
    from qlib_ext.report import track as report
    from qlib_ext.report import tracking
    from qlib_ext.rolling.retrain import absolute_init
    from qlib_ext.rolling.tasks import init_qlib

    torch.set_num_threads(threads)
    plan = tracking.read_plan(file)
    for name, given in (("store", store), ("uri", uri)):
        if given:
            setattr(plan, name, given)
    if not Path(plan.store).expanduser().is_dir():
        raise ValueError(f"`store`: there is no Qlib store {plan.store}.")
    settings = {"qlib_init": {"provider_uri": plan.store}}
    init_qlib(absolute_init(settings, Path.cwd(), plan.uri))
    calendar = pd.DatetimeIndex(D.calendar())
    found = tracking.Tracking(day=calendar[-1], calendar=calendar)
    for name, entry in plan.factors.items():
        with _gap(found, name):
            _add_factor(found, name, entry, plan, no_score, max_missing)
    for name, entry in plan.portfolios.items():
        with _gap(found, name):
            _add_portfolio(found, name, entry, plan)
    if not found.rows["factor"] and not found.rows["portfolio"]:
        raise ValueError(
            "none of the factors and portfolios can be shown, and nothing was written. "
            + " ".join(found.gaps)
        )
    if plan.styles:
        with _gap(found, "styles"):
            tracking.add_styles(found, _style_returns(calendar))
    with _gap(found, "changes"):
        before = report.last_issue(out, plan, found.day)
        if before is not None:
            report.add_changes(found, before)
    target = out / f"{report.issue_name(plan)}-{found.day:%Y-%m-%d}.html"
    page = report.track_page(found, plan)
    write_text(target, page.render("Back-tests and scores; research, not advice."))
    write_text(target.with_suffix(".csv"), found.frame().to_csv(index=False))
    return "\n".join([*_lines(found), f"Page: {target.resolve()}"])


@contextlib.contextmanager
def _gap(found: Tracking, name: str) -> Iterator[None]:
    """Turn what cannot be shown into a named gap."""
    from qlib_ext.masking import redact

    try:
        yield
    except ValueError as error:
        found.gaps.append(f"{name}: {redact(str(error))}")


def _add_factor(
    found: Tracking,
    name: str,
    entry: dict[str, Any],
    plan: Plan,
    no_score: bool,
    max_missing: float,
) -> None:
    import pandas as pd

    from qlib_ext.recorders import find_recorder, stated_horizon
    from qlib_ext.report.tracking import add_factor, read_score
    from qlib_ext.rolling.score import score_day

    _, recorder = find_recorder(
        plan.uri, entry.get("experiment"), entry.get("recorder"), artifact="pred.pkl"
    )
    score, end = read_score(recorder)
    known = pd.DatetimeIndex(score.index.unique("datetime"))
    missing = found.calendar[found.calendar > end].difference(known)
    if len(missing) and not no_score:
        if len(missing) > plan.max_days:
            found.gaps.append(
                f"{name}: {len(missing)} days without a score, more than `max_days` "
                f"{plan.max_days}; raise it, or train the model again."
            )
        else:
            with _gap(found, name):
                for day in missing:
                    score_day(recorder, day, max_missing=max_missing)
            score, _ = read_score(recorder)
    horizon = entry.get("horizon") or stated_horizon(recorder)
    if horizon is None:
        horizon = 10
        found.gaps.append(
            f"{name}: its recorder does not say over how many days its label reaches: "
            f"{horizon} are taken; give `horizon`."
        )
    add_factor(
        found,
        name,
        score,
        horizon,
        pool=entry.get("pool"),
        rebalance=plan.rebalance,
        neutral=plan.neutral,
    )


def _add_portfolio(
    found: Tracking, name: str, entry: dict[str, Any], plan: Plan
) -> None:
    from qlib_ext.recorders import find_recorder
    from qlib_ext.report.tracking import add_portfolio, read_account

    _, recorder = find_recorder(
        plan.uri, entry.get("experiment"), entry.get("recorder"), artifact="pred.pkl"
    )
    add_portfolio(found, name, read_account(recorder))


def _style_returns(calendar: pd.DatetimeIndex) -> pd.DataFrame:
    """Daily style returns of this year, or of the last year if that is longer."""
    import pandas as pd

    from data_handlers.risk import factor_returns
    from qlib_ext.portfolio.risk_model import load_risk_inputs

    year = int(calendar.searchsorted(pd.Timestamp(calendar[-1].year, 1, 1)))
    start = calendar[max(0, min(year, len(calendar) - _STYLE_DAYS) - 1)]
    inputs = load_risk_inputs(start, calendar[-1], history=0)
    factors = factor_returns(
        inputs.returns, inputs.exposures, inputs.industry, inputs.mcap
    )
    return pd.DataFrame(factors.style, inputs.days, list(inputs.styles)).iloc[1:]


def _lines(found: Tracking) -> list[str]:
    """Say the most important figures and every gap."""
    from qlib_ext.report.page import format_value, text_table

    lines = []
    for kind, figures in (
        ("factor", ("rank_ic", "rank_ic_year", "long_only_week", "long_only_year")),
        ("portfolio", ("excess_week", "excess_month", "excess_year", "max_drawdown")),
    ):
        rows = [
            [name, *(format_value(float(row[x]), "p2") for x in figures)]
            for name, row in found.rows[kind].items()
        ]
        if rows:
            lines += [text_table(rows, [kind, *figures]), ""]
    return [*lines, *(f"gap: {text}" for text in found.gaps)]
