"""One training epoch of every model on the same panel, against MultiFactorRNN's.

python benchmarks/epoch.py [--quick] [--json FILE] [--threads 2]

300 stocks, 1,500 days, 6 features, a 60-day look-back, each model at its defaults:
GRUGAT with three graphs, Mamba's dual task with ten styles and both of its graphs.
Building the graphs is not part of an epoch (benchmarks/graph.py). In `windows` mode 60
days are trained and the time scaled up. Each time is the least of two rounds.
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import torch
from harness import environment, parser, show


def make_panel(stocks: int, days: int):
    """Random features, labels, styles and industries; the panel needs no store."""
    from qlib_ext.dataset import Panel

    rng = np.random.default_rng(0)
    shape = (days, stocks)

    def normal(width: int) -> np.ndarray:
        return rng.normal(size=(*shape, width)).astype(np.float32)

    industry = np.broadcast_to(rng.integers(0, 31, stocks), shape)[..., None]
    label = torch.from_numpy(normal(1) / 20)
    return Panel(
        dates=pd.bdate_range("2012-01-01", periods=days),
        instruments=pd.Index([f"S{i:04d}" for i in range(stocks)]),
        feature_names=[f"f{i}" for i in range(6)],
        features=torch.from_numpy(normal(6)),
        present=torch.ones(shape, dtype=torch.bool),
        label_names=["y"],
        labels=label,
        raw_labels=label,
        risk_names=["industry", *(f"style{i}" for i in range(10))],
        risk=torch.from_numpy(
            np.concatenate([industry.astype(np.float32), normal(10)], axis=-1)
        ),
    )


def seconds(model, panel, mode: str) -> float:
    """Time of one epoch of a model that has prepared its graphs."""
    days = len(panel.dates)
    train = np.arange(60, days)
    used = train if mode == "stream" else train[:: max(1, len(train) // 60)]
    model.step_len_ = model.step_len
    model.on_panel(panel)
    network = model.build_network(6)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    if hasattr(model, "_labels_of"):  # labels are neutralised once, not every epoch
        from qlib_ext.models.mamba import neutral_labels

        model._targets = neutral_labels(panel, 0, model.task)
    best = np.inf
    for _ in range(2):
        start = time.perf_counter()
        epoch = model._epoch(network, panel, used, torch.device("cpu"), 0, 0)
        model._train_epoch(epoch, optimiser)
        best = min(best, time.perf_counter() - start)
    return best * len(train) / len(used)


def main() -> None:
    from qlib_ext.models import GRUGAT, Mamba, MultiFactorRNN

    args = parser(__doc__).parse_args()
    env = environment(args.threads)
    torch.set_flush_denormal(True)
    panel = make_panel(*((100, 200) if args.quick else (300, 1500)))
    flow = {"fields": ["f0", "f1", "f2"], "k": 10}
    returns = {
        "class": "FlowGraph",
        "kwargs": {**flow, "name": "correlation", "window": 30},
    }
    three = [
        "industry",
        {"class": "FlowGraph", "kwargs": {**flow, "name": "financial", "window": 60}},
        {"class": "FlowGraph", "kwargs": {**flow, "window": 20}},
    ]
    models = {
        "MultiFactorRNN, K=1": (MultiFactorRNN, {"n_factors": 1}),
        "MultiFactorRNN, K=64": (MultiFactorRNN, {"n_factors": 64}),
        "GRUGAT": (GRUGAT, {"graphs": three, "weighting": "learned", "n_factors": 1}),
        "Mamba, one task": (Mamba, {"task": "alpha_neutral"}),
        "Mamba, dual": (Mamba, {"graphs": ["industry", returns]}),
        "Mamba, dual, euler": (
            Mamba,
            {"graphs": ["industry", returns], "discretisation": "euler"},
        ),
    }
    rows = []
    for mode in ("stream", "windows"):
        first = None
        for name, (cls, kwargs) in models.items():
            taken = seconds(cls(mode=mode, GPU=-1, **kwargs), panel, mode)
            first = first or taken
            rows.append(
                {
                    "mode": mode,
                    "model": name,
                    "seconds": taken,
                    "x MultiFactorRNN": taken / first,
                }
            )
            print(rows[-1], flush=True)
    shape = f"{panel.features.shape[1]} stocks x {len(panel.dates)} days"
    show(f"One training epoch, {shape}", rows, env, args.json)


if __name__ == "__main__":
    main()
