"""What training keeps from one batch to the next."""

import ctypes
import resource

import pytest
import torch

from qlib_ext.models.batches import memory_kept


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
