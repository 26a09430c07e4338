"""Slips of an update are refused by name; --accept lets one pass; nothing else does."""

import shutil

import numpy as np
import pandas as pd
import pytest
from qlib.data import D

from data_handlers.labels import forward_return
from qlib_ext.ingest.report import IngestError
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars, read_instruments

MAPPING = """
prices: raw
factor: one
{extra}
sources:
  daily:
    kind: bars
    files: "*.csv"
    columns: {{instrument: code, date: date, open: open, high: high, low: low,
              close: close, volume: volume, amount: amount}}
"""


PRICES = ["open", "high", "low", "close"]


def bars(stocks=12, days=65):
    rng = np.random.default_rng(0)
    when = pd.bdate_range("2020-01-02", periods=days).strftime("%Y-%m-%d")
    out = []
    for i in range(stocks):
        c = 10 * np.exp(np.cumsum(rng.normal(0, 0.01, days)))
        o = c * (1 + rng.normal(0, 0.003, days))
        v = np.round((i + 1) * 1e5 * rng.uniform(0.8, 1.25, days))
        frame = {
            "code": f"SH60{i:04d}", "date": when, "open": o.round(2),
            "high": (np.maximum(o, c) * 1.006).round(2),
            "low": (np.minimum(o, c) * 0.994).round(2),
            "close": c.round(2), "volume": v, "amount": (v * (o + c) / 2).round(),
        }  # fmt: skip
        out.append(pd.DataFrame(frame))
    return pd.concat(out, ignore_index=True)


@pytest.fixture(scope="module")
def sixty_days(tmp_path_factory):
    """Store of the first 60 days of `bars`, not to be changed."""
    folder = tmp_path_factory.mktemp("sixty")
    (folder / "m.yaml").write_text(MAPPING.format(extra=""))
    (folder / "old").mkdir()
    split(bars())[0].to_csv(folder / "old" / "a.csv", index=False)
    ingest(folder / "s", folder / "m.yaml", data=folder / "old")
    return folder / "s"


@pytest.fixture
def known(sixty_days, tmp_path):
    """A copy of it, where `deliver` looks for a store."""
    shutil.copytree(sixty_days, tmp_path / "s")


@pytest.fixture
def deliver(tmp_path):
    """Ingest a frame, or update with it."""
    (tmp_path / "m.yaml").write_text(MAPPING.format(extra=""))

    def run(frame, name="new", **options):
        (tmp_path / name).mkdir()
        frame.to_csv(tmp_path / name / "a.csv", index=False)
        return ingest(
            tmp_path / "s", tmp_path / "m.yaml", data=tmp_path / name, **options
        )

    return run


def split(frame):
    days = sorted(frame["date"].unique())
    return frame[frame["date"] < days[60]], frame[frame["date"] >= days[60]], days


def times(frame, by, *columns):
    return frame.assign(**{c: frame[c] * by for c in columns})


def permuted(new):
    codes = sorted(new["code"].unique())
    turn = dict(zip(codes, codes[6:] + codes[:6], strict=True))
    return new.assign(code=new["code"].map(turn))


def halved(frame):
    rows = frame["code"] == "SH600003"
    frame = frame.copy()
    frame.loc[rows, PRICES] = (frame.loc[rows, PRICES] / 2).round(2)
    return frame.assign(volume=frame["volume"] * np.where(rows, 2, 1))


def all_locked(frame):
    """Half of the stocks locked at each limit: one price, next to no volume."""
    first = frame["date"] == sorted(frame["date"].unique())[60]
    last = frame.groupby("code")["close"].shift()
    way = np.where(frame["code"] < "SH600006", 0.9, 1.1)
    frame = frame.copy()
    for name in PRICES:
        frame[name] = frame[name].where(~first, (last * way).round(2))
    for name in ("volume", "amount"):
        frame[name] = frame[name].where(~first | (way > 1), frame[name] * 0.02)
    mean = (frame["volume"] * frame["close"]).where(first, frame["amount"])
    return frame.assign(amount=mean)[frame["date"] <= frame.loc[first, "date"].max()]


@pytest.mark.usefixtures("known")
def test_a_day_of_limits_is_appended(deliver):
    report = deliver(split(all_locked(bars()))[1], update=True).report
    assert not report.errors


@pytest.mark.usefixtures("known")
def test_stocks_that_come_back_one_by_one_were_suspended(deliver):
    """As on 8 July 2015: half of the stocks stop, and return over days."""
    _, new, days = split(bars())
    code = new["code"].str[-2:].astype(int)
    day = new["date"].map({d: i for i, d in enumerate(days[60:])})
    gone = new[(code < 6) | (code <= 4 + 2 * day)]
    first = gone[gone["date"] == days[60]]
    with pytest.raises(IngestError, match="incomplete days"):
        deliver(first, "alone", update=True)
    report = deliver(gone, "all", update=True).report
    told = [f for f in report.findings if f.check == "incomplete days"]
    assert [(f.level, f.examples[0]["stocks"]) for f in told] == [("warning", 6)]


@pytest.mark.usefixtures("known")
def test_stocks_that_come_back_at_once_were_missing(deliver):
    """Two days of a download that broke off, and whole ones after them."""
    _, new, days = split(bars())
    broken = new["date"].isin(days[60:62]) & (new["code"].str[-2:].astype(int) >= 6)
    with pytest.raises(IngestError, match="incomplete days"):
        deliver(new[~broken], "all", update=True)


SLIPS = {
    "repeated bars": lambda old, new, d: old[old["date"] == d[59]].assign(date=d[60]),
    "levels": lambda old, new, d: times(new, 0.01, "volume", "amount"),
    "lost fields": lambda old, new, d: new.drop(columns="amount"),
    "ranks": lambda old, new, d: permuted(new),
    "missing trading days": lambda old, new, d: new[new["date"] > d[61]],
    "incomplete days": lambda old, new, d: new[new["code"] < "SH600006"],
    "jumps without factor change": lambda old, new, d: halved(new),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_refused_by_name_and_passes_only_when_accepted(known, deliver, name):
    old, new, days = split(bars())
    slip = SLIPS[name](old, new, days)
    with pytest.raises(IngestError) as caught:
        deliver(slip, update=True)
    assert name in {f.check for f in caught.value.report.errors}
    if name == "levels":  # what is accepted is looked up in the same way for all
        with pytest.raises(IngestError):
            deliver(slip, "again", update=True, accept=("factor revised",))
    wrong = {f.check for f in caught.value.report.errors}
    assert deliver(slip, "known", update=True, accept=tuple(wrong)).written


def test_one_stock_in_fen_in_an_update_is_refused(deliver):
    old, new, _ = split(bars())
    deliver(old, "old")
    fen = np.where(new["code"] == "SH600003", 100, 1)
    odd = new.assign(**{c: new[c] * fen for c in (*PRICES, "amount")})
    with pytest.raises(IngestError) as caught:
        deliver(odd, update=True)
    told = [f for f in caught.value.report.errors if "power of ten off" in f.message]
    assert told and told[0].examples[0]["instrument"] == "SH600003"


def test_opens_given_as_closes_are_refused_in_an_update(deliver):
    frame = bars(stocks=40)
    before = frame.groupby("code")["close"].shift().fillna(frame["close"])
    frame["open"] = before
    frame["high"] = frame[["open", "close"]].max(axis=1) + 0.1
    frame["low"] = frame[["open", "close"]].min(axis=1) - 0.1
    frame["amount"] = (frame["volume"] * (before + frame["close"]) / 2).round()
    old, new, days = split(frame)
    deliver(old, "old")
    one = new[new["date"] == days[60]]
    with pytest.raises(IngestError, match="two columns swapped"):
        deliver(one.rename(columns={"open": "close", "close": "open"}), update=True)
    assert deliver(one, "right", update=True).written


def test_stocks_of_like_prices_exchanged_in_an_update_are_told(deliver, tmp_path):
    frame = bars()
    a, b = (frame["code"] == f"SH60000{k}" for k in (3, 4))
    prices = ["open", "high", "low", "close"]
    frame.loc[b, prices] = (frame.loc[a, prices] + 0.05).round(2).to_numpy()
    frame["amount"] = (frame["volume"] * (frame["open"] + frame["close"]) / 2).round()
    before = frame.groupby("code")["close"].shift()
    frame["before"] = before.fillna(frame["open"])
    mapping = (tmp_path / "m.yaml").read_text()
    (tmp_path / "m.yaml").write_text(
        mapping.replace("close: close,", "close: close, preclose: before,")
    )
    old, new, _ = split(frame)
    deliver(old, "old")
    codes = {"SH600003": "SH600004", "SH600004": "SH600003"}
    with pytest.raises(IngestError, match="under each other's codes"):
        deliver(new.assign(code=new["code"].replace(codes)), update=True)
    assert deliver(new, "right", update=True).written


def test_units_edited_between_updates_are_refused(known, deliver, tmp_path):
    _, new, _ = split(bars())
    text = (tmp_path / "m.yaml").read_text()
    (tmp_path / "m.yaml").write_text(text + "    units: {volume: lots}\n")
    with pytest.raises(IngestError, match="unit slip"):
        deliver(new, update=True)
    with pytest.raises(IngestError, match="`units` are not those") as caught:
        deliver(new.drop(columns="amount"), "less", update=True)
    errors = {f.check: f.message for f in caught.value.report.errors}
    assert {"mapping changed", "levels", "lost fields"} <= set(errors)
    assert "volume x 9" in errors["levels"]


def test_a_good_update_has_no_finding(known, deliver):
    _, new, _ = split(bars())
    assert deliver(new, update=True).report.findings == []


def test_a_cut_bin_is_named(known, deliver, tmp_path):
    _, new, _ = split(bars())
    file = tmp_path / "s/features/sh600001/volume.day.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"sh600001/volume.day.bin is damaged"):
        deliver(new, update=True)


@pytest.mark.parametrize("what", ["bin", "case", "weekend", "text"])
def test_a_damaged_store_is_told_by_its_cause(deliver, tmp_path, what):
    old, new, _ = split(bars(stocks=3, days=65))
    deliver(old, "old")
    folder = tmp_path / "s/features/sh600001"
    days = tmp_path / "s/calendars/day.txt"
    if what == "bin":
        (folder / "close.day.bin").unlink()
    elif what == "case":
        folder.rename(folder.with_name("SH600001"))
    else:
        line = "2020-01-04\n" if what == "weekend" else "abc\n"
        days.write_text(days.read_text().replace("2020-01-06\n", line + "2020-01-06\n"))
    match = {
        "bin": r"close.day.bin is missing, and each stock has it",
        "case": r"rename .*SH600001 to lower case",
        "weekend": r"day.txt has Saturday 2020-01-04",
        "text": r"day.txt, line 3, is no date: 'abc'",
    }
    with pytest.raises(ValueError, match=match[what]):
        deliver(new, update=True)


def test_conflicts_in_pairs_are_errors_and_both_are_left_out_on_demand(
    deliver, tmp_path
):
    good = bars(days=30)
    wrong = times(good.iloc[[3]], 1.3, "open", "high", "low", "close", "amount")
    both = pd.concat([wrong, wrong, good, good.iloc[[3]]])
    with pytest.raises(IngestError, match="given twice with different values"):
        deliver(both)
    deliver(both, "drop", drop_bad_rows=True)
    held = read_bars(tmp_path / "s", ["SH600000"])
    assert (
        len(held) == 29 and good["date"][3] not in held["datetime"].astype(str).values
    )


def test_infinity_is_named_and_can_be_left_out(deliver):
    frame = bars(days=30)
    frame.loc[5, ["close", "high"]] = np.inf
    with pytest.raises(IngestError, match="infinite price"):
        deliver(frame)
    found = deliver(frame, "drop", drop_bad_rows=True).report.findings
    assert {f.check for f in found} == {"infinite price"}


def test_the_last_day_is_judged_against_the_days_before(deliver):
    frame = bars(stocks=20, days=30)
    last = frame["date"] == frame["date"].max()
    with pytest.raises(IngestError, match="far fewer stocks"):
        deliver(frame[~last | (frame["code"] < "SH600008")])


@pytest.mark.parametrize("written", ["empty", "zero", "last price", "tiny"])
def test_a_suspension_is_one_however_it_is_written(deliver, tmp_path, written):
    frame = bars(stocks=3, days=30)
    rows = slice(8, 11)
    prices, size = ["open", "high", "low", "close"], ["volume", "amount"]
    last = frame["close"][7]
    price, volume = {
        "empty": (np.nan, np.nan), "zero": (0.0, 0.0),
        "last price": (last, 0.0), "tiny": (last, 5.9e-39),
    }[written]  # fmt: skip
    frame.loc[rows, prices], frame.loc[rows, size] = price, volume
    deliver(frame)
    held = read_bars(tmp_path / "s", ["SH600000"])
    assert len(held) == 26
    want = frame["close"][12] / last - 1
    assert held["change"].iloc[8] == pytest.approx(want, abs=1e-6)


INDEX = """  index:
    kind: index
    files: "*.idx"
    columns: {instrument: code, date: date, close: close}
"""


def test_each_row_that_is_left_out_is_listed_with_its_source(deliver, tmp_path):
    frame = bars(days=30)
    index = frame[frame["code"] == "SH600000"][["date", "close"]]
    index = index.assign(code="SH000300", close=np.r_[index["close"][:-1], -5.0])
    (tmp_path / "new").mkdir()
    index.to_csv(tmp_path / "new" / "i.idx", index=False)
    with open(tmp_path / "m.yaml", "a") as file:
        file.write(INDEX)
    frame.loc[100, "low"] = 99.0
    frame.to_csv(tmp_path / "new" / "a.csv", index=False)
    make = (tmp_path / "s", tmp_path / "m.yaml")
    with pytest.raises(IngestError):
        ingest(*make, data=tmp_path / "new")
    report = ingest(*make, data=tmp_path / "new", drop_bad_rows=True).report
    left_out = {f.source for f in report.findings if "rows left out" in f.message}
    assert left_out == {"daily", "index"}
    held = read_bars(tmp_path / "s", ["SH000300"])["close"].dropna()
    assert len(held) == 29 and held.min() > 0


def test_one_company_under_two_codes_is_warned_of(deliver):
    frame = bars()
    copy = frame[frame["code"] == "SH600003"].assign(code="SH601872")
    (finding,) = deliver(pd.concat([frame, copy])).report.findings
    assert (finding.level, finding.check) == ("warning", "two codes with equal bars")
    assert finding.examples == (
        {"instrument": "SH600003", "same_as": "SH601872", "days": 65},
    )


def test_a_code_that_ends_where_another_begins_is_warned_of(deliver, tmp_path):
    old, new, _ = split(bars())
    text = (tmp_path / "m.yaml").read_text()
    text = text.replace("amount: amount", "amount: amount, preclose: preclose")
    (tmp_path / "m.yaml").write_text(text)
    before = pd.concat([old, new]).groupby("code")["close"].shift()
    before = before.fillna(old["open"])
    new = new.assign(
        preclose=before.loc[new.index], code=new["code"].replace("SH600003", "BJ920003")
    )
    deliver(old.assign(preclose=before.loc[old.index]), "old")
    found = {f.check: f for f in deliver(new, update=True).report.findings}
    assert found["renamed codes"].level == "warning"
    (example,) = found["renamed codes"].examples
    assert (example["instrument"], example["begins"]) == ("SH600003", "BJ920003")


def test_a_rename_joins_the_history(deliver, tmp_path):
    frame = bars(days=30)
    late = (frame["code"] == "SH600000") & (frame["date"] >= frame["date"][20])
    frame.loc[late, "code"] = "SH600900"
    (tmp_path / "m.yaml").write_text(
        MAPPING.format(extra="renames: {SH600000: SH600900}")
    )
    deliver(frame)
    assert len(read_bars(tmp_path / "s", ["SH600900"])) == 30


def test_a_stock_without_a_row_on_the_last_day_is_not_delisted(
    deliver, tmp_path, use_store
):
    old, new, days = split(bars())
    hole = (old["code"] == "SH600003") & (old["date"] == days[59])
    report = deliver(old[~hole], "old").report
    (note,) = report.findings
    assert (note.level, note.check) == ("note", "no row on the last day")
    assert note.examples == ({"instrument": "SH600003"},)
    use_store(tmp_path / "s")
    close = old[old["code"] == "SH600003"].set_index("date")["close"]
    label = D.features(["SH600003"], [forward_return(10)]).droplevel(0).iloc[:, 0]
    # Bought on day 49, sold on day 59 at the price of day 58.
    assert label[days[48]] == pytest.approx(close[days[58]] / close[days[49]] - 1, 1e-5)
    lacks = (new["code"] == "SH600007") & (new["date"] == days[64])
    (note,) = deliver(new[~lacks], update=True).report.findings
    assert note.examples == ({"instrument": "SH600007"},)
    spans = read_instruments(tmp_path / "s").set_index("instrument")["end"]
    assert f"{spans['SH600003']:%Y-%m-%d}" == days[64]
    assert f"{spans['SH600007']:%Y-%m-%d}" == days[63]
    held = read_bars(tmp_path / "s", ["SH600003"]).set_index("datetime")["close"]
    assert sorted(set(days) - set(held.dropna().index.strftime("%Y-%m-%d"))) == [
        days[59]
    ]
