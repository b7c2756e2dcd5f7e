"""What the Docker Engine says, in moefix's words. The engine itself: tests/docker/test_bake.py."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fixer.base.errors import DockerError
from fixer.base.progress import Silent
from fixer.image.docker_engine import ContainerRun, Engine, _cut, _error, _Lines

ROOT = Path(__file__).resolve().parents[2]


# The texts are engines' own: 20.10, 24, 27 and 28, and the SDK's.
@pytest.mark.parametrize(
    ("said", "meaning", "hint"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "no NVIDIA runtime", "Container Toolkit"),
        (
            "failed to set up container: CDI device injection failed: no known GPU vendor found",
            "no NVIDIA runtime",
            "--for",
        ),
        (
            "OCI runtime create failed: ... nvidia-container-cli: initialization error: nvml error: driver not loaded",
            "does not get at the card",
            "nvidia-smi",
        ),
        ("write /opt/x: no space left on device", "no space left", "docker system prune"),
        (
            "Error while fetching server API version: ('Connection aborted.', PermissionError(13, 'Permission den'))",
            "may not talk to Docker",
            "group docker",
        ),
        (
            "Error while fetching server API version: ('Connection aborted.', FileNotFoundError(2, 'No such file'))",
            "no Docker Engine answers",
            "systemctl start docker",
        ),
        ("HTTPConnectionPool(host='10.0.0.1', port=2375): Read timed out.", "no Docker Engine answers", "DOCKER_HOST"),
        (
            "pull access denied for me/x, repository does not exist or may require 'docker login'",
            "no such image",
            "docker login",
        ),
        (
            'invalid mount config for type "bind": bind source path does not exist: /models/x',
            "not on the machine where Docker runs",
            "same path",
        ),
    ],
)
def test_what_the_engine_says_is_told_with_the_next_step(said, meaning, hint):
    error = _error("x cannot be done", said)
    assert error.message.startswith("x cannot be done: ")
    assert meaning in error.message
    assert hint in error.hint
    assert error.exit_code == 10


def test_what_is_not_known_is_passed_on_in_one_bounded_line():
    error = _error("x cannot be built", "strange\n" * 1000 + "the end")
    assert "\n" not in error.message
    assert len(error.message) < 450
    assert error.message.endswith("the end")
    assert _cut("a\n b") == "a b"


@pytest.mark.parametrize("host", ["unix:///nonexistent", "tcp://127.0.0.1:9", "nonsense://x"])
def test_no_engine_is_one_clear_line(host):
    environ = {**os.environ, "DOCKER_HOST": host}
    command = [sys.executable, str(ROOT / "entrypoint.py"), "bake", "--model", "x/y", "--tag", "me/x"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 10
    assert result.stderr.startswith("moefix: Docker cannot be reached: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2


def give_up_roots_rights() -> None:
    """For `preexec_fn`: root obeys modes as everybody else does."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) != 0:  # CAP_DAC_OVERRIDE, out of the bounding set
        raise OSError("capabilities cannot be given up here")


def test_no_right_to_talk_to_the_engine_is_told(tmp_path):
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        command = [sys.executable, str(ROOT / "entrypoint.py"), "bake", "--model", "x/y", "--tag", "me/x"]
        environ = {**os.environ, "DOCKER_HOST": f"unix://{path}"}
        options = {"env": environ, "capture_output": True, "text": True, "timeout": 60}
        result = subprocess.run(command, check=False, preexec_fn=give_up_roots_rights, **options)
    assert result.returncode == 10
    assert "this user may not talk to Docker" in result.stderr
    assert "group docker" in result.stderr


def test_lines_are_whole_and_harmless():
    said = []
    lines = _Lines(said.append)
    for piece in (b"one", b" line\r\n\x1b[31mred\x1b[0m \x07bell\n", b"\n\xff", b"\nlast"):
        lines.feed(piece)
    lines.end()
    assert said == ["one line", "red  bell", "\N{REPLACEMENT CHARACTER}", "last"]
    assert lines.tail == tuple(said[-3:])


def test_a_line_without_an_end_is_told_in_parts():
    said = []
    lines = _Lines(said.append)
    for _ in range(40):
        lines.feed(b"x" * 10000)
    assert 1 <= len(said) <= 6
    lines.end()
    assert sum(map(len, said)) == 400_000


class _Container:
    """A container that prints `pieces`."""

    def __init__(self, pieces, fault=None):
        self._pieces, self._fault = pieces, fault

    def attach(self, **options):
        assert options == {"stdout": True, "stderr": True, "stream": True, "demux": True}
        return iter(self._pieces)

    def start(self):
        if self._fault:
            raise self._fault

    def wait(self):
        return {"StatusCode": 7}


class _Client:
    """The SDK's client, as far as a run goes."""

    def __init__(self, container):
        self.made, self.removed = [], []
        self.containers = self.api = self
        self._container = container

    def create(self, image, command, **options):
        self.made.append((image, command, options))
        return self._container

    def remove_container(self, name, **options):
        assert options == {"v": True, "force": True}
        self.removed.append(name)


RUN = ContainerRun("sha256:1", ("tune", "--json"), {"HF_TOKEN": "hf_secret"})


def test_a_run_keeps_output_and_messages_apart_and_removes_the_container():
    client = _Client(_Container([(b'{"a"', None), (None, b"tu"), (b": 1}", b"ning\n")]))
    said = []
    finished = Engine(client).run(RUN, said.append)
    assert (finished.code, finished.output, finished.tail) == (7, b'{"a": 1}', ("tuning",))
    assert said == ["tuning"]
    ((image, command, options),) = client.made
    assert (image, command) == ("sha256:1", ["tune", "--json"])
    assert client.removed == [options["name"]]
    assert options["environment"] == {"HF_TOKEN": "hf_secret"}
    assert "hf_secret" not in repr(RUN)
    assert options["device_requests"] is None


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(143), OSError("gone")])
def test_however_a_run_ends_its_container_is_removed(fault):
    client = _Client(_Container([], fault))
    with pytest.raises(DockerError if isinstance(fault, OSError) else type(fault)):
        Engine(client).run(RUN, print)
    assert len(client.removed) == 1


def test_output_without_end_is_cut_off():
    client = _Client(_Container((b"x" * (1 << 20), None) for _ in range(100)))
    with pytest.raises(DockerError, match="printed more"):
        Engine(client).run(RUN, print)
    assert len(client.removed) == 1


# --- pulling and building --------------------------------------------------------------------------------------------


class _Stream:
    """The SDK's client, as far as answers line by line go."""

    def __init__(self, *lines):
        self.api, self._lines, self.asked = self, lines, []

    def pull(self, repository, **options):
        self.asked.append((repository, options["tag"]))
        return iter(self._lines)

    def build(self, **options):
        self.asked.append((options["tag"], b"".join(options["fileobj"])))
        return iter(self._lines)


class _Counted(Silent):
    def __init__(self):
        self.steps, self.total = 0, 0

    def advance(self, detail="", total=None):
        self.steps, self.total = self.steps + 1, total


def test_a_pull_counts_layers():
    layers = [{"id": "a", "status": "Pulling fs layer"}, {"id": "b", "status": "Pulling fs layer"}]
    done = [{"id": name, "status": "Pull complete"} for name in "ab"]
    client, progress = _Stream({"status": "Pulling from me/x", "id": "1"}, *layers, *done, done[0]), _Counted()
    Engine(client).pull("localhost:5000/me/x", progress)
    assert client.asked == [("localhost:5000/me/x", "latest")]
    assert (progress.steps, progress.total) == (2, 2)


def test_a_pull_that_is_refused():
    with pytest.raises(DockerError, match="there is no such image"):
        Engine(_Stream({"error": "manifest unknown"})).pull("me/x:1", Silent())


def pieces():
    yield b"con"
    yield b"text"


def test_a_build_gives_the_images_id():
    client = _Stream({"stream": "Step 1/1 : FROM x\n"}, {"stream": " ---> 1\n"}, {"aux": {"ID": "sha256:new"}})
    said = []
    assert Engine(client).build(pieces(), "me/x", said.append) == "sha256:new"
    assert client.asked == [("me/x", b"context")]
    assert said == ["Step 1/1 : FROM x", "---> 1"]


def test_a_build_that_fails_says_where():
    lines = ({"stream": "Step 2/6 : COPY model /opt\n"}, {"error": "write /opt/model: no space left on device"})
    with pytest.raises(DockerError) as caught:
        Engine(_Stream(*lines)).build(pieces(), "me/x", print)
    assert "me/x cannot be built: there is no space left (Step 2/6 : COPY model /opt" in caught.value.message
    assert "prune" in caught.value.hint
    with pytest.raises(DockerError, match="did not say"):
        Engine(_Stream()).build(pieces(), "me/x", print)
