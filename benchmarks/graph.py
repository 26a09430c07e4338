"""Graph attention and correlation graphs: ours against peers.

python benchmarks/graph.py [--quick] [--json FILE] [--threads 2]

1. Attention over one day's stocks, width 64, forward and backward, 10 or 30 neighbours:
   ours (4 heads), torch-geometric's GATConv (4 heads), Qlib's GATs attention (its own
   code, 1 head, all pairs), dense masked attention (4 heads). Each in a process of its
   own; time is the least of several rounds, memory what the resident set grows at its
   peak. A method that would need more memory than is free is left out and said so.
2. The same of ours and GATConv alone, pass by pass in turn on one thread, in processor
   time: a busy machine slows both alike.
3. Building the 30-day correlation graph, 3,000 stocks x 1,000 days.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from harness import environment, parser, peak_mib, show

WIDTH, HEADS = 64, 4
METHODS = ("ours", "torch-geometric GATConv", "Qlib GATs", "dense masked")


def edges_of(stocks: int, k: int) -> torch.Tensor:
    """Return each stock's k random neighbours, int64 [2, stocks * k]."""
    rng = np.random.default_rng(0)
    source = np.stack([rng.permutation(stocks - 1)[:k] for _ in range(stocks)])
    target = np.arange(stocks)[:, None]
    source = source + (source >= target)  # never oneself
    pairs = np.stack([source.ravel(), np.broadcast_to(target, source.shape).ravel()])
    return torch.from_numpy(pairs)


def attention(method: str, stocks: int, k: int):
    """Return a function of no argument: one forward and backward pass."""
    torch.manual_seed(0)
    x = torch.randn(stocks, WIDTH, requires_grad=True)
    edges = edges_of(stocks, k)
    if method == "ours":
        from qlib_ext.nn.graph_attention import GraphAttention, Neighbors

        layer = GraphAttention(WIDTH, WIDTH, HEADS)
        # Sorting the day's edges belongs to the pass: they change from day to day.
        call = lambda: layer(x, Neighbors.of(edges, stocks))  # noqa: E731
    elif method == "torch-geometric GATConv":
        from torch_geometric.nn import GATConv

        conv = GATConv(WIDTH, WIDTH // HEADS, HEADS)
        call = lambda: conv(x, edges)  # noqa: E731
    elif method == "Qlib GATs":
        from qlib.contrib.model.pytorch_gats_ts import GATModel

        model = GATModel(hidden_size=WIDTH)
        call = lambda: model.cal_attention(x, x).mm(x)  # noqa: E731
    else:
        from qlib_ext.nn.graph_attention import GraphAttention

        layer = GraphAttention(WIDTH, WIDTH, HEADS)
        mask = torch.eye(stocks, dtype=torch.bool)
        mask[edges[1], edges[0]] = True

        def call():
            z = (x @ layer.weight.T).view(stocks, HEADS, -1)
            src, dst = (z * layer.att_src).sum(-1), (z * layer.att_dst).sum(-1)
            logits = torch.nn.functional.leaky_relu(
                src.T[:, None, :] + dst.T[:, :, None], 0.2
            )
            alpha = logits.masked_fill(~mask, -torch.inf).softmax(-1)  # [h, n, n]
            return (alpha @ z.transpose(0, 1)).transpose(0, 1).flatten(1)

    def run():
        x.grad = None
        call().square().sum().backward()

    return run


def need_mib(method: str, stocks: int) -> float:
    """Rough peak of a method in MiB, to leave out what cannot fit."""
    pairs = stocks * stocks * 4 / 2**20
    return {"Qlib GATs": pairs * 5 * WIDTH, "dense masked": pairs * 6 * HEADS}.get(
        method, 200.0
    )


def free_mib() -> float:
    """Available memory in MiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    return float("inf")


def resident_mib() -> float:
    """Resident set of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def child(task: dict) -> dict:
    """Time one method; runs in a process of its own."""
    torch.set_num_threads(task["threads"])
    run = attention(task["method"], task["stocks"], task["k"])
    before, peak, done = resident_mib(), 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_mib())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    grown = max(peak, resident_mib()) - before
    times = []
    until = time.perf_counter() + task["seconds"]
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"ms": 1e3 * min(times), "MiB": grown}


def apart(task: dict) -> dict:
    """Run `child` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(task)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def attention_rows(sizes, neighbours, threads: int, seconds: float) -> list[dict]:
    """Measure every method at every size."""
    rows = []
    for stocks in sizes:
        for k in neighbours:
            row: dict = {"stocks": stocks, "neighbours": k}
            for method in METHODS:
                if need_mib(method, stocks) > 0.8 * free_mib():
                    row[f"{method} ms"] = "not enough memory"
                    row[f"{method} MiB"] = f"~{need_mib(method, stocks):,.0f}"
                    continue
                task = {
                    "method": method,
                    "stocks": stocks,
                    "k": k,
                    "threads": threads,
                    "seconds": seconds,
                }
                found = apart(task)
                row[f"{method} ms"], row[f"{method} MiB"] = found["ms"], found["MiB"]
            if isinstance(row["Qlib GATs ms"], float):
                row["Qlib / ours"] = row["Qlib GATs ms"] / row["ours ms"]
            rows.append(row)
            print(row, flush=True)
    return rows


def beside_rows(sizes, neighbours) -> list[dict]:
    """Time ours and torch-geometric's by turns on one thread; the least of each."""
    torch.set_num_threads(1)
    rows = []
    for stocks, k in itertools.product(sizes, neighbours):
        passes = {m: attention(m, stocks, k) for m in METHODS[:2]}
        least = dict.fromkeys(passes, float("inf"))
        for _ in range(60 if stocks < 5000 else 15):
            for method, run in passes.items():
                start = time.thread_time()
                run()
                least[method] = min(least[method], 1e3 * (time.thread_time() - start))
        ours, theirs = least.values()
        row = {"stocks": stocks, "neighbours": k, "ours ms": ours, "GATConv ms": theirs}
        rows.append({**row, "GATConv / ours": theirs / ours})
    return rows


def correlation_row(stocks: int, days: int) -> dict:
    """Build a correlation graph on simulated returns with gaps."""
    from qlib_ext.graphs import correlation_edges

    rng = np.random.default_rng(0)
    length = days + 29
    calm = np.where(rng.random(length) < 0.1, 0.03, 0.008)
    market = rng.normal(size=length) * calm
    industry = rng.normal(size=(length, 31)) * 0.008
    member = rng.integers(0, 31, stocks)
    returns = market[:, None] + industry[:, member]
    returns += rng.normal(size=returns.shape) * 0.015
    returns = returns.astype(np.float32)
    for stock in range(stocks):  # suspensions of 2 to 40 days, and late listings
        for _ in range(rng.poisson(length / 1500)):
            at = rng.integers(length)
            returns[at : at + rng.integers(2, 40), stock] = np.nan
        if stock % 8 == 0:
            returns[: rng.integers(length), stock] = np.nan
    before = peak_mib()
    start = time.perf_counter()
    edges, state = correlation_edges(returns, max_neighbors=30, first=29)
    return {
        "stocks": stocks,
        "days": days,
        "seconds": time.perf_counter() - start,
        "peak MiB above input": peak_mib() - before,
        "graph MiB": sum(e.nbytes for e in edges) / 2**20,
        "edges, mean day": float(np.mean([edges[s].shape[1] for s in state])),
    }


def main() -> None:
    """Run both parts."""
    options = parser(__doc__)
    options.add_argument("--child", help="for the script's own use")
    args = options.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    env = environment(args.threads)
    sizes = (300,) if args.quick else (300, 1000, 5000)
    neighbours = (10,) if args.quick else (10, 30)
    rows = attention_rows(sizes, neighbours, args.threads, 1 if args.quick else 3)
    beside = beside_rows(sizes, neighbours)
    build = correlation_row(*((300, 60) if args.quick else (3000, 1000)))
    file = args.json

    def part(name):
        return None if file is None else str(Path(file).with_suffix(f".{name}.json"))

    show("Graph attention, forward + backward", rows, env, part("attention"))
    show("Beside torch-geometric, one thread", beside, env, part("beside"))
    show("Correlation graph", [build], env, part("correlation"))


if __name__ == "__main__":
    main()
