"""The question whose answer is kept: model, flags and card that decide a file's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fixer.base.errors import MoefixError
from fixer.serve.asked import Asked, Question
from fixer.serve.possible_names import Limits, why_not

if TYPE_CHECKING:
    from fixer.model.rules.case import Decision
    from fixer.serve.situation import OnCard, Situation


COUNTING_FLAGS = (
    "tp_size",
    "ep_size",
    "dp_size",
    "pp_size",
    "moe_dp_size",
    "enable_dp_attention",
    "quantization",
    "dtype",
    "disable_shared_experts_fusion",
    "enforce_shared_experts_fusion",
    "moe_runner_backend",
    "moe_a2a_backend",
    "ep_num_redundant_experts",
    "speculative_algorithm",
    "enable_deterministic_inference",
    "enable_lora",
    "enable_two_batch_overlap",
    "enable_single_batch_overlap",
    "enable_ep_moe",
    "enable_deepep_moe",
    "kt_num_gpu_experts",
    "revision",
)
"""Fields of `ServerFlags` that may change which file is asked for; the rest changes rows only, or nothing."""


def question_of(situation: Situation, on: OnCard) -> Question:
    """The question that a start on that kind of card puts."""
    flags, model = situation.flags, situation.model
    defaults = type(flags)()
    counting = [(name, getattr(flags, name)) for name in COUNTING_FLAGS]
    config = json.dumps(_plain(model.config), sort_keys=True, separators=(",", ":"))
    quant = json.dumps(_plain(model.quant_config), sort_keys=True, separators=(",", ":"))
    return Question(
        model=model.name,
        config=hashlib.sha256(f"{config}\n{quant}".encode()).hexdigest()[:16],
        card=on.card.name,
        sglang=situation.tree.version,
        flags=" ".join(f"{name}={value}" for name, value in counting if value != getattr(defaults, name))[:4000],
    )


def _plain(value: Any) -> Any:
    """A frozen JSON value as the json module takes it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


ROOM = 64
"""What E may have beyond the routed experts: fused shared experts (0.4.6: one for each of the tp ranks), spare ones."""


PADDED = 256
"""The experts' width is padded to a multiple of at most this (MXFP4)."""


def limits_of(situation: Situation, roots: tuple[str, ...] = ()) -> Limits:
    """What a file for this model's experts cannot go beyond, whatever the shard.

    Args:
        roots: folders below which SGLang looks for files.
    """
    from fixer.model.rules.families import expert_layer

    try:
        layer = expert_layer(situation.model.architecture, situation.model.text_config)
    except MoefixError:
        layer = None
    if layer is None or layer.varies:
        return Limits(roots)
    experts = layer.experts + ROOM + situation.flags.ep_num_redundant_experts
    return Limits(roots, experts, -(-layer.width // PADDED) * PADDED)


def decision_for(situation: Situation, on: OnCard, asked: Asked) -> Decision:
    """The decision of that kind of card, with what SGLang asked for in place of what the rules worked out.

    The name speaks of the first kind of card, whichever kind is meant: SGLang goes by its first card.

    Raises:
        ValueError: the name speaks of a layer that moefix cannot tune; the text says why.
    """
    from fixer.model.rules.case import Outcome
    from fixer.model.rules.decide import TRITON, layer_workload
    from fixer.sglang.tree import workload_of_name
    from fixer.workload import Projection

    decision, card, tree = on.decision, on.card, situation.tree
    named = situation.first.card
    how = "at an earlier start" if asked.source == "log" else "when asked"
    if not asked.gate_up:
        reason = f"SGLang, when asked, looked for no MoE file{': ' + asked.ran if asked.ran else ''}"
        return replace(
            decision, outcome=Outcome.NO_LOOKUP, kernel=asked.ran or decision.kernel, reason=reason, workload=None
        )
    if decision.workload is not None and tree.file_name(decision.workload, named, Projection.GATE_UP) == asked.gate_up:
        reason = f"SGLang looked for {asked.gate_up} {how}, as worked out"
        return replace(decision, outcome=Outcome.ASKS, reason=reason)
    base = decision.workload or layer_workload(situation.model, situation.flags, card, tree.release)
    if base is None:
        raise ValueError(f"the model is dense by its config.json, and yet SGLang asked for {asked.gate_up}")
    workload = workload_of_name(asked.gate_up, base)
    foreign = why_not(asked.gate_up, limits_of(situation), decision.kernel)
    if foreign:
        raise ValueError(f"SGLang asked for {asked.gate_up}, but {foreign}")
    if tree.file_name(workload, named, Projection.GATE_UP) != asked.gate_up:
        raise ValueError(f"SGLang asked for {asked.gate_up}, which is no file for {named.name}")
    reason = f"SGLang looked for {asked.gate_up} {how}; tuning exactly that"
    return replace(decision, outcome=Outcome.ASKS, kernel=TRITON, reason=reason, workload=workload)
