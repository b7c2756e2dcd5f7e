"""Does SGLang ask for a tuned file for this model, with these flags, on this card, in this release, and for which?

The answer is a `Decision`. Each step below rules something out, in the order in which SGLang comes to it: the model's
layer, the parallel sizes, an all-to-all backend, the quantisation, the runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fixer.machine.cards import Card
from fixer.model.config import Model
from fixer.model.rules.case import (
    Case,
    Decision,
    Outcome,
    Server,
    Shard,
    attention_ranks,
    fuses,
    module_names,
    other_kernel,
    routed_experts,
    shard_advice,
    shard_of,
)
from fixer.model.rules.dense import shapes_asked_for
from fixer.model.rules.families import ExpertLayer, expert_layer, family_of, size
from fixer.model.rules.family import NONE, Attention, Family
from fixer.model.rules.quantization import resolve
from fixer.model.rules.runner import by_runner, mixtral_fused
from fixer.model.rules.scheme import Fate, Question
from fixer.sglang.declared import NOTHING_DECLARED, Declared
from fixer.sglang.flags import ServerFlags
from fixer.sglang.releases import KNOWN_RELEASES, NEW, OLD, at_least, release_key, rules_for
from fixer.workload import NumberFormat, Workload

TRITON = "fused_moe_triton"
"""The kernel that moefix tunes."""


_FROM_VLLM = frozenset({"awq_marlin", "gptq_marlin", "awq", "gptq", "gguf", "bitsandbytes"})
"""Methods that 0.4.9 takes from vLLM (layers/quantization/__init__.py of 0.4.9)."""


def decide(
    model: Model, flags: ServerFlags, card: Card, release: str, declared: Declared = NOTHING_DECLARED
) -> Decision:
    """What SGLang of that release does on that card.

    Args:
        release: SGLang's version; one between the known ones follows the newest known that is not newer.
        declared: what its tree has; without it no architecture and no quantisation counts as unknown to SGLang.

    Raises:
        UsageError: parallel sizes that cannot go together, whatever the model.
        ModelError: the model's config makes no sense.
    """
    shard = shard_of(flags, release)
    layer = expert_layer(model.architecture, model.text_config)
    if layer is None:
        return _without_experts(Server(model, flags, card, release, declared))
    unknown, indivisible = _unknown_to(release, declared, model), _indivisible(model, flags, layer, shard)
    if unknown or indivisible:
        return Decision(Outcome.LOAD_ERROR, "none", unknown or indivisible, indivisible=not unknown)
    scheme = resolve(_question(Server(model, flags, card, release, declared), layer.family, layer, shard))
    case = Case(model, flags, card, release, declared, layer, shard, scheme)
    decision = _elsewhere(case) or _here(case)
    return replace(decision, notes=(*([model.note] if model.note else []), *decision.notes, *_notes(case)))


def layer_workload(model: Model, flags: ServerFlags, card: Card, release: str) -> Workload | None:
    """The MoE layer as the Triton kernel would see it, whatever kernel runs it; None for a dense model."""
    shard = shard_of(flags, release)
    layer = expert_layer(model.architecture, model.text_config)
    if layer is None:
        return None
    scheme = resolve(_question(Server(model, flags, card, release, NOTHING_DECLARED), layer.family, layer, shard))
    return _workload(Case(model, flags, card, release, NOTHING_DECLARED, layer, shard, scheme))


# --- no experts -------------------------------------------------------------------------------------------------


def _without_experts(server: Server) -> Decision:
    """A dense model: nothing to tune for the experts, though its dense products may have files."""
    model, flags = server.model, server.flags
    family, _ = family_of(model.architecture, model.text_config)
    hidden = size(model.text_config, "hidden_size", required=False)
    scheme = resolve(_question(server, family, None, Shard(flags.tp_size, 1, 1)))
    return Decision(
        Outcome.NO_MOE,
        "none",
        "the model is dense: it has no experts, so there is no MoE kernel to tune",
        notes=(model.note,) if model.note else (),
        dense_shapes=shapes_asked_for(model, flags, server.card, scheme, None) if hidden else (),
    )


# --- the shard --------------------------------------------------------------------------------------------------


_TRANSFORMERS = "TransformersMoEForCausalLM"
"""With this class a tree runs Transformers' own model, experts and all, where it has none (models/transformers.py)."""


def _unknown_to(release: str, declared: Declared, model: Model) -> str:
    """Why the tree cannot load the architecture, "" where it can, may, or cannot be read."""
    known = declared.architectures
    if not known or model.architecture in known or _TRANSFORMERS in known:
        return ""
    return f"SGLang {release} stops: it has no {model.architecture}; use a release that has it"


def _indivisible(model: Model, flags: ServerFlags, layer: ExpertLayer, shard: Shard) -> str:
    """Why the layer cannot be split over the ranks, "" where it can (fused_moe_triton/layer.py:285-308)."""
    experts = routed_experts(flags, layer)
    if experts % shard.ep:
        return (
            f"SGLang stops: {experts} experts cannot be split over {shard.ep} expert parallel ranks; "
            "choose an --ep-size that divides them"
        )
    if layer.width % shard.moe_tp:
        return (
            f"SGLang stops: the experts' {layer.width} columns cannot be split over {shard.moe_tp} ranks; "
            "choose a --tp-size that divides them"
        )
    if shard.moe_tp > layer.experts:
        return (
            f"SGLang stops: --tp-size {shard.tp} is more than the model's {layer.experts} experts; "
            "choose a smaller --tp-size"
        )
    return _indivisible_heads(model, flags, layer, shard)


def _indivisible_heads(model: Model, flags: ServerFlags, layer: ExpertLayer, shard: Shard) -> str:
    """Why the attention cannot be split over the ranks, "" where it can; key and value heads may be repeated."""
    heads = size(model.text_config, "num_attention_heads", required=False)
    kv_heads = size(model.text_config, "num_key_value_heads", required=False) or heads
    ranks = attention_ranks(flags, shard.tp)
    few, many = sorted((max(kv_heads, 1), ranks))
    if heads % ranks == 0 and (layer.family.attention is not Attention.GROUPED or not heads or many % few == 0):
        return ""
    return (
        f"SGLang stops: {heads} attention heads ({kv_heads} for keys and values) cannot be split over {ranks} ranks; "
        "choose a --tp-size that divides them"
    )


# --- the quantisation -------------------------------------------------------------------------------------------


def _question(server: Server, family: Family, layer: ExpertLayer | None, shard: Shard) -> Question:
    model, flags = server.model, server.flags
    return Question(
        quant_config=model.quant_config,
        flag=flags.quantization,
        runner=flags.moe_runner_backend,
        arch=server.card.arch,
        release=server.release,
        methods=server.declared.quantization_methods,
        hidden=layer.hidden if layer else 128,
        width=layer.width // shard.moe_tp if layer else 128,
        tp_size=shard.tp,
        layers=module_names(model.text_config, family.path),
        rescue=shard_advice(layer, shard),
    )


# --- who runs the experts ---------------------------------------------------------------------------------------


def _elsewhere(case: Case) -> Decision | None:
    """The decision where the Triton kernel is not reached, else None."""
    flags, scheme = case.flags, case.scheme
    # From 0.4.10 on --enable-ep-moe sets the expert ranks only, until 0.5.3 refuses it.
    ep_moe = flags.enable_ep_moe and release_key(case.release) <= release_key(OLD)
    backend = "deepep" if flags.enable_deepep_moe else "ep_moe" if ep_moe else flags.moe_a2a_backend
    if backend != "none":
        return other_kernel(backend, f"the all-to-all backend {backend} runs the experts with kernels of its own")
    refusal = _refusal(case)
    if refusal:
        return Decision(Outcome.LOAD_ERROR, "none", refusal)
    if not mixtral_fused(case):
        return other_kernel(
            "quant_mixtral", f"SGLang serves Mixtral in {scheme.method} with plain products, one an expert"
        )
    return by_runner(case) or (other_kernel(scheme.kernel, scheme.reason) if scheme.fate is Fate.OTHER else None)


def _refusal(case: Case) -> str:
    """Why SGLang stops at the quantisation, "" where it does not."""
    if case.scheme.fate is Fate.LOAD_ERROR:
        return case.scheme.reason
    if case.scheme.method != NONE and case.flags.dtype == "float32":
        return f"SGLang stops: {case.scheme.method} does not go with --dtype float32; leave it out"
    return ""


# --- the Triton kernel ------------------------------------------------------------------------------------------


def _here(case: Case) -> Decision:
    """The decision where the Triton kernel runs the experts, or would."""
    workload = _workload(case)
    dense = shapes_asked_for(case.model, case.flags, case.card, case.scheme, case)
    outcome, reason = _outcome(case)
    return Decision(outcome, TRITON, reason, workload, case.scheme.notes, dense)


def _outcome(case: Case) -> tuple[Outcome, str]:
    scheme = case.scheme
    if scheme.fate is Fate.CRASH:
        return Outcome.ASKS_THEN_CRASHES, scheme.reason
    if case.flags.enable_deterministic_inference:
        return (
            Outcome.NO_LOOKUP,
            "--enable-deterministic-inference fixes the kernel's configuration; SGLang reads no file",
        )
    doubt = scheme.reason if scheme.fate is Fate.UNCERTAIN else _doubt(case)
    if doubt:
        return Outcome.UNCERTAIN, doubt
    return Outcome.ASKS, "SGLang runs the experts with its fused MoE Triton kernel and looks for tuned files"


def _doubt(case: Case) -> str:
    """Why the answer is not certain, "" where it is."""
    layer, architecture = case.layer, case.model.architecture
    runner, method = case.flags.moe_runner_backend, case.scheme.method
    doubts = (
        (
            not layer.certain,
            f"moefix has no rules for {architecture}; worked out from the names of its config's fields",
        ),
        (
            runner not in {"auto", "triton"},
            f"SGLang's {method} names its own kernel; moefix does not know how it goes with the runner {runner}",
        ),
        (
            bool(case.declared.architectures) and architecture not in case.declared.architectures,
            f"SGLang {case.release} has no {architecture} and would try Transformers' own model",
        ),
        (
            layer.family.fusion is not None and case.release not in KNOWN_RELEASES,
            f"moefix does not know whether SGLang {case.release} fuses the shared experts of {architecture}",
        ),
        (
            layer.varies and not layer.family.pairs,
            "the layers' experts differ in size; moefix plans for the first size that the config names",
        ),
    )
    return next((text for true, text in doubts if true), "")


def _workload(case: Case) -> Workload:
    """The MoE layer on one shard (fused_moe_triton/layer.py:285-308)."""
    layer, shard, scheme = case.layer, case.shard, case.scheme
    fused = layer.shared if fuses(case) else 0
    kt_experts = case.flags.kt_num_gpu_experts
    width = -(-(layer.width // shard.moe_tp) // scheme.pad_to) * scheme.pad_to
    number_format, activation = scheme.number_format, _activation_dtype(case)
    if number_format is NumberFormat.NONE and activation == "float32":
        number_format = NumberFormat.FLOAT32
    return Workload(
        experts=kt_experts or routed_experts(case.flags, layer) // shard.ep + fused,
        intermediate=width // 2 if scheme.packed else width,
        hidden_size=layer.hidden,
        top_k=layer.top_k + fused,
        number_format=number_format,
        activation_dtype=activation,
        block_shape=scheme.block_shape,
        per_channel_quant=scheme.per_channel,
        group_size=scheme.group_size,
        has_zero_points=scheme.has_zero_points,
        gated=layer.family.gated,
        tp_size=shard.tp,
        ep_size=shard.ep,
    )


_DTYPES: Mapping[str, str] = {
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float": "float32",
}


def _activation_dtype(case: Case) -> str:
    """The activations' dtype (model_config.py:1649-1710): float32 checkpoints are served in half precision."""
    if case.scheme.method == "mxfp4":
        return "bfloat16"  # arg_groups/overrides.py:907
    named = case.flags.dtype
    if named == "auto":
        named = _config_dtype(case.model)
    if named == "bfloat16" and case.card.arch < 80:
        return "float16"  # no bfloat16 below compute capability 8.0
    return named


def _config_dtype(model: Model) -> str:
    for config in (model.text_config, model.config):
        for name in ("dtype", "torch_dtype"):
            value = config.get(name)
            if isinstance(value, str):
                found = _DTYPES.get(value.removeprefix("torch."), "bfloat16")
                gemma = str(config.get("model_type", "")).startswith("gemma")
                return ("bfloat16" if gemma else "float16") if found == "float32" else found
    # A config that names none is nearly always a bfloat16 checkpoint whose config class says so.
    return "bfloat16"


def _notes(case: Case) -> tuple[str, ...]:
    """What else a user should know."""
    flags = case.flags
    notes = {
        f"worked out by the rules of SGLang {rules_for(case.release)}": case.release not in KNOWN_RELEASES,
        "with --enable-lora SGLang also looks for files of its LoRA experts, which moefix does not tune": (
            flags.enable_lora
        ),
        "with --enable-torch-compile a single token bypasses the file (unquantised experts)": (
            flags.enable_torch_compile and case.scheme.number_format is NumberFormat.NONE
        ),
        f"SGLang {OLD} has {case.scheme.method} only with vLLM installed beside it": (
            not at_least(case.release, NEW) and case.scheme.method in _FROM_VLLM
        ),
        f"not read: {', '.join(flags.unread)}": bool(flags.unread),
        f"not checked, since this SGLang's list of flags cannot be read: {', '.join(flags.unchecked)[:200]}": bool(
            flags.unchecked
        ),
        "planned for the text experts; SGLang looks for files of the vision experts too": (
            case.layer.family.pairs and case.layer.varies
        ),
    }
    return tuple(text for text, true in notes.items() if true)
