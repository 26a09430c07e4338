"""A small market with known factors, written the way each vendor would write it."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

# Qlib keeps one store per process, so it runs in a process of its own
QLIB_SCRIPT = """
import json, sys
import qlib
from qlib.data import D
if __name__ == "__main__":
    out = {}
    for name, root, expression in json.loads(sys.argv[1]):
        qlib.init(provider_uri=root, logging_level=40, kernels=1)
        out[name] = eval(expression)
    import pickle
    pickle.dump(out, open(sys.argv[2], "wb"))
"""


@pytest.fixture(scope="session")
def eval_in_qlib(run_process):
    """Function that evaluates {name: (store, expression of D)} in one new process."""

    def evaluate(folder, jobs):
        args = json.dumps([[k, str(root), text] for k, (root, text) in jobs.items()])
        run_process(QLIB_SCRIPT, folder, args, folder / "run_qlib.pkl")
        return pd.read_pickle(folder / "run_qlib.pkl")

    return evaluate


@dataclass
class VendorMarket:
    """The truth: raw bars in shares and CNY, factors anchored at the first row.

    Columns of `bars`: instrument, date, open, high, low, close, preclose, volume,
    amount, turnover (fraction), factor, suspended. Suspended rows repeat the close.
    """

    bars: pd.DataFrame
    index: pd.DataFrame
    members: pd.DataFrame
    industry: pd.DataFrame

    @property
    def traded(self):
        """Rows of traded days."""
        return self.bars[~self.bars["suspended"]].reset_index(drop=True)

    def until(self, day):
        """The same market known by a day (lists and industries stay complete)."""
        day = pd.Timestamp(day)
        return VendorMarket(
            self.bars[self.bars["date"] <= day],
            self.index[self.index["date"] <= day],
            self.members,
            self.industry,
        )

    def since(self, day):
        """The same market from a day on."""
        day = pd.Timestamp(day)
        return VendorMarket(
            self.bars[self.bars["date"] >= day],
            self.index[self.index["date"] >= day],
            self.members,
            self.industry,
        )


STOCKS = ["SH600000", "SH600519", "SH688001", "SZ000001", "SZ002415", "SZ300750"]


def build_market(days=40, stocks=STOCKS, seed=7):
    """Draw prices, ex-dates, suspensions, one late listing; all figures consistent."""
    rng = np.random.default_rng(seed)
    calendar = pd.bdate_range("2020-01-02", periods=days)
    pieces = []
    for k, code in enumerate(stocks):
        first = 0 if k else days // 4  # the first stock is listed late
        close, factor = 10.0 + 7 * k, 1.0
        shares = 1e8 * (k + 1)
        for t in range(first, days):
            previous = round(close, 2)
            preclose = previous
            if k != 1 and t in (first + 9 + k, days - 6):  # ex-dates; stock 1 has none
                preclose = round(previous / (1.1 + 0.05 * k), 2)
                factor *= previous / preclose
            suspended = k == 2 and t in (12, 13, days - 4) and t > first
            if suspended:
                o = h = low = close = preclose
                volume = amount = 0.0
            else:
                close = round(preclose * (1 + 0.01 * rng.standard_normal()), 2)
                o = round(preclose * (1 + 0.004 * rng.standard_normal()), 2)
                h = round(max(o, close) * 1.006, 2)
                low = round(min(o, close) * 0.994, 2)
                volume = 100.0 * rng.integers(5_000, 50_000)
                amount = round(volume * round((o + h + low + close) / 4, 3) / 1e3) * 1e3
            pieces.append(
                (code, calendar[t], o, h, low, close, preclose, volume, amount,
                 volume / shares, factor, suspended)
            )  # fmt: skip
    names = ["instrument", "date", "open", "high", "low", "close", "preclose"]
    names += ["volume", "amount", "turnover", "factor", "suspended"]
    bars = pd.DataFrame(pieces, columns=names)
    level = 4000 * np.exp(np.cumsum(0.01 * rng.standard_normal(days)))
    index = pd.DataFrame(
        {
            "instrument": "SH000300",
            "date": calendar,
            "open": level,
            "high": level * 1.01,
            "low": level * 0.99,
            "close": level,
            "volume": 1e9,
            "amount": 1e10,
        }
    )
    lists = [(calendar[5], stocks[1:4], [0.2, 0.3, 0.5])]
    lists += [(calendar[days // 2], stocks[2:5], [0.5, 0.25, 0.25])]
    members = pd.DataFrame(
        [
            ("SH000300", day, code, weight)
            for day, codes, weights in lists
            for code, weight in zip(codes, weights, strict=True)
        ],
        columns=["index", "date", "instrument", "weight"],
    )
    rows = [(code, pd.Timestamp("2010-01-01"), 480000 + k, f"old {k}")
            for k, code in enumerate(stocks[:-1])]  # fmt: skip
    rows.append((stocks[3], calendar[15], 610000, "new"))
    industry = pd.DataFrame(rows, columns=["instrument", "start", "code", "name"])
    return VendorMarket(bars, index, members, industry)


@pytest.fixture(scope="session")
def vendor_market():
    """The small market; do not change it in place."""
    return build_market()


def _suffixed(code):
    return code[2:] + "." + code[:2]


def write_tushare(market, folder, *, extras=True):
    """Files of Tushare: lots, thousand CNY, percent, 20200102, no suspended rows."""
    bars = market.traded
    ts = bars["instrument"].map(_suffixed)
    day = bars["date"].dt.strftime("%Y%m%d")
    change = (bars["close"] / bars["preclose"] - 1) * 100
    frames = {
        "daily": {
            "ts_code": ts, "trade_date": day,
            **{c: bars[c] for c in ("open", "high", "low", "close")},
            "pre_close": bars["preclose"], "change": bars["close"] - bars["preclose"],
            "pct_chg": change.round(4),
            "vol": bars["volume"] / 100, "amount": bars["amount"] / 1000,
        },
        "adj_factor": {
            # hfq factors do not start at 1 where the history begins earlier
            "ts_code": ts, "trade_date": day, "adj_factor": bars["factor"] * 3.25,
        },
    }  # fmt: skip
    if extras:
        shares = bars["volume"] / bars["turnover"]
        frames["daily_basic"] = {
            "ts_code": ts, "trade_date": day, "turnover_rate": bars["turnover"] * 100,
            "pe_ttm": 20.0, "pb": 2.0, "ps_ttm": 3.0,
            "circ_mv": bars["close"] * shares / 1e4,
        }  # fmt: skip
        frames["stk_limit"] = {
            "ts_code": ts, "trade_date": day,
            "up_limit": (bars["preclose"] * 1.1).round(2),
            "down_limit": (bars["preclose"] * 0.9).round(2),
        }  # fmt: skip
        sizes = {"sm": 0.1, "md": 0.2, "lg": 0.3, "elg": 0.4}
        frames["moneyflow"] = {
            "ts_code": ts, "trade_date": day,
            **{f"{side}_{size}_amount": bars["amount"] * part * share / 1e4
               for side, part in (("buy", 0.6), ("sell", 0.4))
               for size, share in sizes.items()},
        }  # fmt: skip
        index = market.index
        frames["index_daily"] = {
            "ts_code": "000300.SH", "trade_date": index["date"].dt.strftime("%Y%m%d"),
            **{c: index[c] for c in ("open", "high", "low", "close")},
            "vol": index["volume"] / 100, "amount": index["amount"] / 1000,
        }  # fmt: skip
        m = market.members
        frames["index_weight"] = {
            "index_code": "000300.SH", "con_code": m["instrument"].map(_suffixed),
            "trade_date": m["date"].dt.strftime("%Y%m%d"), "weight": m["weight"] * 100,
        }  # fmt: skip
        i = market.industry
        frames["index_member_all"] = {
            "l1_code": i["code"].astype(str) + ".SI", "l1_name": i["name"],
            "ts_code": i["instrument"].map(_suffixed),
            "in_date": i["start"].dt.strftime("%Y%m%d"), "out_date": None,
        }  # fmt: skip
    for name, columns in frames.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame(columns)
        if name == "daily":  # people download it in parts
            for one, part in frame.groupby(frame["trade_date"].str[:6]):
                part.to_csv(folder / name / f"{one}.csv", index=False)
        else:
            frame.to_csv(folder / name / f"{name}.csv", index=False)


def write_akshare(market, folder, *, encoding="utf-8-sig"):
    """Files of AKShare: Chinese columns, bare codes, lots, factor steps by file."""
    for sub in ("daily", "factor", "index"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    bars = market.traded
    raw_change = bars["close"] / bars.groupby("instrument")["close"].shift() - 1
    frame = pd.DataFrame(
        {
            "日期": bars["date"].dt.strftime("%Y-%m-%d"),
            "股票代码": bars["instrument"].str[2:],
            "开盘": bars["open"], "收盘": bars["close"],
            "最高": bars["high"], "最低": bars["low"],
            "成交量": (bars["volume"] / 100).astype(int), "成交额": bars["amount"],
            "涨跌幅": (raw_change * 100).round(2),
            "换手率": (bars["turnover"] * 100).round(2),
        }
    )  # fmt: skip
    for code, part in frame.groupby("股票代码"):
        part.to_csv(folder / "daily" / f"{code}.csv", index=False, encoding=encoding)
    for code, part in bars.groupby("instrument"):
        steps = part[part["factor"].diff().ne(0)]
        out = pd.DataFrame(
            {"date": steps["date"], "hfq_factor": steps["factor"] * 2}
        ).sort_values("date", ascending=False)
        out.to_csv(folder / "factor" / f"{code.lower()}.csv", index=False)
    index = market.index
    pd.DataFrame(
        {
            "日期": index["date"], "开盘": index["open"], "收盘": index["close"],
            "最高": index["high"], "最低": index["low"],
            "成交量": index["volume"] / 100, "成交额": index["amount"],
        }
    ).to_csv(folder / "index" / "000300.csv", index=False)  # fmt: skip


def write_baostock(market, folder, *, adjustflag=3):
    """Files of baostock: everything text, sh.600000, suspended rows kept."""
    (folder / "daily").mkdir(parents=True, exist_ok=True)
    bars = market.bars
    frame = pd.DataFrame(
        {
            "date": bars["date"].dt.strftime("%Y-%m-%d"),
            "code": bars["instrument"].str[:2].str.lower()
            + "." + bars["instrument"].str[2:],
            **{c: bars[c].map("{:.4f}".format)
               for c in ("open", "high", "low", "close", "preclose")},
            "volume": bars["volume"].map("{:.0f}".format).mask(bars["suspended"], ""),
            "amount": bars["amount"].map("{:.4f}".format).mask(bars["suspended"], ""),
            "adjustflag": adjustflag,
            "turn": (bars["turnover"] * 100).map("{:.6f}".format)
            .mask(bars["suspended"], ""),
            "tradestatus": (~bars["suspended"]).astype(int),
            "pctChg": ((bars["close"] / bars["preclose"] - 1) * 100).round(6),
            "peTTM": 20.0, "pbMRQ": 2.0, "psTTM": 3.0, "pcfNcfTTM": -4.0, "isST": 0,
        }
    )  # fmt: skip
    for code, part in frame.groupby("code"):
        part.to_csv(folder / "daily" / f"{code}.csv", index=False)


@pytest.fixture(scope="session")
def fake_vendors():
    """Functions that make markets and vendor files (tests cannot import a conftest)."""
    return SimpleNamespace(
        stocks=STOCKS,
        build_market=build_market,
        write={
            "tushare": write_tushare,
            "akshare": write_akshare,
            "baostock": write_baostock,
        },
    )
