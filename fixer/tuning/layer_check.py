"""Whether SGLang's layer computes the right numbers with a pair of configurations. Needs PyTorch, on any device.

A layer that is fast and wrong has cost people servers (rows that gave NaN at M = 1 and 2), so each row of the ladder
is checked at its own M: the two sides against one another in full, and both against a float32 reference for the
tokens in which they differ most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fixer.tuning.measure.tensors import Layer, expert_weights, relative_error
from fixer.workload import NumberFormat

MOST_APART = 0.02
"""Relative Frobenius norm between two sides' outputs. Right pairs come to 0.002; quantised ones to 0.007, since a last
bit of the first product flips a step of the second's activations."""

MOST_OFF = {NumberFormat.FP8_W8A8: 0.12, NumberFormat.INT8_W8A8: 0.06}
"""The same between a side and the reference, which does not quantise activations: a number of 3 mantissa bits is off
by 2.6 % (root mean square), twice in a row, through a product of gate and up."""

SAMPLE = 4
"""Tokens of a row that are held against the reference."""


@dataclass(frozen=True)
class LayerInputs:
    """What one forward of the layer reads.

    Attributes:
        hidden: [tokens, hidden_size].
        topk_ids: int32 [tokens, top_k], -1 where the expert is on another rank.
        topk_weights: float32 [tokens, top_k].
        turn: which copy of the weights it reads.
    """

    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    turn: int


def most_off(number_format: NumberFormat) -> float:
    """The largest relative error against the reference that a right layer can have."""
    return MOST_OFF.get(number_format, MOST_APART)


def layer_reference(up: Layer, down: Layer, inputs: LayerInputs, tokens: torch.Tensor) -> torch.Tensor:
    """What the layer must compute for some of its tokens, in float32: [len(tokens), hidden_size].

    Args:
        up, down: the projections' weights and scales.
        tokens: int64, which rows of `inputs`.
    """
    hidden, chosen = inputs.hidden[tokens].float(), inputs.topk_ids[tokens].long()
    weights = inputs.topk_weights[tokens].float()
    out = torch.zeros(len(tokens), down.product.columns, device=hidden.device)
    for expert in chosen[chosen >= 0].unique().tolist():  # one on another rank adds nothing here
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        both = hidden[rows] @ expert_weights(up, expert, inputs.turn).T
        product = _activated(both, gated=up.product.workload.gated) @ expert_weights(down, expert, inputs.turn).T
        out.index_add_(0, rows, product * weights[rows, place][:, None])
    return out


def _activated(both: torch.Tensor, *, gated: bool) -> torch.Tensor:
    if not gated:
        return both.relu().square()
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def sample_of(ours: torch.Tensor, other: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """The tokens to hold against the reference: those in which two sides differ most, the last one, and random ones.

    Args:
        ours, other: [tokens, hidden_size]; `other` is None where there is one side only.

    Returns:
        int64, each token once.
    """
    count = len(ours)
    worst = torch.empty(0, dtype=torch.int64, device=ours.device)
    if other is not None:
        apart = (ours.float() - other.float()).norm(dim=1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        worst = apart.topk(min(SAMPLE // 2, count)).indices
    last = torch.tensor([count - 1], device=ours.device)
    chance = torch.randint(count, (SAMPLE,), generator=generator, device=ours.device)
    picked = list(dict.fromkeys(torch.cat([worst, last, chance]).tolist()))[:SAMPLE]
    return torch.tensor(picked, device=ours.device)


def wrong_by(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of an output that should be `expected`; infinite where it is not finite."""
    return relative_error(out, expected.float()) if bool(out.isfinite().all()) else float("inf")


@contextmanager
def poisoned(module: Any = torch) -> Iterator[None]:
    """Have every buffer that is allocated without a value hold NaN within the `with` statement.

    What a kernel leaves out, or reads beyond what was written, then shows. Bytes of 0xFF are NaN in every float type.
    Integers stay as they come: SGLang leaves list entries unwritten that nothing reads.
    """
    plain = {name: getattr(module, name) for name in ("empty", "empty_like")}

    def spoiled(make: Any) -> Any:
        def spoil(*args: Any, **options: Any) -> Any:
            tensor = make(*args, **options)
            if tensor.is_floating_point() and tensor.dim() and tensor.numel() and tensor.is_contiguous():
                tensor.view(torch.uint8).fill_(0xFF)
            return tensor

        return spoil

    try:
        for name, make in plain.items():
            setattr(module, name, spoiled(make))
        yield
    finally:
        for name, make in plain.items():
            setattr(module, name, make)
