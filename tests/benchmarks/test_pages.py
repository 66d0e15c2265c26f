from __future__ import annotations

import numpy as np
import pages
import pytest
import torch

from dynamicemb.kernels.host_memory import zeroed_bytes


@pytest.mark.parametrize("huge", [False, True])
def test_every_cost_is_measured(huge: bool) -> None:
    costs = pages.PageCosts.measured(huge, 2 * pages.HUGE_PAGE_BYTES)
    assert 0 < costs.read < costs.dependent_read
    assert costs.first_access > 0


def test_a_chain_leads_from_each_line_to_the_one_it_names() -> None:
    words, chains = np.array([3, 0, 1, 2]), np.array([0, 2])
    pages._follow(words, chains, 3)
    assert chains.tolist() == [1, 3]


def test_share_in_huge_pages() -> None:
    assert pages.huge_share(torch.zeros(100)) < 0.9, "it lies among what the interpreter uses"
    memory = zeroed_bytes(8 * pages.HUGE_PAGE_BYTES)
    memory.fill_(1)
    assert 0 <= pages.huge_share(memory) <= 1
