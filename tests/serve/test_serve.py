"""From the command line to the server, through entrypoint.py, with a stand-in for SGLang and for the CUDA driver."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fixer.artefacts.artefact import Artefact, Decision, RowChoice
from fixer.artefacts.environment import environment_of
from fixer.artefacts.shelf import artefact_path, save_artefact
from fixer.base.files import utc_now
from fixer.machine.cards import Card
from fixer.model.config import load_model
from fixer.model.rules.decide import decide
from fixer.model.rules.ladder import ladder
from fixer.serve.find_or_tune import verdict
from fixer.sglang.find_tree import tree_at
from fixer.sglang.flags import parse_flags
from fixer.sglang.tuning_files import render_table
from fixer.workload import Tile
from tests.support import fakes
from tests.support.fake_driver import build_driver

ROOT = Path(__file__).resolve().parents[2]
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 81559, 0, "580.159.03")
SERVER = """
import json, os, sys, time
record = {"at": time.time(), "argv": sys.argv[1:], "pid": os.getpid(), "env": dict(os.environ)}
with open(os.environ["RECORD"], "w") as file:
    json.dump(record, file)
print("the server is here", flush=True)
sys.exit(41)
"""
SMALL, LARGE = Tile(16, 64, 128, 1, 4, 4), Tile(64, 128, 64, 16, 8, 3)
FOLDER = "srt/layers/moe/moe_runner/triton_utils/configs/triton_3_6_0"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def no_write_as_root():
    """For `preexec_fn`: root in the child obeys modes as everybody else does."""

    def give_up() -> None:
        if os.geteuid() == 0:
            for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, out of the bounding set
                if ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) != 0:
                    raise OSError("capabilities cannot be given up here")

    return give_up


@dataclass
class Result:
    """What one start came to."""

    code: int
    out: str
    err: str
    pid: int
    seconds: float
    record: dict | None

    @property
    def served(self) -> bool:
        """Whether the server started, in moefix's place, and its exit code was the process's."""
        return self.record is not None and self.code == 41 and self.record["pid"] == self.pid


class Machine:
    """An SGLang, a driver with an H100, a model, a data folder."""

    def __init__(self, folder: Path, package: Path, driver: Path, models: dict[str, Path], compiled: Path) -> None:
        self.site = folder / "site"
        self.package = self.site / "sglang"
        shutil.copytree(package, self.package)
        (self.package / "__init__.py").write_text("import sys\nassert sys.argv[0] == '-m', 'imported by moefix'\n")
        (self.package / "launch_server.py").write_text(SERVER)
        fakes.stub_torch(self.site)
        self.home, self.record = folder / "home", folder / "record"
        self.home.mkdir()
        (self.home / "compiled.sqlite").symlink_to(compiled / "compiled.sqlite")
        self.model = folder / "model"
        self.model.mkdir()
        config = json.loads((models["q3_30b_bf16_tp1_h100"] / "config.json").read_text())
        sizes = {"num_experts": 8, "moe_intermediate_size": 64, "hidden_size": 128, "num_experts_per_tok": 2}
        (self.model / "config.json").write_text(json.dumps(config | sizes))
        self.dense = models["qwen3_8b_bf16_4090"]
        self.flags = ("--model", str(self.model), "--port", "31000", "--load-format", "dummy")
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "MOEFIX_", "FAKE_"))},
            "PYTHONPATH": str(self.site),
            "LD_LIBRARY_PATH": str(driver),
            "CUDA_VISIBLE_DEVICES": "1",
            "MOEFIX_HOME": str(self.home),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "RECORD": str(self.record),
        }
        self.env.pop("SGLANG_MOE_CONFIG_DIR", None)

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        environ = self.env | options.pop("env", {})
        command = [sys.executable, str(ROOT / "entrypoint.py"), *(arguments or self.flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environ, cwd=self.site.parent, **pipes, **options)

    def run(self, *arguments: str, **options) -> Result:
        self.record.unlink(missing_ok=True)
        began = time.time()
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        record = json.loads(self.record.read_text()) if self.record.exists() else None
        seconds = (record["at"] if record else time.time()) - began
        return Result(process.returncode, out, err, process.pid, seconds, record)

    def artefact(self, **environment) -> Artefact:
        """A kept artefact for this machine; keywords change its environment."""
        tree, flags = tree_at(self.package), parse_flags(self.flags)
        decision = decide(load_model("", flags), flags, H100, tree.version)
        lookup = tree.lookup(decision.workload, H100)
        rows = ladder(flags, H100, tree.version, decision.workload)
        choices = tuple(
            RowChoice(
                row, *((SMALL, SMALL) if row < 64 else (LARGE, LARGE)), Decision.TUNED, 9.0, 8.0, 12.0, 11.0, 0.001
            )
            for row in rows
        )
        artefact = Artefact(
            environment=replace(environment_of(tree, H100), **environment),
            model="small",
            revision="",
            workload=decision.workload,
            gate_up_file=lookup.gate_up,
            down_file=lookup.down,
            rows=choices,
            created=utc_now(),
            seconds=30.0,
            measured=True,
        )
        save_artefact(self.home, artefact)
        return artefact

    def kept(self) -> list[tuple[str, int]]:
        """Every JSON file in the data folder that outlives a start, with its time of change."""
        paths = (path for path in self.home.rglob("*.json") if path.parent.name != "run")
        return sorted((str(path), path.stat().st_mtime_ns) for path in paths)

    def files(self) -> dict[str, tuple[bytes, int]]:
        """Every file in SGLang's tree, with content and time of change."""
        return {
            str(path.relative_to(self.package)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in self.package.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What plans compiled, for all tests of this file."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def machine(tmp_path, trees, driver, models, compiled):
    return Machine(tmp_path, trees["0.5.17"].package, driver, models, compiled)


def installed(machine, artefact, folder=None):
    """Both files are there, to the letter."""
    folder = folder or machine.package / FOLDER
    tables = {
        artefact.gate_up_file: {row.batch: row.gate_up for row in artefact.rows},
        artefact.down_file: {row.batch: row.down for row in artefact.rows},
    }
    return all((folder / name).read_bytes() == render_table(table) for name, table in tables.items())


# --- with a kept artefact --------------------------------------------------------------------------------------------


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
    assert verdict(machine.artefact(), 2.0).endswith("; 50.0 % less time on average")


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
