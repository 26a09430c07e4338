"""Leaks by caches, other copies of the data, foreign strategies and earlier runs."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.config import C
from qlib.contrib.model.linear import LinearModel
from qlib.contrib.strategy import TopkDropoutStrategy
from qlib.data import D
from qlib.data.dataset.loader import DataLoader
from qlib.data.dataset.processor import Processor
from qlib.data.dataset.weight import Reweighter

from qlib_ext.audit import Settings, Subject, audit
from qlib_ext.ingest.store import read_bars, read_instruments

LABEL = "Ref($close, -6)/Ref($close, -1) - 1"
SEGMENTS = {
    "train": ["2018-01-02", "2019-07-31"],
    "valid": ["2019-08-20", "2019-12-11"],
    "test": ["2020-01-02", "2020-12-14"],
}
SETTINGS = Settings(data="own", stocks=16, refit=False, days=9)
WAYS = ["sources", "truncation", "perturbation"]
RETURN = "$close/Ref($close, 1) - 1"


def own(name, **kwargs):
    return {"class": name, "module_path": __name__, "kwargs": kwargs}


def qlibs(name, module, **kwargs):
    return {"class": name, "module_path": f"qlib.{module}", "kwargs": kwargs}


def flow(store, features=(RETURN, "$turnover"), loader=None, infer=(), **task):
    """A workflow of Qlib's own classes on a store."""
    columns = {"feature": list(features), "label": ([LABEL], ["LABEL0"])}
    loader = loader or qlibs("QlibDataLoader", "data.dataset.loader", config=columns)
    handler = qlibs(
        "DataHandlerLP",
        "data.dataset.handler",
        instruments="all",
        start_time="2018-01-02",
        end_time="2020-12-31",
        data_loader=loader,
        infer_processors=[*infer, {"class": "Fillna"}],
        learn_processors=[{"class": "DropnaLabel"}],
    )
    task.setdefault("model", qlibs("LinearModel", "contrib.model.linear"))
    data = qlibs("DatasetH", "data.dataset", handler=handler, segments=SEGMENTS)
    return {
        "qlib_init": {"provider_uri": str(store), "region": "cn"},
        "task": {"dataset": data, **task},
    }


class Made(DataLoader):
    """Returns of a day, and one column that a function of `MAKERS` makes."""

    def __init__(self, maker, path=None):
        self.maker, self.path = maker, path

    def load(self, instruments=None, start_time=None, end_time=None):
        fields = [RETURN, "$close", "$volume", LABEL]
        bars = D.features(D.instruments(instruments), fields, start_time, end_time)
        bars.columns = ["ret", "close", "volume", "LABEL0"]
        bars = bars.swaplevel().sort_index()
        close = bars["close"].unstack()
        made = MAKERS[self.maker](close, self.path)
        made = made.rename_axis(columns="instrument").stack(future_stack=True)
        feature = bars[["ret"]].assign(made=made.reindex(bars.index))
        return pd.concat({"feature": feature, "label": bars[["LABEL0"]]}, axis=1)


def ahead(close):
    """Return of the next day and twice its noise."""
    move = close.pct_change(fill_method=None).shift(-1)
    noise = np.random.default_rng(0).normal(size=move.shape)
    return move + noise * 2 * move.std().mean()


def in_file(close, path, by_store):
    """Coming returns, which a file keeps for the next time."""
    where = str(C.dpm.get_data_uri("day")).replace("/", "-") if by_store else "all"
    file = Path(path) / f"{where}.pkl"
    if not file.exists():
        with open(file, "wb") as out:
            pickle.dump(
                close.pct_change(5, fill_method=None) if by_store else ahead(close), out
            )
    with open(file, "rb") as kept:
        return pickle.load(kept)


def in_memory(close, path, by_store):
    """Coming or past returns, which the module keeps for the next time."""
    key = f"{path} {C.dpm.get_data_uri('day') if by_store else ''}"
    if key not in KEPT:
        past = close.pct_change(5, fill_method=None)
        KEPT[key] = past if by_store else ahead(close)
    return KEPT[key].reindex(close.index)


def of_bins(close, root, lag):
    """Returns that are read from the bins of a store."""
    root = Path(root or C.dpm.get_data_uri("day"))
    days = pd.DatetimeIndex((root / "calendars/day.txt").read_text().split())
    found = {}
    for code in close.columns:
        values = np.fromfile(root / f"features/{code.lower()}/close.day.bin", "<f4")
        found[code] = pd.Series(values[1:], days[int(values[0]) :][: len(values) - 1])
    wide = pd.DataFrame(found).reindex(days)
    return wide.pct_change(fill_method=None).shift(-lag).reindex(close.index)


def of_days(close, folder):
    """Values from a file a day, whose name says the day."""
    found = {}
    for file in sorted(Path(folder).glob("*.csv")):
        found[pd.Timestamp(file.stem)] = pd.read_csv(file, index_col=0)["value"]
    return pd.DataFrame(found).T.reindex(index=close.index, columns=close.columns)


def of_table(close, path):
    """Values from a table with days down and codes across."""
    wide = pd.read_csv(path, index_col=0)
    wide.index = pd.to_datetime(wide.index.astype(str))
    return wide.reindex(index=close.index, columns=close.columns)


def alike(close, days):
    """Return less that of the five stocks that move most alike in some days."""
    move = close.pct_change(fill_method=None)
    near = move.iloc[:days].corr().to_numpy().argsort(axis=1)[:, -6:-1]
    groups = np.nanmean(move.to_numpy()[:, near], axis=2)
    return move - groups


def until_next(close, later):
    """Days to the next suspension, or since the last one."""
    gone = close.isna().iloc[::-1] if later else close.isna()
    count = (~gone).cumsum() - (~gone).cumsum().where(gone).ffill().fillna(0)
    count = (count.iloc[::-1] if later else count).astype(float)
    return np.log1p(count) * close.pct_change(fill_method=None)


KEPT: dict = {}
MAKERS = {
    "cache in a file": lambda c, p: in_file(c, p, False),
    "cache in a file a store": lambda c, p: in_file(c, p, True),
    "cache in memory": lambda c, p: in_memory(c, p, False),
    "cache in memory a store": lambda c, p: in_memory(c, p, True),
    "bins of a path": lambda c, p: of_bins(c, p, 1),
    "bins of the store": lambda c, p: of_bins(c, None, 0),
    "files by day": of_days,
    "wide table": of_table,
    "alike on all days": lambda c, p: alike(c, len(c)),
    "alike on early days": lambda c, p: alike(c, 150),
    "days to the next suspension": lambda c, p: until_next(c, True),
    "days since the last suspension": lambda c, p: until_next(c, False),
}


def made(name, path=None):
    return dict(
        loader=own("Made", maker=name, path=None if path is None else str(path))
    )


class LeavesDays(Processor):
    """Leaves out days before or after which the market falls."""

    def __init__(self, ahead):
        self.ahead = ahead

    def __call__(self, df):
        index = D.features(["SH000300"], [f"Ref($close, {-self.ahead})/$close - 1"])
        move = index.droplevel("instrument").iloc[:, 0]
        good = move.index[(move > -0.01) if self.ahead > 0 else (move < 0.01)]
        return df[df.index.get_level_values("datetime").isin(good)]


class NetOf(LinearModel):
    """Scores less their slope on the market values of another day."""

    def __init__(self, ahead, **kwargs):
        super().__init__(**kwargs)
        self.ahead = ahead

    def predict(self, dataset, segment="test"):
        score = super().predict(dataset, segment)
        codes = sorted(set(score.index.get_level_values("instrument")))
        size = D.features(codes, [f"Log(Ref($market_cap, {-self.ahead}))"]).iloc[:, 0]
        x = size.swaplevel().reindex(score.index)
        x = x - x.groupby(level="datetime").transform("mean")
        both = pd.DataFrame({"x": x, "y": score}).dropna()
        slope = (both.x * both.y).groupby(level=0).sum() / (both.x**2).groupby(
            level=0
        ).sum()
        return score - x.mul(slope.reindex(x.index, level="datetime")).fillna(0.0)


class Blends(LinearModel):
    """Adds the scores of an earlier run to its own."""

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        self.path = path

    def predict(self, dataset, segment="test"):
        score = super().predict(dataset, segment)
        if self.path is None:
            return score * 2
        with open(self.path, "rb") as file:
            return score + pickle.load(file).reindex(score.index).fillna(0.0)


class ByRisk(Reweighter):
    """Weighs rows by the inverse spread of their stock's returns of some days."""

    def __init__(self, until=None):
        self.until = until

    def reweight(self, data):
        codes = sorted(set(data.index.get_level_values("instrument")))
        move = D.features(codes, [RETURN], "2018-01-02", self.until).iloc[:, 0]
        spread = move.groupby(level="instrument").std()
        weight = spread.reindex(data.index.get_level_values("instrument")) ** -2.0
        return pd.Series(weight.to_numpy(), data.index).fillna(1.0)


class WeighedLinear(LinearModel):
    """A linear model that takes the weights that a workflow names."""

    def fit(self, dataset, reweighter=None):
        known = dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
        w = reweighter.reweight(known).to_numpy()[:, None]
        x, y = known["feature"].to_numpy(), known["label"].to_numpy()[:, 0]
        self.coef_ = np.linalg.solve(x.T @ (w * x), x.T @ (w[:, 0] * y))
        self.intercept_ = 0.0


class SellsBeforeFalls(TopkDropoutStrategy):
    """Drops the orders for what falls later, or has fallen."""

    def __init__(self, *, ahead, **kwargs):
        super().__init__(**kwargs)
        self.ahead = ahead

    def generate_trade_decision(self, execute_result=None):
        from qlib.backtest.decision import TradeDecisionWO

        made = super().generate_trade_decision(execute_result)
        start, _ = self.trade_calendar.get_step_time()
        field = (
            f"Ref($close, {-self.ahead})/$close - 1"
            if self.ahead > 0
            else f"Ref($close, 1)/Ref($close, {1 - self.ahead}) - 1"
        )
        kept = []
        for order in made.get_decision():
            move = D.features([order.stock_id], [field], start, start)
            if order.direction == 0 or not (move.to_numpy() < 0).any():
                kept.append(order)
        return TradeDecisionWO(kept, self)


def traded_by(strategy):
    strategy["kwargs"] |= {"signal": "<PRED>", "topk": 5, "n_drop": 2}
    back_test = {"start_time": "2020-01-02", "end_time": "2020-12-11", "account": 1e8}
    back_test |= {"benchmark": "SH000300", "exchange_kwargs": {"deal_price": "close"}}
    config = {"strategy": strategy, "backtest": back_test}
    return dict(record=[qlibs("PortAnaRecord", "workflow.record_temp", config=config)])


# name: (checks, exit code, leaky, clean twin); paths are filled in
LEAK, NO_VOUCH = 1, 2
CASES = {
    "splits to come": (
        WAYS, LEAK,
        dict(features=["Ref($factor, -60)/$factor", "$turnover"]),
        dict(features=["$factor/Ref($factor, 60)", "$turnover"]),
    ),
    "weights of an index to come": (
        WAYS, LEAK,
        dict(features=["Ref($weight_csi500, -20) - $weight_csi500", "$turnover"]),
        dict(features=["$weight_csi500 - Ref($weight_csi500, 20)", "$turnover"]),
    ),
    "days before a fall left out": (
        ["rows", *WAYS], LEAK,
        dict(infer=[own("LeavesDays", ahead=1)]),
        dict(infer=[own("LeavesDays", ahead=-1)]),
    ),
    "peers that are alike on all days": (
        WAYS, LEAK, made("alike on all days"), made("alike on early days"),
    ),
    "days to the next suspension": (
        WAYS, LEAK,
        made("days to the next suspension"),
        made("days since the last suspension"),
    ),
    "scores net of tomorrow's size": (
        WAYS, LEAK,
        dict(model=own("NetOf", ahead=1)),
        dict(model=own("NetOf", ahead=0)),
    ),
    "weights of the workflow's reweighter": (
        WAYS, LEAK,
        dict(model=own("WeighedLinear"), reweighter=own("ByRisk")),
        dict(model=own("WeighedLinear"), reweighter=own("ByRisk", until="2019-07-31")),
    ),
    "features kept in a file": (
        WAYS, NO_VOUCH, made("cache in a file", "leaky"),
        made("cache in a file a store", "clean"),
    ),
    "features kept in memory": (
        WAYS, NO_VOUCH,
        made("cache in memory", "x"), made("cache in memory a store", "y"),
    ),
    "bins of another copy of the store": (
        WAYS, NO_VOUCH, made("bins of a path", "market"), made("bins of the store"),
    ),
    "a file a day, of the next returns": (
        ["foresight", *WAYS], LEAK,
        made("files by day", "next"), made("wide table", "past.csv"),
    ),
    "a wide table of the next returns": (
        ["foresight", *WAYS], LEAK,
        made("wide table", "next.csv"), made("wide table", "past.csv"),
    ),
    "scores of an earlier run": (
        WAYS, NO_VOUCH,
        dict(model=own("Blends", path="mlruns/1/pred.pkl")),
        dict(model=own("Blends", path=None)),
    ),
    "orders that know the next close": (
        ["execution"], LEAK,
        traded_by(own("SellsBeforeFalls", ahead=1)),
        traded_by(own("SellsBeforeFalls", ahead=-1)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(market, tmp_path_factory):
    """Tables of past and of next returns, a file a day, and an earlier run."""
    out = tmp_path_factory.mktemp("further")
    codes = sorted(set(read_instruments(market)["instrument"]))
    bars = read_bars(market, codes)
    close = bars.pivot(index="datetime", columns="instrument", values="close")
    tables = {"next": ahead(close), "past": close.pct_change(5, fill_method=None)}
    for name, table in tables.items():
        table.index = table.index.strftime("%Y%m%d")
        table.to_csv(out / f"{name}.csv")
        (out / name).mkdir()
        for day, row in table.iterrows():
            row.rename("value").to_csv(out / name / f"{day}.csv")
    for name in ("leaky", "clean", "mlruns/1"):
        (out / name).mkdir(parents=True)
    close.pct_change(fill_method=None).shift(-1).stack().to_pickle(
        out / "mlruns/1/pred.pkl"
    )
    (out / "market").symlink_to(market)
    return out


def placed(value, files):
    """Fill paths in."""
    if isinstance(value, dict):
        return {
            k: str(files / v) if k == "path" and v else placed(v, files)
            for k, v in value.items()
        }
    return [placed(x, files) for x in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def look(market, files, tmp_path_factory, qlib_market):
    shared = []

    def run(checks, refit, arguments):
        settings = replace(SETTINGS, refit=refit)
        folder = shared[0].folder if shared else tmp_path_factory.mktemp("audit")
        subject = Subject(flow(market, **placed(arguments, files)), folder, settings)
        if shared:  # the same copies, of the same bars
            subject.stores._bars = shared[0].stores.bars
        shared.append(subject)
        return audit({}, checks=checks, subject=subject)

    return run


FITTED = {"weights of the workflow's reweighter"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_leak_is_caught(name, look):
    checks, code, leaky, _ = CASES[name]
    found = look(checks, name in FITTED, leaky)
    assert found.exit_code == code, found.text()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_clean_twin_passes(name, look):
    checks, _, _, clean = CASES[name]
    found = look(checks, name in FITTED, clean)
    assert found.exit_code == 0, found.text()
