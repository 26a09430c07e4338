"""Record of a model that weighs its sources."""

from __future__ import annotations

from typing import Any

from qlib_ext.report.record import ModelRecord, flat

__all__ = ["WeightRecord"]


class WeightRecord(ModelRecord):
    """Keep the daily weights with which a model joins its sources.

    Writes ``weights/weights.parquet`` (rows datetime, columns ``weighting/source``; row
    t is known at the close of t) and logs each weight's mean.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    model : FamilyComposite
        `<MODEL>` in a workflow.
    dataset : DatasetH
        `<DATASET>` in a workflow.
    segment : str, default "test"
        Segment whose weights are kept.
    skip_existing : bool, default False
        Leave finished files as they are.
    """

    artifact_path = "weights"
    leaves = ("weights.parquet",)
    asks = "predict_weights"
    due = "weigh its sources (FamilyComposite; write <MODEL>)"

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        weights = self.model.predict_weights(self.dataset, self.segment)
        self.log({f"{a}_{b}": v for (a, b), v in weights.mean().items()}, "weight_")
        return {"weights.parquet": flat(weights)}
