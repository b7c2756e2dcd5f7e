"""Asks an installed SGLang all cases of data/asking-cases.json, one import for the cards of one capability.

    python -m tests.support.asking PYTHON [--real-packages]

judges the release that PYTHON has: it prints how SGLang differs from what the cases expect, and moefix's rules from it.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fixer.machine.cards import Card, find_card
from fixer.model.asking.answer import Answer, Outcome
from fixer.model.asking.ask import CardFacts, Question, ask_all
from fixer.model.config import model_from_config
from fixer.model.rules.case import Decision
from fixer.model.rules.decide import decide
from fixer.sglang.flags import parse_flags
from tests.support.lookup_cases import CASES as LOOKUP_CASES

DATA = Path(__file__).resolve().parents[1] / "data"
STAND_INS = Path(__file__).parent / "sglang_stand_ins"
SECONDS = 400.0


@dataclass(frozen=True)
class Case:
    """A model, flags and a card, and what SGLang does with them.

    `release` is "" where the case holds for every release. `expert_weights` is the dtype of the experts in the
    checkpoint, which SGLang reads off the weight file's header for DeepSeek-V4.
    """

    name: str
    config: dict[str, Any]
    flags: tuple[str, ...]
    card: Card
    expect: Mapping[str, Any]
    release: str
    expert_weights: str

    def decision(self, release: str) -> Decision:
        """What moefix's rules say."""
        flags = parse_flags(self.flags)
        return decide(model_from_config(self.name, self.config, flags), flags, self.card, release)


def _case(row: dict[str, Any]) -> Case:
    known = next((case for case in LOOKUP_CASES if case["id"] == row["case"]), None)
    config = json.loads((DATA / "configs" / f"{row['config']}.json").read_text())
    flags, gpu, expect = (known["flags"], known["gpu"]["name"], known["expect"]) if known else (
        row["flags"], row["gpu"], row["expect"]
    )  # fmt: skip
    return Case(
        row["case"], config, tuple(flags), find_card(gpu), expect, row.get("release", ""), row.get("expert_weights", "")
    )


CASES: tuple[Case, ...] = tuple(map(_case, json.loads((DATA / "asking-cases.json").read_text())))


def cases_of(release: str) -> list[Case]:
    """The cases that hold for a release."""
    return [case for case in CASES if case.release in ("", release)]


def package_root(python: str) -> Path:
    """The folder of SGLang's package in an interpreter, found without importing it."""
    code = "import importlib.util as u; print(u.find_spec('sglang').submodule_search_locations[0])"
    return Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def ask_cases(cases: Iterable[Case], python: str, folder: Path, stand_ins: bool = True) -> dict[str, Answer]:
    """SGLang's answers by the cases' names.

    Args:
        cases: what is asked.
        python: the interpreter that has SGLang.
        folder: model folders are made in it.
        stand_ins: stand in for the packages that need a driver.
    """
    root = package_root(python)
    environment = {**os.environ, **({"PYTHONPATH": str(STAND_INS)} if stand_ins else {})}
    groups: dict[Any, list[tuple[Case, Question]]] = defaultdict(list)
    for case in cases:
        card = case.card
        facts = CardFacts(card.name, card.capability, card.shared_memory, card.memory_mib)
        question = Question(python, root, case.flags, _model_folder(case, folder), facts, environment)
        groups[card.capability, card.shared_memory].append((case, question))
    answers: dict[str, Answer] = {}
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(ask_all, [question for _, question in group], seconds=SECONDS) for group in groups.values()
        ]
        for group, future in zip(groups.values(), asked, strict=True):
            answers |= {case.name: answer for (case, _), answer in zip(group, future.result(), strict=True)}
    return answers


def _model_folder(case: Case, folder: Path) -> Path:
    model = folder / case.name
    model.mkdir()
    (model / "config.json").write_text(json.dumps(case.config))
    if case.expert_weights:
        header = json.dumps(
            {"layers.3.ffn.experts.0.w1.weight": {"dtype": case.expert_weights, "shape": [0], "data_offsets": [0, 0]}}
        ).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return model


def difference(case: Case, answer: Answer) -> str:
    """How an answer differs from what the case expects, "" where it does not."""
    expect = case.expect
    wanted = {name: expect[name] for name in ("outcome", "kernel") if expect.get(name)}
    seen = {"outcome": answer.outcome.value, "kernel": answer.kernel}
    up = next((one for one in answer.look_ups if not one.down), None)
    if "file_up" in expect:
        wanted["file_up"] = expect["file_up"]
        seen["file_up"] = up.name if up else None
    if expect.get("file_down"):
        wanted["file_down"] = expect["file_down"]
        seen["file_down"] = next((one.name for one in answer.look_ups if one.down), None)
    if expect.get("file_up") and expect.get("E"):
        wanted |= {name: expect[name] for name in ("E", "N", "dtype", "per_channel_quant")}
        wanted["block_shape"] = tuple(expect["block_shape"]) if expect["block_shape"] else None
        if up:
            seen |= {"E": up.experts, "N": up.width, "dtype": up.dtype, "per_channel_quant": up.per_channel_quant}
            seen["block_shape"] = up.block_shape
    if "dense_files" in expect:
        wanted["dense"] = sorted(_shape(name) for name in expect["dense_files"])
        seen["dense"] = sorted((product.n, product.k) for product in answer.dense if product.asks)
    parts = [f"{name}: {seen.get(name)!r}, not {value!r}" for name, value in wanted.items() if seen.get(name) != value]
    return "; ".join(parts) + (f" ({answer.reason})" if parts and answer.reason else "")


def _shape(name: str) -> tuple[int, int]:
    rows, columns = (int(part.partition("=")[2]) for part in name.split(",")[:2])
    return rows, columns


def rule_difference(case: Case, answer: Answer, release: str) -> str:
    """How moefix's rules differ from SGLang's answer, "" where they do not or one of them does not know."""
    decision = case.decision(release)
    said = {"asks_then_crashes": "asks", "uncertain": "not_known"}.get(decision.outcome.value, decision.outcome.value)
    if "not_known" in (said, answer.outcome.value):
        return ""
    if said != answer.outcome.value:
        why = answer.kernel or answer.reason
        return f"the rules say {said} ({decision.reason}), SGLang {answer.outcome.value} ({why})"
    theirs = next((kind.workload for kind in answer.experts if kind.outcome is Outcome.ASKS), None)
    if theirs is not None and decision.workload is not None:
        ours = replace(
            decision.workload, group_size=0, has_zero_points=False, gated=True, tp_size=1, ep_size=1
        )  # not in a name
        if ours != theirs:
            return f"the rules say {ours}, SGLang {theirs}"
    dense = {(product.n, product.k) for product in answer.dense if product.asks and product.family == "block_fp8"}
    if dense != set(decision.dense_shapes):
        return f"dense products: the rules say {sorted(decision.dense_shapes)}, SGLang {sorted(dense)}"
    return ""


def main() -> int:
    """Ask all cases of one interpreter's SGLang and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="the interpreter that has SGLang")
    parser.add_argument("--real-packages", action="store_true", help="stand in for no package")
    given = parser.parse_args()
    version = "import importlib.metadata as m; print(m.version('sglang'))"
    done = subprocess.run([given.python, "-c", version], check=True, capture_output=True, text=True)
    release = done.stdout.strip()
    cases, began = cases_of(release), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answers = ask_cases(cases, given.python, Path(folder), not given.real_packages)
    differ = 0
    for case in cases:
        answer = answers[case.name]
        texts = {"case": difference(case, answer), "rules": rule_difference(case, answer, release)}
        differ += any(texts.values())
        for against, text in texts.items():
            if text:
                print(f"{case.name}: against the {against}: {text}")
    print(f"SGLang {release}: {len(cases) - differ} of {len(cases)} cases agree, {time.monotonic() - began:.0f} s")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
