"""A whole study in ten minutes of a GPU: pack here, run there, read the JSON.

python benchmarks/gpu_study.py pack [--store DIR] [--stocks N] [--out FILE]
python benchmarks/gpu_study.py run [--panel FILE] [--out DIR] [--minutes M] [--quick]
                                   [--models RNN Mamba] [--seeds 0 1 2] [--together N]

`pack` reads a store (whole_market.py builds it) and writes one file of at most 60 MB:
day features, presence, the neutral and the raw label of a fixed random part of the
names, in half precision. `run` first checks that scores of one
network on the CPU and on the device agree (mean rank correlation of a day), then trains
K = 1 and K = 64 and Mamba on the years before 2017, 2018 and 2019, seeds 0 to 2, in
rounds of one seed, and writes figures and times to study.json after each fit, until the
minutes are over; fits that are there are not repeated. --together trains that many
seeds at once, a process each on the same device, with a study of each under `seed N`:
whether that pays shows in the sum of their samples a second. Without a GPU it runs on
the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from whole_market import RUNS, store_of, universe

from data_handlers.files import replacing, write_json
from qlib_ext.dataset import Panel, PanelDataset
from qlib_ext.metrics import non_overlapping, over_starts, rank_ic
from qlib_ext.models import Mamba, MultiFactorRNN
from qlib_ext.models._base import TorchModel

YEARS = (2017, 2018, 2019)
LARGEST = 60 * 2**20
TRAINING = {**RUNS, "stock_parts": 4}
HORIZON, PURGE = 10, 11


def pack(store: str, stocks: int, out: Path) -> None:
    import qlib

    from data_handlers.day import DayHandler

    qlib.init(provider_uri=store, region="cn", kernels=1)
    handler = DayHandler(
        instruments=universe(store, stocks), start_time="2007-01-01",
        end_time="2019-12-31", fit_start_time="2007-01-01", fit_end_time="2015-12-31",
    )  # fmt: skip
    panel = Panel.from_handler(handler)
    rows = panel.present.numpy()
    kept = {
        name: getattr(panel, name).numpy()[rows].astype(np.float16)
        for name in ("features", "labels", "raw_labels")
    }
    with replacing(out) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, present=np.packbits(rows), shape=rows.shape, **kept,
            dates=panel.dates.values.astype("M8[D]").astype("i8"),
            names=np.array(panel.instruments, dtype="U8"),
            features_named=np.array(panel.feature_names),
        )  # fmt: skip
    size = out.stat().st_size
    print(f"{out}: {rows.shape} days and stocks, {size / 2**20:.1f} MiB")
    if size > LARGEST:
        raise SystemExit(f"more than {LARGEST / 2**20:.0f} MiB: take fewer --stocks.")


def unpack(file: Path) -> Panel:
    packed = np.load(file, allow_pickle=False)
    shape = tuple(packed["shape"])
    rows = (
        np.unpackbits(packed["present"], count=shape[0] * shape[1]).reshape(shape) > 0
    )

    def full(name: str, absent: float) -> torch.Tensor:
        values = packed[name].astype(np.float32)
        array = np.full((*shape, values.shape[-1]), absent, np.float32)
        array[rows] = values
        return torch.from_numpy(array)

    return Panel(
        dates=pd.DatetimeIndex(packed["dates"].astype("M8[D]").astype("M8[ns]")),
        instruments=pd.Index(packed["names"].astype(str)),
        feature_names=list(map(str, packed["features_named"])),
        features=full("features", 0.0),
        present=torch.from_numpy(rows),
        label_names=["RET10"],
        labels=full("labels", np.nan),
        raw_labels=full("raw_labels", np.nan),
    )


class Packed(PanelDataset):
    """Data set of a panel that is there already."""

    def __init__(self, panel: Panel, year: int) -> None:
        days = panel.dates
        first = int(days.searchsorted(pd.Timestamp(year, 1, 1)))
        valid = int(days.searchsorted(pd.Timestamp(year - 1, 1, 1)))
        last = int(days.searchsorted(pd.Timestamp(year + 1, 1, 1))) - 1
        self._panel = panel
        self.segments = {
            "train": (days[0], days[valid - 1 - PURGE]),
            "valid": (days[valid], days[first - 1 - PURGE]),
            "test": (days[first], days[last]),
        }

    @property
    def panel(self) -> Panel:
        """The panel that was packed."""
        return self._panel


def daily(model: TorchModel, data: Packed) -> torch.Tensor:
    """RankIC of each test day."""
    score = model.predict(data).unstack("instrument")
    panel = data.panel
    at = panel.dates.get_indexer(score.index)
    values = score.reindex(columns=panel.instruments).to_numpy(np.float32)
    return rank_ic(torch.from_numpy(values), panel.raw_labels[at][..., 0])


def agreement(panel: Panel, cls: type, settings: dict) -> dict:
    """Rank correlation of one network's scores on the CPU and on the device."""
    data = Packed(panel, YEARS[0])
    model = cls(**{**settings, "n_epochs": 1, "GPU": 0})
    model.fit(data)
    found = {}
    for amp in (True, False):
        model.amp, model.GPU = amp, 0
        device = model.predict(data).unstack()
        model.GPU = -1
        host = model.predict(data).unstack()
        name = "bfloat16" if amp else "float32"
        found[name] = float(device.corrwith(host, axis=1, method="spearman").mean())
    return found


def together(args: argparse.Namespace, out: Path) -> None:
    """Train each seed in a process of its own, so many at once."""
    end = time.monotonic() + 60 * args.minutes
    passed = ["--panel", args.panel, "--models", *args.models]
    passed += ["--quick"] if args.quick else []
    waiting, running = list(args.seeds), {}
    while waiting or running:
        while waiting and len(running) < args.together:
            seed = waiting.pop(0)
            command = [sys.executable, __file__, "run", "--seeds", seed, *passed]
            command += ["--out", out / f"seed {seed}"]
            command += ["--minutes", max(0.0, (end - time.monotonic()) / 60)]
            running[seed] = subprocess.Popen(list(map(str, command)))
        time.sleep(0.2)
        for seed, process in list(running.items()):
            if process.poll() is not None:
                del running[seed]
                if process.returncode:
                    raise SystemExit(f"seed {seed} ended with {process.returncode}.")


def models_of(names: list[str], quick: bool) -> dict[str, tuple[type, dict]]:
    """Classes and settings of the fits of a year and seed."""
    rnn, mamba = dict(TRAINING), {**TRAINING, "task": "alpha_raw"}
    if quick:
        rnn |= {"n_epochs": 1, "hidden_size": 8}
        mamba |= {"n_epochs": 1, "d_model": 8, "d_state": 4}
    units = 4 if quick else 64
    found: dict[str, tuple[type, dict]] = {}
    if "RNN" in names:
        found["K=1"] = MultiFactorRNN, {**rnn, "n_factors": 1}
        rnn |= {"n_factors": units, "best_epochs": 5}
        found[f"K={units}"] = MultiFactorRNN, rnn
    if "Mamba" in names:
        found["Mamba"] = Mamba, mamba
    return found


def run(args: argparse.Namespace, out: Path) -> None:
    end = time.monotonic() + 60 * args.minutes
    panel = unpack(args.panel)
    fits = models_of(args.models, args.quick)
    out.mkdir(parents=True, exist_ok=True)
    target = out / "study.json"
    done = json.loads(target.read_text()) if target.exists() else {"fits": {}}
    cuda = torch.cuda.is_available()
    done["device"] = torch.cuda.get_device_name(0) if cuda else "CPU"
    done["torch"] = torch.__version__
    done.setdefault("agreement", {})
    for name, (cls, settings) in fits.items():
        if name not in done["agreement"]:
            done["agreement"][name] = agreement(panel, cls, settings)
            write_json(target, done)
    for seed in args.seeds:
        for kind, (cls, settings) in fits.items():
            for year in YEARS:
                name = f"{kind} {year} seed {seed}"
                if name in done["fits"] or time.monotonic() > end:
                    continue
                data = Packed(panel, year)
                model = cls(**{**settings, "seed": seed, "GPU": 0})
                started = time.perf_counter()
                model.fit(data)
                seconds = time.perf_counter() - started
                values = daily(model, data)
                starts = [non_overlapping(values, HORIZON, k) for k in range(HORIZON)]
                ten, _ = over_starts(values, starts)
                epochs = len(model.history_[0])
                train = panel.days(data.segments["train"])
                samples = epochs * int(panel.present[train].sum())
                done["fits"][name] = {
                    "seconds": seconds,
                    "epochs": epochs,
                    "samples/s": samples / seconds,
                    "RankIC %": 100 * ten.mean,
                    "IC_IR": ten.ir,
                    "daily RankIC %": 100 * float(values.nanmean()),
                    "valid": [row["valid_rank_ic"] for row in model.history_[0]],
                    "peak MiB": torch.cuda.max_memory_allocated() / 2**20
                    if cuda
                    else 0,
                }
                write_json(target, done)
                print(name, done["fits"][name], flush=True)
    print(f"{len(done['fits'])} fits in {target}")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("command", choices=("pack", "run"))
    p.add_argument("--store", help="default data/cn_all")
    p.add_argument("--stocks", type=int, default=1500)
    p.add_argument("--panel", type=Path, default=Path("build/gpu_panel.npz"))
    p.add_argument("--out", type=Path, help="file of pack, folder of run")
    p.add_argument("--minutes", type=float, default=9.0)
    p.add_argument(
        "--models", nargs="*", choices=("RNN", "Mamba"), default=["RNN", "Mamba"]
    )
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    p.add_argument("--together", type=int, default=1, help="seeds trained at once")
    p.add_argument("--quick", action="store_true", help="one epoch of a tiny network")
    args = p.parse_args()
    if args.command == "pack":
        out = args.out or args.panel
        out.parent.mkdir(parents=True, exist_ok=True)
        pack(store_of(args.store), args.stocks, out)
    else:
        out = args.out or Path("runs/gpu")
        (together if args.together > 1 else run)(args, out)


if __name__ == "__main__":
    main()
