"""What the rules know of one model architecture."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fixer.sglang.releases import NEW

MAX_DIMENSION = 2**24
"""No expert count, hidden size or number of layers of any model is sensibly larger."""


class Attention(Enum):
    """How a family's attention is laid out, as far as its weight shapes are worked out here."""

    GROUPED = "one fused qkv projection and one output projection in every layer"
    OTHER = "latent, linear or mixed"


@dataclass(frozen=True)
class SharedFusion:
    """When a family's shared experts become extra routed experts (E and top-k grow), on CUDA from sm_80.

    Attributes:
        count: the field with the number of shared experts; "" where there is one if `same_width` is given.
        same_width: the field with the shared expert's width, which must equal the routed experts'.
        routed: the numbers of routed experts it is allowed for; () allows any.
        shared: the numbers of shared experts it is allowed for; () allows any.
        architecture: the only architecture it is allowed for, "" for any.
        with_expert_parallel: allowed with ep > 1.
        with_overlap: allowed with two-batch or single-batch overlap.
        enforceable: `--enforce-shared-experts-fusion` overrides the conditions above.
        only_enforced: fused only with that flag.
        not_for: quantisation labels that rule it out.
    """

    count: str = "n_shared_experts"
    same_width: str = ""
    routed: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    architecture: str = ""
    with_expert_parallel: bool = False
    with_overlap: bool = True
    enforceable: bool = False
    only_enforced: bool = False
    not_for: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RunnerRule:
    """The MoE runner that SGLang picks for a family where the user's `--moe-runner-backend` is auto.

    Attributes:
        runner: the backend's name; "triton" is the kernel that moefix tunes.
        quantizations: quantisation labels it is for ("none" is an unquantised checkpoint).
        majors: major compute capabilities it is for; () is any.
        since: the first known release with the rule.
        flag_only: the quantisation must come from `--quantization`.
        no_flag: `--quantization` must not be given.
        single_rank: only without expert parallelism.
    """

    runner: str
    quantizations: frozenset[str]
    majors: tuple[int, ...] = ()
    since: str = NEW
    flag_only: bool = False
    no_flag: bool = False
    single_rank: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture, or several alike.

    Attributes:
        architectures: the names in `architectures` of config.json.
        experts, width, top_k, hidden: the fields with E, N (whole, before sharding), experts a token and hidden size;
            of several names the first that is there counts, a dot goes into a nested object.
        fusion: the rule for shared experts, None where they are never fused.
        redundant: `--ep-num-redundant-experts` adds to E.
        gated: gate and up projections are both there.
        attention: for the dense block-FP8 shapes.
        runners: the auto choice of the runner, first match wins.
        path: the experts' module below a layer, for lists of unquantised modules.
        enabled_by: a field that must be true for the model to have experts at all; "" for none.
        inner: the language model's own architecture decides (multimodal shells).
        model_types: `model_type` values that mean this family inside a shell.
        shared_width: the field with the width of an unfused shared expert; "" for none.
        pairs: a list of sizes is [text experts, vision experts], not one a layer.
    """

    architectures: tuple[str, ...]
    experts: tuple[str, ...] = ("num_experts",)
    width: tuple[str, ...] = ("moe_intermediate_size",)
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    hidden: tuple[str, ...] = ("hidden_size",)
    fusion: SharedFusion | None = None
    redundant: bool = False
    gated: bool = True
    attention: Attention = Attention.OTHER
    runners: tuple[RunnerRule, ...] = ()
    path: str = "mlp.experts"
    enabled_by: str = ""
    inner: bool = False
    model_types: tuple[str, ...] = ()
    shared_width: str = ""
    pairs: bool = False


NONE = "none"


INT4_GROUP32 = "compressed-tensors int4 group 32"
"""The label of Kimi-K2's own 4-bit recipe, for which the DeepSeek family has a rule (arg_groups/overrides.py:1696)."""
