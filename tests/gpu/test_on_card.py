"""On a machine with a card: pytest -m gpu."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fixer.kernel.compile import Target
from fixer.kernel.source import read_kernel_source
from fixer.machine.driver import visible_cards
from fixer.sglang.find_tree import find_tree
from fixer.tuning.measure import card_runner
from fixer.tuning.measure.card_runner import CardRunner
from fixer.tuning.search.runner import Request
from fixer.tuning.search.trials import Outcome
from fixer.workload import Kernel, NumberFormat, Projection, Workload

sys.path.insert(0, str(Path(__file__).parent))
import faults

pytestmark = pytest.mark.gpu
ROWS = (1, 16, 256)
SMALL = Workload(16, 256, 512, 4, NumberFormat.FP8_W8A8, per_channel_quant=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    tree = find_tree(None, None, tmp_path_factory.mktemp("trees"))
    return Target(read_kernel_source(tree.kernel_source), visible_cards()[0].arch, tmp_path_factory.mktemp("kernels"))


def runner(target, folder, **options):
    card = visible_cards()[0]
    return CardRunner(
        SMALL, target, devices=[0], rows=ROWS, shared_limit=card.shared_memory, folder=folder, workers=4, **options
    )


def test_the_driver_and_pytorch_agree_on_the_card():
    import torch

    card, properties = visible_cards()[0], torch.cuda.get_device_properties(0)
    assert card.name == properties.name
    assert card.capability == (properties.major, properties.minor)
    assert card.shared_memory == properties.shared_memory_per_block_optin


def test_every_fault_costs_one_candidate(target, tmp_path, monkeypatch):
    monkeypatch.setattr(card_runner, "LOOK_SECONDS", 8.0)
    tiles = [faults.GOOD, faults.STICKY, faults.HANGS, faults.WRONG, faults.LAST]
    with runner(target, tmp_path, factory=faults.faulty_handler) as cards:
        requests = [Request(Kernel(Projection.GATE_UP, tile), ROWS) for tile in tiles]
        looks = {look.build.kernel.tile: look for look in cards.look(requests)}
        assert cards.restarts == 2
    outcomes = {tile: looks[tile].build.outcome for tile in tiles}
    assert outcomes == {
        faults.GOOD: Outcome.OK,
        faults.STICKY: Outcome.CRASHED,
        faults.HANGS: Outcome.TIMED_OUT,
        faults.WRONG: Outcome.WRONG_RESULT,
        faults.LAST: Outcome.OK,
    }
    for tile in (faults.GOOD, faults.LAST):
        assert {timing.tokens for timing in looks[tile].timings} == set(ROWS)
        assert all(timing.microseconds > 0 for timing in looks[tile].timings)


def test_a_repeated_timing_agrees(target, tmp_path):
    kernel = Kernel(Projection.DOWN, faults.GOOD)
    with runner(target, tmp_path) as cards:
        (look,) = cards.look([Request(kernel, ROWS)])
        assert look.build.outcome is Outcome.OK
        wanted = [(kernel, tokens) for tokens in ROWS]
        first = {timing.tokens: timing.microseconds for timing in cards.closer(wanted, 15)}
        again = {timing.tokens: timing.microseconds for timing in cards.closer(wanted, 17)}
    for tokens in ROWS:
        assert abs(first[tokens] / again[tokens] - 1) < 0.05
