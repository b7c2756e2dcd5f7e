"""A machine whose card can be measured, with stand-ins for card and driver, and with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixer.artefacts.artefact import Artefact
from tests.support import fakes
from tests.support.lookup_cases import CASES
from tests.support.serving import Machine

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TOKEN = "hf_this_is_a_secret_0123456789"


class TuningMachine(Machine):
    """A machine whose card can be measured: synthetic times, and kernels that count as compiled at once."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.log = self.site.parent / "log"
        self.env["PYTHONPATH"] = os.pathsep.join(map(str, (self.site, TESTS, ROOT)))
        self.env |= {fakes.INSTANT: "1", fakes.LOG: str(self.log), "HF_TOKEN": TOKEN}

    def start(self, *arguments, **options):
        if options.pop("real", False):
            return super().start(*arguments, **options)
        command = [sys.executable, str(TESTS / "support" / "fake_entry.py"), *(arguments or self.flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environ = self.env | options.pop("env", {})
        return subprocess.Popen(command, env=environ, cwd=self.site.parent, **pipes, **options)

    def run(self, *arguments, **options):
        result = super().run(*arguments, **options)
        assert "Traceback" not in result.err, result.err
        assert TOKEN not in result.err + result.out
        return result

    def kept(self) -> dict | None:
        """What the one kept artefact chooses, None where there is none."""
        paths = list(self.home.glob("artefacts/*/*.json"))
        assert len(paths) <= 1
        return fakes.choices(Artefact.from_json(paths[0].read_bytes())) if paths else None

    def processes(self) -> set[int]:
        """All that belong to this machine."""
        return fakes.processes_with("RECORD", str(self.record))

    def timed(self) -> int:
        return len(fakes.logged(self.log, "time"))


@pytest.fixture
def machine(tmp_path, trees, driver, models, compiled):
    return TuningMachine(tmp_path, trees["0.5.17"].package, driver, models, compiled)


def model_folders(factory):
    root, folders = factory.mktemp("models"), {}
    for case in CASES:
        if case["id"] in ("q3_30b_bf16_tp1_h100", "qwen3_8b_bf16_4090"):
            folders[case["id"]] = root / case["id"]
            folders[case["id"]].mkdir()
            (folders[case["id"]] / "config.json").write_text(json.dumps(case["config"]))
    return folders


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, trees, driver, compiled):
    """What a tuning chooses that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    machine = TuningMachine(folder, trees["0.5.17"].package, driver, model_folders(tmp_path_factory), compiled)
    result = machine.run()
    assert result.served, result.err

    return machine.kept()
