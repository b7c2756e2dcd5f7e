"""A measuring process that goes wrong for chosen kernels, on a real card."""

from __future__ import annotations

from typing import Any

import torch

from fixer.families.fused_moe.arguments import Role
from fixer.machine.worker import Handler
from fixer.tuning.measure import card_bench as bench_module
from fixer.tuning.measure.card_bench import Bench, Loaded
from fixer.tuning.measure.clock import Call
from fixer.tuning.measure.requests import LookAt, Setup, measuring_handler
from fixer.workload import Tile

GOOD = Tile(16, 64, 128, 1, 4, 3)
STICKY = Tile(16, 32, 128, 1, 4, 3)
HANGS = Tile(32, 32, 128, 1, 4, 3)
WRONG = Tile(32, 64, 128, 1, 4, 3)
LAST = Tile(64, 64, 128, 1, 4, 3)


class FaultyBench(Bench):
    """Spoils the result of one tile."""

    def _launcher(self, loaded: Loaded, tokens: int, tensors: Any) -> Any:
        launch = super()._launcher(loaded, tokens, tensors)
        if loaded.kernel.tile != WRONG:
            return launch

        def spoiled() -> None:
            launch()
            tensors[Role.C].mul_(1.5)

        return Call(spoiled, ())


def faulty_handler(setup: Setup) -> Handler:
    """As `measuring_handler`, but one tile breaks the CUDA context and one never ends."""
    bench_module.Bench = FaultyBench  # type: ignore[misc]
    handle = measuring_handler(setup)

    def faulty(request: Any) -> Any:
        tile = request.kernel.tile if isinstance(request, LookAt) else None
        if tile == STICKY:
            torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")]
            torch.cuda.synchronize()  # the device-side assertion surfaces here and stays
        if tile == HANGS:
            torch.cuda._sleep(1 << 50)
            torch.cuda.synchronize()
        return handle(request)

    return faulty
