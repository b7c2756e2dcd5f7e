"""The state of a start: what is written, how it is read back, and the health check against real servers."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.base import running_servers as running_servers_module
from fixer.base.errors import TuneError
from fixer.base.locks import is_held
from fixer.base.progress import Silent
from fixer.base.running_servers import running_servers
from fixer.base.status import Phase, Share, Status, lock_path, state_path
from fixer.base.status_board import OnBoard, new_board, posted, resume_board
from fixer.base.status_reading import current_states, health, is_alive, lines, share_text, states, summary
from fixer.cli import main
from tests.support import fakes

HERE = socket.gethostname()
OLD, NEW = "2026-01-01T00:00:00Z", "2099-01-01T00:00:00Z"


@pytest.fixture(autouse=True)
def looks_like_moefix(monkeypatch):
    """The tests' own process counts as one of moefix's."""
    monkeypatch.setattr("fixer.base.status_reading.is_alive", lambda pid: pid == os.getpid() or is_alive(pid))


@pytest.fixture(autouse=True)
def processes(monkeypatch, tmp_path_factory):
    """A /proc with the tests' own processes only: others on this machine may run servers too."""
    folder = tmp_path_factory.mktemp("proc")
    monkeypatch.setattr("fixer.base.running_servers.PROC", folder)
    (folder / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    (folder / "self").symlink_to("/proc/self")
    return folder


def write(home, **changes):
    status = Status(**{"host": HERE, "pid": os.getpid(), "started": NEW, "updated": NEW, **changes})
    path = state_path(home, status.run)
    path.parent.mkdir(exist_ok=True)
    path.write_text(status.to_json())
    return status


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_boards_file_is_its_state(tmp_path):
    board = new_board(tmp_path)
    (found,) = states(tmp_path)
    assert (found.pid, found.host, found.phase) == (os.getpid(), HERE, Phase.STARTING)
    board.update(phase=Phase.SERVING, url="http://127.0.0.1:1", files=("a.json", "b.json"))
    assert states(tmp_path) == (board.status,)
    other = resume_board(board.path)
    other.update(verdict="SGLang picked up both files")
    (found,) = states(tmp_path)
    assert (found.verdict, found.files) == ("SGLang picked up both files", ("a.json", "b.json"))
    assert resume_board(tmp_path / "none") is None


def test_progress_is_written_now_and_then_and_changes_at_once(tmp_path):
    clock = iter(range(10**6))
    board = new_board(tmp_path, now=lambda: next(clock) * 0.1)
    writes = []
    board._write = lambda: writes.append(board.status)
    for number in range(20):
        board.update(tuning=Share(number, 20, "steps"))
    assert len(writes) == 0 or len(writes) < 20
    board.update(phase=Phase.TUNING)
    assert writes[-1].phase is Phase.TUNING
    count = len(writes)
    board._written = float("inf")
    board.update(phase=Phase.TUNING, detail="same phase")
    assert len(writes) == count


def test_progress_goes_to_the_board_and_on(tmp_path):
    board, heard = new_board(tmp_path), []

    class Listener(Silent):
        def note(self, line):
            heard.append(line)

    progress = OnBoard(Listener(), board)
    progress.note("another moefix is tuning on this volume (pid 7 on x); waiting for it")
    assert board.status.phase is Phase.WAITING
    assert "pid 7 on x" in board.status.detail
    progress.note("the other moefix is done; going on")
    assert (board.status.phase, board.status.detail) == (Phase.STARTING, "")
    progress.phase("search", 200)
    progress.advance()
    progress.advance("x", total=400)
    progress.note("a note")
    assert (board.status.phase, board.status.tuning) == (Phase.TUNING, Share(2, 400, "steps"))
    assert summary(board.status) == "tuning: 0 %, 2 of 400 steps, search"
    assert heard[-1] == "a note"


def test_the_end_is_told(tmp_path):
    with pytest.raises(TuneError), posted(new_board(tmp_path)):
        raise TuneError("it broke", "mend\nit")
    assert (states(tmp_path)[0].phase, states(tmp_path)[0].detail) == (Phase.FAILED, "it broke mend it")
    board = new_board(tmp_path)
    board.update(phase=Phase.TUNING, detail="finals")
    with pytest.raises(SystemExit), posted(board):
        raise SystemExit(143)
    assert (states(tmp_path)[0].phase, states(tmp_path)[0].detail) == (Phase.ENDED, "")
    with pytest.raises(RuntimeError), posted(new_board(tmp_path)):
        raise RuntimeError("odd")
    assert states(tmp_path)[0].detail == "RuntimeError: odd"


def test_a_folder_that_cannot_be_written_is_no_fault():
    board = new_board(os_path("/proc/nowhere"))
    board.update(phase=Phase.TUNING)
    assert states(os_path("/proc/nowhere")) == ()


def os_path(text):
    from pathlib import Path

    return Path(text)


def test_dead_processes_have_ended_and_old_ones_go(tmp_path):
    mine = write(tmp_path, phase=Phase.TUNING)
    dead = write(tmp_path, pid=ended_pid(), phase=Phase.SERVING)
    old = write(tmp_path, pid=ended_pid(), phase=Phase.SERVING, updated=OLD)
    far = write(tmp_path, host="elsewhere", pid=1, phase=Phase.SERVING)
    gone = write(tmp_path, host="elsewhere", pid=2, phase=Phase.ENDED, updated=OLD)
    found = current_states(tmp_path)
    assert [status.host for status in found] == [HERE, HERE, "elsewhere"]
    by_pid = {status.pid: status for status in found}
    assert by_pid[mine.pid].phase is Phase.TUNING
    assert (by_pid[dead.pid].phase, by_pid[dead.pid].detail) == (Phase.ENDED, "gone while serving")
    assert by_pid[1] == far
    for status in (old, gone):
        assert not state_path(tmp_path, status.run).exists()


LIVES = """
import os, sys, time
from pathlib import Path
from fixer.base.status import Phase
from fixer.base.status_board import new_board
board = new_board(Path(sys.argv[1]))
board.update(phase=Phase.SERVING)
content = board.path
content.write_text(
    content.read_text().replace(f'"{board.status.host}"', '"elsewhere"').replace(f": {os.getpid()},", ": 1,")
)
os.execv(sys.executable, [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"])
"""


def test_a_process_of_another_container_that_is_gone_has_ended(tmp_path):
    """Its lock goes over to the program that it becomes, and is the kernel's to free."""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", LIVES, str(tmp_path)], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"here\n"
        (there,) = current_states(tmp_path)
        assert (there.host, there.pid, there.phase) == ("elsewhere", 1, Phase.SERVING)
    finally:
        process.kill()
        process.wait()
    (gone,) = current_states(tmp_path)
    assert (gone.phase, gone.detail) == (Phase.ENDED, "gone while serving")
    path = state_path(tmp_path, there.run)
    assert lock_path(path).exists()
    path.write_text(replace(there, updated=OLD).to_json())
    assert current_states(tmp_path) == ()
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_cannot_be_had_leaves_it_to_the_process_id(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", none)
    board = new_board(tmp_path)
    assert board.path.exists()
    assert not lock_path(board.path).exists()
    assert [status.phase for status in current_states(tmp_path)] == [Phase.STARTING]


def test_looking_at_a_lock_does_not_keep_its_owner_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fixer.base.locks.LOCK_SECONDS", 30)
    monkeypatch.setattr("os.urandom", lambda count: b"\0" * count)
    path = lock_path(state_path(tmp_path, f"{HERE}-{os.getpid()}-00000000"))
    path.parent.mkdir()
    with path.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        timer.start()
        board = new_board(tmp_path)
        timer.join()
    assert is_held(path)
    del board
    assert is_held(path) is False
    assert is_held(tmp_path / "none") is None


def test_whose_process_it_is():
    assert not is_alive(ended_pid())
    assert not is_alive(1 << 30)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "sglang.launch_server"])
    other = subprocess.Popen(["sleep", "60"])
    try:
        assert is_alive(process.pid)
        assert not is_alive(other.pid)
    finally:
        for each in (process, other):
            each.kill()
            each.wait()


def test_shares_in_words():
    assert share_text(None) == ""
    assert share_text(Share(3, 0, "steps")) == "3 steps"
    assert share_text(Share(45, 100, "steps")) == "45 %, 45 of 100 steps"
    assert share_text(Share(5, 4, "bytes")) == "100 %"


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text()).map(
        lambda row: json.dumps(row).encode()
    )
)
def test_no_content_is_more_than_a_value_error(content):
    with pytest.raises(ValueError, match=r"."):
        Status.from_json(content)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": True},
        {"pid": 0},
        {"phase": "odd"},
        {"files": "a"},
        {"detail": "two\nlines"},
        {"tuning": {"done": -1, "total": 1, "unit": "x"}},
        {"tuning": {"done": 1}},
        {"url": 7},
        {"schema": 2},
        {"extra": 1},
    ],
)
def test_a_damaged_state_is_passed_over(tmp_path, change):
    status = write(tmp_path)
    path = state_path(tmp_path, status.run)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert states(tmp_path) == ()


# --- the health check ------------------------------------------------------------------------------------------------


@contextmanager
def server(code):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def show(process):
    """Have a process be among those that the tests see."""
    (running_servers_module.PROC / str(process.pid)).symlink_to(f"/proc/{process.pid}")


@contextmanager
def process_with(url, run="box-{}-0a"):
    """A process that looks like the server that a moefix has become: its run's id and its process id."""
    program = f'{sys.executable} -c "import time; time.sleep(60)" sglang.launch_server'
    process = subprocess.Popen(["sh", "-c", f'exec env MOEFIX_RUN="{run.format("$$")} {url}" {program}'])
    try:
        show(process)
        assert fakes.eventually(lambda: run.format(process.pid) in running_servers())
        yield process.pid, run.format(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("code", "healthy"), [(200, True), (503, False)])
def test_health_asks_the_server(tmp_path, code, healthy):
    with server(code) as url, process_with(url) as (pid, run):
        write(tmp_path, phase=Phase.SERVING, url=url, pid=pid, run=run, detail="SGLang is ready")
        write(tmp_path, pid=ended_pid(), phase=Phase.SERVING, url="http://127.0.0.1:9")
        good, text = health(tmp_path)
    assert good is healthy
    assert url in text
    assert ("SGLang is ready" in text) is not healthy


@pytest.mark.parametrize(("code", "healthy"), [(200, True), (503, False)])
def test_health_needs_no_state(tmp_path, code, healthy):
    """A data folder that is read-only, full, or another one than the health check looks into."""
    with server(code) as url, process_with(url):
        good, text = health(tmp_path / "nowhere")
    assert good is healthy
    assert url in text


def test_health_with_a_state_that_could_not_be_written_to_its_end(tmp_path):
    with server(200) as url, process_with(url) as (pid, run):
        write(tmp_path, phase=Phase.STARTING, pid=pid, run=run)
        assert health(tmp_path) == (True, f"healthy: {url}")


@pytest.mark.parametrize("phase", [Phase.TUNING, Phase.ENDED, Phase.SERVING])
def test_health_is_not_anothers_of_the_same_host_name_and_process_id(tmp_path, phase):
    """Two containers with one volume under `--network host`: both have the host's name, and both are process 1."""
    with server(200) as url, process_with(url) as (pid, run):
        write(tmp_path, phase=Phase.SERVING, url=url, pid=pid, run=run)
        write(tmp_path, phase=phase, pid=pid, run=f"{HERE}-{pid}-other", url="http://127.0.0.1:9")
        assert health(tmp_path) == (True, f"healthy: {url}")


def test_while_this_container_tunes_another_ones_server_is_not_its_health(tmp_path):
    with server(200) as url:
        write(tmp_path, phase=Phase.SERVING, url=url, run=f"{HERE}-{os.getpid()}-other")
        write(tmp_path, phase=Phase.TUNING, run=f"{HERE}-{os.getpid()}-mine", detail="search")
        assert health(tmp_path) == (False, "tuning: search")


def test_a_server_of_another_user_is_found_by_its_state(tmp_path, monkeypatch):
    def forbidden(_):
        raise PermissionError

    monkeypatch.setattr("fixer.base.running_servers.started_with", forbidden)
    with server(200) as url:
        write(tmp_path, phase=Phase.SERVING, url=url)
        assert health(tmp_path) == (True, f"healthy: {url}")


def test_a_servers_children_are_not_taken_for_it():
    with process_with("http://x") as (pid, run):
        assert running_servers()[run] == "http://x"
        child = subprocess.Popen(["sleep", "60"], env={"MOEFIX_RUN": f"{run} http://x"})
        try:
            show(child)
            assert running_servers() == {run: "http://x"}
        finally:
            child.kill()
            child.wait()
    assert pid


def test_of_several_servers_those_of_the_data_folder_count(tmp_path):
    with server(200) as good, server(503) as bad, process_with(good) as (pid, run), process_with(bad):
        assert health(tmp_path)[0] is False
        write(tmp_path, phase=Phase.SERVING, url=good, pid=pid, run=run)
        assert health(tmp_path) == (True, f"healthy: {good}")


def test_health_is_the_servers_whatever_runs_beside_it(tmp_path):
    with server(200) as url, process_with(url) as (pid, run):
        write(tmp_path, phase=Phase.SERVING, url=url, updated=OLD, pid=pid, run=run)
        write(tmp_path, phase=Phase.BENCHMARKING)
        assert health(tmp_path) == (True, f"healthy: {url}")


def test_health_without_an_answer(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with process_with(url) as (pid, run):
            write(tmp_path, phase=Phase.SERVING, detail="SGLang is starting", url=url, pid=pid, run=run)
            good, text = health(tmp_path, 0.2)
    assert not good
    assert "SGLang is starting" in text
    assert "does not answer" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"phase": Phase.TUNING, "tuning": Share(45, 100, "steps")}, "tuning: 45 %"),
        ({"phase": Phase.DOWNLOADING, "download": Share(1, 4, "bytes")}, "downloading: 25 %"),
        ({"phase": Phase.FAILED, "detail": "no card"}, "failed: no card"),
        ({"host": "elsewhere"}, "no server of moefix runs here"),
    ],
)
def test_health_of_what_does_not_serve(tmp_path, changes, words):
    write(tmp_path, **changes)
    good, text = health(tmp_path)
    assert not good
    assert words in text


def test_a_restart_shows_one_ended_run_and_two_hosts_share_no_file(tmp_path):
    for _ in range(5):
        board = new_board(tmp_path)
        board.update(phase=Phase.ENDED)
        del board
    assert len(states(tmp_path)) == 1
    one, other = new_board(tmp_path), new_board(tmp_path)  # the same host name and process id, both alive
    assert one.path != other.path
    assert len(current_states(tmp_path)) == 2


def test_a_state_of_an_earlier_version_is_read(tmp_path):
    row = json.loads(Status(HERE, 77, NEW, NEW).to_json())
    del row["run"]
    assert Status.from_json(json.dumps(row).encode()).run == f"{HERE}-77"


# --- the command -----------------------------------------------------------------------------------------------------


def run(*words):
    return click.testing.CliRunner().invoke(main, ["status", *map(str, words)])


def test_the_command(tmp_path):
    assert "no moefix has run" in run("--home", tmp_path).output
    files = ("E=1.json", "E=1_down.json")
    serving = write(
        tmp_path, phase=Phase.SERVING, detail="ready", model="m", revision="abc", files=files, verdict="both"
    )
    write(tmp_path, host="elsewhere", pid=2, phase=Phase.ENDED)
    result = run("--home", tmp_path)
    assert result.exit_code == 0
    for text in lines(serving):
        assert text in result.output
    assert "file     E=1_down.json" in result.output
    assert "model    m at abc" in result.output
    parsed = json.loads(run("--home", tmp_path, "--json").output)
    assert [row["phase"] for row in parsed] == ["serving", "ended"]
    assert parsed[0]["verdict"] == "both"


def test_the_commands_health_check(tmp_path):
    result = run("--home", tmp_path, "--healthcheck")
    assert (result.exit_code, result.output) == (
        1,
        "no server of moefix runs here, and no moefix with this data folder\n",
    )
    with server(200) as url, process_with(url):
        assert run("--home", tmp_path, "--healthcheck").exit_code == 0
    assert not (tmp_path / "new").exists()
    run("--home", tmp_path / "new", "--healthcheck")
    assert not (tmp_path / "new").exists()  # asking makes nothing


def test_the_health_check_imports_little():
    program = (
        "import sys\nfrom fixer.commands import status\nfrom fixer import cli\n"
        "heavy = {'torch', 'triton', 'huggingface_hub', 'rich', 'matplotlib', 'docker', 'httpx'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
