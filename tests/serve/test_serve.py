"""From the command line to the server, through entrypoint.py, with a stand-in for SGLang and for the CUDA driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.shelf import artefact_path
from fixer.serve.find_or_tune import verdict
from fixer.sglang.tuning_files import render_table
from tests.support import fakes
from tests.support.serving import FOLDER, LARGE, ROOT, SMALL, installed

# --- with a kept artefact --------------------------------------------------------------------------------------------


def test_tune_with_nothing_to_measure_says_so_installs_and_stops(machine):
    """27 s before: everything was started, timed and compared once more though nothing had changed."""
    artefact = machine.artefact()
    result = machine.run("tune", *machine.flags, "--json")
    assert result.code == 0, result.err
    assert f"tuned before on {artefact.created}: nothing to measure; --fresh measures anew" in result.err
    assert "search" not in result.err
    assert installed(machine, artefact)
    assert Artefact.from_json(result.out) == artefact
    assert not (machine.home / "journal.sqlite").exists()
    fresh = machine.run("tune", "--fresh", *machine.flags)
    assert fresh.code == 8  # it begins to measure, and this machine's PyTorch cannot
    assert "nothing to measure" not in fresh.err


def test_kept_installed_served(machine):
    artefact, before = machine.artefact(), machine.files()
    result = machine.run()
    assert result.served, result.err
    assert result.record["argv"] == list(machine.flags)
    assert result.out == "the server is here\n"
    assert installed(machine, artefact)
    folder = machine.package / FOLDER
    assert json.loads((folder / artefact.gate_up_file).read_text())["1"] == SMALL.to_json()
    after = machine.files()
    changed = {name for name in after if after[name] != before.get(name)}
    pair = {f"{FOLDER}/{artefact.gate_up_file}", f"{FOLDER}/{artefact.down_file}"}
    # The two empty files say that there was nothing before.
    assert changed == pair | {name + ".before-moefix" for name in pair}
    assert set(before) <= set(after)
    assert "SGLANG_MOE_CONFIG_DIR" not in result.record["env"]
    assert {name: result.record["env"][name] for name in machine.env} == machine.env
    assert "nothing to measure" in result.err
    assert artefact.gate_up_file in result.err
    assert "Traceback" not in result.err


def test_a_second_start_writes_nothing_and_is_quick(machine):
    machine.artefact()
    machine.run()
    tree, home = machine.files(), machine.kept()
    results = [machine.run() for _ in range(2)]
    assert all(result.served for result in results)
    assert machine.files() == tree
    assert machine.kept() == home
    assert min(result.seconds for result in results) < 2, results


def test_moefixs_own_flags_do_not_reach_the_server(machine):
    machine.artefact()
    own = ("--moefix-quiet", "--moefix-smem-limit=232448", "--moefix-home", str(machine.home))
    result = machine.run(*machine.flags, *own, "--log-level", "info")
    assert result.served, result.err
    assert result.record["argv"] == [*machine.flags, "--log-level", "info"]
    assert result.err == ""


def test_model_path_is_the_same_option(machine):
    artefact = machine.artefact()
    flags = ("--model-path=" + str(machine.model), "--tp=1")
    result = machine.run(*flags)
    assert result.served, result.err
    assert result.record["argv"] == list(flags)
    assert installed(machine, artefact)


def test_command_lines_as_people_have_them(machine):
    machine.artefact()
    flags = machine.flags[2:]
    for words in (
        ("serve", str(machine.model)),
        ("sglang", "serve", str(machine.model)),
        ("python3", "-m", "sglang.launch_server", "--model-path", str(machine.model)),
        (str(machine.model),),
    ):
        result = machine.run(*words, *flags, "--moefix-skip-tune")
        assert result.served, result.err
        assert result.record["argv"] == ["--model-path", str(machine.model), *flags]


def test_a_mistyped_flag_is_named_before_anything_else(machine):
    result = machine.run(*machine.flags, "--tpp", "2", env={"CUDA_VISIBLE_DEVICES": ""})
    assert (result.code, result.record) == (2, None)
    assert "SGLang has no flag '--tpp'" in result.err
    assert "Did you mean --tp-size?" in result.err
    machine.model.rename(machine.model.with_name("other"))
    assert "'--tpp'" in machine.run(*machine.flags, "--tpp", "2").err


def test_an_unreadable_list_of_flags_keeps_nobody_from_serving(machine):
    (machine.package / "srt" / "server_args.py").write_text("def add_cli_args(")
    machine.artefact()
    result = machine.run(*machine.flags, "--a-flag-of-tomorrow", "2", "--moefix-skip-tune")
    assert result.served, result.err
    assert "not checked, since this SGLang's list of flags cannot be read: --a-flag-of-tomorrow" in result.err


def test_dry_run_installs_and_does_not_serve(machine):
    artefact = machine.artefact()
    result = machine.run(*machine.flags, "--moefix-dry-run")
    assert (result.code, result.record) == (0, None)
    assert installed(machine, artefact)
    assert "dry run: no weights were fetched, SGLang was not asked, and the server is not started" in result.err


def test_what_was_there_before_is_kept(machine):
    artefact = machine.artefact()
    old = render_table({8: LARGE})
    machine.package.joinpath(FOLDER).mkdir(parents=True, exist_ok=True)
    (machine.package / FOLDER / artefact.gate_up_file).write_bytes(old)
    result = machine.run()
    assert result.served
    assert installed(machine, artefact)
    assert (machine.package / FOLDER / (artefact.gate_up_file + ".before-moefix")).read_bytes() == old
    assert "before-moefix" in result.err


def test_a_read_only_tree_gets_an_overlay(machine, no_write_as_root):
    artefact = machine.artefact()
    tree = machine.files()
    closed = [machine.package, *(path for path in machine.package.rglob("*") if path.is_dir())]
    for folder in closed:
        folder.chmod(0o555)
    try:
        results = [machine.run(preexec_fn=no_write_as_root) for _ in range(2)]
    finally:
        for folder in closed:
            folder.chmod(0o755)
    assert machine.files() == tree
    for result in results:
        assert result.served, result.err
        overlay = Path(result.record["env"]["SGLANG_MOE_CONFIG_DIR"])
        assert machine.home in overlay.parents
        assert installed(machine, artefact, overlay / "configs" / "triton_3_6_0")
        assert result.record["argv"] == list(machine.flags)
    shipped = {path.name for path in (machine.package / FOLDER).parent.glob("triton_*")}
    assert shipped <= {path.name for path in (overlay / "configs").iterdir()}


# --- without one that holds ------------------------------------------------------------------------------------------


def test_skip_tune_serves_with_sglangs_own(machine):
    tree = machine.files()
    result = machine.run(*machine.flags, "--moefix-skip-tune")
    assert result.served, result.err
    assert result.record["argv"] == list(machine.flags)
    assert machine.files() == tree


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"triton": "3.5.1"}, "Triton was 3.5.1, is 3.6.0"),
        ({"sglang": "0.5.16"}, "SGLang was 0.5.16, is 0.5.17"),
        ({"card": "NVIDIA H200"}, "card was NVIDIA H200, is NVIDIA H100 80GB HBM3"),
        ({"driver": "570.1"}, "driver was 570, is 580"),
        ({"kernel_hash": "cd" * 32}, "kernel source was cdcdcdcdcdcd, is "),
    ],
)
def test_an_artefact_of_another_environment_is_not_used(machine, change, said):
    machine.artefact(**change)
    tree = machine.files()
    result = machine.run(*machine.flags, "--moefix-skip-tune")
    assert result.served
    assert said in result.err
    assert machine.files() == tree


def test_a_newer_driver_of_the_same_major_version_changes_nothing(machine):
    artefact = machine.artefact(driver="580.1", moefix="0.0.1")
    assert machine.run(*machine.flags).served
    assert installed(machine, artefact)


def test_a_damaged_artefact_is_set_aside_and_reported(machine):
    artefact = machine.artefact()
    path = artefact_path(machine.home, artefact.environment, artefact.workload)
    damaged = path.read_text().replace('"num_stages": 4', '"num_stages": 5', 1)
    path.write_text(damaged)
    tree = machine.files()
    result = machine.run(*machine.flags, "--moefix-skip-tune", "--moefix-quiet")
    assert result.served
    assert machine.files() == tree
    assert "checksum" in result.err
    assert not path.exists()
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.read_text() == damaged
    assert aside.name in result.err


def test_a_dense_model_goes_straight_to_the_server(machine):
    tree = machine.files()
    result = machine.run("--model", str(machine.dense))
    assert result.served, result.err
    assert result.record["argv"] == ["--model", str(machine.dense)]
    assert machine.files() == tree
    assert "nothing to tune" in result.err
    assert result.seconds < 2


@pytest.mark.parametrize("torch", ["stand-in", "real"])
def test_a_failing_tuning_is_a_warning_and_the_server_starts(machine, torch):
    if torch == "real":  # it has no card here; the driver's stand-in may even make it crash
        shutil.rmtree(machine.site / "torch")
    result = machine.run()
    assert result.served, result.err
    assert result.record["argv"] == list(machine.flags)
    assert "serving with SGLang's own configuration, which fits this card" in result.err
    assert "measuring process" in result.err
    assert fakes.eventually(lambda: fakes.processes_with("RECORD", str(machine.record)) == set())


def test_a_failing_tuning_where_sglangs_own_does_not_fit(machine):
    result = machine.run(*machine.flags, "--moefix-smem-limit=16000")
    assert result.served, result.err
    pair = sorted((machine.package / FOLDER).glob("E=8,N=64,*HBM3*.json"))
    assert [path.name.endswith("_down.json") for path in pair] == [False, True]
    assert "was not measured" in result.err
    assert not list(machine.home.glob("artefacts/*/*"))  # nothing that a later start would take for tuned


def test_strict_makes_a_failing_tuning_an_error(machine):
    tree = machine.files()
    result = machine.run(*machine.flags, "--moefix-strict")
    assert result.code == 8
    assert result.record is None
    assert "measuring process" in result.err
    assert "Traceback" not in result.err
    assert machine.files() == tree


def test_no_card_is_a_clear_error(machine):
    result = machine.run(env={"CUDA_VISIBLE_DEVICES": ""})
    assert (result.code, result.record) == (4, None)
    assert "Traceback" not in result.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_tuning_ends_all_of_it(machine, number):
    process = machine.start(env={"FAKE_TORCH": "slow"})
    assert fakes.eventually(lambda: len(fakes.descendants(process.pid)) >= 3, 30)  # it measures, or is about to
    time.sleep(1)
    assert process.poll() is None
    everything = {process.pid} | fakes.descendants(process.pid)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert process.returncode == (143 if number == signal.SIGTERM else 130), err
    assert "Traceback" not in err
    assert fakes.eventually(lambda: not (fakes.processes_with("RECORD", str(machine.record)) & everything), 2)
    assert not machine.record.exists()
    # The next start goes on as if nothing had been.
    assert machine.run(*machine.flags, "--moefix-skip-tune").served


def test_the_verdict_counts_time_saved(machine):
    assert verdict(machine.artefact(), 2.0).endswith("; 50.0 % less time in the MoE layer on average")


# --- nobody listens --------------------------------------------------------------------------------------------------


def start_unheard(machine, how, *flags, entry=None):
    """With a standard error that nobody reads, that is on a full disk, or that is closed."""
    command = [sys.executable, str(entry or ROOT / "entrypoint.py"), *machine.flags, *flags]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        stderr = {"gone": writer, "full": full, "closed": None}[how]
        process = subprocess.Popen(command, env=machine.env, cwd=machine.site.parent, stderr=stderr)
    os.close(writer)
    return process


@pytest.mark.parametrize("how", ["gone", "full", "closed"])
@pytest.mark.parametrize("flags", [(), ("--moefix-skip-tune", "--moefix-smem-limit=16000")])
def test_a_server_starts_though_nobody_hears_moefix(machine, how, flags):
    artefact = machine.artefact()
    process = start_unheard(machine, how, *flags)
    assert process.wait(120) == 41
    assert json.loads(machine.record.read_text())["argv"] == list(machine.flags)
    assert flags or installed(machine, artefact)
