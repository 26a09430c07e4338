"""Each preset: vendor files in, and Qlib reads back what the vendor meant."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars, read_instruments, read_meta

PRESETS = ["tushare", "akshare", "baostock"]
FIELDS = ["open", "high", "low", "close", "vwap", "volume", "amount", "factor"]
FIELDS += ["change", "turnover", "market_cap"]


@pytest.fixture(scope="module")
def preset_stores(vendor_market, fake_vendors, eval_in_qlib, tmp_path_factory):
    """One store per preset, and its fields as Qlib reads them."""
    folder = tmp_path_factory.mktemp("presets")
    jobs, results = {}, {}
    for name, write in fake_vendors.write.items():
        write(vendor_market, folder / f"{name}_files")
        results[name] = ingest(folder / name, name, data=folder / f"{name}_files")
        text = ", ".join(repr("$" + f) for f in FIELDS)
        jobs[name] = (folder / name, f"D.features(D.instruments('all'), [{text}])")
    return folder, results, eval_in_qlib(folder, jobs)


def expected(market):
    """The store's fields from the truth, by pandas one stock at a time."""
    out = []
    for _, part in market.traded.groupby("instrument"):
        part = part.assign(
            **{c: part[c] * part["factor"] for c in ("open", "high", "low")}
        )
        adjusted = part["close"] * part["factor"]
        part["vwap"] = part["amount"] / part["volume"] * part["factor"]
        part["market_cap"] = part["close"] * part["volume"] / part["turnover"]
        part["change"] = adjusted.pct_change()
        part["close"] = adjusted
        part["volume"] = part["volume"] / part["factor"]
        out.append(part)
    return pd.concat(out).set_index(["instrument", "date"])[FIELDS].sort_index()


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_qlib_equals_the_source_to_float32(
    preset_stores, vendor_market, preset
):
    frame = preset_stores[2][preset]
    frame.columns = [c.lstrip("$") for c in frame.columns]
    frame.index.names = ["instrument", "date"]
    want = expected(vendor_market)
    got = frame.dropna(how="all").sort_index()
    assert got.index.equals(want.index)
    for name in FIELDS:
        rtol = 0.0
        if name in ("turnover", "market_cap"):  # decimals of a percent the vendor gives
            rtol = {"akshare": 0.06, "baostock": 1e-5, "tushare": 0.0}[preset]
        np.testing.assert_allclose(
            got[name], want[name], rtol=max(rtol, 3e-7), atol=3e-7, err_msg=name
        )


def test_suspended_days_are_rows_without_values(preset_stores, vendor_market):
    frame = preset_stores[2]["baostock"]
    days = vendor_market.bars.query("suspended")[["instrument", "date"]]
    for code, day in days.itertuples(index=False):
        assert frame.loc[(code, day)].isna().all()


def test_vwap_times_volume_is_the_amount(preset_stores):
    for frame in preset_stores[2].values():
        frame = frame.rename(columns=lambda c: c.lstrip("$")).dropna()
        product = frame["vwap"] * frame["volume"]
        np.testing.assert_allclose(product, frame["amount"], rtol=1e-6)


def test_tushare_flow_by_order_size_is_in_cny(preset_stores):
    store = preset_stores[0] / "tushare"
    codes = sorted(set(read_instruments(store)["instrument"]))
    bars = read_bars(store, codes, ["amount", *FLOW_FIELDS]).dropna()
    assert len(bars) > 100
    for part, side in ((0.6, "buy"), (0.4, "sell")):
        for share, size in zip((0.1, 0.2, 0.3, 0.4), FLOW_CLASSES, strict=True):
            got = bars[f"flow_{side}_{size}"]
            np.testing.assert_allclose(got, bars["amount"] * part * share, rtol=1e-6)


def test_tushare_industry_members_limits_and_index(
    preset_stores, vendor_market, fake_vendors
):
    folder, results, _ = preset_stores
    root = folder / "tushare"
    assert results["tushare"].summary["indices"] == ["SH000300"]
    spans = read_instruments(root, "csi300")
    calendar = sorted(vendor_market.bars["date"].unique())
    assert spans.loc[spans["instrument"] == "SH600519", "end"].item() == calendar[19]
    assert spans.loc[spans["instrument"] == "SZ002415", "start"].item() == calendar[20]
    bars = read_bars(root, fake_vendors.stocks)
    weights = bars.groupby("datetime")["weight_csi300"].sum()
    np.testing.assert_allclose(weights[calendar[5] :], 1.0, rtol=1e-6)
    assert (weights[: calendar[4]] == 0).all()
    one = bars[bars["instrument"] == "SZ000001"].set_index("datetime")["industry"]
    assert (one[: calendar[14]] == 480003).all() and (
        one[calendar[15] :] == 610000
    ).all()
    last = bars[bars["instrument"] == "SZ300750"]["industry"]
    assert last.isna().all()  # no row in the history: unknown, not guessed
    raw = vendor_market.traded.set_index(["instrument", "date"])
    got = bars.dropna(subset=["close"]).set_index(["instrument", "datetime"])
    limit = (raw["preclose"] * 1.1).round(2) * raw["factor"]
    np.testing.assert_allclose(got["limit_up"].sort_index(), limit.sort_index(), 3e-7)


def test_meta_says_what_is_adjusted(preset_stores):
    meta = read_meta(preset_stores[0] / "baostock")
    assert meta["adjustment"]["prices"].startswith("product of previous close")
    assert meta["source"]["mapping"] == "baostock"
    assert meta["fields"][:4] == ["open", "high", "low", "close"]


def test_report_is_saved_in_the_store(preset_stores):
    text = (preset_stores[0] / "tushare" / "ingest_report.md").read_text()
    assert "no industry" in text and "SZ300750" in text


def test_adjusted_bars_have_no_vwap_no_market_cap_and_factor_one(
    vendor_market, fake_vendors, tmp_path
):
    fake_vendors.write["akshare"](vendor_market, tmp_path / "files")
    result = ingest(
        tmp_path / "s",
        "akshare_adjusted",
        data=tmp_path / "files",
        files={"daily": [str(tmp_path / "files" / "daily" / "600519.csv")]},
    )
    assert not {"vwap", "market_cap"} & set(result.summary["fields"])
    bars = read_bars(tmp_path / "s", ["SH600519"])
    assert (bars["factor"] == 1).all()
    assert "factor unknown" in read_meta(tmp_path / "s")["adjustment"]["prices"]


def test_gb18030_files_are_read(vendor_market, fake_vendors, tmp_path):
    fake_vendors.write["akshare"](vendor_market, tmp_path / "files", encoding="gb18030")
    result = ingest(tmp_path / "s", "akshare", data=tmp_path / "files")
    assert result.summary["stocks"] == 6


def test_baostock_files_of_another_adjustment_are_refused(
    vendor_market, fake_vendors, tmp_path
):
    fake_vendors.write["baostock"](vendor_market, tmp_path / "files", adjustflag=2)
    with pytest.raises(ValueError, match=r"'adjustflag' must be \['3'\], got '2'"):
        ingest(tmp_path / "s", "baostock", data=tmp_path / "files")
    assert not (tmp_path / "s").exists()
