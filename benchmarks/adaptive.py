"""What adaptation buys: a network trained once, yearly, naively on, or by DoubleAdapt.

python benchmarks/adaptive.py [--quick] [--stocks N] [--seeds N] [--ways A B ...]
                              [--networks A B ...] [--data FILE] [--table] [--threads N]

All A-shares of daily_cn_all (delisted ones included), of which a fixed random sample of
`--stocks` that traded in 2010 or later; train 2010-2014, valid 2015, online 2016-2019,
segments 11 trading days apart. Six day features, label: return from the close of t+1 to
that of t+11, neutralised on size, standardised over the day. Features are standardised
by statistics of 2010-2014 for every way.

once            trained on 2010-2014
yearly          for each test year Y again, on 2010 to Y-2, early stop on Y-1
naive           once, then a pass of Adam over the newest 20 known days before every 20
naive 5         the same in steps of 5 days; what it learns is as old as the label needs
double_adapt    DoubleAdapt, steps of 20 days; `double_adapt 5` of 5
... leaking     the same, but a label is taken for known on the day after its own, as if
                it had no horizon: what such a leak would show. Never a result.

Networks: GRU; ALSTM (windows of every fifth day); MASTER without its gate, or guided by
the 63 numbers of three indices, or by those and the styles of the recent winners of all
shares (the store has no memberships and six styles, so 24 numbers and not 120);
`RiskControl`, an ALSTM that reads the styles and learns by its IC, with and without its
penalties. For the last two also exposure, excess of the top of 10 groups and drawdown
in the fifth of the months in which styles turned most sharply, and in the others
(`ReversalRecord`).

RankIC: mean of the daily ones against the raw return, which is the mean over all starts
of every tenth day; IC_IR: of every tenth day, mean over starts, not annualised. Offline
seconds are those before the first score, online all later ones; both of the processor,
which a busy machine changes less than the clock. Rows go to
benchmarks/results/cn_all_adaptive.csv, one a run; a stopped study goes on where it was.
"""

from __future__ import annotations

import os
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from all_shares import bars_of, with_industry
from harness import environment, has_row, parser, put_row, read_rows, show

RESULTS = Path(__file__).parent / "results" / "cn_all_adaptive.csv"
TRAIN, VALID = ("2010-01-04", "2014-12-15"), ("2015-01-05", "2015-12-15")
YEARS = (2016, 2017, 2018, 2019)
TEST = ("2016-01-04", "2019-12-31")
INDICES = ("SH000300", "SH000905", "SH000852")
# Sizes of the recurrent networks and of MASTER.
QUICK = {"n_epochs": 8}, {"hidden_size": 16, "num_layers": 1, "step_len": 20}, 64
FULL = {"n_epochs": 20}, {"hidden_size": 64, "num_layers": 2, "step_len": 60}, 256
ALSTM = {"rnn": "ALSTM", "day_stride": 5}
MASTER = {"day_stride": 5}
# Class, its arguments, the handler's.
NETWORKS: dict[str, tuple[str, dict, dict]] = {
    "GRU": ("MultiFactorRNN", {}, {}),
    "ALSTM": ("MultiFactorRNN", ALSTM, {}),
    "MASTER, no gate": ("MASTER", {**MASTER, "gate": False}, {}),
    "MASTER, 63": ("MASTER", MASTER, {"market": {}}),
    "MASTER, 63 + 24": (
        "MASTER",
        MASTER,
        {"market": {"winners": True, "pools": ["all"]}, "styles": "auto"},
    ),
    "RiskControl": (
        "RiskControl",
        ALSTM,
        {"style_features": True, "styles": "auto"},
    ),
    "RiskControl, no penalties": (
        "RiskControl",
        {**ALSTM, "deviation": 0.0, "momentum": 0.0},
        {"style_features": True, "styles": "auto"},
    ),
}
# Nothing here was tuned on the test years: rates are the classes' own.
WAYS: dict[str, dict] = {
    "once": {"adapt": "none"},
    "yearly": {"adapt": "none"},
    "naive": {"adapt": "naive"},
    "naive 5": {"adapt": "naive", "interval": 5, "delay": True},
    "double_adapt": {"adapt": "double_adapt"},
    "double_adapt 5": {"adapt": "double_adapt", "interval": 5, "delay": True},
    "naive leaking": {"adapt": "naive"},
    "naive 5 leaking": {"adapt": "naive", "interval": 5},
    "double_adapt leaking": {"adapt": "double_adapt"},
    "double_adapt 5 leaking": {"adapt": "double_adapt", "interval": 5},
}
NET_OF_SIZE = [
    {
        "class": name,
        "module_path": "data_handlers.processors",
        "kwargs": {"fields_group": "label", **options},
    }
    for name, options in (
        ("CSNeutralize", {"industry": None, "styles": ["log_mcap"]}),
        ("CSZScore", {}),
    )
]
IN_MONTHS = ("exposure", "chase", "excess", "drawdown")
DEFAULT = ("once", "yearly", "naive", "double_adapt")


def named(network: str, way: str) -> str:
    return way if network == "GRU" else f"{network} {way}"


NAMES = {named(*pair): pair for pair in product(NETWORKS, WAYS)}


def store_of(file: Path, stocks: int) -> Path:
    """Make a store of the sample, once."""
    from qlib_ext.ingest.store import is_store, write_store

    root = Path(tempfile.gettempdir()) / f"qlib_ext_cn_all_{stocks}_indices"
    if is_store(root):
        return root
    late = pd.read_parquet(
        file,
        columns=["instrument"],
        filters=[("date", ">=", pd.Timestamp("2010-01-01"))],
    )["instrument"].unique()
    names = np.random.default_rng(0).permutation(np.sort(late))[:stocks].tolist()
    raw = pd.read_parquet(
        file,
        filters=[
            ("instrument", "in", names),
            ("date", ">=", pd.Timestamp("2009-06-01")),
        ],
    )
    index = pd.read_parquet(
        file.with_name("index_daily_cn.parquet"),
        filters=[("instrument", "in", list(INDICES))],
    )
    index["datetime"] = pd.to_datetime(index.pop("date"))
    bars = with_industry(bars_of(raw), file.parent)
    index = index[index["datetime"].isin(bars["datetime"])]
    write_store(root, pd.concat([bars, index]), index_codes=INDICES)
    return root


def dataset_of(train, valid, test, options):
    from data_handlers.day import DayHandler
    from qlib_ext.dataset import PanelDataset

    handler = DayHandler(
        start_time="2009-07-01",
        end_time=TEST[1],
        fit_start_time=TRAIN[0],
        fit_end_time=TRAIN[1],
        learn_processors=NET_OF_SIZE,
        **{"styles": [], **options},
    )
    return PanelDataset(
        handler, {"train": train, "valid": valid, "test": test}, purge="trim"
    )


def scores(
    network: str, way: str, size: tuple, seed: int
) -> tuple[pd.Series, float, float, object]:
    """Score the test years; seconds offline and online, and the data set."""
    from qlib_ext.models import IncrementalModel

    class Leaking(IncrementalModel):
        """The planted leak that tests/qlib_ext/audit/test_adaptive.py catches."""

        def _known_reach(self, handler):
            return 1

    walker = Leaking if way.endswith("leaking") else IncrementalModel
    cls, own, options = NETWORKS[network]
    kwargs = {**size[0], **own, "seed": seed, "early_stop": 5, "GPU": -1}
    if cls == "MASTER":
        kwargs["d_model"] = size[2]
    else:
        kwargs |= {**size[1], "n_factors": 1}
    if WAYS[way]["adapt"] == "double_adapt":
        kwargs["n_epochs"] *= 3  # an epoch has a step a task, not a step a batch
    parts, seconds = [], []
    spans = [(TRAIN, VALID, TEST)]
    if way == "yearly":
        spans = [
            (
                (TRAIN[0], f"{year - 2}-12-15"),
                (f"{year - 1}-01-01", f"{year - 1}-12-15"),
                (f"{year}-01-01", f"{year}-12-31"),
            )
            for year in YEARS
        ]
    for span in spans:
        data = dataset_of(*span, options)
        _ = data.panel
        model = walker({"class": cls, "kwargs": kwargs}, **WAYS[way])
        start = time.process_time()
        model.fit(data)
        seconds.append(time.process_time() - start)
        start = time.process_time()
        parts.append(model.predict(data))
        seconds.append(time.process_time() - start)
    return pd.concat(parts), seconds[0], sum(seconds[1:]), data


class Run:
    """What a record asks of a recorder: the score, and a place for its figures."""

    def __init__(self, score: pd.Series) -> None:
        self.figures: dict[str, float] = {}
        self.log_metrics = self.figures.update
        self.load_object = lambda name: score.to_frame("score")


def in_reversals(score: pd.Series, data) -> dict[str, float]:
    from qlib_ext.report.risk import ReversalRecord

    run = Run(score)
    ReversalRecord(run, data)._generate()
    return run.figures


def figures(score: pd.Series, panel) -> dict[str, float]:
    from qlib_ext.metrics import rank_ic

    days = panel.days(TEST)
    wide = score.unstack("instrument")
    wide = wide.reindex(index=panel.dates[days], columns=panel.instruments)
    truth = panel.raw_labels[days][..., 0]
    daily = rank_ic(torch.tensor(wide.to_numpy()), truth).numpy()
    daily = pd.Series(daily, panel.dates[days])
    starts = [daily.iloc[k::10].dropna() for k in range(10)]
    by_year = daily.groupby(daily.index.year).mean()
    return {
        "rank_ic": daily.mean(),
        "ic_ir": float(np.mean([s.mean() / s.std() for s in starts])),
        **{f"rank_ic_{year}": by_year[year] for year in YEARS},
    }


def main() -> None:
    p = parser(__doc__, threads=1)
    p.add_argument("--stocks", type=int, default=1000)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(DEFAULT))
    p.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["GRU"])
    p.add_argument("--data", type=Path, help="daily_cn_all.parquet")
    p.add_argument("--table", action="store_true", help="only show what is there")
    args = p.parse_args()
    env = environment(args.threads)
    size = f"{args.stocks}{' quick' if args.quick else ''}"
    if not args.table:
        import qlib

        file = args.data or Path(os.environ["QLIB_EXT_DATA"]) / "daily_cn_all.parquet"
        store = store_of(file, args.stocks)
        qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=30)
        for seed, network, way in product(range(args.seeds), args.networks, args.ways):
            name = f"{named(network, way)}, {size}"
            if has_row(RESULTS, name, seed):
                continue
            score, offline, online, data = scores(
                network, way, QUICK if args.quick else FULL, seed
            )
            row = {"model": name, "seed": seed, **figures(score, data.panel)}
            row |= {"offline_s": offline, "online_s": online, "load": env["load"]}
            if network.startswith("RiskControl"):
                row |= in_reversals(score, data)
            put_row(RESULTS, row, [f"{n}, {size}" for n in NAMES])
            print(row, flush=True)
    rows = read_rows(RESULTS)
    rows = rows[rows["model"].str.endswith(f", {size}")]
    rows["model"] = rows["model"].str.removesuffix(f", {size}")
    mean = rows.groupby("model", sort=False).mean(numeric_only=True)
    spread = rows.groupby("model", sort=False)["rank_ic"].std()
    table = []
    for name in (n for n in NAMES if n in mean.index):
        one = mean.loc[name]
        line = {
            "way": name,
            "seeds": int((rows["model"] == name).sum()),
            "RankIC %": 100 * one["rank_ic"],
            "± %": 100 * spread[name],
            "IC_IR": one["ic_ir"],
            **{f"{y} %": 100 * one[f"rank_ic_{y}"] for y in YEARS},
            "offline s": one["offline_s"],
            "online s": one["online_s"],
        }
        if (of := named(NAMES[name][0], "yearly")) in mean.index:
            yearly = mean.loc[of]
            line["all / yearly"] = (one["offline_s"] + one["online_s"]) / (
                yearly["offline_s"] + yearly["online_s"]
            )
            line["online / yearly"] = one["online_s"] / yearly["online_s"]
        line |= {
            f"{kind} {what}": one[f"{kind} {what}"]
            for kind, what in product(("sharp", "other"), IN_MONTHS)
            if pd.notna(one.get(f"{kind} {what}"))
        }
        table.append(line)
    show(
        f"{args.stocks} random A-shares, {TEST[0]} to {TEST[1]}, 10-day label",
        table,
        env,
        args.json,
    )


if __name__ == "__main__":
    main()
