"""What SGLang answered: which names each kind of expert layer looks up, and which kernel each dense product runs on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fixer.workload import NumberFormat, Workload

TRITON = "fused_moe_triton"
"""The kernel that moefix tunes."""


class Outcome(Enum):
    """What SGLang does about a tuning file for the experts.

    ASKS: it builds a file's name and looks for it. OTHER_KERNEL: another kernel runs, which reads no such file.
    NO_LOOKUP: the Triton kernel runs with its default tile, and no name is built (deterministic inference).
    NO_MOE: the model has no expert layer. LOAD_ERROR: SGLang's own checks refuse the model or the flags.
    NOT_KNOWN: SGLang could not be asked, or where its forward ended says nothing.
    """

    ASKS = "asks"
    OTHER_KERNEL = "other_kernel"
    NO_LOOKUP = "no_lookup"
    NO_MOE = "no_moe"
    LOAD_ERROR = "load_error"
    NOT_KNOWN = "not_known"


@dataclass(frozen=True)
class LookUp:
    """One file name that SGLang built, with the arguments that it built it from (`get_config_file_name`).

    Attributes:
        experts: E, the experts on one rank, fused shared and redundant ones included.
        width: N, the rows of the down product's input on one rank, as the name has it.
        dtype: "fp8_w8a8", "int8_w8a8", "int4_w4a16", ..., None for 16-bit weights.
        block_shape: (N, K) of a quantisation block, None without.
        per_channel_quant: one scale a channel.
        down: the down product's own file.
        name: the file's name.
    """

    experts: int
    width: int
    dtype: str | None
    block_shape: tuple[int, int] | None
    per_channel_quant: bool
    down: bool
    name: str


@dataclass(frozen=True)
class ExpertLayers:
    """The expert layers of one kind.

    Attributes:
        outcome: ASKS, OTHER_KERNEL, NO_LOOKUP or NOT_KNOWN.
        kernel: `TRITON`, another kernel's name as SGLang's back ends and files have it, or "" where it is not known.
        reason: what it was read from, in one line.
        look_ups: the names, in the order in which SGLang asked for them.
        layers: how many there are.
        names: their module names.
        method: SGLang's class that holds the weights ("Fp8MoEMethod").
        hidden_size: of the model.
        top_k: the experts that a token goes to, fused shared ones included.
        activation_dtype: of the hidden states ("bfloat16").
    """

    outcome: Outcome
    kernel: str
    reason: str
    look_ups: tuple[LookUp, ...]
    layers: int
    names: tuple[str, ...]
    method: str
    hidden_size: int
    top_k: int
    activation_dtype: str

    @property
    def workload(self) -> Workload | None:
        """The layers as the tuned kernel sees them, None where SGLang asks for no file or in a format unknown here.

        Groups, zero points, gating and ranks are not in a file's name and are left as by default: take them from the
        rules (`dataclasses.replace`).
        """
        up = next((one for one in self.look_ups if not one.down), None)
        if up is None or (up.dtype or "none") not in {known.value for known in NumberFormat}:
            return None
        return Workload(
            experts=up.experts,
            intermediate=up.width,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            number_format=NumberFormat(up.dtype or "none"),
            block_shape=up.block_shape,
            per_channel_quant=up.per_channel_quant,
            activation_dtype=self.activation_dtype,
        )


@dataclass(frozen=True)
class DenseProduct:
    """The quantised linear layers of one shape and one way to run.

    Attributes:
        family: which kind of tuning file could hold for it: "block_fp8", "block_int8", "channel_fp8", or "" for none.
        n: rows of the weight on one rank (N of the file's name).
        k: columns of the weight on one rank (K).
        kernel: "triton", or the function or class of SGLang that runs it.
        asks: SGLang looks for a file for it; None where that is not known.
        reason: what it was read from, in one line.
        layers: how many there are.
        names: their module names.
    """

    family: str
    n: int
    k: int
    kernel: str
    asks: bool | None
    reason: str
    layers: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """SGLang's answer to one question.

    Attributes:
        outcome: ASKS where any kind of expert layer asks; see `Outcome`.
        reason: for a load error SGLang's own words; for "not known" why; "" otherwise.
        experts: the expert layers, a kind each.
        dense: the quantised linear layers, a shape each.
        release: SGLang's version, as the child imported it.
        import_seconds: how long importing SGLang took.
        build_seconds: how long the model took.
        layer_seconds: how long running the layers took.
    """

    outcome: Outcome
    reason: str = ""
    experts: tuple[ExpertLayers, ...] = ()
    dense: tuple[DenseProduct, ...] = ()
    release: str = ""
    import_seconds: float = 0.0
    build_seconds: float = 0.0
    layer_seconds: float = 0.0

    @property
    def look_ups(self) -> tuple[LookUp, ...]:
        """Every name once, those of the greatest number of layers first."""
        kinds = sorted(self.experts, key=lambda kind: -kind.layers)
        return tuple(dict.fromkeys(look_up for kind in kinds for look_up in kind.look_ups))

    @property
    def kernel(self) -> str:
        """The kernel of the most layers that the outcome holds for, "" without one."""
        kinds = [kind for kind in self.experts if kind.outcome is self.outcome]
        return max(kinds, key=lambda kind: kind.layers).kernel if kinds else ""


def not_known(reason: str) -> Answer:
    """No answer, and why."""
    return Answer(Outcome.NOT_KNOWN, reason)
