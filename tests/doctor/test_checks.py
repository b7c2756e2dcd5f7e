"""`moefix doctor`: real processes with a stand-in driver and hub, and each check alone."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import fixer
from fixer.base.errors import CardError
from fixer.base.text import told
from fixer.commands.doctor import lines_of
from fixer.doctor import checks as doctor
from fixer.doctor import compiling, folders, sglang
from fixer.doctor.examine import Check, Finding, Patient, State, examine, worst
from fixer.doctor.hub import told_address
from fixer.machine.cards import Card
from fixer.sglang.releases import PINNED, RELEASES
from fixer.sglang.tree import Tree
from tests.support.fake_driver import build_driver

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_this_is_a_secret_0123456789"
FOLDER = "srt/layers/moe/moe_runner/triton_utils/configs/triton_3_6_0"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def package(tmp_path, trees):
    package = tmp_path / "tree" / "sglang"
    shutil.copytree(trees["0.5.17"].package, package)
    return package


class Outcome(namedtuple("Outcome", "code out err")):
    def findings(self):
        return [Finding(r["check"], State(r["state"]), r["text"], r["fix"]) for r in json.loads(self.out)["findings"]]

    def of(self, check):
        return [finding for finding in self.findings() if finding.check == check]


@pytest.fixture
def examine_machine(tmp_path, driver, package):
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("CUDA_", "FAKE_", "HF_", "SGLANG_", "MOEFIX_"))}
    env = {
        **clean,
        "LD_LIBRARY_PATH": str(driver),
        "CUDA_VISIBLE_DEVICES": "1",
        "PYTHONPATH": str(ROOT),
        "MOEFIX_HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hub"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments, json_wanted=True, **changes):
        command = [sys.executable, str(ROOT / "entrypoint.py"), "doctor", "--sglang-root", str(package), *arguments]
        command += ["--json"] if json_wanted else []
        environ = {name: value for name, value in (env | changes).items() if value is not None}
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200}
        done = subprocess.run(command, env=environ, check=False, **options)
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_sound_machine(examine_machine, tmp_path, package):
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    outcome = examine_machine()
    assert outcome.code == 0, outcome.out
    document = json.loads(outcome.out)
    assert document["schema"] == 1
    assert document["state"] in ("ok", "warning")  # this machine's disk and /dev/shm are what they are
    names = [finding.check for finding in outcome.findings()]
    assert [name for i, name in enumerate(names) if name not in names[:i]] == [
        "driver",
        "shared memory",
        "use of the card",
        "C compiler",
        "Triton",
        "SGLang",
        "SGLang's kernel",
        "tuning files",
        "Triton's folder",
        "data folder",
        "hub cache",
        "Triton's cache",
        "/dev/shm",
        "disk",
        "hub",
        "token",
    ]
    (card,) = outcome.of("driver")
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0, 81559 MiB, driver 580.159.03" in card.text
    assert outcome.of("shared memory")[0].text.startswith("device 0: 232448 bytes")
    assert "offline by wish" in outcome.of("hub")[0].text
    assert all(finding.fix for finding in outcome.findings() if finding.state is not State.OK)
    # It looked, and changed nothing.
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_plain_lines_and_a_table(examine_machine, driver, package, tmp_path):
    outcome = examine_machine(json_wanted=False, CUDA_VISIBLE_DEVICES="")
    lines = outcome.out.splitlines()
    assert lines[0] == "failure  driver: no NVIDIA card is visible"
    assert lines[1].startswith("         -> In Docker start with --gpus all")
    assert "\x1b" not in outcome.out
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "entrypoint.py"), "doctor", "--sglang-root", str(package)]
    process = subprocess.Popen([*command, "--home", str(tmp_path / "h")], env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other side is closed
        pass
    process.wait(60)
    os.close(ours)
    assert b"finding" in shown
    assert b"\x1b[" in shown
    assert b"C compiler" in shown


def test_without_a_card_it_fails(examine_machine):
    outcome = examine_machine(CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 1
    (finding,) = outcome.of("driver")
    assert (finding.state, "--gpus all" in finding.fix) == (State.FAILURE, True)
    assert outcome.of("shared memory") == []


def test_a_failing_driver_is_named_and_the_rest_goes_on(examine_machine):
    outcome = examine_machine(FAKE_CUINIT="803")
    (finding,) = outcome.of("driver")
    assert finding.state is State.FAILURE
    assert "803" in finding.text
    assert outcome.of("C compiler")[0].state is State.OK
    assert outcome.code == 1


def test_a_busy_full_card_is_told_with_who_holds_it(examine_machine):
    outcome = examine_machine(FAKE_USED_MIB="70000", FAKE_BUSY="98", FAKE_HOLDERS="4242:69000")
    (finding,) = outcome.of("use of the card")
    assert finding.state is State.WARNING
    assert "11559 of 81559 MiB are free, 98 % busy" in finding.text
    assert "process 4242 (python3) with 69000 MiB" in finding.text
    assert outcome.code == 0


def test_help_names_the_exit_code(examine_machine):
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "doctor", "--help"], capture_output=True, text=True, check=True
    )
    assert "exit with 1 if there is a failure" in " ".join(done.stdout.split())


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_hung_check_costs_its_own_deadline_only():
    def hang(patient):
        time.sleep(60)
        yield from ()

    def fine(patient):
        yield Finding("second", State.OK, "here")

    began = time.monotonic()
    checks = (
        Check("first", hang, 0.3),
        Check("second", fine, 30),
        Check("third", hang, 0.3, State.WARNING),
    )
    found = list(examine(Patient(Path("nowhere")), checks))
    assert [(finding.check, finding.state) for finding in found] == [
        ("first", State.FAILURE),
        ("second", State.OK),
        ("third", State.WARNING),
    ]
    assert "no answer within 0.3 s" in found[0].text
    assert time.monotonic() - began < 20
    assert worst(found) is State.FAILURE
    assert worst(found[1:]) is State.WARNING
    assert worst(()) is State.OK


def test_a_check_that_fails_is_a_finding():
    def foreseen(patient):
        raise CardError("the card is sad", "cheer it up")

    def unforeseen(patient):
        raise RuntimeError(f"https://user:{TOKEN}@hub/x said no\nand more")

    one, two = examine(Patient(Path("nowhere")), (Check("a", foreseen), Check("b", unforeseen)))
    assert (one.state, one.text, one.fix) == (State.FAILURE, "the card is sad", "cheer it up")
    assert two.state is State.FAILURE
    assert TOKEN not in two.text
    assert "and more" not in two.text


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {TOKEN}",
        f"invalid header {{'authorization': 'Bearer {TOKEN}'}}",
        f"GET https://hub/api?token={TOKEN}&x=1",
        f"https://{TOKEN}@hub.example/model",
        f"token {TOKEN} is no good",
    ],
)
def test_no_error_text_holds_a_token(text):
    assert TOKEN not in told(ValueError(text))
    assert told(ValueError(text)).startswith("ValueError: ")
    assert told(ValueError("a\x1b[31mb\x00")).isprintable()
    assert told(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://huggingface.co", "https://huggingface.co"),
        (f"https://me:{TOKEN}@mirror:8443/path?x", "https://mirror:8443"),
        ("nonsense", "HF_ENDPOINT"),
        ("http://[::1", "HF_ENDPOINT"),
    ],
)
def test_addresses_are_told_without_secrets(address, shown):
    assert told_address(address) == shown


# --- one check at a time ---------------------------------------------------------------------------------------------


def of(look, patient=None):
    return list(look(patient or Patient(Path("nowhere"))))


def with_cards(*cards):
    patient = Patient(Path("nowhere"))
    patient.__dict__["cards"] = cards
    return patient


@pytest.mark.parametrize(
    ("capability", "shared", "state"),
    [((9, 0), 232448, State.OK), ((8, 9), 99328, State.WARNING), ((13, 0), 232448, State.WARNING)],
)
def test_shared_memory_is_compared_with_the_table(capability, shared, state):
    (finding,) = of(doctor.look_at_shared_memory, with_cards(Card("X", capability, shared, 1, 0)))
    assert finding.state is state
    assert str(shared) in finding.text


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_a_compiler_that_does_not_work(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    (finding,) = of(doctor.look_at_compiler)
    assert finding.state is State.FAILURE
    assert compiler in finding.text


def test_no_compiler_and_no_headers(monkeypatch, tmp_path):
    assert of(doctor.look_at_compiler)[0].state is State.OK
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (finding,) = of(doctor.look_at_compiler)
    assert (finding.state, "Python.h is not in" in finding.text, "-dev" in finding.fix) == (State.FAILURE, True, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (finding,) = of(doctor.look_at_compiler)
    assert "neither gcc nor clang" in finding.text


def test_a_triton_that_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = of(doctor.look_at_triton)
    assert finding.state is State.FAILURE
    assert "libtriton.so is broken" in finding.text


def test_a_triton_that_is_not_sglangs(monkeypatch, trees):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for version, state in (("0.5.17", State.OK), ("0.4.9", State.WARNING)):
        (finding,) = of(doctor.look_at_triton, Patient(Path("nowhere"), (), trees[version].package))
        assert finding.state is state, finding


def test_no_sglang_is_a_failure(tmp_path):
    (finding,) = examine(Patient(tmp_path, (), tmp_path), (Check("SGLang", doctor.look_at_sglang),))
    assert (finding.state, finding.check) == (State.FAILURE, "SGLang")
    assert finding.fix


def test_an_unknown_release_a_read_only_tree_and_files_moved_aside(package, monkeypatch, tmp_path):
    (package / "_version.py").unlink(missing_ok=True)
    (package / "version.py").write_text('__version__ = "0.5.17.post9"\n')
    (package / FOLDER / "E=1.json.damaged-20260101T000000Z").write_text("x")
    monkeypatch.setattr(folders.os, "access", lambda path, mode: "sglang" not in str(path))
    found = of(doctor.look_at_sglang, Patient(tmp_path, (), package))
    assert "not among the 26 releases that moefix knows" in found[0].text
    assert found[0].state is State.WARNING
    assert any("an overlay in the data folder is used" in finding.text for finding in found)
    assert any("moved aside" in finding.text and finding.state is State.WARNING for finding in found)


def test_a_config_folder_of_the_users_is_named(monkeypatch, tmp_path, package):
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / "mine"))
    found = of(doctor.look_at_sglang, Patient(tmp_path, (), package))
    assert any("SGLANG_MOE_CONFIG_DIR names it" in finding.text and "mine" in finding.text for finding in found)
    assert any("is not there yet" in finding.text for finding in found)


def test_a_damaged_tuning_file_of_the_model_is_a_failure_and_stays(examine_machine, package, models):
    model = models["q3_30b_bf16_tp1_h100"]
    folder = package / FOLDER
    folder.mkdir(exist_ok=True)
    name = "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3.json"
    (folder / name).write_text("{")
    outcome = examine_machine("--model", str(model), "--tp", "1")
    assert outcome.code == 1
    (bad,) = [finding for finding in outcome.findings() if finding.state is State.FAILURE]
    assert name in bad.text
    assert (folder / name).read_text() == "{"
    (folder / name).unlink()
    outcome = examine_machine("--model", str(model))
    assert outcome.code == 0
    assert any("asks" in finding.text or "Triton" in finding.text for finding in outcome.of("model"))
    missing = examine_machine("--model", "/nowhere/model")
    assert missing.code == 1
    assert missing.of("model")[0].state is State.FAILURE


def test_a_data_folder_with_roots_files_in_it(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    home = tmp_path / "home"
    (home / "artefacts").mkdir(parents=True)
    for path in (home, home / "artefacts"):
        os.chown(path, 1234, 1234)
    assert of(doctor.look_at_home, Patient(home)) == [Finding("data folder", State.OK, f"{home} can be written")]
    (home / "journal.sqlite").write_text("")
    (home / "artefacts" / "x.json.damaged-20260101T000000Z").write_text("")
    found = of(doctor.look_at_home, Patient(home))
    assert [finding.state for finding in found] == [State.OK, State.WARNING, State.WARNING]
    assert "2 files" in found[1].text
    assert "root" in found[1].text
    assert found[1].fix == f"sudo chown -R 1234:1234 {home}"
    assert "1 damaged" in found[2].text


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    (finding,) = of(doctor.look_at_home, Patient(file / "home"))
    assert finding.state is State.FAILURE
    assert f"chown -R {os.geteuid()}" in finding.fix
    monkeypatch.setattr(folders, "_caches", lambda: (("hub cache", file / "a"), ("Triton's cache", tmp_path / "b")))
    hub, triton = of(doctor.look_at_caches)
    assert (hub.state, triton.state) == (State.FAILURE, State.OK)
    assert "HF_HOME" in hub.fix


@pytest.mark.parametrize(("mib", "state"), [(64, State.WARNING), (16384, State.OK)])
def test_shared_memory_of_processes(monkeypatch, mib, state):
    size = namedtuple("Size", "f_frsize f_blocks")(4096, mib * 256)
    monkeypatch.setattr(folders.os, "statvfs", lambda path: size)
    (finding,) = of(doctor.look_at_shm)
    assert (finding.state, finding.text.split()[0]) == (state, str(mib))


@pytest.mark.parametrize(
    ("gib", "states"),
    [(0.05, ["failure", "failure"]), (1, ["warning", "warning"]), (10, ["ok", "warning"]), (99, ["ok", "ok"])],
)
def test_disk(monkeypatch, tmp_path, gib, states):
    usage = namedtuple("Usage", "total used free")(1 << 40, 0, int(gib * 2**30))
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    assert [finding.state.value for finding in of(doctor.look_at_disk, Patient(tmp_path / "not" / "yet"))] == states


def test_lines(tmp_path):
    good, bad = Finding("a", State.OK, "b", "c"), Finding("a", State.FAILURE, "b", "c")
    assert list(lines_of(good)) == ["ok       a: b"]
    assert list(lines_of(bad)) == ["failure  a: b", "         -> c"]


# --- hub and token ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("authorization")))
            code = answers["whoami" if "whoami" in self.path else "hub"]
            if code == 0:
                time.sleep(30)
            body = json.dumps({"name": "someone", "type": "user", "error": f"no {TOKEN}"}).encode()
            self.send_response(code or 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    seen, answers = [], {"hub": 200, "whoami": 200}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield namedtuple("Hub", "address seen answers")(f"http://127.0.0.1:{server.server_port}", seen, answers)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("hub_code", "whoami_code", "hub_state", "token_state", "code"),
    [(200, 200, "ok", "ok", 0), (200, 401, "ok", "failure", 1), (503, 503, "warning", "warning", 0)],
)
def test_hub_and_token(examine_machine, hub, hub_code, whoami_code, hub_state, token_state, code):
    hub.answers.update(hub=hub_code, whoami=whoami_code)
    outcome = examine_machine(HF_ENDPOINT=hub.address, HF_HUB_OFFLINE=None, HF_TOKEN=TOKEN, NO_PROXY="127.0.0.1")
    (hub_found,), (token_found,) = outcome.of("hub"), outcome.of("token")
    assert (hub_found.state.value, token_found.state.value) == (hub_state, token_state)
    assert outcome.code == code
    assert any(authorization == f"Bearer {TOKEN}" for _, authorization in hub.seen)
    assert hub.address in hub_found.text


def test_without_a_token_and_out_of_reach(examine_machine):
    outcome = examine_machine(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE=None, NO_PROXY="127.0.0.1")
    assert outcome.of("hub")[0].state is State.WARNING
    assert "HF_ENDPOINT" in outcome.of("hub")[0].fix
    assert outcome.of("token")[0].text.startswith("none")
    assert outcome.code == 0
    outcome = examine_machine(
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE=None, HF_TOKEN=TOKEN, NO_PROXY="127.0.0.1"
    )
    assert outcome.of("token")[0].state is State.WARNING


def test_offline_and_modelscope_by_wish(examine_machine):
    outcome = examine_machine(HF_TOKEN=TOKEN)
    assert outcome.of("token")[0].text == "there is one; not checked, offline by wish"
    for word in ("true", "yes"):  # as SGLang and `serve` read it
        outcome = examine_machine(HF_HUB_OFFLINE=None, SGLANG_USE_MODELSCOPE=word)
        assert "ModelScope" in outcome.of("hub")[0].text


# --- at build time ---------------------------------------------------------------------------------------------------


def test_the_build_checks_need_no_card(examine_machine):
    outcome = examine_machine("--build", CUDA_VISIBLE_DEVICES="")
    kernels = [finding.text.split(":")[0] for finding in outcome.of("kernel")]
    assert kernels == [
        "sm_80, bf16",
        "sm_86, bf16",
        "sm_89, FP8",
        "sm_90, FP8",
        "sm_100, FP8",
        "sm_120, FP8",
    ]
    assert all(finding.state is State.OK for finding in outcome.findings() if finding.check != "entry point")
    assert outcome.of("driver") == outcome.of("hub") == []
    (entry,) = outcome.of("entry point")  # whether others may read this Python is this machine's matter
    assert outcome.code == (0 if entry.state is State.OK else 1)


def test_another_sglang_or_triton_is_not_the_pinned_one(trees, monkeypatch):
    good = of(doctor.look_at_pin, Patient(Path("nowhere"), (), trees["0.5.17"].package))
    assert [finding.state for finding in good] == [State.OK, State.OK]
    monkeypatch.setattr(sglang.importlib.metadata, "version", lambda name: "3.5.1")
    patient = Patient(Path("nowhere"))
    patient.__dict__["tree"] = Tree(trees["0.4.9"].package, "0.4.9", "3.3.1")
    bad = of(doctor.look_at_pin, patient)
    assert [finding.state for finding in bad] == [State.WARNING, State.FAILURE]  # another release is a user's choice
    assert PINNED in bad[0].fix
    assert f"Triton {RELEASES['0.4.9'].triton}" in bad[1].fix  # that release's own, not the pinned one's
    monkeypatch.setattr(sglang.importlib.metadata, "version", lambda name: RELEASES["0.4.9"].triton)
    assert [finding.state for finding in of(doctor.look_at_pin, patient)] == [State.WARNING, State.OK]


def test_a_kernel_that_does_not_compile_is_a_failure(trees, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BUILD_ARCHITECTURES", (80, 89))
    monkeypatch.setattr(compiling, "FP8_SINCE", 80)  # Triton has no fp8e4nv for sm_80
    first, second = of(doctor.look_at_kernels, Patient(tmp_path, (), trees["0.5.17"].package))
    assert (first.state, second.state) == (State.FAILURE, State.OK)
    assert "sm_80, FP8" in first.text


@pytest.mark.parametrize(("script", "state"), [("echo moefix {}", State.OK), ("exit 3", State.FAILURE)])
def test_the_entry_point_is_tried_as_another_user(monkeypatch, script, state):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        python = Path(folder, "python")
        script = script.format(fixer.__version__)
        python.write_text(f'#!/bin/sh\nid -u >{folder}/uid\necho "$@" >{folder}/arguments\n{script}\n')
        python.chmod(0o755)
        monkeypatch.setattr(doctor.sys, "executable", str(python))
        (finding,) = of(doctor.look_at_entry_point)
        assert finding.state is state
        tried = int(Path(folder, "uid").read_text())
        assert tried == (doctor.NOBODY if os.geteuid() == 0 else os.geteuid())
        assert Path(folder, "arguments").read_text().split() == [str(ROOT / "entrypoint.py"), "--version"]
