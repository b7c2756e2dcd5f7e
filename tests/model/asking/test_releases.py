"""SGLang's own code, asked on the CPU, against the expected names of every case and against moefix's rules.

The interpreters are made by scripts/asking-venv; MOEFIX_TEST_ASKING names a folder that has them already.
"""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fixer.model.asking.answer import Answer, Outcome
from tests.support.asking import CASES, Case, ask_cases, cases_of, difference, rule_difference

pytestmark = pytest.mark.sglang

RELEASES = ("0.5.17", "0.5.23")
ROOT = Path(__file__).resolve().parents[3]
RULES_DIFFER = {
    ("0.5.17", "dsv4_flash_fp4_tp4_pro6000"): "the rules do not know DeepSeek-V4's FP4 experts",
    ("0.5.17", "qwen35_397b_awq_layer0_bf16_tp8_pro6000s"): "the rules do not look at layer 0",
    ("0.5.17", "qwen3_235b_awq_layer0_tp4_pro6000s"): "the rules do not look at layer 0",
    ("0.5.17", "step35_flash_fp8_tp4_ep4_0517"): "the rules do not divide the shared expert into blocks",
    ("0.5.17", "q3_30b_moe_dp_tp8_ep2_4090"): "the rules do not know that ep_size * moe_dp_size must be tp_size",
}
"""Where SGLang's own code shows the rules wrong. An entry whose rule is right now fails its test: take it out."""
EACH = [pytest.param(release, case, id=f"{release}-{case.name}") for release in RELEASES for case in cases_of(release)]


@functools.cache
def answers(release: str) -> dict[str, Answer]:
    made = os.environ.get("MOEFIX_TEST_ASKING")
    if made:
        python = f"{made}/asking-{release}/bin/python"
    else:
        command = [str(ROOT / "scripts" / "asking-venv"), release]
        environment = {**os.environ, "TEST_PYTHON": sys.executable}
        python = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        return ask_cases(cases_of(release), python, Path(folder))


@pytest.mark.parametrize(("release", "case"), EACH)
def test_sglang_does_what_the_case_expects(release: str, case: Case) -> None:
    assert difference(case, answers(release)[case.name]) == ""


@pytest.mark.parametrize(("release", "case"), EACH)
def test_the_rules_agree_with_sglang(release: str, case: Case) -> None:
    differs = rule_difference(case, answers(release)[case.name], release)
    assert bool(differs) == ((release, case.name) in RULES_DIFFER), differs


@pytest.mark.parametrize("release", RELEASES)
def test_load_errors_are_sglangs_own_words(release: str) -> None:
    said = {name: one.reason for name, one in answers(release).items() if one.outcome is Outcome.LOAD_ERROR}
    assert said["q3_30b_fp8block_tp4_4090"].endswith(
        "The output_size of gate's and up's weight = 192 is not divisible by weight quantization block_n = 128."
    )
    assert not any("Error:" in reason or "Traceback" in reason for reason in said.values())


def test_every_layer_is_looked_at() -> None:
    kinds = answers("0.5.17")["qwen3_235b_awq_layer0_tp4_pro6000s"].experts
    assert sorted((kind.layers, kind.outcome) for kind in kinds) == [(1, Outcome.ASKS), (93, Outcome.OTHER_KERNEL)]
    (first,) = [kind.names for kind in kinds if kind.layers == 1]
    assert first == ("model.layers.0.mlp.experts",)


def test_dense_products_fall_back_to_triton_where_their_shape_does_not_divide() -> None:
    products = answers("0.5.17")["dsv3_fp8_tp8_h200"].dense
    assert {product.family for product in products} == {"block_fp8"}
    assert (2112, 7168) in {(product.n, product.k) for product in products}
    assert not any(product.asks for product in products)  # DeepGEMM takes them all on this card


def test_the_whole_configurations_hold_what_the_cases_name() -> None:
    """What was completed by hand changes no value that a case gives."""
    from tests.support.lookup_cases import CASES as LOOKUP_CASES

    by_name = {case.name: case.config for case in CASES}
    for case in LOOKUP_CASES:
        assert _holds(by_name[case["id"]], case["config"]), case["id"]


def _holds(whole: object, part: object) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and _holds(whole[name], part[name]) for name in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(_holds(one, item) for one in whole) for item in part)
    return whole == part
