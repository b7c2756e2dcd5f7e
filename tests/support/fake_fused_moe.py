"""A SGLang package whose fused MoE layer is a few lines of PyTorch, and a clock that needs no card.

The layer looks its configuration up as SGLang's does, works in place, and allocates its result with torch.empty.
Tiles misbehave by their GROUP_SIZE_M: see `LAYER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fixer.tuning.measure.clock import Call, Graph

RIGHT, CRASHES, WRONG, LEAVES_OUT, LAST_TOKEN, SLOW = 1, 2, 3, 4, 5, 16
"""GROUP_SIZE_M of a tile that is right; raises; is 30 % off; leaves out one row; is wrong for the last token; is right
and slow."""

LAYER = """
import torch

def try_get_optimal_moe_config(*args, return_down_config=False, **kwargs):
    raise AssertionError("the look-up is replaced")

def fused_experts_impl(hidden_states, w1, w2, topk_weights, topk_ids, b1=None, b2=None, inplace=False,
                       activation="silu", w1_scale=None, w2_scale=None, filter_expert=True):
    config, (down, _) = try_get_optimal_moe_config(return_down_config=True)
    group = config["GROUP_SIZE_M"]
    if group == 2:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    assert inplace
    out = torch.empty(hidden_states.shape, dtype=torch.float32)
    written = torch.zeros(hidden_states.shape)
    for token in range(len(hidden_states)):
        for place, expert in enumerate(topk_ids[token].tolist()):
            if expert >= 0:
                gate, up = (hidden_states[token].float() @ w1[expert].float().T).chunk(2)
                product = (torch.nn.functional.silu(gate) * up) @ w2[expert].float().T
                written[token] += product * topk_weights[token, place]
    out.copy_(written)
    if group == 3:
        out *= 1.3
    if group == 4:
        out[0] = torch.empty(out.shape[1])
    if group == 5:
        out[-1] = 7.0
    hidden_states.copy_(out)
    return hidden_states
"""


def package(folder: Path) -> Path:
    """The package's folder, with the layer where SGLang 0.5.17 has it."""
    home = folder / "sglang"
    inner = home / "srt" / "layers" / "moe" / "moe_runner" / "triton_utils"
    inner.mkdir(parents=True)
    path = inner
    while path != folder:
        (path / "__init__.py").touch()
        path = path.parent
    (inner / "fused_moe.py").write_text(LAYER)
    return home


def forget() -> None:
    """Have the next import find another package."""
    for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
        del sys.modules[name]


class PlainClock:
    """Runs calls at once. A replay computes everything anew from the calls, as a card does from addresses."""

    def run(self, call: Call):
        return call()

    def capture(self, calls) -> Graph:
        return Graph(None, tuple(calls), tuple(call() for call in calls))

    def replay(self, graphs, rounds):
        for graph in graphs:
            for call, result in zip(graph.calls, graph.results, strict=True):
                result.copy_(call())
        slow = [any(tile.group_m == SLOW for tile in graph.calls[0].inputs[0]) for graph in graphs]
        return [[(200.0 if late else 100.0) * (1 + turn % 3 / 1e4) for turn in range(rounds)] for late in slow]


CPU = torch.device("cpu")
