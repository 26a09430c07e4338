"""Processors against hand-worked numbers, lstsq per day and changed futures."""

import pickle
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from data_handlers.cross_section import day_blocks, neutralize
from data_handlers.processors import (
    AddRisk,
    CSNeutralize,
    CSZScore,
    DropSuspended,
    RobustClipZScore,
)


def lstsq_residual(y, industry, styles, weights=None):
    """One day, by dummies and numpy's least squares."""
    use = np.isfinite(y) & np.isfinite(industry) & np.isfinite(styles).all(1)
    w = np.ones(len(y)) if weights is None else weights
    use &= np.isfinite(w) & (w > 0)
    out = np.full(len(y), np.nan)
    if not use.any():
        return out
    dummies = (industry[use, None] == np.unique(industry[use])).astype(float)
    x = np.column_stack([dummies, styles[use]])
    root = np.sqrt(w[use])
    beta = np.linalg.lstsq(x * root[:, None], y[use] * root, rcond=None)[0]
    out[use] = y[use] - x @ beta
    return out


def random_panel(t=7, n=60, k=3, c=2, seed=0, holes=0.1):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(t, n, c))
    industry = rng.integers(0, 6, (t, n)).astype(float)
    styles = rng.normal(size=(t, n, k)) + rng.normal(size=(t, n, 1))
    weights = rng.lognormal(0, 2, (t, n))
    for a in (y, industry, styles, weights):
        a[rng.random(a.shape) < holes] = np.nan
    return y, industry, styles, weights


def frame_of(values, group="feature", names=None, start="2020-01-01"):
    """Frame from [t, n, f] with NaN rows kept."""
    t, n, f = values.shape
    index = pd.MultiIndex.from_product(
        [pd.bdate_range(start, periods=t), [f"SH{600000 + i}" for i in range(n)]],
        names=["datetime", "instrument"],
    )
    columns = pd.MultiIndex.from_product(
        [[group], names or [f"f{j}" for j in range(f)]]
    )
    return pd.DataFrame(values.reshape(t * n, f), index=index, columns=columns)


def label_and_risk(seed=0, t=7, n=60, dtype=np.float32):
    y, industry, styles, _ = random_panel(t=t, n=n, k=2, c=2, seed=seed)
    mcap = 23 + styles[..., :1]
    risk = np.concatenate([industry[..., None], mcap, styles[..., 1:]], axis=2)
    return pd.concat(
        [
            frame_of(y.astype(dtype), "label", ["a", "b"]),
            frame_of(risk.astype(dtype), "risk", ["industry", "log_mcap", "beta"]),
        ],
        axis=1,
    )


@pytest.fixture
def warnings_of_processors(monkeypatch):
    """Messages that the processors log as warnings."""
    said = []

    class Log:
        warning = said.append

    monkeypatch.setattr("data_handlers.processors.get_module_logger", lambda _: Log)
    return said


class TestNeutralize:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_neutralize_equals_least_squares_per_day(self, weighted):
        y, industry, styles, weights = random_panel()
        w = weights if weighted else None
        got = neutralize(y, industry, styles, w)
        for day in range(len(y)):
            for col in range(y.shape[2]):
                want = lstsq_residual(
                    y[day, :, col],
                    industry[day],
                    styles[day],
                    weights[day] if weighted else None,
                )
                np.testing.assert_allclose(got[day, :, col], want, atol=1e-10)

    def test_neutralize_by_hand(self):
        # Two industries of two: residual is the deviation from the industry's mean;
        # weights 3:1 put the mean of (1, 5) at 2.
        y = np.array([[1.0, 5.0, 10.0, 20.0]])[..., None]
        industry = np.array([[1.0, 1.0, 7.0, 7.0]])
        np.testing.assert_allclose(
            neutralize(y, industry)[0, :, 0], [-2, 2, -5, 5], atol=1e-12
        )
        weights = np.array([[3.0, 1.0, 1.0, 1.0]])
        np.testing.assert_allclose(
            neutralize(y, industry, weights=weights)[0, :, 0],
            [-1, 3, -5, 5],
            atol=1e-12,
        )

    def test_neutralize_residual_is_orthogonal_to_industries_and_styles(self):
        y, industry, styles, _ = random_panel(holes=0)
        res = neutralize(y, industry, styles)[..., 0]
        for day in range(len(res)):
            np.testing.assert_allclose(res[day] @ styles[day], 0, atol=1e-9)
            for code in range(6):
                assert abs(res[day][industry[day] == code].sum()) < 1e-9

    def test_neutralize_drops_collinear_and_constant_regressors(self):
        y, industry, styles, _ = random_panel(holes=0, c=1)
        redundant = np.concatenate(
            [
                styles,
                2 * styles[..., :1] - styles[..., 1:2],  # collinear
                np.full_like(styles[..., :1], 1e6),  # constant
                industry[..., None] * 0.1,  # constant within industries
            ],
            axis=2,
        )
        np.testing.assert_allclose(
            neutralize(y, industry, redundant),
            neutralize(y, industry, styles),
            atol=1e-9,
        )

    def test_neutralize_unknown_equals_least_squares_with_indicators(self):
        y, industry, styles, _ = random_panel(c=1)
        got = neutralize(y, industry, styles, missing="unknown")
        for day in range(len(y)):
            known = np.isfinite(styles[day])
            x = np.column_stack([np.where(known, styles[day], 0.0), ~known])
            code = np.where(np.isfinite(industry[day]), industry[day], 99.0)
            want = lstsq_residual(y[day, :, 0], code, x)
            np.testing.assert_allclose(got[day, :, 0], want, atol=1e-9)

    @pytest.mark.parametrize("missing", ["drop", "unknown"])
    def test_neutralize_missing_is_never_a_silent_zero(self, missing):
        y, industry, styles, weights = random_panel(holes=0.2, c=1)
        res = neutralize(y, industry, styles, weights, missing)
        assert np.isnan(res[np.isnan(y)]).all()
        lost = (
            np.isnan(industry) | np.isnan(weights) | np.isnan(styles).any(2)
        ) & np.isfinite(y[..., 0])
        assert lost.any()
        if missing == "drop":
            assert np.isnan(res[lost]).all()
        else:
            assert np.isfinite(res[lost]).all()
            assert (res[lost] != 0).mean() > 0.9

    def test_neutralize_more_regressors_than_stocks_gives_exact_zero(self):
        rng = np.random.default_rng(1)
        y = rng.normal(size=(3, 4, 1)).astype(np.float32)
        styles = rng.normal(size=(3, 4, 5))
        np.testing.assert_array_equal(neutralize(y, None, styles), np.zeros_like(y))

    def test_neutralize_one_stock_and_empty_days(self):
        y = np.full((3, 2, 1), np.nan)
        y[0, 0] = 0.3
        y[1] = [[0.1], [0.4]]
        res = neutralize(y, np.zeros((3, 2)))
        np.testing.assert_allclose(res[0, :, 0], [0, np.nan])
        np.testing.assert_allclose(res[1, :, 0], [-0.15, 0.15])
        assert np.isnan(res[2]).all()
        assert neutralize(np.empty((0, 5, 1))).shape == (0, 5, 1)
        assert neutralize(np.empty((3, 0, 1)), np.empty((3, 0))).shape == (3, 0, 1)

    def test_neutralize_does_not_depend_on_stock_order_or_weight_scale(self):
        y, industry, styles, weights = random_panel()
        order = np.random.default_rng(2).permutation(y.shape[1])
        scale = np.array([1e-8, 1, 1e8, 1, 1, 1, 1])[:, None]
        np.testing.assert_allclose(
            neutralize(y, industry, styles, weights)[:, order],
            neutralize(
                y[:, order],
                industry[:, order],
                styles[:, order],
                (weights * scale)[:, order],
            ),
            atol=1e-9,
        )

    def test_neutralize_blocks_of_days_do_not_matter(self, monkeypatch):
        y, industry, styles, weights = random_panel()
        whole = neutralize(y, industry, styles, weights)
        monkeypatch.setattr("data_handlers.cross_section.BLOCK_BYTES", 1)
        np.testing.assert_allclose(
            neutralize(y, industry, styles, weights), whole, atol=1e-12
        )

    def test_neutralize_rejects_bad_input(self):
        y = np.zeros((2, 3, 1))
        with pytest.raises(ValueError, match=r"`missing`.*'zero'"):
            neutralize(y, missing="zero")
        with pytest.raises(ValueError, match=r"`industry`.*shape"):
            neutralize(y, np.zeros((3, 2)))
        with pytest.raises(ValueError, match=r"`weights`.*negative"):
            neutralize(y, weights=np.full((2, 3), -1.0))
        with pytest.raises(ValueError, match=r"`y`.*\(2, 3\)"):
            neutralize(np.zeros((2, 3)))


class TestCSNeutralize:
    @pytest.mark.parametrize("weights", [None, "sqrt_mcap", "mcap"])
    def test_csneutralize_equals_least_squares_per_day(self, weights):
        df = label_and_risk(dtype=np.float64)
        before = df.copy()
        out = CSNeutralize(styles=["log_mcap", "beta"], weights=weights)(df)
        pd.testing.assert_frame_equal(df, before)
        for _, day in df.groupby("datetime"):
            mcap = np.exp(day["risk", "log_mcap"].to_numpy())
            w = {None: None, "sqrt_mcap": np.sqrt(mcap), "mcap": mcap}[weights]
            for col in ("a", "b"):
                want = lstsq_residual(
                    day["label", col].to_numpy(),
                    day["risk", "industry"].to_numpy(),
                    day["risk"][["log_mcap", "beta"]].to_numpy(),
                    w,
                )
                got = out.loc[day.index, ("label", col)].to_numpy()
                np.testing.assert_allclose(got, want, atol=1e-8)
        pd.testing.assert_frame_equal(out["risk"], df["risk"])

    def test_csneutralize_uses_only_its_own_day(self):
        df = label_and_risk()
        later = df.index.get_level_values("datetime") > df.index[200][0]
        changed = df.copy()
        changed[later] = changed[later] * -3 + 1
        a, b = (CSNeutralize()(x)[~later] for x in (df, changed))
        pd.testing.assert_frame_equal(a, b)

    def test_csneutralize_does_not_depend_on_row_order(self):
        df = label_and_risk()
        shuffled = df.sample(frac=1, random_state=0)
        pd.testing.assert_frame_equal(
            CSNeutralize()(shuffled).sort_index(), CSNeutralize()(df), atol=1e-6
        )

    def test_csneutralize_styles_all_takes_size_instead_of_log_mcap(self):
        df = label_and_risk()
        df["risk", "size"] = df["risk", "log_mcap"] * 2 - 1
        want = CSNeutralize(styles=["beta", "size"])(df)
        pd.testing.assert_frame_equal(CSNeutralize(styles="all")(df), want)

    def test_csneutralize_names_what_is_absent(self):
        df = label_and_risk()
        with pytest.raises(ValueError, match="no column 'momentum'"):
            CSNeutralize(styles=["momentum"])(df)
        with pytest.raises(ValueError, match="no column group 'risk'"):
            CSNeutralize()(df[["label"]])
        with pytest.raises(ValueError, match=r"`weights`.*'cap'"):
            CSNeutralize(weights="cap")
        with pytest.raises(ValueError, match=r"`missing`.*'zero'"):
            CSNeutralize(missing="zero")

    def test_csneutralize_warns_of_many_lost_values(self, warnings_of_processors):
        df = label_and_risk()
        df.loc[df.index[:100], ("risk", "industry")] = np.nan
        CSNeutralize()(df)
        assert "become NaN" in warnings_of_processors[0]

    def test_day_blocks_cover_every_row_once(self):
        df = label_and_risk().sample(frac=0.7, random_state=1)
        seen = np.concatenate(
            [np.arange(len(df))[r] for r, _, _ in day_blocks(df.index, 90)]
        )
        assert sorted(seen) == list(range(len(df)))
        for rows, place, shape in day_blocks(df.index, 90):
            days = df.index.get_level_values(0)[rows]
            panel = np.zeros(shape)
            np.add.at(panel, place, 1)
            assert panel.max() == 1
            assert days.nunique() == shape[0]


class TestCSZScore:
    def test_cszscore_equals_pandas(self):
        df = label_and_risk()
        out = CSZScore()(df)
        days = df["label"].astype(float).groupby("datetime")
        want = (df["label"] - days.transform("mean")) / days.transform(
            lambda x: x.std(ddof=0)
        )
        np.testing.assert_allclose(out["label"], want, atol=1e-5)
        assert (out.dtypes == np.float32).all()
        pd.testing.assert_frame_equal(out["risk"], df["risk"])

    def test_cszscore_by_hand_with_nan_inf_constant_and_one_stock(self):
        x = np.array(
            [
                [1.0, 2.0, 3.0, np.nan],
                [0.1, 0.1, 0.1, 0.1],
                [np.nan, np.nan, 5.0, np.inf],
                [np.nan] * 4,
                [1e8 + 1, 1e8 + 2, 1e8 + 3, np.nan],
            ]
        )[..., None]
        got = CSZScore("label")(frame_of(x, "label")).to_numpy().reshape(5, 4)
        r = np.sqrt(1.5)
        want = [
            [-r, 0, r, np.nan],
            [0, 0, 0, 0],
            [np.nan, np.nan, 0, np.nan],
            [np.nan] * 4,
            [-r, 0, r, np.nan],
        ]
        np.testing.assert_allclose(got, want, atol=1e-9)

    def test_cszscore_leaves_the_frame_and_copies_no_other_column(self):
        df = label_and_risk().astype(np.float32)
        before = df.copy()
        out = CSZScore()(df)
        pd.testing.assert_frame_equal(df, before)
        for column in df["risk"].columns:
            pair = [np.asarray(frame["risk", column]) for frame in (out, df)]
            assert np.shares_memory(*pair)

    def test_cszscore_uses_only_its_own_day(self):
        df = label_and_risk()
        changed = df.copy()
        changed.iloc[240:] = 9.0
        pd.testing.assert_frame_equal(
            CSZScore()(df).iloc[:240], CSZScore()(changed).iloc[:240]
        )


class TestRobustClipZScore:
    window: ClassVar = {"fit_start_time": "2020-01-01", "fit_end_time": "2020-03-01"}

    def features(self, seed=0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        x = rng.standard_t(2, (90, 20, 3)) * [1, 10, 0.01] + [0, 5, 1]
        x[rng.random(x.shape) < 0.05] = np.nan
        return frame_of(x.astype(dtype))

    def test_robust_clip_by_hand(self):
        # Median 3, |x - 3| = 2 1 0 1 97, so MAD 1: clip at 3 ± 2 (n_mad 2) gives
        # 1 2 3 4 5, mean 3, population std sqrt(2).
        x = np.array([1.0, 2.0, 3.0, 4.0, 100.0, np.nan]).reshape(1, 6, 1)
        df = frame_of(x)
        proc = RobustClipZScore("2020-01-01", "2020-01-01", n_mad=2)
        proc.fit(df)
        want = np.array([-2, -1, 0, 1, 2, 0]) / np.sqrt(2)
        np.testing.assert_allclose(proc(df).to_numpy()[:, 0], want)
        proc.fill = False
        assert np.isnan(proc(df).to_numpy()[5, 0])

    def test_robust_clip_equals_pandas(self):
        df = self.features()
        proc = RobustClipZScore(**self.window)
        proc.fit(df)
        out = proc(df)
        fit = df.loc["2020-01-01":"2020-03-01"].astype(float)
        median = fit.median()
        mad = (fit - median).abs().median()
        lo, hi = median - 7 * mad, median + 7 * mad
        clipped = fit.clip(lo, hi, axis=1)
        want = (df.astype(float).clip(lo, hi, axis=1) - clipped.mean()) / clipped.std(
            ddof=0
        )
        np.testing.assert_allclose(out, want.fillna(0), atol=1e-5)
        assert (out.dtypes == np.float32).all()
        assert not out.isna().any().any()

    def test_robust_clip_ignores_everything_after_the_fit_window(self):
        df = self.features()
        changed = df.copy()
        changed.loc["2020-03-02":] = changed.loc["2020-03-02":] * 50 + 3
        a, b = RobustClipZScore(**self.window), RobustClipZScore(**self.window)
        a.fit(df)
        b.fit(changed)
        for name in ("median_", "mad_", "mean_", "std_"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))

    def test_robust_clip_treats_inf_as_missing(self):
        df = self.features()
        holes = df.copy()
        df.iloc[5, 0], df.iloc[7, 1] = np.inf, -np.inf
        holes.iloc[5, 0], holes.iloc[7, 1] = np.nan, np.nan
        a, b = RobustClipZScore(**self.window), RobustClipZScore(**self.window)
        a.fit(df)
        b.fit(holes)
        pd.testing.assert_frame_equal(a(df), b(holes))

    def test_robust_clip_leaves_the_frame_and_other_groups_alone(self):
        df = pd.concat(
            [
                self.features(),
                self.features(1)["feature"].pipe(
                    lambda x: pd.concat({"label": x.astype(np.float64)}, axis=1)
                ),
            ],
            axis=1,
        )
        before = df.copy()
        proc = RobustClipZScore(**self.window)
        proc.fit(df)
        out = proc(df)
        pd.testing.assert_frame_equal(df, before)
        pd.testing.assert_frame_equal(out["label"], df["label"])
        assert list(out.columns) == list(df.columns)

    def test_robust_clip_follows_names_not_column_order(self):
        df = self.features()
        proc = RobustClipZScore(**self.window)
        proc.fit(df)
        swapped = df.iloc[:, [2, 0, 1]]
        pd.testing.assert_frame_equal(proc(swapped), proc(df).iloc[:, [2, 0, 1]])
        with pytest.raises(ValueError, match=r"missing.*'f1'"):
            proc(df.iloc[:, [0, 2]])

    def test_robust_clip_mostly_equal_feature_is_not_flattened(
        self, warnings_of_processors
    ):
        x = np.zeros((1, 10, 1))
        x[0, :3, 0] = [1, 2, 9]
        df = frame_of(x)
        proc = RobustClipZScore("2020-01-01", "2020-01-01")
        proc.fit(df)
        np.testing.assert_allclose(
            proc(df).to_numpy()[:, 0], (x[0, :, 0] - 1.2) / x.std()
        )
        assert "f0" in warnings_of_processors[0]

    @pytest.mark.parametrize("n_mad", ["7", 0, None])
    def test_robust_clip_rejects_a_bad_width(self, n_mad):
        with pytest.raises(ValueError, match="`n_mad`"):
            RobustClipZScore("2020-01-01", "2020-01-01", n_mad=n_mad)

    @pytest.mark.parametrize(
        ("start", "end", "message"),
        [
            (None, "2020-02-01", "`fit_start_time` is None"),
            ("2020-02-01", None, "`fit_end_time` is None"),
            ("2020-02-01", "2020-01-01", "2020-02-01 is after"),
        ],
    )
    def test_robust_clip_rejects_a_bad_window(self, start, end, message):
        with pytest.raises(ValueError, match=message):
            RobustClipZScore(start, end)

    def test_robust_clip_rejects_a_window_outside_the_data(self):
        proc = RobustClipZScore("2010-01-01", "2011-01-01")
        with pytest.raises(ValueError, match=r"2010-01-01.*2020-01-01"):
            proc.fit(self.features())

    @pytest.mark.parametrize(("value", "what"), [(np.nan, "no value"), (3, "constant")])
    def test_robust_clip_names_an_empty_feature(self, value, what):
        df = self.features()
        df.loc[:"2020-03-02", ("feature", "f1")] = value
        with pytest.raises(ValueError, match=f"'f1'.*{what}"):
            RobustClipZScore(**self.window).fit(df)
        proc = RobustClipZScore(**self.window, allow_empty=True)
        proc.fit(df)
        out = proc(df)["feature", "f1"]
        assert (out == 0).all()

    def test_robust_clip_needs_fit_first(self):
        with pytest.raises(ValueError, match="not fitted"):
            RobustClipZScore(**self.window)(self.features())

    def test_robust_clip_survives_pickling_with_the_same_numbers(self):
        df = self.features()
        proc = RobustClipZScore(**self.window)
        proc.fit(df)
        again = pickle.loads(pickle.dumps(proc))
        pd.testing.assert_frame_equal(again(df), proc(df))


class TestDropSuspended:
    def test_drop_suspended_looks_at_features_only(self):
        df = pd.concat(
            [
                frame_of(np.ones((2, 3, 2))),
                frame_of(np.ones((2, 3, 1)), "label", ["y"]),
            ],
            axis=1,
        )
        df.iloc[1, :2] = np.nan  # suspended, label known
        df.iloc[2, 0] = np.nan  # one feature missing
        df.iloc[4, 2] = np.nan  # label missing
        out = DropSuspended()(df)
        assert list(out.index) == list(df.index.delete(1))

    def test_drop_suspended_by_named_fields(self):
        df = frame_of(np.ones((1, 3, 2)))
        df.iloc[1, 0] = np.nan
        assert len(DropSuspended(fields=["f0"])(df)) == 2
        with pytest.raises(ValueError, match="'KMID' is not in group"):
            DropSuspended(fields=["KMID"])(df)


class TestAddRisk:
    @pytest.fixture
    def loaded(self, monkeypatch):
        """Stand in for the store: value = day number x 10 + stock number."""
        calls = []

        def read(names, expressions, start, end, freq="day"):
            calls.append((list(names), start, end, freq))
            index = pd.MultiIndex.from_product(
                [pd.bdate_range(start, end), names], names=["datetime", "instrument"]
            )
            value = [10.0 * d.day + int(n[-1]) for d, n in index]
            out = pd.DataFrame(
                {e: np.array(value, np.float32) for e in expressions}, index=index
            )
            if "$nothing" in out:
                out["$nothing"] = np.nan
            return out

        monkeypatch.setattr("data_handlers.risk.read_values", read)
        return calls

    def test_addrisk_appends_for_exactly_the_frames_rows(self, loaded):
        df = frame_of(np.ones((3, 4, 2), np.float32)).drop(
            index=[(pd.Timestamp("2020-01-02"), "SH600001")]
        )
        out = AddRisk(risk={"industry": "$industry"}, label={"y": "Ref($close,-1)"})(df)
        assert out.index.equals(df.index)
        want = [10.0 * d.day + int(n[-1]) for d, n in df.index]
        assert out["risk", "industry"].tolist() == want
        assert list(out.columns)[:2] == list(df.columns)
        assert loaded[0][1:] == (
            pd.Timestamp("2020-01-01"),
            pd.Timestamp("2020-01-03"),
            "day",
        )

    def test_addrisk_refuses_an_existing_group_and_an_empty_store(self, loaded):
        df = frame_of(np.ones((2, 2, 1)))
        with pytest.raises(ValueError, match="'risk' already"):
            AddRisk(risk={"x": "$x"})(frame_of(np.ones((2, 2, 1)), "risk"))
        with pytest.raises(ValueError, match=r"\$nothing"):
            AddRisk(risk={"x": "$nothing"})(df)
        with pytest.raises(ValueError, match=r"`risk`.*'all'"):
            AddRisk(risk="all")


@pytest.mark.parametrize(
    "proc",
    [
        DropSuspended(),
        CSNeutralize(),
        CSZScore(),
        AddRisk(risk={"industry": "$industry"}),
        RobustClipZScore("2020-01-01", "2020-02-01"),
    ],
    ids=lambda p: type(p).__name__,
)
def test_processor_keeps_its_state_when_pickled_and_serves_inference(proc):
    again = pickle.loads(pickle.dumps(proc))
    assert vars(again) == vars(proc)
    assert proc.is_for_infer() and proc.readonly()
    assert not [name for name in vars(proc) if name.startswith("_")]
