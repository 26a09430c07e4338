"""What all benchmarks share: options, environment, table, JSON."""

from __future__ import annotations

import argparse
import os
import platform
import resource
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from data_handlers.files import locked, replacing, write_json

KEYS = ["model", "seed"]


def parser(doc: str, threads: int = 2) -> argparse.ArgumentParser:
    """Command line of a benchmark."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="small sizes, for a first look")
    p.add_argument("--json", metavar="FILE", help="write the figures there too")
    p.add_argument(
        "--threads",
        type=int,
        default=threads,
        help="torch threads (default %(default)s)",
    )
    return p


def data_folder() -> Path:
    """Folder of the market data, $QLIB_EXT_DATA."""
    if "QLIB_EXT_DATA" not in os.environ:
        raise ValueError("Set QLIB_EXT_DATA to the folder of the data (or --store).")
    return Path(os.environ["QLIB_EXT_DATA"])


def environment(threads: int) -> dict[str, Any]:
    """Fix the thread count and say what machine and versions this is."""
    import pandas
    import qlib

    torch.set_num_threads(threads)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pandas": pandas.__version__,
        "qlib": qlib.__version__,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def peak_mib() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(title: str, rows: list[dict[str, Any]], env: dict, file: str | None) -> None:
    """Print a Markdown table and the environment; write both to `file` as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, [n, *col])) for n, *col in zip(names, *cells, strict=True)]
    print(f"\n{title}\n")
    for line in [names, ["-" * w for w in widths], *cells]:
        print(
            "| "
            + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True))
            + " |"
        )
    print("\n" + ", ".join(f"{k} {v}" for k, v in env.items()))
    if file:
        write_json(file, {"title": title, "environment": env, "rows": rows}, indent=1)


def read_rows(file: Path) -> pd.DataFrame:
    """Rows of a results table, one a run; without columns if there is no file yet."""
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEYS)


def has_row(file: Path, model: str, seed: int) -> bool:
    """Whether a run's figures are there already."""
    rows = read_rows(file)
    return bool(((rows["model"] == model) & (rows["seed"] == seed)).any())


def put_row(file: Path, row: dict[str, Any], order: list[str]) -> None:
    """Write a run's figures into its table, in place of earlier ones of that run.

    Several processes may share a study: each waits for the other's row.
    """
    with locked(file.with_suffix(".lock"), "the table is being written", wait=True):
        rows = read_rows(file).set_index(KEYS)
        rows = rows.drop(
            index=(row["model"], row["seed"]), errors="ignore"
        ).reset_index()
        new = pd.DataFrame([row])
        rows = pd.concat([rows, new], ignore_index=True) if len(rows) else new
        rank = {name: at for at, name in enumerate(order)}
        rows = rows.sort_values(
            KEYS, key=lambda c: c.map(rank) if c.name == "model" else c
        )
        with replacing(file) as temporary:
            rows.to_csv(temporary, index=False, float_format="%.6g")


def mean_and_spread(values: pd.Series, digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several seeds."""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
