"""`qlib-ext score`."""

from __future__ import annotations

from pathlib import Path

import click

from qlib_ext.cli import options
from qlib_ext.cli.console import watched

__all__ = ["score"]


@click.command()
@click.argument("recorder")
@click.option(
    "--date",
    type=options.DAY,
    help="Trading day to score.  [default: the store's last]",
)
@click.option(
    "--store",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("data/market"),
    envvar="QLIB_EXT_STORE",
    help="Qlib store; QLIB_EXT_STORE sets it too.",
)
@options.uri
@click.option("--experiment", help="Experiment to look in.  [default: all]")
@click.option(
    "--max-missing",
    type=click.FloatRange(0, 1),
    default=0.02,
    help="Share of the stocks that may lack data; suspended ones do.",
)
@click.option(
    "--out", type=options.FILE, help="Also write all scores to this CSV file."
)
@click.option(
    "--trust",
    is_flag=True,
    help="Load a model that was only pickled, and so may run any code: your own.",
)
@click.option("--preset", help="First append new days: see qlib-ext ingest.")
@click.option(
    "--mapping",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="First append new days: see qlib-ext ingest.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Vendor files of the new days.",
)
@click.option("--threads", type=click.IntRange(1), default=1, help="Of torch.")
def score(
    recorder: str,
    date: str | None,
    store: Path,
    uri: str,
    experiment: str | None,
    max_missing: float,
    out: Path | None,
    trust: bool,
    preset: str | None,
    mapping: Path | None,
    data: Path | None,
    threads: int,
) -> None:
    """Score one day with the trained model of RECORDER, an id or its beginning.

    Nothing is fitted again, and only the new day is computed: a model in stream mode
    goes on from the state that is kept with the recorder. RECORDER may be of qrun, a
    task of `qlib-ext roll`, or its joined score: then the seeds of the window that
    holds the day, or of the last one, are averaged. The score is kept with the
    recorder as score/DAY.parquet.

    A day is refused, with what is missing, if the store lacks it, or fields, feature
    rows, or the bars of too many stocks that had one the day before.

    \b
    Every day after the close:
      qlib-ext score 3f2a91 --store ~/qlib/cn --out today.csv \\
          --preset tushare --data ~/tushare/today
    Or, with a model on minute features:
      qlib-ext ingest ~/qlib/cn --preset tushare --data ~/tushare/today --update
      qlib-ext build ms --source ~/minute --out ~/qlib/cn
      qlib-ext score 3f2a91 --store ~/qlib/cn --out today.csv
    """
    import torch

    from data_handlers.files import write_text
    from qlib_ext.recorders import close_dead, find_recorder
    from qlib_ext.rolling.retrain import absolute_init
    from qlib_ext.rolling.score import score_day, summary
    from qlib_ext.rolling.tasks import init_qlib

    torch.set_num_threads(threads)
    if preset or mapping:
        from qlib_ext.ingest.run import ingest

        ingest(store, preset or mapping or "", data=data or Path(), update=True)
    init_qlib(absolute_init({"qlib_init": {"provider_uri": str(store)}}, Path.cwd()))
    close_dead(uri)
    _, found = find_recorder(uri, experiment, recorder, artifact="pred.pkl")
    with watched(store):
        result = score_day(found, date, max_missing=max_missing, trust=trust)
    text = summary(result)
    if out is not None:
        write_text(out, result.score.to_csv())
        text += f"\n{out}: {len(result.score):,} scores"
    click.echo(text)
