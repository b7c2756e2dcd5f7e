from __future__ import annotations

import os
import signal
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from fixer.base.errors import CardError, TuneError
from fixer.machine.worker import ChildProcess, Fate

# The functions below run in the child.


def obey(request):
    match request:
        case "pid":
            return os.getpid()
        case "exit":
            os._exit(3)
        case "fail":
            raise RuntimeError("not foreseen")
        case "refuse":
            raise CardError("the card is full", "stop what else uses it")
        case "hang":
            time.sleep(600)
    return request * 2


def make_obedient():
    return obey


def make_unwilling():
    raise CardError("no card", "plug one in")


def make_dead():
    os._exit(1)


def make_slow():
    time.sleep(600)


def make_stubborn_once(marker: Path):
    """Dies at its first start only."""
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return obey


@pytest.fixture
def child():
    process = ChildProcess(make_obedient, start_seconds=60)
    yield process
    process.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_it_answers_in_another_process(child):
    assert child.ask(21, 30) == 42
    pid = child.ask("pid", 30)
    assert pid != os.getpid()
    assert child.ask("pid", 30) == pid
    assert child.restarts == 0
    child.close()
    assert gone(pid)


def test_a_crash_costs_one_answer(child):
    first = child.ask("pid", 30)
    assert child.ask("exit", 30) is Fate.CRASHED
    assert child.ask("fail", 30) is Fate.CRASHED
    second = child.ask("pid", 30)
    assert second != first
    assert child.restarts == 2


def test_a_kill_from_outside_is_a_crash(child):
    pid = child.ask("pid", 30)
    child.send("hang")
    os.kill(pid, signal.SIGKILL)
    assert child.receive(30) is Fate.CRASHED
    assert child.ask(1, 30) == 2


def test_one_that_dies_with_answers_owed_is_not_started_anew_before_its_crash_is_read(child):
    """Else the new one's "ready" was taken for the answer: two requests were out, and the first killed it."""
    pid = child.ask("pid", 30)
    child.send("exit")
    child.send(1)
    while not gone(pid):
        time.sleep(0.01)
    assert child.is_ready()
    assert child.receive(30) is Fate.CRASHED
    assert child.ask(1, 30) == 2
    assert child.restarts == 1


def test_a_hang_ends_at_the_timeout(child):
    pid = child.ask("pid", 30)
    before = time.monotonic()
    assert child.ask("hang", 0.2) is Fate.TIMED_OUT
    assert time.monotonic() - before < 5
    assert gone(pid)
    assert child.ask(3, 30) == 6  # and not the answer to an earlier request


def test_a_foreseen_fault_is_raised_here_and_the_child_lives(child):
    pid = child.ask("pid", 30)
    with pytest.raises(CardError, match="the card is full") as caught:
        child.ask("refuse", 30)
    assert caught.value.hint == "stop what else uses it"
    assert child.ask("pid", 30) == pid


def test_its_pipe_can_be_waited_for_with_others(child):
    child.send(5)
    assert wait([child.connection], 30) == [child.connection]
    assert child.receive(0) == 10


def test_a_factorys_fault_is_raised_here():
    child = ChildProcess(make_unwilling, start_seconds=60)
    with pytest.raises(CardError, match="no card") as caught:
        child.ask(1, 30)
    assert caught.value.hint == "plug one in"
    with pytest.raises(TuneError, match="not running"):
        _ = child.connection


def test_a_factory_that_dies_or_hangs_is_a_fault():
    with pytest.raises(TuneError, match="could not start: it crashed"):
        ChildProcess(make_dead, start_seconds=60).ask(1, 30)
    with pytest.raises(TuneError, match="could not start: it timed out"):
        ChildProcess(make_slow, start_seconds=0.2).ask(1, 30)


def test_a_child_that_could_not_start_can_be_started_again(tmp_path):
    child = ChildProcess(partial(make_stubborn_once, tmp_path / "marker"), start_seconds=60)
    with pytest.raises(TuneError):
        child.ask(4, 30)
    assert child.ask(4, 30) == 8
    child.close()


def test_closing_twice_or_before_the_start_does_nothing():
    child = ChildProcess(make_obedient)
    child.close()
    child.start()
    child.close()
    child.close()
