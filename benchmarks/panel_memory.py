"""Peak memory of the panel: conversion from Qlib's frame, and training on it.

python benchmarks/panel_memory.py [--quick] [--json FILE] [--threads N]

5,000 stocks x 2,500 days x 48 features: the bare float32 array is 2,289 MiB. Each line
is a process of its own; "over" is its peak minus what the process held before (after a
small run that loads every library), divided by the bare array. "units" predicts the 64
units of a tenth of the days and writes them as the factor report does; its bare array
are their values. "training" holds a panel
and runs stream batches of 20 days with the encoder in blocks of 250 stocks, then a
validation pass. "conversion" adds the feature frame that Qlib's handler holds while the
panel is made: one more array at the least, which only Qlib could spare (its raw,
inference and learning frames are further copies until `keep_frames: false` frees them).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import environment, parser, peak_mib, show

CASES = ("bare array", "training", "conversion", "units")


def sizes(quick: bool) -> tuple[int, int, int]:
    return (500, 500, 48) if quick else (2500, 5000, 48)


def range_of(days: int) -> pd.DatetimeIndex:
    return pd.bdate_range("2010-01-01", periods=days)


def names_of(stocks: int) -> pd.Index:
    return pd.Index([f"S{i:05d}" for i in range(stocks)])


def random_panel(days: int, stocks: int, width: int):
    from qlib_ext.dataset import Panel

    generator = torch.Generator().manual_seed(0)
    return Panel(
        range_of(days),
        names_of(stocks),
        [f"x{k}" for k in range(width)],
        torch.empty(days, stocks, width).normal_(generator=generator),
        torch.ones(days, stocks, dtype=torch.bool),
        ["y"],
        torch.randn(days, stocks, 1, generator=generator),
        torch.randn(days, stocks, 1, generator=generator),
    )


def train_on(panel, train: np.ndarray) -> None:
    """Two stream batches and a validation pass, without early stop or logging."""
    from qlib_ext.models import MultiFactorRNN

    width, cpu = len(panel.feature_names), torch.device("cpu")
    model = MultiFactorRNN(n_factors=1, GPU=-1, block_size=250, mode="stream")
    model.step_len_, model.d_feat_ = 60, width
    network = model.build_network(width)
    optimiser = torch.optim.Adam(network.parameters())
    model._train_epoch(model._epoch(network, panel, train, cpu, 0, 0), optimiser)
    model._valid(network, panel, np.arange(150, 200), cpu)


def predict_units(days: int, stocks: int) -> float:
    """Predict and write the units of a test segment; MiB of their values."""
    from training import handler

    from qlib_ext.dataset import PanelDataset
    from qlib_ext.models import MultiFactorRNN

    days //= 10
    index = pd.MultiIndex.from_product(
        [range_of(days), names_of(stocks)], names=["datetime", "instrument"]
    )
    columns = [("feature", f"x{k}") for k in range(6)] + [("label", "y")]
    values = np.random.default_rng(0).standard_normal((len(index), 7), np.float32)
    frame = pd.DataFrame(values, index, pd.MultiIndex.from_tuples(columns))
    segments = {"test": (range_of(days)[60], range_of(days)[-1])}
    model = MultiFactorRNN(n_factors=64, GPU=-1, mode="stream")
    model.step_len_, model.d_feat_ = 60, 6
    model.states_ = [model.build_network(6).state_dict()]
    units = model.predict_units(PanelDataset(handler(frame), segments))
    with tempfile.TemporaryDirectory() as folder:
        units.to_parquet(Path(folder) / "units.parquet")
    return units.size * 4 / 2**20


def measure(case: str, quick: bool, threads: int) -> dict:
    environment(threads)
    from qlib_ext.dataset import Panel

    days, stocks, width = sizes(quick)
    bare = days * stocks * width * 4 / 2**20
    # Libraries are no data: a small run loads all of them before the count begins.
    train_on(random_panel(200, 300, width), np.arange(100, 140))
    before = peak_mib()
    if case == "bare array":
        array = torch.zeros(days, stocks, width).normal_()
        assert array.shape[0] == days
    elif case == "conversion":
        frame = pd.DataFrame(
            np.ones((days * stocks, width), dtype=np.float32),
            index=pd.MultiIndex.from_product(
                [range_of(days), names_of(stocks)], names=["datetime", "instrument"]
            ),
            columns=[f"x{k}" for k in range(width)],
            copy=False,
        )
        Panel.from_frames(frame)
    elif case == "units":
        bare = predict_units(days, stocks)
    else:
        train_on(random_panel(days, stocks, width), np.arange(100, 140))
    peak = peak_mib()
    return {
        "case": case,
        "bare array MiB": bare,
        "peak MiB": peak,
        "before MiB": before,
        "over": (peak - before) / bare,
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.quick, args.threads)))
        return
    env = environment(args.threads)
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--one", case]
        command += ["--threads", str(args.threads)] + ["--quick"] * args.quick
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    days, stocks, width = sizes(args.quick)
    show(f"{stocks} stocks x {days} days x {width} features", rows, env, args.json)


if __name__ == "__main__":
    main()
