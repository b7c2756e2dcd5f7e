from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.base.errors import SGLangError, UsageError
from fixer.serve.launch import become_server, reachable
from fixer.serve.options import MoefixOptions, split_flags
from fixer.sglang.server import server_command

ROOT = Path(__file__).resolve().parents[2]


def test_own_options_are_taken_and_the_rest_is_untouched():
    argv = [
        *("--model", "Qwen/Qwen3-30B-A3B", "--moefix-skip-tune", "--tp=2", "--moefix-smem-limit", "101376"),
        *("--json-model-override-args", '{"a": [1,  2]}', "--moefix-home=/a folder/=x", "", "--model-path", "y"),
        *("--moefix-sglang-root", "/opt/sglang", "--moe-runner-backend", "triton"),
    ]
    options, rest = split_flags(argv, {})
    assert options == MoefixOptions(
        skip_tune=True, smem_limit=101376, home=Path("/a folder/=x"), sglang_root=Path("/opt/sglang")
    )
    assert rest == (
        *("--model", "Qwen/Qwen3-30B-A3B", "--tp=2"),
        *("--json-model-override-args", '{"a": [1,  2]}', "", "--model-path", "y", "--moe-runner-backend", "triton"),
    )


def test_environment_variables_count_where_no_flag_does():
    environ = {"MOEFIX_STRICT": "yes", "MOEFIX_QUIET": "0", "MOEFIX_HOME": "/env", "MOEFIX_SMEM_LIMIT": "5000"}
    options, rest = split_flags(["--moefix-home", "/flag"], environ)
    assert options == MoefixOptions(strict=True, home=Path("/flag"), smem_limit=5000)
    assert rest == ()


def test_every_option_has_both_spellings():
    switches = ("skip-tune", "fresh", "strict", "quiet", "dry-run", "skip-download", "ask")
    flags = [f"--moefix-{name}" for name in switches]
    flags += ["--moefix-smem-limit=7", "--moefix-home=h", "--moefix-sglang-root=s"]
    environ = {"MOEFIX_" + name.upper().replace("-", "_"): "1" for name in switches}
    environ |= {"MOEFIX_SMEM_LIMIT": "7", "MOEFIX_HOME": "h", "MOEFIX_SGLANG_ROOT": "s"}
    wanted = MoefixOptions(True, True, True, 7, Path("h"), Path("s"), True, True, True, True)
    assert split_flags(flags, {})[0] == split_flags([], environ)[0] == wanted


def test_after_two_dashes_all_is_sglangs():
    assert split_flags(["-a", "--", "--moefix-fresh"], {}) == (MoefixOptions(), ("-a", "--", "--moefix-fresh"))


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--moefix-skip-tunes"], "--moefix-skip-tune"),
        (["--moefix_skip_tune"], "--moefix-skip-tune"),
        (["--moefix-dryrun"], "--moefix-dry-run"),
        (["--moefix"], "--moefix-"),
        (["--moefixfresh"], "--moefix-fresh"),
        (["--moefix-zzz"], "--moefix-smem-limit"),
        (["--moefix-home"], "--moefix-home"),
        (["--moefix-home="], "--moefix-home"),
        (["--moefix-fresh=1"], "--moefix-fresh"),
        (["--moefix-smem-limit", "99KB"], "101376"),
        (["--moefix-smem-limit=-5"], "101376"),
        (["--moefix-smem-limit=²"], "101376"),
        (["--moefix-home=a\0b"], "folder"),
    ],
)
def test_faulty_options_name_the_way_out(argv, word):
    with pytest.raises(UsageError) as caught:
        split_flags(argv, {})
    assert word in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_faulty_variable_is_named():
    with pytest.raises(UsageError, match="MOEFIX_FRESH"):
        split_flags([], {"MOEFIX_FRESH": "maybe"})


@given(st.lists(st.text().filter(lambda text: not text.startswith("--moefix") and text != "--")))
def test_flags_pass_unchanged(words):
    argv = ["--tp", *words]
    before = ["--moefix-fresh", *argv, "--moefix-quiet"]
    assert split_flags(before, {}) == (MoefixOptions(fresh=True, quiet=True), tuple(argv))
    assert server_command(argv) == [sys.executable, "-m", "sglang.launch_server", *argv]


# --- the exec, with a stand-in for SGLang ----------------------------------------------------------------------------

STAND_IN = """
import json, os, signal, sys, time
record = {"argv": [os.fsencode(part).hex() for part in sys.argv[1:]], "pid": os.getpid(), "ppid": os.getppid(),
          "env": dict(os.environ), "fds": sorted(os.listdir("/proc/self/fd"))}
with open(os.environ["RECORD"] + ".part", "w") as file:
    json.dump(record, file)
os.rename(os.environ["RECORD"] + ".part", os.environ["RECORD"])
print("server", flush=True)
if "--wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
    print("ready", flush=True)
    time.sleep(30)
sys.exit(41)
"""
LAUNCHER = """
import os, sys
held = open(os.devnull)
from fixer.serve.launch import become_server; from fixer.serve.options import split_flags
print("buffered before the exec", end="")
become_server(split_flags(sys.argv[1:])[1], (("SGLANG_MOE_CONFIG_DIR", "/over lay"),))
"""


@pytest.fixture
def stand_in(tmp_path):
    package = tmp_path / "path" / "sglang"
    package.mkdir(parents=True)
    # Importing the package in moefix's own process would be seen: it fails unless it is run by -m.
    (package / "__init__.py").write_text("import sys\nassert sys.argv[0] == '-m', 'imported by moefix'\n")
    (package / "launch_server.py").write_text(STAND_IN)
    return tmp_path


def start(stand_in, *flags):
    env = {**os.environ, "PYTHONPATH": f"{stand_in / 'path'}:{ROOT}", "RECORD": str(stand_in / "record"), "KEPT": "é "}
    env.pop("PYTHONUNBUFFERED", None)  # it would hide text that is lost in the exec
    command = [sys.executable, "-c", LAUNCHER, *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=stand_in)


def test_the_server_is_the_same_process_with_the_same_flags(stand_in):
    flags = [b"--model", b"a b", b"--moefix-fresh", b"", b"'\"$(x);*", b"\xff\xfe", "é".encode(), b"--tp=2", b"-m"]
    process = start(stand_in, *flags)
    out, err = process.communicate(timeout=20)
    record = json.loads((stand_in / "record").read_text())
    assert process.returncode == 41, err
    assert record["pid"] == process.pid
    assert record["ppid"] == os.getpid()
    assert [bytes.fromhex(part) for part in record["argv"]] == [flag for flag in flags if flag != b"--moefix-fresh"]
    assert out == b"buffered before the execserver\n"
    assert record["env"]["SGLANG_MOE_CONFIG_DIR"] == "/over lay"
    assert record["env"]["KEPT"] == "é "
    assert len(record["fds"]) <= 4  # 0, 1, 2, and the one that lists them: nothing of moefix's stays open


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 77), (signal.SIGKILL, -9), (signal.SIGINT, None)])
def test_signals_reach_the_server(stand_in, number, code):
    process = start(stand_in, "--wait")
    assert process.stdout.readline() == b"buffered before the execserver\n"
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    process.communicate(timeout=20)
    # An interrupted Python dies of SIGINT itself, or exits with 130 or 1, by version; what counts is that it does.
    assert process.returncode == code if code is not None else process.returncode != 41


def test_moefixs_own_time_is_short(stand_in):
    began = time.monotonic()
    process = start(stand_in)
    process.communicate(timeout=20)
    assert process.returncode == 41
    assert time.monotonic() - began < 3


def test_without_sglang_there_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(SGLangError, match="not installed") as caught:
        become_server(["--model", "x"])
    assert "pip install sglang" in caught.value.hint
    (tmp_path / "sglang").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SGLangError, match=r"no sglang\.launch_server"):
        become_server([])


def test_a_python_that_is_gone_is_a_clear_error(monkeypatch, stand_in):
    monkeypatch.setattr(sys, "path", [str(stand_in / "path")])
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SGLangError, match="/nowhere/python"):
        become_server([])
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(SGLangError, match="does not know"):
        become_server([])


def test_a_flag_that_no_program_can_take_is_a_clear_error(monkeypatch, stand_in):
    monkeypatch.setattr(sys, "path", [str(stand_in / "path")])
    with pytest.raises(SGLangError, match="cannot be started"):
        become_server(["a\0b"])


def test_a_published_port_reaches_the_server_in_the_image():
    image = {"MOEFIX_IMAGE": "1"}
    assert reachable(("--model", "x"), None, image) == ("--host", "0.0.0.0", "--model", "x")
    assert reachable(("--model", "x", "--host", "::"), "::", image) == ("--model", "x", "--host", "::")
    assert reachable(("--model", "x"), None, {}) == ("--model", "x")
