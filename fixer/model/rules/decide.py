"""Does SGLang ask for a tuned file for this model, with these flags, on this card, in this release, and for which?

The answer is a `Decision`. Each step below rules something out, in the order in which SGLang comes to it: the model's
layer, the parallel sizes, an all-to-all backend, the quantisation, the runner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from fixer.base.errors import UsageError
from fixer.model.rules.families import Attention, ExpertLayer, Family, KNOWN_RELEASES, NEW, NONE, OLD, RunnerRule, SharedFusion, at_least, expert_layer, family_of, look_up, release_key, rules_for, size
from fixer.sglang.flags import ServerFlags
from fixer.machine.cards import Card
from fixer.model.config import Model
from fixer.model.rules.quantization import Fate, Match, Question, Scheme, ignored, resolve
from fixer.workload import NumberFormat, Workload

TRITON = "fused_moe_triton"
"""The kernel that moefix tunes."""


_MOST_RANKS = 1024
"""No advice names more ranks than this."""

_FROM_VLLM = frozenset({"awq_marlin", "gptq_marlin", "awq", "gptq", "gguf", "bitsandbytes"})
"""Methods that 0.4.9 takes from vLLM (layers/quantization/__init__.py of 0.4.9)."""


class Outcome(Enum):
    """What SGLang does about a tuning file."""

    ASKS = "asks"
    OTHER_KERNEL = "other_kernel"
    NO_LOOKUP = "no_lookup"
    NO_MOE = "no_moe"
    LOAD_ERROR = "load_error"
    ASKS_THEN_CRASHES = "asks_then_crashes"
    UNCERTAIN = "uncertain"


@dataclass(frozen=True)
class Decision:
    """What SGLang does, and for which workload.

    Attributes:
        outcome: whether it asks for a file.
        kernel: "fused_moe_triton", "none", or the other kernel's name.
        reason: one sentence; for a load error or a crash also the cure.
        workload: the MoE layer on one shard; None where the Triton kernel is not reached.
        notes: what else a user should know.
        dense_shapes: (N, K) on one rank of the block-FP8 dense products whose files SGLang looks up as well.
        indivisible: the model cannot be split as the flags say, whatever its number format and the card.
    """

    outcome: Outcome
    kernel: str
    reason: str
    workload: Workload | None = None
    notes: tuple[str, ...] = ()
    dense_shapes: tuple[tuple[int, int], ...] = ()
    indivisible: bool = False


@dataclass(frozen=True)
class _Shard:
    """The parallel sizes: all ranks, expert parallel ranks, and ranks that share one expert's width."""

    tp: int
    ep: int
    moe_tp: int


@dataclass(frozen=True)
class _Server:
    """What the user starts, and where."""

    model: Model
    flags: ServerFlags
    card: Card
    release: str


@dataclass(frozen=True)
class _Case(_Server):
    """All that a step needs for a model with experts."""

    layer: ExpertLayer
    shard: _Shard
    scheme: Scheme


def decide(model: Model, flags: ServerFlags, card: Card, release: str) -> Decision:
    """What SGLang of that release does on that card.

    Args:
        release: SGLang's version; one between the known ones follows the newest known that is not newer.

    Raises:
        UsageError: parallel sizes that cannot go together, whatever the model.
        ModelError: the model's config makes no sense.
    """
    shard = _shard(flags, release)
    layer = expert_layer(model.architecture, model.text_config)
    if layer is None:
        return _without_experts(_Server(model, flags, card, release))
    unknown, indivisible = _unknown_to(release, layer, model), _indivisible(model, flags, layer, shard)
    if unknown or indivisible:
        return Decision(Outcome.LOAD_ERROR, "none", unknown or indivisible, indivisible=not unknown)
    scheme = resolve(_question(_Server(model, flags, card, release), layer.family, layer, shard))
    case = _Case(model, flags, card, release, layer, shard, scheme)
    decision = _elsewhere(case) or _here(case)
    return replace(decision, notes=(*([model.note] if model.note else []), *decision.notes, *_notes(case)))


def layer_workload(model: Model, flags: ServerFlags, card: Card, release: str) -> Workload | None:
    """The MoE layer as the Triton kernel would see it, whatever kernel runs it; None for a dense model."""
    shard = _shard(flags, release)
    layer = expert_layer(model.architecture, model.text_config)
    if layer is None:
        return None
    scheme = resolve(_question(_Server(model, flags, card, release), layer.family, layer, shard))
    return _workload(_Case(model, flags, card, release, layer, shard, scheme))


# --- no experts -------------------------------------------------------------------------------------------------


def _without_experts(server: _Server) -> Decision:
    """A dense model: nothing to tune for the experts, though its dense products may have files."""
    model, flags = server.model, server.flags
    family, _ = family_of(model.architecture, model.text_config)
    hidden = size(model.text_config, "hidden_size", required=False)
    scheme = resolve(_question(server, family, None, _Shard(flags.tp_size, 1, 1)))
    return Decision(
        Outcome.NO_MOE,
        "none",
        "the model is dense: it has no experts, so there is no MoE kernel to tune",
        notes=(model.note,) if model.note else (),
        dense_shapes=_dense_shapes(model, flags, server.card, scheme, None) if hidden else (),
    )


# --- the shard --------------------------------------------------------------------------------------------------


def _shard(flags: ServerFlags, release: str) -> _Shard:
    """The parallel sizes, checked against each other (distributed/parallel_state.py:2434).

    Raises:
        UsageError: they cannot go together; the message names the flags.
    """
    tp, moe_dp = flags.tp_size, flags.moe_dp_size
    ep = _expert_ranks(flags, release)
    if ep > tp or tp % ep:
        raise UsageError(f"--ep-size {ep} does not divide --tp-size {tp}", "expert ranks are a share of the tp ranks")
    if tp % (ep * moe_dp):
        raise UsageError(f"--ep-size {ep} times --moe-dp-size {moe_dp} does not divide --tp-size {tp}")
    if flags.enable_dp_attention and (flags.dp_size > tp or tp % flags.dp_size):
        raise UsageError(f"--dp-size {flags.dp_size} does not divide --tp-size {tp}, as --enable-dp-attention needs")
    return _Shard(tp, ep, tp // ep // moe_dp)


def _expert_ranks(flags: ServerFlags, release: str) -> int:
    """Expert parallel ranks: an all-to-all backend takes all (arg_groups/overrides.py:2477-2486)."""
    if flags.moe_a2a_backend != "none" or flags.enable_ep_moe or flags.enable_deepep_moe:
        return flags.tp_size
    # 0.4.9 reads --ep-size only together with --enable-ep-moe or --enable-deepep-moe.
    return flags.ep_size if at_least(release, NEW) or release_key(release) > release_key(OLD) else 1


def _unknown_to(release: str, layer: ExpertLayer, model: Model) -> str:
    """Why a release cannot load the architecture, "" where it can."""
    since = layer.family.since
    if not layer.certain or not since or at_least(release, since) or release_key(release) != release_key(OLD):
        return ""
    return f"SGLang {release} stops: it does not know {model.architecture}; use {since} or newer"


def _indivisible(model: Model, flags: ServerFlags, layer: ExpertLayer, shard: _Shard) -> str:
    """Why the layer cannot be split over the ranks, "" where it can (fused_moe_triton/layer.py:285-308)."""
    experts = _routed(flags, layer)
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


def _indivisible_heads(model: Model, flags: ServerFlags, layer: ExpertLayer, shard: _Shard) -> str:
    """Why the attention cannot be split over the ranks, "" where it can; key and value heads may be repeated."""
    heads = size(model.text_config, "num_attention_heads", required=False)
    kv_heads = size(model.text_config, "num_key_value_heads", required=False) or heads
    ranks = _attention_ranks(flags, shard.tp)
    few, many = sorted((max(kv_heads, 1), ranks))
    if heads % ranks == 0 and (layer.family.attention is not Attention.GROUPED or not heads or many % few == 0):
        return ""
    return (
        f"SGLang stops: {heads} attention heads ({kv_heads} for keys and values) cannot be split over {ranks} ranks; "
        "choose a --tp-size that divides them"
    )


def _attention_ranks(flags: ServerFlags, tp: int) -> int:
    """Ranks that share one attention layer."""
    return max(1, tp // flags.dp_size) if flags.enable_dp_attention else tp


def _routed(flags: ServerFlags, layer: ExpertLayer) -> int:
    """Routed experts of all ranks, redundant ones included where the family counts them."""
    return layer.experts + (flags.ep_num_redundant_experts if layer.family.redundant else 0)


# --- the quantisation -------------------------------------------------------------------------------------------


def _question(server: _Server, family: Family, layer: ExpertLayer | None, shard: _Shard) -> Question:
    model, flags = server.model, server.flags
    return Question(
        quant_config=model.quant_config,
        flag=flags.quantization,
        runner=flags.moe_runner_backend,
        arch=server.card.arch,
        release=server.release,
        hidden=layer.hidden if layer else 128,
        width=layer.width // shard.moe_tp if layer else 128,
        tp_size=shard.tp,
        layers=_module_names(model.text_config, family.path),
        rescue=_rescue(layer, shard),
    )


def _module_names(config: Mapping[str, Any], path: str) -> tuple[tuple[str, ...], ...]:
    """Names of a module in a middle and in the last layer, each as the checkpoints of shells spell it too."""
    layers = size(config, "num_hidden_layers", required=False)
    chosen = (layers // 2, layers - 1) if layers > 1 else (1,)
    roots = ("model", "language_model.model", "model.language_model", "backbone")
    return tuple(tuple(f"{root}.layers.{index}.{path}" for root in roots) for index in chosen)


def _rescue(layer: ExpertLayer | None, shard: _Shard) -> Callable[[int], str]:
    """What keeps the experts' shard a multiple of some size: the flag to give, as text."""

    def advice(multiple: int) -> str:
        if layer is None:
            return "choose another --tp-size"
        for ep in range(shard.ep + 1, min(shard.tp, _MOST_RANKS) + 1):
            whole = shard.tp % ep == 0 and layer.experts % ep == 0
            if whole and layer.width % (shard.tp // ep) == 0 and layer.width // (shard.tp // ep) % multiple == 0:
                return f"give --ep-size {ep}"
        for tp in range(min(shard.tp - 1, _MOST_RANKS), 0, -1):
            if layer.width % tp == 0 and layer.width // tp % multiple == 0:
                return f"give --tp-size {tp}"
        return "choose a checkpoint with another quantisation"

    return advice


# --- who runs the experts ---------------------------------------------------------------------------------------


def _elsewhere(case: _Case) -> Decision | None:
    """The decision where the Triton kernel is not reached, else None."""
    flags, scheme = case.flags, case.scheme
    backend = "deepep" if flags.enable_deepep_moe else "ep_moe" if flags.enable_ep_moe else flags.moe_a2a_backend
    if backend != "none":
        return _other(backend, f"the all-to-all backend {backend} runs the experts with kernels of its own")
    refusal = _refusal(case)
    if refusal:
        return Decision(Outcome.LOAD_ERROR, "none", refusal)
    if not _mixtral_fused(case):
        return _other("quant_mixtral", f"SGLang serves Mixtral in {scheme.method} with plain products, one an expert")
    return _by_runner(case) or (_other(scheme.kernel, scheme.reason) if scheme.fate is Fate.OTHER else None)


def _refusal(case: _Case) -> str:
    """Why SGLang stops at the quantisation, "" where it does not."""
    if case.scheme.fate is Fate.LOAD_ERROR:
        return case.scheme.reason
    runner = case.flags.moe_runner_backend
    if case.release in KNOWN_RELEASES and runner not in _RUNNERS:
        return f"SGLang stops: it knows no --moe-runner-backend {runner[:40]}; leave it out"
    if case.scheme.method != NONE and case.flags.dtype == "float32":
        return f"SGLang stops: {case.scheme.method} does not go with --dtype float32; leave it out"
    return ""


# All that --moe-runner-backend takes, in any of the known releases (server_args.py:248, arg_groups/choices.py:136).
_RUNNERS = frozenset(
    [
        "auto",
        "deep_gemm",
        "triton",
        "triton_kernel",
        "flashinfer_trtllm",
        "experimental_sgl_trtllm",
        "flashinfer_trtllm_routed",
        "flashinfer_cutlass",
        "flashinfer_mxfp4",
        "flashinfer_cutedsl",
        "flashinfer_megamoe",
        "cutlass",
        "aiter",
        "marlin",
        "humming",
        "experimental_sgl_marlin",
        "lora_cutedsl",
        "lora_triton",
        "lora_marlin",
        "hpc_ops",
        "megamoe",
        "intel_xpu",
    ]
)

# Their code names the Triton runner itself (w8a8_int8.py:333, blockwise_int8.py:363, moe_wna16.py:367).
_TRITON_ALWAYS = frozenset({"w8a8_int8", "auto-round-int8", "blockwise_int8", "moe_wna16"})


def _by_runner(case: _Case) -> Decision | None:
    """The decision where the user's runner, or the family's automatic one, is not the Triton kernel."""
    runner = case.flags.moe_runner_backend
    if runner not in {"auto", "triton"} and case.scheme.method not in _TRITON_ALWAYS:
        return _other(runner, f"--moe-runner-backend {runner} runs the experts")
    rule = _runner_rule(case)
    if rule is None:
        return None
    return _other(rule.runner, f"SGLang picks {rule.runner} for {case.model.architecture} on this card")


def _other(kernel: str, reason: str) -> Decision:
    return Decision(Outcome.OTHER_KERNEL, kernel, reason)


# What SGLang's fused Mixtral takes; the rest goes to QuantMixtral (model_loader/utils.py:206-219).
_MIXTRAL_FUSED = frozenset({NONE, "fp8", "compressed-tensors", "gptq_marlin", "awq_marlin", "quark_int4fp8_moe"})


def _mixtral_fused(case: _Case) -> bool:
    return case.model.architecture != "MixtralForCausalLM" or case.scheme.method in _MIXTRAL_FUSED


def _runner_rule(case: _Case) -> RunnerRule | None:
    """The family's rule for the automatic runner that applies, None for the Triton kernel."""
    if case.flags.moe_runner_backend != "auto":
        return None
    return next((rule for rule in case.layer.family.runners if _applies(rule, case)), None)


def _applies(rule: RunnerRule, case: _Case) -> bool:
    flag = case.flags.quantization
    return (
        case.scheme.label in rule.quantizations
        and (not rule.majors or case.card.capability[0] in rule.majors)
        and at_least(case.release, rule.since)
        and not (rule.flag_only and flag is None)
        and not (rule.no_flag and flag is not None)
        and not (rule.single_rank and case.shard.ep > 1)
        and not (rule.runner == "triton_kernel" and _driver_too_new(case.card))
    )


def _driver_too_new(card: Card) -> bool:
    """SGLang keeps triton_kernels off Blackwell with driver 595 or newer (arg_groups/overrides.py:955-961)."""
    major = card.driver.partition(".")[0]
    return card.capability[0] >= 10 and major.isdigit() and int(major) >= 595


# --- the Triton kernel ------------------------------------------------------------------------------------------


def _here(case: _Case) -> Decision:
    """The decision where the Triton kernel runs the experts, or would."""
    workload = _workload(case)
    dense = _dense_shapes(case.model, case.flags, case.card, case.scheme, case)
    outcome, reason = _outcome(case)
    return Decision(outcome, TRITON, reason, workload, case.scheme.notes, dense)


def _outcome(case: _Case) -> tuple[Outcome, str]:
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


def _doubt(case: _Case) -> str:
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
            layer.certain and not layer.family.since,
            f"SGLang has no model class for {architecture}; worked out as SGLang's own tuner does",
        ),
        (
            bool(layer.family.since) and not at_least(case.release, layer.family.since),
            f"moefix does not know what SGLang {case.release} does with {architecture}",
        ),
        (
            layer.varies and not layer.family.pairs,
            "the layers' experts differ in size; moefix plans for the first size that the config names",
        ),
    )
    return next((text for true, text in doubts if true), "")


def _workload(case: _Case) -> Workload:
    """The MoE layer on one shard (fused_moe_triton/layer.py:285-308)."""
    layer, shard, scheme = case.layer, case.shard, case.scheme
    fused = layer.shared if _fuses(case) else 0
    kt_experts = case.flags.kt_num_gpu_experts
    width = -(-(layer.width // shard.moe_tp) // scheme.pad_to) * scheme.pad_to
    number_format, activation = scheme.number_format, _activation_dtype(case)
    if number_format is NumberFormat.NONE and activation == "float32":
        number_format = NumberFormat.FLOAT32
    return Workload(
        experts=kt_experts or _routed(case.flags, layer) // shard.ep + fused,
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


def _fuses(case: _Case) -> bool:
    """Whether the shared experts become routed ones; see `fixer.model.rules.families.SharedFusion`."""
    rule, flags = case.layer.family.fusion, case.flags
    if rule is None or not case.layer.shared or flags.disable_shared_experts_fusion:
        return False
    if rule.enforceable and flags.enforce_shared_experts_fusion:
        return True
    if rule.only_enforced:
        return flags.enforce_shared_experts_fusion
    overlap = flags.enable_two_batch_overlap or flags.enable_single_batch_overlap
    return (
        case.card.arch >= 80
        and (rule.with_expert_parallel or case.shard.ep == 1)
        and (rule.with_overlap or not overlap)
        and case.scheme.label not in rule.not_for
        and _fits_rule(rule, case)
    )


def _fits_rule(rule: SharedFusion, case: _Case) -> bool:
    """Whether the checkpoint is one that the rule is made for."""
    layer = case.layer
    names = case.model.text_config.get("architectures")
    inner = names[0] if isinstance(names, tuple) and names else case.model.architecture
    return (
        (not rule.routed or layer.experts in rule.routed)
        and (not rule.shared or layer.shared in rule.shared)
        and rule.architecture in {"", inner}
    )


_DTYPES: Mapping[str, str] = {
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float": "float32",
}


def _activation_dtype(case: _Case) -> str:
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


def _notes(case: _Case) -> tuple[str, ...]:
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
        "planned for the text experts; SGLang looks for files of the vision experts too": (
            case.layer.family.pairs and case.layer.varies
        ),
    }
    return tuple(text for text, true in notes.items() if true)


# --- dense block-FP8 products -----------------------------------------------------------------------------------


def _dense_shapes(
    model: Model, flags: ServerFlags, card: Card, scheme: Scheme, case: _Case | None
) -> tuple[tuple[int, int], ...]:
    """(N, K) on one rank of the dense products whose tuning files SGLang looks up (fp8_utils.py:615-655).

    Worked out for families with one fused qkv projection; () for others and where another kernel takes them.
    """
    block = _dense_block(model, scheme)
    family, _ = family_of(model.architecture, model.text_config)
    grouped = family.attention is Attention.GROUPED or (case is None and model.architecture in _DENSE_GROUPED)
    if block is None or not grouped:
        return ()
    shapes = (*_attention_shapes(model, flags), *_mlp_shapes(model, flags, family, case))
    asked = [shape for shape in shapes if _asks_dense(shape, card, scheme.method)]
    return tuple(dict.fromkeys(asked))


_DENSE_GROUPED = frozenset({"Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})


def _dense_block(model: Model, scheme: Scheme) -> tuple[int, int] | None:
    """The block shape of a block-quantised checkpoint."""
    if scheme.method not in {"fp8", "blockwise_int8"} or model.quant_config is None:
        return None
    if scheme.block_shape is not None:
        return scheme.block_shape
    edges = model.quant_config.get("weight_block_size")
    whole = isinstance(edges, tuple) and len(edges) == 2 and all(isinstance(edge, int) and edge > 0 for edge in edges)
    return (edges[0], edges[1]) if whole and edges is not None else None


def _asks_dense(shape: tuple[int, int], card: Card, method: str) -> bool:
    """Whether a product goes to the Triton kernel that reads files."""
    rows, columns = shape
    major = card.capability[0]
    if method == "blockwise_int8":
        return True
    if card.arch == 89:
        return True
    if major == 9:
        return bool(rows % 64 or columns % 128)
    return major == 12 and bool(rows % 128 or columns % 128)


def _attention_shapes(model: Model, flags: ServerFlags) -> tuple[tuple[int, int], ...]:
    """The qkv and output projections on one rank; key and value heads are repeated where ranks outnumber them."""
    config = model.text_config
    heads = size(config, "num_attention_heads", required=False)
    hidden = size(config, "hidden_size", required=False)
    if not heads or not hidden:
        return ()
    kv_heads = size(config, "num_key_value_heads", required=False) or heads
    head = size(config, "head_dim", required=False) or hidden // heads
    ranks = _attention_ranks(flags, flags.tp_size)
    if heads % ranks:
        return ()
    own, own_kv = heads // ranks, max(1, kv_heads // ranks)
    shapes = {"self_attn.q_proj": ((own + 2 * own_kv) * head, hidden), "self_attn.o_proj": (hidden, own * head)}
    return tuple(shape for path, shape in shapes.items() if not _is_ignored(model, path))


def _mlp_shapes(model: Model, flags: ServerFlags, family: Family, case: _Case | None) -> tuple[tuple[int, int], ...]:
    """The dense MLP of a dense model or of the first layers, and an unfused shared expert, on one rank."""
    config = model.text_config
    hidden = size(config, "hidden_size", required=False)
    first_dense = look_up(config, "first_k_dense_replace")
    widths: list[int] = []
    if case is None or (isinstance(first_dense, int) and first_dense > 0):
        widths.append(size(config, "intermediate_size", required=False))
    if case is not None and family.shared_width:
        widths.append(size(config, family.shared_width, required=False))
    if case is not None and case.layer.shared and not _fuses(case):
        widths.append(case.layer.width * case.layer.shared)
    whole = [width // flags.tp_size for width in widths if width and width % flags.tp_size == 0]
    return tuple(shape for width in whole for shape in ((2 * width, hidden), (hidden, width)))


def _is_ignored(model: Model, path: str) -> bool:
    return ignored(model.quant_config, Match.PATH, _module_names(model.text_config, path)[0])
