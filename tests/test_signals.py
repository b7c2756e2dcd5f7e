from __future__ import annotations

import os
import signal
import threading

import pytest

from fixer.signals import deferred


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end(handlers, number):
    seen = []

    def leave(number, frame):
        seen.append(number)
        raise SystemExit(128 + number)

    signal.signal(number, leave)

    def work():
        with deferred():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            seen.append("whole")

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == 128 + number
    assert seen == ["whole", number]
    assert signal.getsignal(number) is leave


def test_what_is_ignored_stays_ignored(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with deferred():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_an_error_inside_is_not_swallowed(handlers):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="mine"), deferred():
        int("mine")
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_are_left_alone():
    done = []

    def work():
        with deferred():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGTERM)]
