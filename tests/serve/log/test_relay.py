"""The relay with real processes: nothing lost, nothing changed, and no harm to the server, whatever is killed when."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.base import status_board as status
from fixer.serve.asked import Asked, Question
from fixer.serve.log.settings import Settings
from fixer.serve.log.stream import LINE_CAP, Stream
from fixer.serve.log.verdict import Expected
from tests.support import fakes
from tests.support.log_lines import DOWN, EXPECTED, OTHER, OTHER_DOWN, READY, STAMP, UP, missing, using

QUIET = Settings(Expected(asks=False))
"""Says nothing by itself."""

STARTER = """
import os, sys
from fixer.serve.log.settings import Settings; from fixer.serve.log.start_relay import start_relay
assert start_relay(Settings.from_json(sys.argv[1])), "no relay"
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], *sys.argv[3:]])
"""
SAY = "import os, sys\nfor text in sys.argv[1:]:\n    os.write(2, text.encode() + b'\\n')\n"


class Server:
    """A stand-in that runs behind a relay."""

    def __init__(self, program: str, *words: str, settings: Settings = QUIET, **options) -> None:
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-c", STARTER, settings.to_json(), program, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        self.process = subprocess.Popen(command, env={**os.environ, "RELAY_TEST": self.mark}, **pipes)

    @property
    def pair(self) -> tuple[int, int] | None:
        """(active, standby), None while they are not both there."""
        found = {
            pid for pid in fakes.processes_with("RELAY_TEST", self.mark) if b"relay import main;" in command_of(pid)
        }
        children = {pid: parent_of(pid) for pid in found}
        standbys = [pid for pid, parent in children.items() if parent in found]
        return (children[standbys[0]], standbys[0]) if len(found) == 2 and len(standbys) == 1 else None

    def gone(self) -> bool:
        return fakes.processes_with("RELAY_TEST", self.mark) == set()

    def communicate(self, seconds: float = 60) -> tuple[bytes, bytes]:
        out, err = self.process.communicate(timeout=seconds)
        return out, err


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


# --- unchanged -------------------------------------------------------------------------------------------------------


def test_both_streams_code_and_process_id():
    server = Server("import os, sys; print('out', os.getpid()); print('err', file=sys.stderr); sys.exit(41)")
    out, err = server.communicate()
    assert out == f"out {server.process.pid}\n".encode()
    assert err == b"err\n"
    assert server.process.returncode == 41
    assert fakes.eventually(server.gone)


def test_the_last_words_before_a_hard_end_arrive():
    program = "import os; os.write(1, b'x' * 5000 + b'last\\n'); os.write(2, b'last too'); os._exit(3)"
    for _ in range(5):
        server = Server(program)
        assert server.communicate() == (b"x" * 5000 + b"last\n", b"last too")
        assert server.process.returncode == 3


def test_one_file_for_both_keeps_the_order(tmp_path):
    program = "import os\nfor n in range(300):\n    os.write(1 + n % 2, b'%d\\n' % n)\n"
    server = Server(program, stderr=subprocess.STDOUT)
    out, _ = server.communicate()
    assert out.split() == [b"%d" % number for number in range(300)]
    with (tmp_path / "log").open("wb") as log:
        Server(program, stdout=log, stderr=log).process.wait(60)
    assert fakes.eventually(lambda: (tmp_path / "log").read_bytes() == out)


def test_any_bytes_come_through():
    program = """
import os, sys
data = open(sys.argv[1], "rb").read()
while data:
    data = data[os.write(1, data[:65536]):]
"""
    source = Path(f"/tmp/moefix-relay-{uuid.uuid4().hex}")
    try:
        for seed in range(3):
            maker = random.Random(seed)
            pieces = [maker.randbytes(maker.choice([1, 100, 70000])) for _ in range(50)]
            pieces += [b"\r" * 1000, b"\0" * 10, b"MoE" * 50000, b"server_args=" + b"y" * (3 * LINE_CAP) + b"\n"]
            maker.shuffle(pieces)
            source.write_bytes(b"".join(pieces))
            out, err = Server(program, str(source)).communicate()
            assert out == source.read_bytes()
            assert err == b""
    finally:
        source.unlink()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=300) | st.sampled_from([b"\n", b"\r\n", b"x" * 9000]), max_size=30))
def test_a_stream_passes_on_what_it_gets(pieces):
    source, target = os.pipe(), os.pipe()
    reader = os.fdopen(target[0], "rb")
    try:
        stream, lines, got = Stream(source[0], target[1]), [], b""
        os.set_blocking(target[0], False)
        for piece in pieces:
            if piece:
                os.write(source[1], piece)
                data = stream.read()
                assert data == piece
                stream.put(data)
                lines += stream.lines(data)
                got += reader.read() or b""
        assert not stream.pending
        whole = b"".join(pieces)
        assert got == whole
        assert lines == whole.split(b"\n")[:-1]
        assert stream.line_open == (bool(whole) and not whole.endswith(b"\n"))
    finally:
        reader.close()
        for end in (source[0], source[1], target[1]):
            os.close(end)


def test_a_line_without_end_does_not_fill_memory():
    program = "import os, time\nfor _ in range(400):\n    os.write(1, b'x' * 262144)\ntime.sleep(30)"
    with open(os.devnull, "wb") as nowhere:
        server = Server(program, stdout=nowhere)
        assert fakes.eventually(lambda: server.pair is not None, 30)
        time.sleep(1)
        sizes = [rss(pid) for pid in server.pair]
        server.process.kill()
        server.communicate()
    assert max(sizes) < 24_000_000, sizes


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_it_is_no_bottleneck():
    """An SGLang at work writes some kB a second; 10 MB/s leave room on a machine that is busy with other tests."""
    program = """
import os, time
line = b"[2026-11-24 07:00:00 TP0] Decode batch, #running-req: 16, #token: 18342, cuda graph: True\\n" * 600
began, count = time.monotonic(), 0
while count < 100_000_000:
    count += os.write(1, line)
os.write(2, b"%f" % (count / (time.monotonic() - began)))
"""
    with open(os.devnull, "wb") as nowhere:
        server = Server(program, stdout=nowhere)
        _, err = server.communicate(120)
    print(f"[relay: {float(err) / 1e6:.0f} MB/s]", end=" ")
    assert float(err) > 10e6


# --- signals and readers ---------------------------------------------------------------------------------------------

WAIT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), sys.exit(17)))
print("waiting", flush=True)
time.sleep(60)
"""


def test_signals_are_the_servers_own():
    server = Server(WAIT)
    assert server.process.stdout.readline() == b"waiting\n"
    server.process.send_signal(signal.SIGTERM)
    assert server.communicate()[0] == b"drained\n"
    assert server.process.returncode == 17


def test_a_signal_to_the_whole_group_leaves_the_relay_alone():
    server = Server(WAIT, start_new_session=True)
    assert server.process.stdout.readline() == b"waiting\n"
    assert fakes.eventually(lambda: server.pair is not None)
    os.killpg(server.process.pid, signal.SIGTERM)
    for pid in server.pair or ():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    assert server.communicate()[0] == b"drained\n"
    assert fakes.eventually(server.gone)


def test_a_reader_that_is_gone_does_not_stop_the_server():
    program = """
import os, sys
for _ in range(500):
    os.write(1, b"x" * 10000)
os.write(2, b"done\\n")
sys.exit(5)
"""
    server = Server(program)
    server.process.stdout.read(10)
    server.process.stdout.close()
    assert server.process.stderr.read() == b"done\n"
    assert server.process.wait(60) == 5
    assert fakes.eventually(server.gone)


def test_a_slow_reader_of_one_stream_does_not_hold_up_the_other():
    program = "import os\nos.write(1, b'x' * 900000)\nos.write(2, b'first\\n')\nos.write(1, b'end')\n"
    server = Server(program)
    assert server.process.stderr.readline() == b"first\n"  # though nobody has read standard output yet
    assert server.process.stdout.read() == b"x" * 900000 + b"end"
    assert server.process.wait(60) == 0


# --- killed relays ---------------------------------------------------------------------------------------------------

COUNT = """
import os, sys, time
for number in range(int(sys.argv[1])):
    os.write(1 + number % 2, b"%07d\\n" % number)
    time.sleep(0.0005)
sys.exit(23)
"""


class Kept(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, pipe) -> None:
        super().__init__(daemon=True)
        self.pipe, self.data = pipe, b""
        self.start()

    def run(self) -> None:
        while piece := os.read(self.pipe.fileno(), 65536):
            self.data += piece


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(seed):
    """Twenty kills of the active one, the standby, or now one and then the other, while lines come all the time."""
    chance, count = random.Random(seed), 6000
    server = Server(COUNT, str(count))
    out, err = Kept(server.process.stdout), Kept(server.process.stderr)
    kills = 0
    assert fakes.eventually(lambda: out.data, 30)
    while server.process.poll() is None:
        time.sleep(chance.uniform(0.0, 0.15))
        pair = server.pair
        if pair is not None and kills < 20:
            os.kill(chance.choice(pair), signal.SIGKILL)
            kills += 1
    assert server.process.returncode == 23  # no broken pipe, no wait without end
    out.join(20)
    err.join(20)
    seen = sorted(int(word) for word in (out.data + b"\n" + err.data).split() if len(word) == 7)
    assert kills >= 10
    assert count - len(seen) <= 3 * kills  # what was in hand: at this pace a line or two
    assert seen[-1] >= count - 4
    assert out.data == b"".join(sorted(out.data.splitlines(keepends=True)))  # in order, nothing twice
    assert len(set(seen)) == len(seen)
    assert fakes.eventually(server.gone)


def test_what_was_said_is_not_said_again_after_a_take_over():
    program = SAY + "print('on', flush=True)\nsys.stdin.readline()\nos.write(2, sys.argv[1].encode() + b'\\nend\\n')\n"
    server = Server(program, using(UP), using(DOWN), settings=Settings(EXPECTED), stdin=subprocess.PIPE)
    err = Kept(server.process.stderr)
    assert fakes.eventually(lambda: b"picked up both" in err.data and server.pair, 20)
    before = server.pair
    os.kill(before[0], signal.SIGKILL)
    assert fakes.eventually(lambda: server.pair not in (None, before), 20)
    server.process.stdin.write(b"\n")
    server.process.stdin.close()
    err.join(20)
    assert err.data.count(b"moefix:") == 1
    assert err.data.endswith(b"end\n")


def test_a_verdict_takes_lines_from_before_and_after_a_take_over():
    program = SAY.replace("sys.argv[1:]", "sys.argv[1:2]") + "sys.stdin.readline()\nos.write(2, sys.argv[2].encode())\n"
    expected = Expected(pairs=EXPECTED.pairs, names=EXPECTED.names)
    server = Server(program, using(UP), using(DOWN) + "\n", settings=Settings(expected), stdin=subprocess.PIPE)
    err = Kept(server.process.stderr)
    assert fakes.eventually(lambda: UP.encode() in err.data, 20)
    time.sleep(0.2)
    assert fakes.eventually(lambda: server.pair, 20)
    before = server.pair
    os.kill(before[0], signal.SIGKILL)
    assert fakes.eventually(lambda: server.pair not in (None, before), 20)
    server.process.stdin.close()
    err.join(20)
    assert b"moefix: SGLang picked up both files" in err.data


# --- reading along ---------------------------------------------------------------------------------------------------


def said(err: bytes) -> list[str]:
    return [line for line in err.decode().splitlines() if line.startswith("moefix: ")]


def test_the_verdict_comes_between_two_lines():
    program = "import os, time\nos.write(2, b'{}\\n{}\\n')\nos.write(2, b'10%')\ntime.sleep(1)\nos.write(2, b' 20%\\n')"
    lines = [STAMP + using(UP), STAMP + using(DOWN)]
    _, err = Server(program.format(*lines), settings=Settings(EXPECTED)).communicate()
    verdict = f"moefix: SGLang picked up both files: {UP} and {DOWN}\n"
    assert err.decode().replace("10%\n" + verdict, verdict + "10%") == "\n".join(lines) + "\n" + verdict + "10% 20%\n"


def test_several_ranks_one_verdict():
    texts = [f"[2026-11-23 23:48:52 TP{rank}] {text}" for text in (using(UP), using(DOWN)) for rank in range(8)]
    out, err = Server(SAY, *texts, READY, settings=Settings(EXPECTED)).communicate()
    assert said(err) == [f"moefix: SGLang picked up both files: {UP} and {DOWN}"]
    assert err.decode().replace(said(err)[0] + "\n", "") == "\n".join([*texts, READY]) + "\n"
    assert out == b""


def test_a_line_in_pieces_is_read():
    program = """
import os, sys, time
for text in sys.argv[1:]:
    for start in range(0, len(text), 7):
        os.write(1, text[start:start + 7].encode())
        time.sleep(0.002)
    os.write(1, b"\\n")
"""
    out, err = Server(program, using(UP), " 50%|##  |\r" + using(DOWN), settings=Settings(EXPECTED)).communicate()
    assert "picked up both" in said(err)[0]
    assert out.endswith(DOWN.encode() + b".\n")


def test_another_file_is_kept_for_the_next_start_and_the_board_knows(tmp_path):
    board = status.new_board(tmp_path)
    question = Question("m", "c", "X", "0.5.17", "")
    record = tmp_path / "asked" / "m.json"
    settings = Settings(
        EXPECTED, state=str(board.path), record=str(record), question={**question.__dict__}, card="X", quiet=True
    )
    program = SAY + "import time; time.sleep(4)\n"
    server = Server(program, missing(OTHER), missing(OTHER_DOWN), READY, settings=settings)
    assert fakes.eventually(record.exists, 20)
    asked = Asked.from_json(record.read_bytes())
    assert (asked.question, asked.gate_up, asked.down, asked.source) == (question, OTHER, OTHER_DOWN, "log")

    def state() -> status.Status:
        return status.Status.from_json(board.path.read_bytes())

    assert fakes.eventually(lambda: "another file" in state().verdict, 20)
    assert fakes.eventually(lambda: state().detail == "SGLang is ready", 20)
    assert state().phase is status.Phase.STARTING
    _, err = server.communicate()
    assert len(said(err)) == 1
    assert fakes.eventually(lambda: state().phase is status.Phase.ENDED, 20)


def test_a_data_folder_that_cannot_be_written_harms_nobody(tmp_path):
    settings = Settings(EXPECTED, state="/proc/nowhere/x.json", record="/proc/nowhere/y.json", question={"model": "m"})
    _, err = Server(SAY, missing(OTHER), "end", settings=settings).communicate()
    assert "another file" in said(err)[0]
    assert "Traceback" not in err.decode()


def test_an_error_is_explained_after_its_line():
    frame = "    fused_moe_kernel[grid]("
    error = "OutOfResources: out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing"
    _, err = Server(SAY, frame, error, frame, error, settings=Settings(Expected(asks=False), card="RTX")).communicate()
    line, _ = said(err)
    assert "147456 bytes" in line
    assert "RTX has 101376" in line
    assert err.decode().count("A MoE file cures that") == 1


# --- on a terminal ---------------------------------------------------------------------------------------------------


def test_on_a_terminal():
    """One pipe for both, every byte and the exit code; the terminal turns line ends into its own."""
    program = "import os, sys; os.write(1, b'one\\n'); os.write(2, b'two\\n'); sys.exit(9)"
    leader, follower = os.openpty()
    server = Server(program, stdout=follower, stderr=follower)
    os.close(follower)
    assert server.process.wait(60) == 9
    got = b""
    with contextlib.suppress(OSError):  # EIO once nobody has the terminal open any more
        while piece := os.read(leader, 1024):
            got += piece
    os.close(leader)
    assert got == b"one\r\ntwo\r\n"


# --- where there can be no relay -------------------------------------------------------------------------------------


def test_closed_outputs_mean_no_relay():
    program = (
        "from fixer.serve.log.settings import Settings\nfrom fixer.serve.log.start_relay import start_relay\n"
        "import os\nprint(start_relay(Settings()), file=open(os.environ['R'], 'w'))"
    )
    for closing in ("2>&-", ">&-", ">&- 2>&-"):
        result = Path(f"/tmp/moefix-relay-{uuid.uuid4().hex}")
        command = ["sh", "-c", f'exec "{sys.executable}" -c "$1" {closing}', "sh", program]
        subprocess.run(command, env={**os.environ, "R": str(result)}, check=False, timeout=60)
        assert result.read_text() == "False\n"
        result.unlink()


def test_a_relay_that_cannot_start_changes_nothing(tmp_path):
    program = """
import sys
from fixer import relay
relay._BOOT = "raise SystemExit"
print(relay.start_relay(relay.Settings()), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_settings_survive_the_pipe():
    settings = Settings(EXPECTED, "card", True, "/a", "/b", {"model": "m"})
    assert Settings.from_json(json.dumps(json.loads(settings.to_json()))) == settings
