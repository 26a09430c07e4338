"""Weekly rotation of real ETFs by what is known of their ten largest positions.

Nothing is trained: the stocks' values are an attention field (5-day turnover, its rate
of change) and a 20-day return (its rank). Store: benchmarks/presets/etf_cn.yaml, whose
notes say what it leaves out (survivorship of stocks and ETFs, Shenzhen).

    python benchmarks/rotation.py --store data/etf_cn
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path

from harness import environment, parser, put_row, show

RESULTS = Path(__file__).resolve().parent / "results" / "etf_rotation.csv"
START, END = "2021-02-01", "2023-12-28"
FIELDS = {
    "attention": {"field": "Mean($turnover, 5)", "ranked": False},
    "20-day return": {"field": "$close / Ref($close, 20) - 1", "ranked": True},
}


def main() -> None:
    """Run every field and print the figures."""
    p = parser(__doc__ or "", threads=1)
    p.add_argument("--store", default="data/etf_cn", help="store of the preset etf_cn")
    p.add_argument("--k", type=int, default=5, help="ETFs held")
    args = p.parse_args()
    env = environment(args.threads)
    import qlib
    from qlib.data import D
    from qlib.workflow import R

    from qlib_ext.record_temp import GroupRecord

    store = str(Path(args.store).resolve())
    # MLflow puts artifacts into the working folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        qlib.init(
            provider_uri=store,
            region="cn",
            kernels=1,
            logging_level=logging.WARNING,
            exp_manager={
                "class": "MLflowExpManager",
                "module_path": "qlib.workflow.expm",
                "kwargs": {
                    "uri": f"sqlite:///{folder}/mlruns.db",
                    "default_exp_name": "rotation",
                },
            },
        )
        close = D.features(D.instruments("all"), ["$close"], START, END)
        close = close.swaplevel().sort_index().set_axis(["score"], axis=1)
        rows = []
        for name, kwargs in FIELDS.items():
            with R.start(experiment_name="rotation"):
                recorder = R.get_recorder()
                # The record takes days and stocks from the predictions.
                recorder.save_objects(**{"pred.pkl": close, "label.pkl": close})
                sets = {"etf": {"of": "holdings", "gaps": "name", "k": args.k}}
                GroupRecord(recorder, sets, **kwargs).generate()
                found = recorder.list_metrics()
            rows += [
                {
                    "model": f"{name}, by {rule}",
                    "seed": 0,
                    **{
                        f"{figure} %": 100 * found[f"rotation etf {rule} {key}"]
                        for figure, key in (
                            ("excess a year", "excess annual return"),
                            ("before costs", "excess annual return before costs"),
                            ("weekly turnover", "weekly turnover"),
                        )
                    },
                    "Sharpe of excess": found[f"rotation etf {rule} excess Sharpe"],
                    "ETFs": found["rotation etf groups"],
                    "period": f"{START} {END}",
                }
                for rule in ("level", "change")
            ]
    for row in rows:
        put_row(RESULTS, row, [x["model"] for x in rows])
    show("Best ETFs against all, weekly, after costs", rows, env, args.json)


if __name__ == "__main__":
    main()
