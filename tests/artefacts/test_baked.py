"""What a ready-tuned image brings along, and what the server makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fixer.artefacts.baked import COMMAND_FILE, find_kept, is_baked, with_baked_command
from fixer.artefacts.environment import environment_of
from fixer.artefacts.install import TunedFiles
from fixer.artefacts.shelf import save_artefact
from fixer.base.errors import StoreError, UsageError
from fixer.sglang.find_tree import tree_at
from tests.support.artefacts import H100, RTX_4090, artefact_of
from tests.support.serving import installed

# --- the command -----------------------------------------------------------------------------------------------------

OWN = ["--model", "me/model", "--host", "0.0.0.0", "--tp", "2"]


@pytest.fixture
def image(tmp_path):
    """The environment of a ready-tuned image."""
    (tmp_path / COMMAND_FILE).write_text(json.dumps(OWN))
    return {"MOEFIX_BAKED": str(tmp_path)}


def test_flags_without_a_model_come_behind_the_images_own(image):
    assert with_baked_command([], image) == tuple(OWN)
    assert with_baked_command(["--port", "8000", "--tp=1"], image) == (*OWN, "--port", "8000", "--tp=1")


@pytest.mark.parametrize("argv", [["--model", "x"], ["--tp", "4", "--model-path=x"], ["--model-pa", "x"]])
def test_another_model_takes_nothing_from_the_image(image, argv):
    assert with_baked_command(argv, image) == tuple(argv)


def test_no_image_no_difference(tmp_path):
    assert with_baked_command(["--port", "1"], {}) == ("--port", "1")
    assert with_baked_command(["--port", "1"], {"MOEFIX_BAKED": str(tmp_path / "nothing")}) == ("--port", "1")
    assert not is_baked(tmp_path / "x", {})
    assert is_baked(tmp_path / "artefacts" / "x", {"MOEFIX_BAKED": str(tmp_path)})


@pytest.mark.parametrize("content", ["{}", "[1]", "[", ""])
def test_a_command_that_cannot_be_read_is_an_error(image, tmp_path, content):
    (tmp_path / COMMAND_FILE).write_text(content)
    with pytest.raises(StoreError):
        with_baked_command(["--port", "8000"], image)
    assert with_baked_command(["--model", "x"], image) == ("--model", "x")


def test_senseless_flags_are_a_usage_error(image):
    with pytest.raises(UsageError):
        with_baked_command(["--tp", "none"], image)


# --- which artefact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "brought", "expected"),
    [
        (None, "measured", "brought"),
        ("measured", None, "own"),
        ("measured", "measured", "own"),
        ("planned", "measured", "brought"),
        ("measured", "planned", "own"),
        ("short", "measured", "brought"),
        ("short", "planned", "own"),
    ],
)
def test_which_one_counts(trees, models, tmp_path, own, brought, expected):
    argv = ("--model", str(models["q3_30b_bf16_tp1_h100"]))
    tree = trees["0.5.17"]
    measured = artefact_of(tree, argv, H100)
    rows = [row.batch for row in measured.rows]
    kinds = {
        "measured": measured,
        "planned": artefact_of(tree, argv, H100, measured=False),
        "short": replace(measured, rows=measured.rows[:-1]),
    }
    for kind, folder in ((own, "own"), (brought, "brought")):
        if kind:
            save_artefact(tmp_path / folder, replace(kinds[kind], model=folder))
    environ = {"MOEFIX_BAKED": str(tmp_path / "brought")}
    found = find_kept(tmp_path / "own", environment_of(tree, H100), measured.workload, rows, environ)
    assert found.artefact.model == expected
    assert found.mismatch is None


def test_the_nearest_of_those_that_do_not_hold_is_told(trees, models, tmp_path):
    argv, tree = ("--model", str(models["q3_30b_bf16_tp1_h100"])), trees["0.5.17"]
    save_artefact(tmp_path / "own", artefact_of(tree, argv, H100, triton="3.5.1", sglang="0.5.16"))
    save_artefact(tmp_path / "brought", artefact_of(tree, argv, H100, driver="570.1"))
    environ = {"MOEFIX_BAKED": str(tmp_path / "brought")}
    workload = artefact_of(tree, argv, H100).workload
    found = find_kept(tmp_path / "own", environment_of(tree, H100), workload, (1,), environ)
    assert found.artefact is None
    assert found.mismatch.parts == ("driver",)
    assert is_baked(found.mismatch.path, environ)


# --- serving ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def baked(machine, tmp_path):
    """Puts an artefact into the machine's image, whose own command is the machine's."""
    folder = tmp_path / "baked"
    folder.mkdir()
    machine.env["MOEFIX_BAKED"] = str(folder)
    (folder / COMMAND_FILE).write_text(json.dumps(machine.flags))

    def put(card=H100, **options):
        artefact = artefact_of(tree_at(machine.package), machine.flags, card, **options)
        save_artefact(folder, artefact)
        return artefact

    return put


def test_the_same_card_measures_nothing(machine, baked):
    artefact = baked()
    result = machine.run()
    assert result.served, result.err
    assert "nothing to measure" in result.err
    assert installed(machine, artefact)
    assert not list(machine.home.glob("artefacts/*"))


def test_flags_alone_serve_the_images_model(machine, baked):
    baked()
    result = machine.run("--port", "8000", "--moefix-quiet")
    assert result.served, result.err
    assert result.record["argv"] == [*machine.flags, "--port", "8000"]


def test_what_was_not_measured_is_served_at_once_and_said(machine, baked):
    artefact = baked(measured=False)
    result = machine.run()
    assert result.served, result.err
    assert installed(machine, artefact)
    assert "were not measured; --moefix-fresh tunes" in result.err
    assert "measuring process" not in result.err
    fresh = machine.run(*machine.flags, "--moefix-fresh", "--moefix-strict")
    assert fresh.code == 8  # it did try, with the PyTorch that is none
    assert "measuring process" in fresh.err


def test_another_card_is_said_and_tuned(machine, baked):
    artefact = baked(RTX_4090)
    result = machine.run(*machine.flags, "--moefix-strict")
    assert result.code == 8
    assert (
        "this image's tuning is not used: card was NVIDIA GeForce RTX 4090, is NVIDIA H100 80GB HBM3; "
        "compute capability was 8.9, is 9.0; shared memory limit was 101376, is 232448"
    ) in result.err
    assert "measuring process" in result.err
    assert not installed_anything(machine, artefact)


def installed_anything(machine, artefact):
    pair = TunedFiles.of(artefact)
    return [name for name in machine.files() if name.endswith(pair.names)]


def test_another_driver_is_said_and_tuned(machine, baked):
    baked(driver="570.86")
    result = machine.run(*machine.flags, "--moefix-strict")
    assert result.code == 8
    assert "this image's tuning is not used: driver was 570, is 580\n" in result.err
