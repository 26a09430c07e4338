"""What training keeps from one batch to the next."""

import ctypes
import operator
import resource

import pytest
import torch

from qlib_ext.models.batches import Progress, mean_state, memory_kept


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_stays_for_the_next_batch():
    def pages(times=2):
        """Count the pages that blocks take, larger than any that is free."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(50_000_000)  # 48,829 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert pages() > 50_000
    with memory_kept():
        # The heap grows until it is large enough; what else ends in between may keep a
        # block from being taken again.
        assert min(pages() for _ in range(8)) < 1_000
    assert pages() > 50_000


def run_through(values, **given):
    """Progress after epochs of these values, whose weight is the epoch's number."""
    progress, network = Progress("ic", **given), torch.nn.Linear(1, 1, bias=False)
    for epoch in progress.epochs(len(values), early_stop=2):
        torch.nn.init.constant_(network.weight, epoch)
        progress.add({"ic": values[epoch]}, network)
    return progress


class TestProgress:
    @pytest.mark.parametrize(
        ("keep", "kept", "weight"),
        # The second .4 is no better than the first, which comes before it.
        [
            (1, [2], 2.0),
            (2, [2, 4], 3.0),
            (3, [2, 4, 1], 7 / 3),
            (9, [2, 4, 1, 3, 0], 2.0),
        ],
    )
    def test_the_mean_of_the_best_epochs(self, keep, kept, weight):
        progress = run_through([0.1, 0.3, 0.4, 0.2, 0.4], keep=keep)
        assert list(progress.kept) == kept
        assert float(progress.best["weight"]) == pytest.approx(weight)
        assert (progress.best_epoch, progress.best_value) == (2, 0.4)

    def test_it_stops_after_the_best_not_after_the_last_kept(self):
        progress = run_through([0.5, 0.1, 0.2, 0.3, 0.4], keep=3)
        assert len(progress.history) == 3 and list(progress.kept) == [0, 2, 1]

    def test_the_beginning_counts_where_it_has_a_value(self):
        begin = {"weight": torch.full((1, 1), 7.0)}
        given = {"better": operator.lt, "untrained": 0.2}
        better = run_through([0.4, 0.1], kept={-1: begin}, **given)
        assert (better.best_epoch, better.best_value) == (1, 0.1)
        worse = run_through([0.4, 0.3, 0.1], kept={-1: begin}, **given)
        assert (worse.best_epoch, worse.best_value) == (-1, 0.2)
        assert float(worse.best["weight"]) == 7.0

    def test_what_is_no_fraction_is_not_averaged(self):
        states = [
            {"w": torch.tensor([a]), "steps": torch.tensor(n)}
            for a, n in ((1.0, 5), (2.0, 8))
        ]
        mean = mean_state(states)
        assert float(mean["w"]) == 1.5 and int(mean["steps"]) == 5
