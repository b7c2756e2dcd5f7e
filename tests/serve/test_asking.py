"""SGLang's own answer in a start: what it changes, when it is asked, and that no answer is no stop.

A stand-in (tests/support/fake_child) takes the place of the child that imports SGLang; the process is a real one.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from fixer.base.errors import SGLangError
from fixer.base.status import Phase
from fixer.base.status_reading import states
from fixer.workload import NumberFormat
from tests.support import fakes
from tests.support.serving import Machine, artefact_of, installed
from tests.support.tuning_machine import TuningMachine

FAKE_CHILD = Path(__file__).resolve().parents[1] / "support" / "fake_child"
HOOK = f"""
import importlib.machinery, importlib.util, sys
from pathlib import Path
class Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        module._CHILD = Path({str(FAKE_CHILD)!r})
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "fixer.model.asking.ask":
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        found.loader = Loader(name, found.origin)
        return found
sys.meta_path.insert(0, Finder())
"""
UP = "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3.json"


def with_child(machine: Machine) -> Machine:
    """Only this machine's own Python has the stand-in."""
    (machine.site / "sitecustomize.py").write_text(HOOK)
    return machine


@pytest.fixture
def machine(tmp_path, trees, driver, models, compiled):
    return with_child(Machine(tmp_path, trees["0.5.17"].package, driver, models, compiled))


def answer(*names: str) -> dict[str, str]:
    return {"FAKE_ANSWER": "|".join(names)}


def questions(machine: Machine) -> list[dict]:
    """Every question that was put."""
    path = machine.record.with_name(machine.record.name + ".asked")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_asked_once_and_its_word_counts(machine):
    _, other = artefact_of(machine, number_format=NumberFormat.FP8_W8A8)
    env = answer(other.gate_up_file, other.down_file)
    result = machine.run(*machine.flags, "--moefix-ask", env=env)
    assert result.served, result.err
    assert f"SGLang, when asked, looks for {other.gate_up_file}" in result.err
    assert f"SGLang looked for {other.gate_up_file} when asked; tuning exactly that" in result.err
    assert installed(machine, other)
    (question,) = questions(machine)
    assert question["argv"] == list(machine.flags)
    again = machine.run(*machine.flags, "--moefix-ask", env=env)
    assert again.served
    assert len(questions(machine)) == 1


def test_it_looks_for_nothing(machine):
    machine.artefact()
    result = machine.run(*machine.flags, "--moefix-ask", env=answer(""))
    assert result.served
    assert "SGLang, when asked, looks for no MoE file: marlin" in result.err
    assert "nothing to tune" in result.err


def test_a_refusal_is_in_sglangs_own_words(machine):
    words = "The output_size of gate's and up's weight = 48 is not divisible by weight quantization block_n = 128."
    result = machine.run(*machine.flags, "--moefix-ask", env=answer(f"refuses: {words}"))
    assert result.served  # SGLang says it again, and ends
    assert f"SGLang itself refuses this model with these flags: {words}" in result.err
    assert "nothing to tune" in result.err


def test_an_answer_that_does_not_come_leaves_it_to_the_rules(machine):
    artefact = machine.artefact()
    result = machine.run(*machine.flags, "--moefix-ask", env=answer("dies"))
    assert result.served
    assert "RuntimeError: no such card); going by moefix's rules" in result.err
    assert installed(machine, artefact)
    strict = machine.run(*machine.flags, "--moefix-ask", "--moefix-strict", env=answer("dies"))
    assert strict.code == SGLangError.exit_code
    assert strict.record is None


def test_an_uncertain_model_is_asked_about_without_being_told(machine):
    config = json.loads((machine.model / "config.json").read_text())
    (machine.model / "config.json").write_text(json.dumps(config | {"architectures": ["SomethingMoeForCausalLM"]}))
    result = machine.run(env=answer(UP, UP.replace(".json", "_down.json")) | {"FAKE_TORCH": ""})
    assert result.served
    assert f"SGLang, when asked, looks for {UP}" in result.err
    assert "as worked out" in result.err


def test_a_start_that_measures_nothing_asks_nothing(machine):
    machine.artefact()
    assert machine.run(env=answer(UP)).served
    assert machine.run(*machine.flags, "--moefix-skip-tune", env=answer(UP)).served
    assert questions(machine) == []


def test_no_secret_reaches_the_child(machine):
    secrets = ("--api-key", "sk-secret", "--admin-api=sk-secret", "--ssl-keyfile", "key.pem", "--ssl-certfile=c.pem")
    result = machine.run(*machine.flags, *secrets, "--moefix-ask", "--moefix-skip-download", env=answer(UP))
    assert result.served, result.err
    assert [word for word in secrets if word in result.record["argv"]] == list(secrets)
    (question,) = questions(machine)
    assert set(question["argv"]).isdisjoint(secrets)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_asking_ends_all_of_it(machine, number):
    process = machine.start(*machine.flags, "--moefix-ask", env=answer("hangs"))
    assert fakes.eventually(lambda: questions(machine), 60)
    (state,) = states(machine.home)
    assert (state.phase, state.detail) == (Phase.ASKING, "SGLang, which file it looks for")
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert time.monotonic() - began < 10
    assert fakes.eventually(lambda: fakes.processes_with("RECORD", str(machine.record)) == set(), 5)


def test_wrong_rules_are_put_right_in_the_same_start(tmp_path, trees, driver, models, compiled):
    """The rules say 16-bit weights; SGLang, asked while that is tuned, looks for FP8: that is tuned, and installed."""
    machine = with_child(TuningMachine(tmp_path, trees["0.5.17"].package, driver, models, compiled))
    name = UP.replace(".json", ",dtype=fp8_w8a8.json")
    result = machine.run(env=answer(name, name.replace(".json", "_down.json")))
    assert result.served, result.err
    assert "SGLang itself looks for another file than moefix's rules say; its word counts" in result.err
    folder = machine.package / "srt/layers/moe/moe_runner/triton_utils/configs/triton_3_6_0"
    assert (folder / name).is_file()
    assert len(questions(machine)) == 1
    again = machine.run(env=answer(name))
    assert "nothing to measure" in again.err
    assert len(questions(machine)) == 1
