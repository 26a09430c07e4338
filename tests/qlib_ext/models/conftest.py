"""What the tests of models share."""

import pytest
import torch

from qlib_ext.metrics import rank_ic


@pytest.fixture
def daily_rank_ic():
    """Daily RankIC of a fitted model on its test segment, against the raw label."""

    def of(model, data):
        panel = data.panel
        days = panel.days(data.segments["test"])
        wide = model.predict(data).unstack("instrument")
        wide = wide.reindex(index=panel.dates[days], columns=panel.instruments)
        return rank_ic(torch.tensor(wide.to_numpy()), panel.raw_labels[days][..., 0])

    return of
