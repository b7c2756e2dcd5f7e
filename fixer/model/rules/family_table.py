"""The table of model architectures: where their configs hold experts, width and top-k."""

from __future__ import annotations

from fixer.model.rules.family import INT4_GROUP32, NONE, Attention, Family, RunnerRule, SharedFusion
from fixer.sglang.releases import NEW, NEWEST

_MODELOPT = frozenset({"modelopt_fp8", "modelopt_fp4", "modelopt_mixed"})


_ANY_TRTLLM = frozenset({NONE, "fp8"}) | _MODELOPT


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
        fusion=_DEEPSEEK_FUSION,
        model_types=("deepseek_v2",),
    ),
    Family(
        ("KimiVLForConditionalGeneration", "DeepseekVL2ForCausalLM"),
        experts=_DEEPSEEK_FIELDS,
        redundant=True,
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
    Family(("DeepseekForCausalLM",), experts=_DEEPSEEK_FIELDS, model_types=("deepseek",)),  # deepseek.py
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
        path="block_sparse_moe.experts",
    ),
    Family(
        ("Grok1AForCausalLM",),  # known to SGLang's tuner only
        experts=_LOCAL,
        width=("moe_intermediate_size", "intermediate_size"),
    ),
    Family(
        ("DbrxForCausalLM",),  # dbrx.py: fused_moe called directly
        experts=("ffn_config.moe_num_experts",),
        width=("ffn_config.ffn_hidden_size",),
        top_k=("ffn_config.moe_top_k",),
        hidden=("d_model",),
        path="ffn.experts",
    ),
    Family(("JambaForCausalLM",), width=("intermediate_size",)),  # known to SGLang's tuner only
    Family(
        ("OlmoeForCausalLM",),  # olmoe.py:226
        width=("intermediate_size",),
        attention=Attention.GROUPED,
        model_types=("olmoe",),
    ),
    Family(
        ("Cohere2MoeForCausalLM", "Cohere2VisionForConditionalGeneration"),  # cohere2_moe.py:283
        width=("intermediate_size",),
        runners=(_trtllm(NONE, since=NEWEST),),
        model_types=("cohere2_moe",),
    ),
    Family(("XverseMoeForCausalLM",), width=("intermediate_size",), top_k=("moe_top_k",)),
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
    Family(("ExaoneMoeForCausalLM",), redundant=True),  # 0.5.17 spells it MoE
    Family(("BailingMoeV2_5ForCausalLM", "AfmoeForCausalLM")),
    Family(
        ("Lfm2MoeForCausalLM",),  # lfm2_moe.py:147
        path="feed_forward.experts",
        model_types=("lfm2_moe",),
    ),
    Family(("InternVLChatModel",), inner=True),
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
