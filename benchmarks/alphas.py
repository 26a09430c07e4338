"""The table of docs/alphas.md: formula, first day, coverage and RankIC of each alpha.

python benchmarks/alphas.py [--page docs/alphas.md] [--stocks 100] [--years 3]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import qlib

from data_handlers.catalogue import LISTS
from data_handlers.expression import Evaluator, parse
from data_handlers.files import write_text
from qlib_ext.market import make_market
from qlib_ext.mining import mining_panel
from qlib_ext.mining.fitness import score_values

_MARK = "<!-- table -->"


def rows_of(panel) -> list[str]:
    """Rows of the table; the 360 lags of Alpha360 are one row a field."""
    lines = []
    for name, function in LISTS.items():
        texts, names = function()
        if name == "alpha360":
            last = [k for k, n in enumerate(names) if n.endswith("59")]
            texts, names = [texts[k] for k in last], [names[k] for k in last]
        evaluator = Evaluator(panel)
        for text, label in zip(texts, names, strict=True):
            node = parse(text)
            values = evaluator.evaluate([node])
            known = np.flatnonzero(np.isfinite(values[0]).any(axis=1))
            score = score_values(values[:, panel.dates], panel.label, panel.expected)[
                0
            ][0]
            first = str(known[0]) if len(known) else "never"
            shown = text.replace("|", "\\|")
            lines.append(
                f"| {label} | `{shown}` | {first} | {score.coverage:.0%} | "
                f"{100 * score.rank_ic:.1f} % |"
            )
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--page", type=Path, default=Path("docs/alphas.md"))
    p.add_argument("--stocks", type=int, default=100)
    p.add_argument("--years", type=int, default=3)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_market(
            Path(folder) / "market", stocks=args.stocks, years=args.years
        )
        qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=40)
        days = pd.read_csv(store / "calendars" / "day.txt", header=None)[0]
        fields = sorted(
            {f for make in LISTS.values() for t in make()[0] for f in parse(t).fields}
        )
        panel = mining_panel(fields, "all", days.iloc[0], days.iloc[-1])
        head = (
            "| name | formula | first day | coverage | RankIC |\n|---|---|---|---|---|"
        )
        table = "\n".join([head, *rows_of(panel)])
    page = args.page.read_text(encoding="utf-8")
    write_text(args.page, page[: page.index(_MARK)] + _MARK + "\n\n" + table + "\n")


if __name__ == "__main__":
    main()
