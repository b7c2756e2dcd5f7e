"""What SGLang makes of each architecture: which config field is what, and what its model code decides.

One table, `FAMILIES`, read by `family_of` and `expert_layer`. Sources are `srt/models/<file>.py` of SGLang 0.5.17
unless a line says otherwise; what differs between releases is a field of the table, never a branch elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fixer.base.errors import ModelError

MAX_DIMENSION = 2**24
"""No expert count, hidden size or number of layers of any model is sensibly larger."""

KNOWN_RELEASES = ("0.4.9", "0.5.17", "0.5.23")
"""The releases of SGLang whose rules were read from their source."""

OLD, NEW, NEWEST = KNOWN_RELEASES


def release_key(release: str) -> tuple[int, ...]:
    """A release's numbers ("0.5.17" is (0, 5, 17)); a suffix such as ".post1" or "rc2" is left out."""
    numbers: list[int] = []
    for part in release.strip().lstrip("v").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits or len(digits) > 9:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def rules_for(release: str) -> str:
    """The known release whose rules apply: the newest that is not newer, or the oldest known."""
    key = release_key(release)
    return next((known for known in reversed(KNOWN_RELEASES) if release_key(known) <= key), OLD)


def at_least(release: str, since: str) -> bool:
    """Whether the rules of `release` include what came with `since`."""
    return release_key(rules_for(release)) >= release_key(since)


class Attention(Enum):
    """How a family's attention is laid out, as far as its weight shapes are worked out here."""

    GROUPED = "one fused qkv projection and one output projection in every layer"
    OTHER = "latent, linear or mixed"


@dataclass(frozen=True)
class SharedFusion:
    """When a family's shared experts become extra routed experts (E and top-k grow), on CUDA from sm_80.

    Attributes:
        count: the field with the number of shared experts; "" where there is one if `same_width` is given.
        same_width: the field with the shared expert's width, which must equal the routed experts'.
        routed: the numbers of routed experts it is allowed for; () allows any.
        shared: the numbers of shared experts it is allowed for; () allows any.
        architecture: the only architecture it is allowed for, "" for any.
        with_expert_parallel: allowed with ep > 1.
        with_overlap: allowed with two-batch or single-batch overlap.
        enforceable: `--enforce-shared-experts-fusion` overrides the conditions above.
        only_enforced: fused only with that flag.
        not_for: quantisation labels that rule it out.
    """

    count: str = "n_shared_experts"
    same_width: str = ""
    routed: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    architecture: str = ""
    with_expert_parallel: bool = False
    with_overlap: bool = True
    enforceable: bool = False
    only_enforced: bool = False
    not_for: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RunnerRule:
    """The MoE runner that SGLang picks for a family where the user's `--moe-runner-backend` is auto.

    Attributes:
        runner: the backend's name; "triton" is the kernel that moefix tunes.
        quantizations: quantisation labels it is for ("none" is an unquantised checkpoint).
        majors: major compute capabilities it is for; () is any.
        since: the first known release with the rule.
        flag_only: the quantisation must come from `--quantization`.
        no_flag: `--quantization` must not be given.
        single_rank: only without expert parallelism.
    """

    runner: str
    quantizations: frozenset[str]
    majors: tuple[int, ...] = ()
    since: str = NEW
    flag_only: bool = False
    no_flag: bool = False
    single_rank: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture, or several alike.

    Attributes:
        architectures: the names in `architectures` of config.json.
        experts, width, top_k, hidden: the fields with E, N (whole, before sharding), experts a token and hidden size;
            of several names the first that is there counts, a dot goes into a nested object.
        fusion: the rule for shared experts, None where they are never fused.
        redundant: `--ep-num-redundant-experts` adds to E.
        gated: gate and up projections are both there.
        since: the first known release that has the architecture; "" where SGLang has no model class of its own.
        attention: for the dense block-FP8 shapes.
        runners: the auto choice of the runner, first match wins.
        path: the experts' module below a layer, for lists of unquantised modules.
        enabled_by: a field that must be true for the model to have experts at all; "" for none.
        inner: the language model's own architecture decides (multimodal shells).
        model_types: `model_type` values that mean this family inside a shell.
        shared_width: the field with the width of an unfused shared expert; "" for none.
        pairs: a list of sizes is [text experts, vision experts], not one a layer.
    """

    architectures: tuple[str, ...]
    experts: tuple[str, ...] = ("num_experts",)
    width: tuple[str, ...] = ("moe_intermediate_size",)
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    hidden: tuple[str, ...] = ("hidden_size",)
    fusion: SharedFusion | None = None
    redundant: bool = False
    gated: bool = True
    since: str = NEW
    attention: Attention = Attention.OTHER
    runners: tuple[RunnerRule, ...] = ()
    path: str = "mlp.experts"
    enabled_by: str = ""
    inner: bool = False
    model_types: tuple[str, ...] = ()
    shared_width: str = ""
    pairs: bool = False


NONE = "none"
_MODELOPT = frozenset({"modelopt_fp8", "modelopt_fp4", "modelopt_mixed"})
_ANY_TRTLLM = frozenset({NONE, "fp8"}) | _MODELOPT
INT4_GROUP32 = "compressed-tensors int4 group 32"
"""The label of Kimi-K2's own 4-bit recipe, for which the DeepSeek family has a rule (arg_groups/overrides.py:1696)."""


def _trtllm(*quantizations: str, since: str = NEW, flag_only: bool = False) -> RunnerRule:
    return RunnerRule("flashinfer_trtllm", frozenset(quantizations), (10,), since, flag_only)


# arg_groups/overrides.py:1283-1312; modelopt_mixed came with 0.5.23 (model_overrides/qwen3_moe.py:76).
_QWEN_RUNNERS = (_trtllm(NONE, "fp8", "modelopt_fp4"), _trtllm("modelopt_mixed", since=NEWEST))
# arg_groups/overrides.py:1726-1740
_DEEPSEEK_RUNNERS = (_trtllm(*_ANY_TRTLLM, INT4_GROUP32),)
# arg_groups/overrides.py:907-967
_GPT_OSS_RUNNERS = (
    RunnerRule("flashinfer_mxfp4", frozenset({"mxfp4"}), (10, 12)),
    RunnerRule("triton_kernel", frozenset({NONE, "mxfp4"}), no_flag=True, single_rank=True),
)
# arg_groups/overrides.py:1205-1227
_NEMOTRON_RUNNERS = (
    _trtllm(NONE, *_MODELOPT),
    RunnerRule("marlin", frozenset({"modelopt_fp4", "modelopt_mixed"}), (8, 9)),
    RunnerRule("flashinfer_cutlass", frozenset({NONE}) | _MODELOPT),
)
# deepseek_v2.py:2974-3044; n_routed 384 only with quark, which NVIDIA cards do not serve.
_DEEPSEEK_FUSION = SharedFusion(
    routed=(256,),
    shared=(1,),
    architecture="DeepseekV3ForCausalLM",
    with_overlap=False,
    enforceable=True,
    not_for=frozenset({"w4afp8", INT4_GROUP32, "compressed-tensors int4"}),
)
_GLM_FUSION = SharedFusion(not_for=frozenset({"w4afp8"}))  # glm4_moe.py:1175-1212

_DEEPSEEK_FIELDS = ("n_routed_experts",)
_LOCAL = ("num_local_experts",)

FAMILIES: tuple[Family, ...] = (
    Family(
        ("Qwen3MoeForCausalLM", "Qwen3MoeForCausalLMMTP"),  # qwen3_moe.py:258
        redundant=True,
        since=OLD,
        attention=Attention.GROUPED,
        runners=_QWEN_RUNNERS,
        model_types=("qwen3_moe",),
    ),
    Family(
        ("Qwen3VLMoeForConditionalGeneration", "InternS1ProForConditionalGeneration"),
        redundant=True,
        attention=Attention.GROUPED,
        runners=_QWEN_RUNNERS,
        model_types=("qwen3_vl_moe_text",),
    ),
    Family(
        ("Qwen3OmniMoeForConditionalGeneration",),  # not in the runner rule of the Qwen3-MoE family
        redundant=True,
        attention=Attention.GROUPED,
        model_types=("qwen3_omni_moe_text",),
    ),
    Family(
        ("Qwen2MoeForCausalLM",),  # qwen2_moe.py:281; fusion is not switched on for CUDA
        redundant=True,
        since=OLD,
        attention=Attention.GROUPED,
        model_types=("qwen2_moe",),
        shared_width="shared_expert_intermediate_size",
    ),
    Family(
        ("Qwen3NextForCausalLM",),  # qwen3_next.py:546, qwen2_moe.py:141-175,246-268
        redundant=True,
        fusion=SharedFusion(count="", same_width="shared_expert_intermediate_size", with_expert_parallel=True),
        runners=_QWEN_RUNNERS,
        model_types=("qwen3_next",),
    ),
    Family(
        (
            "Qwen3_5MoeForConditionalGeneration",  # qwen3_5.py:711-723: not fused on CUDA
            "Qwen3_5ForConditionalGeneration",
            "InternS2PreviewForConditionalGeneration",
        ),
        redundant=True,
        runners=_QWEN_RUNNERS,
        model_types=("qwen3_5_moe_text",),
    ),
    Family(
        ("DeepseekV3ForCausalLM",),  # deepseek_v2.py:643
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        since=OLD,
        fusion=_DEEPSEEK_FUSION,
        runners=_DEEPSEEK_RUNNERS,
        model_types=("deepseek_v3", "kimi_k2"),
    ),
    Family(
        ("DeepseekV32ForCausalLM", "MistralLarge3ForCausalLM"),
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        fusion=_DEEPSEEK_FUSION,
        runners=_DEEPSEEK_RUNNERS,
        model_types=("deepseek_v32",),
    ),
    Family(
        ("DeepseekV2ForCausalLM",),
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        since=OLD,
        fusion=_DEEPSEEK_FUSION,
        model_types=("deepseek_v2",),
    ),
    Family(
        ("KimiVLForConditionalGeneration", "DeepseekVL2ForCausalLM"),
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        since=OLD,
        fusion=_DEEPSEEK_FUSION,
    ),
    Family(("DotsVLMForCausalLM",), experts=_DEEPSEEK_FIELDS, redundant=True, fusion=_DEEPSEEK_FUSION),
    Family(
        ("KimiK25ForConditionalGeneration", "PixtralForConditionalGeneration"),
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        fusion=_DEEPSEEK_FUSION,
        runners=_DEEPSEEK_RUNNERS,
    ),
    Family(
        ("DeepseekV4ForCausalLM",),
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        fusion=SharedFusion(only_enforced=True),
    ),
    Family(("DeepseekForCausalLM",), experts=_DEEPSEEK_FIELDS, since=OLD, model_types=("deepseek",)),  # deepseek.py
    Family(
        ("GlmMoeDsaForCausalLM",),  # glm4_moe.py:1461: the DeepSeek rule with its own name
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        fusion=SharedFusion(
            routed=(256,),
            shared=(1,),
            with_overlap=False,
            enforceable=True,
            not_for=_DEEPSEEK_FUSION.not_for,
        ),
        runners=_DEEPSEEK_RUNNERS,
        model_types=("glm_moe_dsa",),
    ),
    Family(
        ("Glm4MoeForCausalLM",),  # glm4_moe.py:426
        experts=_DEEPSEEK_FIELDS,
        fusion=_GLM_FUSION,
        attention=Attention.GROUPED,
        runners=(_trtllm(NONE, "modelopt_fp4"),),
        model_types=("glm4_moe",),
    ),
    Family(
        ("Glm4MoeLiteForCausalLM",),  # glm4_moe_lite.py:213,925-957
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        fusion=SharedFusion(shared=(1,)),
        model_types=("glm4_moe_lite",),
    ),
    Family(
        ("Glm4vMoeForConditionalGeneration",),  # glm4v_moe.py:85-114
        experts=_DEEPSEEK_FIELDS,
        fusion=SharedFusion(),
        attention=Attention.GROUPED,
        model_types=("glm4v_moe_text",),
    ),
    Family(
        ("MixtralForCausalLM", "QuantMixtralForCausalLM"),  # mixtral.py:225
        experts=_LOCAL,
        width=("intermediate_size",),
        since=OLD,
        attention=Attention.GROUPED,
        path="block_sparse_moe.experts",
        model_types=("mixtral",),
    ),
    Family(
        ("PhiMoEForCausalLM",),  # phimoe.py:355
        experts=_LOCAL,
        width=("intermediate_size",),
        attention=Attention.GROUPED,
        path="block_sparse_moe.experts",
        model_types=("phimoe",),
    ),
    Family(
        ("GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM"),  # granitemoe.py:203
        experts=_LOCAL,
        width=("intermediate_size",),
        path="block_sparse_moe.experts",
        model_types=("granitemoe", "granitemoehybrid"),
    ),
    Family(
        ("GraniteMoeSharedForCausalLM",),  # 0.5.23's granitemoe.py
        experts=_LOCAL,
        width=("intermediate_size",),
        since=NEWEST,
        path="block_sparse_moe.experts",
        model_types=("granitemoeshared",),
    ),
    Family(
        ("GptOssForCausalLM",),  # gpt_oss.py:231
        experts=_LOCAL,
        width=("intermediate_size",),
        redundant=True,
        attention=Attention.GROUPED,
        runners=_GPT_OSS_RUNNERS,
        model_types=("gpt_oss",),
    ),
    Family(
        ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),  # llama4.py:118, overrides.py:991
        experts=_LOCAL,
        width=("intermediate_size",),
        since=OLD,
        runners=(_trtllm("fp8", "modelopt_fp8", flag_only=True),),
        path="feed_forward.experts",
        model_types=("llama4_text",),
    ),
    Family(
        ("MiniMaxM2ForCausalLM",),  # minimax_m2.py:520
        experts=_LOCAL,
        width=("intermediate_size",),
        redundant=True,
        attention=Attention.GROUPED,
        runners=(RunnerRule("flashinfer_trtllm_routed", frozenset({"modelopt_fp4"}), (10,), NEWEST),),
        path="block_sparse_moe.experts",
        model_types=("minimax_m2",),
    ),
    Family(
        ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"),  # minimax_m3.py:313,1468-1505
        experts=_LOCAL,
        width=("intermediate_size",),
        redundant=True,
        fusion=SharedFusion(not_for=frozenset({"modelopt_mixed"})),
        runners=(
            RunnerRule("deep_gemm", frozenset({"mxfp8"}), (10,)),
            RunnerRule("flashinfer_trtllm_routed", frozenset({"modelopt_mixed"}), (10,)),
        ),
        path="block_sparse_moe.experts",
    ),
    Family(
        ("Grok1ForCausalLM", "Grok1ModelForCausalLM"),  # grok.py:507
        experts=_LOCAL,
        width=("moe_intermediate_size", "intermediate_size"),
        since=OLD,
        path="block_sparse_moe.experts",
    ),
    Family(
        ("Grok1AForCausalLM",),  # known to SGLang's tuner only
        experts=_LOCAL,
        width=("moe_intermediate_size", "intermediate_size"),
        since="",
    ),
    Family(
        ("DbrxForCausalLM",),  # dbrx.py: fused_moe called directly
        experts=("ffn_config.moe_num_experts",),
        width=("ffn_config.ffn_hidden_size",),
        top_k=("ffn_config.moe_top_k",),
        hidden=("d_model",),
        since=OLD,
        path="ffn.experts",
    ),
    Family(("JambaForCausalLM",), width=("intermediate_size",), since=""),  # known to SGLang's tuner only
    Family(
        ("OlmoeForCausalLM",),  # olmoe.py:226
        width=("intermediate_size",),
        since=OLD,
        attention=Attention.GROUPED,
        model_types=("olmoe",),
    ),
    Family(
        ("Cohere2MoeForCausalLM", "Cohere2VisionForConditionalGeneration"),  # cohere2_moe.py:283
        width=("intermediate_size",),
        runners=(_trtllm(NONE, since=NEWEST),),
        model_types=("cohere2_moe",),
    ),
    Family(("XverseMoeForCausalLM",), width=("intermediate_size",), top_k=("moe_top_k",), since=OLD),
    Family(
        ("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"),  # mimo_v2.py:410
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
        runners=(_trtllm("fp8"),),
    ),
    Family(
        ("NemotronHForCausalLM", "NemotronHPuzzleForCausalLM"),  # nemotron_h.py:186,201
        experts=_DEEPSEEK_FIELDS,
        hidden=("moe_latent_size", "hidden_size"),
        redundant=True,
        gated=False,
        runners=_NEMOTRON_RUNNERS,
        path="mixer.experts",
        model_types=("nemotron_h",),
    ),
    Family(
        ("KimiLinearForCausalLM",),  # kimi_linear.py:108, configs/kimi_linear.py:93
        top_k=("num_experts_per_token", "num_experts_per_tok"),
        path="block_sparse_moe.experts",
        model_types=("kimi_linear",),
    ),
    Family(
        ("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4UnifiedForConditionalGeneration"),
        top_k=("top_k_experts",),  # gemma4_causal.py:256
        redundant=True,
        enabled_by="enable_moe_block",
        runners=(_trtllm("modelopt_fp4"),),
        path="moe.experts",
        model_types=("gemma4_text",),
    ),
    Family(
        ("Ernie4_5_MoeForCausalLM",),  # ernie4.py:103
        experts=("moe_num_experts",),
        top_k=("moe_k",),
        attention=Attention.GROUPED,
        model_types=("ernie4_5_moe",),
    ),
    Family(
        ("Ernie4_5_VLMoeForConditionalGeneration",),  # ernie45_moe_vl.py:214-249
        experts=("moe_num_experts",),
        top_k=("moe_k",),
        pairs=True,
    ),
    Family(
        ("HunYuanMoEV1ForCausalLM",),  # hunyuan.py:136-165
        width=("moe_intermediate_size", "intermediate_size"),
        top_k=("moe_topk",),
        since=OLD,
    ),
    Family(("HYV3ForCausalLM",)),
    Family(
        ("Step3VLForConditionalGeneration",),  # step3_vl.py:128
        experts=("moe_num_experts",),
        top_k=("moe_top_k",),
        path="moe.experts",
        model_types=("step3_text",),
    ),
    Family(
        ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),  # step3p5.py:150
        experts=("moe_num_experts",),
        top_k=("moe_top_k",),
        redundant=True,
        path="moe.experts",
        model_types=("step3p5",),
    ),
    Family(
        ("LongcatFlashForCausalLM",),  # longcat_flash.py:259
        experts=_DEEPSEEK_FIELDS,
        width=("expert_ffn_hidden_size", "moe_intermediate_size"),
        top_k=("moe_topk",),
    ),
    Family(
        (
            "BailingMoEForCausalLM",  # bailing_moe.py:250
            "BailingMoeForCausalLM",
            "BailingMoeV2ForCausalLM",
            "SarvamMoEForCausalLM",
            "SarvamMLAForCausalLM",
            "SDARMoeForCausalLM",
            "LLaDA2MoeModelLM",
            "LagunaForCausalLM",
            "ExaoneMoEForCausalLM",
        ),
        redundant=True,
    ),
    Family(("ExaoneMoeForCausalLM",), redundant=True, since=NEWEST),  # 0.5.17 spells it MoE
    Family(("BailingMoeV2_5ForCausalLM", "AfmoeForCausalLM")),
    Family(
        ("Lfm2MoeForCausalLM",),  # lfm2_moe.py:147
        path="feed_forward.experts",
        model_types=("lfm2_moe",),
    ),
    Family(("InternVLChatModel",), since=OLD, inner=True),
    Family(
        (
            "InternS1ForConditionalGeneration",
            "Lfm2VlForConditionalGeneration",
            "LlavaForConditionalGeneration",
            "Mistral3ForConditionalGeneration",
            "NemotronH_Nano_VL_V2",
            "NemotronH_Nano_Omni_Reasoning_V3",
        ),
        inner=True,
    ),
)

_NEVER_DENSE = frozenset({"MixtralForCausalLM", "DbrxForCausalLM", "GptOssForCausalLM", "Grok1ForCausalLM"})
"""Architectures whose every model has experts, though their names do not say so."""

# The names that some model or other gives these numbers, in the order of trust; for families not in the table.
UNKNOWN_FAMILY = Family(
    (),
    experts=(
        "num_experts",
        "n_routed_experts",
        "num_local_experts",
        "moe_num_experts",
        "num_moe_experts",
        "num_routed_experts",
        "ffn_config.moe_num_experts",
    ),
    width=(
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "moe_ffn_hidden_size",
        "expert_intermediate_size",
        "ffn_config.ffn_hidden_size",
        "intermediate_size",
        "ffn_hidden_size",
    ),
    top_k=(
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_top_k",
        "moe_topk",
        "top_k_experts",
        "moe_k",
        "experts_per_token",
        "num_selected_experts",
        "ffn_config.moe_top_k",
    ),
    hidden=("hidden_size", "d_model", "n_embd"),
    since="",
)

_BY_ARCHITECTURE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.architectures}
_BY_MODEL_TYPE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.model_types}


@dataclass(frozen=True)
class ExpertLayer:
    """The MoE layer as the checkpoint has it, before sharding and fusion.

    Attributes:
        family: the table's entry, or `UNKNOWN_FAMILY`.
        certain: the entry is for this architecture itself.
        experts, width, top_k, hidden: routed experts, the experts' intermediate size, experts a token, hidden size.
        shared: shared experts that the family's rule could fuse; 0 for none.
        varies: the layers differ, and the numbers are those of the first.
    """

    family: Family
    certain: bool
    experts: int
    width: int
    top_k: int
    hidden: int
    shared: int = 0
    varies: bool = False


def family_of(architecture: str, text_config: Mapping[str, Any]) -> tuple[Family, bool]:
    """The family of an architecture, and whether the table has it by that name.

    A multimodal shell is looked up by the architecture or the model type of the language model inside it.
    """
    family = _BY_ARCHITECTURE.get(architecture)
    if family is not None and not family.inner:
        return family, True
    known = _inner_family(text_config)
    if known is not None:
        return known, family is not None
    return UNKNOWN_FAMILY, False


def _inner_family(text_config: Mapping[str, Any]) -> Family | None:
    names = text_config.get("architectures")
    first = names[0] if isinstance(names, (list, tuple)) and names else None
    model_type = text_config.get("model_type")
    found = _BY_ARCHITECTURE.get(first) if isinstance(first, str) else None
    if found is None and isinstance(model_type, str):
        found = _BY_MODEL_TYPE.get(model_type)
    return None if found is None or found.inner else found


def expert_layer(architecture: str, text_config: Mapping[str, Any]) -> ExpertLayer | None:
    """The MoE layer that a config describes, or None for a dense model.

    Raises:
        ModelError: a size is missing or is no sensible whole number; the message names the field.
    """
    family, certain = family_of(architecture, text_config)
    experts, varies = _first_size(text_config, family.experts, required=False)
    if not experts:
        _must_be_dense(architecture, text_config, family)
        return None
    if not _has_moe_layers(text_config, family):
        return None
    width, width_varies = _first_size(text_config, family.width)
    top_k, top_k_varies = _first_size(text_config, family.top_k)
    hidden, _ = _first_size(text_config, family.hidden)
    if top_k > experts:
        raise ModelError(f"config.json asks for {top_k} experts a token, but has only {experts}")
    return ExpertLayer(
        family,
        certain,
        experts,
        width,
        top_k,
        hidden,
        _shared_experts(text_config, family, width),
        varies or width_varies or top_k_varies,
    )


def _must_be_dense(architecture: str, config: Mapping[str, Any], family: Family) -> None:
    """Refuse to call a model dense whose architecture says that it has experts, but whose config says nothing of them.

    Raises:
        ModelError: none of the fields is there; a 0 or null in one means dense.
    """
    says_moe = "moe" in architecture.lower() or architecture in _NEVER_DENSE
    if says_moe and not family.enabled_by and not any(_present(config, name) for name in family.experts):
        known = "number of experts that moefix can find" if family is UNKNOWN_FAMILY else " or ".join(family.experts)
        raise ModelError(
            f"config.json of a {architecture} has no {known}",
            "is the file complete? moefix does not guess the number of experts",
        )


def _present(config: Mapping[str, Any], name: str) -> bool:
    outer, _, last = name.rpartition(".")
    holder = look_up(config, outer) if outer else config
    return isinstance(holder, Mapping) and last in holder


def _has_moe_layers(config: Mapping[str, Any], family: Family) -> bool:
    """Whether any layer is an MoE layer, by the fields that make single layers dense."""
    if family.enabled_by and config.get(family.enabled_by) is False:
        return False
    layers = size(config, "num_hidden_layers", required=False)
    if not layers:
        return True
    first = config.get("first_k_dense_replace")
    if isinstance(first, int) and not isinstance(first, bool) and first >= layers:
        return False
    dense = config.get("mlp_only_layers")
    listed = {index for index in dense if isinstance(index, int)} if isinstance(dense, (list, tuple)) else set()
    return not listed.issuperset(range(layers)) if len(listed) >= layers else True


def _shared_experts(config: Mapping[str, Any], family: Family, width: int) -> int:
    """The shared experts that the family's fusion rule speaks of."""
    rule = family.fusion
    if rule is None:
        return 0
    if rule.same_width:
        return 1 if config.get(rule.same_width) == width else 0
    return size(config, rule.count, required=False)


def _first_size(config: Mapping[str, Any], names: tuple[str, ...], *, required: bool = True) -> tuple[int, bool]:
    """The first of the named sizes that is there, and whether it differs from layer to layer."""
    for name in names:
        value = look_up(config, name)
        if value is None:
            continue
        sizes = [_checked(name, item) for item in value[:1024]] if isinstance(value, (list, tuple)) else []
        number = next((each for each in sizes if each), 0) if sizes else _checked(name, value)
        if number or not required:
            return number, len(set(sizes)) > 1
        raise ModelError(f"config.json: {name} is 0, which no MoE layer can have")
    if required:
        raise ModelError(f"config.json has experts, but no {' or '.join(names)}")
    return 0, False


def size(config: Mapping[str, Any], name: str, *, required: bool = True) -> int:
    """A size of the config; 0 where it is missing and not required.

    Raises:
        ModelError: it is missing though required, or no whole number from 0 to `MAX_DIMENSION`.
    """
    value = look_up(config, name)
    if value is None:
        if required:
            raise ModelError(f"config.json has no {name}")
        return 0
    return _checked(name, value)


def look_up(config: Mapping[str, Any], name: str) -> Any:
    """A field, where a dot in its name goes into a nested object; None where it is not there."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _checked(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_DIMENSION:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**12 else "far too large"
        shown = "an object" if isinstance(value, Mapping) else shown
        raise ModelError(f"config.json: {name} is {shown[:40]}, not a whole number from 0 to {MAX_DIMENSION}")
    return value
