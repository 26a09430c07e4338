"""Every planted leak is caught by its check, and its clean twin passes."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from qlib.config import C
from qlib.contrib.model.linear import LinearModel
from qlib.contrib.strategy import TopkDropoutStrategy
from qlib.data import D
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import DataLoader
from qlib.data.dataset.processor import Processor
from qlib.model.base import Model
from torch import nn

from data_handlers.expression.loading import load_panel
from qlib_ext.audit import Settings, Subject, audit
from qlib_ext.graphs import CorrelationGraph

SETTINGS = Settings(
    data="embedded",
    stocks=20,
    years=2,
    refit=True,
    days=0,  # these show at the main day; test_origin.py looks at the others
    overrides={"hidden_size": 8, "num_layers": 1},
)
CLEAN_FEATURES = ["$close/Ref($close, 1) - 1", "Mean($close, 5)/$close", "$turnover"]
LABEL = "Ref($close, -6)/Ref($close, -1) - 1"
ZSCORE = {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}}
WINDOW = {"fit_start_time": "2012-01-01", "fit_end_time": "2016-12-14"}
FILL = {"class": "Fillna", "kwargs": {"fields_group": "feature"}}
DROP_NAN = {"class": "DropnaLabel"}
LINEAR = {"class": "LinearModel", "module_path": "qlib.contrib.model.linear"}
SEGMENTS = {
    "train": ["2012-01-01", "2016-12-14"],
    "valid": ["2017-01-01", "2017-12-14"],
    "test": ["2018-01-01", "2020-12-31"],
}


def own(name, **kwargs):
    return {"class": name, "module_path": __name__, "kwargs": kwargs}


def zscore(**window):
    return {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature", **window}}


def workflow(
    features=None,
    label=LABEL,
    infer=None,
    learn=None,
    model=None,
    dataset="DatasetH",
    segments=None,
    instruments="all",
    handler=None,
    loader=None,
    record=None,
    **dataset_kwargs,
):
    """A workflow of Qlib's own classes around one handler."""
    loader = loader or {
        "class": "QlibDataLoader",
        "kwargs": {
            "config": {
                "feature": features or CLEAN_FEATURES,
                "label": ([label], ["LABEL0"]),
            }
        },
    }
    handler = handler or {
        "class": "DataHandlerLP",
        "module_path": "qlib.data.dataset.handler",
    }
    kwargs = {
        "instruments": instruments,
        "start_time": "2012-01-01",
        "end_time": "2020-12-31",
        "data_loader": loader,
        "infer_processors": [zscore(**WINDOW), FILL] if infer is None else infer,
        "learn_processors": [DROP_NAN] if learn is None else learn,
    }
    return {
        "qlib_init": {"provider_uri": "/nowhere", "region": "cn"},
        "task": {
            "model": model or LINEAR,
            "dataset": {
                "class": dataset,
                "module_path": "qlib_ext.dataset"
                if dataset == "PanelDataset"
                else "qlib.data.dataset",
                "kwargs": {
                    "handler": {**handler, "kwargs": kwargs},
                    "segments": segments or SEGMENTS,
                    **dataset_kwargs,
                },
            },
            **({} if record is None else {"record": record}),
        },
    }


# ------------------------------------------------------------------ leaky processors
class LabelInFeatures(Processor):
    """Adds what the label tells to a feature, at inference as well."""

    def __init__(self, strength=0.3):
        self.strength = strength

    def __call__(self, df):
        df = df.copy()
        first = df["feature"].columns[0]
        rank = df["label"].iloc[:, 0].groupby(level="datetime").rank(pct=True)
        df[("feature", first)] += self.strength * (rank - 0.5).fillna(0.0)
        return df


class DropExtremes(Processor):
    """Drops a quarter of the rows, those with the largest moves."""

    def __init__(self, infer=True, mask=False):
        self.infer, self.mask = infer, mask

    def is_for_infer(self):
        return self.infer

    def __call__(self, df):
        label = df["label"].iloc[:, 0]
        size = (label - label.groupby(level="datetime").transform("median")).abs()
        extreme = size.groupby(level="datetime").rank(pct=True) > 0.75
        if not self.mask:
            return df[~extreme]
        df = df.copy()
        df.loc[extreme, "label"] = np.nan
        return df


class FullZScore(Processor):
    """Standardises with the statistics of whatever it is fitted on: everything."""

    def fit(self, df=None):
        self.mean_ = df["feature"].mean().to_numpy()
        self.std_ = df["feature"].std().to_numpy()

    def __call__(self, df):
        df = df.copy()
        at = np.flatnonzero(df.columns.get_level_values(0) == "feature")
        df.iloc[:, at] = (df.iloc[:, at].to_numpy() - self.mean_) / self.std_
        return df


# ------------------------------------------------------------ leaky handlers, loaders
class MembersAtEnd(DataHandlerLP):
    """The members of the last day, for all days."""

    def __init__(self, instruments, start_time, end_time, **kwargs):
        last = D.calendar(end_time=end_time)[-1]
        codes = D.list_instruments(
            D.instruments(instruments), start_time=last, end_time=last, as_list=True
        )
        super().__init__(
            instruments=codes, start_time=start_time, end_time=end_time, **kwargs
        )


class Statements(DataLoader):
    """Profit over equity, known from the period's end or from its announcement."""

    def __init__(self, known="announced"):
        self.known = known

    def load(self, instruments=None, start_time=None, end_time=None):
        bars = D.features(
            D.instruments(instruments),
            ["$close/Ref($close, 1) - 1", LABEL],
            start_time,
            end_time,
        )
        bars.columns = ["ret", "LABEL0"]
        bars = bars.swaplevel().sort_index().reset_index()
        table = pd.read_parquet(
            f"{C.dpm.get_data_uri('day')}/tables/statements.parquet"
        )
        table["value"] = table["net_profit"] / table["equity"]
        # The later period of two statements of one day is the one that counts.
        table = table.dropna(subset="value").sort_values([self.known, "period_end"])
        table = table[["instrument", self.known, "value"]]
        both = pd.merge_asof(
            bars,
            table.rename(columns={self.known: "datetime"}),
            on="datetime",
            by="instrument",
        ).set_index(["datetime", "instrument"])
        return pd.concat(
            {"feature": both[["ret", "value"]], "label": both[["LABEL0"]]}, axis=1
        ).sort_index()


# ---------------------------------------------------------------- leaky relations
class FutureGraph(CorrelationGraph):
    """Correlation of the returns that are to come."""

    def inputs(self, panel):
        values, _ = load_panel(
            ["Ref($close, -10)/Ref($close, -9) - 1"], panel.dates, panel.instruments
        )
        return {"returns": values[..., 0], "history": np.array(0)}


# -------------------------------------------------------------------- leaky models
class Peeks(LinearModel):
    """Adds a little of the test labels to its scores."""

    def predict(self, dataset, segment="test"):
        score = super().predict(dataset, segment)
        label = dataset.prepare(segment, col_set="label", data_key="raw").iloc[:, 0]
        rank = label.groupby(level="datetime").rank(pct=True) - 0.5
        return score / score.std() + rank.reindex(score.index).fillna(0.0)


class WholeSegment(LinearModel):
    """Standardises features over all days that are predicted."""

    def predict(self, dataset, segment="test"):
        x = dataset.prepare(segment, col_set="feature", data_key="infer")
        z = (x - x.mean()) / x.std()
        return pd.Series(z.to_numpy() @ np.array([1.0, 2.0, 3.0]) ** 2, index=x.index)


class EachDay(LinearModel):
    """Standardises features over the day."""

    def predict(self, dataset, segment="test"):
        x = dataset.prepare(segment, col_set="feature", data_key="infer")
        day = x.groupby(level="datetime")
        z = (x - day.transform("mean")) / day.transform("std")
        return pd.Series(z.to_numpy() @ np.array([1.0, 2.0, 3.0]) ** 2, index=x.index)


class FitsOnTest(LinearModel):
    """Trains on the test segment too."""

    def fit(self, dataset, reweighter=None):
        start, end = dataset.segments["train"][0], dataset.segments["test"][1]
        kept = dataset.segments
        dataset.segments = {**kept, "train": (start, end)}
        super().fit(dataset, reweighter)
        dataset.segments = kept


class Demeaned(nn.Module):
    """A linear layer on features less their mean over the batch."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, x):
        return self.linear(x - x.mean(0)).squeeze(-1)


class CrossBatch(Model):
    """Trains `Demeaned` on shuffled rows, or on days."""

    def __init__(self, by_day=False):
        self.by_day = by_day

    def fit(self, dataset):
        frame = dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
        x = frame["feature"].to_numpy(np.float32)
        y = frame["label"].to_numpy(np.float32)[:, 0]
        self.net = Demeaned(x.shape[1])
        step = torch.optim.SGD(self.net.parameters(), lr=1e-3)
        rows = np.random.permutation(len(x))
        days = frame.index.get_level_values("datetime")
        parts = (
            [np.flatnonzero(days == d) for d in days.unique()]
            if self.by_day
            else np.array_split(rows, 40)
        )
        for part in parts:
            loss = (self.net(torch.tensor(x[part])) - torch.tensor(y[part])).square()
            step.zero_grad()
            loss.mean().backward()
            step.step()

    def predict(self, dataset, segment="test"):
        x = dataset.prepare(segment, col_set="feature", data_key="infer")
        with torch.no_grad():
            parts = [
                pd.Series(
                    self.net(torch.tensor(d.to_numpy(np.float32))).numpy(), d.index
                )
                for _, d in x.groupby(level="datetime")
            ]
        return pd.concat(parts)


def ts_model(name):
    return {
        "class": {"gats": "GATs", "gru": "GRU"}[name],
        "module_path": f"qlib.contrib.model.pytorch_{name}_ts",
        "kwargs": {
            "d_feat": 3,
            "hidden_size": 8,
            "num_layers": 1,
            "n_epochs": 1,
            "n_jobs": 0,
            "GPU": -1,
            "seed": 0,
            **({"batch_size": 256} if name == "gru" else {}),
        },
    }


# -------------------------------------------------------------------- leaky execution
class SameDay(TopkDropoutStrategy):
    """Trades on the day whose scores it uses."""

    def __init__(self, *, signal, **kwargs):
        table = signal["score"].unstack()
        early = table.shift(-1).stack().rename("score").to_frame()
        super().__init__(signal=early, **kwargs)


def port(strategy="TopkDropoutStrategy", module="qlib.contrib.strategy", **exchange):
    exchange = {"limit_threshold": 0.095, "deal_price": "close", **exchange}
    return [
        {
            "class": "PortAnaRecord",
            "module_path": "qlib.workflow.record_temp",
            "kwargs": {
                "config": {
                    "strategy": {
                        "class": strategy,
                        "module_path": module,
                        "kwargs": {"signal": "<PRED>", "topk": 8, "n_drop": 2},
                    },
                    "backtest": {
                        "start_time": "2018-01-01",
                        "end_time": "2020-12-31",
                        "account": 100000000,
                        "benchmark": "SH000300",
                        "exchange_kwargs": exchange,
                    },
                }
            },
        }
    ]


def graph_model(name):
    graph = {"class": name, "kwargs": {"window": 10, "threshold": 0.4}}
    if name == "FutureGraph":
        graph["module_path"] = __name__
    return {
        "class": "GRUGAT",
        "module_path": "qlib_ext.models",
        "kwargs": {
            "graphs": [graph],
            "weighting": "equal",
            "hidden_size": 8,
            "num_layers": 1,
            "n_epochs": 1,
            "step_len": 5,
        },
    }


NO_GAP = {**SEGMENTS, "train": ["2012-01-01", "2016-12-30"]}
SHORT = {
    "train": ["2012-01-01", "2012-12-14"],
    "valid": ["2013-01-01", "2013-12-14"],
    "test": ["2014-01-01", "2020-12-31"],
}
WINDOWED = dict(dataset="TSDatasetH", step_len=5, model=ts_model("gru"), segments=SHORT)
OPEN = port(deal_price="open")

# name: (check, leaky workflow, clean twin)
CASES = {
    "centred rolling mean": (
        "truncation",
        dict(features=["Mean(Ref($close, -2), 5)/$close", *CLEAN_FEATURES]),
        dict(features=["Mean($close, 4)/$close", *CLEAN_FEATURES]),
    ),
    "feature of tomorrow": (
        "perturbation",
        dict(features=["Ref($close, -1)/$close - 1", "$turnover"]),
        dict(features=["$close/Ref($close, 1) - 1", "$turnover"]),
    ),
    "label in the features at inference": (
        "perturbation",
        dict(infer=[own("LabelInFeatures"), FILL]),
        dict(infer=[own("LabelInFeatures", strength=0.0), FILL]),
    ),
    "label in the features, seen by exchanged labels": (
        "shuffle",
        dict(infer=[own("LabelInFeatures"), FILL]),
        {},
    ),
    "extreme labels dropped from the test segment": (
        "rows",
        dict(infer=[own("DropExtremes"), zscore(**WINDOW), FILL]),
        dict(learn=[own("DropExtremes", infer=False), DROP_NAN]),
    ),
    "windows filled through rows dropped by label": (
        "rows",
        dict(learn=[own("DropExtremes", infer=False)], **WINDOWED),
        dict(learn=[own("DropExtremes", infer=False, mask=True)], **WINDOWED),
    ),
    "full-sample standardisation": (
        "windows",
        dict(infer=[own("FullZScore"), FILL]),
        {},
    ),
    "fit window beyond train": (
        "windows",
        dict(infer=[zscore(fit_start_time="2012-01-01", fit_end_time="2017-06-30")]),
        {},
    ),
    "no fit window": (
        "windows",
        dict(infer=[zscore(fit_start_time=None, fit_end_time=None)]),
        {},
    ),
    "purge hole": ("purge", dict(segments=NO_GAP), {}),
    "members of the last day": (
        "membership",
        dict(handler=own("MembersAtEnd"), instruments="csi500"),
        dict(instruments="csi500"),
    ),
    "statement used before its announcement": (
        "truncation",
        dict(loader=own("Statements", known="period_end")),
        dict(loader=own("Statements", known="announced")),
    ),
    "graph of future returns": (
        "graphs",
        dict(dataset="PanelDataset", model=graph_model("FutureGraph")),
        dict(dataset="PanelDataset", model=graph_model("CorrelationGraph")),
    ),
    "attention over rows of many days, as Qlib's GATs_ts has it": (
        "batches",
        {**WINDOWED, "model": ts_model("gats")},
        WINDOWED,
    ),
    "shuffled batches and an operation across them": (
        "batches",
        dict(model=own("CrossBatch")),
        dict(model=own("CrossBatch", by_day=True)),
    ),
    "bought at the close the signal is made of": (
        "execution",
        dict(label="Ref($close, -5)/$close - 1"),
        {},
    ),
    "traded on the scores of the same day": (
        "execution",
        dict(record=port("SameDay", __name__)),
        dict(record=port()),
    ),
    "deals at the open that know the close": (
        "execution",
        dict(record=OPEN),
        dict(record=port(deal_price="close")),
    ),
    "model that reads the labels it is tested on": (
        "shuffle",
        dict(model=own("Peeks")),
        {},
    ),
    "model that standardises over the predicted days": (
        "truncation",
        dict(model=own("WholeSegment")),
        dict(model=own("EachDay")),
    ),
    "model that trains on the test segment": (
        "perturbation",
        dict(model=own("FitsOnTest")),
        {},
    ),
    "anything that ranks where nothing can": (
        "no_signal",
        dict(features=["Ref($close, -2)/$close - 1", "$turnover"]),
        {},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def run(folder, qlib_market):
    """Verdict of one check on a workflow; the unchanged workflow is loaded once."""
    subjects = {}

    def verdict(check, arguments):
        key = str(arguments)
        subject = subjects.get(key)
        if subject is None:
            config = workflow(**copy.deepcopy(arguments))
            subject = Subject(config, folder, SETTINGS)
            if arguments == {}:
                subjects[key] = subject
        return audit({}, checks=[check], subject=subject).verdicts[check]

    return verdict


# Each has a check and a mechanism in common with another, which is run by default.
BY_HAND = {
    "feature of tomorrow": "centred rolling mean",
    "no fit window": "fit window beyond train",
    "label in the features, seen by exchanged labels": (
        "model that reads the labels it is tested on"
    ),
    "windows filled through rows dropped by label": (
        "extreme labels dropped from the test segment"
    ),
    "attention over rows of many days, as Qlib's GATs_ts has it": (
        "shuffled batches and an operation across them"
    ),
    "statement used before its announcement": "annual statements, in test_origin.py",
}


def marked(names):
    for name in names:
        yield pytest.param(name, marks=[pytest.mark.slow] if name in BY_HAND else [])


@pytest.mark.parametrize("name", marked(CASES))
def test_leak_is_caught(name, run):
    check, leaky, _ = CASES[name]
    verdict = run(check, leaky)
    assert verdict.status == "fail", (verdict.summary, verdict.notes)


def one_a_check():
    """Every case; those whose check has passed on another clean twin are slow."""
    seen = set()
    for name, (check, *_) in CASES.items():
        by_hand = check in seen or name in BY_HAND
        yield pytest.param(name, marks=[pytest.mark.slow] if by_hand else [])
        if not by_hand:
            seen.add(check)


@pytest.mark.parametrize("name", one_a_check())
def test_clean_twin_passes(name, run):
    check, _, clean = CASES[name]
    verdict = run(check, clean)
    assert verdict.status == "pass", (verdict.summary, verdict.notes)
