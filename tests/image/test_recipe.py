from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.artefacts.artefact import Artefact
from fixer.image.recipe import (
    Entry,
    Recipe,
    Weights,
    artefact_file,
    context,
    default_command,
    dockerfile,
    labels,
    tar_pieces,
)
from tests.support.artefacts import H100, RTX_4090, artefact_of

ENTRYPOINT = ("python3", "/opt/moefix/entrypoint.py")


@pytest.fixture
def artefact(trees, models):
    return artefact_of(trees["0.5.17"], ("--model", str(models["q3_30b_bf16_tp1_h100"])), RTX_4090)


@pytest.fixture
def recipe(artefact):
    command = default_command("me/model", None, ("--tp", "1"), weights=False)
    base = ("sha256:" + "ab" * 32, "moefix", ENTRYPOINT)
    return Recipe(*base, (artefact,), command, "me/model", "c0ffee", None, "2026-11-24T07:00:00Z")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_default_command_is_reachable_from_outside():
    assert default_command("me/m", None, (), weights=False) == ("--model", "me/m", "--host", "0.0.0.0")
    assert default_command("me/m", "v2", ("--host=::", "--tp", "2"), weights=False) == (
        *("--model", "me/m", "--revision", "v2"),
        *("--host=::", "--tp", "2"),
    )


def test_with_weights_the_server_goes_by_the_models_name():
    own = ("--model", "/opt/moefix-baked/model", "--served-model-name", "me/m", "--host", "0.0.0.0")
    assert default_command("me/m", "v2", (), weights=True) == own
    named = default_command("me/m", None, ("--served-model-name", "x"), weights=True)
    assert named.count("--served-model-name") == 1
    assert "x" in named


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_of_a_measured_image(recipe, artefact):
    found = labels(recipe)
    assert {
        "moefix.baked.card": "NVIDIA GeForce RTX 4090",
        "moefix.baked.compute-capability": "8.9",
        "moefix.baked.shared-memory": "101376",
        "moefix.baked.driver": "580.159.03",
        "moefix.baked.model": "me/model",
        "moefix.baked.revision": "c0ffee",
        "moefix.baked.sglang": "0.5.17",
        "moefix.baked.triton": "3.6.0",
        "moefix.baked.basis": "measured",
        "moefix.baked.date": "2026-11-23T22:58:01Z",
        "moefix.baked.weights": "no",
        "moefix.baked.rows": str(len(artefact.rows)),
        "moefix.baked.gain.m1-8": "2.0000",
        "moefix.baked.gain.m9-64": "1.2500",
        "moefix.baked.gain.m65-512": "1.2500",
        "moefix.baked.gain.m513-": "1.2500",
        "org.opencontainers.image.title": "me/model on NVIDIA GeForce RTX 4090",
        "org.opencontainers.image.created": "2026-11-24T07:00:00Z",
        "org.opencontainers.image.base.name": "moefix",
    }.items() <= found.items()


def test_labels_of_a_planned_image_have_no_gain(recipe, trees, models):
    planned = artefact_of(trees["0.5.17"], ("--model", str(models["q3_30b_bf16_tp1_h100"])), RTX_4090, measured=False)
    found = labels(replace(recipe, artefacts=(planned,)))
    assert found["moefix.baked.basis"] == "plan"
    assert {value for name, value in found.items() if ".gain." in name} == {""}
    assert found.keys() == labels(recipe).keys()  # an older image's labels do not shine through


def test_labels_of_two_kinds_of_cards(recipe, artefact, trees, models):
    other = artefact_of(trees["0.5.17"], ("--model", str(models["q3_30b_bf16_tp1_h100"])), H100)
    found = labels(replace(recipe, artefacts=(artefact, other)))
    assert found["moefix.baked.card"] == "NVIDIA GeForce RTX 4090; NVIDIA H100 80GB HBM3"
    assert found["moefix.baked.compute-capability"] == "8.9; 9.0"
    assert found["moefix.baked.triton"] == "3.6.0"


# --- the build context -----------------------------------------------------------------------------------------------


def test_the_dockerfile(recipe, artefact):
    lines = dockerfile(recipe).splitlines()
    assert [line.split()[0] for line in lines] == ["FROM", "COPY", "ENV", "RUN", "CMD", "LABEL"]
    assert lines[0] == "FROM sha256:" + "ab" * 32
    install = [*ENTRYPOINT, "import", "--install", "--home", "/opt/moefix-baked", str(artefact_file(artefact))]
    assert json.loads(lines[3].removeprefix("RUN ")) == install
    assert tuple(json.loads(lines[4].removeprefix("CMD "))) == recipe.command
    assert (
        "COPY model /opt/moefix-baked/model"
        in dockerfile(replace(recipe, weights=Weights(Path("/w"), ()))).splitlines()
    )


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_no_word_of_a_users_gets_out_of_its_place(words):
    recipe = Recipe("id", "moefix", ENTRYPOINT, (), (words,), words, words, None, words)
    lines = dockerfile(recipe).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["FROM", "COPY", "ENV", "RUN", "CMD", "LABEL"]
    assert json.loads(lines[4].removeprefix("CMD ")) == [words]
    (value,) = re.findall(r' moefix\.baked\.model="((?:[^"\\$]|\\.)*)"', lines[5])
    assert re.sub(r"\\(.)", r"\1", value) == " ".join(words.split())


def test_the_context_is_what_the_recipe_names_and_nothing_else(recipe, artefact, tmp_path):
    weights = tmp_path / "weights"
    (weights / "original").mkdir(parents=True)
    (weights / ".cache").mkdir()
    (weights / "blob").write_bytes(bytes(range(256)) * 5000)
    (weights / "model.safetensors").symlink_to("blob")  # as in the hub's cache
    (weights / "config.json").write_text("{}")
    for name in (".env", ".cache/token", "original/consolidated.pth", "model.gguf"):
        (weights / name).write_text("hf_secret")
    chosen = Weights(weights, ("config.json", "model.safetensors"))
    assert chosen.size == 256 * 5000 + 2
    sent = []
    content = b"".join(tar_pieces(context(replace(recipe, weights=chosen)), sent.append))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {member.name: member for member in archive}
        inside = artefact_file(artefact).relative_to("/opt/moefix-baked")
        wanted = {"Dockerfile", "baked/command.json", f"baked/{inside}", "model/config.json"}
        assert {name for name, member in members.items() if member.isfile()} == wanted | {"model/model.safetensors"}
        assert all(member.isfile() or member.isdir() for member in members.values())
        assert {member.mode for member in members.values() if member.isfile()} == {0o644}
        assert {member.mode for member in members.values() if member.isdir()} == {0o755}
        assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 0)}
        assert archive.extractfile("model/model.safetensors").read() == (weights / "blob").read_bytes()
        assert Artefact.from_json(archive.extractfile(f"baked/{inside}").read()) == artefact
        assert tuple(json.load(archive.extractfile("baked/command.json"))) == recipe.command
    assert sum(sent) == sum(member.size for member in members.values())
    assert b"hf_secret" not in content


def test_the_same_recipe_is_the_same_context(recipe):
    assert b"".join(tar_pieces(context(recipe))) == b"".join(tar_pieces(context(recipe)))


def test_long_names_and_large_files(tmp_path):
    name = "model/" + "/".join(["a long folder's name " * 4] * 5) + "/é.safetensors"
    (tmp_path / "file").write_bytes(b"x" * 3_000_001)
    pieces = list(tar_pieces(iter([Entry(name, tmp_path / "file"), Entry("empty", b"")])))
    assert max(map(len, pieces)) <= 1 << 20
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
        assert archive.getmember(name).size == 3_000_001
        assert archive.extractfile("empty").read() == b""


def test_a_file_that_shrinks_ends_the_build(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    pieces = tar_pieces(iter([Entry("file", tmp_path / "file")]))
    next(pieces)
    (tmp_path / "file").write_bytes(b"x" * 10)
    with pytest.raises(OSError, match="shrank"):
        list(pieces)
