from __future__ import annotations

import ast
import functools
import inspect
import itertools
import types
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixer.base.errors import SGLangError
from fixer.families.fused_moe.arguments import (
    LaunchContext,
    Operand,
    Product,
    Role,
    kernel_name,
    launch_arguments,
    operand_types,
    operands,
    padded_tokens,
    uses_weight_only_kernel,
)
from fixer.kernel.compile import Target, swaps_operands
from fixer.kernel.source import read_kernel_source
from fixer.sglang.releases import KNOWN_RELEASES, RELEASES
from fixer.tuning.measure.tensors import TORCH_TYPES
from fixer.workload import BOTH, NumberFormat, Projection, Tile, Workload

UP, DOWN = Projection.GATE_UP, Projection.DOWN
TILE = Tile(16, 64, 32, 8, 4, 3)
BF16 = Workload(8, 96, 160, 2)

WORKLOADS = {
    "bf16": BF16,
    "fp16-ungated": replace(BF16, activation_dtype="float16", gated=False),
    "bf16-ep": replace(BF16, ep_size=2),
    "fp8-tensor": replace(BF16, number_format=NumberFormat.FP8_W8A8),
    "fp8-channel": replace(BF16, number_format=NumberFormat.FP8_W8A8, per_channel_quant=True),
    "fp8-block": replace(BF16, number_format=NumberFormat.FP8_W8A8, block_shape=(32, 64)),
    "int8-channel": replace(BF16, number_format=NumberFormat.INT8_W8A8, per_channel_quant=True),
    "int8-block": replace(BF16, number_format=NumberFormat.INT8_W8A8, block_shape=(32, 64)),
    "int8-weights-channel": replace(BF16, number_format=NumberFormat.INT8_W8A16),
    "int8-weights": replace(BF16, number_format=NumberFormat.INT8_W8A16, group_size=32),
    "int8-weights-zero": replace(BF16, number_format=NumberFormat.INT8_W8A16, group_size=32, has_zero_points=True),
    "int4": replace(BF16, number_format=NumberFormat.INT4_W4A16, intermediate=48, group_size=32),
    "int4-zero": replace(
        BF16, number_format=NumberFormat.INT4_W4A16, intermediate=48, group_size=32, has_zero_points=True
    ),
}


# --- SGLang's own call, run with kernels that only note what they are given


@dataclass
class Noted:
    """Stands in for a kernel: `kernel[grid](...)` notes the arguments by name."""

    parameters: list[ast.arg]
    defaults: dict[str, Any]
    arguments: dict[str, Any] | None = None

    def __getitem__(self, grid):
        def launch(*values, **named):
            names = [parameter.arg for parameter in self.parameters]
            self.arguments = self.defaults | dict(zip(names, values, strict=False)) | named

        return launch


def noted_kernels(functions):
    kernels = {}
    for name in ("fused_moe_kernel", "fused_moe_kernel_gptq_awq"):
        arguments = functions[name].args
        with_default = arguments.args[len(arguments.args) - len(arguments.defaults) :]
        defaults = {
            argument.arg: ast.literal_eval(value)
            for argument, value in zip(with_default, arguments.defaults, strict=True)
        }
        kernels[name] = Noted(arguments.args, defaults)
    return kernels


@functools.lru_cache(maxsize=2)
def functions_of(path):
    return {node.name: node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


def sglang_arguments(tree, workload, projection, tokens, tile, arch, card=""):
    """What SGLang's `invoke_fused_moe_kernel` passes for real tensors: (arguments by name, tensors, kernel's names)."""
    functions = functions_of(tree.kernel_source)
    wanted = [functions[name] for name in ("should_enable_swap_ab", "invoke_fused_moe_kernel") if name in functions]
    kernels = noted_kernels(functions)
    tensors = real_tensors(Product(workload, projection, tokens), tile)
    quantised = tensors[Role.A], tensors.get(Role.A_SCALE)

    def quantise(*args, **kwargs):
        return quantised

    namespace: dict[str, Any] = {
        **kernels,
        "functools": functools,
        "torch": torch,
        "tl": types.SimpleNamespace(float16="float16", bfloat16="bfloat16"),
        "triton": types.SimpleNamespace(cdiv=lambda size, block: -(-size // block)),
        "padding_size": 0,
        "_is_cuda": True,
        "is_sm90_supported": lambda: arch == 90,
        "get_device_name": lambda: card,
        "is_batch_invariant_mode_enabled": lambda: False,
        "is_arch_support_pdl": lambda: arch >= 90,
        "scaled_fp8_quant": quantise,
        "sglang_per_token_group_quant_fp8": quantise,
        "sglang_per_token_group_quant_int8": quantise,
        "per_token_quant_int8": quantise,
    }
    source = "from __future__ import annotations\n" + "\n\n".join(ast.unparse(node) for node in wanted)
    exec(compile(source, str(tree.kernel_source), "exec"), namespace)
    is_weight_only = uses_weight_only_kernel(workload)
    group_shape = (0, workload.group_size) if is_weight_only else None
    given_arguments = {
        "A": tensors[Role.A],
        "B": tensors[Role.B],
        "bias": None,
        "C": tensors[Role.C],
        "A_scale": tensors.get(Role.A_SCALE),
        "B_scale": tensors.get(Role.B_SCALE),
        "B_zp": tensors.get(Role.B_ZERO_POINT),
        "topk_weights": tensors[Role.TOPK_WEIGHTS],
        "topk_ids": torch.empty(tokens, workload.top_k, dtype=torch.int32),
        "sorted_token_ids": tensors[Role.SORTED_TOKEN_IDS],
        "expert_ids": tensors[Role.EXPERT_IDS],
        "num_tokens_post_padded": tensors[Role.TOKENS_POST_PADDED],
        "mul_routed_weight": projection is DOWN,
        "top_k": workload.top_k if projection is UP else 1,
        "config": {key: value for key, value in tile.to_json().items() if key != "USE_TMA"},
        "compute_type": workload.activation_dtype,
        "use_fp8_w8a8": workload.number_format is NumberFormat.FP8_W8A8,
        "use_int8_w8a8": workload.number_format is NumberFormat.INT8_W8A8,
        "use_int8_w8a16": workload.number_format is NumberFormat.INT8_W8A16,
        "use_int4_w4a16": workload.number_format is NumberFormat.INT4_W4A16,
        "per_channel_quant": workload.per_channel_quant,
        "block_shape": group_shape if is_weight_only else workload.block_shape and list(workload.block_shape),
        "filter_expert": workload.ep_size > 1,
        "router_topk": 1 if projection is UP else workload.top_k,
    }
    invoke = namespace["invoke_fused_moe_kernel"]
    taken = inspect.signature(invoke).parameters
    invoke(**{name: value for name, value in given_arguments.items() if name in taken})
    (used,) = [name for name, kernel in kernels.items() if kernel.arguments is not None]
    assert used == kernel_name(workload)
    return kernels[used].arguments, tensors, [parameter.arg for parameter in kernels[used].parameters]


def real_tensors(product, tile):
    length = padded_tokens(product.workload, product.tokens, tile.block_m)
    return {
        role: torch.empty(operand.shape, dtype=TORCH_TYPES[operand.dtype])
        for role, operand in operands(product, tile, length).items()
    }


def comparable(arguments):
    return {
        name: ("tensor", value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("projection", BOTH)
@pytest.mark.parametrize("name", list(WORKLOADS))
@pytest.mark.parametrize("version", KNOWN_RELEASES)
def test_every_argument_is_what_sglang_passes(trees, version, name, projection):
    workload = WORKLOADS[name]
    for tokens, arch in itertools.product((1, 5, 64), (89, 90)):
        assert_same_arguments(
            trees[version], workload, Product(workload, projection, tokens), arch, "NVIDIA H100 80GB HBM3"
        )


@pytest.mark.parametrize("version", [version for version in RELEASES if version not in KNOWN_RELEASES])
def test_every_release_gets_what_it_passes(trees, version):
    formats = ("bf16", "fp16-ungated", "fp8-tensor", "fp8-channel", "fp8-block", "int8-channel", "int4-zero")
    cards = ((89, "NVIDIA L40S"), (90, "NVIDIA H100 80GB HBM3"), (90, "NVIDIA H20"))
    for name, projection, (arch, card) in itertools.product(formats, BOTH, cards):
        assert_same_arguments(trees[version], WORKLOADS[name], Product(WORKLOADS[name], projection, 5), arch, card)


def assert_same_arguments(tree, workload, product, arch, card):
    theirs, tensors, names = sglang_arguments(tree, workload, product.projection, product.tokens, TILE, arch, card)
    target = Target(read_kernel_source(tree.kernel_source), arch, tree.package, card)
    context = LaunchContext(arch, workload.activation_dtype, swap_ab=swaps_operands(target, workload, TILE))
    assert comparable(launch_arguments(names, product, TILE, tensors, context)) == comparable(theirs)


@pytest.mark.parametrize("version", KNOWN_RELEASES)
@pytest.mark.parametrize("name", ["bf16", "fp8-channel", "int8-weights", "int4"])
@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_even_ks_is_sglangs_even_where_its_packed_weights_are_shorter_than_k(trees, version, name, block_k):
    workload = replace(WORKLOADS[name], hidden_size=192)
    tile = replace(TILE, block_k=block_k)
    for projection in BOTH:
        theirs, tensors, names = sglang_arguments(trees[version], workload, projection, 5, tile, 89)
        context = LaunchContext(89, workload.activation_dtype)
        mine = launch_arguments(names, Product(workload, projection, 5), tile, tensors, context)
        assert mine["even_Ks"] == theirs["even_Ks"]


# --- shapes stand in for tensors


@pytest.mark.parametrize("projection", BOTH)
@pytest.mark.parametrize("name", list(WORKLOADS))
def test_shapes_give_the_same_arguments_as_tensors(name, projection):
    workload = WORKLOADS[name]
    product = Product(workload, projection, 5)
    length = padded_tokens(workload, 5, TILE.block_m)
    shapes = operands(product, TILE, length)
    names = ["N", "K", "EM", "num_valid_tokens", "even_Ks", "top_k", "filter_expert", "BLOCK_SIZE_K"]
    names += [f"stride_{part}" for part in ("am", "ak", "be", "bk", "bn", "cm", "cn", "bse", "bsk", "bsn")]
    names += ["stride_bze", "stride_bzk"] if uses_weight_only_kernel(workload) else ["stride_asm", "stride_ask"]
    context = LaunchContext(89, None)
    from_shapes = launch_arguments(names, product, TILE, shapes, context)
    assert from_shapes == launch_arguments(names, product, TILE, real_tensors(product, TILE), context)
    for role, operand in shapes.items():
        tensor = real_tensors(product, TILE)[role]
        assert operand.bytes == tensor.nbytes
        assert [operand.stride(d) for d in range(-tensor.dim(), tensor.dim())] == [*tensor.stride()] * 2
        assert operand.data_ptr() % 16 == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_stride_is_pytorchs(shape):
    tensor = torch.empty(shape)
    operand = Operand("float32", tuple(shape))
    assert [operand.stride(d) for d in range(len(shape))] == [*tensor.stride()]


# --- numbers written by hand

EXPECTED = {  # gate-up, then down, for M = 5, E = 8, hidden 160, N = 96, top-k 2
    "bf16": (
        {"N": 192, "K": 160, "stride_am": 160, "stride_be": 30720, "stride_bn": 160, "stride_bk": 1, "stride_cm": 192},
        {"N": 160, "K": 96, "stride_am": 96, "stride_be": 15360, "stride_bn": 96, "stride_bk": 1, "stride_cm": 160},
    ),
    "fp16-ungated": ({"N": 96, "stride_be": 15360}, {"N": 160, "K": 96}),
    "fp8-tensor": (
        {"stride_asm": 0, "stride_ask": 0, "stride_bse": 0, "stride_bsk": 0, "stride_bsn": 0, "group_k": 0},
        {"stride_asm": 0, "stride_ask": 0, "stride_bse": 0, "stride_bsk": 0, "stride_bsn": 0, "group_n": 0},
    ),
    "fp8-channel": (
        {"stride_asm": 1, "stride_ask": 1, "stride_bse": 192, "stride_bsk": 1, "stride_bsn": 1},
        {"stride_asm": 1, "stride_ask": 1, "stride_bse": 160, "stride_bsk": 1, "stride_bsn": 1},
    ),
    "fp8-block": (  # K is 2.5 blocks of 64 for gate-up, 1.5 for down
        {"stride_asm": 3, "stride_ask": 1, "stride_bse": 18, "stride_bsk": 1, "stride_bsn": 3, "group_n": 32},
        {"stride_asm": 2, "stride_ask": 1, "stride_bse": 10, "stride_bsk": 1, "stride_bsn": 2, "group_k": 64},
    ),
    "int8-weights": (
        {"stride_bse": 192 * 5, "stride_bsk": 1, "stride_bsn": 5, "stride_bze": 0, "stride_bzk": 0, "stride_bzn": 0},
        {"stride_bse": 160 * 3, "stride_bsk": 1, "stride_bsn": 3, "has_zp": False, "group_size": 32},
    ),
    "int4-zero": (  # two weights a byte along K, two zero points a byte along N
        {"N": 192, "K": 160, "stride_am": 160, "stride_bn": 80, "stride_be": 15360, "stride_bze": 480, "has_zp": True},
        {"N": 160, "K": 96, "stride_am": 96, "stride_bn": 48, "stride_be": 7680, "stride_bze": 240, "stride_bzn": 3},
    ),
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_numbers_worked_out_by_hand(name):
    workload = WORKLOADS[name]
    for projection, expected in zip((UP, DOWN), EXPECTED[name], strict=True):
        product = Product(workload, projection, 5)
        shapes = operands(product, TILE, padded_tokens(workload, 5, 16))
        arguments = launch_arguments([*expected], product, TILE, shapes, LaunchContext(89, None))
        assert arguments == expected | {"num_warps": 4, "num_stages": 3}


def test_the_two_projections_of_one_layer():
    up, down = Product(BF16, UP, 5), Product(BF16, DOWN, 5)
    assert (up.rows, up.fan_out, up.columns, up.depth, up.routed) == (5, 2, 192, 160, 10)
    assert (down.rows, down.fan_out, down.columns, down.depth, down.routed) == (10, 1, 160, 96, 10)
    for product, weighted in ((up, False), (down, True)):
        shapes = operands(product, TILE, 16)
        names = ["num_valid_tokens", "EM", "MUL_ROUTED_WEIGHT", "top_k"]
        arguments = launch_arguments(names, product, TILE, shapes, LaunchContext(89, None))
        assert [arguments[name] for name in names] == [10, 16, weighted, product.fan_out]
        context = LaunchContext(89, None, valid_tokens=1009)
        assert launch_arguments(names, product, TILE, shapes, context)["num_valid_tokens"] == 1009


@pytest.mark.parametrize(
    ("name", "types_", "kernel"),
    [
        ("bf16", ("bfloat16", "bfloat16"), "fused_moe_kernel"),
        ("fp16-ungated", ("float16", "float16"), "fused_moe_kernel"),
        ("fp8-tensor", ("fp8e4nv", "fp8e4nv"), "fused_moe_kernel"),
        ("int8-channel", ("int8", "int8"), "fused_moe_kernel"),
        ("int8-weights-channel", ("bfloat16", "int8"), "fused_moe_kernel"),
        ("int8-weights", ("bfloat16", "uint8"), "fused_moe_kernel_gptq_awq"),
        ("int4-zero", ("bfloat16", "uint8"), "fused_moe_kernel_gptq_awq"),
    ],
)
def test_element_types_and_kernels(name, types_, kernel):
    assert operand_types(WORKLOADS[name]) == types_
    assert kernel_name(WORKLOADS[name]) == kernel


@pytest.mark.parametrize(("tokens", "early"), [(512, True), (513, False)])
def test_dependent_launch_from_hopper_on_where_the_kernel_knows_it(tokens, early):
    product = Product(BF16, UP, tokens)
    shapes = operands(product, TILE, 64)
    hopper, ada = LaunchContext(90, None), LaunchContext(89, None)
    known = ["USE_GDC", "GDC_EARLY"]
    plain = {"num_warps": 4, "num_stages": 3}
    assert launch_arguments(known, product, TILE, shapes, hopper) == plain | {
        "USE_GDC": True,
        "GDC_EARLY": early,
        "launch_pdl": True,
    }
    assert launch_arguments(known, product, TILE, shapes, ada) == plain | {"USE_GDC": False, "GDC_EARLY": False}
    assert launch_arguments(["N"], product, TILE, shapes, hopper) == plain | {"N": 192}


def test_a_parameter_that_moefix_does_not_know_is_named():
    for name, kernel in (("bf16", "fused_moe_kernel"), ("int4", "fused_moe_kernel_gptq_awq")):
        product = Product(WORKLOADS[name], UP, 5)
        with pytest.raises(SGLangError, match=f"{kernel} .*: NEW_ONE, new_two") as caught:
            launch_arguments(
                ["N", "NEW_ONE", "new_two"], product, TILE, operands(product, TILE, 16), LaunchContext(89, None)
            )
        assert caught.value.hint


# --- the sorted list's length


@pytest.mark.parametrize(
    ("tokens", "block_m", "length"),
    [
        (1, 64, 8 * 64),  # 8 routed rows for 129 experts: one block each
        (16, 64, 128 * 64),  # 128 < 129 still
        (17, 64, 136 + 129 * 63),
        (4096, 128, 4096 * 8 + 129 * 127),
        (17, 1, 136),
    ],
)
def test_the_sorted_list_is_as_long_as_sglang_allocates_it(tokens, block_m, length):
    assert padded_tokens(Workload(128, 768, 2048, 8), tokens, block_m) == length


@given(
    tokens=st.integers(1, 300),
    experts=st.integers(1, 64),
    top_k=st.integers(1, 8),
    block_m=st.sampled_from([1, 16, 64, 256]),
)
def test_the_sorted_list_holds_the_worst_routing(tokens, experts, top_k, block_m):
    routed = tokens * top_k
    # the most padding: as many experts as possible with one row more than whole blocks
    touched = min(experts, routed)
    worst = routed - touched + touched * block_m if block_m > 1 else routed
    assert padded_tokens(Workload(experts, 64, 64, top_k), tokens, block_m) >= min(worst, routed * block_m)
