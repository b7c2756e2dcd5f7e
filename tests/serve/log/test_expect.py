"""From the command line to the verdict and back: what SGLang asked for decides the next start. With stand-ins."""

from __future__ import annotations

import json

import pytest

from fixer.base.locks import is_held
from fixer.base.status import Phase, Status, lock_path, state_path
from fixer.base.status_reading import health, states
from fixer.model.config import load_model
from fixer.model.rules.decide import decide
from fixer.serve import asked as asking
from fixer.serve.asked_question import question_of
from fixer.serve.log.expect import server_url
from fixer.sglang.find_tree import tree_at
from fixer.sglang.flags import parse_flags
from fixer.workload import NumberFormat
from tests.support import fakes
from tests.support.serving import FOLDER, H100, Machine, artefact_of, installed

SERVER = """
import json, os, subprocess, sys, time
argv = sys.argv[1:]
dummy = "--skip-tokenizer-init" in argv
record = {"at": time.time(), "argv": argv, "pid": os.getpid(), "env": dict(os.environ)}
with open(os.environ["RECORD"] + (".asked" if dummy else ""), "w") as file:
    json.dump(record, file)
lines = json.loads(os.environ.get("ASKED_LINES" if dummy else "LINES", "[]"))
if dummy:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("[2026-11-24 07:00:00] server_args=ServerArgs(moe_runner_backend='auto', moe_a2a_backend='none')", flush=True)
folder = os.path.join(os.environ.get("SGLANG_MOE_CONFIG_DIR", os.environ["PACKAGE"]), os.environ["FOLDER"])
for name in lines:
    path = os.path.join(folder, name)
    if not name.endswith(".json"):
        text = name
    elif os.path.exists(path):
        text = f"Using MoE kernel config from {path}."
    else:
        text = ("Using default MoE kernel config. Performance might be sub-optimal! Config file not found at "
                f"{path}, you can create them with https://github.com/sgl-project/sglang")
    print("[2026-11-24 07:00:01 TP0] " + text, file=sys.stderr, flush=True)
if dummy:
    time.sleep(600)
time.sleep(float(os.environ.get("SERVE_SECONDS", "0")))
sys.exit(41)
"""
READY = "The server is fired up and ready to roll!"


def first_question(situation):
    return question_of(situation, situation.first)


@pytest.fixture
def machine(tmp_path, trees, driver, models, compiled):
    machine = Machine(tmp_path, trees["0.5.17"].package, driver, models, compiled)
    config = json.loads((machine.model / "config.json").read_text())
    (machine.model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 48}))
    (machine.package / "launch_server.py").write_text(SERVER)
    machine.env |= {"PACKAGE": str(machine.package), "FOLDER": FOLDER}
    return machine


def lines_env(*lines):
    return {"LINES": json.dumps(lines)}


def question_file(machine):
    (path,) = (machine.home / "asked").glob("*.json")
    return path


def verdict_lines(result):
    return [line for line in result.err.splitlines() if line.startswith("moefix: SGLang ")]


def test_both_files_picked_up(machine):
    artefact = machine.artefact()
    result = machine.run(env=lines_env(artefact.gate_up_file, artefact.down_file, READY))
    assert result.served, result.err
    assert verdict_lines(result) == [
        f"moefix: SGLang picked up both files: {artefact.gate_up_file} and {artefact.down_file}"
    ]
    assert not (machine.home / "asked").exists()
    (state,) = states(machine.home)
    assert fakes.eventually(lambda: states(machine.home)[0].phase is Phase.ENDED)
    (state,) = states(machine.home)
    assert state.pid == result.pid
    assert state.files == (artefact.gate_up_file, artefact.down_file)
    assert "picked up both" in state.verdict
    assert state.url == "http://127.0.0.1:31000"
    assert state.model == str(machine.model)


def test_a_wrong_name_is_repaired_by_the_next_start(machine):
    rules, other = artefact_of(machine, number_format=NumberFormat.FP8_W8A8)
    wanted = (other.gate_up_file, other.down_file, READY)
    first = machine.run(env=lines_env(*wanted))
    assert first.served, first.err
    assert "asked for another file: " + other.gate_up_file in verdict_lines(first)[-1]
    assert installed(machine, rules)
    assert fakes.eventually(lambda: list((machine.home / "asked").glob("*.json")))
    second = machine.run(env=lines_env(*wanted))
    assert second.served, second.err
    assert f"SGLang looked for {other.gate_up_file} at an earlier start; tuning exactly that" in second.err
    assert installed(machine, other)
    assert "picked up both files: " + other.gate_up_file in verdict_lines(second)[-1]
    kept = question_file(machine).read_bytes()
    assert machine.run(env=lines_env(*wanted)).served
    assert question_file(machine).read_bytes() == kept
    # Other flags, another question: the rules decide again.
    changed = machine.run(*machine.flags, "--dtype", "float16", "--moefix-skip-tune", env=lines_env(*wanted))
    assert "at an earlier start" not in changed.err


def test_a_record_that_sglang_contradicts_is_replaced(machine):
    rules, other = artefact_of(machine, number_format=NumberFormat.FP8_W8A8)
    machine.run(env=lines_env(other.gate_up_file, other.down_file, READY))
    assert fakes.eventually(lambda: list((machine.home / "asked").glob("*.json")))
    back = machine.run(env=lines_env(rules.gate_up_file, rules.down_file, READY))
    # Both pairs are there by now: SGLang reads the one of the rules, which is not the one that was tuned for.
    assert "asked for another file: " + rules.gate_up_file in verdict_lines(back)[-1]
    assert fakes.eventually(
        lambda: asking.Asked.from_json(question_file(machine).read_bytes()).gate_up == rules.gate_up_file
    )
    assert "picked up both" in verdict_lines(machine.run(env=lines_env(rules.gate_up_file, rules.down_file)))[-1]


def test_a_name_that_cannot_be_tuned_is_said_and_served_without(machine):
    machine.artefact()
    name = "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3,dtype=int4_w4a16.json"
    first = machine.run(env=lines_env(name, READY))
    assert "asked for another file: " + name in verdict_lines(first)[-1]
    assert fakes.eventually(lambda: list((machine.home / "asked").glob("*.json")))
    second = machine.run(env=lines_env(name, READY))
    assert second.served
    assert "does not say the group size" in second.err
    assert "SGLang runs without a file of moefix" in verdict_lines(second)[-1]
    assert "next start" not in second.err


def test_a_damaged_record_is_set_aside(machine):
    artefact = machine.artefact()
    flags = parse_flags(machine.flags)
    tree = tree_at(machine.package)
    model = load_model("", flags)
    situation = asking_situation(model, flags, tree)
    path = asking.record_path(machine.home, first_question(situation))
    path.parent.mkdir()
    path.write_text('{"schema": 1, "gate_up"')
    result = machine.run(env=lines_env(artefact.gate_up_file, artefact.down_file))
    assert result.served
    assert "is not used" in result.err
    assert list(path.parent.glob("*.damaged-*"))
    assert "picked up both" in verdict_lines(result)[-1]


def asking_situation(model, flags, tree):
    from fixer.serve.situation import OnCard, Situation

    return Situation(model, flags, tree, (OnCard((H100,), decide(model, flags, H100, tree.version)),))


def test_a_dense_model_says_what_was_expected(machine):
    result = machine.run("--model", str(machine.dense), env=lines_env(READY))
    assert result.served
    assert "looked for no MoE file, as expected: the model is dense" in verdict_lines(result)[-1]


def test_never_looked_up(machine):
    machine.artefact()
    result = machine.run(env=lines_env(READY))
    assert "SGLang never looked for a MoE file" in verdict_lines(result)[-1]


def test_one_joint_file_is_moefixs_too(tmp_path, trees, driver, models, compiled):
    machine = Machine(tmp_path, trees["0.4.9"].package, driver, models, compiled)
    (machine.package / "launch_server.py").write_text(SERVER)
    folder = "srt/layers/moe/fused_moe_triton/configs/triton_3_6_0"
    machine.env |= {"PACKAGE": str(machine.package), "FOLDER": folder}
    name = "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3.json"
    result = machine.run(*machine.flags, "--moefix-skip-tune", "--moefix-smem-limit=16000", env=lines_env(name, READY))
    assert result.served, result.err
    assert "without a file of moefix" not in result.err
    assert f"picked up the file: {name}" in verdict_lines(result)[-1]
    (state,) = states(machine.home)
    assert state.files == (name,)


def machine_situation(machine):
    flags = parse_flags(machine.flags)
    return asking_situation(load_model("", flags), flags, tree_at(machine.package))


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_a_failed_start_is_on_the_board(machine):
    result = machine.run(env={"CUDA_VISIBLE_DEVICES": ""})
    (state,) = states(machine.home)
    assert (result.code, state.phase) == (4, Phase.FAILED)
    assert "No NVIDIA card is visible" in state.detail


def test_the_board_while_it_tunes_and_serves(machine):
    process = machine.start(env={"FAKE_TORCH": "slow"})

    def state() -> Status | None:
        return next((each for each in states(machine.home) if each.pid == process.pid), None)

    def phase() -> Phase | None:
        return state().phase if state() else None

    assert fakes.eventually(lambda: phase() is Phase.TUNING, 60)
    healthy, text = health(machine.home)
    assert not healthy
    assert text.startswith("tuning: ")
    process.terminate()
    process.communicate(timeout=60)
    machine.artefact()
    process = machine.start(env=lines_env(READY) | {"SERVE_SECONDS": "60"})
    assert fakes.eventually(lambda: phase() is Phase.SERVING, 60)
    assert fakes.eventually(lambda: state().detail == "SGLang is ready", 20)
    healthy, text = health(machine.home)
    assert not healthy  # the stand-in answers nothing
    assert "does not answer" in text
    lock = lock_path(state_path(machine.home, state().run))
    assert is_held(lock)  # by the server
    process.kill()
    process.communicate(timeout=60)
    assert fakes.eventually(lambda: phase() is Phase.ENDED and state().detail == "", 20)
    assert is_held(lock) is False


def test_the_board_of_a_tuning_without_a_server(machine):
    process = machine.start("tune", *machine.flags, env={"FAKE_TORCH": "slow"})

    def state() -> Status | None:
        return next((each for each in states(machine.home) if each.pid == process.pid), None)

    assert fakes.eventually(lambda: state() is not None and state().phase is Phase.TUNING, 60)
    assert state().model == str(machine.model)
    process.terminate()
    process.communicate(timeout=60)
    assert (state().phase, state().detail) == (Phase.ENDED, "")


@pytest.mark.parametrize(
    ("words", "url"),
    [
        ((), "http://127.0.0.1:30000"),
        (("--host", "0.0.0.0", "--port=8000"), "http://127.0.0.1:8000"),
        (("--host", "::"), "http://[::1]:30000"),
        (("--host", "fd00::7", "--port", "1"), "http://[fd00::7]:1"),
        (("--host", "gpu.example", "--ssl-certfile", "x.pem"), "https://gpu.example:30000"),
    ],
)
def test_where_the_server_is(words, url):
    assert server_url(parse_flags(("--model", "x", *words))) == url
