"""`qlib-ext init`."""

from itertools import takewhile
from pathlib import Path

import click

from qlib_ext.cli import options

__all__ = ["init"]


@click.command()
@click.argument("folder", type=options.FOLDER, required=False)
@click.option("--list", "listing", is_flag=True, help="Print their names and exit.")
@click.option("--overwrite", is_flag=True, help="Replace files that differ.")
def init(folder: Path | None, listing: bool, overwrite: bool) -> None:
    """Write the bundled workflows to FOLDER, to run and to edit.

    A workflow is a YAML file for `qlib-ext run` or `qrun`: data, model, dates and
    reports. Those named base_ are complete; the others name one and change a few lines.

    \b
    Examples:
      qlib-ext init --list
      qlib-ext init workflows
    """
    source = _source()
    names = sorted(p.relative_to(source) for p in source.rglob("*.yaml"))
    if listing:
        for name in names:
            about = _about((source / name).read_text(encoding="utf-8"))
            click.echo(f"{name!s:29}{about}")
        return
    if folder is None:
        raise click.UsageError("Missing argument FOLDER: where the workflows go.")
    from data_handlers.files import write_text

    texts = {name: (source / name).read_text(encoding="utf-8") for name in names}
    changed = [
        str(name)
        for name, text in texts.items()
        if (folder / name).exists()
        and (folder / name).read_text(encoding="utf-8") != text
    ]
    if changed and not overwrite:
        raise ValueError(
            f"{folder} holds other files of these names: {', '.join(changed[:5])}; "
            "name a new folder, or pass --overwrite to replace them."
        )
    for name, text in texts.items():
        write_text(folder / name, text)
    click.echo(
        f"{folder}: {len(names)} workflows. Next:\n"
        "  qlib-ext market make --out data/market --stocks 200\n"
        f"  qlib-ext run {folder / 'rnn_day_multi.yaml'}\n"
        "  qlib-ext report --experiment rnn_day_multi"
    )


def _about(text: str) -> str:
    """Give the first sentence of the comment that a file begins with."""
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in lines)
    return words.partition(". ")[0].removesuffix(".")


def _source() -> Path:
    """In the wheel, or the repository's own folder."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "workflows", package.parent / "workflows"):
        if (place / "base_day.yaml").is_file():
            return place
    raise ValueError(f"{package} has lost its workflows; install it again.")
