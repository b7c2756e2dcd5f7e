"""What SGLang makes of each architecture: which config field is what, and what its model code decides.

One table, `FAMILIES`, read by `family_of` and `expert_layer`. Sources are `srt/models/<file>.py` of SGLang 0.5.17
unless a line says otherwise; what differs between releases is a field of the table, never a branch elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fixer.base.errors import ModelError
from fixer.model.rules.family import MAX_DIMENSION, Family
from fixer.model.rules.family_table import FAMILIES

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
