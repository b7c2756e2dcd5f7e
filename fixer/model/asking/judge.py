"""From what the child saw to an answer: which kernel a layer's forward came to, and whether that is known at all."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fixer.model.asking.answer import TRITON, Answer, DenseProduct, ExpertLayers, LookUp, Outcome, not_known

_OWN_RUNNERS = ("", "auto", "triton")
"""Back ends under which SGLang's Triton kernel may run; any other name is another kernel's."""

_SHARED_FILES = frozenset({"base", "runner", "standard", "layer", "topk", "utils", "triton", "fused_moe", "__init__"})
"""Files of the expert layers that every kernel passes: a forward that ended there says nothing."""

_MOE = "layers/moe/"
_TRITON_FILES = "layers/moe/moe_runner/triton_utils/"

_BLOCK_LOOK_UPS = {
    "get_w8a8_block_fp8_config": "block_fp8",
    "get_w8a8_block_int8_config": "block_int8",
    "get_w8a8_channelwise_fp8_config": "channel_fp8",
}


@dataclass(frozen=True)
class AskedRow:
    """A call of `get_config_file_name`."""

    E: int
    N: int
    dtype: str | None
    block_shape: tuple[int, int] | None
    per_channel_quant: bool
    down: bool
    name: str


@dataclass(frozen=True)
class ExpertRow:
    """One kind of expert layer, as the child saw it (`child/layers.py`)."""

    layers: int
    names: tuple[str, ...]
    hidden: int
    top_k: int
    activation: str
    layer_class: str
    method: str
    scheme: str
    runner: str
    asked: tuple[AskedRow, ...]
    looked_up: bool
    ended: tuple[str, ...]
    fault: str
    weights_fault: str


@dataclass(frozen=True)
class DenseRow:
    """One kind of quantised linear layer, as the child saw it."""

    layers: int
    names: tuple[str, ...]
    method: str
    scheme: str
    weight: str
    function: str
    N: int
    K: int
    asked: tuple[str, ...]
    ended: tuple[str, ...]
    fault: str
    weights_fault: str


@dataclass(frozen=True)
class ChildAnswer:
    """One line from the child. `outcome` is "looked", "load_error" or "not_known"."""

    outcome: str
    reason: str = ""
    experts: tuple[ExpertRow, ...] = ()
    dense: tuple[DenseRow, ...] = ()
    release: str = ""
    import_seconds: float = 0.0
    build_seconds: float = 0.0
    layer_seconds: float = 0.0


def judge(line: bytes) -> Answer:
    """The answer in one line from the child; a line that is none is "not known"."""
    try:
        seen = msgspec.json.decode(line, type=ChildAnswer)
    except msgspec.DecodeError as fault:
        return not_known(f"the child that imports SGLang gave no answer that can be read: {fault}")
    times = (seen.release, seen.import_seconds, seen.build_seconds, seen.layer_seconds)
    if seen.outcome == "load_error":
        return Answer(Outcome.LOAD_ERROR, seen.reason, (), (), *times)
    if seen.outcome != "looked":
        return Answer(Outcome.NOT_KNOWN, seen.reason, (), (), *times)
    experts = tuple(map(expert_layers, seen.experts))
    outcome = _whole(experts)
    reason = ""
    if outcome is Outcome.NOT_KNOWN:
        reason = next(kind.reason for kind in experts if kind.outcome is outcome)
    return Answer(outcome, reason, experts, tuple(map(dense_product, seen.dense)), *times)


def _whole(experts: tuple[ExpertLayers, ...]) -> Outcome:
    """One outcome for all kinds: a name that is looked up counts first, a doubt before what rules a name out."""
    outcomes = {kind.outcome for kind in experts}
    for outcome in (Outcome.ASKS, Outcome.NOT_KNOWN, Outcome.NO_LOOKUP, Outcome.OTHER_KERNEL):
        if outcome in outcomes:
            return outcome
    return Outcome.NO_MOE


def expert_layers(row: ExpertRow) -> ExpertLayers:
    """What one kind of expert layer does."""
    look_ups = tuple(
        LookUp(a.E, a.N, a.dtype, a.block_shape, a.per_channel_quant, a.down, a.name) for a in dict.fromkeys(row.asked)
    )
    outcome, kernel, reason = _kernel_of(row)
    sizes = (row.hidden, row.top_k, row.activation)
    return ExpertLayers(outcome, kernel, reason, look_ups, row.layers, row.names, row.method, *sizes)


def _kernel_of(row: ExpertRow) -> tuple[Outcome, str, str]:
    where = f"{row.method} ended in {row.ended[-1] if row.ended else 'its forward'}" + (row.fault and f": {row.fault}")
    if row.asked:
        return Outcome.ASKS, TRITON, f"{row.method} asked for {row.asked[0].name}"
    if row.looked_up:
        return Outcome.NO_LOOKUP, TRITON, f"{row.method} takes the default tile and asks for no file"
    kernel = _other_kernel(row)
    return (Outcome.OTHER_KERNEL if kernel else Outcome.NOT_KNOWN), kernel, where


def _other_kernel(row: ExpertRow) -> str:
    """The kernel that runs in the Triton kernel's place, "" where nothing names it.

    An exchange between ranks names it first, then the back end that SGLang chose, the class, and the file.
    """
    exchange = _named_by_place(row.ended, "layers/moe/token_dispatcher/")
    backend = "" if row.runner in _OWN_RUNNERS else row.runner
    marlin = "marlin" if "marlin" in (row.method + row.scheme).lower() else ""
    return exchange or backend or marlin or _named_by_place(row.ended, _MOE)


def _named_by_place(ended: tuple[str, ...], folder: str) -> str:
    """The innermost of SGLang's files on the way that belongs to one kernel only; "" without one."""
    for place in reversed(ended):
        path = place.partition(":")[0]
        stem = path.rpartition("/")[2].removesuffix(".py")
        if path.startswith(folder) and not path.startswith(_TRITON_FILES) and stem not in _SHARED_FILES:
            return stem
    return ""


def dense_product(row: DenseRow) -> DenseProduct:
    """What one kind of quantised linear layer runs on, and whether a tuning file is looked for."""
    looked = next((name.removesuffix("s") for name in row.asked), "")
    owner = row.scheme or row.method
    if looked:
        family = _BLOCK_LOOK_UPS.get(looked, "")
        kernel = "triton" if family != "channel_fp8" else row.function or owner
        return DenseProduct(family, row.N, row.K, kernel, True, f"{owner} called {looked}", row.layers, row.names)
    kernel = row.function or owner
    where = f"{owner} ended in {row.ended[-1] if row.ended else 'its forward'}" + (row.fault and f": {row.fault}")
    is_triton = row.function.startswith("triton_")
    asks = None if is_triton or (not row.function and row.fault) else False
    family = "block_fp8" if "block_fp8" in row.function else ""
    return DenseProduct(family, row.N, row.K, "triton" if is_triton else kernel, asks, where, row.layers, row.names)
