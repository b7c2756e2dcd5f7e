"""Ready-tuned images, made and run by a real Docker Engine. No GPU: stand-ins take the driver's, SGLang's and, where a
tuning is needed, the tuning's place."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import pytest

from fixer.artefacts.install import TunedFiles
from fixer.sglang.releases import PINNED
from fixer.sglang.tuning_files import render_table
from tests.docker.engine import BASE, FAKE_TOKEN, ROOT, docker
from tests.support.artefacts import RTX_4090, artefact_of
from tests.support.fake_driver import build_driver

pytestmark = pytest.mark.docker

MODEL = "RedHatAI/Qwen3-30B-A3B-FP8-dynamic"  # in the catalogue: no hub is needed
CARD = "NVIDIA GeForce RTX 4090"
FLAGS = ("--max-running-requests", "48")
COMMAND = ["--model", MODEL, "--host", "0.0.0.0", *FLAGS]
PAIR = ["E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8,per_channel_quant=True.json"]
PAIR += [PAIR[0].replace(".json", "_down.json")]
FIRST_CARD, SECOND_CARD = "CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"  # a 4090 and an H100

SERVER = """
import json, os, sys
with open("/data/record", "w") as file:
    json.dump({"argv": sys.argv[1:], "pid": os.getpid(), "uid": os.getuid(),
               "env": {name: os.environ.get(name) for name in ("SGLANG_MOE_CONFIG_DIR", "HF_TOKEN")}}, file)
print("the server is here", flush=True)
sys.exit(41)
"""

# Stands in for a tuning; all else is moefix's own.
TUNER = """
import os, sys, time
if sys.argv[1] != "tune":
    os.execv(sys.executable, [sys.executable, "/opt/moefix/entrypoint.py", *sys.argv[1:]])
told = "given" if os.environ.get("HF_TOKEN") else "not given"
(mount,) = [line for line in open("/proc/self/mountinfo") if " /data " in line]
print("moefix: the data is in", mount.split()[3], file=sys.stderr)
print("moefix: tuning with", *sys.argv[2:], "token", told, file=sys.stderr, flush=True)
open("/data/journal.sqlite", "w").write(os.environ.get("HF_TOKEN", "") + " journal")
if "hang" in sys.argv:
    time.sleep(600)
if "fail" in sys.argv:
    print("moefix: Not one configuration could be timed", file=sys.stderr)
    sys.exit(8)
print(open("/artefact.json").read(), end="")
"""


def bake(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(**environ), **PIPES, timeout=600, check=False)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "entrypoint.py"), "bake", *arguments]


def environment(**environ: str) -> dict[str, str]:
    # A home of one's own: this machine's stored token, if any, is none of the tests' business.
    return {**os.environ, "HF_TOKEN": FAKE_TOKEN, "HF_HUB_OFFLINE": "1", **environ}


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def tags():
    """Names for images, removed at the end."""
    given = []

    def new() -> str:
        given.append(f"moefix-test/baked-{uuid.uuid4().hex[:8]}:rtx4090")
        return given[-1]

    yield new
    docker("image", "rm", "--force", *given, check=False)


@pytest.fixture(scope="module")
def planned(image, tags) -> str:
    """An image baked from the plan."""
    tag = tags()
    result = bake("--for", "RTX 4090", "--model", MODEL, "--tag", tag, "--image", image, *FLAGS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"docker run --gpus all --ipc host -p 30000:30000 -v moefix:/data {tag}"
    # Both halves were told as they went.
    assert f"planning in a container of {image}" in result.stderr
    assert "Step 1/" in result.stderr
    return tag


@pytest.fixture(scope="module")
def artefact(trees):
    return artefact_of(trees[PINNED], ("--model", MODEL, *FLAGS), RTX_4090)


@pytest.fixture(scope="module")
def exported(artefact, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "artefact.json"
    path.write_text(artefact.to_json())
    return path


@pytest.fixture(scope="module")
def measured(image, tags, exported) -> str:
    """An image baked from a measured artefact's file."""
    tag = tags()
    result = bake("--artefact", str(exported), "--model", MODEL, "--tag", tag, "--image", image, *FLAGS)
    assert result.returncode == 0, result.stderr
    return tag


def settings(tag: str) -> dict:
    return json.loads(docker("image", "inspect", tag).stdout)[0]["Config"]


class Searched:
    """A stream that counts a word as it is read."""

    def __init__(self, stream, word: bytes) -> None:
        self._stream, self._word, self._tail = stream, word, b""
        self.found = 0

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        text = self._tail + block
        self.found += text.count(self._word)
        self._tail = text[-(len(self._word) - 1) :]
        return block


@functools.cache
def saved(tag: str, base: str) -> tuple[list[dict[str, bytes]], int]:
    """The files of each layer that an image adds to its base; and how often the token is in any layer or setting."""
    known = json.loads(docker("image", "inspect", base).stdout)[0]["RootFS"]["Layers"]
    added = len(json.loads(docker("image", "inspect", tag).stdout)[0]["RootFS"]["Layers"]) - len(known)
    contents: dict[str, bytes] = {}
    with subprocess.Popen(["docker", "save", tag], stdout=subprocess.PIPE) as process:
        stream = Searched(process.stdout, FAKE_TOKEN.encode())  # `docker save` holds layers uncompressed
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.isfile() and member.size < 20 << 20:
                    contents[member.name] = archive.extractfile(member).read()
        while stream.read(1 << 20):
            pass
    assert process.returncode == 0
    layers = []
    for name in json.loads(contents["manifest.json"])[0]["Layers"][-added:]:
        with tarfile.open(fileobj=io.BytesIO(contents[name])) as layer:
            layers.append({file.name: layer.extractfile(file).read() for file in layer if file.isfile()})
    return layers, stream.found


def test_the_search_finds_what_is_in_a_layer():
    word = FAKE_TOKEN.encode()
    stream = Searched(io.BytesIO(b"x" * 995 + word + word + b"x" * 1000), word)
    while stream.read(100):
        pass
    assert stream.found == 2


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_labels_command_and_environment(planned, image):
    config, base = settings(planned), settings(image)
    assert config["Cmd"] == COMMAND
    assert config["Entrypoint"] == base["Entrypoint"]
    assert set(config["Env"]) - set(base["Env"]) == {"MOEFIX_BAKED=/opt/moefix-baked"}
    own = "moefix.baked."
    assert {
        own + "card": CARD,
        own + "compute-capability": "8.9",
        own + "shared-memory": "101376",
        own + "model": MODEL,
        own + "sglang": PINNED,
        own + "triton": "3.6.0",
        own + "basis": "plan",
        own + "weights": "no",
        own + "gain.m1-8": "",
        "org.opencontainers.image.title": f"{MODEL} on {CARD}",
        "org.opencontainers.image.base.name": image,
        "moefix.sglang.version": PINNED,
    }.items() <= config["Labels"].items()
    assert config["Labels"][own + "date"].startswith("20")


def test_a_measured_images_labels_say_the_gain_of_each_band(measured):
    found = settings(measured)["Labels"]
    bands = ("m1-8", "m9-64", "m65-512", "m513-")
    assert [found[f"moefix.baked.gain.{band}"] for band in bands] == ["2.0000", "1.2500", "1.2500", "1.2500"]
    assert found["moefix.baked.basis"] == "measured"
    assert found["moefix.baked.date"] == "2026-11-23T22:58:01Z"


def test_the_pair_in_sglangs_tree_is_the_artefacts(measured, artefact, package):
    folder = f"{package}/srt/layers/moe/moe_runner/triton_utils/configs/triton_3_6_0"
    pair = TunedFiles.of(artefact)
    for name, table in zip(pair.names, pair.tables, strict=True):
        read = docker("run", "--rm", "--entrypoint", "cat", measured, f"{folder}/{name}").stdout
        assert read.encode() == render_table(table)


def test_its_layers_have_these_files_and_no_other(planned, image):
    (first, second), _ = saved(planned, image)
    written = {name for name in second if re.fullmatch(r"opt/moefix-baked/written/[0-9a-f]{64}", name)}
    assert len(written) in (1, 2)  # by their hash: which files moefix wrote; the two may be alike
    names = sorted(Path(name).name for name in second if name not in written)
    assert names == sorted([*PAIR, *(name + ".before-moefix" for name in PAIR)])
    assert {name: content for name, content in second.items() if name.endswith(".before-moefix") and content} == {}
    (kept,) = [name for name in first if name.startswith("opt/moefix-baked/artefacts/NVIDIA_GeForce_RTX_4090/")]
    assert set(first) == {kept, "opt/moefix-baked/command.json"}
    assert json.loads(first["opt/moefix-baked/command.json"]) == COMMAND


def test_no_token_in_any_layer_or_setting(planned, image):
    assert saved(planned, image)[1] == 0
    assert FAKE_TOKEN not in docker("history", "--no-trunc", planned).stdout


def test_nothing_stays_behind(planned, measured):
    assert docker("ps", "--all", "--quiet", "--filter", "label=moefix.bake").stdout == ""


def test_words_come_through_to_the_letter(image, tags, exported):
    tag = tags()
    word = "a \"b\" $HOME ${PATH} \\ 'c' é"
    result = bake(
        "--artefact",
        str(exported),
        "--model",
        MODEL,
        "--tag",
        tag,
        "--image",
        image,
        *FLAGS,
        "--served-model-name",
        word,
    )
    assert result.returncode == 0, result.stderr
    assert settings(tag)["Cmd"] == [*COMMAND, "--served-model-name", word]


# --- running it ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A server and a driver, readable by any user."""
    folder = build_driver(tmp_path_factory.mktemp("stand-ins"))
    (folder / "launch_server.py").write_text(SERVER)
    (folder / "__init__.py").touch()
    for path in (folder, folder.parent, *folder.iterdir()):
        path.chmod(0o755)
    return folder


@pytest.fixture
def serve(stand_ins, package, volume):
    """Runs a baked image to its server's end; gives the run and what the server recorded."""

    def run(tag: str, *arguments: str, options: tuple[str, ...] = (), card: str = FIRST_CARD):
        mounts = {
            stand_ins / "launch_server.py": f"{package}/launch_server.py",
            stand_ins / "__init__.py": f"{package}/__init__.py",
            stand_ins: "/driver",
        }
        mounted = [word for here, there in mounts.items() for word in ("--volume", f"{here}:{there}:ro")]
        own = ("--rm", "--network", "none", "--volume", f"{volume}:/data", "--env", "LD_LIBRARY_PATH=/driver")
        own = (*own, "--env", "MOEFIX_SKIP_DOWNLOAD=1")  # there is neither a hub nor a model behind the name
        result = docker("run", *own, *options, *mounted, "--env", card, tag, *arguments, check=False)
        read = ("run", "--rm", "--volume", f"{volume}:/data", "--entrypoint", "cat", tag, "/data/record")
        record = docker(*read, check=False).stdout
        return result, json.loads(record) if record else None

    return run


AS_WHOM = {
    "root": (),
    "uid 12345": ("--user", "12345:12345"),
    "root, read-only": ("--read-only",),
    "uid 12345, read-only": ("--user", "12345:12345", "--read-only"),
}


@pytest.mark.parametrize("options", AS_WHOM.values(), ids=AS_WHOM)
def test_on_the_same_kind_of_card_it_measures_nothing(measured, serve, options):
    result, record = serve(measured, options=options)
    assert result.returncode == 41, result.stderr
    assert (record["argv"], record["pid"]) == (COMMAND, 1)
    assert record["uid"] == (12345 if "--user" in options else 0)
    # The files are in SGLang's own tree: no overlay, even where nobody can write.
    assert record["env"] == {"SGLANG_MOE_CONFIG_DIR": None, "HF_TOKEN": None}
    assert "tuned before on 2026-11-23T22:58:01Z: nothing to measure" in result.stderr
    assert "searched" not in result.stderr
    assert "PyTorch" not in result.stderr


@pytest.mark.parametrize("options", AS_WHOM.values(), ids=AS_WHOM)
def test_what_was_planned_is_served_at_once_and_said(planned, serve, options):
    result, record = serve(planned, options=options)
    assert result.returncode == 41, result.stderr
    assert record["argv"] == COMMAND
    assert "were not measured; --moefix-fresh tunes" in result.stderr
    assert "PyTorch" not in result.stderr
    assert record["env"]["SGLANG_MOE_CONFIG_DIR"] is None


def test_on_another_card_it_says_so_and_tunes(measured, serve):
    result, record = serve(measured, "--moefix-strict", card=SECOND_CARD)
    assert result.returncode == 8
    assert record is None
    assert f"this image's tuning is not used: card was {CARD}, is NVIDIA H100 80GB HBM3;" in result.stderr
    assert "Measuring needs PyTorch" in result.stderr  # it began to, and this image has none


def test_a_users_flags_go_behind_the_images(measured, serve):
    result, record = serve(measured, "--port", "8000", "--host", "127.0.0.1")
    assert result.returncode == 41, result.stderr
    assert record["argv"] == [*COMMAND, "--port", "8000", "--host", "127.0.0.1"]
    assert "nothing to measure" in result.stderr


def test_another_model_is_another_server(measured, serve, dense_model):
    result, record = serve(measured, "--model", "/model", options=("--volume", f"{dense_model}:/model:ro"))
    assert result.returncode == 41, result.stderr
    assert record["argv"] == ["--host", "0.0.0.0", "--model", "/model"]


def test_the_other_commands_are_there(measured):
    listed = docker("run", "--rm", measured, "export", "--file", inside(measured), "--out", "-").stdout
    assert json.loads(listed)["environment"]["card"] == CARD


def inside(tag: str) -> str:
    find = ("run", "--rm", "--entrypoint", "find", tag, "/opt/moefix-baked/artefacts", "-name", "*.json")
    return docker(*find).stdout.strip()


# --- a tuning in a container -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuner(image, exported, tmp_path_factory):
    """A moefix image whose tuning is a stand-in's."""
    folder, tag = tmp_path_factory.mktemp("tuner"), f"moefix-test/tuner-{uuid.uuid4().hex[:8]}"
    (folder / "tuner.py").write_text(TUNER)
    (folder / "artefact.json").write_bytes(exported.read_bytes())
    lines = (f"FROM {image}", "COPY tuner.py artefact.json /", 'ENTRYPOINT ["python3", "/tuner.py"]')
    (folder / "Dockerfile").write_text("\n".join(lines))
    docker("build", "--tag", tag, str(folder), env={**os.environ, "DOCKER_BUILDKIT": "0"})
    yield tag
    docker("image", "rm", "--force", tag, check=False)


def data_is_gone(said: str) -> bool:
    """Whether the volume that a tuning said it had its data in is no more."""
    (name,) = set(re.findall(r"the data is in \S*/volumes/([0-9a-f]{64})/_data", said))  # an error quotes it once more
    return name not in docker("volume", "ls", "--quiet").stdout.split()


def test_a_tuned_image(tuner, tags, artefact):
    tag = tags()
    result = bake("--model", MODEL, "--tag", tag, "--image", tuner, "--gpus", "none", *FLAGS)
    assert result.returncode == 0, result.stderr
    said = f"moefix: tuning with --json --model={MODEL} {' '.join(FLAGS)} token given"
    assert said in result.stderr.splitlines()
    assert settings(tag)["Labels"]["moefix.baked.basis"] == "measured"
    (first, _), tokens = saved(tag, tuner)
    assert artefact.to_json().encode() in first.values()
    assert tokens == 0
    assert FAKE_TOKEN not in result.stdout + result.stderr
    assert data_is_gone(result.stderr)  # and with it the journal


def test_a_named_volume_keeps_the_journal(tuner, tags, volume):
    result = bake("--model", MODEL, "--tag", tags(), "--image", tuner, "--gpus", "none", "--data", volume)
    assert result.returncode == 0, result.stderr
    read = docker("run", "--rm", "--volume", f"{volume}:/data", "--entrypoint", "cat", tuner, "/data/journal.sqlite")
    assert read.stdout.endswith("journal")


def test_a_failed_tuning_ends_with_its_last_lines(tuner, tags):
    tag = tags()
    result = bake("--model", MODEL, "--tag", tag, "--image", tuner, "--gpus", "none", "--served-model-name", "fail")
    assert result.returncode == 10
    assert "ended with exit code 8: " in result.stderr
    assert "Not one configuration could be timed" in result.stderr.splitlines()[-1]
    assert docker("image", "inspect", tag, check=False).returncode != 0
    assert data_is_gone(result.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_container_too(tuner, tags, number):
    arguments = ("--model", MODEL, "--tag", tags(), "--image", tuner, "--gpus", "none", "--served-model-name", "hang")
    process = subprocess.Popen(command(*arguments), env=environment(), **PIPES)
    try:
        lines = []
        while "token given" not in "".join(lines):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        process.send_signal(number)
        began = time.monotonic()
        _, rest = process.communicate(timeout=60)
        assert time.monotonic() - began < 20
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in rest
    running = docker("ps", "--all", "--quiet", "--filter", f"ancestor={tuner}", "--filter", "label=moefix.bake")
    assert running.stdout == ""
    assert data_is_gone("".join(lines))


# --- with the weights ------------------------------------------------------------------------------------------------


def test_weights_come_along(image, tags, serve, dense_model, exported, trees, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    cases = json.loads((ROOT / "tests" / "data" / "lookup-cases.json").read_text())
    config = next(case["config"] for case in cases if case["id"] == "q3_30b_bf16_tp1_h100")
    (source / "config.json").write_text(json.dumps(config))
    blob = os.urandom(5_000_000)
    (tmp_path / "blob").write_bytes(blob)
    (source / "model.safetensors").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (source / ".env").write_text(FAKE_TOKEN)
    wanted = artefact_of(trees[PINNED], ("--model", str(source)), RTX_4090)
    (tmp_path / "a.json").write_text(wanted.to_json())
    tag = tags()
    arguments = ("--artefact", str(tmp_path / "a.json"), "--model", str(source), "--tag", tag, "--image", image)
    result = bake(*arguments, "--with-weights", "--served-model-name", "mine")
    assert result.returncode == 0, result.stderr
    own = ["--model", "/opt/moefix-baked/model", "--host", "0.0.0.0", "--served-model-name", "mine"]
    assert settings(tag)["Cmd"] == own
    (weights, *_), tokens = saved(tag, image)
    assert weights["opt/moefix-baked/model/model.safetensors"] == blob
    assert set(weights) == {f"opt/moefix-baked/model/{name}" for name in ("config.json", "model.safetensors")}
    assert tokens == 0
    served, record = serve(tag, options=("--user", "12345:12345", "--read-only"))
    assert served.returncode == 41, served.stderr
    assert record["argv"] == own
    assert "nothing to measure" in served.stderr


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(*arguments: str, **environ: str) -> str:
    """The one line of the fault, and the next step."""
    result = bake(*arguments, **environ)
    assert result.returncode in (2, 5, 10)
    assert "Traceback" not in result.stderr
    return result.stderr


def test_no_docker(image):
    said = refused("--model", MODEL, "--tag", "me/x", DOCKER_HOST="unix:///nonexistent")
    assert "no Docker Engine answers" in said
    assert "systemctl start docker" in said


def test_no_such_image():
    said = refused("--model", MODEL, "--tag", "me/x", "--image", "moefix-none-such")
    assert "there is no image moefix-none-such here" in said
    assert "docker build" in said


def test_no_image_of_moefix(image):
    said = refused("--model", MODEL, "--tag", "me/x", "--image", BASE)
    assert "is no image of moefix" in said


def test_no_nvidia_runtime(image, tags):
    said = refused("--model", MODEL, "--tag", tags(), "--image", image)
    assert "Docker has no NVIDIA runtime here" in said
    assert "Container Toolkit" in said
    assert docker("ps", "--all", "--quiet", "--filter", "label=moefix.bake").stdout == ""


def test_a_taken_tag(planned, image, exported):
    before = json.loads(docker("image", "inspect", planned).stdout)[0]["Id"]
    arguments = ("--artefact", str(exported), "--model", MODEL, "--tag", planned, "--image", image, *FLAGS)
    assert "--force" in refused(*arguments)
    assert json.loads(docker("image", "inspect", planned).stdout)[0]["Id"] == before


def test_force_takes_the_tag(image, tags, exported):
    tag = tags()
    arguments = ("--artefact", str(exported), "--model", MODEL, "--tag", tag, "--image", image)
    assert bake(*arguments).returncode == 0
    assert bake(*arguments, *FLAGS, "--force").returncode == 0
    assert settings(tag)["Cmd"] == COMMAND


def test_an_artefact_for_something_else(image, tags, exported):
    said = refused("--artefact", str(exported), "--model", MODEL, "--tag", tags(), "--image", image, "--tp", "2")
    assert "does not ask for this artefact" in said


def test_a_secret_is_not_baked(image, tags):
    said = refused("--for", "4090", "--model", MODEL, "--tag", tags(), "--image", image, "--api-key", "sesame")
    assert "would be readable" in said
    assert "sesame" not in said
