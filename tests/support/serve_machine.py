"""A machine for `moefix bench --serve`: its SGLang is the stand-in server."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from tests.support import fakes
from tests.support.serving import SMALL, Machine, Result

LOADS = "1:8:4:3,4:8:6:8,1:32:1:6"


class ServeMachine(Machine):
    """A machine whose SGLang is the stand-in server."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        shutil.copy(Path(__file__).with_name("fake_server.py"), self.package / "launch_server.py")
        (self.package / "__init__.py").write_text("")
        self.flags = ("--model", str(self.model), "--load-format", "dummy", "--skip-tokenizer-init")

    def tuned(self, **environment):
        """A kept artefact, and the environment for the server that looks for its files."""
        artefact = self.artefact(**environment)
        self.env["FAKE_FILES"] = f"{artefact.gate_up_file}|{artefact.down_file}"
        self.steps(none=0.01, **{str(SMALL.block_m): 0.01})
        return artefact

    def steps(self, **steps: float) -> None:
        """Seconds a token, by what the server finds."""
        self.env["FAKE_STEPS"] = json.dumps({key.removeprefix("m"): step for key, step in steps.items()})

    def fault(self, **faults: str) -> None:
        self.env["FAKE_FAULT"] = json.dumps({key.removeprefix("m"): fault for key, fault in faults.items()})

    def bench(self, *arguments: str, **options):
        """Run the command; the result is its JSON."""
        words = ("bench", "--serve", "--json", "--loads", LOADS, "--passes", "2", *arguments, *self.flags)
        result = self.run(*words, **options)
        return result, json.loads(result.out) if result.out.startswith(("{", "[")) else None

    @property
    def records(self) -> list[dict]:
        """What each start of the server wrote."""
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def run(self, *arguments: str, **options):
        self.record.unlink(missing_ok=True)
        began = time.time()
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err, process.pid, time.time() - began, None)

    @property
    def processes(self) -> set[int]:
        return fakes.processes_with("RECORD", str(self.record))
