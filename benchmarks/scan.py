"""Selective scan, forward and backward: ours, plain loop, mambapy's pscan, nn.GRU.

Beside them a layer of DecompGRU, whose linear recurrence is that scan of one state a
channel, with its projections and gates: it stands for an nn.GRU of equal width.

python benchmarks/scan.py [--quick] [--json FILE] [--threads 2] [--methods A B ...]
                          [--size STOCKS DAYS WIDTH STATE]

300 stocks, 60 days, width 128 and state 16, unless `--size` says others. Times are the
least and the median of several rounds in which the methods take turns, so that a busy
moment hits all alike; "x nn.GRU" and "x ours" are ratios of the medians; "cpu" that of
the processor's seconds of all threads, which a busy machine changes less. Memory is
what the resident set grows beyond the inputs, gradients and outputs being part of it
(not with --methods), each method in a process of its own. `pip install mambapy` (MIT)
for its row.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from harness import environment, parser, show

from qlib_ext.nn.recurrent import DecompGRU
from qlib_ext.nn.selective_scan import _sequential_scan, selective_scan


def make(stocks: int, days: int, width: int, state: int):
    """Return the inputs of one layer, as Mamba's initialisation would make them."""
    torch.manual_seed(0)
    x = torch.randn(days, stocks, width)
    delta = torch.exp(torch.empty_like(x).uniform_(-6.9, -2.3))  # 0.001 to 0.1
    A = -torch.arange(1.0, state + 1).repeat(width, 1)
    B, C = torch.randn(2, days, stocks, state)
    return [v.requires_grad_() for v in (x, delta, A, B, C)]


def methods(given, slow: bool):
    """Name to function of no argument, each a forward and a backward pass."""
    x, delta, A, B, C = given
    dy = torch.randn_like(x)

    def both(function):
        def run():
            for v in given:
                v.grad = None
            function().backward(dy)

        return run

    gru = torch.nn.GRU(x.shape[-1], x.shape[-1])
    layer = DecompGRU(x.shape[-1], x.shape[-1], 1)
    out = {
        "nn.GRU": both(lambda: gru(x)[0]),
        "ours, zoh": both(lambda: selective_scan(*given)[0]),
        "DecompGRU layer": both(lambda: layer(x)[0]),
        "ours, euler": both(lambda: selective_scan(*given, discretisation="euler")[0]),
    }
    try:
        from mambapy.pscan import pscan

        def parallel():
            # mambapy is batch first: [n, l, d, s].
            X, step, b, c = (v.transpose(0, 1) for v in (x, delta, B, C))
            z = step.unsqueeze(-1) * A
            h = pscan(torch.exp(z), (step * X).unsqueeze(-1) * b.unsqueeze(2))
            return (h @ c.unsqueeze(-1)).squeeze(-1).transpose(0, 1)

        out["mambapy pscan"] = both(parallel)
    except ImportError:
        print("mambapy is not installed: its row is left out", file=sys.stderr)
    if slow:
        out["plain loop"] = both(
            lambda: _sequential_scan(*given, discretisation="euler")[0]
        )
    return out


def resident() -> float:
    """Resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def memory(name: str, size) -> None:
    """Print the growth of resident memory during one pass of `name`, in MiB."""
    small = make(8, 8, size[2], size[3])
    methods(small, True)[name]()  # libraries load their parts now
    given = make(*size)
    run = methods(given, True)[name]
    before, peak, stop = resident(), 0.0, False

    def watch():
        nonlocal peak
        while not stop:
            peak = max(peak, resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    peak = max(peak, resident())
    stop = True
    watcher.join()
    inputs = sum(v.numel() for v in given) * 4 / 2**20
    print(json.dumps({"grown": peak - before, "inputs": inputs}))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--methods", nargs="+", help="only these beside nn.GRU and ours")
    p.add_argument("--size", nargs=4, type=int, default=(300, 60, 128, 16))
    p.add_argument("--memory-of", metavar="METHOD", help="used by the script itself")
    args = p.parse_args()
    env = environment(args.threads)
    torch.set_flush_denormal(True)
    size = (100, 20, 64, 8) if args.quick else tuple(args.size)
    if args.memory_of:
        memory(args.memory_of, size)
        return
    rounds, slow_rounds = (3, 1) if args.quick else (15, 2)
    rounds = 7 if args.methods else rounds
    runs = methods(make(*size), True)
    if args.methods:
        runs = {name: runs[name] for name in ["nn.GRU", "ours, zoh", *args.methods]}
    times: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            if name in ("plain loop", "mambapy pscan") and i > slow_rounds:
                continue
            start, used = time.perf_counter(), time.process_time()
            run()
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    # The first round warms up.
    median = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    busy = {name: statistics.median(taken[1:]) for name, taken in cpu.items()}
    # x, delta, B, C and y, and the gradients of them all.
    data = 2 * 4 / 2**20 * size[1] * size[0] * (3 * size[2] + 2 * size[3])
    rows = []
    for name, taken in times.items():
        row = {
            "method": name,
            "least ms": 1e3 * min(taken[1:]),
            "median ms": 1e3 * median[name],
            "x nn.GRU": median[name] / median["nn.GRU"],
            "x nn.GRU, cpu": busy[name] / busy["nn.GRU"],
            "x ours": median[name] / median["ours, zoh"],
        }
        if not args.methods:
            command = [sys.executable, __file__, "--memory-of", name]
            command += ["--threads", str(args.threads)] + ["--quick"] * args.quick
            command += ["--size", *map(str, args.size)]
            grown = json.loads(subprocess.check_output(command).splitlines()[-1])
            row["peak MiB"] = peak = grown["grown"] + grown["inputs"]
            row["x inputs and outputs"] = peak / data
        rows.append(row)
    title = "Scan, forward + backward: {} stocks, {} days, width {}, state {}"
    title = title.format(*size)
    with torch.no_grad():
        y, _ = selective_scan(*make(*size))
        exact, _ = _sequential_scan(*(v.double() for v in make(*size)))
        env["largest error of y against float64"] = (
            f"{float((y - exact).abs().max() / exact.abs().max()):.1e} of the largest y"
        )
    env["inputs, outputs and their gradients"] = f"{data:.0f} MiB"
    show(title, rows, env, args.json)


if __name__ == "__main__":
    main()
