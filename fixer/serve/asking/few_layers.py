"""A model's config cut down to few layers, so that a server starts quickly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fixer.model.config import Model
from fixer.model.rules.families import look_up
from fixer.sglang.flags import ServerFlags
from fixer.sglang.releases import NEW, at_least


def thawed(value: Any) -> Any:
    """The value with read-only mappings and tuples turned into dicts and lists."""
    if isinstance(value, Mapping):
        return {name: thawed(item) for name, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, (list, tuple)) else value


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


SHELLS = ("text_config", "llm_config", "language_config")


def few_layers(model: Model, flags: ServerFlags, release: str) -> dict[str, Any]:
    """Overrides of config.json that leave the first layers only, up to an MoE layer; {} to leave it as it is.

    SGLang 0.4.9 replaces a nested object as a whole, and no release merges two levels deep.
    """
    config = model.text_config
    name = next((name for name in LAYER_COUNTS if isinstance(config.get(name), int)), "")
    whole = config.get(name, 0)
    wanted = max(layers_to_experts(config), flags.pp_size)
    if not name or wanted >= whole:
        return {}
    # Lists and patterns of one entry a layer are checked against the number of layers by transformers.
    short = {
        field_name: thawed(value[:wanted])
        for field_name, value in config.items()
        if isinstance(value, (tuple, list, str)) and len(value) == whole and field_name not in {"architectures"}
    }
    change = {name: wanted, **short}
    if config is model.config:
        return change
    shell = next((shell for shell in SHELLS if model.config.get(shell) is config), "")
    return {shell: change} if shell and at_least(release, NEW) else {}


MOST_LAYERS = 4096


def layers_to_experts(config: Mapping[str, Any]) -> int:
    """The least number of leading layers with an MoE layer and each kind of attention among them."""
    first = next((index for index in range(MOST_LAYERS) if _is_moe(config, index)), 0)
    return max(first + 1, _kinds_of_attention(config))


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = look_up(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value)
    return None


def _is_moe(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer has experts, by the fields that SGLang's and transformers' models read."""
    dense_before = _number(config, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") or 0
    steps = [
        (_number(config, "decoder_sparse_step", "interleave_moe_layer_step"), index + 1),  # qwen2_moe.py, llama4.py
        (_number(config, "moe_layer_interval"), index + 1),  # ernie4.py
        (_number(config, "moe_layer_freq"), index),  # deepseek_v2.py
    ]
    listed = config.get("moe_layers_enum", config.get("moe_layers"))  # step3
    numbers = listed.split(",") if isinstance(listed, str) else listed
    frequency = config.get("moe_layer_freq")
    pattern = config.get("hybrid_override_pattern")  # nemotron_h.py: one letter a layer
    dense = config.get("mlp_only_layers")
    return (
        index >= dense_before
        and all(not step or step < 1 or place % step == 0 for step, place in steps)
        and not (isinstance(numbers, (list, tuple)) and numbers and str(index) not in {str(n).strip() for n in numbers})
        and not (isinstance(frequency, (list, tuple)) and index < len(frequency) and not frequency[index])
        and not (isinstance(pattern, str) and index < len(pattern) and pattern[index] != "E")
        and not (isinstance(dense, (list, tuple)) and index in dense)
    )


def _kinds_of_attention(config: Mapping[str, Any]) -> int:
    """Leading layers that hold every kind of layer: the memory pools of hybrid models need one of each."""
    interval = _number(config, "full_attention_interval") or 1
    needed = [interval if 0 < interval < MOST_LAYERS else 1]
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        kinds = config.get(name)
        if isinstance(kinds, (list, tuple, str)) and kinds and all(isinstance(kind, str) for kind in kinds):
            needed.append(1 + max(list(kinds).index(kind) for kind in set(kinds)))
    return max(needed)
