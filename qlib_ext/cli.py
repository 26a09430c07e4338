"""Command line: `qlib-ext COMMAND --help` teaches each step from raw files to a report."""

import click

from qlib_ext import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Deep-learning stock-selection factors for Qlib."""


if __name__ == "__main__":
    main()
