from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest

from fixer.machine.signals import ALARM, deferred, settle_child, starting


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, ALARM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, ALARM])
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


def test_what_a_user_sent_comes_before_the_alarm(handlers):
    def leave(number, frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, ALARM):
        signal.signal(number, leave)

    def work():
        with deferred():
            os.kill(os.getpid(), ALARM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == 128 + signal.SIGTERM


def test_the_alarm_is_not_lost_where_a_users_signal_is_ignored(handlers):
    seen = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(ALARM, lambda number, _: seen.append(number))
    with deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), ALARM)
        assert not seen
    assert seen == [ALARM]


def masked() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, set())


def tell_mask(pipe):
    at_birth = masked()
    settle_child()
    pipe.send((at_birth, masked(), signal.getsignal(signal.SIGINT), os.getsid(0) == os.getpid()))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_is_born_deaf_to_ctrl_c_and_settles(handlers, method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=tell_mask, args=(theirs,), daemon=True)
    with starting():
        process.start()
    assert signal.SIGINT not in masked()
    assert ours.poll(60)
    at_birth, settled, handler, leads = ours.recv()
    process.join(60)
    assert signal.SIGINT in at_birth
    assert signal.SIGINT not in settled
    assert handler is signal.SIG_IGN
    assert leads


def test_ctrl_c_during_a_start_comes_after_it(handlers):
    seen = []
    signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    with starting():
        os.kill(os.getpid(), signal.SIGINT)
        assert not seen
    assert seen == [signal.SIGINT]


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
