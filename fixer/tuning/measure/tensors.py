"""The tensors of a launch, the routing of tokens to experts, and a float32 reference. Needs PyTorch, on any device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fixer.families.fused_moe.arguments import Operand, Product, Role
from fixer.families.fused_moe.routing import Routing, popularity
from fixer.tuning.measure.memory import layer_operands
from fixer.workload import NumberFormat, Workload

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "fp8e4nv": torch.float8_e4m3fn,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
}


def choose_experts(routing: Routing, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct experts for each token, drawn without replacement by the Gumbel trick: int32 [tokens, top_k]."""
    device = generator.device
    weights = torch.tensor(popularity(routing, experts, top_k), device=device)
    shuffled = weights[torch.randperm(experts, generator=generator, device=device)]
    uniform = torch.rand(tokens, experts, generator=generator, device=device).clamp_min(1e-20)
    return (shuffled.log() - (-uniform.log()).log()).topk(top_k, dim=1).indices.to(torch.int32)


def route(routing: Routing, tokens: int, workload: Workload, generator: torch.Generator) -> torch.Tensor:
    """What one rank sees of the tokens' choices: int32 [tokens, top_k], -1 where the expert is on another rank."""
    chosen = choose_experts(routing, tokens, workload.experts * workload.ep_size, workload.top_k, generator)
    return chosen.masked_fill_(chosen >= workload.experts, -1)


@dataclass(frozen=True)
class Aligned:
    """Tokens sorted by expert and padded to whole blocks, as SGLang's moe_align_block_size lays them out.

    Attributes:
        sorted_token_ids: int32 [length]: positions in the flattened [tokens, top_k] choice; padding is tokens * top_k.
        expert_ids: int32 [length / block_m]: each block's expert; -1, in the first blocks, for those elsewhere.
        tokens_post_padded: int32 [1]: how much of the list is used.
    """

    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    tokens_post_padded: torch.Tensor


def align(chosen: torch.Tensor, block_m: int, experts: int, length: int) -> Aligned:
    """Sort the choices by expert, pad each expert's to a multiple of `block_m`, in a list of `length` entries."""
    flat = chosen.flatten().long() + 1  # as SGLang does: the first bucket is of the experts on other ranks
    device, routed = flat.device, flat.numel()
    counts = torch.bincount(flat, minlength=experts + 1)
    padded = (counts + block_m - 1) // block_m * block_m
    ends = padded.cumsum(0)
    order = flat.argsort(stable=True)
    rank = torch.arange(routed, device=device) - (counts.cumsum(0) - counts)[flat[order]]
    sorted_ids = torch.full((length,), routed, dtype=torch.int32, device=device)
    sorted_ids[(ends - padded)[flat[order]] + rank] = order.to(torch.int32)
    starts = torch.arange(0, length, block_m, device=device)
    expert_ids = (torch.bucketize(starts, ends, right=True).clamp_max(experts) - 1).to(torch.int32)
    return Aligned(sorted_ids, expert_ids, ends[-1:].to(torch.int32))


def random_tensor(operand: Operand, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """A tensor of an operand's type and shape, filled piece by piece (a float32 copy of all experts may not fit)."""
    dtype = TORCH_TYPES[operand.dtype]
    out = torch.empty(operand.shape, dtype=dtype, device=generator.device)
    pieces = out.flatten().split(1 << 26)
    for piece in pieces:
        if dtype in (torch.int8, torch.uint8):
            low, high = (-127, 128) if dtype is torch.int8 else (0, 256)
            piece.copy_(torch.randint(low, high, piece.shape, generator=generator, device=generator.device))
        else:
            values = torch.randn(piece.shape, generator=generator, device=generator.device)
            piece.copy_((values * scale).to(dtype))
    return out


def random_scale(operand: Operand, generator: torch.Generator) -> torch.Tensor:
    """Scales between 0.5 and 1.5, small enough that no product overflows bfloat16."""
    values = torch.rand(operand.shape, generator=generator, device=generator.device) + 0.5
    return (values * 0.02).to(TORCH_TYPES[operand.dtype])


@dataclass(frozen=True)
class Layer:
    """One projection's weights and activations for up to a number of tokens.

    Attributes:
        weights: B, a copy for each turn (consecutive launches use different copies, so that weights are cold). Where
            it has fewer experts than the workload, expert e reads those of e modulo their number (`room.Rotation`).
        tensors: all other operands, with room for `tokens`.
        in_order: A and its scales in the sorted order, padding included, for kernels that load A through a descriptor.
    """

    product: Product
    weights: tuple[torch.Tensor, ...]
    tensors: Mapping[Role, torch.Tensor]
    in_order: Mapping[Role, torch.Tensor] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """How many experts have weights of their own."""
        return len(self.weights[0])

    def launch_tensors(self, tokens: int, aligned: Aligned, turn: int, *, in_order: bool = False) -> dict[Role, Any]:
        """The operands of one launch for M = `tokens`: views of the first rows.

        Args:
            in_order: A's rows are those of the sorted list.
        """
        product = Product(self.product.workload, self.product.projection, tokens)
        rows = {Role.A: product.rows, Role.C: tokens, Role.A_SCALE: product.rows, Role.TOPK_WEIGHTS: tokens}
        views = {}
        for role, tensor in self.tensors.items():
            per_row = role in rows and tensor.shape[0] == self._room(role)
            views[role] = tensor[: rows[role]] if per_row else tensor
        if in_order:
            views |= {role: tensor[: len(aligned.sorted_token_ids)] for role, tensor in self.in_order.items()}
        return views | {
            Role.B: self.weights[turn % len(self.weights)],
            Role.SORTED_TOKEN_IDS: aligned.sorted_token_ids,
            Role.EXPERT_IDS: self._weights_of(aligned.expert_ids),
            Role.TOKENS_POST_PADDED: aligned.tokens_post_padded,
        }

    def sorted_as(self, aligned: Aligned) -> Layer:
        """The same layer with A's rows where the sorted list has them, and NaN where it has padding."""
        rows = aligned.sorted_token_ids.long()
        real = (rows < self.product.rows).nonzero().flatten()
        in_order = {}
        for role in self.in_order:
            plain = self.tensors[role].view(torch.uint8)  # bytes of 0xFF are NaN in every float type
            padded = torch.full((len(rows), *plain.shape[1:]), 0xFF, dtype=torch.uint8, device=rows.device)
            padded[real] = plain[rows[real]]
            in_order[role] = padded.view(self.tensors[role].dtype)
        return replace(self, in_order=in_order)

    def _weights_of(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """Whose weights each block reads; -1 stays."""
        if self.experts == self.product.workload.experts:
            return expert_ids
        return torch.where(expert_ids < 0, expert_ids, expert_ids % self.experts)

    def _room(self, role: Role) -> int:
        return self.product.rows if role in (Role.A, Role.A_SCALE) else self.product.tokens


def make_layer(
    product: Product, copies: int, generator: torch.Generator, experts: int | None = None, sorted_rows: int = 0
) -> Layer:
    """Random operands for a projection, with room for `product.tokens` tokens.

    Args:
        experts: so many have weights (None: all).
        sorted_rows: the length of the longest sorted list for which A is needed in that order; 0 for none.
    """
    shapes = layer_operands(product, experts or product.workload.experts)
    tensors: dict[Role, torch.Tensor] = {}
    for role, operand in shapes.items():
        if role in (Role.SORTED_TOKEN_IDS, Role.EXPERT_IDS, Role.TOKENS_POST_PADDED, Role.B):
            continue
        if role in (Role.A_SCALE, Role.B_SCALE):
            tensors[role] = random_scale(operand, generator)
        elif role is Role.TOPK_WEIGHTS:
            tensors[role] = torch.rand(operand.shape, generator=generator, device=generator.device)
        else:
            tensors[role] = random_tensor(operand, generator)
    spread = 1.0 if product.workload.number_format is not NumberFormat.NONE else 0.05
    weights = tuple(random_tensor(shapes[Role.B], generator, spread) for _ in range(copies))
    return Layer(product, weights, tensors, _in_order(shapes, sorted_rows, generator) if sorted_rows else {})


def _in_order(shapes: Mapping[Role, Operand], rows: int, generator: torch.Generator) -> dict[Role, torch.Tensor]:
    """A and its scales with a row for each entry of the sorted list (only block-wise scales have rows there)."""
    tensors = {}
    for role, make in ((Role.A, random_tensor), (Role.A_SCALE, random_scale)):
        if role in shapes:
            tensors[role] = make(replace(shapes[role], shape=(rows, *shapes[role].shape[1:])), generator)
    return tensors


def reference(layer: Layer, chosen: torch.Tensor) -> torch.Tensor:
    """What the kernel must compute, in float32: [tokens, top_k, columns].

    Source: the kernel's documented arithmetic; scales are applied to float32 copies of both operands.
    """
    product, workload = layer.product, layer.product.workload
    tokens = chosen.shape[0]
    flat = chosen.flatten().long()
    a = _activations(layer, Product(workload, product.projection, tokens))
    a = a.repeat_interleave(product.fan_out, dim=0) if product.is_up else a
    out = torch.zeros(tokens * workload.top_k, product.columns, device=a.device)
    for expert in flat[flat >= 0].unique().tolist():  # an expert on another rank leaves zeros
        rows = (flat == expert).nonzero().flatten()
        out[rows] = a[rows] @ expert_weights(layer, expert).T
    if not product.is_up:
        out *= layer.tensors[Role.TOPK_WEIGHTS][:tokens].flatten()[:, None]
    return out.view(tokens, workload.top_k, product.columns)


def _activations(layer: Layer, product: Product) -> torch.Tensor:
    a = layer.tensors[Role.A][: product.rows].float()
    scale = layer.tensors.get(Role.A_SCALE)
    if scale is None:
        return a
    if scale.dim() == 1:
        return a * scale
    block_shape = product.workload.block_shape
    scale = scale[: product.rows]
    return a * (scale if block_shape is None else _spread(scale, 1, block_shape[1], product.depth))


def expert_weights(layer: Layer, expert: int, turn: int = 0) -> torch.Tensor:
    """One expert's weights in float32: [columns, depth]; `turn` says which copy of them."""
    product, workload = layer.product, layer.product.workload
    expert %= layer.experts
    stored, scale = layer.weights[turn % len(layer.weights)][expert], layer.tensors.get(Role.B_SCALE)
    if scale is None:
        return stored.float()
    scale = scale[expert].float()
    if workload.group_size:
        return _grouped_weights(layer, stored, scale, expert)
    if workload.block_shape is not None:
        block_n, block_k = workload.block_shape
        scale = _spread(_spread(scale, 0, block_n, product.columns), 1, block_k, product.depth)
    elif workload.number_format is NumberFormat.INT8_W8A16:
        scale = scale[:, None]
    return stored.float() * scale


def _grouped_weights(layer: Layer, stored: torch.Tensor, scale: torch.Tensor, expert: int) -> torch.Tensor:
    """Weight-only formats: integers less their zero point, times their group's scale."""
    product, group = layer.product, layer.product.workload.group_size
    zero_points = layer.tensors.get(Role.B_ZERO_POINT)
    is_int4 = product.workload.number_format is NumberFormat.INT4_W4A16
    zero: torch.Tensor | float = 8.0 if is_int4 else 128.0
    values = _nibbles(stored, 1) if is_int4 else stored
    if zero_points is not None:
        zero = _nibbles(zero_points[expert], 0) if is_int4 else zero_points[expert]
        zero = _spread(zero.float(), 1, group, product.depth)
    return (values.float() - zero) * _spread(scale, 1, group, product.depth)


def _nibbles(packed: torch.Tensor, dimension: int) -> torch.Tensor:
    """Two 4-bit numbers a byte, the lower one first, along a dimension."""
    return torch.stack([packed & 0xF, packed >> 4], dim=dimension + 1).flatten(dimension, dimension + 1)


def _spread(scale: torch.Tensor, dimension: int, block: int, size: int) -> torch.Tensor:
    """Repeat each block's scale over the block's elements."""
    return scale.repeat_interleave(block, dim=dimension).narrow(dimension, 0, size)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference over that of the reference; NaN counts as infinitely wrong."""
    error = ((out.float() - expected).norm() / expected.norm()).item()
    return float("inf") if math.isnan(error) else error


def l2_bytes(device: torch.device) -> int:
    """The size of a card's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
