"""Style exposures and factor returns against pandas, lstsq and changed futures."""

import pickle

import numpy as np
import pandas as pd
import pytest
import qlib
from qlib.data import D

from data_handlers import risk
from data_handlers.cross_section import cap_standardize, clip_days
from data_handlers.processors import AddRisk, CSNeutralize
from data_handlers.risk import (
    DESCRIPTORS,
    STYLES,
    CSStyleExposure,
    factor_return_frame,
    factor_returns,
    load_beta,
    risk_config,
    rolling_beta,
    store_fields,
    style_coverage,
)

FIELDS = {
    "close",
    "industry",
    "market_cap",
    "turnover",
    "pb",
    "pe_ttm",
    "pcf_ttm",
    "earnings_growth",
    "revenue_growth",
    "book_leverage",
    "debt_to_assets",
}


# ------------------------------------------------------------------ a small store
def write_tiny_store(root, fields, calendar):
    """Write Qlib bins: {instrument: {field: values over the calendar}}."""
    for folder in ("calendars", "instruments"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    days = [d.strftime("%Y-%m-%d") for d in calendar]
    (root / "calendars/day.txt").write_text("\n".join(days) + "\n")
    stocks = [name for name in fields if name != "SH000300"]
    (root / "instruments/all.txt").write_text(
        "".join(f"{s}\t{days[0]}\t{days[-1]}\n" for s in stocks)
    )
    for name, columns in fields.items():
        folder = root / "features" / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        for field, values in columns.items():
            np.hstack([[0], values]).astype("<f").tofile(folder / f"{field}.day.bin")


def tiny_fields(
    days=320, stocks=12, seed=0, index=True, index_from=0, index_later=None
):
    rng = np.random.default_rng(seed)
    market = rng.normal(0, 0.01, days)
    names = [f"SH{600000 + i}" for i in range(stocks)]
    out = {}
    for i, name in enumerate(names):
        r = (0.5 + i / stocks) * market + rng.normal(0, 0.02, days)
        close = 10 * np.cumprod(1 + r)
        out[name] = {
            "close": close,
            "market_cap": close * 10 ** (8 + 2 * rng.random()),
            "industry": np.full(days, float(i % 3)),
            "turnover": rng.lognormal(-4, 0.5, days),
            "pb": np.full(days, 1.0 + i),
            "pe_ttm": np.full(days, 10.0 + i),
        }
        out[name]["close"][50 + i] = np.nan  # a suspended day
    out[names[-1]]["close"][:200] = np.nan  # a new listing
    if index:
        close = 3000 * np.cumprod(1 + market)
        close[:index_from] = np.nan
        if index_later:
            first, factor = index_later
            close[first:] *= factor * rng.uniform(0.9, 1.1, days - first)
        out["SH000300"] = {"close": close}
    return out, pd.bdate_range("2019-01-01", periods=days)


@pytest.fixture
def tiny_store(tmp_path):
    """Initialise Qlib on a small store; returns a function that builds one."""

    def build(name="store", **kwargs):
        fields, calendar = tiny_fields(**kwargs)
        write_tiny_store(tmp_path / name, fields, calendar)
        qlib.init(
            provider_uri=str(tmp_path / name),
            kernels=1,
            logging_level=40,
            expression_cache=None,
            dataset_cache=None,
            skip_if_reg=False,
        )
        return fields, calendar

    yield build
    D_cache = qlib.data.cache.H
    D_cache.clear()


def load_risk(styles="auto", days=None):
    expressions, names = risk_config(styles)
    df = D.features(D.instruments("all"), expressions, freq="day")
    df.columns = pd.MultiIndex.from_product([["risk"], names])
    df = df.swaplevel().sort_index()
    return df if days is None else df.loc[days]


# --------------------------------------------------------------------- expressions
class TestRiskConfig:
    def test_risk_config_lists_what_the_fields_allow(self):
        expressions, names = risk_config(fields=FIELDS)
        assert names[:3] == ["industry", "log_mcap", "daily_return"]
        assert len(expressions) == len(names) == len(set(names))
        assert "liquidity_year" in names and "growth_revenue" in names
        assert not {"profitability_forecast", "growth_long"} & set(names)
        assert "1 + ($book_leverage - 1) / $pb" in expressions

    def test_risk_config_without_styles_is_industry_and_size(self):
        assert risk_config((), FIELDS)[1] == ["industry", "log_mcap"]
        assert risk_config((), {"close"}) == ([], [])
        assert risk_config(["momentum"], {"close", "industry"})[1] == [
            "industry",
            "momentum_mean",
        ]

    def test_risk_config_takes_amount_over_cap_where_turnover_is_missing(self):
        fields = {"amount", "market_cap"}
        found = dict(zip(*reversed(risk_config(["liquidity"], fields)), strict=True))
        assert "Traded($amount) / $market_cap" in found["liquidity_month"]

    def test_risk_config_rejects_what_it_cannot_give(self):
        with pytest.raises(ValueError, match=r"'quality' is not a style"):
            risk_config(["quality"], FIELDS)
        with pytest.raises(ValueError, match=r"'valuation'.*\$pb"):
            risk_config(["valuation"], {"close"})
        with pytest.raises(ValueError, match=r"'size'.*\$market_cap"):
            risk_config(["size"], {"close"})

    def test_risk_config_weights_are_those_of_the_specification(self):
        weights: dict = {}
        for d in DESCRIPTORS:
            weights.setdefault(d.style, []).append(d.weight)
        assert weights == {
            "momentum": [1.0],
            "volatility": [0.74, 0.16],
            "valuation": [1.0],
            "liquidity": [0.35, 0.35, 0.30],
            "profitability": [0.68, 0.21, 0.11],
            "growth": [0.18, 0.11, 0.24, 0.47],
            "leverage": [0.38, 0.35, 0.27],
        }
        assert risk.RESIDUAL_WEIGHT == 0.10

    def test_store_fields_lists_the_bins(self, tiny_store):
        tiny_store()
        assert store_fields() == {
            "close",
            "market_cap",
            "industry",
            "turnover",
            "pb",
            "pe_ttm",
        }

    def test_raw_descriptors_equal_pandas(self, tiny_store):
        fields, calendar = tiny_store()
        df = load_risk()["risk"]
        for name in ("SH600003", "SH600011"):
            got = df.xs(name, level="instrument").reindex(calendar)
            close = pd.Series(fields[name]["close"].astype("f4"), calendar)
            r = close / close.ffill().shift(1) - 1
            roll = r.rolling(252, min_periods=126)
            enough = r.rolling(252, min_periods=1).count() >= 126
            want = {
                "momentum_mean": roll.mean(),
                "volatility_std": roll.std(),
                "volatility_range": np.log(
                    close.rolling(252, min_periods=1).max()
                    / close.rolling(252, min_periods=1).min()
                ).where(enough),
                "liquidity_month": np.log(
                    pd.Series(fields[name]["turnover"], calendar)
                    .rolling(21, min_periods=10)
                    .mean()
                ),
                "valuation_bp": pd.Series(1 / fields[name]["pb"], calendar),
                "log_mcap": pd.Series(np.log(fields[name]["market_cap"]), calendar),
            }
            for column, series in want.items():
                np.testing.assert_allclose(
                    got[column], series, rtol=1e-4, atol=1e-6, err_msg=column
                )
        assert df["momentum_mean"].xs("SH600011", level=1).notna().sum() < 10


# ------------------------------------------------------------------------- beta
class TestRollingBeta:
    def test_rolling_beta_equals_a_regression_per_window(self):
        rng = np.random.default_rng(0)
        market = rng.normal(0, 0.01, 80)
        r = rng.normal(size=(80, 4)) * 0.02 + market[:, None]
        r[rng.random(r.shape) < 0.2] = np.nan
        market[7] = np.nan
        beta, spread = rolling_beta(r, market, window=30, min_count=12)
        for t in (10, 25, 60, 79):
            for i in range(4):
                rows = slice(max(0, t - 29), t + 1)
                use = np.isfinite(r[rows, i]) & np.isfinite(market[rows])
                if use.sum() < 12:
                    assert np.isnan(beta[t, i])
                    continue
                x, y = market[rows][use], r[rows, i][use]
                slope, level = np.polyfit(x, y, 1)
                assert beta[t, i] == pytest.approx(slope, rel=1e-8)
                left = y - level - slope * x
                assert spread[t, i] == pytest.approx(left.std(ddof=1), rel=1e-8)

    def test_rolling_beta_by_hand(self):
        m = np.array([0.01, -0.01, 0.02, -0.02])
        beta, spread = rolling_beta(np.stack([2 * m, 0 * m], 1), m, 4, 3)
        np.testing.assert_allclose(beta[3], [2, 0], atol=1e-12)
        np.testing.assert_allclose(spread[3], [0, 0], atol=1e-9)

    def test_rolling_beta_is_nan_without_market_moves(self):
        beta, _ = rolling_beta(
            np.random.default_rng(0).normal(size=(9, 2)), np.ones(9), 5
        )
        assert np.isnan(beta).all()
        with pytest.raises(ValueError, match="`window`"):
            rolling_beta(np.zeros((4, 2)), np.zeros(4), 2)
        with pytest.raises(ValueError, match="`market`"):
            rolling_beta(np.zeros((4, 2)), np.zeros(5))

    @pytest.mark.parametrize("market", ["auto", "equal"])
    def test_beta_of_the_processor_equals_pandas(self, tiny_store, market):
        fields, calendar = tiny_store()
        close = pd.DataFrame({n: f["close"] for n, f in fields.items()}, index=calendar)
        r = close / close.ffill().shift(1) - 1
        stocks = r.drop(columns="SH000300")
        level = r["SH000300"] if market == "auto" else stocks.mean(axis=1)
        want = pd.DataFrame(
            {
                n: stocks[n].rolling(252, min_periods=126).cov(level)
                / level.where(stocks[n].notna()).rolling(252, min_periods=126).var()
                for n in stocks
            }
        ).clip(-9, 9)
        last = load_risk(["beta"], slice(calendar[-3], None))
        got = CSStyleExposure(["beta"], market=market, n_mad=1e6)(last)
        cap = last["risk", "log_mcap"].unstack()
        plain = want.loc[calendar[-3] :]
        exposure = cap_standardize(plain.to_numpy(), np.exp(cap.to_numpy()))
        np.testing.assert_allclose(
            got["risk", "beta"].unstack().to_numpy(), exposure, atol=1e-3
        )

    def test_beta_of_a_day_does_not_depend_on_the_span(self, tiny_store):
        _, calendar = tiny_store(days=600, index_later=(300, np.nan))
        rows = load_risk(["beta"]).index
        beta = pd.Series(load_beta(rows)[0], rows)
        # The index ends; 95 % of 252 returns less one are known until 13 days later.
        for market, first, last in (("SH000300", 40, 299), ("equal", 314, 599)):
            part = rows[rows.slice_indexer(calendar[first], calendar[last])]
            alone = pd.Series(load_beta(part, market)[0], part)
            assert alone.notna().mean() > 0.5
            pd.testing.assert_series_equal(beta.loc[part], alone, rtol=1e-9)
        for first, last in ((100, 330), (300, 320), (312, 312), (0, 312), (400, 599)):
            part = rows[rows.slice_indexer(calendar[first], calendar[last])]
            got = pd.Series(load_beta(part)[0], part)
            pd.testing.assert_series_equal(got, beta.loc[part], rtol=1e-9)

    def test_an_index_that_begins_later_never_takes_over(self, tiny_store):
        tiny_store(days=600, index_from=150)
        rows = load_risk(["beta"]).index
        np.testing.assert_array_equal(load_beta(rows)[0], load_beta(rows, "equal")[0])

    def test_beta_of_a_day_does_not_depend_on_later_index_closes(self, tiny_store):
        _, calendar = tiny_store(days=600)
        rows = load_risk(["beta"]).index
        beta = pd.Series(load_beta(rows)[0], rows).loc[: calendar[450]]
        for name, change in (("gone", np.nan), ("moved", 2.0)):
            tiny_store(name, days=600, index_later=(451, change))
            got = pd.Series(load_beta(rows)[0], rows)
            pd.testing.assert_series_equal(got.loc[: calendar[450]], beta, rtol=1e-9)

    def test_beta_falls_back_to_the_cross_section(self, tiny_store):
        _, calendar = tiny_store(index=False)
        df = load_risk(["beta"], slice(calendar[-1], None))
        pd.testing.assert_frame_equal(
            CSStyleExposure(["beta"])(df), CSStyleExposure(["beta"], market="equal")(df)
        )
        with pytest.raises(ValueError, match=r"'SH000300'.*'equal'"):
            CSStyleExposure(["beta"], market="SH000300")(df)


# ---------------------------------------------------------------------- exposures
def raw_frame(days=4, stocks=40, seed=0, columns=None):
    rng = np.random.default_rng(seed)
    columns = columns or ["industry", "log_mcap", *[d.name for d in DESCRIPTORS]]
    x = rng.standard_t(3, (days * stocks, len(columns)))
    x[:, columns.index("industry")] = rng.integers(0, 4, days * stocks)
    if "log_mcap" in columns:
        x[:, columns.index("log_mcap")] = rng.normal(23, 1, days * stocks)
    index = pd.MultiIndex.from_product(
        [
            pd.bdate_range("2020-01-01", periods=days),
            [f"S{i:03}" for i in range(stocks)],
        ],
        names=["datetime", "instrument"],
    )
    return pd.DataFrame(
        x.astype(np.float32),
        index=index,
        columns=pd.MultiIndex.from_product([["risk"], columns]),
    )


def one_day_standard(x, cap, n_mad=5):
    """Clip and standardise one day with plain numpy."""
    med = np.nanmedian(x)
    mad = np.nanmedian(np.abs(x - med))
    x = np.clip(x, med - n_mad * mad, med + n_mad * mad)
    ok = np.isfinite(x)
    return (x - np.average(x[ok], weights=cap[ok])) / np.nanstd(x)


class TestCSStyleExposure:
    def test_exposures_have_cap_weighted_mean_0_and_std_1(self):
        df = raw_frame()
        out = CSStyleExposure()(df)
        cap = np.exp(df["risk", "log_mcap"].astype(float))
        for style in set(STYLES) - {"beta"}:
            for _, rows in out["risk", style].groupby("datetime"):
                assert np.average(rows, weights=cap[rows.index]) == pytest.approx(
                    0, abs=1e-5
                )
                assert rows.std(ddof=0) == pytest.approx(1, abs=1e-5)
        assert list(out["risk"].columns) == [
            "industry",
            "log_mcap",
            *[s for s in STYLES if s != "beta"],
        ]

    def test_combined_style_equals_one_day_numpy(self):
        df = raw_frame()
        df.iloc[3, df.columns.get_loc(("risk", "liquidity_year"))] = np.nan
        out = CSStyleExposure()(df)
        for _, day in df["risk"].groupby("datetime"):
            day = day.astype(float)
            cap = np.exp(day["log_mcap"].to_numpy())
            top = bottom = 0
            for d in DESCRIPTORS:
                if d.style == "liquidity":
                    z = one_day_standard(day[d.name].to_numpy(), cap)
                    top = top + d.weight * np.nan_to_num(z)
                    bottom = bottom + d.weight * np.isfinite(z)
            np.testing.assert_allclose(
                out.loc[day.index, ("risk", "liquidity")],
                one_day_standard(top / bottom, cap),
                atol=1e-5,
            )

    def test_missing_descriptor_rescales_the_others_and_missing_style_is_absent(self):
        df = raw_frame(columns=["industry", "log_mcap", "growth_earnings"])
        out = CSStyleExposure()(df)
        assert list(out["risk"].columns) == [
            "industry",
            "log_mcap",
            "size",
            "nonlinear_size",
            "growth",
        ]
        cap = np.exp(df["risk", "log_mcap"].iloc[:40].to_numpy(float))
        want = one_day_standard(
            df["risk", "growth_earnings"].iloc[:40].to_numpy(float), cap
        )
        np.testing.assert_allclose(out["risk", "growth"].iloc[:40], want, atol=1e-5)

    def test_nonlinear_size_is_the_cube_orthogonal_to_size(self):
        df = raw_frame()
        free = CSStyleExposure(n_mad=1e6)(df)["risk"].astype(float)
        out = CSStyleExposure()(df)["risk"].astype(float)
        for day, part in out.groupby("datetime"):
            cube = free.loc[day, "size"] ** 3
            x = np.column_stack([np.ones(40), free.loc[day, "size"]])
            rest = cube - x @ np.linalg.lstsq(x, cube, rcond=None)[0]
            assert rest.corr(free.loc[day, "nonlinear_size"]) == pytest.approx(1)
            # Clipped afterwards, it is still that factor.
            assert rest.corr(part.loc[day, "nonlinear_size"]) > 0.8

    def test_unknown_values_stay_nan_and_never_become_zero(self):
        df = raw_frame()
        df.iloc[5, 1] = np.nan  # no market cap
        growth = [c for c in df.columns if c[1].startswith("growth")]
        df.loc[df.index[7], growth] = np.nan
        out = CSStyleExposure()(df)["risk"]
        assert out["size"].isna().tolist().index(True) == 5
        assert np.isfinite(out["momentum"].iloc[5])
        assert np.isnan(out["growth"].iloc[7])
        assert out.isna().to_numpy().sum() == 4  # log_mcap, size, its cube, growth

    def test_exposures_without_market_cap_are_centred_equally(self):
        df = raw_frame(columns=["industry", "valuation_bp"])
        out = CSStyleExposure()(df)["risk"]
        assert list(out) == ["industry", "valuation"]
        assert out["valuation"].groupby("datetime").mean().abs().max() < 1e-6

    def test_exposures_of_one_stock_and_of_an_empty_day_are_defined(self):
        df = raw_frame(days=3)
        df.iloc[40:80] = np.nan
        df = df.drop(df.index[81:120])
        out = CSStyleExposure()(df)["risk"]
        assert out.iloc[40:80].isna().all().all()
        assert (out.iloc[80].drop(["industry", "log_mcap"]) == 0).all()
        assert len(CSStyleExposure()(df.iloc[:0])) == 0

    def test_exposures_use_only_their_own_day(self):
        df = raw_frame()
        changed = df.copy()
        changed.iloc[80:] = changed.iloc[80:] * -2 + 5
        pd.testing.assert_frame_equal(
            CSStyleExposure()(df).iloc[:80], CSStyleExposure()(changed).iloc[:80]
        )

    def test_exposures_do_not_depend_on_row_order(self):
        df = raw_frame()
        shuffled = df.sample(frac=1, random_state=0)
        pd.testing.assert_frame_equal(
            CSStyleExposure()(shuffled).sort_index(), CSStyleExposure()(df), atol=1e-6
        )

    def test_whole_chain_does_not_change_when_the_future_changes(self, tiny_store):
        fields, calendar = tiny_store("now")
        cut = calendar[290]
        before = CSStyleExposure()(load_risk(days=slice(calendar[260], cut)))
        rng = np.random.default_rng(5)
        for columns in fields.values():
            for values in columns.values():
                values[291:] *= rng.lognormal(0, 1, len(values) - 291)
        qlib.data.cache.H.clear()
        root = qlib.config.C.dpm.get_data_uri("day")
        write_tiny_store(root, fields, calendar)
        after = CSStyleExposure()(load_risk(days=slice(calendar[260], cut)))
        pd.testing.assert_frame_equal(before, after)
        later = CSStyleExposure()(load_risk(days=slice(calendar[300], None)))
        assert set(later["risk"]) >= {"beta", "momentum", "volatility", "valuation"}

    def test_add_risk_then_exposure_neutralises_a_foreign_frame(self, tiny_store):
        _, calendar = tiny_store()
        df = D.features(D.instruments("all"), ["$close"], calendar[280], calendar[290])
        df.columns = pd.MultiIndex.from_tuples([("label", "y")])
        df = df.swaplevel().sort_index()
        out = CSStyleExposure()(AddRisk()(df))
        assert out.index.equals(df.index)
        res = CSNeutralize(styles=["size"])(out)["label", "y"].dropna().astype(float)
        size = out.loc[res.index, ("risk", "size")].astype(float)
        assert (
            res.groupby("datetime")
            .apply(lambda x: abs(np.dot(x, size[x.index])) / np.abs(x).sum())
            .max()
            < 1e-4
        )

    def test_coverage_by_year(self):
        df = raw_frame(days=2)
        df.iloc[:20, 0] = np.nan
        table = style_coverage(df)
        assert table.loc[2020, "industry"] == 0.75
        assert table.loc[2020, "log_mcap"] == 1

    def test_style_exposure_rejects_bad_input(self):
        with pytest.raises(ValueError, match="'alpha' is not a style"):
            CSStyleExposure(["alpha"])
        for value in (0, "7"):
            with pytest.raises(ValueError, match="`n_mad`"):
                CSStyleExposure(n_mad=value)
        with pytest.raises(ValueError, match="`market`"):
            CSStyleExposure(market=None)
        with pytest.raises(ValueError, match="no input of 'growth'"):
            CSStyleExposure(["growth"])(raw_frame(columns=["industry", "log_mcap"]))

    def test_style_exposure_pickles(self):
        proc = CSStyleExposure(["size"])
        assert vars(pickle.loads(pickle.dumps(proc))) == vars(proc)
        assert proc.is_for_infer() and proc.readonly()


class TestDayHelpers:
    def test_clip_days_by_hand(self):
        x = np.array([[1, 2, 3, 4, 100, np.nan], [0, 0, 0, 0, 9, np.nan]])
        np.testing.assert_allclose(
            clip_days(x, 2), [[1, 2, 3, 4, 5, np.nan], [0, 0, 0, 0, 9, np.nan]]
        )

    def test_cap_standardize_by_hand(self):
        x = np.array([[0.0, 2.0, np.nan]])
        cap = np.array([[3.0, 1.0, 5.0]])
        # std 1 about the plain mean, cap-weighted mean 0.5
        np.testing.assert_allclose(cap_standardize(x, cap), [[-0.5, 1.5, np.nan]])
        np.testing.assert_allclose(cap_standardize(x, None), [[-1, 1, np.nan]])


# ----------------------------------------------------------------- factor returns
def constrained_wls(r, x, industry, cap):
    """One day: country, industries under the cap-weighted constraint, styles."""
    use = np.isfinite(r) & np.isfinite(x).all(1) & np.isfinite(industry)
    use &= np.isfinite(cap)
    r, x, industry, cap = r[use], x[use], industry[use], cap[use]
    codes = np.unique(industry)
    dummies = (industry[:, None] == codes).astype(float)
    size = dummies.T @ cap
    # Substitute the last industry: f_last = -sum_{others} size f / size_last.
    reduce = np.vstack([np.eye(len(codes) - 1), -size[:-1] / size[-1]])
    design = np.column_stack([np.ones(len(r)), dummies @ reduce, x])
    root = np.sqrt(np.sqrt(cap))
    beta = np.linalg.lstsq(design * root[:, None], r * root, rcond=None)[0]
    return beta[0], reduce @ beta[1 : len(codes)], beta[len(codes) :]


def factor_data(t=6, n=80, k=3, seed=0, holes=0.05):
    rng = np.random.default_rng(seed)
    r = rng.normal(0, 0.02, (t, n))
    x = rng.normal(size=(t, n, k))
    industry = rng.integers(0, 5, (t, n)).astype(float)
    cap = rng.lognormal(23, 1, (t, n))
    for a in (r, x, industry, cap):
        a[rng.random(a.shape) < holes] = np.nan
    return r, x, industry, cap


class TestFactorReturns:
    def test_factor_returns_equal_constrained_least_squares_per_day(self):
        r, x, industry, cap = factor_data()
        out = factor_returns(r, x, industry, cap)
        assert np.isnan(out.country[0]) and np.isnan(out.style[0]).all()
        for t in range(1, len(r)):
            country, ind, style = constrained_wls(
                r[t], x[t - 1], industry[t - 1], cap[t - 1]
            )
            assert out.country[t] == pytest.approx(country, abs=1e-10)
            np.testing.assert_allclose(out.industry[t], ind, atol=1e-10)
            np.testing.assert_allclose(out.style[t], style, atol=1e-10)

    def test_factor_returns_recover_planted_factors(self):
        r, x, industry, cap = factor_data(holes=0)
        f = np.array([0.01, -0.02, 0.005])
        g = np.array([0.01, 0.0, -0.01, 0.02, 0.03])
        planted = r * 0
        planted[1:] = 0.004 + x[:-1] @ f + g[industry[:-1].astype(int)]
        out = factor_returns(planted, x, industry, cap)
        np.testing.assert_allclose(out.style[1:], np.tile(f, (5, 1)), atol=1e-12)
        np.testing.assert_allclose(
            out.country[1:, None] + out.industry[1:],
            0.004 + np.tile(g, (5, 1)),
            atol=1e-12,
        )
        np.testing.assert_allclose(out.r2[1:], 1)
        np.testing.assert_allclose(out.specific[1:], 0, atol=1e-12)

    def test_noise_explains_nothing(self):
        # Weights other than the inverse variance would favour the larger stocks.
        r, x, industry, _ = factor_data(t=201, n=60)
        out = factor_returns(r, x, industry)
        error = out.r2[1:].std() / np.sqrt(200)
        assert abs(out.r2[1:].mean()) < 3 * error
        # As many stocks as factors: nothing is left to tell.
        few = [a[:, :8] for a in factor_data(t=2, n=8, holes=0)]
        few[2][:] = [0, 1, 2, 3, 4, 0, 1, 2]
        assert np.isnan(factor_returns(*few).r2).all()

    def test_industry_returns_sum_to_zero_by_cap(self):
        r, x, industry, cap = factor_data(holes=0)
        out = factor_returns(r, x, industry, cap)
        for t in range(1, len(r)):
            size = [cap[t - 1][industry[t - 1] == c].sum() for c in out.codes]
            assert np.dot(size, out.industry[t]) / np.sum(size) == pytest.approx(0)

    def test_factor_returns_know_nothing_later(self):
        data = factor_data()
        changed = [a.copy() for a in data]
        for a in changed:
            a[4:] = a[4:] * 3 + 1
        changed[2][4:] = 2.0
        a, b = factor_returns(*data), factor_returns(*changed)
        np.testing.assert_array_equal(a.style[:4], b.style[:4])
        np.testing.assert_array_equal(a.country[:4], b.country[:4])

    def test_a_style_known_for_few_is_left_out_that_day(self):
        r, x, industry, cap = factor_data(holes=0)
        x[2, 10:, 1] = np.nan
        out = factor_returns(r, x, industry, cap)
        assert np.isnan(out.style[3, 1]) and np.isfinite(out.style[3, [0, 2]]).all()
        _, _, style = constrained_wls(r[3], x[2][:, [0, 2]], industry[2], cap[2])
        np.testing.assert_allclose(out.style[3, [0, 2]], style, atol=1e-10)

    def test_factor_returns_of_empty_days_are_nan(self):
        r, x, industry, cap = factor_data()
        r[3] = np.nan
        out = factor_returns(r, x, industry, cap)
        assert np.isnan(out.country[3]) and np.isnan(out.style[3]).all()

    def test_factor_return_frame_agrees_with_the_arrays(self):
        df = CSStyleExposure()(raw_frame(days=5))
        rng = np.random.default_rng(1)
        returns = pd.Series(rng.normal(0, 0.02, len(df)), df.index)
        table = factor_return_frame(df, returns)
        shape = (5, 40)
        styles = [s for s in STYLES if s != "beta"]
        out = factor_returns(
            returns.to_numpy().reshape(shape),
            df["risk"][styles].to_numpy().reshape(*shape, -1),
            df["risk", "industry"].to_numpy().reshape(shape),
            np.exp(df["risk", "log_mcap"].to_numpy(float)).reshape(shape),
        )
        np.testing.assert_allclose(table[styles], out.style)
        np.testing.assert_allclose(table["country"], out.country)
        assert "industry_0" in table

    def test_factor_returns_reject_bad_shapes(self):
        r, x, industry, cap = factor_data()
        with pytest.raises(ValueError, match="`industry`"):
            factor_returns(r, x, industry[:3], cap)
        with pytest.raises(ValueError, match="`lag`"):
            factor_returns(r, x, industry, cap, lag=-1)
