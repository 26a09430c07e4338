import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.smoke


def command(folder, *words):
    """Run `qlib-ext` in a folder that is no git repository; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "qlib_ext.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for noise in ("usage: git", "Downloading artifacts", "Mean of empty", "Gym has"):
        assert noise not in done.stdout + done.stderr
    return done.stdout


def test_market_workflow_report_compare_roll_and_score(tmp_path):
    command(tmp_path, "market", "make", "--out", "data/market", "--stocks", "40")
    command(tmp_path, "init", "w")
    file = tmp_path / "w" / "rnn_day_multi.yaml"
    text = file.read_text().replace("n_factors: 64", "n_factors: 4\n      n_epochs: 1")
    file.write_text(text)
    printed = command(tmp_path, "run", "w/rnn_day_multi.yaml")
    recorder = re.search(r"recorder (\w{32})", printed).group(1)
    shown = command(tmp_path, "report", "--experiment", "rnn_day_multi")
    assert recorder in shown and "RankIC" in shown.replace(" ", "")
    assert "rnn_day_multi" in command(tmp_path, "compare", "rnn_day_multi")
    rolled = command(
        tmp_path, "roll", "w/rnn_day_multi.yaml", "--test", "2019", "--seeds", "1"
    )
    assert "joined score" in rolled
    command(tmp_path, "score", recorder[:8], "--max-missing", "0.5")
    assert len(list((tmp_path / "reports").glob("*.html"))) == 2
