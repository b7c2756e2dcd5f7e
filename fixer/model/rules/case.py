"""One case to decide: a layer, its shard, the server's flags and the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fixer.base.errors import UsageError
from fixer.machine.cards import Card
from fixer.model.config import Model
from fixer.model.rules.families import ExpertLayer, size
from fixer.model.rules.family import SharedFusion
from fixer.model.rules.scheme import Scheme
from fixer.sglang.declared import Declared
from fixer.sglang.flags import ServerFlags
from fixer.sglang.releases import NEW, OLD, at_least, release_key
from fixer.workload import Workload

_MOST_RANKS = 1024
"""No advice names more ranks than this."""


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
class Shard:
    """The parallel sizes: all ranks, expert parallel ranks, and ranks that share one expert's width."""

    tp: int
    ep: int
    moe_tp: int


@dataclass(frozen=True)
class Server:
    """What the user starts, and where."""

    model: Model
    flags: ServerFlags
    card: Card
    release: str
    declared: Declared


@dataclass(frozen=True)
class Case(Server):
    """All that a step needs for a model with experts."""

    layer: ExpertLayer
    shard: Shard
    scheme: Scheme


def shard_of(flags: ServerFlags, release: str) -> Shard:
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
    return Shard(tp, ep, tp // ep // moe_dp)


def _expert_ranks(flags: ServerFlags, release: str) -> int:
    """Expert parallel ranks: an all-to-all backend takes all (arg_groups/overrides.py:2477-2486)."""
    if flags.moe_a2a_backend != "none" or flags.enable_ep_moe or flags.enable_deepep_moe:
        return flags.tp_size
    # 0.4.9 reads --ep-size only together with --enable-ep-moe or --enable-deepep-moe.
    return flags.ep_size if at_least(release, NEW) or release_key(release) > release_key(OLD) else 1


def attention_ranks(flags: ServerFlags, tp: int) -> int:
    """Ranks that share one attention layer."""
    return max(1, tp // flags.dp_size) if flags.enable_dp_attention else tp


def routed_experts(flags: ServerFlags, layer: ExpertLayer) -> int:
    """Routed experts of all ranks, redundant ones included where the family counts them."""
    return layer.experts + (flags.ep_num_redundant_experts if layer.family.redundant else 0)


def module_names(config: Mapping[str, Any], path: str) -> tuple[tuple[str, ...], ...]:
    """Names of a module in a middle and in the last layer, each as the checkpoints of shells spell it too."""
    layers = size(config, "num_hidden_layers", required=False)
    chosen = (layers // 2, layers - 1) if layers > 1 else (1,)
    roots = ("model", "language_model.model", "model.language_model", "backbone")
    return tuple(tuple(f"{root}.layers.{index}.{path}" for root in roots) for index in chosen)


def shard_advice(layer: ExpertLayer | None, shard: Shard) -> Callable[[int], str]:
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


def other_kernel(kernel: str, reason: str) -> Decision:
    """The decision that another kernel runs, and why."""
    return Decision(Outcome.OTHER_KERNEL, kernel, reason)


def fuses(case: Case) -> bool:
    """Whether the shared experts become routed ones; see `fixer.model.rules.family.SharedFusion`."""
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


def _fits_rule(rule: SharedFusion, case: Case) -> bool:
    """Whether the checkpoint is one that the rule is made for."""
    layer = case.layer
    names = case.model.text_config.get("architectures")
    inner = names[0] if isinstance(names, tuple) and names else case.model.architecture
    return (
        (not rule.routed or layer.experts in rule.routed)
        and (not rule.shared or layer.shared in rule.shared)
        and rule.architecture in {"", inner}
    )
