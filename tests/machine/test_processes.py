"""A server of moefix's own: it ends when it is to, and when moefix does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixer.base.errors import SGLangError
from fixer.machine.processes import end_group, start_child
from tests.support import fakes

MARK = "MOEFIX_TEST_CHILD"


def test_the_child_dies_with_a_killed_parent(tmp_path):
    program = (
        "import os, sys, time\nfrom fixer.machine.processes import start_child\n"
        "start_child(['sleep', '600'], os.environ, sys.stderr)\ntime.sleep(600)"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, MARK: str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    family = lambda: fakes.processes_with(MARK, str(tmp_path))  # noqa: E731
    sleeps = lambda: [pid for pid in family() if Path(f"/proc/{pid}/comm").read_bytes().strip() == b"sleep"]  # noqa: E731
    try:
        assert fakes.eventually(sleeps, 20)
        parent.kill()
        parent.wait()
        assert fakes.eventually(lambda: not family())
    finally:
        for pid in family():
            os.kill(pid, signal.SIGKILL)


def test_zombies_of_a_group_are_not_waited_for(tmp_path):
    """One that left the group does not collect its child, which stayed in it."""
    leaver = (
        "import os, time; pid = os.fork(); pid or time.sleep(600); os.setsid(); print(pid, flush=True); time.sleep(600)"
    )
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {leaver!r}]); time.sleep(600)"
    environment = {**os.environ, MARK: str(tmp_path)}
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = start_child([sys.executable, "-c", script], environment, stream)
    try:
        assert fakes.eventually(lambda: log.read_bytes().endswith(b"\n"), 60)
        zombie = int(log.read_text())
        began = time.monotonic()
        end_group(process, 0, 30)
        assert time.monotonic() - began < 15
        assert process.returncode == -signal.SIGKILL
        assert Path(f"/proc/{zombie}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    finally:
        for pid in fakes.processes_with(MARK, str(tmp_path)):
            os.kill(pid, signal.SIGKILL)


def test_a_program_that_is_not_there(tmp_path):
    with (tmp_path / "log").open("wb") as stream, pytest.raises(SGLangError, match="no such program"):
        start_child(["/no/such/python"], os.environ, stream)
