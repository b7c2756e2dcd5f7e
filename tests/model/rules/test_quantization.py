"""From a checkpoint's quantisation, flags and card to the experts' number format."""

import time
from typing import Any

import pytest

from fixer.base.errors import ModelError
from fixer.model.rules.ignored import Match, ignored, safe_match
from fixer.model.rules.methods import checkpoint_method
from fixer.model.rules.quantization import resolve
from fixer.model.rules.scheme import Fate, Question, Scheme
from fixer.workload import NumberFormat

LAYER = "model.layers.3.mlp.experts"
BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": (128, 128)}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
HF_FP8 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}


def compressed(
    bits: int, kind: str, strategy: str, inputs: int = 0, group: int | None = None, **more: Any
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "group_size": group}
    activations = {"num_bits": inputs, "type": kind, "strategy": "token", "dynamic": True} if inputs else None
    groups = {"group_0": {"targets": ("Linear",), "weights": weights, "input_activations": activations}}
    return {
        "quant_method": "compressed-tensors",
        "format": "x",
        "config_groups": groups,
        "ignore": ("lm_head",),
        **more,
    }


CT_CHANNEL = compressed(8, "float", "channel", 8)
CT_INT8 = compressed(8, "int", "channel", 8)
CT_INT4 = compressed(4, "int", "group", group=128, format="pack-quantized")
CT_NVFP4 = compressed(4, "float", "tensor_group", 4, group=16, format="nvfp4-pack-quantized")


def ask(
    config: dict[str, Any] | None,
    arch: int = 89,
    *,
    flag: str | None = None,
    release: str = "0.5.17",
    runner: str = "auto",
    width: int = 768,
    tp: int = 1,
    hidden: int = 2048,
    methods: frozenset[str] = frozenset(),
) -> Scheme:
    rescue = "cure {}".format
    return resolve(Question(config, flag, runner, arch, release, hidden, width, tp, ((LAYER,),), rescue, methods))


@pytest.mark.parametrize(
    ("config", "flag", "expected"),
    [
        (None, None, (NumberFormat.NONE, None, False)),
        (None, "fp8", (NumberFormat.FP8_W8A8, None, False)),
        (BLOCK, None, (NumberFormat.FP8_W8A8, (128, 128), False)),
        ({"quant_method": "fp8"}, None, (NumberFormat.FP8_W8A8, None, False)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None, (NumberFormat.FP8_W8A8, None, False)),
        (HF_FP8, None, (NumberFormat.FP8_W8A8, None, False)),
        (HF_FP8, "modelopt", (NumberFormat.FP8_W8A8, None, False)),
        (CT_CHANNEL, None, (NumberFormat.FP8_W8A8, None, True)),
        (compressed(8, "float", "tensor", 8), None, (NumberFormat.FP8_W8A8, None, False)),
        (compressed(8, "float", "block", 8), None, (NumberFormat.FP8_W8A8, (128, 128), False)),
        (CT_CHANNEL, "w8a8_fp8", (NumberFormat.FP8_W8A8, None, True)),
        (CT_INT8, "w8a8_int8", (NumberFormat.INT8_W8A8, None, True)),
        (
            {"quant_method": "blockwise_int8", "weight_block_size": (128, 128)},
            None,
            (NumberFormat.INT8_W8A8, (128, 128), False),
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None, (NumberFormat.NONE, None, False)),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"}},
            },
            None,
            (NumberFormat.FP8_W8A8, None, True),
        ),
    ],
)
def test_formats_of_the_triton_kernel(config: Any, flag: str | None, expected: tuple[Any, ...]) -> None:
    scheme = ask(config, flag=flag)
    assert scheme.fate is Fate.TRITON, scheme.reason
    assert (scheme.number_format, scheme.block_shape, scheme.per_channel) == expected


@pytest.mark.parametrize(
    ("config", "flag", "runner", "width", "expected"),
    [
        (AWQ, None, "auto", 192, (NumberFormat.INT4_W4A16, 64, True)),
        (AWQ, "moe_wna16", "auto", 768, (NumberFormat.INT4_W4A16, 128, True)),
        (GPTQ, "moe_wna16", "auto", 768, (NumberFormat.INT4_W4A16, 128, False)),
        ({**GPTQ, "bits": 8}, "moe_wna16", "auto", 768, (NumberFormat.INT8_W8A16, 128, False)),
        (CT_INT4, None, "triton", 768, (NumberFormat.INT4_W4A16, 128, False)),
        (AUTO_ROUND, None, "auto", 768, (NumberFormat.INT4_W4A16, 128, False)),
    ],
)
def test_weight_only(config: Any, flag: str | None, runner: str, width: int, expected: tuple[Any, ...]) -> None:
    scheme = ask(config, flag=flag, runner=runner, width=width)
    assert scheme.fate is Fate.TRITON, scheme.reason
    assert (scheme.number_format, scheme.group_size, scheme.has_zero_points) == expected
    assert scheme.packed == (scheme.number_format is NumberFormat.INT4_W4A16)


@pytest.mark.parametrize(
    ("config", "arch", "flag", "release", "kernel"),
    [
        (AWQ, 86, None, "0.5.17", "marlin"),
        (GPTQ, 89, None, "0.5.17", "marlin"),
        (GPTQ, 89, "gptq_marlin", "0.5.17", "marlin"),
        (CT_INT4, 90, None, "0.5.17", "marlin"),
        (NVFP4, 89, None, "0.5.17", "marlin"),
        (NVFP4, 100, None, "0.5.17", "flashinfer_trtllm"),
        (NVFP4, 120, None, "0.5.17", "flashinfer_trtllm"),
        (NVFP4, 120, "modelopt_fp4", "0.5.17", "flashinfer_cutlass"),
        (NVFP4, 121, "modelopt_fp4", "0.5.17", "flashinfer_cutlass"),
        (CT_NVFP4, 120, None, "0.5.17", "flashinfer_cutlass"),
        (CT_NVFP4, 90, None, "0.5.23", "marlin"),
        ({"quant_method": "gguf"}, 89, None, "0.5.17", "gguf"),
        ({"quant_method": "w4afp8"}, 90, None, "0.5.17", "cutlass_w4a8"),
        ({"quant_method": "mxfp8"}, 100, None, "0.5.17", "flashinfer_trtllm"),
        (AUTO_ROUND, 89, None, "0.5.23", "marlin"),
        (AUTO_ROUND, 89, None, "0.5.18", "marlin"),
    ],
)
def test_other_kernels(config: Any, arch: int, flag: str | None, release: str, kernel: str) -> None:
    scheme = ask(config, arch, flag=flag, release=release)
    assert (scheme.fate, scheme.kernel) == (Fate.OTHER, kernel), scheme.reason


@pytest.mark.parametrize(
    ("config", "arch", "flag", "cure"),
    [
        (CT_INT8, 86, None, "--quantization w8a8_int8"),
        (CT_NVFP4, 90, None, "0.5.23"),
        (GPTQ, 89, "gptq", "leave --quantization gptq out"),
        ({**GPTQ, "sym": False}, 89, None, "--quantization moe_wna16"),
        (AWQ, 89, "awq", "leave --quantization awq out"),
        (AWQ, 75, None, "--quantization moe_wna16"),
        (BLOCK, 89, "awq", "leave --quantization out"),
        (CT_CHANNEL, 86, "w8a8_fp8", "AWQ or GPTQ"),
        (HF_FP8, 86, None, "AWQ or GPTQ"),
        (BLOCK, 75, None, "AWQ or GPTQ"),
        ({"quant_method": "mxfp8"}, 90, None, "10.0"),
        (None, 89, "experts_int8", "experts_int8"),
    ],
)
def test_load_errors_name_the_cure(config: Any, arch: int, flag: str | None, cure: str) -> None:
    scheme = ask(config, arch, flag=flag)
    assert scheme.fate is Fate.LOAD_ERROR
    assert cure in scheme.reason
    assert "\n" not in scheme.reason


@pytest.mark.parametrize(("width", "tp", "refused"), [(192, 4, True), (192, 1, True), (384, 2, False)])
def test_blocks_must_divide_the_shard(width: int, tp: int, refused: bool) -> None:
    scheme = ask(BLOCK, width=width, tp=tp)
    assert (scheme.fate is Fate.LOAD_ERROR) == refused
    assert not refused or "cure 128" in scheme.reason


@pytest.mark.parametrize("arch", [80, 86, 87])
@pytest.mark.parametrize("config", [BLOCK, CT_CHANNEL, {"quant_method": "fp8"}])
def test_fp8_is_asked_for_and_fails_below_8_9(arch: int, config: Any) -> None:
    scheme = ask(config, arch)
    assert scheme.fate is Fate.CRASH
    assert scheme.number_format is NumberFormat.FP8_W8A8
    assert "8.9" in scheme.reason


def test_old_release() -> None:
    refused = ask({"quant_method": "mxfp4"}, release="0.4.9", methods=frozenset({"fp8", "awq"}))
    assert (refused.fate, "0.4.9 has no quantisation mxfp4" in refused.reason) == (Fate.LOAD_ERROR, True)
    assert ask(compressed(8, "float", "block", 8), release="0.4.9").fate is Fate.LOAD_ERROR
    assert ask(CT_CHANNEL, release="0.4.9").fate is Fate.TRITON


@pytest.mark.parametrize("release", ["0.4.10", "0.5.9", "0.5.22"])
def test_a_release_between_does_not_stop_by_its_number(release: str) -> None:
    assert ask({"quant_method": "mxfp4"}, release=release).fate is not Fate.LOAD_ERROR
    assert ask(compressed(8, "float", "block", 8), release=release).fate is Fate.TRITON
    assert [ask(CT_NVFP4, arch, release=release).kernel for arch in (89, 120)] == ["marlin", "flashinfer_cutlass"]


def test_the_triton_runner_takes_weight_only_experts_from_0_5_11_on() -> None:
    fates = [ask(CT_INT4, 90, release=release, runner="triton").fate for release in ("0.5.10", "0.5.11", "0.5.16")]
    assert fates == [Fate.OTHER, Fate.TRITON, Fate.TRITON]


def test_compressed_tensors_in_the_newest_release() -> None:
    assert ask(CT_INT4, 100, release="0.5.23").fate is Fate.TRITON
    odd = compressed(4, "int", "group", group=64, format="pack-quantized")
    assert ask(odd, 90, release="0.5.23", runner="triton").fate is Fate.LOAD_ERROR
    assert ask(odd, 90, release="0.5.17", runner="triton").fate is Fate.TRITON


def test_an_unknown_method_is_uncertain() -> None:
    scheme = ask({"quant_method": "tomorrow"})
    assert scheme.fate is Fate.UNCERTAIN
    assert "tomorrow" in scheme.reason


@pytest.mark.parametrize(
    "config",
    [
        {**BLOCK, "modules_to_not_convert": ("model.layers.3.mlp.experts",)},
        {**BLOCK, "ignored_layers": ("mlp.experts",)},
        {**BLOCK, "ignored_layers": ("model.layers.3.mlp.experts.0.down_proj",)},
        {**CT_CHANNEL, "ignore": ("lm_head", "re:.*mlp.experts.*")},
        {**AWQ, "modules_to_not_convert": ("experts",)},
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ("*mlp.experts*",)}},
    ],
)
def test_ignored_experts_are_unquantised(config: Any) -> None:
    scheme = ask(config)
    assert (scheme.fate, scheme.number_format) == (Fate.TRITON, NumberFormat.NONE)
    assert not scheme.experts_quantized


@pytest.mark.parametrize(
    ("entry", "match", "expected"),
    [
        ("gate", Match.PATH, False),
        ("mlp.expert", Match.PATH, False),
        ("layers.3", Match.PATH, True),
        ("model.layers.30.mlp.experts", Match.PATH, False),
        ("mtp.layers.3.mlp.experts", Match.PATH, False),
        ("lm_head", Match.NAME, False),
        ("mlp.experts", Match.NAME, True),
        ("model.layers.3", Match.NAME, False),
        ("re:.*self_attn.*", Match.NAME, False),
        ("*.layers.3.*", Match.WILDCARD, True),
    ],
)
def test_matching(entry: str, match: Match, expected: bool) -> None:
    fields = {Match.PATH: "ignored_layers", Match.NAME: "ignore", Match.WILDCARD: "exclude_modules"}
    assert ignored({fields[match]: (entry,)}, match, (LAYER,)) is expected


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*.*)*x", "(m|mo|mod)+$", ".*" * 9 + "x", "[", "(?P<n>.)\\1" * 5])
def test_a_hostile_pattern_costs_nothing(pattern: str) -> None:
    start = time.perf_counter()
    assert not safe_match(pattern, "model.layers.3.mlp.experts.0.gate_proj" * 3)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "config",
    [
        {**BLOCK, "weight_block_size": (0, 128)},
        {**BLOCK, "weight_block_size": "wide"},
        {**BLOCK, "weight_block_size": (128,)},
        {**BLOCK, "ignored_layers": "all"},
        {**BLOCK, "ignored_layers": (1,)},
        {**AWQ, "group_size": "big"},
        {**CT_CHANNEL, "ignore": tuple(f"re:x{index}.*" for index in range(1000))},
    ],
)
def test_nonsense_is_refused(config: Any) -> None:
    with pytest.raises(ModelError):
        ask(config)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}}, "modelopt_mixed"),
        ({"quant_algo": "MIXED_PRECISION"}, "w4afp8"),
        ({"quantization": {"quant_algo": "NVFP4"}}, "modelopt_fp4"),
        ({"quant_method": "compressed_tensors"}, "compressed-tensors"),
    ],
)
def test_checkpoint_method(config: Any, method: str) -> None:
    assert checkpoint_method(config) == method


def test_awq_takes_no_runner() -> None:
    assert ask(AWQ, runner="triton").fate is Fate.LOAD_ERROR
    assert ask(AWQ, runner="triton", width=192).fate is Fate.TRITON
