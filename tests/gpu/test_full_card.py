"""On a machine with a card that others use: pytest -m gpu tests/gpu/test_full_card.py."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixer.base.errors import CardError
from fixer.kernel.compile import Target
from fixer.kernel.source import read_kernel_source
from fixer.machine.driver import occupancy, visible_cards
from fixer.sglang.find_tree import find_tree
from fixer.tuning.measure.card_runner import CardRunner
from fixer.tuning.search.runner import Request
from fixer.tuning.search.trials import Outcome
from fixer.workload import BOTH, Kernel, NumberFormat, Workload

sys.path.insert(0, str(Path(__file__).parent))
import faults

pytestmark = pytest.mark.gpu
ROWS = (1, 16, 256)
LARGE = Workload(256, 2048, 4096, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
"""Its weights take 6 GiB."""

HOLD = """
import sys, torch
wanted = torch.cuda.mem_get_info()[0] - (int(sys.argv[1]) << 20)
held = torch.empty(wanted, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
busy = torch.randn(4096, 4096, device="cuda") if len(sys.argv) > 2 else None
while True:
    if busy is not None:
        busy = (busy @ busy).clamp(-1, 1)
        torch.cuda.synchronize()
    else:
        sys.stdin.read()
        break
"""


@pytest.fixture
def hold():
    """Leave only so many MiB of the card free, as another process would."""
    holders = []

    def fill(mib, *more):
        command = [sys.executable, "-c", HOLD, str(mib), *more]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        holders.append(process)
        return process

    yield fill
    for process in holders:
        process.kill()
        process.wait()
    time.sleep(1)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    tree = find_tree(None, None, tmp_path_factory.mktemp("trees"))
    return Target(read_kernel_source(tree.kernel_source), visible_cards()[0].arch, tmp_path_factory.mktemp("kernels"))


def look(target, folder):
    limit = visible_cards()[0].shared_memory
    with CardRunner(LARGE, target, devices=[0], rows=ROWS, shared_limit=limit, folder=folder, workers=4) as cards:
        requests = [Request(Kernel(projection, faults.GOOD), ROWS) for projection in BOTH]
        return {one.build.kernel.projection: one for one in cards.look(requests)}


def test_times_on_a_nearly_full_card_are_those_of_a_free_one(target, tmp_path, hold, capfd):
    free = look(target, tmp_path)
    assert "experts are used" not in capfd.readouterr().err
    hold(4000)
    began = time.monotonic()
    full = look(target, tmp_path)
    assert time.monotonic() - began < 120
    assert "of 256 experts are used" in capfd.readouterr().err
    for projection, one in full.items():
        assert one.build.outcome is Outcome.OK  # its arithmetic is right, too
        before = {timing.tokens: timing.microseconds for timing in free[projection].timings}
        for timing in one.timings:
            ratio = timing.microseconds / before[timing.tokens]
            print(f"{projection.value} M={timing.tokens}: {ratio:.3f} of the free card's time")
            assert 0.7 < ratio < 1.3


def test_a_full_card_is_refused_at_once(target, tmp_path, hold):
    hold(1200)
    with pytest.raises(CardError, match="MiB are free"):
        look(target, tmp_path)


def test_the_driver_tells_what_holds_the_card(hold):
    process = hold(3000, "busy")
    time.sleep(2)
    found = occupancy(visible_cards()[0])
    assert found.free_mib is not None
    assert found.free_mib < 4000
    assert found.is_busy
    # In a container the driver may hide processes, or number them as the host does.
    print(process.pid, found)
