"""Geometry of the families: which field is what, before sharding."""

import re
from types import MappingProxyType
from typing import Any

import pytest

from fixer.base.errors import ModelError
from fixer.model.rules.families import UNKNOWN_FAMILY, expert_layer, family_of
from fixer.model.rules.family_table import FAMILIES
from fixer.sglang.releases import KNOWN_RELEASES, at_least, release_key, rules_for

CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int]]] = {
    "Qwen3MoeForCausalLM": (
        {"num_experts": 128, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "hidden_size": 2048},
        (128, 768, 8, 2048, 0),
    ),
    "Qwen2MoeForCausalLM": (
        {
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 4,
            "hidden_size": 2048,
            "shared_expert_intermediate_size": 5632,
        },
        (60, 1408, 4, 2048, 0),
    ),
    "Qwen3NextForCausalLM": (
        {
            "num_experts": 512,
            "moe_intermediate_size": 512,
            "num_experts_per_tok": 10,
            "hidden_size": 2048,
            "shared_expert_intermediate_size": 512,
        },
        (512, 512, 10, 2048, 1),
    ),
    "MixtralForCausalLM": (
        {"num_local_experts": 8, "intermediate_size": 14336, "num_experts_per_tok": 2, "hidden_size": 4096},
        (8, 14336, 2, 4096, 0),
    ),
    "DeepseekV3ForCausalLM": (
        {
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "hidden_size": 7168,
            "n_shared_experts": 1,
            "intermediate_size": 18432,
        },
        (256, 2048, 8, 7168, 1),
    ),
    "OlmoeForCausalLM": (
        {"num_experts": 64, "intermediate_size": 1024, "num_experts_per_tok": 8, "hidden_size": 2048},
        (64, 1024, 8, 2048, 0),
    ),
    "Gemma4ForConditionalGeneration": (
        {
            "num_experts": 128,
            "moe_intermediate_size": 704,
            "top_k_experts": 8,
            "hidden_size": 2816,
            "enable_moe_block": True,
        },
        (128, 704, 8, 2816, 0),
    ),
    "DbrxForCausalLM": (
        {"d_model": 6144, "ffn_config": {"moe_num_experts": 16, "ffn_hidden_size": 10752, "moe_top_k": 4}},
        (16, 10752, 4, 6144, 0),
    ),
    "JambaForCausalLM": (
        {"num_experts": 16, "intermediate_size": 14336, "num_experts_per_tok": 2, "hidden_size": 4096},
        (16, 14336, 2, 4096, 0),
    ),
    "Grok1ForCausalLM": (
        {
            "num_local_experts": 8,
            "moe_intermediate_size": 16384,
            "intermediate_size": 32768,
            "num_experts_per_tok": 2,
            "hidden_size": 8192,
        },
        (8, 16384, 2, 8192, 0),
    ),
    "KimiLinearForCausalLM": (
        {"num_experts": 256, "moe_intermediate_size": 1024, "num_experts_per_token": 8, "hidden_size": 2304},
        (256, 1024, 8, 2304, 0),
    ),
    "NemotronHForCausalLM": (
        {
            "n_routed_experts": 512,
            "moe_intermediate_size": 2688,
            "num_experts_per_tok": 22,
            "hidden_size": 4096,
            "moe_latent_size": 1024,
        },
        (512, 2688, 22, 1024, 0),
    ),
    "Ernie4_5_MoeForCausalLM": (
        {"moe_num_experts": 64, "moe_intermediate_size": 1536, "moe_k": 6, "hidden_size": 2560},
        (64, 1536, 6, 2560, 0),
    ),
    "HunYuanMoEV1ForCausalLM": (
        {"num_experts": 64, "intermediate_size": 3072, "moe_topk": [8, 8], "hidden_size": 4096},
        (64, 3072, 8, 4096, 0),
    ),
    "Step3VLForConditionalGeneration": (
        {"moe_num_experts": 48, "moe_intermediate_size": 5120, "moe_top_k": 3, "hidden_size": 7168},
        (48, 5120, 3, 7168, 0),
    ),
    "LongcatFlashForCausalLM": (
        {"n_routed_experts": 512, "expert_ffn_hidden_size": 2048, "moe_topk": 12, "hidden_size": 6144},
        (512, 2048, 12, 6144, 0),
    ),
    "Llama4ForConditionalGeneration": (
        {"num_local_experts": 16, "intermediate_size": 8192, "num_experts_per_tok": 1, "hidden_size": 5120},
        (16, 8192, 1, 5120, 0),
    ),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_geometry(architecture: str) -> None:
    config, expected = CONFIGS[architecture]
    layer = expert_layer(architecture, config)
    assert layer is not None
    assert (layer.experts, layer.width, layer.top_k, layer.hidden, layer.shared) == expected
    assert layer.certain


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("bad", [-1, 0, 1.5, True, "64", 2**40, {}, [], [0], [8, "x"]])
def test_a_bad_size_is_named(architecture: str, bad: object) -> None:
    config, _ = CONFIGS[architecture]
    family, _certain = family_of(architecture, config)
    name = family.top_k[0]
    outer, _, inner = name.rpartition(".")
    broken = {**config, outer: {**config[outer], inner: bad}} if outer else {**config, name: bad}
    with pytest.raises(ModelError, match=re.escape(name)):
        expert_layer(architecture, broken)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ModelError, match="moe_intermediate_size"):
        expert_layer("Qwen3MoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64})


def test_more_experts_a_token_than_there_are() -> None:
    config = {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 8, "hidden_size": 64}
    with pytest.raises(ModelError, match="8 experts a token"):
        expert_layer("Qwen3MoeForCausalLM", config)


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": 0},
        {"num_experts": None},
        {"num_experts": 8, "num_hidden_layers": 2, "mlp_only_layers": [0, 1]},
        {"num_experts": 8, "num_hidden_layers": 2, "first_k_dense_replace": 2},
    ],
)
def test_dense(config: dict[str, Any]) -> None:
    assert expert_layer("Qwen3MoeForCausalLM", config) is None


def test_gemma_without_its_moe_block_is_dense() -> None:
    config = {**CONFIGS["Gemma4ForConditionalGeneration"][0], "enable_moe_block": False}
    assert expert_layer("Gemma4ForConditionalGeneration", config) is None


def test_an_unknown_family_is_worked_out_and_marked() -> None:
    config = {"num_routed_experts": 32, "moe_ffn_hidden_size": 512, "moe_topk": 4, "d_model": 1024}
    layer = expert_layer("NobodyKnowsForCausalLM", config)
    assert layer is not None
    assert (layer.experts, layer.width, layer.top_k, layer.hidden) == (32, 512, 4, 1024)
    assert not layer.certain
    assert layer.family is UNKNOWN_FAMILY


@pytest.mark.parametrize("inner", [{"architectures": ("Qwen3MoeForCausalLM",)}, {"model_type": "qwen3_moe"}])
def test_a_shell_takes_the_family_inside(inner: dict[str, Any]) -> None:
    family, certain = family_of("InternVLChatModel", inner)
    assert "Qwen3MoeForCausalLM" in family.architectures
    assert certain


def test_names_are_in_the_table_once() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))
    assert len(types) == len(set(types))


def test_sglangs_own_tuner_is_covered() -> None:
    tuner = """DbrxForCausalLM JambaForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
        Qwen3_5MoeForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3OmniMoeForConditionalGeneration
        DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM Glm4MoeForCausalLM GlmMoeDsaForCausalLM
        Llama4ForConditionalGeneration Grok1ForCausalLM Grok1ModelForCausalLM Grok1AForCausalLM BailingMoEForCausalLM
        BailingMoeForCausalLM BailingMoeV2ForCausalLM NemotronHForCausalLM KimiVLForConditionalGeneration
        KimiK25ForConditionalGeneration Step3VLForConditionalGeneration Step3p5ForCausalLM MixtralForCausalLM
        InternVLChatModel InternS1ForConditionalGeneration"""
    assert set(tuner.split()) <= {name for family in FAMILIES for name in family.architectures}


@pytest.mark.parametrize(
    ("release", "rules"),
    [
        ("0.4.9", "0.4.9"),
        ("0.3.0", "0.4.9"),
        ("0.4.9.post1", "0.4.9"),
        ("0.5.9", "0.4.9"),
        ("0.5.17", "0.5.17"),
        ("v0.5.18rc1", "0.5.17"),
        ("0.5.23", "0.5.23"),
        ("1.0", "0.5.23"),
        ("nonsense", "0.4.9"),
    ],
)
def test_releases(release: str, rules: str) -> None:
    assert rules_for(release) == rules


def test_releases_are_compared_as_numbers() -> None:
    assert release_key("0.5.9") < release_key("0.5.17")
    assert at_least("0.5.23", "0.5.17")
    assert not at_least("0.5.16", "0.5.17")
    assert tuple(sorted(KNOWN_RELEASES, key=release_key)) == KNOWN_RELEASES


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ("Qwen3MoeForCausalLM", "num_experts"),
        ("MixtralForCausalLM", "num_local_experts"),
        ("NewMoeForCausalLM", "find"),
    ],
)
def test_an_architecture_with_experts_whose_config_names_none_is_not_called_dense(
    architecture: str, named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        expert_layer(architecture, {"hidden_size": 2048})


def test_an_object_for_a_size_is_called_one() -> None:
    with pytest.raises(ModelError, match="num_experts is an object"):
        expert_layer("Qwen3MoeForCausalLM", {"num_experts": MappingProxyType({"a": 1})})


def test_spellings_of_the_newest_release() -> None:
    config = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "hidden_size": 6144}
    layer = expert_layer("ExaoneMoeForCausalLM", config)
    assert layer is not None
    assert (layer.certain, layer.family.redundant) == (True, True)
