from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.artefacts.artefact import Artefact, _checksum
from fixer.artefacts.environment import environment_of
from fixer.artefacts.forms import tree_of, write_artefact, write_config_dir, write_sglang, write_vllm
from fixer.artefacts.install import TunedFiles
from fixer.artefacts.shelf import find_artefact, kept_artefacts, save_artefact
from fixer.artefacts.transfer import (
    artefacts_in,
    check_names,
    for_card,
    for_model,
    install_in,
    keep,
    only_one,
    read_artefacts,
)
from fixer.base.errors import SGLangError, StoreError, UsageError
from fixer.machine.cards import find_card
from fixer.model.config import load_model
from fixer.plan.make_plan import make_plan
from fixer.plan.write import planned_artefact
from fixer.sglang.file_names import pairs_of_names
from fixer.sglang.find_tree import tree_at
from fixer.sglang.flags import parse_flags
from fixer.sglang.tuning_files import parse_table, render_table
from fixer.workload import RowTiles, Tile
from tests.support.artefacts import H100, RTX_4090, artefact_of, renamed

ROOT = Path(__file__).resolve().parents[2]
FP8 = "q3_30b_fp8dyn_tp1_l40s"


@pytest.fixture(scope="session")
def tree(trees):
    return trees["0.5.17"]


@pytest.fixture(scope="session")
def model(models):
    return models["q3_30b_bf16_tp1_h100"]


@pytest.fixture
def artefact(tree, model):
    return artefact_of(tree, ("--model", str(model)), RTX_4090)


def moefix(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "MOEFIX_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "entrypoint.py"), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


# --- one file --------------------------------------------------------------------------------------------------------


def test_there_and_back(artefact, tmp_path):
    write_artefact(artefact, tmp_path / "out" / "a.json")
    assert artefacts_in(tmp_path / "out" / "a.json") == (artefact,)
    path = keep(artefact, tmp_path / "home")
    found = find_artefact(tmp_path / "home", artefact.environment, artefact.workload)
    assert found.artefact == artefact
    before = path.stat()
    assert keep(artefact, tmp_path / "home") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_what_tune_prints_for_two_kinds_of_cards_is_read_too(artefact, tree, model):
    other = artefact_of(tree, ("--model", str(model)), H100)
    printed = f"[{artefact.to_json()},\n{other.to_json()}]"  # as cli.tune does
    assert read_artefacts(printed.encode()) == (artefact, other)
    assert read_artefacts(b"[]") == ()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace('"num_stages": 4', '"num_stages": 5', 1), "checksum"),
        (lambda text: text[: len(text) // 2], "line"),
        (lambda text: "", "Expecting value"),
        (lambda text: "[" * 100000, "nested"),
        (lambda text: " " * (2 << 20) + text, "longer than"),
        (lambda text: "[" + ",".join([text] * 65) + "]", "64 artefacts"),
        (lambda text: '{"1": {"BLOCK_SIZE_M": 16}}', "schema"),
        (lambda text: "[]", "no artefact in it"),
    ],
)
def test_a_damaged_file_is_refused_with_one_line(artefact, tmp_path, damage, said):
    path = tmp_path / "a.json"
    path.write_text(damage(artefact.to_json()))
    before = path.read_bytes()
    result = moefix(tmp_path / "home", "import", str(path))
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) <= 2  # the fault and the next step
    assert "Traceback" not in result.stderr
    assert path.read_bytes() == before  # a user's file, not the data folder's: it stays where it is
    assert not list(tmp_path.glob("home/artefacts/*/*"))


def test_a_file_that_is_not_there(tmp_path):
    result = moefix(tmp_path / "home", "import", str(tmp_path / "none.json"))
    assert result.returncode == 2
    assert "No such file" in result.stderr


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_content_makes_the_reader_stumble(data):
    content = data.draw(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
    try:
        artefacts = read_artefacts(content)
    except ValueError:
        return
    assert all(isinstance(artefact, Artefact) for artefact in artefacts)


def test_all_of_several_files_or_none(artefact, tmp_path):
    write_artefact(artefact, tmp_path / "good.json")
    (tmp_path / "bad.json").write_text("{}")
    result = moefix(tmp_path / "home", "import", str(tmp_path / "good.json"), str(tmp_path / "bad.json"))
    assert result.returncode == 2
    assert not list(tmp_path.glob("home/artefacts/*/*"))


# --- which one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tree, models, tmp_path):
    home = tmp_path / "home"
    for argv, card in (
        (("--model", str(models["q3_30b_bf16_tp1_h100"])), RTX_4090),
        (("--model", str(models["q3_30b_bf16_tp1_h100"])), H100),
        (("--model", str(models["q3_30b_bf16_tp1_h100"]), "--tp", "2"), H100),
    ):
        save_artefact(home, artefact_of(tree, argv, card))
    return home


def chosen(home, model, *flags):
    parsed = parse_flags((*flags, "--model", str(model)))
    return for_model(kept_artefacts(home)[0], load_model("", parsed), parsed)


def test_the_models_flags_tell_which(kept, model):
    assert len(kept_artefacts(kept)[0]) == 3
    assert [artefact.workload.tp_size for _, artefact in chosen(kept, model, "--tp=2")] == [2]
    assert len(chosen(kept, model)) == 2
    assert chosen(kept, model, "--tp=4") == ()
    assert only_one(for_card(chosen(kept, model), "rtx_4090")).environment.card == RTX_4090.name
    with pytest.raises(UsageError, match="2 kept tunings"):
        only_one(chosen(kept, model))
    with pytest.raises(UsageError, match="no kept tuning"):
        only_one(())


def test_a_damaged_artefact_is_reported_and_stays(kept):
    path = next(kept.glob("artefacts/*/*.json"))
    path.write_text("damaged")
    usable, (damaged,) = kept_artefacts(kept)
    assert len(usable) == 2
    assert damaged.kept_as.read_text() == "damaged"


def test_listing_and_exporting_from_the_command_line(kept, model, tmp_path):
    listed = moefix(kept, "export", "--list")
    assert listed.returncode == 0
    assert listed.stdout.count("artefacts/NVIDIA_") == 3
    printed = moefix(kept, "export", "--model", str(model), "--tp", "2", "--out", "-")
    (artefact,) = read_artefacts(printed.stdout.encode())
    assert artefact.workload.tp_size == 2
    many = moefix(kept, "export", "--out", str(tmp_path / "x"))
    assert many.returncode == 2
    assert "3 kept tunings" in many.stderr
    nowhere = moefix(kept, "export", "--card", "4090")
    assert nowhere.returncode == 2
    assert "--out" in nowhere.stderr
    assert moefix(kept, "export", "--card", "4090", "--as", "sglang", "--out", "-").returncode == 2
    # From one file to another form, without the data folder's help.
    source = next(path for path, one in kept_artefacts(kept)[0] if one.environment.card == RTX_4090.name)
    again = moefix(tmp_path / "empty", "export", "--file", str(source), "--as", "vllm", "--out", str(tmp_path / "v"))
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (tmp_path / "v").iterdir()] == [
        "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090.json"
    ]
    assert "nothing was measured in vLLM" in again.stderr


# --- as files that are read ------------------------------------------------------------------------------------------


def test_the_plain_pair(artefact, tmp_path):
    written = write_sglang(artefact, tmp_path)
    assert [path.name for path in written.paths] == [artefact.gate_up_file, artefact.down_file]
    assert {path.name for path in tmp_path.iterdir()} == {artefact.gate_up_file, artefact.down_file}
    pair = TunedFiles.of(artefact)
    assert [path.read_bytes() for path in written.paths] == [*map(render_table, pair.tables)]
    assert "configs/triton_3_6_0" in written.notes[0]


def test_vllms_file(artefact, tmp_path):
    (path,) = write_vllm(artefact, tmp_path).paths
    table = parse_table(path.read_bytes())
    assert table == {row.batch: row.gate_up for row in artefact.rows}
    # vLLM makes every key a number, and passes every part of a row to its kernel.
    rows = json.loads(path.read_text())
    wanted = {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"}
    assert all(key.isdecimal() and set(row) == wanted for key, row in rows.items())


def test_a_config_dir_is_read_by_sglangs_own_rule(artefact, tree, tmp_path, monkeypatch):
    written = write_config_dir(artefact, tmp_path / "dir", tree)
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / "dir"))
    there = replace(tree)  # a tree that reads the variable anew
    lookup = there.lookup(artefact.workload, RTX_4090)
    assert (lookup.gate_up_path, lookup.down_path) == written.paths
    shipped = {path.relative_to(tree.shipped_configs) for path in tree.shipped_configs.glob("triton_*/*.json")}
    copied = {path.relative_to(tmp_path / "dir" / "configs") for path in (tmp_path / "dir").rglob("*.json")}
    assert shipped < copied
    assert len(copied) == len(shipped) + 2
    assert not any(path.is_symlink() for path in (tmp_path / "dir").rglob("*"))
    assert f"{len(shipped)} files of SGLang 0.5.17" in written.notes[0]


def test_a_config_dir_without_the_shipped_files_says_so(artefact, tmp_path):
    assert "NOT in it" in write_config_dir(artefact, tmp_path, None).notes[0]


FORMS = {
    "artefact": lambda artefact, folder, tree, home: write_artefact(artefact, folder / "a.json", home),
    "sglang": lambda artefact, folder, tree, home: write_sglang(artefact, folder, home),
    "vllm": lambda artefact, folder, tree, home: write_vllm(artefact, folder, home),
    "config-dir": write_config_dir,
}


@pytest.mark.parametrize("form", FORMS)
def test_an_export_keeps_what_another_wrote_under_that_name(artefact, tree, tmp_path, form):
    folder, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    first = FORMS[form](artefact, folder, tree, None)
    names = {path for path in folder.rglob("*") if path.is_file()}
    assert not any("kept as" in note for note in first.notes)
    assert FORMS[form](artefact, folder, tree, None) == first  # the same once more: nothing to keep
    for number, end in ((1, ""), (2, "-2")):
        first.paths[0].write_text(f"mine {number}")
        notes = FORMS[form](artefact, folder, tree, home).notes
        copy = first.paths[0].with_name(f"{first.paths[0].name}.before-moefix{end}")
        assert copy.read_text() == f"mine {number}"
        assert f"the {first.paths[0].name} that was there is kept as {copy.name}" in notes
        names.add(copy)
    # What moefix wrote itself, and remembers, is replaced.
    other = replace(artefact, rows=artefact.rows[:-1])
    assert not any("kept as" in note for note in FORMS[form](other, folder, tree, home).notes)
    assert {path for path in folder.rglob("*") if path.is_file()} == names


def test_an_export_that_cannot_keep_what_is_there_changes_nothing(artefact, tmp_path):
    (tmp_path / artefact.gate_up_file).write_text("mine")
    (tmp_path / artefact.down_file).write_text("mine too")
    for end in ("", *(f"-{number}" for number in range(2, 100))):
        (tmp_path / f"{artefact.down_file}.before-moefix{end}").write_text(end)
    with pytest.raises(StoreError, match="99 copies"):
        write_sglang(artefact, tmp_path)
    assert (tmp_path / artefact.gate_up_file).read_text() == "mine"
    assert (tmp_path / artefact.down_file).read_text() == "mine too"


def forged(artefact, path, **changes):
    """A file as another's hand would write it, with a checksum that is right."""
    body = {name: value for name, value in json.loads(artefact.to_json()).items() if name != "checksum"}
    for name, value in changes.items():
        inner, _, key = name.rpartition("__")
        (body[inner] if inner else body)[key] = value
    path.write_text(json.dumps({**body, "checksum": _checksum(body)}))
    return str(path)


@pytest.mark.parametrize("form", ["vllm", "sglang", "config-dir"])
@pytest.mark.parametrize(
    "changes",
    [
        {"environment__card": "x/../../victim/config"},
        {"environment__triton": "../../victim"},
        {"gate_up_file": "package.json"},
        {"gate_up_file": "../victim/config.json"},
    ],
)
def test_a_forged_artefact_writes_nothing_anywhere(artefact, tree, tmp_path, form, changes):
    source = forged(artefact, tmp_path / "v.json", **changes)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "config.json").write_text("mine")
    arguments = ("--file", source, "--as", form, "--sglang-root", str(tree.package), "--out", str(tmp_path / "o"))
    result = moefix(tmp_path / "home", "export", *arguments)
    assert result.returncode == 2, result.stderr
    assert "damaged one" in result.stderr
    assert (tmp_path / "victim" / "config.json").read_text() == "mine"
    assert not (tmp_path / "o").exists()


def test_another_layers_names_are_not_imported(artefact, tree, models, tmp_path):
    other = artefact_of(tree, ("--model", str(models[FP8])), RTX_4090)
    names = {"gate_up_file": artefact.gate_up_file, "down_file": artefact.down_file}
    result = moefix(tmp_path / "home", "import", forged(other, tmp_path / "v.json", **names))
    assert result.returncode == 2
    assert f"it names the file {artefact.gate_up_file}, and its layer's is {other.gate_up_file}" in result.stderr
    assert not list((tmp_path / "home").glob("artefacts/*/*"))


def test_a_tree_that_names_the_layer_otherwise_gets_no_files(tree, models):
    scaled = artefact_of(tree, ("--model", str(models[FP8])), RTX_4090)
    workload = replace(scaled.workload, block_shape=None, per_channel_quant=True)
    with_channel = renamed(scaled, workload=workload)
    check_names(with_channel, tree)
    up, down = pairs_of_names(workload, scaled.environment.card)[1]  # as 0.4.9 names them
    with pytest.raises(SGLangError, match="asks for E=128"):
        check_names(replace(with_channel, files=(up, down), rows=with_channel.rows[:1]), tree)


def test_which_tree_a_config_dir_is_made_from(tree, tmp_path, moefix_home):
    said = []
    assert tree_of("0.5.17", None, moefix_home / "cache", said.append).version == "0.5.17"
    assert tree_of("0.5.19", None, tmp_path, said.append) is None
    assert "0.5.19" in said[0]
    with pytest.raises(SGLangError, match=r"is 0\.5\.17, and the artefact is of 0\.5\.23"):
        tree_of("0.5.23", tree.package, tmp_path, said.append)


# --- into a tree -----------------------------------------------------------------------------------------------------


def test_import_installs_into_the_tree_it_was_tuned_for_only(artefact, tree, tmp_path):
    package = tmp_path / "sglang"
    shutil.copytree(tree.package, package)
    write_artefact(artefact, tmp_path / "a.json")
    arguments = ("import", "--install", "--sglang-root", str(package), str(tmp_path / "a.json"))
    result = moefix(tmp_path / "home", *arguments)
    assert result.returncode == 0, result.stderr
    lookup = tree_at(package).lookup(artefact.workload, RTX_4090)
    assert parse_table(lookup.gate_up_path.read_bytes()) == TunedFiles.of(artefact).tables[0]
    assert parse_table(lookup.down_path.read_bytes()) == TunedFiles.of(artefact).tables[1]
    write_artefact(replace(artefact, environment=replace(artefact.environment, triton="3.5.1")), tmp_path / "a.json")
    result = moefix(tmp_path / "home", *arguments)
    assert result.returncode == 5
    assert "Triton 3.5.1, and here is SGLang 0.5.17 with Triton 3.6.0" in result.stderr
    with pytest.raises(SGLangError, match="another kernel"):
        install_in(
            tree_at(package), replace(artefact, environment=replace(artefact.environment, kernel_hash="0")), tmp_path
        )
    with pytest.raises(SGLangError):
        install_in(tree_at(package), artefacts_in(tmp_path / "a.json")[0], tmp_path)


@pytest.mark.parametrize("claims", [101376, 232448])
def test_import_does_not_install_what_the_card_cannot_run(artefact, tree, tmp_path, claims):
    package = tmp_path / "sglang"
    shutil.copytree(tree.package, package)
    before = set(package.rglob("*.json"))
    large = Tile(128, 128, 64, 8, 8, 5)  # 131072 bytes: more than this card has, less than the second claim
    rows = (*artefact.rows[:-1], replace(artefact.rows[-1], tiles=RowTiles(large, large)))
    forged = replace(artefact, rows=rows, environment=replace(artefact.environment, shared_memory=claims))
    write_artefact(forged, tmp_path / "a.json")
    arguments = ("import", "--install", "--sglang-root", str(package), str(tmp_path / "a.json"))
    result = moefix(tmp_path / "home", *arguments)
    assert result.returncode == 2
    assert "bytes of shared memory a block, and the card has 101376" in result.stderr
    assert set(package.rglob("*.json")) == before
    assert not list((tmp_path / "home").glob("artefacts/*/*"))


# --- of a plan -------------------------------------------------------------------------------------------------------


def test_a_plan_as_an_artefact_says_that_nothing_was_measured(tree, tmp_path):
    named = ("--for", "4090", "--model", "Qwen3-30B-A3B", "--sglang-root", str(tree.package))
    result = moefix(tmp_path, "export", *named, "--out", "-")
    assert result.returncode == 0, result.stderr
    (artefact,) = read_artefacts(result.stdout.encode())
    assert not artefact.measured
    assert artefact.environment == replace(environment_of(tree, RTX_4090), driver="")
    # It holds for any driver, since none ran it; and for nothing else.
    save_artefact(tmp_path / "other", artefact)
    here = environment_of(tree, replace(RTX_4090, driver="999.1"))
    assert find_artefact(tmp_path / "other", here, artefact.workload).artefact == artefact
    for change, part in (
        ({"card": "x"}, "card"),
        ({"shared_memory": 1}, "shared memory limit"),
        ({"triton": "3"}, "Triton"),
    ):
        mismatch = find_artefact(tmp_path / "other", replace(here, **change), artefact.workload).mismatch
        assert mismatch.parts == (part,)
    imported = moefix(tmp_path / "other", "import", str(next((tmp_path / "other").glob("artefacts/*/*.json"))))
    assert "not measured" in imported.stderr


def test_a_measured_artefact_comes_before_a_planned_one(tree, model, tmp_path):
    argv = ("--model", str(model))
    planned, measured = artefact_of(tree, argv, RTX_4090, measured=False), artefact_of(tree, argv, RTX_4090)
    here = environment_of(tree, RTX_4090)
    save_artefact(tmp_path, planned)
    assert find_artefact(tmp_path, here, planned.workload).artefact == planned
    save_artefact(tmp_path, measured)
    assert find_artefact(tmp_path, here, planned.workload).artefact == measured


def test_there_is_no_artefact_of_a_plan_without_files(trees, models):
    flags = parse_flags(("--model", str(models["qwen3_8b_bf16_4090"])))
    for version in ("0.5.17", "0.4.9"):
        name = "qwen3_8b_bf16_4090" if version == "0.5.17" else "q3_30b_bf16_tp1_h100"
        plan = make_plan(load_model(str(models[name]), flags), flags, find_card("RTX 4090"), trees[version])
        with pytest.raises(UsageError):
            planned_artefact(plan, environment_of(trees[version], RTX_4090))
