"""The tracking page against a week worked by hand, and its gaps."""

import shutil

import numpy as np
import pandas as pd
import pytest

from qlib_ext.cli.track import track_text
from qlib_ext.ingest.store import write_store
from qlib_ext.report.tracking import Plan, Tracking, add_styles, read_plan

DAYS = pd.bdate_range("2020-12-14", "2020-12-31")
CODES = [f"SH60000{i}" for i in range(10)]


@pytest.fixture(scope="module")
def week(tmp_path_factory):
    """Ten stocks that stand still until the last week.

    On the 29th the upper five gain 1 % and the lower five lose 1 %; on the 30th nothing
    moves; on the 31st the upper five gain 2 %.
    """
    upper = np.arange(10) >= 5
    moves = pd.DataFrame(0.0, DAYS, CODES)
    moves.loc["2020-12-29"] = np.where(upper, 0.01, -0.01)
    moves.loc["2020-12-31"] = np.where(upper, 0.02, 0.0)
    close = 10 * (1 + moves).cumprod()
    bars = (
        close.rename_axis("datetime")
        .reset_index()
        .melt("datetime", var_name="instrument", value_name="close")
    )
    store = tmp_path_factory.mktemp("week") / "store"
    write_store(store, bars.assign(factor=1.0))
    return store


@pytest.fixture
def runs(week, use_store, tmp_path, fresh_database):
    """A finished factor and portfolio, and a factor whose run failed."""
    from qlib.workflow import R

    shutil.copy(fresh_database(tmp_path) / "mlruns.db", tmp_path / "mlflow.db")
    use_store(week)
    index = pd.MultiIndex.from_product(
        [DAYS[DAYS >= "2020-12-21"], CODES], names=["datetime", "instrument"]
    )
    score = pd.DataFrame({"score": np.tile(np.arange(10.0), len(index) // 10)}, index)
    account = pd.DataFrame(
        {
            "return": [0.5, 0.01, 0.02, -0.01, 0.0, 0.01],
            "cost": [0.1, 0.0, 0.001, 0.0, 0.0, 0.0],
            "bench": [0.0, 0.0, 0.01, 0.01, 0.0, 0.0],
            "turnover": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        },
        DAYS[DAYS >= "2020-12-24"],
    )
    with R.start(experiment_name="good"):
        R.save_objects(**{"pred.pkl": score})
        R.get_recorder().save_objects(
            artifact_path="portfolio_analysis", **{"report_normal_1day.pkl": account}
        )
    with pytest.raises(RuntimeError), R.start(experiment_name="bad"):
        R.save_objects(**{"pred.pkl": score})
        raise RuntimeError("training broke")
    return f"sqlite:///{tmp_path}/mlflow.db"


FILE = """
title: Desk
store: {store}
uri: {uri}
styles: false
factors:
  steady: {{experiment: good, horizon: 1}}
  guessed: {{experiment: good}}
  broken: {{experiment: bad}}
  absent: {{experiment: nobody}}
portfolios:
  account: {{experiment: good}}
"""


def test_figures_of_a_week_worked_by_hand(runs, week, tmp_path):
    file = tmp_path / "desk.yaml"
    file.write_text(FILE.format(store=week, uri=runs))
    out = tmp_path / "pages"
    out.mkdir()
    (out / "track-Desk-2020-12-24.csv").write_text(
        "day,kind,name,figure,value\n2020-12-24,factor,steady,rank_ic,0.8\n"
    )
    printed = track_text(file, out)
    table = pd.read_csv(out / "track-Desk-2020-12-31.csv")
    found = table.set_index(["name", "figure"])["value"]
    # One-day returns differ between stocks on the 29th and 31st only, known to the
    # scores of the 25th and 29th. Ranks 1 to 10 against 3 (five times) and 8: the
    # covariance is 2.5 x 25 = 62.5, the variances 82.5 and 62.5.
    assert found["steady", "rank_ic"] == pytest.approx(62.5 / (82.5 * 62.5) ** 0.5)
    # Standardised, (r - 5.5) / 2.8723 against -1 or 1: apart by .5667, .2185, .1296,
    # .4778 and .8259 on either side, .4437 on average.
    assert found["steady", "closeness"] == pytest.approx(np.exp(-0.4437), abs=1e-4)
    # Chosen on Friday the 25th, bought at Monday's close. Ten stocks make two groups.
    # Long-short: 2 % on the 29th, 2 % on the 31st.
    assert found["steady", "long_short_week"] == pytest.approx(
        1.02 * 1.02 - 1, abs=1e-6
    )
    # The pool is 50.5 % in the upper five after the 29th: it gains 1.01 % on the 31st.
    week_only = 1.01 * (1 + 0.02 - 0.505 * 0.02) - 1
    assert found["steady", "long_only_week"] == pytest.approx(week_only, abs=1e-6)
    assert found["steady", "long_only_year"] == pytest.approx(week_only, abs=1e-6)
    # The account was bought on the 24th. Net excess: 1 % on the 25th; then .9 %, -2 %,
    # 0 and 1 % in the last week.
    last_week = 1.009 * 0.98 * 1.01 - 1
    assert found["account", "excess_week"] == pytest.approx(last_week)
    assert found["account", "excess_month"] == pytest.approx(1.01 * (1 + last_week) - 1)
    assert found["account", "max_drawdown"] == pytest.approx(0.02)
    daily = np.array([0.01, 0.009, -0.02, 0.0, 0.01])
    assert found["account", "tracking_error"] == pytest.approx(
        daily.std(ddof=1) * 252**0.5
    )
    assert "gap: broken: no finished recorder" in printed
    assert "gap: guessed: its recorder does not say over how many days" in printed
    assert "gap: absent: `experiment` 'nobody' is not in" in printed
    page = (out / "track-Desk-2020-12-31.html").read_text()
    assert "Gap: broken" in page and "Gap: absent" in page
    assert "issue of 2020-12-24" in page
    assert "7.04 %" in page  # RankIC rose from .8 to .8704


def test_scores_behind_the_store_are_a_gap(runs, week, tmp_path):
    file = tmp_path / "desk.yaml"
    text = FILE.format(store=week, uri=runs).replace("good, horizon: 1", "old")
    file.write_text(text + "max_days: 1\n")
    from qlib.workflow import R

    index = pd.MultiIndex.from_product(
        [DAYS[:6], CODES], names=["datetime", "instrument"]
    )
    score = pd.DataFrame({"score": np.tile(np.arange(10.0), 6)}, index)
    with R.start(experiment_name="old"):
        R.save_objects(**{"pred.pkl": score})
    printed = track_text(file, tmp_path)
    assert "steady: 8 days without a score, more than `max_days` 1" in printed
    assert "steady: scores end 2020-12-21; what it held then is followed" in printed


def test_styles_are_compounded_over_the_periods():
    days = pd.DatetimeIndex(["2019-12-31", "2020-01-02", "2020-01-03", "2020-01-06"])
    out = Tracking(days[-1], days)
    add_styles(out, pd.DataFrame({"size": [0.5, 0.1, -0.1, 0.02]}, days))
    row = out.rows["style"]["size"]
    assert row["return_week"] == pytest.approx(0.02)
    assert row["return_month"] == pytest.approx(1.1 * 0.9 * 1.02 - 1)
    assert row["return_year"] == row["return_month"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "`factors` or `portfolios` must name a recorder"),
        ("factors: [a]", "`factors` must map names to recorders"),
        ("factors: {a: {pool: x}}", "`factors.a` must have `experiment` or"),
        ("factors: {a: {recorder: x, seed: 1}}", r"`factors.a` has \['seed'\]"),
        ("factors: {a: {recorder: x, horizon: 0}}", "`factors.a.horizon` must"),
        ("factors: {a: {recorder: x}}\nrebalance: daily", "`rebalance` must be"),
        ("factors: {a: {recorder: x}}\nweekly: 1", "weekly"),
        ("portfolios: {a: {recorder: x}}\ntitle: 3", "`title` must be text"),
        ("portfolios: {a: {recorder: x, horizon: 5}}", r"has \['horizon'\]"),
        ("factors: {a: {recorder: 12}}", "`recorder` must be text, got 12"),
        ("factors: {a: {recorder: x, pool: [csi300]}}", "`pool` must be text"),
        ("factors: {1: {recorder: x}, '1': {recorder: y}}", "the name '1' twice"),
    ],
)
def test_bad_files_are_named(text, message, tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(file)


def test_a_missing_file_or_store_is_named(tmp_path, market_small):
    with pytest.raises(ValueError, match="no tracking file"):
        read_plan(tmp_path / "none.yaml")
    file = tmp_path / "f.yaml"
    file.write_text("factors: {a: {recorder: x}}\nstore: nowhere\n")
    with pytest.raises(ValueError, match="no Qlib store nowhere"):
        track_text(file, tmp_path)
    options = {"store": str(market_small), "uri": f"sqlite:///{tmp_path}/none.db"}
    with pytest.raises(ValueError, match=r"none of the factors .* does not exist"):
        track_text(file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert Plan({"a": {"recorder": "x"}}).max_days == 20
