"""Weekly rotation of real ETFs by what is known of their ten largest positions.

Nothing is trained: the stocks' values are an attention field (5-day turnover, its rate
of change) and a 20-day return (its rank). Store: benchmarks/presets/etf_cn.yaml, whose
notes say what it leaves out (survivorship of stocks and ETFs, Shenzhen).

    python benchmarks/rotation.py --store data/etf_cn [--run sqlite:///mlruns.db]

With --run also the newest finished run of workflows/real/rotation_etf.yaml in that
MLflow store, whose stocks' values are a score trained on 2020 to June 2021.
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


def rows_of(name: str, found: dict[str, float], period: str) -> list[dict]:
    """Rows of what a GroupRecord logged."""
    return [
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
            "period": period,
        }
        for rule in ("level", "change")
    ]


def of_run(uri: str) -> list[dict]:
    """Rows of the newest finished run of the workflow."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("rotation_etf")
    if experiment is None:
        raise ValueError(f"`--run` {uri} has no experiment 'rotation_etf'.")
    (run,) = client.search_runs(
        [experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=1
    )
    return rows_of("RNN's score", run.data.metrics, "2022-01-04 2023-12-29")


def main() -> None:
    """Run every field and print the figures."""
    p = parser(__doc__ or "", threads=1)
    p.add_argument("--store", default="data/etf_cn", help="store of the preset etf_cn")
    p.add_argument("--run", metavar="URI", help="MLflow store of a run of the workflow")
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
                rows += rows_of(name, recorder.list_metrics(), f"{START} {END}")
        if args.run:
            rows += of_run(args.run)
    for row in rows:
        put_row(RESULTS, row, [x["model"] for x in rows])
    show("Best ETFs against all, weekly, after costs", rows, env, args.json)


if __name__ == "__main__":
    main()
