"""Helpers of the ingest tests: Qlib in a fresh process, because it keeps one store."""

import subprocess
import sys

import pandas as pd
import pytest

SCRIPT = """
import sys
import qlib
from qlib.data import D
if __name__ == "__main__":
    qlib.init(provider_uri=sys.argv[1], logging_level=40, kernels=1)
    frame = eval(sys.argv[2])
    frame.to_pickle(sys.argv[3])
"""


@pytest.fixture
def run_qlib(tmp_path):
    """Evaluate an expression of `D` on a store, in a process of its own."""

    def run(root, expression):
        script, out = tmp_path / "run_qlib.py", tmp_path / "run_qlib.pkl"
        script.write_text(SCRIPT)
        subprocess.run(
            [sys.executable, str(script), str(root), expression, str(out)],
            check=True,
            capture_output=True,
            timeout=120,
        )
        return pd.read_pickle(out)

    return run
