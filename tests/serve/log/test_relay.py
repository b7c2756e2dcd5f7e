"""The relay with real processes: nothing lost, nothing changed, and no harm to the server, whatever goes wrong."""

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
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.base import status_board as status
from fixer.serve.asked import Asked, Question
from fixer.serve.log.read_log import LINE_CAP
from fixer.serve.log.settings import Settings
from fixer.serve.log.stream import Stream
from fixer.serve.log.verdict import Expected
from fixer.serve.possible_names import Limits
from tests.support import fakes
from tests.support.log_lines import DOWN, EXPECTED, OTHER, OTHER_DOWN, READY, STAMP, UP, missing, using

QUIET = Settings(Expected(asks=False))
"""Says nothing by itself."""

STARTER = """
import os, sys
from fixer.serve.log.settings import Settings; from fixer.serve.log.start_relay import start_relay
names = start_relay.__globals__
names["_BOOT"] = names["_BOOT"].replace("; from fixer", "\\n" + os.environ.get("RELAY_BOOT", "") + "\\nfrom fixer")
assert start_relay(Settings.from_json(sys.argv[1])), "no relay"
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], *sys.argv[3:]])
"""
SAY = "import os, sys\nfor text in sys.argv[1:]:\n    os.write(2, text.encode() + b'\\n')\n"


class Server:
    """A stand-in that runs behind a relay."""

    def __init__(self, program: str, *words: str, settings: Settings = QUIET, boot: str = "", **options) -> None:
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-c", STARTER, settings.to_json(), program, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        environment = {**os.environ, "RELAY_TEST": self.mark, "RELAY_BOOT": boot}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def processes(self) -> dict[int, int]:
        """The relay's processes and their parents."""
        found = {
            pid for pid in fakes.processes_with("RELAY_TEST", self.mark) if b"relay import main;" in command_of(pid)
        }
        return {pid: parent_of(pid) for pid in found}

    @property
    def reader(self) -> int:
        """The process that reads along, 0 while there is none."""
        processes = self.processes()
        return next((pid for pid, parent in processes.items() if parent in processes), 0)

    @property
    def relay(self) -> int:
        """The process that passes bytes on."""
        assert fakes.eventually(lambda: self.reader)
        return self.processes()[self.reader]

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
        stream, got = Stream(source[0], target[1]), b""
        os.set_blocking(target[0], False)
        for piece in filter(None, pieces):
            os.write(source[1], piece)
            data = stream.read()
            assert data == piece
            stream.put(data)
            got += reader.read() or b""
        whole = b"".join(pieces)
        assert got == whole
        assert stream.line_open == (bool(whole) and not whole.endswith(b"\n"))
    finally:
        reader.close()
        for end in (source[0], source[1], target[1]):
            os.close(end)


def test_a_line_without_end_does_not_fill_memory():
    program = "import os, time\nfor _ in range(400):\n    os.write(1, b'x' * 262144)\ntime.sleep(30)"
    with open(os.devnull, "wb") as nowhere:
        server = Server(program, stdout=nowhere)
        assert fakes.eventually(lambda: server.reader, 30)
        time.sleep(1)
        sizes = [rss(pid) for pid in server.processes()]
        server.process.kill()
        server.communicate()
    assert max(sizes) < 24_000_000, sizes


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize(("word", "least"), [(b"", 100e6), (b"Error", 30e6), (b"MoE", 30e6)])
def test_it_is_no_bottleneck(word, least):
    """The output in a pipe with a fast reader, as in Docker; lines of 160 bytes.

    Where more processes want to run than there are cores, only a share is to be had, and less counts accordingly.
    """
    program = """
import os, sys, time
line = b"[2026-11-24 07:00:00 TP0] %s, #running-req: 16, cuda graph: True" % sys.argv[1].encode()
lines = (line.ljust(159) + b"\\n") * 400
began, count = time.monotonic(), 0
while count < 200_000_000:
    count += os.write(1, lines)
os.write(2, b"%d %f" % (count, count / (time.monotonic() - began)))
"""

    share = min(1.0, (os.cpu_count() or 1) / max(os.getloadavg()[0], 1.0))
    best = 0.0
    for _ in range(3):
        process = Server(program, word.decode()).process
        counter = subprocess.Popen(["wc", "-c"], stdin=process.stdout, stdout=subprocess.PIPE)
        process.stdout.close()
        count, speed = process.stderr.read().split()
        process.wait(60)
        assert int(counter.communicate()[0]) == int(count)
        best = max(best, float(speed))
        if best >= least * share:
            break
    print(f"[relay: {best / 1e6:.0f} MB/s, share of the processor {share:.2f}]", end=" ")
    assert best >= least * share


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
    assert fakes.eventually(lambda: server.reader)
    os.killpg(server.process.pid, signal.SIGTERM)
    for pid in server.processes():
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


# --- one process is ended ------------------------------------------------------------------------------------------

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


def test_a_relay_that_is_killed_is_a_broken_pipe_and_not_a_wait_without_end():
    program = """
import os, sys, time
try:
    for _ in range(60000):
        os.write(1, b"x" * 100)
        time.sleep(0.001)
except BrokenPipeError:
    os._exit(19)
"""
    server = Server(program)
    assert server.process.stdout.read(100)
    os.kill(server.relay, signal.SIGKILL)
    assert server.process.wait(20) == 19
    assert fakes.eventually(server.gone)


def test_a_reader_that_is_killed_is_said_once_and_loses_no_byte():
    server = Server(COUNT, "3000")
    out, err = Kept(server.process.stdout), Kept(server.process.stderr)
    assert fakes.eventually(lambda: out.data and server.reader, 30)
    os.kill(server.reader, signal.SIGKILL)
    assert server.process.wait(60) == 23
    out.join(20)
    err.join(20)
    (words,) = said(err.data)
    assert "reading along in SGLang's log has stopped (ended by signal 9)" in words
    rest = err.data.replace(words.encode() + b"\n", b"")
    assert sorted(int(word) for word in (out.data + rest).split()) == list(range(3000))
    assert fakes.eventually(server.gone)


def test_a_reader_that_takes_nothing_is_given_up():
    program = "import os, time\nwhile True:\n    os.write(2, b'x' * 9999 + b'\\n')\n    time.sleep(0.001)\n"
    server = Server(program, boot="import fixer.serve.log.relay as relay\nrelay.STUCK_SECONDS = 0.5")
    err = Kept(server.process.stderr)
    assert fakes.eventually(lambda: server.reader, 20)
    os.kill(server.reader, signal.SIGSTOP)
    assert fakes.eventually(lambda: b"has stopped (it took nothing any more)" in err.data, 30)
    count = len(err.data)
    assert fakes.eventually(lambda: len(err.data) > count + 1_000_000, 30)
    server.process.kill()
    err.join(20)
    assert len(said(err.data)) == 1
    assert fakes.eventually(server.gone)


# --- whatever goes wrong while lines are read ------------------------------------------------------------------------

MODULES = """
import fixer.serve.log.read_log as read_log
import fixer.serve.log.diagnose as diagnose
import fixer.sglang.log_lines as sglang_log
import fixer.serve.log.verdict as verdict
"""
SABOTAGE = {
    "raises": ("def bad(*_, **__):\n    raise ValueError('embedded null byte')", "ValueError: embedded null byte"),
    "hangs": ("def bad(*_, **__):\n    while True: pass", "it hung"),
    "sleeps": ("def bad(*_, **__):\n    import time; time.sleep(1000)", "it hung"),
    "grows": ("def bad(*_, **__):\n    hoard = [b'x' * 1000 for _ in range(10**7)]", "MemoryError"),
    "exits": ("def bad(*_, **__):\n    import os; os._exit(3)", "it ended"),
    "overflows": ("def bad(*_, **__):\n    bad()", "RecursionError"),
}


PLACES = ("sglang_log.own_message", "diagnose.find", "verdict.judge")


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *(("raises", place) for place in PLACES),
        *((kind, "read_log.Lines.take") for kind in SABOTAGE),
    ],
)
def test_what_goes_wrong_there_is_said_once_and_the_bytes_go_on(kind, place):
    sabotage, words = SABOTAGE[kind]
    boot = f"{MODULES}\nread_log.STEP_SECONDS = 1\n{sabotage}\n{place} = bad"
    lines = [STAMP + using(UP), "RuntimeError: CUDA out of memory", STAMP + READY]
    program = SAY + "sys.stdin.readline()\nfor n in range(9000):\n    os.write(2, b'%01000d\\n' % n)\n"
    server = Server(program, *lines, settings=Settings(EXPECTED), boot=boot, stdin=subprocess.PIPE)
    err = Kept(server.process.stderr)
    assert fakes.eventually(lambda: b"has stopped" in err.data, 30)
    server.process.stdin.close()
    err.join(60)
    (line,) = said(err.data)
    assert f"has stopped ({words}" in line
    rest = err.data.decode().replace(line + "\n", "")
    assert rest == "".join(f"{text}\n" for text in lines) + "".join(f"{number:01000d}\n" for number in range(9000))
    assert server.process.wait(60) == 0
    assert fakes.eventually(server.gone)


@pytest.mark.parametrize(
    "line",
    [
        STAMP.encode() + b"Using MoE kernel config from /a\0b/c.json.",
        STAMP.encode() + b"Using MoE kernel config from /a\xff\xfe/E=1,N=1,device_name=X.json.",
        STAMP.encode() + b"Using MoE kernel config from /" + b"../" * 1300 + b"x.json.",
        b"MoE" * 300_000,
        STAMP.encode() + b"Error " * 300_000,
        b"Error: " + b"\0" * 100_000,
        b"[2026-11-23 23:48:52" + b" TP0" * 10_000 + b"] Using MoE",
        b" 50%|" * 10_000 + b"MoE",
        b"\x1b]0;Error\x07" * 1000,
    ],
)
def test_no_line_hurts(line):
    """Each line, some thousand others, and the verdict still comes."""
    program = """
import os, sys
line = open(sys.argv[1], "rb").read()
for data in (line, b"\\n", b"some other words\\n" * 300000, *(text.encode() + b"\\n" for text in sys.argv[2:])):
    while data:
        data = data[os.write(2, data):]
"""
    source = Path(f"/tmp/moefix-relay-{uuid.uuid4().hex}")
    try:
        source.write_bytes(line)
        words = [STAMP + using(UP), STAMP + using(DOWN), STAMP + READY]
        expected = replace(EXPECTED, limits=Limits(("/s/configs",)))
        _, err = Server(program, str(source), *words, settings=Settings(expected)).communicate()
    finally:
        source.unlink()
    (verdict,) = said(err)
    assert "picked up both" in verdict or "came faster" in verdict
    rest = err.replace(b"\n" + verdict.encode() + b"\n", b"\n")
    assert rest == line + b"\n" + b"some other words\n" * 300000 + "\n".join(words).encode() + b"\n"


def test_a_flood_is_no_ground_for_a_verdict():
    """What was dropped may have had the line that counts."""
    program = (
        SAY + "for _ in range(1000):\n    os.write(2, b'An Error, they say: MoE\\n' * 2000)\nos.write(2, b'%s\\n')"
    )
    _, err = Server(program % (STAMP + READY), settings=Settings(EXPECTED)).communicate()
    assert all("never looked" not in line for line in said(err))


@pytest.mark.parametrize(
    "before", ["", "[2026-11-24 07:00:00] Receive: obj=GenerateReqInput(text='", "Model: ", '{"text": "']
)
def test_a_line_that_the_model_wrote_is_not_sglangs(before):
    """Without SGLang's prefix at its beginning no line counts, and within a line of the request log nothing does."""
    error = "OutOfResources: out of resource: shared memory, Required: 147456, Hardware limit: 101376"
    texts = [before + using(UP), before + STAMP + using(DOWN) if before else using(DOWN), before + missing(OTHER)]
    texts += [before + error] if before.startswith("[") else []
    _, err = Server(SAY, *texts, STAMP + READY, settings=Settings(EXPECTED, card="X")).communicate()
    (line,) = said(err)
    assert "never looked for a MoE file" in line


# --- reading along ---------------------------------------------------------------------------------------------------


def said(err: bytes) -> list[str]:
    return [line for line in err.decode("utf-8", "replace").split("\n") if line.startswith("moefix: ")]


def test_the_verdict_comes_between_two_lines():
    program = "import os, time\nos.write(2, b'{}\\n{}\\n')\nos.write(2, b'10%')\ntime.sleep(1)\nos.write(2, b' 20%\\n')"
    lines = [STAMP + using(UP), STAMP + using(DOWN)]
    _, err = Server(program.format(*lines), settings=Settings(EXPECTED)).communicate()
    verdict = f"moefix: SGLang picked up both files: {UP} and {DOWN}\n"
    assert err.decode().replace("10%\n" + verdict, verdict + "10%") == "\n".join(lines) + "\n" + verdict + "10% 20%\n"


def test_several_ranks_one_verdict():
    texts = [f"[2026-11-23 23:48:52 TP{rank}] {text}" for text in (using(UP), using(DOWN)) for rank in range(8)]
    out, err = Server(SAY, *texts, STAMP + READY, settings=Settings(EXPECTED)).communicate()
    assert said(err) == [f"moefix: SGLang picked up both files: {UP} and {DOWN}"]
    assert err.decode().replace(said(err)[0] + "\n", "") == "\n".join([*texts, STAMP + READY]) + "\n"
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
    out, err = Server(
        program, STAMP + using(UP), " 50%|##  |\r" + STAMP + using(DOWN), settings=Settings(EXPECTED)
    ).communicate()
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
    server = Server(
        program, *(STAMP + text for text in (missing(OTHER), missing(OTHER_DOWN), READY)), settings=settings
    )
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
    _, err = Server(SAY, STAMP + missing(OTHER), "end", settings=settings).communicate()
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
    program = """
import os
from fixer.serve.log.settings import Settings; from fixer.serve.log.start_relay import start_relay
print(start_relay(Settings()), file=open(os.environ["R"], "w"))
"""
    for closing in ("2>&-", ">&-", ">&- 2>&-"):
        result = Path(f"/tmp/moefix-relay-{uuid.uuid4().hex}")
        command = ["sh", "-c", f'exec "{sys.executable}" -c "$1" {closing}', "sh", program]
        subprocess.run(command, env={**os.environ, "R": str(result)}, check=False, timeout=60)
        assert result.read_text() == "False\n"
        result.unlink()


def test_a_relay_that_cannot_start_changes_nothing(tmp_path):
    program = """
from fixer.serve.log.settings import Settings; from fixer.serve.log.start_relay import start_relay
start_relay.__globals__["_BOOT"] = "raise SystemExit"
print(start_relay(Settings()), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_settings_survive_the_pipe():
    settings = Settings(EXPECTED, "card", True, "/a", "/b", {"model": "m"})
    assert Settings.from_json(json.dumps(json.loads(settings.to_json()))) == settings
