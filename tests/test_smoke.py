import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.smoke

# Not ours to print: of git, MLflow, NumPy, gym, and Qlib's own notices.
NOISE = (
    "usage: git",
    "Downloading artifacts",
    "Mean of empty",
    "Gym has",
    " INFO - ",
    "No valid experiment",
    "contains nan",
    "common_infra",
)
SMALL = """
BASE_CONFIG_PATH: base_day.yaml
experiment_name: small
qlib_init:
  provider_uri: data/market
task:
  model:
    kwargs: {n_factors: 4, n_epochs: 1, hidden_size: 8}
  dataset:
    kwargs:
      handler:
        kwargs:
          start_time: 2018-01-01
          fit_start_time: 2018-01-01
          fit_end_time: 2019-06-07
      segments:
        train: [2018-01-01, 2019-06-07]
        valid: [2019-07-01, 2019-12-06]
        test: [2020-01-01, 2020-12-31]
  record:
    - class: SignalRecord
      module_path: qlib.workflow.record_temp
      kwargs: {model: <MODEL>, dataset: <DATASET>}
    - class: FactorRecord
      module_path: qlib_ext.record_temp
      kwargs: {model: <MODEL>, dataset: <DATASET>}
    - class: PortAnaRecord
      module_path: qlib.workflow.record_temp
      kwargs:
        config:
          strategy:
            class: TopkDropoutStrategy
            module_path: qlib.contrib.strategy
            kwargs: {signal: <PRED>, topk: 5, n_drop: 1}
          backtest:
            start_time: 2020-01-01
            end_time: 2020-12-31
            account: 100000000
            benchmark: SH000300
            exchange_kwargs: {deal_price: close}
"""


def command(folder, *words):
    """Run `qlib-ext` in a folder that is no git repository; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "qlib_ext.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    for noise in NOISE:
        assert noise not in printed, printed
    return done.stdout


def test_market_workflow_report_compare_roll_score_and_track(tmp_path):
    market = ("--out", "data/market", "--stocks", "24", "--years", "3")
    command(tmp_path, "market", "make", *market)
    command(tmp_path, "init", "w")
    (tmp_path / "w" / "small.yaml").write_text(SMALL)
    printed = command(tmp_path, "run", "w/small.yaml")
    recorder = re.search(r"recorder (\w{32})", printed).group(1)
    shown = command(tmp_path, "report", "--experiment", "small")
    assert recorder in shown and "Rank IC 10d" in shown
    assert "small" in command(tmp_path, "compare", "small")
    rolled = command(tmp_path, "roll", "w/small.yaml", "--test", "2020", "--seeds", "1")
    assert "joined score" in rolled
    command(tmp_path, "score", recorder[:8], "--max-missing", "0.5")
    assert len(list((tmp_path / "reports").glob("*.html"))) == 2
    (tmp_path / "monday.yaml").write_text(
        "factors: {small: {experiment: small}, none: {experiment: none}}\n"
        "portfolios: {small too: {experiment: small}}\n"
    )
    tracked = command(tmp_path, "track", "monday.yaml")
    assert "small too" in tracked and "gap: none: `experiment` 'none'" in tracked
    figures = (tmp_path / "reports" / "track-Tracking-2020-12-31.csv").read_text()
    assert "style,size,return_week" in figures and "small,closeness_year" in figures
