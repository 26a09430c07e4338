"""The embedded market's day level: statistics, phenomena, oracle, bad input."""

import filecmp
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import stats

from qlib_ext.cli import main
from qlib_ext.ingest.store import (
    read_bars,
    read_calendar,
    read_instruments,
    read_meta,
    store_lock,
)
from qlib_ext.market import make_market, oracle_path
from qlib_ext.market.calendar import trading_days
from qlib_ext.market.make import INDICES
from qlib_ext.market.simulate import ALPHAS, alpha_states, make_universe, simulate
from qlib_ext.market.statements import as_announced

SEED = 3


@pytest.fixture(scope="module")
def sim_planted():
    """150 stocks, five years, with alpha."""
    universe = make_universe(SEED, trading_days(5), 150)
    return simulate(SEED, universe, planted=True)


@pytest.fixture(scope="module")
def sim_none():
    """The same market without alpha."""
    universe = make_universe(SEED, trading_days(5), 150)
    return simulate(SEED, universe, planted=False)


@pytest.fixture(scope="module")
def wide_store(market):
    """Fields of the planted store as [day, stock] frames, suspended days NaN."""
    codes = sorted(read_instruments(market)["instrument"].unique())
    bars = read_bars(market, codes).set_index(["datetime", "instrument"])
    cal = read_calendar(market)
    return {name: bars[name].unstack().reindex(cal) for name in bars}


def adjusted_close(sim):
    return np.where(sim.traded, sim.close * sim.factor, np.nan)


def forward_return(sim):
    """close(t+11) / close(t+1) - 1, NaN where either is missing."""
    close = adjusted_close(sim)
    label = np.full_like(close, np.nan)
    label[:-11] = close[11:] / close[1:-10] - 1
    return label


def daily_rank_ic(score, label):
    ok = np.isfinite(score) & np.isfinite(label)
    x, y = (pd.DataFrame(v).where(ok).rank(axis=1) for v in (score, label))
    return x.corrwith(y, axis=1).where(ok.sum(axis=1) > 5).to_numpy()


def mean_and_error(ic):
    """Mean and its standard error from non-overlapping blocks of ten days."""
    ic = ic[np.isfinite(ic)]
    blocks = [b.mean() for b in np.array_split(ic, len(ic) // 10)]
    return np.mean(blocks), np.std(blocks, ddof=1) / np.sqrt(len(blocks))


def day_bar_score(sim):
    """A hand-built reading of the day alpha from day bars up to each day's close."""
    ok = sim.traded
    with np.errstate(all="ignore"):
        move = np.where(ok, np.log(sim.close / sim.ref), np.nan)
        gap = np.where(ok, np.log(sim.open / sim.ref), np.nan)
        vwap = sim.amount / sim.lots
        middle = (sim.open + sim.high + sim.low + sim.close) / 4
        bias = np.where(ok, (vwap - middle) / np.maximum(sim.high - sim.low, 1), np.nan)
    vol = pd.DataFrame(move**2).ewm(halflife=20, min_periods=5).mean() ** 0.5
    late = (pd.DataFrame(gap - 0.3 * move) / vol).clip(-3, 3)
    smooth = [pd.DataFrame(x).ewm(halflife=4).mean() for x in (late, bias)]
    return -sum((x / x.stack().std()).to_numpy() for x in smooth)


class TestStatistics:
    def test_cross_sectional_std_is_about_two_and_a_half_percent(self, sim_planted):
        spread = np.nanmean(np.nanstd(sim_planted.change[1:], axis=1))
        assert 0.022 < spread < 0.028

    def test_returns_have_fat_tails(self, sim_planted):
        sim = sim_planted
        assert stats.kurtosis(sim.change[np.isfinite(sim.change)]) > 1.5

    def test_volatility_clusters(self, sim_planted):
        size = np.abs(sim_planted.change)
        lag = [
            pd.Series(size[:, j]).autocorr(k) for j in range(0, 150, 3) for k in (1, 5)
        ]
        assert np.nanmean(lag) > 0.04

    def test_volume_rises_with_volatility(self, sim_planted):
        sim = sim_planted
        links = []
        for j in range(0, 150, 3):
            ok = sim.traded[:, j]
            links.append(stats.spearmanr(np.abs(sim.change[ok, j]), sim.lots[ok, j])[0])
        assert np.nanmean(links) > 0.15

    def test_returns_have_no_serial_correlation(self, sim_planted):
        # the footprints, not past returns, are to show the alpha
        label = forward_return(sim_planted)
        log_close = np.log(adjusted_close(sim_planted))
        for k in (5, 10, 20):
            past = np.full_like(log_close, np.nan)
            past[k:] = log_close[k:] - log_close[:-k]
            mean, error = mean_and_error(daily_rank_ic(past, label))
            assert abs(mean) < 3 * error

    def test_market_and_industry_move_stocks_together(self, sim_planted):
        sim = sim_planted
        common = np.nanmean(sim.change[1:], axis=1)
        assert 0.006 < common.std() < 0.03
        code = sim.universe.industry
        own = np.where(code == code[:1], sim.change, np.nan) - common_of(sim)
        same, other = [], []
        for a in range(0, 60):
            for b in range(a + 1, 60):
                ok = np.isfinite(own[:, a]) & np.isfinite(own[:, b])
                if ok.sum() > 300:
                    r = np.corrcoef(own[ok, a], own[ok, b])[0, 1]
                    (same if code[0, a] == code[0, b] else other).append(r)
        assert np.mean(same) > np.mean(other) + 0.03


def common_of(sim):
    return np.r_[0, np.nanmean(sim.change[1:], axis=1)][:, None]


class TestBars:
    def test_bars_are_ordered_and_on_the_tick(self, sim_planted):
        s, ok = sim_planted, sim_planted.traded
        assert s.open.dtype == s.amount.dtype == np.int64
        top, bottom = np.maximum(s.open, s.close), np.minimum(s.open, s.close)
        assert (s.low <= bottom)[ok].all() and (top <= s.high)[ok].all()
        assert (s.low[ok] > 0).all() and (s.lots[ok] >= 200).all()

    def test_prices_stay_inside_limits(self, sim_planted):
        s = sim_planted
        ok = s.traded & (s.up > 0)
        assert (s.high <= s.up)[ok].all() and (s.low >= s.down)[ok].all()
        narrow = ok & ~s.universe.wide
        assert np.abs(s.up / np.maximum(s.ref, 1) - 1.1)[narrow].max() < 0.006
        assert np.abs(s.up / np.maximum(s.ref, 1) - 1.2)[ok & s.universe.wide].max() < (
            0.006
        )

    def test_limit_days_happen_and_some_never_open(self, sim_planted):
        s, ok = sim_planted, sim_planted.traded
        assert 0.0005 < (s.close == s.up)[ok].mean() < 0.02
        assert 0.0005 < (s.close == s.down)[ok].mean() < 0.02
        assert ((s.high == s.low) & (s.close == s.up) & ok).any()

    def test_amount_leaves_a_lot_at_each_of_open_high_low_close(self, sim_planted):
        s, ok = sim_planted, sim_planted.traded
        four = s.open + s.high + s.low + s.close
        assert (s.amount >= four + (s.lots - 4) * s.low)[ok].all()
        assert (s.amount <= four + (s.lots - 4) * s.high)[ok].all()

    def test_adjusted_close_is_continuous_through_ex_days(self, sim_planted):
        s = sim_planted
        ex = np.zeros_like(s.traded)
        ex[1:] = s.traded[1:] & s.traded[:-1] & (s.factor[1:] != s.factor[:-1])
        assert ex.sum() > 100
        days, stocks = np.nonzero(ex)
        # the factor step is previous close / reference, to the unit
        step = s.factor[days, stocks] / s.factor[days - 1, stocks]
        expected = s.close[days - 1, stocks] / s.ref[days, stocks]
        np.testing.assert_allclose(step, expected, rtol=1e-12)
        adjusted = adjusted_close(s)
        change = adjusted[days, stocks] / adjusted[days - 1, stocks] - 1
        np.testing.assert_allclose(change, s.change[days, stocks], atol=1e-12)

    def test_market_cap_does_not_jump_on_a_split(self, sim_planted):
        s = sim_planted
        ratio = s.factor[1:] / s.factor[:-1]
        days, stocks = np.nonzero((ratio > 1.15) & s.traded[1:] & s.traded[:-1])
        assert len(days) > 20
        cap = s.close * s.total_shares
        move = cap[days + 1, stocks] / cap[days, stocks] - 1
        np.testing.assert_allclose(move, s.change[days + 1, stocks], atol=0.12)

    def test_ipos_delistings_and_suspensions_happen(self, sim_planted):
        s, u = sim_planted, sim_planted.universe
        assert (u.listed > 0).sum() >= 20 and (u.delisted < len(u.days)).sum() >= 4
        slots = np.arange(len(u.days))[:, None]
        listed = (slots >= u.listed) & (slots < u.delisted)
        halted = listed & ~s.traded
        assert 0.001 < halted.sum() / listed.sum() < 0.05
        runs = [longest_run(halted[:, j]) for j in range(halted.shape[1])]
        assert max(runs) >= 40

    def test_industries_change_for_a_few(self, sim_planted):
        code = sim_planted.universe.industry
        changed = (code[0] != code[-1]).sum()
        assert 1 <= changed <= 10


def longest_run(flags):
    best = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        best = max(best, run)
    return best


class TestOracle:
    def test_day_oracle_has_the_stated_strength(self, sim_planted):
        label = forward_return(sim_planted)
        for alpha in ALPHAS:
            ic = daily_rank_ic(sim_planted.oracle[alpha.name], label)
            mean, error = mean_and_error(ic)
            assert abs(mean - 0.14) < max(0.025, 3 * error), alpha.name
            assert mean > 0.10

    def test_oracle_is_the_mean_of_what_follows(self):
        # without noise, the alpha part of the return from t+1 to t+11, averaged over
        # many stocks of equal state, is the oracle
        alpha = ALPHAS[0]
        s, innovation = alpha_states(0, alpha, 40, 60_000)
        k, phi = alpha.kappa, alpha.phi
        part = np.zeros_like(s)
        part[1:] = k * s[:-1] - k * phi / (1 - phi**2) * innovation[1:]
        got = part[12:22].sum(axis=0)  # t = 10: days t+2 .. t+11
        slope = (got * s[10]).mean() / (s[10] ** 2).mean()
        assert abs(slope / alpha.gain - 1) < 0.05
        # and no past return shows the state
        assert abs(np.corrcoef(part[1:11].sum(axis=0), s[10])[0, 1]) < 0.02

    def test_components_are_independent(self, sim_planted):
        names = [a.name for a in ALPHAS]
        parts = np.stack([sim_planted.oracle[n].ravel() for n in names])
        off = np.corrcoef(parts)[np.triu_indices(3, 1)]
        assert np.abs(off).max() < 0.03

    def test_day_bars_show_the_day_alpha_and_no_other(self, sim_planted):
        score = day_bar_score(sim_planted)
        ok = sim_planted.traded & np.isfinite(score)
        link = {k: np.corrcoef(score[ok], v[ok])[0, 1] for k, v in states(sim_planted)}
        assert link["day"] > 0.65
        assert abs(link["minute"]) < 0.05 and abs(link["tick"]) < 0.05
        mean, _ = mean_and_error(daily_rank_ic(score, forward_return(sim_planted)))
        best, _ = mean_and_error(
            daily_rank_ic(sim_planted.oracle["day"], forward_return(sim_planted))
        )
        assert mean > 0.6 * best

    def test_no_signal_means_zero_oracle_and_no_rank_ic(self, sim_none):
        assert all((v == 0).all() for v in sim_none.oracle.values())
        label = forward_return(sim_none)
        for score in (day_bar_score(sim_none), *(v for _, v in states(sim_none))):
            mean, error = mean_and_error(daily_rank_ic(score, label))
            assert abs(mean) < 3 * error

    def test_both_signals_share_their_noise(self, sim_planted, sim_none):
        a, b = sim_planted, sim_none
        assert (a.universe.industry == b.universe.industry).all()
        ok = a.traded & b.traded & np.isfinite(a.change) & np.isfinite(b.change)
        assert np.corrcoef(a.change[ok], b.change[ok])[0, 1] > 0.9


def states(sim):
    return sim.states.items()


class TestStore:
    def test_identities_between_fields(self, wide_store):
        f = wide_store
        np.testing.assert_allclose(
            (f["vwap"] * f["volume"]).stack(), f["amount"].stack(), rtol=1e-5
        )
        slack = f["high"] * 1e-5
        assert not (f["vwap"] > f["high"] + slack).any(axis=None)
        assert not (f["vwap"] < f["low"] - slack).any(axis=None)
        shares = f["volume"] * f["factor"]
        raw = f["close"] / f["factor"]
        float_shares = f["market_cap"] / raw
        np.testing.assert_allclose(
            (shares / float_shares).stack(), f["turnover"].stack(), rtol=1e-4
        )
        previous = f["close"].ffill().shift()
        change = (f["close"] / previous - 1).stack()
        pd.testing.assert_series_equal(
            change, f["change"].stack(), atol=1e-5, check_names=False
        )
        inside = (f["close"] <= f["limit_up"] * 1.00001) | f["limit_up"].isna()
        assert inside.where(f["close"].notna(), True).all(axis=None)

    def test_index_return_is_weights_times_returns(self, market, wide_store):
        change = wide_store["change"].fillna(0.0)
        for name, (code, _, _) in INDICES.items():
            weight = wide_store[f"weight_{name}"]
            np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-5)
            index = read_bars(market, [code]).set_index("datetime")
            expected = (weight.shift() * change).sum(axis=1)
            members = weight.notna()
            steady = (members == members.shift()).all(axis=1)
            # share unlocks and dividends between two closes: a few basis points
            gap = (index["change"] - expected)[steady].iloc[1:].abs()
            assert gap.median() < 1e-6 and gap.max() < 2e-3
            assert (index["high"] >= index[["open", "close"]].max(axis=1)).all()

    def test_membership_spans_are_where_the_weights_are(self, market, wide_store):
        for name in INDICES:
            weight = wide_store[f"weight_{name}"]
            member = pd.DataFrame(False, index=weight.index, columns=weight.columns)
            spans = read_instruments(market, name)
            for code, start, end in spans.itertuples(index=False):
                member.loc[start:end, code] = True
            assert (member == weight.notna()).all(axis=None)
            assert 0 < (member.iloc[0] != member.iloc[-1]).sum() < member.shape[1]

    def test_large_index_holds_the_large_companies(self, wide_store):
        day = wide_store["close"].index[-60]
        cap = wide_store["market_cap"].loc[day].rank(ascending=False)
        large = wide_store["weight_csi300"].loc[day].notna()
        small = wide_store["weight_csi1000"].loc[day].notna()
        assert cap[large].median() < cap[small].median()

    def test_oracle_lies_beside_the_store_and_not_in_it(self, market):
        oracle = pd.read_parquet(oracle_path(market))
        assert list(oracle) == [
            "datetime",
            "instrument",
            "day",
            "minute",
            "tick",
            "total",
        ]
        assert not oracle.duplicated(["datetime", "instrument"]).any()
        parts = oracle["day"] + oracle["minute"] + oracle["tick"]
        np.testing.assert_allclose(parts, oracle["total"])
        inside = [p.name for p in Path(market).rglob("*") if "oracle" in p.name]
        assert inside == []

    def test_store_says_what_it_is(self, market, market_none):
        meta = read_meta(market)
        assert meta["simulated"] is True
        assert meta["market"]["signal"] == "planted"
        assert read_meta(market_none)["market"]["signal"] == "none"
        names = json.loads((Path(market) / "tables" / "industry.json").read_text())
        assert len(set(names.values())) == len(names)

    def test_calendar_ends_with_2020_whatever_its_length(self):
        for years in (1, 3, 8):
            days = trading_days(years)
            assert days[-1] == pd.Timestamp("2020-12-31")
            assert days[0].year == 2020 - years + 1
            assert 240 <= len(days) / years <= 250

    def test_same_seed_same_files_other_seed_other_market(self, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            make_market(tmp_path / name, stocks=20, years=1, seed=seed)
        files = [p for p in (tmp_path / "a").rglob("*") if p.is_file()]
        names = [str(p.relative_to(tmp_path / "a")) for p in files]
        same, differ, missing = filecmp.cmpfiles(
            tmp_path / "a", tmp_path / "b", names, shallow=False
        )
        assert len(same) == len(names) and not differ and not missing
        a, b, c = (pd.read_parquet(tmp_path / f"{n}.oracle.parquet") for n in "abc")
        pd.testing.assert_frame_equal(a, b)
        assert not a["day"].iloc[:50].equals(c["day"].iloc[:50])

    def test_qlib_reads_the_store(self, qlib_market):
        from qlib.data import D

        frame = D.features(
            D.instruments("csi300"),
            ["$close", "$vwap/$close", "$industry"],
            start_time="2020-11-01",
            end_time="2020-12-31",
        )
        assert frame.index.get_level_values("instrument").nunique() >= 20
        assert frame["$vwap/$close"].dropna().between(0.7, 1.4).all()


class TestStatements:
    def test_quarters_are_announced_after_their_end_and_in_order(self, market):
        table = pd.read_parquet(Path(market) / "tables" / "statements.parquet")
        delay = (table["announced"] - table["period_end"]).dt.days
        assert (delay > 0).all()
        # the prospectus of a new listing publishes old quarters late, all on one day
        first = table.groupby("instrument")["announced"].transform("min")
        assert (delay[table["announced"] > first] <= 120).all()
        in_order = table.groupby("instrument")["announced"].apply(
            lambda x: x.is_monotonic_increasing
        )
        assert in_order.all()
        np.testing.assert_allclose(
            table["total_assets"], table["total_liabilities"] + table["equity"], atol=2
        )

    def test_fields_change_only_when_a_statement_is_announced(self, market, wide_store):
        table = pd.read_parquet(Path(market) / "tables" / "statements.parquet")
        field = wide_store["debt_to_assets"]
        for code in field.columns[:30]:
            own = table[table["instrument"] == code].sort_values("period_end")
            seen = field[code].dropna()
            for day, value in seen.iloc[::37].items():
                last = own[own["announced"] <= day].iloc[-1]
                ratio = last["total_liabilities"] / last["total_assets"]
                assert value == pytest.approx(ratio, rel=1e-5)

    def test_later_statements_change_nothing_earlier(self, sim_planted):
        st, days = sim_planted.statements, sim_planted.universe.days
        cut = len(days) // 2
        before = as_announced(st, days)
        changed = {k: v.copy() for k, v in st.items.items()}
        late = st.announced > days[cut].to_datetime64()
        for value in changed.values():
            value[late] = 12345.0
        after = as_announced(type(st)(st.period_end, st.announced, changed), days)
        for name in before:
            np.testing.assert_array_equal(
                before[name][: cut + 1], after[name][: cut + 1]
            )


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "field"),
        [
            ({"years": 0}, "years"),
            ({"years": 31}, "years"),
            ({"years": 2.5}, "years"),
            ({"stocks": 3}, "stocks"),
            ({"stocks": "many"}, "stocks"),
            ({"trades": "240"}, "trades"),
            ({"stocks": True}, "stocks"),
            ({"seed": -1}, "seed"),
            ({"signal": "strong"}, "signal"),
        ],
    )
    def test_argument_out_of_range_is_named(self, tmp_path, kwargs, field):
        with pytest.raises(ValueError, match=f"`{field}`"):
            make_market(tmp_path / "m", **kwargs)
        assert list(tmp_path.iterdir()) == []

    def test_existing_store_needs_overwrite(self, tmp_path):
        out = make_market(tmp_path / "m", stocks=20, years=1)
        with pytest.raises(ValueError, match="--overwrite"):
            make_market(out, stocks=20, years=1)
        make_market(out, stocks=21, years=1, overwrite=True)
        assert read_meta(out)["instruments"] == 21

    def test_foreign_directory_or_file_is_left_alone(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
        with pytest.raises(ValueError, match="no Qlib store"):
            make_market(tmp_path / "mine", stocks=20, years=1, overwrite=True)
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match="is a file"):
            make_market(tmp_path / "file", stocks=20, years=1)

    def test_command_writes_a_market_and_says_what_next(self, tmp_path):
        out = str(tmp_path / "m")
        args = ["market", "make", "--out", out, "--stocks", "20", "--years", "1"]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        assert "20 stocks" in result.output and "Next:" in result.output
        again = CliRunner().invoke(main, args)
        assert again.exit_code != 0 and "--overwrite" in again.output

    def test_command_says_that_the_store_is_busy(self, tmp_path):
        args = ["market", "make", "--out", str(tmp_path / "m"), "--stocks", "20"]
        with store_lock(tmp_path / "m"):
            result = CliRunner().invoke(main, [*args, "--years", "1"])
        assert result.exit_code == 1 and "another process" in result.output
        assert isinstance(result.exception, SystemExit)

    def test_command_reports_bad_input_without_traceback(self, tmp_path):
        args = ["market", "make", "--out", str(tmp_path / "m")]
        for extra in (["--years", "0"], ["--signal", "big"], ["--stocks", "1"]):
            result = CliRunner().invoke(main, args + extra)
            assert result.exit_code != 0
            assert "Traceback" not in result.output and extra[0][2:] in result.output
