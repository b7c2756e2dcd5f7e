"""The image, built and run by a real Docker Engine."""

from __future__ import annotations

import json
import subprocess

import pytest

import fixer
from fixer.sglang.releases import PINNED, RELEASES
from tests.docker.engine import BASE, FAKE_TOKEN, IMAGE, REVISION, build, build_environment, build_options, docker

pytestmark = pytest.mark.docker

PLAN = ("plan", "--model", "RedHatAI/Qwen3-30B-A3B-FP8-dynamic", "--gpu", "RTX 4090", "--json")
AS_WHOM = {
    "root": (),
    "uid 12345": ("--user", "12345:12345"),
    "uid 12345, group 0": ("--user", "12345:0"),
    "root, read-only": ("--read-only",),
    "uid 12345, read-only": ("--user", "12345:12345", "--read-only"),
}


def test_no_arguments_print_the_short_help(image):
    result = docker("run", "--rm", image)
    assert result.stdout.startswith(f"moefix {fixer.__version__}: ")
    assert sum(line.startswith("  moefix ") for line in result.stdout.splitlines()) == 3
    assert result.stderr == ""


@pytest.mark.parametrize("options", AS_WHOM.values(), ids=AS_WHOM)
def test_plan_without_a_network(image, volume, options):
    result = docker("run", "--rm", "--network", "none", *options, "--volume", f"{volume}:/data", image, *PLAN)
    plan = json.loads(result.stdout)
    text = json.dumps(plan)
    assert "NVIDIA_GeForce_RTX_4090" in text
    assert PINNED in text
    # Compiled, not only looked up; and kept in the volume.
    assert docker("run", "--rm", "--volume", f"{volume}:/data", "--entrypoint", "ls", image, "/data").stdout.split()
    assert "nothing is kept" not in result.stderr


def test_exit_codes_pass_through(image):
    assert docker("run", "--rm", image, "plan", "--model", "x", "--gpu", "no such card", check=False).returncode == 4
    assert docker("run", "--rm", image, "--moefix-nonsense", check=False).returncode == 2


def test_labels_and_settings(image):
    (inspected,) = json.loads(docker("image", "inspect", image).stdout)
    config = inspected["Config"]
    oci = "org.opencontainers.image."
    assert {
        oci + "version": fixer.__version__,
        oci + "revision": REVISION,
        oci + "base.name": BASE,
        "moefix.sglang.version": PINNED,
        "moefix.sglang.source": "wheel",
        "moefix.triton.version": RELEASES[PINNED].triton,
    }.items() <= config["Labels"].items()
    assert {oci + "source", oci + "base.digest"} <= set(config["Labels"])
    # No commit is claimed for what came as a wheel.
    assert not [label for label in config["Labels"] if label.endswith((".commit", ".repository"))]
    assert config["Healthcheck"]["Test"] == ["CMD", "moefix", "status", "--healthcheck"]
    assert config["Healthcheck"]["StartPeriod"] == 2 * 3600 * 10**9
    assert config["Entrypoint"] == ["python3", "/opt/moefix/entrypoint.py"]
    assert set(config["Volumes"]) == {"/data"}
    environ = dict(entry.split("=", 1) for entry in config["Env"])
    wanted = {"MOEFIX_IMAGE": "1", "TRITON_CACHE_DIR": "/data/triton", "HF_HOME": "/data/huggingface", "HOME": "/data"}
    assert wanted.items() <= environ.items()
    assert not {"PIP_CERT", "HF_TOKEN"} & set(environ)


def test_what_the_versions_say_is_what_is_installed(image):
    code = "import importlib.metadata as m; print(m.version('sglang'), m.version('triton'), m.version('moefix'))"
    found = docker("run", "--rm", "--entrypoint", "python3", image, "-c", code).stdout.split()
    assert found == [PINNED, RELEASES[PINNED].triton, fixer.__version__]
    tools = "cc --version && test -f $(python3 -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')/Python.h"
    docker("run", "--rm", "--entrypoint", "sh", image, "-c", tools)


def test_whoever_runs_it_has_a_name_and_a_home(image):
    code = "import getpass, pathlib; print(getpass.getuser()); pathlib.Path.home().joinpath('x').touch()"
    options = ("--user", "12345:12345", "--entrypoint", "python3")
    assert docker("run", "--rm", *options, image, "-c", code).stdout.strip() == "moefix"


def test_the_script_that_builds_it_says_of_which_checkout(context, image):
    """`scripts/build-image`, with a remote whose address has a password in it."""
    tag = IMAGE + "-labelled"
    git = ("git", "-C", str(context), "-c", "user.name=moefix", "-c", "user.email=moefix@example.org")
    for command in (
        ("init", "--quiet"),
        ("remote", "add", "origin", f"https://someone:{FAKE_TOKEN}@example.org/moefix.git"),
        ("add", "--all", "fixer", "scripts", "docker", "Dockerfile"),
        ("commit", "--quiet", "--message", "all"),
    ):
        subprocess.run([*git, *command], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    result = subprocess.run(
        [str(context / "scripts" / "build-image"), *build_options()],
        env={**build_environment(), "TAG": tag},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    labels = json.loads(docker("image", "inspect", tag).stdout)[0]["Config"]["Labels"]
    docker("image", "rm", tag)
    assert labels["org.opencontainers.image.revision"] == f"{head}-dirty"  # the rest of the checkout is not in git
    assert labels["org.opencontainers.image.source"] == "https://example.org/moefix.git"


def test_buildkit_builds_the_same(context, image):
    """Any Docker program here that has BuildKit: Debian's own has, one without the buildx plugin has not."""
    tag = IMAGE + "-buildkit"
    environ = {**build_environment(), "DOCKER_BUILDKIT": "1"}
    arguments = build_options(MOEFIX_REVISION=REVISION)
    for program in ("docker", "/usr/bin/docker"):
        command = [program, "build", "--tag", tag, *arguments, str(context)]
        result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if result.returncode == 0 or "buildx" not in result.stderr:
            break
    assert result.returncode == 0, result.stderr[-4000:]
    (classic,), (kit,) = (json.loads(docker("image", "inspect", name).stdout) for name in (image, tag))
    settings = ("Env", "Labels", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "User", "Healthcheck")
    assert {name: kit["Config"].get(name) for name in settings} == {
        name: classic["Config"].get(name) for name in settings
    }
    # BuildKit keeps what a step writes into a volume.
    listed = docker("run", "--rm", "--entrypoint", "ls", tag, "-A", "/data").stdout
    docker("image", "rm", tag)
    assert listed == ""


def times_in_layers(image: str, wanted: bytes) -> int:
    """How often `wanted` is in the image's layers and settings; `docker save` holds layers uncompressed."""
    count, tail = 0, b""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as process:
        while block := process.stdout.read(1 << 22):
            text = tail + block
            count += text.count(wanted)
            tail = text[-(len(wanted) - 1) :]
    assert process.returncode == 0
    return count


def test_no_token_in_any_layer(image):
    assert times_in_layers(image, b"class MoefixGroup(click.Group)") == 1  # the search does see files in layers
    assert times_in_layers(image, FAKE_TOKEN.encode()) == 0


def test_a_change_of_moefix_rebuilds_only_moefix(context, image):
    source = context / "fixer" / "__init__.py"
    before = source.read_text()
    source.write_text(before + "# changed\n")
    try:
        result = build(context, IMAGE + "-changed")
    finally:
        source.write_text(before)
    assert result.returncode == 0, result.stderr
    steps = result.stdout.split("\nStep ")
    (copied,) = (number for number, step in enumerate(steps) if "COPY fixer /opt/moefix/fixer" in step.splitlines()[0])
    rebuilt = [number for number, step in enumerate(steps) if " : RUN " in step and "Using cache" not in step]
    assert rebuilt
    assert min(rebuilt) > copied, steps[min(rebuilt)]
    docker("image", "rm", IMAGE + "-changed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"SGLANG_SOURCE": "sdist"}, "SGLANG_SOURCE is 'sdist'"),
        ({"WITH_CUDA": "yes"}, "WITH_CUDA is 'yes'"),
        ({"MOEFIX_VERSION": "9.9"}, f"moefix {fixer.__version__} is installed, and the label says 9.9"),
        ({"TRITON_VERSION": "3.5.0"}, f"triton {RELEASES[PINNED].triton} is installed, and the label says 3.5.0"),
    ],
)
def test_wrong_build_arguments_are_refused(context, image, arguments, said):
    result = build(context, IMAGE + "-refused", **arguments)
    assert result.returncode != 0
    assert said in result.stdout + result.stderr
