"""What the child saw, and the answer that it means: the three ends are told apart."""

from typing import Any

import msgspec
import pytest

from fixer.model.asking.answer import Outcome
from fixer.model.asking.judge import DenseRow, ExpertRow, dense_product, expert_layers, judge
from fixer.workload import NumberFormat, Workload

UP = {
    "E": 128,
    "N": 384,
    "dtype": "fp8_w8a8",
    "block_shape": [128, 128],
    "per_channel_quant": False,
    "down": False,
    "name": "E=128,N=384,device_name=X,dtype=fp8_w8a8,block_shape=[128, 128].json",
}
EXPERTS: dict[str, Any] = {
    "layers": 48,
    "names": ["model.layers.0.mlp.experts"],
    "hidden": 2048,
    "top_k": 8,
    "activation": "bfloat16",
    "layer_class": "FusedMoE",
    "method": "Fp8MoEMethod",
    "scheme": "",
    "runner": "triton",
    "asked": [],
    "looked_up": False,
    "ended": [],
    "fault": "",
    "weights_fault": "",
}
DENSE: dict[str, Any] = {
    "layers": 48,
    "names": ["model.layers.0.self_attn.o_proj"],
    "method": "Fp8LinearMethod",
    "scheme": "",
    "weight": "float8_e4m3fn",
    "function": "",
    "N": 2048,
    "K": 4096,
    "asked": [],
    "ended": [],
    "fault": "",
    "weights_fault": "",
}


def experts(**changes: Any) -> ExpertRow:
    return msgspec.convert({**EXPERTS, **changes}, ExpertRow)


def line(*rows: dict[str, Any], **changes: Any) -> bytes:
    return msgspec.json.encode({"outcome": "looked", "experts": [{**EXPERTS, **row} for row in rows], **changes})


def test_a_name_that_was_built_is_asked_for() -> None:
    kind = expert_layers(experts(asked=[UP, UP]))
    assert (kind.outcome, kind.kernel) == (Outcome.ASKS, "fused_moe_triton")
    (look_up,) = kind.look_ups
    assert (look_up.experts, look_up.width, look_up.block_shape) == (128, 384, (128, 128))
    assert kind.workload == Workload(
        128, 384, 2048, 8, NumberFormat.FP8_W8A8, block_shape=(128, 128), activation_dtype="bfloat16"
    )
    assert expert_layers(experts(runner="marlin")).workload is None
    assert expert_layers(experts(asked=[{**UP, "dtype": "fp6"}])).workload is None


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"runner": "flashinfer_trtllm"}, "flashinfer_trtllm"),
        ({"runner": "", "method": "AWQMarlinMoEMethod"}, "marlin"),
        ({"runner": "", "scheme": "GPTQMarlinMoEScheme"}, "marlin"),
        ({"runner": "", "ended": ["layers/moe/fused_moe_triton/fused_marlin_moe.py:f"]}, "fused_marlin_moe"),
        ({"ended": ["layers/moe/token_dispatcher/deepep.py:dispatch", "deep_ep/buffer.py:f"]}, "deepep"),
        ({"ended": ["layers/moe/cutlass_moe.py:cutlass_fused_experts", "sgl_kernel/__init__.py:f"]}, "cutlass_moe"),
    ],
)
def test_another_kernel_is_named_by_its_back_end_its_class_or_its_file(changes: dict[str, Any], kernel: str) -> None:
    kind = expert_layers(experts(fault="RuntimeError: x", **changes))
    assert (kind.outcome, kind.kernel) == (Outcome.OTHER_KERNEL, kernel)


@pytest.mark.parametrize(
    "place",
    [
        "layers/moe/fused_moe_triton/layer.py:forward_impl",
        "layers/moe/moe_runner/triton_utils/fused_moe.py:fused_experts_impl",
        "layers/moe/moe_runner/triton.py:run",
        "layers/moe/token_dispatcher/standard.py:dispatch",
        "layers/quantization/fp8.py:apply",
        "torch/_ops.py:__call__",
    ],
)
def test_a_forward_that_ended_in_no_kernels_own_file_is_not_known(place: str) -> None:
    kind = expert_layers(experts(ended=[place], fault="AssertionError: Hidden size mismatch"))
    assert (kind.outcome, kind.kernel) == (Outcome.NOT_KNOWN, "")
    assert place in kind.reason
    assert "Hidden size mismatch" in kind.reason


def test_a_look_up_without_a_name_is_the_default_tile() -> None:
    assert expert_layers(experts(looked_up=True)).outcome is Outcome.NO_LOOKUP


def test_a_kind_that_asks_counts_before_the_others_and_a_doubt_before_another_kernel() -> None:
    asks, marlin, doubt = {"asked": [UP], "layers": 1}, {"runner": "marlin", "layers": 47}, {"fault": "KeyError: x"}
    answer = judge(line(marlin, asks))
    assert answer.outcome is Outcome.ASKS
    assert answer.kernel == "fused_moe_triton"
    assert [one.name for one in answer.look_ups] == [UP["name"]]
    assert judge(line(marlin, doubt)).outcome is Outcome.NOT_KNOWN
    assert "KeyError" in judge(line(marlin, doubt)).reason
    assert judge(line(marlin)).kernel == "marlin"
    assert judge(line()).outcome is Outcome.NO_MOE


def test_load_errors_are_handed_on_word_for_word_and_all_else_is_not_known() -> None:
    words = "For quantized MoE models, please make sure ... % weight_block_size_n=128 == 0"
    assert judge(line(outcome="load_error", reason=words)).reason == words
    assert judge(line(outcome="load_error", reason=words)).outcome is Outcome.LOAD_ERROR
    assert judge(line(outcome="not_known", reason="KeyError: 'x'")).outcome is Outcome.NOT_KNOWN
    for damaged in (
        b"",
        b"{",
        b"[]",
        b'{"outcome": "looked", "experts": 3}',
        b'{"outcome": "looked", "experts": [{}]}',
    ):
        assert judge(damaged).outcome is Outcome.NOT_KNOWN


@pytest.mark.parametrize(
    ("changes", "family", "kernel", "asks"),
    [
        ({"asked": ["get_w8a8_block_fp8_configs"], "function": "x_with_fallback"}, "block_fp8", "triton", True),
        ({"asked": ["get_w8a8_block_int8_configs"]}, "block_int8", "triton", True),
        ({"asked": ["get_w8a8_channelwise_fp8_config"]}, "channel_fp8", "Fp8LinearMethod", True),
        (
            {"function": "cutlass_w8a8_block_fp8_linear_with_fallback", "fault": "RuntimeError: x"},
            "block_fp8",
            None,
            False,
        ),
        ({"function": "triton_w8a8_block_fp8_linear", "fault": "RuntimeError: x"}, "block_fp8", "triton", None),
        ({"fault": "RuntimeError: x"}, "", "Fp8LinearMethod", None),
        ({}, "", "Fp8LinearMethod", False),
    ],
)
def test_dense_products(changes: dict[str, Any], family: str, kernel: str | None, asks: bool | None) -> None:
    product = dense_product(msgspec.convert({**DENSE, **changes}, DenseRow))
    assert (product.family, product.kernel) == (family, kernel or changes["function"])
    assert product.asks is asks
    assert (product.n, product.k, product.layers) == (2048, 4096, 48)
