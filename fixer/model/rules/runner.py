"""Which kernel SGLang's MoE runner takes: Triton's or another."""

from __future__ import annotations

from fixer.machine.cards import Card
from fixer.model.rules.case import Case, Decision, other_kernel
from fixer.model.rules.family import NONE, RunnerRule
from fixer.sglang.releases import KNOWN_RELEASES, NEW, at_least

# Their code names the Triton runner itself (w8a8_int8.py:333, blockwise_int8.py:363, moe_wna16.py:367).
_TRITON_ALWAYS = frozenset({"w8a8_int8", "auto-round-int8", "blockwise_int8", "moe_wna16"})


def by_runner(case: Case) -> Decision | None:
    """The decision where the user's runner, or the family's automatic one, is not the Triton kernel."""
    runner = case.flags.moe_runner_backend
    if runner not in {"auto", "triton"} and case.scheme.method not in _TRITON_ALWAYS:
        return other_kernel(runner, f"--moe-runner-backend {runner} runs the experts")
    rule = _runner_rule(case)
    if rule is None:
        return None
    return other_kernel(rule.runner, f"SGLang picks {rule.runner} for {case.model.architecture} on this card")


# What SGLang's fused Mixtral takes; the rest goes to QuantMixtral (model_loader/utils.py:206-219).
_MIXTRAL_FUSED = frozenset({NONE, "fp8", "compressed-tensors", "gptq_marlin", "awq_marlin", "quark_int4fp8_moe"})


def mixtral_fused(case: Case) -> bool:
    """Whether SGLang takes its fused Mixtral (model_loader/utils.py:206-219)."""
    return case.model.architecture != "MixtralForCausalLM" or case.scheme.method in _MIXTRAL_FUSED


def _runner_rule(case: Case) -> RunnerRule | None:
    """The family's rule for the automatic runner that applies, None for the Triton kernel."""
    if case.flags.moe_runner_backend != "auto":
        return None
    return next((rule for rule in case.layer.family.runners if _applies(rule, case)), None)


def _applies(rule: RunnerRule, case: Case) -> bool:
    flag = case.flags.quantization
    return (
        case.scheme.label in rule.quantizations
        and (not rule.majors or case.card.capability[0] in rule.majors)
        and has_runner(rule, case)
        and not (rule.flag_only and flag is None)
        and not (rule.no_flag and flag is not None)
        and not (rule.single_rank and case.shard.ep > 1)
        and not (rule.runner == "triton_kernel" and _driver_too_new(case.card))
    )


def _driver_too_new(card: Card) -> bool:
    """SGLang keeps triton_kernels off Blackwell with driver 595 or newer (arg_groups/overrides.py:955-961)."""
    major = card.driver.partition(".")[0]
    return card.capability[0] >= 10 and major.isdigit() and int(major) >= 595


def has_runner(rule: RunnerRule, case: Case) -> bool:
    """Whether the release has the rule; one between the known ones, where its tree has the runner at all."""
    if rule.since == NEW and case.release not in KNOWN_RELEASES and case.declared.flags:
        return rule.runner in case.declared.runner_backends
    return at_least(case.release, rule.since)
