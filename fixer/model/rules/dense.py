"""The dense products whose tuning files SGLang looks up."""

from __future__ import annotations

from fixer.machine.cards import Card
from fixer.model.config import Model
from fixer.model.rules.case import Case, attention_ranks, fuses, module_names
from fixer.model.rules.families import family_of, look_up, size
from fixer.model.rules.family import Attention, Family
from fixer.model.rules.ignored import Match, ignored
from fixer.model.rules.scheme import Scheme
from fixer.sglang.flags import ServerFlags


def shapes_asked_for(
    model: Model, flags: ServerFlags, card: Card, scheme: Scheme, case: Case | None
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
    ranks = attention_ranks(flags, flags.tp_size)
    if heads % ranks:
        return ()
    own, own_kv = heads // ranks, max(1, kv_heads // ranks)
    shapes = {"self_attn.q_proj": ((own + 2 * own_kv) * head, hidden), "self_attn.o_proj": (hidden, own * head)}
    return tuple(shape for path, shape in shapes.items() if not _is_ignored(model, path))


def _mlp_shapes(model: Model, flags: ServerFlags, family: Family, case: Case | None) -> tuple[tuple[int, int], ...]:
    """The dense MLP of a dense model or of the first layers, and an unfused shared expert, on one rank."""
    config = model.text_config
    hidden = size(config, "hidden_size", required=False)
    first_dense = look_up(config, "first_k_dense_replace")
    widths: list[int] = []
    if case is None or (isinstance(first_dense, int) and first_dense > 0):
        widths.append(size(config, "intermediate_size", required=False))
    if case is not None and family.shared_width:
        widths.append(size(config, family.shared_width, required=False))
    if case is not None and case.layer.shared and not fuses(case):
        widths.append(case.layer.width * case.layer.shared)
    whole = [width // flags.tp_size for width in widths if width and width % flags.tp_size == 0]
    return tuple(shape for width in whole for shape in ((2 * width, hidden), (hidden, width)))


def _is_ignored(model: Model, path: str) -> bool:
    return ignored(model.quant_config, Match.PATH, module_names(model.text_config, path)[0])
