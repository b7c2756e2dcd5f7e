"""Process 1 becomes the server: its signals and its exit code are the container's. A stand-in takes SGLang's place."""

from __future__ import annotations

import json
import time

import pytest

from tests.docker.engine import docker
from tests.support.fake_driver import build_driver

pytestmark = pytest.mark.docker

SERVER = """
import json, os, signal, sys, time
def leave(number, frame):
    with open("/data/record", "w") as file:
        json.dump({"argv": sys.argv[1:], "pid": os.getpid(), "signal": number, "uid": os.getuid(),
                   "env": {name: os.environ.get(name) for name in ("HF_TOKEN", "HOME", "TRITON_CACHE_DIR")}}, file)
    sys.exit(41)
signal.signal(signal.SIGTERM, leave)
print("the server is here", flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A server and a driver, readable by any user."""
    folder = build_driver(tmp_path_factory.mktemp("stand-ins"))
    (folder / "launch_server.py").write_text(SERVER)
    (folder / "__init__.py").touch()
    for path in (folder, folder.parent, *folder.iterdir()):
        path.chmod(0o755)
    return folder


WHO = {"root": (), "uid 12345, read-only": ("--user", "12345:12345", "--read-only")}


@pytest.mark.parametrize("options", WHO.values(), ids=WHO)
def test_docker_stop_is_the_servers_own_end(image, package, stand_ins, dense_model, volume, container_name, options):
    mounts = {
        stand_ins / "launch_server.py": f"{package}/launch_server.py",
        stand_ins / "__init__.py": f"{package}/__init__.py",
        stand_ins: "/driver",
        dense_model: "/model",
    }
    mounted = [word for here, there in mounts.items() for word in ("--volume", f"{here}:{there}:ro")]
    own = ("--name", container_name, "--detach", "--volume", f"{volume}:/data", "--network", "none")
    environ = ("--env", "LD_LIBRARY_PATH=/driver", "--env", "HF_TOKEN=passed-through")
    flags = ("--model", "/model", "--port", "30000", "--log-level", "a word with 'quotes' and $HOME")
    docker("run", *own, *options, *mounted, *environ, image, *flags)
    until = time.monotonic() + 60
    while "the server is here" not in (logs := docker("logs", container_name)).stdout:
        assert time.monotonic() < until, logs.stderr
        time.sleep(0.2)

    began = time.monotonic()
    docker("stop", "--time", "20", container_name)
    assert time.monotonic() - began < 10
    state = json.loads(docker("inspect", container_name).stdout)[0]["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (41, False)

    read = docker("run", "--rm", "--volume", f"{volume}:/data", "--entrypoint", "cat", image, "/data/record").stdout
    record = json.loads(read)
    assert record["pid"] == 1
    assert record["signal"] == 15
    assert record["argv"] == ["--host", "0.0.0.0", *flags]  # what a published port reaches
    assert record["uid"] == (12345 if options else 0)
    assert record["env"] == {"HF_TOKEN": "passed-through", "HOME": "/data", "TRITON_CACHE_DIR": "/data/triton"}
