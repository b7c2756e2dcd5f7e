"""What SGLang does: the cases read from its source, the rules between them, and whatever a config.json may hold."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixer.base.errors import MoefixError, UsageError
from fixer.machine.cards import Card
from fixer.model.config import load_model, model_from_config
from fixer.model.rules.case import Decision, Outcome
from fixer.model.rules.decide import TRITON, decide
from fixer.sglang.declared import NOTHING_DECLARED, Declared, declared_of
from fixer.sglang.flags import parse_flags
from fixer.sglang.tree import Tree
from fixer.workload import NumberFormat, Workload

CASES = json.loads((Path(__file__).resolve().parents[2] / "data" / "lookup-cases.json").read_text())
CONFIGS = {case["id"]: case["config"] for case in CASES}
RELEASES = ["0.4.9", "0.5.17", "0.5.23"]
QWEN = CONFIGS["q3_30b_bf16_tp1_h100"]
QWEN_BLOCK = CONFIGS["q3_30b_fp8block_tp2_4090"]
QWEN_CHANNEL = CONFIGS["q3_30b_fp8dyn_tp1_l40s"]
GLM = CONFIGS["glm45air_fp8_tp2_pro6000"]
NEXT = CONFIGS["q3next_fp8_tp1_h200"]
DEEPSEEK = CONFIGS["dsv3_fp8_tp8_h200"]
GPT_OSS = CONFIGS["gptoss20b_tp1_4090"]
NEMOTRON = CONFIGS["nemotron3_nano_bf16_tp2_l40s"]
MIXTRAL = CONFIGS["mixtral_bf16_tp4_h100"]


def card(arch: int = 89, driver: str = "") -> Card:
    return Card(f"NVIDIA sm_{arch}", divmod(arch, 10), 101376, 24564, driver=driver)


def ask(
    config: dict[str, Any],
    flags: str = "",
    arch: int = 89,
    release: str = "0.5.17",
    declared: Declared = NOTHING_DECLARED,
) -> Decision:
    parsed = parse_flags(flags.split(), declared)
    return decide(model_from_config("m", config, parsed), parsed, card(arch), release, declared)


def shape(decision: Decision) -> tuple[int, int, int]:
    assert decision.workload is not None, decision.reason
    return decision.workload.experts, decision.workload.intermediate, decision.workload.top_k


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
@pytest.mark.parametrize("release", ["0.5.17", "0.5.23"])
def test_cases(case: dict[str, Any], release: str, trees: dict[str, Tree]) -> None:
    expected, arch = case["expect"], int(case["gpu"]["arch"].removeprefix("sm_"))
    decision = ask(case["config"], " ".join(case["flags"]), arch, release, declared_of(trees[release]))
    assert decision.outcome.value == expected["outcome"], decision.reason
    assert (decision.kernel == TRITON) == expected["uses_fused_moe_triton"]
    workload = decision.workload
    if expected["E"] is None:
        assert workload is None
        return
    assert workload is not None
    assert (workload.experts, workload.intermediate) == (expected["E"], expected["N"])
    assert (workload.hidden_size, workload.top_k) == (expected["hidden"], expected["topk"])
    assert workload.number_format.value == (expected["dtype"] or "none")
    assert workload.block_shape == (tuple(expected["block_shape"]) if expected["block_shape"] else None)
    assert workload.per_channel_quant == expected["per_channel_quant"]
    for name in expected.get("dense_files", []):
        numbers = tuple(int(part.partition("=")[2]) for part in name.split(",")[:2])
        assert numbers in decision.dense_shapes
    assert len(decision.dense_shapes) == len(expected.get("dense_files", decision.dense_shapes))


@pytest.mark.parametrize("release", RELEASES)
def test_the_blog_posts_model(release: str) -> None:
    decision = ask(QWEN_CHANNEL, release=release)
    assert decision.outcome is Outcome.ASKS
    assert decision.workload == Workload(
        128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True, activation_dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        (QWEN, "--tp 4", (128, 192, 8)),
        (QWEN, "--tp 4 --ep 4", (32, 768, 8)),
        (QWEN, "--tp 8 --ep-size 2", (64, 192, 8)),
        (QWEN, "--tp 8 --ep 2 --moe-dp-size 2", (64, 384, 8)),
        (QWEN, "--tp 4 --ep 4 --ep-num-redundant-experts 16", (36, 768, 8)),
        (MIXTRAL, "--tp 2 --ep-num-redundant-experts 8", (8, 7168, 2)),
        (QWEN, "--tp 4 --dp-size 4 --enable-dp-attention", (128, 192, 8)),
        (QWEN, "--kt-num-gpu-experts 16", (16, 768, 8)),
        (GLM, "", (129, 1408, 9)),
        (GLM, "--disable-shared-experts-fusion", (128, 1408, 8)),
        (GLM, "--tp 2 --ep 2", (64, 1408, 8)),
        (NEXT, "", (513, 512, 11)),
        (NEXT, "--tp 2 --ep 2", (257, 512, 11)),
        (NEXT, "--disable-shared-experts-fusion", (512, 512, 10)),
        (DEEPSEEK, "--tp 8", (257, 256, 9)),
        (DEEPSEEK, "--tp 8 --enable-two-batch-overlap", (256, 256, 8)),
        (DEEPSEEK, "--tp 8 --enable-two-batch-overlap --enforce-shared-experts-fusion", (257, 256, 9)),
        ({**DEEPSEEK, "architectures": ["DeepseekV32ForCausalLM"]}, "--tp 8", (256, 256, 8)),
        ({**DEEPSEEK, "architectures": ["GlmMoeDsaForCausalLM"]}, "--tp 8", (257, 256, 9)),
        ({**DEEPSEEK, "n_routed_experts": 384}, "--tp 8", (384, 256, 8)),
        (GPT_OSS, "--tp 2 --ep 2", (16, 2880, 4)),
        (GPT_OSS, "--tp 2 --moe-runner-backend triton", (32, 1472, 4)),
    ],
)
def test_shards_and_fusion(config: dict[str, Any], flags: str, expected: tuple[int, int, int]) -> None:
    decision = ask(config, flags)
    assert decision.outcome is Outcome.ASKS, decision.reason
    assert shape(decision) == expected


def test_packed_weights_halve_n() -> None:
    config = CONFIGS["q3_30b_gptq_tp1_4090"]
    assert shape(ask(config, "--quantization moe_wna16")) == (128, 384, 8)
    eight = copy.deepcopy(config)
    eight["quantization_config"]["bits"] = 8
    assert shape(ask(eight, "--quantization moe_wna16")) == (128, 768, 8)


@pytest.mark.parametrize(
    ("config", "flags", "arch", "release", "kernel"),
    [
        (QWEN, "", 100, "0.5.17", "flashinfer_trtllm"),
        (QWEN_BLOCK, "", 103, "0.5.17", "flashinfer_trtllm"),
        ({k: v for k, v in GLM.items() if k != "quantization_config"}, "", 100, "0.5.17", "flashinfer_trtllm"),
        (DEEPSEEK, "--tp 8", 100, "0.5.17", "flashinfer_trtllm"),
        (NEMOTRON, "", 100, "0.5.17", "flashinfer_trtllm"),
        (NEMOTRON, "", 120, "0.5.17", "flashinfer_cutlass"),
        (GPT_OSS, "", 90, "0.5.17", "triton_kernel"),
        (GPT_OSS, "", 120, "0.5.17", "flashinfer_mxfp4"),
        (QWEN, "--moe-runner-backend flashinfer_cutlass", 90, "0.5.17", "flashinfer_cutlass"),
        (QWEN, "--tp 2 --moe-a2a-backend mooncake", 90, "0.5.17", "mooncake"),
        (QWEN, "--tp 2 --enable-ep-moe", 90, "0.4.9", "ep_moe"),
        (MIXTRAL, "--quantization w8a8_int8", 90, "0.5.17", "quant_mixtral"),
    ],
)
def test_other_kernels(config: dict[str, Any], flags: str, arch: int, release: str, kernel: str) -> None:
    decision = ask(config, flags, arch, release)
    assert (decision.outcome, decision.kernel) == (Outcome.OTHER_KERNEL, kernel), decision.reason
    assert decision.workload is None


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (MIXTRAL, ""),
        (GLM, ""),
        (CONFIGS["olmoe_bf16_tp1_3090"], ""),
        (CONFIGS["minimax_m2_fp8_tp4_h100"], "--tp 4"),
        (QWEN_CHANNEL, ""),
        (QWEN, "--moe-runner-backend triton"),
        (NEMOTRON, "--moe-runner-backend triton"),
    ],
)
def test_triton_stays_on_sm_100(config: dict[str, Any], flags: str) -> None:
    assert ask(config, flags, 100).outcome is Outcome.ASKS


def test_nemotron_is_not_gated() -> None:
    decision = ask(NEMOTRON, "--moe-runner-backend triton")
    assert decision.workload is not None
    assert not decision.workload.gated


def test_gpt_oss_keeps_off_triton_kernels_with_a_new_driver() -> None:
    plain = {k: v for k, v in GPT_OSS.items() if k != "quantization_config"}
    flags = parse_flags([])
    model = model_from_config("m", plain, flags)
    assert decide(model, flags, card(120, "595.10"), "0.5.17").outcome is Outcome.ASKS
    assert decide(model, flags, card(120, "580.10"), "0.5.17").kernel == "triton_kernel"


@pytest.mark.parametrize(
    ("config", "flags", "arch", "outcome", "cure"),
    [
        (QWEN_BLOCK, "--tp 4", 89, Outcome.LOAD_ERROR, "--ep-size 2"),
        (QWEN_BLOCK, "--tp 8", 89, Outcome.LOAD_ERROR, "--ep-size 4"),
        (QWEN_BLOCK, "", 86, Outcome.ASKS_THEN_CRASHES, "8.9"),
        (QWEN_CHANNEL, "", 86, Outcome.ASKS_THEN_CRASHES, "w8a8_int8"),
        (QWEN, "--quantization fp8", 86, Outcome.ASKS_THEN_CRASHES, "leave --quantization fp8 out"),
        (QWEN, "--quantization w8a8_fp8", 86, Outcome.LOAD_ERROR, "8.9"),
        (CONFIGS["q3_30b_int8_flag_3090"], "--tp 2", 86, Outcome.LOAD_ERROR, "--quantization w8a8_int8"),
        (QWEN_BLOCK, "--dtype float32", 89, Outcome.LOAD_ERROR, "--dtype float32"),
        (QWEN, "--tp 5", 89, Outcome.LOAD_ERROR, "768"),
        (QWEN, "--tp 3 --ep 3", 89, Outcome.LOAD_ERROR, "128 experts"),
        (QWEN, "--tp 64", 89, Outcome.LOAD_ERROR, "32 attention heads"),
        ({**QWEN, "num_key_value_heads": 6}, "--tp 4", 89, Outcome.LOAD_ERROR, "6 for keys"),
        ({**MIXTRAL, "num_attention_heads": 32}, "--tp 16", 89, Outcome.LOAD_ERROR, "8 experts"),
    ],
)
def test_faults_say_the_cure(config: dict[str, Any], flags: str, arch: int, outcome: Outcome, cure: str) -> None:
    decision = ask(config, flags, arch)
    assert decision.outcome is outcome
    assert cure in decision.reason
    assert "\n" not in decision.reason
    assert (decision.workload is not None) == (outcome is Outcome.ASKS_THEN_CRASHES)


def test_the_cure_cures() -> None:
    assert ask(QWEN_BLOCK, "--tp 4 --ep-size 2").outcome is Outcome.ASKS


@pytest.mark.parametrize(
    "flags",
    [
        "--ep 2",
        "--tp 4 --ep 3",
        "--tp 2 --ep 4",
        "--tp 4 --ep 2 --moe-dp-size 4",
        "--tp 4 --dp 3 --enable-dp-attention",
    ],
)
def test_sizes_that_cannot_go_together(flags: str) -> None:
    with pytest.raises(UsageError, match="does not divide"):
        ask(QWEN, flags)


def test_an_unknown_family_is_uncertain() -> None:
    decision = ask({**QWEN, "architectures": ["NobodyKnowsForCausalLM"], "model_type": "nobody"})
    assert decision.outcome is Outcome.UNCERTAIN
    assert "NobodyKnowsForCausalLM" in decision.reason
    assert shape(decision) == (128, 768, 8)


def test_sizes_of_text_and_vision_experts() -> None:
    ernie = {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "hidden_size": 2560,
        "moe_num_experts": [64, 64],
        "moe_intermediate_size": [1536, 512],
        "moe_k": 6,
    }
    decision = ask(ernie)
    assert (decision.outcome, shape(decision)) == (Outcome.ASKS, (64, 1536, 6))
    assert any("vision" in note for note in decision.notes)


def test_layers_of_different_sizes_are_uncertain() -> None:
    hunyuan = {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "hidden_size": 4096,
        "num_experts": 64,
        "moe_intermediate_size": [3072, 1536],
        "moe_topk": [8, 8],
    }
    assert ask(hunyuan).outcome is Outcome.UNCERTAIN
    assert ask({**hunyuan, "moe_intermediate_size": [3072, 3072]}).outcome is Outcome.ASKS


def test_a_runner_for_a_method_that_names_its_own() -> None:
    assert ask(QWEN, "--quantization w8a8_int8 --moe-runner-backend marlin").outcome is Outcome.UNCERTAIN


def test_an_architecture_that_the_tree_lacks(trees: dict[str, Tree]) -> None:
    jamba = {**MIXTRAL, "architectures": ["JambaForCausalLM"], "num_experts": 16}
    newer, older = (declared_of(trees[release]) for release in ("0.5.17", "0.4.9"))
    fallback = ask(jamba, declared=newer)
    assert (fallback.outcome, "Transformers' own model" in fallback.reason) == (Outcome.UNCERTAIN, True)
    stopped = ask(GLM, release="0.4.9", declared=older)
    assert (stopped.outcome, "has no Glm4MoeForCausalLM" in stopped.reason) == (Outcome.LOAD_ERROR, True)


@pytest.mark.parametrize("release", ["0.4.9.post6", "0.5.9", "0.0.0.dev11416+g92e8bb79e"])
def test_no_release_is_too_old_by_its_number(release: str, trees: dict[str, Tree]) -> None:
    newest = declared_of(trees["0.5.23"])
    for config in (GLM, GPT_OSS, QWEN_BLOCK):
        assert ask(config, release=release, declared=newest).outcome is not Outcome.LOAD_ERROR
        assert ask(config, release=release).outcome is not Outcome.LOAD_ERROR
    between = ask(GLM, release="0.5.9")
    assert (between.outcome, "fuses the shared experts" in between.reason) == (Outcome.UNCERTAIN, True)
    assert any("rules of SGLang 0.4.9" in note for note in between.notes)


def test_ep_moe_of_the_releases_after_0_4_9_sets_the_ranks_only() -> None:
    decision = ask(QWEN, "--tp 4 --enable-ep-moe", 90, "0.5.2")
    assert (decision.outcome, shape(decision)[:2]) == (Outcome.ASKS, (32, 768))
    assert ask(QWEN, "--tp 4 --enable-ep-moe", 90, "0.4.9.post6").kernel == "ep_moe"


def test_a_release_between_has_the_runners_of_its_tree(trees: dict[str, Tree]) -> None:
    old, new = (declared_of(trees[release]) for release in ("0.4.9", "0.5.17"))
    assert ask(QWEN, arch=100, release="0.5.9", declared=new).kernel == "flashinfer_trtllm"
    assert ask(GPT_OSS, arch=120, release="0.5.5", declared=new).kernel == "flashinfer_mxfp4"
    assert ask(QWEN, arch=100, release="0.4.9.post6", declared=old).kernel == TRITON


@pytest.mark.parametrize(
    ("config", "flags", "arch", "expected"),
    [
        (QWEN, "", 89, "bfloat16"),
        (QWEN, "--dtype half", 89, "float16"),
        (QWEN, "--dtype float32", 89, "float32"),
        (QWEN, "", 75, "float16"),
        ({**QWEN, "torch_dtype": "float32"}, "", 89, "float16"),
        ({**QWEN, "torch_dtype": "torch.float16"}, "", 89, "float16"),
        (CONFIGS["gemma4_26b_bf16_tp2_l40s"], "", 89, "bfloat16"),
        (GPT_OSS, "--moe-runner-backend triton", 89, "bfloat16"),
    ],
)
def test_activations(config: dict[str, Any], flags: str, arch: int, expected: str) -> None:
    workload = ask(config, flags, arch).workload
    assert workload is not None
    assert workload.activation_dtype == expected
    assert (workload.number_format is NumberFormat.FLOAT32) == (expected == "float32")


@pytest.mark.parametrize(
    ("flags", "arch", "expected"),
    [
        ("", 89, ((5120, 2048), (2048, 4096))),
        ("--tp 2", 89, ((2560, 2048), (2048, 2048))),
        ("--tp 8 --ep 8", 89, ((768, 2048), (2048, 512))),
        ("", 90, ()),
        ("", 120, ()),
    ],
)
def test_dense_shapes(flags: str, arch: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert ask(QWEN_BLOCK, flags, arch).dense_shapes == expected


def test_dense_shapes_of_a_dense_model() -> None:
    config = {**CONFIGS["qwen3_8b_bf16_4090"], "quantization_config": QWEN_BLOCK["quantization_config"]}
    decision = ask(config)
    assert decision.outcome is Outcome.NO_MOE
    assert decision.dense_shapes == ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))


def test_notes() -> None:
    notes = " ".join(ask(QWEN, "--enable-lora --enable-torch-compile --cuda-graph-config {}").notes)
    assert "LoRA" in notes
    assert "torch-compile" in notes
    assert "--cuda-graph-config" in notes


def test_old_quantisations_need_vllm() -> None:
    assert any("vLLM" in note for note in ask(CONFIGS["q3_30b_awq_tp4_3090"], "--tp 4", release="0.4.9").notes)
    assert not ask(CONFIGS["q3_30b_awq_tp4_3090"], "--tp 4").notes


def test_overrides_reach_the_decision() -> None:
    flags = parse_flags(["--json-model-override-args", '{"num_experts": 64}'])
    decision = decide(model_from_config("m", QWEN, flags), flags, card(), "0.5.17")
    assert shape(decision) == (64, 768, 8)


# --- anything at all --------------------------------------------------------------------------------------------

_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["fp8", "awq", "channel", "float", "re:.*experts.*", "NVFP4", "bfloat16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*path, key), *_paths(item, (*path, key))]]


_FLAGS = ["", "--tp 2", "--tp 4 --ep 2", "--quantization fp8", "--quantization moe_wna16", "--quantization w8a8_int8",
          "--moe-runner-backend triton", "--tp 2 --enable-dp-attention --dp 2"]  # fmt: skip


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_the_config_holds(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = copy.deepcopy(data.draw(st.sampled_from(list(CONFIGS.values()))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(_paths(config) or [("x",)]))
        target: Any = config
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = data.draw(_VALUE)
    flags = parse_flags(data.draw(st.sampled_from(_FLAGS)).split())
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = data.draw(st.sampled_from([75, 86, 89, 90, 100, 120]))
    try:
        decision = decide(load_model(str(folder), flags), flags, card(arch), "0.5.17")
    except MoefixError as caught:
        said = caught.message
    else:
        said, workload = decision.reason, decision.workload
        assert workload is None or min(workload.experts, workload.top_k, workload.intermediate) > 0
    assert 0 < len(said) < 400
    assert "\n" not in said


# --- flags that SGLang's own parser or layers refuse -----------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--quantization junk", "--moe-runner-backend junk"])
@pytest.mark.parametrize("release", ["0.5.17", "0.5.23"])
def test_a_choice_that_sglang_does_not_have(flags: str, release: str, trees: dict[str, Tree]) -> None:
    with pytest.raises(UsageError, match="'junk', which this SGLang does not take") as caught:
        ask(QWEN, flags, release=release, declared=declared_of(trees[release]))
    assert "triton" in caught.value.hint or "fp8" in caught.value.hint


def test_a_quantization_of_a_later_release_is_uncertain() -> None:
    assert ask(QWEN, "--quantization junk", release="0.9.0").outcome is Outcome.UNCERTAIN


@pytest.mark.parametrize("config", [QWEN, QWEN_BLOCK, QWEN_CHANNEL])
def test_unquant_is_what_the_checkpoint_has(config: dict[str, Any]) -> None:
    assert ask(config, "--quantization unquant").workload == ask(config).workload


def test_what_cannot_be_split_is_marked() -> None:
    assert ask(QWEN, "--tp 3").indivisible
    assert not ask(QWEN_BLOCK, "--tp 4").indivisible
