"""Fund attributes: exact factorisation, alignment, nothing before an announcement."""

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import orthogonal_procrustes

from data_handlers.holdings import (
    factorise,
    fits_of,
    fund_attributes,
    read_holdings,
    similarity,
)

DATES = pd.bdate_range("2018-01-02", "2020-12-31")


def planted(seed=0, funds=80, stocks=60, rank=3, noise=0.05):
    """Weights that follow tastes and traits, and the traits."""
    rng = np.random.default_rng(seed)
    traits = rng.normal(size=(stocks, rank))
    tastes = rng.normal(size=(funds, rank))
    w = 1.0 + tastes @ traits.T + noise * rng.normal(size=(funds, stocks))
    return w, traits


def reports(weights, period, announced):
    """A table of holdings with a row for each cell of weights."""
    m, n = weights.shape
    return pd.DataFrame(
        {
            "fund": np.repeat([f"F{i:03d}" for i in range(m)], n),
            "period_end": pd.Timestamp(period),
            "announced": pd.Timestamp(announced),
            "instrument": np.tile([f"SH{600000 + i}" for i in range(n)], m),
            "weight": weights.ravel(),
        }
    )


def explained(found, traits):
    """Share of the traits' variance that a linear map of what was found explains."""
    traits = traits - traits.mean(axis=0)
    x = np.column_stack([np.ones(len(found)), found])
    rest = traits - x @ np.linalg.lstsq(x, traits, rcond=None)[0]
    return 1 - rest.var() / traits.var()


class TestFactorise:
    def test_recovers_planted_attributes_up_to_rotation(self):
        w, traits = planted()
        found = factorise(w, rank=3, penalty=0.0)
        assert explained(found.stocks, traits) > 0.99
        assert explained(factorise(w, rank=2, penalty=0.0).stocks, traits) < 0.9

    def test_without_penalty_full_rank_is_the_matrix_itself(self):
        w, _ = planted(funds=12, stocks=9, noise=1.0)
        f = factorise(w, rank=8, penalty=0.0)
        bias = f.mean + f.fund_bias[:, None] + f.stock_bias
        np.testing.assert_allclose(bias + f.funds @ f.stocks.T, w, atol=1e-10)

    def test_is_the_minimum(self):
        # Certificate of the convex form: the error less its biases is penalty x U V'
        # within the factors, and no larger outside.
        w, _ = planted(funds=15, stocks=10, noise=0.5)
        centred = w - w.mean(0) - w.mean(1, keepdims=True) + w.mean()
        cut = 0.1 * np.linalg.svd(centred, compute_uv=False)[0]
        f = factorise(w, 9, 0.1)
        used = np.linalg.norm(f.stocks, axis=0) > 0
        u, v = (x[:, used] / np.linalg.norm(x[:, used], axis=0)
                for x in (f.funds, f.stocks))  # fmt: skip
        error = centred - f.funds @ f.stocks.T
        np.testing.assert_allclose(u.T @ error @ v, cut * np.eye(used.sum()), atol=1e-9)
        outside = error - cut * u @ v.T
        assert np.linalg.svd(outside, compute_uv=False)[0] <= cut
        np.testing.assert_allclose(outside @ v, 0, atol=1e-9)
        np.testing.assert_allclose(u.T @ outside, 0, atol=1e-9)

    def test_columns_beyond_the_matrix_are_zero(self):
        found = factorise(planted(funds=5, stocks=4)[0], rank=6, penalty=0.0)
        assert found.stocks.shape == (4, 6) and not found.stocks[:, 3:].any()


class TestFits:
    def test_begin_on_the_day_of_the_announcement(self):
        w, _ = planted()
        table = pd.concat(
            [
                reports(w, "2018-06-30", "2018-08-29"),
                reports(w, "2018-09-30", "2018-10-26"),  # no half-year: no refit
                reports(w, "2018-12-31", "2019-03-30"),  # a Saturday
            ]
        )
        fits = fits_of(table, DATES, rank=3)
        days = [f"{f.day:%Y-%m-%d}" for f in fits]
        assert days == ["2018-08-29", "2019-04-01"]

    def test_are_turned_towards_the_one_before(self):
        w, _ = planted()
        rng = np.random.default_rng(1)
        table = pd.concat(
            [
                reports(w, "2018-06-30", "2018-08-29"),
                reports(
                    w + 0.05 * rng.normal(size=w.shape), "2018-12-31", "2019-03-29"
                ),
            ]
        )
        one, two = fits_of(table, DATES, rank=3, penalty=0.0)
        alone = fits_of(table[table["announced"] > one.day], DATES, rank=3, penalty=0.0)
        raw = alone[0].attributes.to_numpy()
        turn, _ = orthogonal_procrustes(raw, one.attributes.to_numpy())
        np.testing.assert_allclose(two.attributes, raw @ turn, atol=1e-9)
        close = np.abs(two.attributes - one.attributes).to_numpy().mean()
        assert close < 0.1 * np.abs(one.attributes).to_numpy().mean()

    def test_use_each_funds_latest_report(self):
        w, _ = planted()
        late = reports(w[:40], "2018-12-31", "2019-03-29")
        table = pd.concat([reports(w, "2018-06-30", "2018-08-29"), late])
        fits = fits_of(table, DATES, rank=3)
        assert [f.funds for f in fits] == [80, 80]

    def test_do_not_know_later_reports(self):
        w, _ = planted()
        early = reports(w, "2018-06-30", "2018-08-29")
        later = reports(w[::-1] * 2, "2018-12-31", "2019-03-29")
        (alone,) = fits_of(early, DATES, rank=3)
        first, _ = fits_of(pd.concat([later, early]), DATES, rank=3)
        pd.testing.assert_frame_equal(first.attributes, alone.attributes)


class TestSimilarity:
    def test_is_the_dot_product_with_the_mean_of_the_best(self):
        rng = np.random.default_rng(0)
        q = rng.normal(size=(40, 2))
        q[7] = np.nan
        returns = rng.normal(size=(6, 40))
        returns[:, 7] = 9.0  # the best of all, but of unknown attributes
        returns[4, 3] = np.nan
        got = similarity(q, returns, window=3)
        assert got.shape == (4, 40)
        want = np.zeros(2)
        for day in (2, 3, 4):
            row = np.where(
                np.isnan(q[:, 0]) | np.isnan(returns[day]), -99, returns[day]
            )
            want += q[np.argsort(-row)[:10]].mean(0) / 3
        np.testing.assert_allclose(got[2], q @ want)

    def test_does_not_change_with_a_rotation(self):
        rng = np.random.default_rng(0)
        q, returns = rng.normal(size=(40, 3)), rng.normal(size=(25, 40))
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        np.testing.assert_allclose(
            similarity(q, returns), similarity(q @ turn, returns), atol=1e-12
        )

    def test_uses_no_later_return(self):
        rng = np.random.default_rng(0)
        q, returns = rng.normal(size=(40, 3)), rng.normal(size=(30, 40))
        moved = returns.copy()
        moved[25:] = rng.normal(size=(5, 40))
        before, after = similarity(q, returns), similarity(q, moved)
        np.testing.assert_array_equal(before[:6], after[:6])
        assert not np.allclose(before[6], after[6])


@pytest.fixture
def holdings_file(qlib_market, tmp_path):
    """Function that writes holdings of the market's stocks; gives the file's path."""
    from qlib.data import D

    codes = sorted(D.list_instruments(D.instruments("all"), as_list=True))[:30]
    w = np.abs(planted(stocks=len(codes), rank=3)[0]) * 0.006

    def write(periods, name="holdings.parquet", **more):
        table = pd.concat([reports(w * k, p, a) for k, (p, a) in enumerate(periods, 1)])
        table["instrument"] = np.tile(codes, len(table) // len(codes))
        table.assign(**more).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    return write


FIRST = ("2018-06-30", "2018-08-29")
SECOND = ("2019-06-30", "2019-08-29")


def load(path, start="2018-08-20", end="2019-10-15", **kwargs):
    from data_handlers.loaders import ParquetDataLoader

    source = {"panel": "data_handlers.holdings.fund_attributes",
              "kwargs": {"path": path, "rank": 3, **kwargs}}  # fmt: skip
    codes = pd.read_parquet(path, columns=["instrument"])["instrument"].unique()
    loader = ParquetDataLoader({"attribute": source})
    return loader.load(list(codes), start, end)["attribute"]


class TestSource:
    def test_attributes_begin_with_the_first_fit_and_end_400_days_later(
        self, holdings_file
    ):
        frame = load(holdings_file([FIRST]))
        assert list(frame) == [*(f"attribute_0{k}" for k in range(3)), "similarity"]
        known = frame["similarity"].dropna().index.unique("datetime")
        assert known[0] == pd.Timestamp("2018-08-29")
        assert known[-1] < pd.Timestamp("2018-08-29") + pd.Timedelta(days=400)

    def test_the_future_does_not_move_the_past(self, holdings_file):
        both = load(holdings_file([FIRST, SECOND]))
        one = load(holdings_file([FIRST], "one.parquet"))
        day = pd.Timestamp("2019-08-28")
        pd.testing.assert_frame_equal(both.loc[:day], one.loc[:day])
        assert not both.loc["2019-08-29"].equals(one.loc["2019-08-29"])

    def test_a_day_does_not_depend_on_the_range_asked_for(self, holdings_file):
        path = holdings_file([FIRST, SECOND])
        whole, part = load(path), load(path, "2019-09-02", "2019-09-30")
        pd.testing.assert_frame_equal(part, whole.loc["2019-09-02":"2019-09-30"])

    @pytest.mark.parametrize(
        "more, message",
        [
            ({"announced": pd.Timestamp("2018-06-30")}, "report date is no announc"),
            ({"announced": None}, "no date in `announced`"),
        ],
    )
    def test_holdings_without_their_day_are_refused(self, holdings_file, more, message):
        with pytest.raises(ValueError, match=message):
            load(holdings_file([FIRST], **more))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t: t.iloc[:0], "has no row"),
            (lambda t: t.assign(instrument=600000), "that are no text"),
            (lambda t: pd.concat([t, t]), r"row\(s\) of a fund, report and stock"),
            (lambda t: t.assign(weight=t["weight"] * 100), "2 of 2 .* in percent"),
            (lambda t: t.assign(weight=t["weight"] / 100), "fractions taken for"),
            (lambda t: t.assign(weight=0.0), "no number above 0"),
        ],
    )
    def test_rows_that_cannot_be_right_are_told(self, tmp_path, change, match):
        day = pd.Timestamp("2019-03-31")
        rows = {"fund": ["A", "A", "B"], "period_end": day}
        rows |= {"announced": day + pd.Timedelta("22D"), "weight": [0.05, 0.04, 0.06]}
        table = pd.DataFrame(
            rows | {"instrument": ["SH600000", "SZ000001", "SH600000"]}
        )
        path = tmp_path / "holdings.parquet"
        table.to_parquet(path)
        assert len(read_holdings(str(path))) == 3
        change(table).to_parquet(path)
        with pytest.raises(ValueError, match=match):
            read_holdings(str(path))

    def test_names_what_is_missing(self, holdings_file, tmp_path):
        with pytest.raises(ValueError, match="ingest a source of kind holdings"):
            read_holdings(str(tmp_path / "none.parquet"))
        path = holdings_file([FIRST])
        pd.read_parquet(path).drop(columns="announced").to_parquet(path)
        with pytest.raises(ValueError, match="no column 'announced'"):
            load(path)
        with pytest.raises(ValueError, match="`min_funds` 999"):
            load(holdings_file([FIRST]), min_funds=999)
        with pytest.raises(ValueError, match="`rank` must"):
            fund_attributes(DATES, {}, rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["planted", "none"])
def test_similarity_ranks_where_attributes_earn_and_only_there(
    signal, tmp_path, use_store
):
    from data_handlers.loaders import ParquetDataLoader
    from qlib_ext.market import make_market

    store = make_market(
        tmp_path / "m", stocks=100, years=3, seed=7, trades=120, signal=signal,
        funds=100, attribute_alpha=0.03,
    )  # fmt: skip
    use_store(store)
    source = {"panel": "data_handlers.holdings.fund_attributes", "kwargs": {"rank": 4}}
    label = {"expressions": ["Ref($close, -11) / Ref($close, -1) - 1"], "names": ["y"]}
    loader = ParquetDataLoader({"attribute": source, "label": label})
    frame = loader.load("all", "2018-07-16", "2020-12-15")
    both = frame.droplevel(0, axis=1)[["similarity", "y"]].dropna()
    daily = both.groupby("datetime").corr("spearman")["y"].xs("similarity", level=1)
    error = daily.std() / (len(daily) / 10) ** 0.5  # labels of ten days overlap
    if signal == "planted":
        assert daily.mean() > 5 * error
    else:
        assert abs(daily.mean()) < 3 * error
