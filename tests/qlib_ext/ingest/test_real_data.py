"""The real files of the project, sampled: exact factors, caps, round trip, updates."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars, read_calendar, read_instruments, read_meta

PRESETS = {
    "daily_cn_1000": 80,  # every n-th stock
    "daily_cn_sh": 60,
    "daily_cn_csi300_sh_valuation": 25,
}


def mapping(preset):
    return Path(__file__).parents[3] / "benchmarks" / "presets" / f"{preset}.yaml"


def sample(real_data, preset, tmp_path, **cut):
    frame = pd.read_parquet(real_data / f"{preset}.parquet")
    codes = np.sort(frame["instrument"].unique())[:: PRESETS[preset]]
    frame = frame[frame["instrument"].isin(codes)].copy()
    frame["date"] = pd.to_datetime(frame["date"])
    return frame.sort_values(["instrument", "date"], ignore_index=True)


@pytest.fixture(scope="module")
def real_stores(real_data, eval_in_qlib, tmp_path_factory):
    """Sampled stores of the three real files; their frames; what Qlib reads."""
    folder = tmp_path_factory.mktemp("real")
    frames, results, jobs = {}, {}, {}
    for preset in PRESETS:
        frames[preset] = sample(real_data, preset, folder)
        file = folder / f"{preset}.parquet"
        frames[preset].to_parquet(file)
        results[preset] = ingest(
            folder / preset,
            mapping(preset),
            data=real_data,
            files={"daily": [str(file)]},
        )
        fields = [f for f in results[preset].summary["fields"] if "weight" not in f]
        text = ", ".join(repr("$" + f) for f in fields)
        jobs[preset] = (folder / preset, f"D.features(D.instruments('all'), [{text}])")
    read = eval_in_qlib(folder, jobs)
    for frame in read.values():
        frame.columns = [c.lstrip("$") for c in frame.columns]
        frame.index.names = ["instrument", "date"]
    return folder, frames, results, read


def joined(real_stores, preset):
    """Source rows beside what Qlib reads for them, every source row present."""
    frame = real_stores[1][preset].set_index(["instrument", "date"])
    both = frame.join(real_stores[3][preset], rsuffix="_q", how="left")
    assert len(both) == len(frame)
    return both


def close_to(a, b, ulps=3):
    np.testing.assert_allclose(a, b, rtol=ulps * 6e-8, atol=0)


def test_daily_cn_1000_comes_back_exactly(real_stores):
    both = joined(real_stores, "daily_cn_1000")
    for name in ("open", "high", "low", "close"):  # float32 in the source already
        np.testing.assert_array_equal(both[name], both[f"{name}_q"])
    close_to(both["volume"], both["volume_q"])
    assert (both["factor"] == 1).all()
    assert not {"vwap", "market_cap"} & set(both)
    note = " ".join(read_meta(real_stores[0] / "daily_cn_1000")["notes"])
    assert "forward adjusted" in note and "no $vwap" in note


def test_daily_cn_sh_has_exact_factors_and_market_cap(real_stores):
    both = joined(real_stores, "daily_cn_sh")
    for name in ("open", "high", "low", "close"):
        close_to(both[f"{name}_q"] / both["factor"], both[name])
    first = both.groupby("instrument")["adj_factor"].transform("first")
    close_to(both["factor"], both["adj_factor"] / first)
    close_to(both["volume_q"] * both["factor"], both["volume"])
    close_to(both["vwap"], both["amount"] / both["volume"] * both["factor"])
    known = both["turnover_pct"] > 0
    cap = both["close"] * both["volume"] / (both["turnover_pct"] / 100)
    close_to(both["market_cap"][known], cap[known])
    close_to(both["turnover"], both["turnover_pct"] / 100)
    # the forward-adjusted close of another vendor has the same returns
    other = both.groupby("instrument")["qfq_close"].pct_change()
    np.testing.assert_allclose(both["change"], other, atol=1e-6)


def test_daily_cn_csi300_follows_preclose_and_suspensions(real_stores):
    both = joined(real_stores, "daily_cn_csi300_sh_valuation")
    traded = both["tradestatus"] == 1
    assert both.loc[~traded, ["close_q", "volume_q", "factor", "pb"]].isna().all(None)
    both = both[traded]
    ours = both["change"].to_numpy()
    vendor = both["close"] / both["preclose"] - 1
    later = ~both.index.get_level_values(0).duplicated()
    np.testing.assert_allclose(ours[~later], vendor[~later], atol=2e-7)
    close_to(both["close_q"] / both["factor"], both["close"])
    close_to(both["pe_ttm"], both["peTTM"])
    close_to(both["pcf_ttm"], both["pcfNcfTTM"])


def test_industry_is_one_scheme_a_day_and_point_in_time(real_stores, real_data):
    history = pd.read_parquet(real_data / "industry_sw_history_cn.parquet")
    history["start_date"] = pd.to_datetime(history["start_date"])
    both = joined(real_stores, "daily_cn_1000")
    rng = np.random.default_rng(0)
    for row in rng.choice(len(both), 300, replace=False):
        code, day = both.index[row]
        past = history[(history["instrument"] == code) & (history["start_date"] <= day)]
        want = np.nan
        if len(past):
            want = float(past.sort_values("start_date")["sw_code"].iloc[-1][:2])
        np.testing.assert_equal(both["industry"].iloc[row], want)
    day = both.index.get_level_values(1)
    new_in_2014 = [28, 48, 49, 61, 62, 63, 64, 65, 71, 72, 73]
    gone_in_2014 = [25, 26, 31, 32, 44, 47]
    assert not both["industry"][day < "2014-01-01"].isin(new_in_2014).any()
    assert not both["industry"][day >= "2014-01-01"].isin(gone_in_2014).any()


def test_members_and_index_of_the_real_lists(real_stores, real_data):
    root = real_stores[0] / "daily_cn_csi300_sh_valuation"
    lists = pd.read_parquet(real_data / "index_constituents_cn.parquet")
    spans = read_instruments(root, "csi300")
    calendar = read_calendar(root)
    assert spans["start"].min() == calendar[calendar.searchsorted("2023-07-31")]
    day = pd.Timestamp("2024-05-15")  # the list of the end of April holds
    held = spans[(spans["start"] <= day) & (spans["end"] >= day)]["instrument"]
    april = lists[(lists["index"] == "csi300") & (lists["month"] == "2024-04")]
    ours = set(read_instruments(root)["instrument"])
    assert set(held) == set(april["instrument"]) & ours
    weights = read_bars(root, sorted(ours), ["weight_csi300"])
    total = weights.groupby("datetime")["weight_csi300"].sum()
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert read_meta(root)["index_members"]["csi300"]["weights"] == "equal"
    index = pd.read_parquet(real_data / "index_cn.parquet").query(
        "instrument == 'SH000300'"
    )
    index = index.assign(date=pd.to_datetime(index["date"])).set_index("date")
    bars = read_bars(root, ["SH000300"]).set_index("datetime")
    close_to(bars["close"], index["close"].reindex(bars.index))
    # a change on the first day of the store uses the index's day before it
    assert bars["change"].notna().all()


@pytest.mark.parametrize(
    "preset",
    [
        "daily_cn_sh",
        pytest.param("daily_cn_csi300_sh_valuation", marks=pytest.mark.slow),
    ],
)
def test_update_of_real_bars_equals_the_rebuild(
    real_stores, real_data, tmp_path, preset
):
    folder, frames, _, _ = real_stores
    frame = frames[preset]
    cut = pd.Timestamp("2024-05-31")
    early = frame[frame["date"] <= cut].copy()
    late = frame[frame["date"] > cut]
    if preset == "daily_cn_sh":
        # the delivery of that day was anchored at that day; the new one is whole
        last = early.groupby("instrument")["adj_factor"].transform("last")
        early["adj_factor"] /= last
        late = frame
    early.to_parquet(tmp_path / "early.parquet")
    late.to_parquet(tmp_path / "late.parquet")
    for name, update in (("early", False), ("late", True)):
        files = {"daily": [str(tmp_path / f"{name}.parquet")]}
        ingest(
            tmp_path / "s", mapping(preset), data=real_data, files=files, update=update
        )
    codes = sorted(frame["instrument"].unique())
    one, two = read_bars(folder / preset, codes), read_bars(tmp_path / "s", codes)
    pd.testing.assert_frame_equal(one, two, rtol=2e-7)


def test_reports_name_the_known_oddities(real_stores):
    text = real_stores[2]["daily_cn_sh"].report.to_text()
    assert "equal weights" in text and "members not in the store" in text
    for result in real_stores[2].values():
        assert not result.report.errors
