"""The launch arguments of SGLang's fused MoE kernels, from a workload's shapes alone.

One function gives the arguments for compiling (operands are shapes) and for launching (operands are tensors), so that
what moefix compiles and times is what the server will run, down to Triton's cache key. Source: the call in
`invoke_fused_moe_kernel` (fused_moe_triton_kernels.py of 0.5.17 and 0.5.23; fused_moe.py of 0.4.9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

from fixer.base.errors import SGLangError
from fixer.workload import NumberFormat, Projection, Tile, Workload


class Role(Enum):
    """The tensors that a launch takes."""

    A = "a"
    B = "b"
    C = "c"
    A_SCALE = "a_scale"
    B_SCALE = "b_scale"
    B_ZERO_POINT = "b_zp"
    TOPK_WEIGHTS = "topk_weights"
    SORTED_TOKEN_IDS = "sorted_token_ids"
    EXPERT_IDS = "expert_ids"
    TOKENS_POST_PADDED = "num_tokens_post_padded"


class ElementType(str):
    """An element type as Triton names it, with its size, as PyTorch's types have it."""

    __slots__ = ()

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return _ELEMENT_BYTES[self]


_ELEMENT_BYTES = {
    "fp8e4nv": 1,
    "int8": 1,
    "uint8": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "int32": 4,
}


@dataclass(frozen=True)
class Operand:
    """A contiguous tensor's element type and shape; stands in for it where there is no GPU."""

    element: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> ElementType:
        """The element type under the name that Triton looks for."""
        return ElementType(self.element)

    def stride(self, dimension: int) -> int:
        """Elements from one index to the next along a dimension."""
        return prod(self.shape[dimension % len(self.shape) + 1 :])

    @property
    def bytes(self) -> int:
        """The size of the whole tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def data_ptr() -> int:
        """An address divisible by 16, as PyTorch's allocator gives (Triton compiles for that case)."""
        return 0


@dataclass(frozen=True)
class Product:
    """The matrix product of one projection for one number of tokens.

    Attributes:
        workload, projection: whose.
        tokens: M, tokens of the forward.
        rows: rows of A (M for gate-up, M * top_k for down).
        fan_out: the kernel's `top_k`: how many output rows share one row of A.
        columns: the kernel's N, output columns.
        depth: the kernel's K, the summed dimension.
    """

    workload: Workload
    projection: Projection
    tokens: int

    @property
    def is_up(self) -> bool:
        """Gate-up, not down."""
        return self.projection is Projection.GATE_UP

    @property
    def rows(self) -> int:
        """Rows of A."""
        return self.tokens if self.is_up else self.tokens * self.workload.top_k

    @property
    def fan_out(self) -> int:
        """How many rows of C one row of A feeds."""
        return self.workload.top_k if self.is_up else 1

    @property
    def layer_intermediate(self) -> int:
        """The shard's intermediate size in elements (the file name's N counts packed bytes for 4-bit weights)."""
        packed = self.workload.number_format is NumberFormat.INT4_W4A16
        return self.workload.intermediate * (2 if packed else 1)

    @property
    def columns(self) -> int:
        """Columns of C."""
        if not self.is_up:
            return self.workload.hidden_size
        return self.layer_intermediate * (2 if self.workload.gated else 1)

    @property
    def depth(self) -> int:
        """The summed dimension in elements."""
        return self.workload.hidden_size if self.is_up else self.layer_intermediate

    @property
    def routed(self) -> int:
        """Rows of C: every token once for each of its experts."""
        return self.tokens * self.workload.top_k


def padded_tokens(workload: Workload, tokens: int, block_m: int) -> int:
    """Length of the sorted token list that SGLang allocates (moe_align_block_size.py:74 of 0.5.17)."""
    routed = tokens * workload.top_k
    if routed < workload.experts + 1:
        return routed * block_m
    return routed + (workload.experts + 1) * (block_m - 1)


def operands(product: Product, tile: Tile, sorted_length: int) -> dict[Role, Operand]:
    """The tensors of a launch; `sorted_length` is the length of the sorted token list."""
    workload = product.workload
    experts, columns, depth = workload.experts, product.columns, product.depth
    activation, weight = operand_types(workload)
    blocks = -(-sorted_length // tile.block_m)
    tensors = {
        Role.A: Operand(activation, (product.rows, depth)),
        Role.B: Operand(weight, (experts, columns, depth // 2 if _is_int4(workload) else depth)),
        Role.C: Operand(workload.activation_dtype, (product.tokens, workload.top_k, columns)),
        Role.TOPK_WEIGHTS: Operand("float32", (product.tokens, workload.top_k)),
        Role.SORTED_TOKEN_IDS: Operand("int32", (sorted_length,)),
        Role.EXPERT_IDS: Operand("int32", (blocks,)),
        Role.TOKENS_POST_PADDED: Operand("int32", (1,)),
    }
    tensors.update(_scales(product))
    return tensors


def operand_types(workload: Workload) -> tuple[str, str]:
    """Element types of the activations and of the weights, as Triton names them."""
    match workload.number_format:
        case NumberFormat.FP8_W8A8:
            return "fp8e4nv", "fp8e4nv"
        case NumberFormat.INT8_W8A8:
            return "int8", "int8"
        case NumberFormat.INT8_W8A16 | NumberFormat.INT4_W4A16:
            return workload.activation_dtype, "uint8" if uses_weight_only_kernel(workload) else "int8"
        case NumberFormat.FLOAT32:
            return "float32", "float32"
        case NumberFormat.NONE:
            return workload.activation_dtype, workload.activation_dtype


def _is_int4(workload: Workload) -> bool:
    return workload.number_format is NumberFormat.INT4_W4A16


def uses_weight_only_kernel(workload: Workload) -> bool:
    """Grouped 4-bit and 8-bit weights have a kernel of their own, `fused_moe_kernel_gptq_awq`."""
    weight_only = workload.number_format in (NumberFormat.INT4_W4A16, NumberFormat.INT8_W8A16)
    return weight_only and workload.group_size > 0


def kernel_name(workload: Workload) -> str:
    """The `@triton.jit` function that this workload runs."""
    return "fused_moe_kernel_gptq_awq" if uses_weight_only_kernel(workload) else "fused_moe_kernel"


def _scales(product: Product) -> dict[Role, Operand]:
    workload, experts = product.workload, product.workload.experts
    columns, depth = product.columns, product.depth
    if uses_weight_only_kernel(workload):
        groups = -(-depth // workload.group_size)
        scales = {Role.B_SCALE: Operand(workload.activation_dtype, (experts, columns, groups))}
        if workload.has_zero_points:
            packed = columns // 2 if _is_int4(workload) else columns
            scales[Role.B_ZERO_POINT] = Operand("uint8", (experts, packed, groups))
        return scales
    match workload.number_format:
        case NumberFormat.NONE | NumberFormat.FLOAT32:
            return {}
        case NumberFormat.INT8_W8A16:
            return {Role.B_SCALE: Operand(workload.activation_dtype, (experts, columns))}
    if workload.block_shape is not None:
        block_n, block_k = workload.block_shape
        return {
            Role.A_SCALE: Operand("float32", (product.rows, -(-depth // block_k))),
            Role.B_SCALE: Operand("float32", (experts, -(-columns // block_n), -(-depth // block_k))),
        }
    if workload.per_channel_quant:
        return {
            Role.A_SCALE: Operand("float32", (product.rows, 1)),
            Role.B_SCALE: Operand("float32", (experts, columns, 1)),
        }
    return {Role.A_SCALE: Operand("float32", (1,)), Role.B_SCALE: Operand("float32", (experts,))}


@dataclass(frozen=True)
class LaunchContext:
    """What else the arguments depend on.

    Attributes:
        arch: the card's architecture as Triton counts it (89, 90, 120).
        compute_type: `tl.bfloat16` or `tl.float16`, given by the caller so that this module needs no Triton.
        descriptors: the tensor descriptors of A and B where the tile asks for TMA, else None.
        valid_tokens: the kernel's `num_valid_tokens`; None for M * top_k.
        swap_ab: SGLang swaps the operands of an FP8 launch of this tile (Hopper's wide instruction wants 64 rows).
        sorted_output: C's rows lie in the sorted order, for a down kernel that reads them through a descriptor.
    """

    arch: int
    compute_type: Any
    descriptors: tuple[Any, Any] | None = None
    valid_tokens: int | None = None
    swap_ab: bool = False
    sorted_output: bool = False


def launch_arguments(
    parameters: Sequence[str], product: Product, tile: Tile, tensors: Mapping[Role, Any], context: LaunchContext
) -> dict[str, Any]:
    """Every argument of a launch by the kernel's parameter name, `num_warps` and `num_stages` included.

    Args:
        parameters: the kernel's own parameter names, from its source.
        tensors: what `operands` names, as `Operand` or as tensors of the same shape.

    Raises:
        SGLangError: the kernel has a parameter that moefix does not know; the message names it.
    """
    build = _weight_only_arguments if uses_weight_only_kernel(product.workload) else _fused_arguments
    known = build(product, tile, tensors, context)
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise SGLangError(
            f"SGLang's {kernel_name(product.workload)} has an argument that moefix does not know: "
            f"{', '.join(unknown)}.",
            "This SGLang is newer than moefix: use a tested release (README), or a newer moefix.",
        )
    arguments = {name: known[name] for name in parameters}
    if "USE_GDC" in parameters and context.arch >= 90:
        arguments |= {"USE_GDC": True, "GDC_EARLY": product.rows <= 512, "launch_pdl": True}
    return arguments | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _tile_arguments(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_SIZE_M": tile.block_m,
        "BLOCK_SIZE_N": tile.block_n,
        "BLOCK_SIZE_K": tile.block_k,
        "GROUP_SIZE_M": tile.group_m,
    }


def _common_arguments(
    product: Product, tile: Tile, tensors: Mapping[Role, Any], context: LaunchContext
) -> dict[str, Any]:
    a, b, c = tensors[Role.A], tensors[Role.B], tensors[Role.C]
    routed = product.routed if context.valid_tokens is None else context.valid_tokens
    return {
        "a_ptr": a,
        "b_ptr": b,
        "c_ptr": c,
        "b_scale_ptr": tensors.get(Role.B_SCALE),
        "topk_weights_ptr": tensors[Role.TOPK_WEIGHTS],
        "sorted_token_ids_ptr": tensors[Role.SORTED_TOKEN_IDS],
        "expert_ids_ptr": tensors[Role.EXPERT_IDS],
        "num_tokens_post_padded_ptr": tensors[Role.TOKENS_POST_PADDED],
        "N": product.columns,
        "K": product.depth,
        "EM": tensors[Role.SORTED_TOKEN_IDS].shape[0],
        "num_valid_tokens": routed,
        "stride_am": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_be": b.stride(0),
        "stride_bk": b.stride(2),
        "stride_bn": b.stride(1),
        "stride_cm": c.stride(-2),
        "stride_cn": c.stride(-1),
        "MUL_ROUTED_WEIGHT": not product.is_up,
        "top_k": product.fan_out,
        "compute_type": context.compute_type,
        # SGLang looks at the stored width there, which for packed 4-bit weights is half the depth.
        "even_Ks": b.shape[2] % tile.block_k == 0,
        # Only expert parallelism leaves tokens whose expert is elsewhere (moe_runner/triton.py:124).
        "filter_expert": product.workload.ep_size > 1,
        **_tile_arguments(tile),
    }


def _fused_arguments(
    product: Product, tile: Tile, tensors: Mapping[Role, Any], context: LaunchContext
) -> dict[str, Any]:
    workload = product.workload
    is_fp8 = workload.number_format is NumberFormat.FP8_W8A8
    a_scale, b_scale = tensors.get(Role.A_SCALE), tensors.get(Role.B_SCALE)
    a_descriptor, b_descriptor = context.descriptors or (None, None)
    group_n, group_k = workload.block_shape or (0, 0)
    return {
        **_common_arguments(product, tile, tensors, context),
        "a_desc": a_descriptor,
        "b_desc": b_descriptor,
        "bias_ptr": None,
        "a_scale_ptr": a_scale,
        "add_mask_ptr": None,
        "stride_bias_e": 0,
        "stride_bias_n": 0,
        "stride_asm": _stride(a_scale, 2, 0),
        "stride_ask": _stride(a_scale, 2, 1),
        "stride_bse": _stride(b_scale, 2, 0),
        "stride_bsk": _stride(b_scale, 3, 2),
        "stride_bsn": _stride(b_scale, 2, 1),
        "group_n": group_n,
        "group_k": group_k,
        "use_fp8_w8a8": is_fp8,
        "use_int8_w8a8": workload.number_format is NumberFormat.INT8_W8A8,
        "use_int8_w8a16": workload.number_format is NumberFormat.INT8_W8A16,
        "per_channel_quant": workload.per_channel_quant,
        "c_sorted": context.sorted_output,
        "swap_ab": is_fp8 and context.swap_ab,
        "FUSE_ADD_TO_OUTPUT": False,
        "MASK_OUTPUT": False,
        "FUSE_SUM_ALL_REDUCE": False,
        "LORA_PRESERVE_BASE": False,
        "ROUTER_TOPK": 1 if product.is_up else workload.top_k,
        "FUSE_SWIGLU": False,
        "USE_GDC": False,
        "GDC_EARLY": False,
        "A_OUTPUT_SLICES": 1,
        "A_OUTPUT_SLICE_WIDTH": 0,
        "A_OUTPUT_SLICE_K": 0,
    }


def _weight_only_arguments(
    product: Product, tile: Tile, tensors: Mapping[Role, Any], context: LaunchContext
) -> dict[str, Any]:
    workload = product.workload
    b_scale, zero_points = tensors[Role.B_SCALE], tensors.get(Role.B_ZERO_POINT)
    return {
        **_common_arguments(product, tile, tensors, context),
        "b_zp_ptr": zero_points,
        "stride_bse": b_scale.stride(0),
        "stride_bsk": b_scale.stride(2),
        "stride_bsn": b_scale.stride(1),
        "stride_bze": _stride(zero_points, 3, 0),
        "stride_bzk": _stride(zero_points, 3, 2),
        "stride_bzn": _stride(zero_points, 3, 1),
        "group_size": workload.group_size,
        "has_zp": zero_points is not None,
        "use_int4_w4a16": _is_int4(workload),
        "use_int8_w8a16": workload.number_format is NumberFormat.INT8_W8A16,
    }


def _stride(tensor: Any, least_dimensions: int, dimension: int) -> int:
    """SGLang passes 0 for the strides of a scale that lacks the dimension."""
    if tensor is None or len(tensor.shape) < least_dimensions:
        return 0
    return int(tensor.stride(dimension))
