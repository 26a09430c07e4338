"""Training speed on one panel: Qlib GRU_ts, a bare PyTorch loop, our two modes.

python benchmarks/training.py [--quick] [--json FILE] [--threads N]

With OMP_WAIT_POLICY=active in front it shows what threads that spin cost on a busy
machine; the package sets `passive`. "stream, parts" takes runs of 80 days of a quarter
of the stocks (`chunk`, `stock_parts`): as many steps of the optimiser as "stream";
"long runs" are of 160 days, with half the steps. "stream, nn.GRU" has torch's GRU in
the place of our compiled one.

300 stocks (or --stocks) x 1,500 days, 6 features, look-back 60, hidden 64, 2 layers,
random data.
Each contender runs in a process of its own, so that peak memory is its own; samples
per second are those of the training loop alone, after one warm-up, over as many days as
fit the time budget. The bare loop is what one would write by hand: a day a batch, the
window gathered by slicing, `nn.GRU`, Adam. Qlib's model is the released
`pytorch_gru_ts.GRU` with its own `TSDatasetH` and data loader, unchanged (batch size
its default 2,000; n_jobs 0, as its worker processes would use more cores).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch
from harness import environment, parser, peak_mib, show

FEATURES, LOOK_BACK, HIDDEN, LAYERS = 6, 60, 64, 2
CONTENDERS = (
    "Qlib GRU_ts",
    "bare loop",
    "windows",
    "stream, nn.GRU",
    "stream",
    "stream, parts",
    "stream, long runs",
)


def frame(stocks: int, days: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [
            pd.bdate_range("2014-01-01", periods=days),
            [f"S{i:04d}" for i in range(stocks)],
        ],
        names=["datetime", "instrument"],
    )
    columns = [("feature", f"x{k}") for k in range(FEATURES)] + [("label", "y")]
    return pd.DataFrame(
        rng.standard_normal((len(index), FEATURES + 1), dtype=np.float32),
        index=index,
        columns=pd.MultiIndex.from_tuples(columns),
    )


def handler(data: pd.DataFrame):
    from qlib.data.dataset.handler import DataHandlerLP
    from qlib.data.dataset.loader import StaticDataLoader

    return DataHandlerLP(data_loader=StaticDataLoader(data))


def qlib_gru(data: pd.DataFrame, days: int) -> tuple[int, float]:
    from qlib.contrib.model.pytorch_gru_ts import GRU
    from qlib.data.dataset import TSDatasetH
    from torch.utils.data import DataLoader

    dates = data.index.unique("datetime")
    segments = {"train": (dates[-days], dates[-1])}
    dataset = TSDatasetH(step_len=LOOK_BACK, handler=handler(data), segments=segments)
    model = GRU(
        d_feat=FEATURES,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        dropout=0.1,
        GPU=-1,
        seed=0,
    )
    # The lines of GRU.fit before its epochs.
    part = dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
    part.config(fillna_type="ffill+bfill")
    weights = np.ones(len(part))
    from qlib.model.utils import ConcatDataset

    loader = DataLoader(
        ConcatDataset(part, weights),
        batch_size=model.batch_size,
        shuffle=True,
        drop_last=True,
    )
    started = time.perf_counter()
    model.train_epoch(loader)
    batches = len(part) // model.batch_size
    return batches * model.batch_size, time.perf_counter() - started


def bare_loop(data: pd.DataFrame, days: int) -> tuple[int, float]:
    torch.manual_seed(0)
    n = len(data.index.unique("instrument"))
    values = torch.from_numpy(data.to_numpy()).reshape(-1, n, FEATURES + 1)
    x, y = values[..., :FEATURES], values[..., FEATURES]
    gru = torch.nn.GRU(FEATURES, HIDDEN, LAYERS, dropout=0.1)
    linear = torch.nn.Linear(HIDDEN, 1)
    parameters = [*gru.parameters(), *linear.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    order = torch.randperm(days) + len(x) - days
    started = time.perf_counter()
    for t in order.tolist():
        h = gru(x[t - LOOK_BACK + 1 : t + 1])[0][-1]
        out = linear(h).squeeze(-1)
        out = (out - out.mean()) / (out.std() + 1e-5)
        loss = (out - y[t]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return days * n, time.perf_counter() - started


def ours(
    data: pd.DataFrame, days: int, mode: str, torchs: bool = False, **options
) -> tuple[int, float]:
    from qlib_ext.dataset import Panel
    from qlib_ext.models import MultiFactorRNN
    from qlib_ext.models.batches import memory_kept

    model = MultiFactorRNN(
        hidden_size=HIDDEN, num_layers=LAYERS, step_len=LOOK_BACK, mode=mode, GPU=-1,
        n_factors=1, **options,
    )  # fmt: skip
    panel = Panel.from_handler(handler(data))
    model.step_len_, model.d_feat_ = LOOK_BACK, FEATURES
    torch.manual_seed(0)
    network = model.build_network(FEATURES)
    if torchs:
        network.encoder.rnn = torch.nn.GRU(FEATURES, HIDDEN, LAYERS, dropout=0.1)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    train = np.arange(len(panel.dates) - days, len(panel.dates))
    started = time.perf_counter()
    cpu = torch.device("cpu")
    with memory_kept():  # as `fit` does
        model._train_epoch(model._epoch(network, panel, train, cpu, 0, 0), optimiser)
    return days * len(panel.instruments), time.perf_counter() - started


def measure(name: str, stocks: int, total: int, budget: float, threads: int) -> dict:
    environment(threads)
    torch.set_flush_denormal(True)
    data = frame(stocks, total)
    runs = {
        "Qlib GRU_ts": qlib_gru,
        "bare loop": bare_loop,
        "windows": lambda d, k: ours(d, k, "windows"),
        "stream, nn.GRU": lambda d, k: ours(d, k, "stream", True),
        "stream": lambda d, k: ours(d, k, "stream"),
        "stream, parts": lambda d, k: ours(d, k, "stream", chunk=80, stock_parts=4),
        "stream, long runs": lambda d, k: ours(
            d, k, "stream", chunk=160, stock_parts=4
        ),
    }
    before = peak_mib()
    days = {"stream, parts": 80, "stream, long runs": 160}.get(name, 20)
    samples, seconds = runs[name](data, days)  # warm-up, and how much fits the budget
    days = int(min(total - LOOK_BACK, max(days, days * budget / seconds)))
    samples, seconds = runs[name](data, days)
    return {
        "contender": name,
        "samples/s": samples / seconds,
        "days": days,
        "seconds": seconds,
        "peak MiB": peak_mib(),
        "of which data and libraries": before,
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    p.add_argument("--stocks", type=int, default=300)
    p.add_argument("--rounds", type=int, default=3, help="contenders take turns")
    args = p.parse_args()
    total, budget = (400, 3.0) if args.quick else (1500, 20.0)
    stocks = 100 if args.quick else args.stocks
    if args.one:
        print(json.dumps(measure(args.one, stocks, total, budget, args.threads)))
        return
    env = environment(args.threads)
    found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(1 if args.quick else args.rounds):
        for name in CONTENDERS:
            command = [
                sys.executable,
                __file__,
                "--one",
                name,
                "--threads",
                str(args.threads),
                "--stocks",
                str(args.stocks),
            ]
            command += ["--quick"] if args.quick else []
            out = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout
            found[name].append(json.loads(out.strip().splitlines()[-1]))
            print(f"{name}: {found[name][-1]['samples/s']:,.0f} samples/s", flush=True)
    rows = []
    for name, runs in found.items():
        # Ratios pair by pair: the contenders of one round met the same machine.
        def ratio(base, runs=runs):
            pairs = zip(runs, found[base], strict=True)
            return float(np.median([a["samples/s"] / b["samples/s"] for a, b in pairs]))

        rows.append(
            {
                "contender": name,
                "samples/s": float(np.median([r["samples/s"] for r in runs])),
                "x bare loop": ratio("bare loop"),
                "x Qlib GRU_ts": ratio("Qlib GRU_ts"),
                "x stream, nn.GRU": ratio("stream, nn.GRU"),
                "peak MiB": max(r["peak MiB"] for r in runs),
                "days timed": runs[0]["days"],
            }
        )
    show(
        f"{stocks} stocks x {total} days, L={LOOK_BACK}, hidden {HIDDEN}, "
        f"{LAYERS} layers, median of {len(found['stream'])} rounds",
        rows,
        env,
        args.json,
    )


if __name__ == "__main__":
    main()
