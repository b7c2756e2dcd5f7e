"""Stands in for the process that has SGLang's layer on a card. Imported by name in that process."""

from __future__ import annotations

import json
import os
import signal
from zlib import crc32

from fixer.base.errors import TuneError
from fixer.tuning.duel import Duel, DuelRequest, Via
from fixer.workload import RowTiles

LOG, FAULTS = "FAKE_LAYER_LOG", "FAKE_LAYER_FAULTS"
"""Environment variables: where each request is written; JSON: M to a fault.

Faults: "crash", "error"; "own" and "tuned": that side does not fit the card's shared memory."""


def layer(fast: int):
    """A handler for which tiles of that BLOCK_SIZE_M take a tenth less time at M of 64 and more."""
    faults = json.loads(os.environ.get(FAULTS, "{}"))

    def microseconds(tokens: int, pair: RowTiles) -> float:
        gain = 0.9 if tokens >= 64 and pair.gate_up.block_m == fast else 1.0
        return (20 + tokens / 4) * gain

    def times(tokens: int, pair: RowTiles) -> tuple[float, ...]:
        base = microseconds(tokens, pair)
        return tuple(base * (1 + crc32(f"{tokens} {turn}".encode()) % 100 / 1e5) for turn in range(9))

    def handle(request: DuelRequest) -> Duel:
        blocks = [pair.gate_up.block_m if pair else None for pair in (request.own, request.tuned)]
        with open(os.environ[LOG], "a") as log:
            log.write(f"{request.tokens} {blocks[0]} {blocks[1]}\n")
        fault = faults.get(str(request.tokens))
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "error":
            raise TuneError("SGLang's layer failed: RuntimeError: no luck")
        if fault == "tuned" or (fault == "own" and request.own is not None):
            raise TuneError("SGLang's layer failed: OutOfResources: out of resource: shared memory")
        own = times(request.tokens, request.own) if request.own is not None else ()
        return Duel(request.tokens, Via.LAYER, own, times(request.tokens, request.tuned))

    return handle


def missing():
    """A factory of a process in which SGLang cannot be imported."""
    raise TuneError("SGLang's own MoE layer cannot be called here: no module")
