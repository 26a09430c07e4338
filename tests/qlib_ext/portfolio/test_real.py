"""Index enhancement on real prices: Shanghai's CSI 300 members, equal weights."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

PRESET = "daily_cn_csi300_sh_valuation"
MAPPING = Path(__file__).parents[3] / "benchmarks" / "presets" / f"{PRESET}.yaml"


@pytest.mark.slow
def test_real_members_are_enhanced_within_limits(tmp_path, use_store, request):
    from qlib_ext.ingest.run import ingest
    from qlib_ext.portfolio import EnhanceRecord

    store = os.environ.get("QLIB_EXT_SH_STORE")
    if not store:
        data = request.getfixturevalue("real_file")(f"{PRESET}.parquet").parent
        store = str(tmp_path / "store")
        ingest(store, MAPPING, data=data)
    use_store(store)
    from qlib.data import D
    from qlib.workflow import R

    frame = D.features(
        D.instruments("all"),
        ["1 - $close / Ref($close, 20)"],
        "2024-01-02",
        "2024-12-31",
    )
    score = frame.iloc[:, 0].swaplevel().sort_index().dropna().rename("score")
    config = {
        "strategy": {
            "class": "IndexEnhancementStrategy",
            "module_path": "qlib_ext.portfolio",
            "kwargs": {
                "signal": "<PRED>",
                "market": "csi300",
                "limits": "strict",
                "riskmodel_root": str(tmp_path / "model"),
            },
        },
        "backtest": {
            "start_time": "2024-01-02",
            "end_time": "2024-12-30",
            "account": 1e8,
            "exchange_kwargs": {
                "exchange": {
                    "class": "BoardExchange",
                    "module_path": "qlib_ext.portfolio",
                    "kwargs": {"deal_price": "vwap"},
                }
            },
        },
    }
    with R.start(experiment_name="real"):
        recorder = R.get_recorder()
        recorder.save_objects(
            **{"pred.pkl": score.to_frame(), "label.pkl": score.to_frame()}
        )
        EnhanceRecord(recorder, config).generate()

    def parquet(name):
        path = f"enhance/{name}.parquet"
        return pd.read_parquet(recorder.client.download_artifacts(recorder.id, path))

    history, account = parquet("history"), parquet("account")
    assert len(history) > 45
    assert set(history["status"]) <= {"optimal", "relaxed"}
    assert (history["status"] == "optimal").mean() > 0.8
    kept = history[history["status"] == "optimal"]
    assert kept["tracking_error"].max() <= 0.04 + 1e-6
    assert kept["exposure:size"].abs().max() <= 0.1 + 1e-6
    path = recorder.client.download_artifacts(recorder.id, "enhance/report.html")
    text = Path(path).read_text(encoding="utf-8")
    assert "equal weights" in text
    # A year of real prices: what is held moves with its index (measured: 0.969).
    r = account.iloc[5:]
    assert np.corrcoef(r["return"], r["bench"])[0, 1] > 0.95
    assert (r["return"] - r["bench"]).std() * 252**0.5 < 0.07
    print(history["status"].value_counts().to_dict(), account.iloc[-1].to_dict())
