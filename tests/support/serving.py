"""A machine to serve on: a venv-like site with SGLang's tree, a stand-in driver and a stand-in launcher."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fixer.artefacts.artefact import Artefact, Decision
from fixer.artefacts.environment import environment_of
from fixer.artefacts.shelf import save_artefact
from fixer.base.files import utc_now
from fixer.machine.cards import Card
from fixer.model.config import load_model
from fixer.model.rules.decide import decide
from fixer.model.rules.ladder import ladder
from fixer.sglang.find_tree import tree_at
from fixer.sglang.flags import parse_flags
from fixer.sglang.tuning_files import render_table
from fixer.workload import Tile
from tests.support import fakes
from tests.support.fake_driver import build_driver
from tests.support.moe_rows import moe_row

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
        lookup = tree.lookup(decision.workload, replace(H100, name=environment.get("card", H100.name)))
        rows = ladder(flags, H100, tree.version, decision.workload)
        choices = tuple(
            moe_row(row, *((SMALL, SMALL) if row < 64 else (LARGE, LARGE)), Decision.TUNED, 9.0, 8.0, 12.0, 11.0, 0.001)
            for row in rows
        )
        artefact = Artefact(
            environment=replace(environment_of(tree, H100), **environment),
            model="small",
            revision="",
            workload=decision.workload,
            files=(lookup.gate_up, lookup.down),
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


def artefact_of(machine, **changes):
    """A kept artefact for a layer like the model's with something else about it."""
    artefact = machine.artefact()
    workload = replace(artefact.workload, **changes)
    tree = tree_at(machine.package)
    lookup = tree.lookup(workload, H100)
    other = replace(artefact, workload=workload, files=lookup.names)
    save_artefact(machine.home, other)
    return artefact, other
