"""Leaks that show at some days only, come from outside the store, or lie in it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from qlib.config import C
from qlib.contrib.model.linear import LinearModel
from qlib.data import D
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import DataLoader
from qlib.data.dataset.processor import Processor
from qlib.utils import init_instance_by_config
from scipy.spatial import cKDTree

from qlib_ext.audit import Settings, Subject, audit, checks
from qlib_ext.audit.days import partings
from qlib_ext.audit.files import FileTrace, OutsideFile, period_dated
from qlib_ext.ingest.store import (
    read_bars,
    read_calendar,
    read_industry_names,
    read_instruments,
    read_table,
    write_store,
)

LABEL = "Ref($close, -6)/Ref($close, -1) - 1"
SEGMENTS = {
    "train": ["2018-01-02", "2019-07-31"],
    "valid": ["2019-08-20", "2019-12-11"],
    "test": ["2020-01-02", "2020-12-14"],
}
SETTINGS = Settings(data="own", stocks=10, refit=False)


def own(name, **kwargs):
    return {"class": name, "module_path": __name__, "kwargs": kwargs}


def flow(
    store,
    features=None,
    loader=None,
    model=None,
    learn=(),
    infer=(),
    segments=SEGMENTS,
    instruments="all",
    label=LABEL,
    handler=None,
    record=(),
    dataset=None,
):
    """A workflow of Qlib's own classes on a store."""
    dataset = dataset or {"class": "DatasetH", "module_path": "qlib.data.dataset"}
    loader = loader or {
        "class": "QlibDataLoader",
        "kwargs": {
            "config": {
                "feature": features or ["$close/Ref($close, 1) - 1", "$turnover"],
                "label": ([label], ["LABEL0"]),
            }
        },
    }
    more = handler or {}
    handler = {
        "class": "DataHandlerLP",
        "module_path": "qlib.data.dataset.handler",
        "kwargs": {
            "instruments": instruments,
            "start_time": "2018-01-02",
            "end_time": "2020-12-31",
            "data_loader": loader,
            "infer_processors": [*infer, {"class": "Fillna"}],
            "learn_processors": [{"class": "DropnaLabel"}, *learn],
        },
    }
    handler = handler | more | {"kwargs": handler["kwargs"] | more.get("kwargs", {})}
    linear = {"class": "LinearModel", "module_path": "qlib.contrib.model.linear"}
    return {
        "qlib_init": {"provider_uri": str(store), "region": "cn"},
        "task": {
            "model": model or linear,
            "dataset": {
                **(
                    dataset or {"class": "DatasetH", "module_path": "qlib.data.dataset"}
                ),
                "kwargs": {
                    **((dataset or {}).get("kwargs") or {}),
                    "handler": handler,
                    "segments": segments,
                },
            },
            "record": list(record),
        },
    }


class Shaped(DataLoader):
    """Returns of a day, and one column made of closes as `shape` names it."""

    def __init__(self, shape, path=None):
        self.shape, self.path = shape, path

    def load(self, instruments=None, start_time=None, end_time=None):
        fields = ["$close/Ref($close, 1) - 1", "$close", "$volume", LABEL]
        bars = D.features(D.instruments(instruments), fields, start_time, end_time)
        bars.columns = ["ret", "close", "volume", "LABEL0"]
        bars = bars.swaplevel().sort_index()
        table = bars["close"].unstack()
        made = SHAPES[self.shape](table, bars["volume"].unstack(), self.path)
        made = made.rename_axis(columns="instrument").stack(future_stack=True)
        feature = bars[["ret"]].assign(made=made.reindex(bars.index))
        return pd.concat({"feature": feature, "label": bars[["LABEL0"]]}, axis=1)


def by(table, period, how):
    """A value of each week, month or quarter, on all of its days."""
    return table.groupby(table.index.to_period(period)).transform(how)


def profit(table, column, path=None, months=12, method="ffill"):
    """Profit over equity of statements, from a day of theirs on, or nearest to it."""
    file = path or f"{C.dpm.get_data_uri('day')}/tables/statements.parquet"
    known = pd.read_parquet(file)
    known = known[known["period_end"].dt.month % months == 0]
    known["value"] = known["net_profit"] / known["equity"]
    known = known.sort_values([column, "period_end"])
    wide = known.pivot_table(
        index=column, columns="instrument", values="value", aggfunc="last"
    )
    if method == "nearest":
        near = {
            c: x.dropna().reindex(table.index, method=method) for c, x in wide.items()
        }
        return pd.DataFrame(near).reindex(columns=table.columns)
    both = wide.index.union(table.index)
    return wide.reindex(both).ffill().loc[table.index].reindex(columns=table.columns)


def outside(reader):
    def made(table, volume, path):
        frame = reader(path)
        frame["datetime"] = pd.to_datetime(frame["datetime"])
        wide = frame.pivot(index="datetime", columns="instrument", values="value")
        return wide.reindex(index=table.index, columns=table.columns)

    return made


def read_arrow(path):
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pandas()


def undated(table, volume, path):
    value = pd.read_csv(path, index_col=0)["value"]
    return table.pct_change(fill_method=None) * value.reindex(table.columns)


def wavelet(table, forward):
    """An exponential mean, run from the past or from the end."""
    x = np.log(table)
    return x.ewm(span=5).mean() - x if forward else x[::-1].ewm(span=5).mean() - x


SHAPES = {
    "announced": lambda c, v, p: profit(c, "announced"),
    "annual from 31 December": lambda c, v, p: profit(c, "period_end"),
    "third quarter's from 30 September": lambda c, v, p: profit(
        c, "period_end", months=9
    ),
    "third quarter's announced": lambda c, v, p: profit(c, "announced", months=9),
    "week's last close on all its days": lambda c, v, p: by(c, "W", "last") / c,
    "last week's close": lambda c, v, p: by(c, "W", "first") / c,
    "month's mean volume": lambda c, v, p: v / by(v, "M", "mean"),
    "mean volume": lambda c, v, p: v / v.rolling(20).mean(),
    "quarter's highest close": lambda c, v, p: c / by(c, "Q", "max"),
    "highest close": lambda c, v, p: c / c.rolling(60).max(),
    "gaps filled back": lambda c, v, p: c.bfill() / c.ffill().shift(1) - 1,
    "gaps filled forward": lambda c, v, p: c.ffill() / c.ffill().shift(1) - 1,
    "gaps interpolated": lambda c, v, p: c.interpolate() / c.ffill().shift(1) - 1,
    "rank over all days": lambda c, v, p: c.pct_change(fill_method=None).rank(pct=True),
    "rank over past days": lambda c, v, p: (
        c.pct_change(fill_method=None).rolling(60).rank(pct=True)
    ),
    "smoothed backwards": lambda c, v, p: wavelet(c, False),
    "smoothed forwards": lambda c, v, p: wavelet(c, True),
    "first component of all days": lambda c, v, p: component(c, len(c)),
    "first component of early days": lambda c, v, p: component(c, 100),
    "volume over the stock's mean": lambda c, v, p: v / v.mean(),
    "between the least and largest close": lambda c, v, p: (
        (c - c.min()) / (c.max() - c.min())
    ),
    "between the least and largest of 60 days": lambda c, v, p: (
        (c - c.rolling(60).min()) / (c.rolling(60).max() - c.rolling(60).min())
    ),
    "over the last close": lambda c, v, p: c / c.ffill().iloc[-1],
    "over the first close": lambda c, v, p: c / c.bfill().iloc[0],
    "quarterly value filled back": lambda c, v, p: quarterly(v).bfill() / v,
    "quarterly value filled forward": lambda c, v, p: quarterly(v).ffill() / v,
    "mean return of the month of all years": lambda c, v, p: season(c, False),
    "mean return of the month of past years": lambda c, v, p: season(c, True),
    "clipped at quantiles of all days": lambda c, v, p: clipped(c, len(c)),
    "clipped at quantiles of early days": lambda c, v, p: clipped(c, 100),
    "return over coming volatility": lambda c, v, p: over_risk(c, -20),
    "return over past volatility": lambda c, v, p: over_risk(c, 1),
    "off the line through all days": lambda c, v, p: detrended(c, len(c)),
    "off the line through early days": lambda c, v, p: detrended(c, 100),
    "ever a member": lambda c, v, p: member(c, ever=True),
    "member on the day": lambda c, v, p: member(c, ever=False),
    "index's next open": lambda c, v, p: beside_index(c, -1),
    "index's open": lambda c, v, p: beside_index(c, 0),
    "statement nearest in time": lambda c, v, p: profit(
        c, "announced", months=3, method="nearest"
    ),
    "statement before": lambda c, v, p: profit(c, "announced", months=3),
    "days until the delisting": lambda c, v, p: listed(c, True),
    "days since the listing": lambda c, v, p: listed(c, False),
    "less the industry's mean": lambda c, v, p: net(c, p),
    "csv": outside(pd.read_csv),
    "parquet": outside(pd.read_parquet),
    "arrow": outside(read_arrow),
    "pickle": outside(pd.read_pickle),
    "codes": undated,
}


def quarterly(volume):
    """Values of the last day of each quarter, others unknown."""
    quarter = volume.index.to_period("Q")
    last = np.r_[quarter[1:] != quarter[:-1], False]
    return volume.where(pd.Series(last, volume.index), axis=0)


def season(close, past):
    """Mean daily return of the stock in this month of the year."""
    move = close.pct_change(fill_method=None)
    month = move.groupby(move.index.month)
    return month.transform(
        lambda x: x.expanding().mean().shift(1) if past else x.mean()
    )


def clipped(close, days):
    """Returns within the quantiles of some days."""
    move = close.pct_change(fill_method=None)
    return move.clip(*move.iloc[:days].stack().quantile([0.1, 0.9]), axis=None)


def over_risk(close, shift):
    move = close.pct_change(fill_method=None)
    return move / move.rolling(20, min_periods=5).std().shift(shift)


def detrended(close, days):
    """Log closes less a line in time, fitted on some days."""
    log = np.log(close.ffill().bfill())
    at = np.arange(len(log))
    slope, level = np.polyfit(at[:days], log.iloc[:days].to_numpy(), 1)
    return log - (at[:, None] * slope + level)


def beside_index(close, ahead):
    """Each stock's return times the index's return from close to an open."""
    fields = [f"Ref($open, {ahead})/$close - 1"]
    state = D.features(["SH000300"], fields).droplevel("instrument").iloc[:, 0]
    move = close.pct_change(fill_method=None)
    return move.mul(1.0 + 50.0 * state.reindex(close.index), axis=0)


def net(close, path):
    """Returns less the mean of the industry that a table gives each stock."""
    table = pd.read_csv(path, parse_dates=["start"]).sort_values("start")
    code = table.pivot_table(
        index="start", columns="instrument", values="industry", aggfunc="last"
    )
    days = code.index.union(close.index)
    code = code.reindex(days).ffill().reindex(close.index, columns=close.columns)
    move = close.pct_change(fill_method=None).stack()
    of = [move.index.get_level_values(0), code.stack().reindex(move.index)]
    return (move - move.groupby(of).transform("mean")).unstack()


def member(close, ever):
    """Whether a stock is a member of an index, or ever was or will be."""
    spans = D.list_instruments(D.instruments("csi500"))
    out = pd.DataFrame(0.0, close.index, close.columns)
    for code in out.columns.intersection(list(spans)):
        for start, end in spans[code]:
            out.loc[slice(*(None, None) if ever else (start, end)), code] = 1.0
    return out + 1e-3 * close.pct_change(fill_method=None).fillna(0.0)


def listed(close, ahead):
    """Log of trading days to the end, or since the start, of each stock's listing."""
    spans = D.list_instruments(D.instruments("all"))
    edge = [spans[c][-1][1] if ahead else spans[c][0][0] for c in close.columns]
    calendar = pd.DatetimeIndex(D.calendar())
    at, days = calendar.searchsorted(edge), calendar.searchsorted(close.index)
    out = np.log1p(np.abs(days[:, None] - at))
    return out + 1e-3 * close.pct_change(fill_method=None).fillna(0.0)


def component(close, days):
    """Moves along the first principal component of the first days."""
    move = close.pct_change(fill_method=None).fillna(0.0)
    _, _, axis = np.linalg.svd(move.iloc[:days].to_numpy(), full_matrices=False)
    return move * np.abs(axis[0])


class LearnAhead(Processor):
    """Means of features over days around each, in learning only."""

    def __init__(self, ahead):
        self.ahead = ahead

    def is_for_infer(self):
        return False

    def __call__(self, df):
        df = df.copy()
        x = df["feature"].groupby(level="instrument")
        x = x.transform(lambda s: s.rolling(5, min_periods=1).mean().shift(-self.ahead))
        at = np.flatnonzero(df.columns.get_level_values(0) == "feature")
        df.iloc[:, at] = x.fillna(0.0).to_numpy()
        return df


class Encodes(Processor):
    """Mean label of the industry, learned from the days until one, as a feature."""

    def __init__(self, until=None):
        self.until = until

    def fit(self, df=None):
        known = df.loc[: self.until]
        code = known["feature"].iloc[:, 0]
        self.mean_ = known["label"].iloc[:, 0].groupby(code).mean()

    def __call__(self, df):
        df = df.copy()
        at = int(np.flatnonzero(df.columns.get_level_values(0) == "feature")[0])
        df.isetitem(at, df.iloc[:, at].map(self.mean_).fillna(0.0))
        return df


class LeavesOut(Processor):
    """Drops rows of stocks that do not trade on the next, or the last, trading day."""

    def __init__(self, ahead):
        self.ahead = ahead

    def __call__(self, df):
        close = df["feature"].iloc[:, 0].unstack()
        there = close.notna().shift(-self.ahead, fill_value=True).stack()
        return df[there.reindex(df.index).to_numpy(bool)]


class RanksAmong(Processor):
    """Ranks a day's stocks among those that trade some days on, or some days ago."""

    def __init__(self, ahead):
        self.ahead = ahead

    def __call__(self, df):
        df = df.copy()
        value = df.iloc[:, 0].unstack()
        there = value.notna().shift(-self.ahead, fill_value=True)
        rank = value.where(there).rank(axis=1, pct=True).stack(future_stack=True)
        df.isetitem(0, rank.reindex(df.index).fillna(0.5).to_numpy())
        return df


class ScalesLabels(Processor):
    """Standardises labels over the days until one, in learning."""

    def __init__(self, until=None):
        self.until = until

    def is_for_infer(self):
        return False

    def fit(self, df=None):
        label = df["label"].loc[: self.until].iloc[:, 0]
        self.mean_, self.std_ = float(label.mean()), float(label.std())

    def __call__(self, df):
        df = df.copy()
        at = int(np.flatnonzero(df.columns.get_level_values(0) == "label")[0])
        df.isetitem(at, (df.iloc[:, at] - self.mean_) / self.std_)
        return df


class MostTraded(Processor):
    """Keeps the half of the stocks that trades most on coming, or on past, days."""

    def __init__(self, ahead):
        self.ahead = ahead

    def __call__(self, df):
        turnover = df["feature"].iloc[:, 1].unstack()
        mean = turnover.rolling(60, min_periods=1).mean()
        if self.ahead:
            mean = mean.shift(-60).ffill()
        there = mean.rank(axis=1, pct=True).stack() > 0.5
        return df[there.reindex(df.index, fill_value=False).to_numpy(bool)]


class Standardises(DataHandlerLP):
    """Divides features by their deviation on the days until one, as it loads."""

    def __init__(self, until=None, **kwargs):
        self.until = until
        super().__init__(**kwargs)

    def process_data(self, with_fit=False):
        at = np.flatnonzero(self._data.columns.get_level_values(0) == "feature")
        x = self._data.iloc[:, at]
        data = self._data.copy()
        data.iloc[:, at] = (x / x.loc[: self.until].std()).to_numpy()
        self._data = data
        super().process_data(with_fit)


class StopsOn(LinearModel):
    """Takes, of a walk of coefficients, the step with the best RankIC on a segment."""

    def __init__(self, on, **kwargs):
        super().__init__(**kwargs)
        self.on = on

    def fit(self, dataset, reweighter=None):
        super().fit(dataset)
        both = dataset.prepare(self.on, col_set=["feature", "label"], data_key="raw")
        x, y = both["feature"].fillna(0.0).rank(pct=True), both["label"].iloc[:, 0]
        walk = np.random.default_rng(0).normal(size=(60, x.shape[1])).cumsum(0)
        score = pd.DataFrame(x.to_numpy() @ walk.T, x.index)
        ic = score.groupby(level="datetime").corrwith(y, method="spearman")
        self.coef_ = walk[int(ic.mean().argmax())]


class ReadsOpens(LinearModel):
    """Adds to its scores the move to an open, which it reads from the store itself."""

    def __init__(self, ahead, **kwargs):
        super().__init__(**kwargs)
        self.ahead = ahead

    def predict(self, dataset, segment="test"):
        score = super().predict(dataset, segment)
        codes = sorted(set(score.index.get_level_values("instrument")))
        move = D.features(codes, [f"Ref($open, {-self.ahead})/$close - 1"]).iloc[:, 0]
        return score + 0.01 * move.swaplevel().reindex(score.index).fillna(0.0)


class Remembers(LinearModel):
    """Mean label of the twenty rows most alike, of the training or of all days."""

    def __init__(self, every, **kwargs):
        super().__init__(**kwargs)
        self.every = every

    def fit(self, dataset, reweighter=None):
        super().fit(dataset)
        known = dataset.handler.fetch(col_set=["feature", "label"], data_key="infer")
        if not self.every:
            known = known.loc[: dataset.segments["train"][1]]
        known = known.dropna().iloc[::7]
        self.rows_, self.labels_ = (
            known["feature"].to_numpy(),
            known["label"].to_numpy(),
        )

    def predict(self, dataset, segment="test"):
        x = dataset.prepare(segment, col_set="feature", data_key="infer")
        # Away from zero, as in `graphs.edges`: other tests let torch flush subnormals.
        away = 1.0 - self.rows_.min(0)
        near = cKDTree(self.rows_ + away).query(x.to_numpy() + away, k=20)[1]
        return pd.Series(self.labels_[near, 0].mean(1), x.index)


class FromFile(LinearModel):
    """Takes its coefficients from a file."""

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        self.path = path

    def fit(self, dataset, reweighter=None):
        super().fit(dataset)
        self.coef_ = np.load(self.path)


class MoreRows(DatasetH):
    """Trains on the rows of another segment too."""

    def __init__(self, *args, also, **kwargs):
        self.also = also
        super().__init__(*args, **kwargs)

    def prepare(self, segments, *args, **kwargs):
        found = super().prepare(segments, *args, **kwargs)
        if "train" not in segments:
            return found
        more = super().prepare(self.also, *args, **kwargs)
        if isinstance(found, list):
            return [pd.concat([found[0], more]), *found[1:]]
        return pd.concat([found, more])


class WeighsByRisk(LinearModel):
    """Weighs rows by the inverse spread of their stock's labels until a day."""

    def __init__(self, until=None, **kwargs):
        super().__init__(**kwargs)
        self.until = until

    def fit(self, dataset, reweighter=None):
        wanted = dict(col_set=["feature", "label"], data_key="infer")
        spread = dataset.prepare(slice("2018-01-02", self.until), **wanted)["label"]
        weight = 1.0 / spread.iloc[:, 0].groupby(level="instrument").std()
        known = dataset.prepare("train", **wanted).dropna()
        root = weight.reindex(known.index.get_level_values("instrument")) ** 2
        x, y = known["feature"].to_numpy(), known["label"].to_numpy()[:, 0]
        w = root.to_numpy()[:, None]
        self.coef_ = np.linalg.solve(x.T @ (w * x), x.T @ (w[:, 0] * y))
        self.intercept_ = 0.0


class SmoothsRecord:
    """Stands for a record that writes the scores anew; it is never run."""


class Refits(LinearModel):
    """Fits again at the start of each quarter or month, on labels up to a gap."""

    def __init__(self, gap, period="Q", sliced=False, **kwargs):
        super().__init__(**kwargs)
        self.gap, self.period, self.sliced = gap, period, sliced

    def predict(self, dataset, segment="test"):
        x = dataset.prepare(segment, col_set="feature", data_key="infer")
        days = x.index.get_level_values("datetime")
        calendar = pd.DatetimeIndex(D.calendar())
        whole = None
        if self.sliced:
            whole = dataset.handler.fetch(col_set=["feature", "label"], data_key="raw")
        found = []
        for _, part in x.groupby(days.to_period(self.period)):
            first = part.index.get_level_values("datetime").min()
            end = calendar[calendar.searchsorted(first) - 1 - self.gap]
            if whole is None:
                known = dataset.prepare(
                    slice("2018-01-02", end),
                    col_set=["feature", "label"],
                    data_key="infer",
                )
            else:
                known = whole.loc[:end]
            known = known.dropna()
            beta = np.linalg.lstsq(
                known["feature"].to_numpy(), known["label"].to_numpy()[:, 0], rcond=None
            )[0]
            found.append(pd.Series(part.to_numpy() @ beta, part.index))
        return pd.concat(found)


class Weighted(LinearModel):
    """Weighs features by their RankIC with labels of the test or valid segment."""

    def __init__(self, on="test", **kwargs):
        super().__init__(**kwargs)
        self.on = on

    def predict(self, dataset, segment="test"):
        x = dataset.prepare(segment, col_set="feature", data_key="infer")
        known = dataset.prepare(self.on, col_set=["feature", "label"], data_key="raw")
        rank = known.groupby(level="datetime").rank(pct=True)
        weight = rank["feature"].corrwith(rank["label"].iloc[:, 0])
        return pd.Series(x.to_numpy() @ weight.to_numpy(), x.index)


class Smooths(LinearModel):
    """Means of scores over five days, around each or up to it."""

    def __init__(self, centred, **kwargs):
        super().__init__(**kwargs)
        self.centred = centred

    def predict(self, dataset, segment="test"):
        score = super().predict(dataset, segment).unstack()
        return score.rolling(5, center=self.centred, min_periods=1).mean().stack()


def zscore(start, end):
    kwargs = {"fields_group": "feature", "fit_start_time": start, "fit_end_time": end}
    return {"class": "ZScoreNorm", "kwargs": kwargs}


def shaped(name, path=None):
    return dict(loader=own("Shaped", shape=name, path=path))


def traded_at(price):
    kwargs = {"signal": "<PRED>", "topk": 5, "n_drop": 1}
    strategy = {"class": "TopkDropoutStrategy", "module_path": "qlib.contrib.strategy"}
    back_test = {"start_time": "2020-01-02", "end_time": "2020-12-11", "account": 1e8}
    back_test |= {"benchmark": "SH000300", "exchange_kwargs": {"deal_price": price}}
    config = {"strategy": strategy | {"kwargs": kwargs}, "backtest": back_test}
    record = {"class": "PortAnaRecord", "module_path": "qlib.workflow.record_temp"}
    return [record | {"kwargs": {"config": config}}]


# name: (checks, leaky, clean twin)
WAYS = ["truncation", "perturbation"]
CASES = {
    "annual statements from 31 December": (
        WAYS,
        shaped("annual from 31 December"),
        shaped("announced"),
    ),
    "third quarter's statements from 30 September": (
        WAYS,
        shaped("third quarter's from 30 September"),
        shaped("third quarter's announced"),
    ),
    "learning frame that averages the next days": (
        WAYS,
        dict(learn=[own("LearnAhead", ahead=4)]),
        dict(learn=[own("LearnAhead", ahead=0)]),
    ),
    "quarterly refit on labels up to the day before": (
        WAYS,
        dict(model=own("Refits", gap=0)),
        dict(model=own("Refits", gap=6)),
    ),
    "monthly refit on a slice of all labels": (
        WAYS,
        dict(model=own("Refits", gap=0, period="M", sliced=True)),
        dict(model=own("Refits", gap=6, period="M", sliced=True)),
    ),
    "week's close on its first day": (
        WAYS,
        shaped("week's last close on all its days"),
        shaped("last week's close"),
    ),
    "mean of the whole month": (
        WAYS,
        shaped("month's mean volume"),
        shaped("mean volume"),
    ),
    "highest close of the whole quarter": (
        WAYS,
        shaped("quarter's highest close"),
        shaped("highest close"),
    ),
    "suspensions filled back": (
        WAYS,
        shaped("gaps filled back"),
        shaped("gaps filled forward"),
    ),
    "suspensions interpolated": (
        WAYS,
        shaped("gaps interpolated"),
        shaped("gaps filled forward"),
    ),
    "rank over all days": (
        WAYS,
        shaped("rank over all days"),
        shaped("rank over past days"),
    ),
    "smoothed from the end": (
        WAYS,
        shaped("smoothed backwards"),
        shaped("smoothed forwards"),
    ),
    "principal component of all days": (
        WAYS,
        shaped("first component of all days"),
        shaped("first component of early days"),
    ),
    "volume over its mean of all days": (
        WAYS,
        shaped("volume over the stock's mean"),
        shaped("mean volume"),
    ),
    "weights from the test segment": (
        WAYS,
        dict(model=own("Weighted", on="test")),
        dict(model=own("Weighted", on="valid")),
    ),
    "scores smoothed around a day": (
        WAYS,
        dict(model=own("Smooths", centred=True)),
        dict(model=own("Smooths", centred=False)),
    ),
}
CASES |= {
    leak: (WAYS, shaped(leak), shaped(twin))
    for leak, twin in {
        "between the least and largest close": (
            "between the least and largest of 60 days"
        ),
        "over the last close": "over the first close",
        "quarterly value filled back": "quarterly value filled forward",
        "mean return of the month of all years": (
            "mean return of the month of past years"
        ),
        "clipped at quantiles of all days": "clipped at quantiles of early days",
        "return over coming volatility": "return over past volatility",
        "off the line through all days": "off the line through early days",
        "ever a member": "member on the day",
    }.items()
}
CASES |= {
    "industry of the next month": (
        WAYS,
        dict(features=["Ref($industry, -20)", "$turnover"]),
        dict(features=["Ref($industry, 20)", "$turnover"]),
    ),
    "labels of all days by industry": (
        [*WAYS, "windows"],
        dict(features=["$industry", "$turnover"], infer=[own("Encodes")]),
        dict(
            features=["$industry", "$turnover"],
            infer=[own("Encodes", until="2019-07-15")],
        ),
    ),
    "fitted on the test segment": (
        ["windows"],
        dict(infer=[zscore("2020-01-02", "2020-12-14")]),
        dict(infer=[zscore("2018-01-02", "2019-07-31")]),
    ),
    "rows of stocks that do not trade tomorrow left out": (
        ["rows", *WAYS],
        dict(infer=[own("LeavesOut", ahead=1)]),
        dict(infer=[own("LeavesOut", ahead=-1)]),
    ),
    "stocks that will trade most": (
        ["rows", *WAYS],
        dict(infer=[own("MostTraded", ahead=True)]),
        dict(infer=[own("MostTraded", ahead=False)]),
    ),
    "a handler that standardises over all days": (
        WAYS,
        dict(handler=own("Standardises")),
        dict(handler=own("Standardises", until="2018-05-31")),
    ),
    "a label that holds the day's own return": (
        ["foresight", "execution"],
        dict(label="Ref($close, -4)/Ref($close, 1) - 1"),
        {},
    ),
    "market state of the index's next open": (
        WAYS,
        shaped("index's next open"),
        shaped("index's open"),
    ),
    "epoch with the best RankIC on the test segment": (
        WAYS,
        dict(model=own("StopsOn", on="test")),
        dict(model=own("StopsOn", on="valid")),
    ),
    "rows weighted by the risk of all days": (
        WAYS,
        dict(model=own("WeighsByRisk")),
        dict(model=own("WeighsByRisk", until="2019-07-31")),
    ),
    "statement nearest in time": (
        WAYS,
        shaped("statement nearest in time"),
        shaped("statement before"),
    ),
    "days until the delisting": (
        WAYS,
        shaped("days until the delisting"),
        shaped("days since the listing"),
    ),
    "ranks among stocks that trade in ten days": (
        WAYS,
        dict(infer=[own("RanksAmong", ahead=10)]),
        dict(infer=[own("RanksAmong", ahead=-10)]),
    ),
    "labels standardised over all days": (
        ["windows", *WAYS],
        dict(learn=[own("ScalesLabels")]),
        dict(learn=[own("ScalesLabels", until="2019-07-15")]),
    ),
    "a model that reads the next open from the store": (
        WAYS,
        dict(model=own("ReadsOpens", ahead=1)),
        dict(model=own("ReadsOpens", ahead=0)),
    ),
    "the most alike rows of all days": (
        WAYS,
        dict(model=own("Remembers", every=True)),
        dict(model=own("Remembers", every=False)),
    ),
    "rows of the test segment among those trained on": (
        WAYS,
        dict(dataset=own("MoreRows", also="test")),
        dict(dataset=own("MoreRows", also="valid")),
    ),
    "shares bought at the low and sold at the high": (
        ["execution"],
        dict(record=traded_at(["$low", "$high"])),
        dict(record=traded_at("close")),
    ),
    "validated on the test segment": (
        ["purge"],
        dict(segments={**SEGMENTS, "valid": SEGMENTS["test"]}),
        {},
    ),
}
FITTED = {
    "epoch with the best RankIC on the test segment",
    "rows weighted by the risk of all days",
    "the most alike rows of all days",
    "rows of the test segment among those trained on",
}
QUICK = {
    "validated on the test segment",
    "annual statements from 31 December",
    "quarterly refit on labels up to the day before",
    "suspensions filled back",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def look(folder, qlib_market):
    """Audit of a workflow on a store, by the checks named."""
    shared = {}

    def run(store, checks, days, settings=SETTINGS, **arguments):
        # another sample
        key = f"{store} {arguments.get('instruments')} {settings.stocks}"
        subject = Subject(
            flow(store, **arguments),
            folder / f"{len(shared)}" if key not in shared else shared[key].folder,
            replace(settings, days=days),
        )
        if key in shared:  # the same copies, of the same bars
            subject.stores._bars = shared[key].stores.bars
        shared.setdefault(key, subject)
        return audit({}, checks=checks, subject=subject)

    return run


def days_for(name):
    """The first three are a period's first days and the most suspensions."""
    return 3 if name in QUICK else 9


def settings_for(name):
    """What is run by hand looks at more stocks; what leaks in `fit` is fitted again."""
    fitted = name in FITTED
    return SETTINGS if name in QUICK else replace(SETTINGS, stocks=16, refit=fitted)


def each(*names):
    return [
        pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in names
    ]


@pytest.mark.parametrize("name", each(*CASES))
def test_leak_is_caught(name, market, look):
    checks, leaky, _ = CASES[name]
    found = look(market, checks, days_for(name), settings_for(name), **leaky)
    assert found.exit_code == 1, found.text()


@pytest.mark.parametrize("name", each(*CASES))
def test_clean_twin_passes(name, market, look):
    checks, _, clean = CASES[name]
    found = look(market, checks, days_for(name), settings_for(name), **clean)
    assert found.exit_code == 0, found.text()


# ------------------------------------------------------------- files outside the store
class TestOutside:
    @pytest.fixture(scope="class")
    def files(self, market, tmp_path_factory):
        """Files of a factor: of the past, of the next return and noise, undated."""
        out = tmp_path_factory.mktemp("outside")
        codes = sorted(set(read_instruments(market)["instrument"]))
        bars = read_bars(market, codes)
        close = bars.pivot(index="datetime", columns="instrument", values="close")
        rng = np.random.default_rng(0)

        def long(wide):
            wide = wide.rename_axis(columns="instrument")
            return wide.stack().rename("value").reset_index()

        past = long(close.pct_change(5, fill_method=None))
        after = close.pct_change(fill_method=None).shift(-1)
        noise = rng.normal(size=after.shape) * after.std().mean() * 2
        frames = {"past": past, "future": long(after + noise)}
        for name, frame in frames.items():
            frame.to_csv(out / f"{name}.csv", index=False)
            frame.to_parquet(out / f"{name}.parquet")
            frame.to_pickle(out / f"{name}.pkl")
        by_code = pd.Series(rng.normal(size=len(codes)), codes, name="value")
        by_code.to_csv(out / "codes.csv")
        # The twin of the undated file: the same numbers, each with its days.
        rows = close.notna().mul(by_code).where(close.notna())
        long(rows).to_csv(out / "dated.csv", index=False)
        return out

    @pytest.mark.parametrize(
        ("shape", "file", "code"),
        [
            ("csv", "past.csv", 0),
            pytest.param("parquet", "past.parquet", 0, marks=pytest.mark.slow),
            pytest.param("arrow", "past.parquet", 0, marks=pytest.mark.slow),
            pytest.param("parquet", "future.parquet", 1, marks=pytest.mark.slow),
            ("arrow", "future.parquet", 1),
            pytest.param("pickle", "past.pkl", 2, marks=pytest.mark.slow),
            ("codes", "codes.csv", 2),
            pytest.param("csv", "dated.csv", 0, marks=pytest.mark.slow),
        ],
    )
    def test_a_factor_file(self, shape, file, code, files, market, look):
        path = str(files / file)
        checks = ["sources", "foresight", "truncation", "perturbation"]
        found = look(market, checks, days=0, **shaped(shape, path))
        assert found.exit_code == code, found.text()
        if code == 0:
            assert file in str(found.verdicts["sources"].table.index)

    @pytest.mark.slow
    def test_industries_of_a_later_list(self, market, look, tmp_path):
        """The same list dated before the data is no history; one with changes is."""
        codes = sorted(set(read_instruments(market)["instrument"]))
        rows = pd.DataFrame({"instrument": codes, "start": "2010-01-01"})
        rows["industry"] = np.arange(len(codes)) % 5
        later = rows[::3].assign(start="2020-03-02", industry=lambda x: x.industry + 1)
        for name, table, code in (
            ("list.csv", rows, 2),
            ("history.csv", pd.concat([rows, later]), 0),
        ):
            table.to_csv(tmp_path / name, index=False)
            features = shaped("less the industry's mean", str(tmp_path / name))
            found = look(market, ["sources", *WAYS], days=3, **features)
            assert found.exit_code == code, found.text()

    @pytest.mark.slow
    def test_weights_and_handlers_from_files_cannot_be_vouched_for(
        self, market, look, tmp_path
    ):
        np.save(tmp_path / "weights.npy", np.ones(2))
        model = own("FromFile", path=str(tmp_path / "weights.npy"))
        found = look(market, ["sources"], days=0, model=model)
        assert found.exit_code == 2 and "weights.npy" in found.text()
        config = flow(market)
        kwargs = config["task"]["dataset"]["kwargs"]
        handler = init_instance_by_config(kwargs["handler"])
        handler.to_pickle(tmp_path / "handler.pkl", dump_all=True)
        kwargs["handler"] = f"file://{tmp_path / 'handler.pkl'}"
        subject = Subject(config, tmp_path / "audit", SETTINGS)
        found = audit({}, checks=["sources"], subject=subject)
        assert found.exit_code == 2 and "handler.pkl" in found.text()

    def test_a_record_that_is_not_run_cannot_be_vouched_for(self, market, look):
        record = own("SmoothsRecord")
        found = look(market, ["sources"], days=0, record=[record])
        assert found.exit_code == 2 and "SmoothsRecord" in found.text()
        record = {"class": "SigAnaRecord", "module_path": "qlib.workflow.record_temp"}
        assert look(market, ["sources"], days=0, record=[record]).exit_code == 0

    def test_copies_keep_what_lies_before_the_day(self, files, tmp_path):
        day = pd.Timestamp("2020-06-30")
        for name in ("past.csv", "past.parquet"):
            file = OutsideFile(files / name)
            assert file.problem == ""
            read = pd.read_csv if name.endswith("csv") else pd.read_parquet
            full = read(files / name)
            early = pd.to_datetime(full["datetime"]) <= day
            for kind in ("cut", "noise"):
                file.write(kind, day, tmp_path / kind / name, seed=1)
                found = read(tmp_path / kind / name)
                assert found[: early.sum()].equals(full) or (
                    found[pd.to_datetime(found["datetime"]) <= day]
                    .reset_index(drop=True)
                    .equals(full[early].reset_index(drop=True))
                )
                later = pd.to_datetime(found["datetime"]) > day
                assert later.sum() == (0 if kind == "cut" else (~early).sum())
                if kind == "noise":
                    a, b = found.loc[later, "value"], full.loc[~early, "value"]
                    assert (a.to_numpy() != b.to_numpy()).mean() > 0.99

    def test_what_is_written_first_or_is_code_is_not_listed(self, tmp_path):
        trace = FileTrace(tmp_path / "lab")
        (tmp_path / "seen.csv").write_text("a\n1\n")
        with trace.watching():
            (tmp_path / "made.csv").write_text("a\n1\n")
            pd.read_csv(tmp_path / "made.csv")
            pd.read_csv(tmp_path / "seen.csv")
        assert set(trace.outside) == {(tmp_path / "seen.csv").resolve()}

    def test_period_ends_are_no_announcements(self):
        ends = pd.Series(pd.to_datetime(["2019-12-31", "2020-03-31", "2020-06-30"]))
        assert period_dated(ends)
        assert not period_dated(ends + pd.Timedelta(days=1))


# ----------------------------------------------------------------- what lies in a store
class TestStores:
    @pytest.fixture(scope="class")
    def changed(self, market, tmp_path_factory):
        """Copies of the market with something that was not known at the time."""
        codes = sorted(set(read_instruments(market)["instrument"]))
        fields = ["open", "high", "low", "close", "vwap", "factor", "volume"]
        bars = read_bars(market, codes, [*fields, "turnover", "industry"])
        spans = read_instruments(market)
        out = tmp_path_factory.mktemp("stores")

        def write(name, frame, **kwargs):
            write_store(
                out / name,
                frame,
                industry_names=read_industry_names(market),
                calendar=read_calendar(market),
                **kwargs,
            )

        today = bars.copy()
        today["industry"] = today.groupby("instrument")["industry"].transform("last")
        write("today", today)
        forward = bars.copy()
        last = forward.groupby("instrument")["factor"].transform("last")
        for name in ("open", "high", "low", "close", "vwap"):
            forward[name] = forward[name] / last
        forward["factor"] = 1.0
        write("forward", forward)
        end = spans.groupby("instrument")["end"].max()
        left = end.index[end < bars["datetime"].max()]
        write("survivors", bars[~bars["instrument"].isin(left)])
        baked = bars.copy()
        close = baked.pivot(index="datetime", columns="instrument", values="close")
        after = close.pct_change(fill_method=None).shift(-1).stack()
        keys = pd.MultiIndex.from_frame(baked[["datetime", "instrument"]])
        rng = np.random.default_rng(1)
        baked["alpha"] = after.reindex(keys).to_numpy() + rng.normal(
            size=len(baked)
        ) * (2 * float(after.std()))
        write("baked", baked)
        dated = read_table(market, "statements").drop(columns="announced")
        write("periods", bars, tables={"statements": dated})
        return out

    @pytest.mark.parametrize(
        ("check", "store", "features", "code"),
        [
            ("history", "today", ["$industry", "$turnover"], 1),
            pytest.param(
                *("history", "today", ["$turnover", "$turnover"], 0),
                marks=pytest.mark.slow,
            ),
            ("history", None, ["$industry", "Log($close)"], 0),
            ("history", "forward", ["Log($close)", "$turnover"], 1),
            pytest.param(
                *("history", "forward", ["$close/Ref($close, 5)", "$turnover"], 0),
                marks=pytest.mark.slow,
            ),
            ("membership", "survivors", None, 1),
            ("membership", None, None, 0),
            ("foresight", "baked", ["$alpha", "$turnover"], 1),
            ("foresight", None, None, 0),
        ],
    )
    def test_a_store(self, check, store, features, code, changed, market, look):
        where = market if store is None else changed / store
        found = look(where, [check], days=0, features=features)
        assert found.exit_code == code, found.text()

    @pytest.mark.slow
    @pytest.mark.parametrize("survivors", [True, False])
    def test_a_list_of_codes(self, survivors, market, look, monkeypatch):
        monkeypatch.setattr(checks, "EXPECTED", 0.5)  # of a hundred stocks few leave
        spans = read_instruments(market)
        end = spans.groupby("instrument")["end"].max()
        stays = end.index[end == end.max()]
        codes = sorted(stays if survivors else end.index)
        found = look(market, ["membership"], days=0, instruments=codes)
        assert found.exit_code == int(survivors), found.text()

    @pytest.mark.slow
    def test_a_filter_that_looks_ahead(self, market, look):
        for code, day in enumerate((5, -5)):
            rule = f"Ref($close, {day}) > $close"
            pipe = [{"filter_type": "ExpressionDFilter", "rule_expression": rule}]
            pipe[0] |= {"filter_start_time": None, "filter_end_time": None}
            pipe[0] |= {"keep": False}
            universe = {"market": "all", "filter_pipe": pipe}
            found = look(market, ["truncation"], days=0, instruments=universe)
            assert found.exit_code == code, found.text()

    def test_a_table_dated_by_period_ends(self, changed, market, look):
        shape = shaped("annual from 31 December")
        found = look(changed / "periods", ["sources"], days=0, **shape)
        assert found.exit_code == 2 and "period ends" in found.text()
        # Dated by announcements too, there is nothing that it could not cut.
        found = look(market, ["sources"], days=0, **shape)
        assert found.exit_code == 0, found.text()


def test_days_lie_at_starts_ends_and_suspensions():
    days = pd.bdate_range("2018-01-01", "2020-12-31")
    before, test = days[days < "2020-01-01"], days[days >= "2020-01-01"]
    gaps = pd.Series(0.0, days)
    gaps["2020-05-13"] = 3
    found = partings(days, before, test, gaps, 10)
    assert len({p.day for p in found}) == 10
    quarters = {p.day.month for p in found if "quarter" in p.why or "year" in p.why}
    assert quarters >= {1, 4, 7, 10}
    known = {p.why: p.day for p in reversed(found)}
    assert known["most suspensions"] == pd.Timestamp("2020-05-13")
    assert known["first day of a year"] == pd.Timestamp("2019-01-01")
    assert (
        known["last day of a month"].month
        != (known["last day of a month"] + pd.offsets.BDay()).month
    )
    assert partings(days, before, test, gaps, 3) == found[:3]
