"""How popular experts are, against draws of the measurement's own routing."""

from __future__ import annotations

import pytest
import torch

from fixer.families.fused_moe.routing import MIX, Routing, chances, popularity
from fixer.tuning.measure.tensors import choose_experts


@pytest.mark.parametrize(("experts", "top_k", "off"), [(128, 8, 0.012), (64, 6, 0.012), (8, 2, 0.045)])
@pytest.mark.parametrize("routing", list(Routing))
def test_chances_agree_with_draws(routing, experts, top_k, off):
    generator = torch.Generator().manual_seed(7)
    # One call shuffles the experts once, so its frequencies, sorted, are the chances.
    chosen = choose_experts(routing, 100_000, experts, top_k, generator)
    drawn = sorted((torch.bincount(chosen.flatten().long(), minlength=experts) / 100_000).tolist(), reverse=True)
    expected = chances(routing, experts, top_k)
    assert sum(expected) == pytest.approx(top_k)
    assert max(abs(a - b) for a, b in zip(drawn, sorted(expected, reverse=True), strict=True)) < off


def test_every_expert_is_drawn_where_as_many_are_wanted():
    assert chances(Routing.ZIPF, 4, 4) == (1.0,) * 4


def test_popularity():
    assert popularity(Routing.UNIFORM, 3, 1) == [1.0, 1.0, 1.0]
    assert popularity(Routing.HOT, 64, 2)[:5] == [8.0, 8.0, 8.0, 8.0, 1.0]
    assert popularity(Routing.ZIPF, 2, 1) == pytest.approx([1.0, 2**-0.7])
    assert set(MIX) == set(Routing)
