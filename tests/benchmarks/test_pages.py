from __future__ import annotations

import mmap

import numpy as np
import pages
import pytest
import torch

from dynamicemb.kernels.host_memory import zeroed_bytes


@pytest.mark.parametrize("huge", [False, True])
def test_every_cost_is_measured(huge: bool) -> None:
    costs = pages.PageCosts.measured(huge, 2 * pages.HUGE_PAGE_BYTES)
    assert costs.first_access > 0 and costs.dependent_read > 0 and costs.read > 0


def test_a_chain_leads_from_each_line_to_the_one_it_names() -> None:
    words, chains = np.array([3, 0, 1, 2]), np.array([0, 2])
    pages._follow(words, chains, 3)
    assert chains.tolist() == [1, 3]


def test_without_huge_pages_there_are_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    words = pages._fresh_words(True, pages.HUGE_PAGE_BYTES)
    assert words.nbytes == pages.HUGE_PAGE_BYTES and not words.any()


def test_share_in_huge_pages() -> None:
    small = torch.from_numpy(pages._fresh_words(False, 8 * pages.HUGE_PAGE_BYTES))
    small.fill_(1)
    assert pages.huge_share(small) == 0
    memory = zeroed_bytes(8 * pages.HUGE_PAGE_BYTES)
    memory.fill_(1)
    assert 0 <= pages.huge_share(memory) <= 1
