"""`qlib-ext riskmodel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qlib_ext.cli import options

__all__ = ["riskmodel"]


@click.command()
@click.option(
    "--store",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Qlib store with prices and industries.",
)
@click.option(
    "--out",
    type=options.FOLDER,
    required=True,
    help="Directory of the model; days already there are left.",
)
@click.option("--start", type=options.DAY, required=True, help="First day wanted.")
@click.option("--end", type=options.DAY, required=True, help="Last day wanted.")
@click.option(
    "--frequency",
    type=click.Choice(["week", "day"]),
    default="week",
    help="Last day of each week, or every day (Qlib's own strategy needs that).",
)
@click.option(
    "--extra",
    multiple=True,
    metavar="NAME=FILE",
    help="Parquet of a further risk factor, such as a Mamba's learnt one.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Compute every day again, also of a model made otherwise.",
)
def riskmodel(store: Path, out: Path, extra: tuple[str, ...], **given: Any) -> None:
    """Estimate factor covariance and specific risk, in the layout that Qlib reads.

    Point in time: the files of a day use data up to its close. An interrupted run goes
    on where it stopped.

    \b
    Example:
      qlib-ext riskmodel --store data/market --out riskmodel/market \\
          --start 2018-01-01 --end 2020-12-31
    """
    import logging

    import qlib

    from qlib_ext.portfolio.risk_model import bias_table, build_risk_model, signal_days

    named = {}
    for text in extra:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"`extra` must be NAME=FILE.parquet, got {text!r}.")
        named[name] = path
    qlib.init(provider_uri=str(store), region="cn", logging_level=logging.INFO)
    model = build_risk_model(
        out, given.pop("start"), given.pop("end"), extra=named, **given
    )
    folders = sorted(p.name for p in Path(out).iterdir() if p.name.isdigit())
    lines = [f"{out}: {len(folders)} days, {folders[0]} to {folders[-1]}"]
    lines.append(f"factors: {', '.join(model.names)}")
    weeks = signal_days(model.inputs.days)
    weeks = weeks[weeks.strftime("%Y%m%d").isin(folders)]
    table = bias_table(model, weeks)
    lines += [
        "bias statistic of weekly returns (1: right, above: risk was underestimated):"
    ]
    lines += [
        f"  {kind:<8}{row['bias']:.2f}  (95 % band {row['low']:.2f} to "
        f"{row['high']:.2f}, {row['portfolios']:.0f} portfolios, "
        f"{row['periods']:.0f} weeks)"
        for kind, row in table.iterrows()
    ]
    click.echo("\n".join(lines))
