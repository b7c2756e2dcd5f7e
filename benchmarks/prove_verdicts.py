"""Prove on a machine with a card, with the real server, that moefix says truly which files SGLang took.

    python benchmarks/prove_verdicts.py --model FOLDER --out FOLDER [--dense FOLDER] [--only taken,repaired] [-- FLAGS]

Scenarios, in this order, on one data folder (--home, which should be empty at first):

taken      an ordinary start: both files picked up. Tunes, if nothing is kept.
repaired   two starts. A record says that SGLang asked for a file of another number format, so moefix installs a wrongly
           named pair: SGLang asks for another file, which is kept. The next start repairs it: both picked up.
never      --never-flags (deterministic inference): SGLang looks nothing up, and the verdict says what runs.
dense      --dense FOLDER: a model without experts.
asked      another data folder, --moefix-ask: SGLang is asked first; then both files are picked up.

Needs `taken` once, for the tuning that the later ones start from. A server is killed as soon as its verdict is there.
Removes the pair of the model from SGLang's tree before `repaired` and `asked`: run it on a tree that may be changed.
Writes OUT/verdicts.json and a log for each start; exits 1 where a scenario did not go as it should.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.environment import environment_of
from fixer.artefacts.shelf import find_artefact, save_artefact
from fixer.base.files import utc_now
from fixer.serve.asked import Asked, find, keep
from fixer.serve.asked_question import question_of
from fixer.serve.options import split_flags
from fixer.serve.situation import Situation, look_around
from fixer.sglang.flags import parse_flags
from fixer.workload import NumberFormat

VERDICT = re.compile(
    r"^moefix: (SGLang (?:picked up|asked for another|never looked|looked for|runs without|ended).*)", re.M
)
"""Needs a megabyte of shared memory."""

ScenarioResult = tuple[list[dict[str, Any]], list[str]]


class Prover:
    """What the scenarios share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.home: Path = options.home
        self.flags = ("--host", "127.0.0.1", "--port", str(options.port), *options.flags)
        self.words = ("--model", options.model, *self.flags)

    def situation(self) -> Situation:
        return look_around(split_flags(self.words)[1], home=self.home)

    def artefact(self) -> Artefact:
        here = self.situation()
        found = find_artefact(self.home, environment_of(here.tree, here.first.card), self.workload(here))
        if found.artefact is None:
            raise SystemExit("there is no kept tuning of this model: run the scenario `taken` first")
        return found.artefact

    def workload(self, here: Situation) -> Any:
        workload = here.first.decision.workload
        if workload is None:
            raise SystemExit(f"SGLang looks for no file of this model: {here.first.decision.reason}")
        return workload

    def wrong(self) -> Artefact:
        """The kept tuning under the name of another number format."""
        here, artefact = self.situation(), self.artefact()
        formats = (NumberFormat.INT8_W8A8, NumberFormat.FP8_W8A8)
        tuned = self.workload(here)
        number_format = next(each for each in formats if each is not tuned.number_format)
        workload = replace(tuned, number_format=number_format)
        lookup = here.tree.lookup(workload, here.first.card)
        return replace(artefact, workload=workload, files=lookup.names)

    def forget_pair(self) -> None:
        """Have SGLang's tree as if this model had never been tuned."""
        here, artefact = self.situation(), self.artefact()
        for name in (artefact.gate_up_file, artefact.down_file):
            for path in (here.tree.triton_folder / name, here.tree.triton_folder / f"{name}.before-moefix"):
                path.unlink(missing_ok=True)

    def start(self, name: str, words: Sequence[str], home: Path | None = None) -> dict[str, Any]:
        """One start, to its verdict or its end."""
        log = self.options.out / f"{name}.log"
        environment = {**os.environ, "MOEFIX_HOME": str(home or self.home), "PYTHONUNBUFFERED": "1"}
        began = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "entrypoint.py"), *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        verdict = None
        while verdict is None and process.poll() is None and time.monotonic() - began < self.options.wait:
            time.sleep(0.2)
            verdict = VERDICT.search(text_of(log))
        seconds = time.monotonic() - began
        code = end(process)
        time.sleep(1.0)  # the relay's last words
        text = text_of(log)
        verdict = verdict or VERDICT.search(text)
        result = {
            "name": name,
            "command": list(words),
            "verdict": verdict[1] if verdict else "",
            "seconds_to_verdict": round(seconds, 1),
            "ended_by_itself_with": code,
            "moefix_lines": re.findall(r"^moefix: .*", text, re.M),
            "sglang_lines": re.findall(r".*(?:MoE kernel config|Down MoE config file).*", text)[:8],
        }
        print(f"{name}: {result['verdict'] or 'NO VERDICT'} ({seconds:.0f} s)", flush=True)
        return result

    # --- scenarios ---

    def taken(self) -> ScenarioResult:
        result = self.start("taken", self.words)
        return [result], _unless("picked up both files" in result["verdict"], "taken: not both files were picked up")

    def repaired(self) -> ScenarioResult:
        wrong, right, here = self.wrong(), self.artefact(), self.situation()
        question = question_of(here, here.first)
        save_artefact(self.home, wrong)
        keep(self.home, Asked(question, wrong.gate_up_file, wrong.down_file, "log", utc_now()))
        self.forget_pair()
        first = self.start("wrong-name", self.words)
        asked, _ = find(self.home, question)
        second = self.start("repaired", self.words)
        return [first, second], [
            *_unless("asked for another file: " + right.gate_up_file in first["verdict"], "wrong-name: not noticed"),
            *_unless(asked is not None and asked.gate_up == right.gate_up_file, "wrong-name: the name was not kept"),
            *_unless("picked up both files: " + right.gate_up_file in second["verdict"], "repaired: it was not"),
        ]

    def never(self) -> ScenarioResult:
        result = self.start("never", (*self.words, *self.options.never_flags.split()))
        return [result], _unless(
            bool(re.search("never looked for a MoE file|looked for no MoE file", result["verdict"])), "never: it looked"
        )

    def dense(self) -> ScenarioResult:
        if not self.options.dense:
            return [], []
        result = self.start("dense", ("--model", self.options.dense, *self.flags))
        return [result], _unless("looked for no MoE file, as expected" in result["verdict"], "dense: no such verdict")

    def asked(self) -> ScenarioResult:
        home = self.options.out / "asked-home"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(self.home / "artefacts", home / "artefacts")
        self.forget_pair()
        result = self.start("asked", (*self.words, "--moefix-ask"), home)
        took = next((line for line in result["moefix_lines"] if "asked in" in line), "")
        result["asking"] = took
        print(f"asked: {took or 'NO ANSWER'}", flush=True)
        return [result], [
            *_unless(self.artefact().gate_up_file in took, "asked: SGLang's answer is not the file that it reads"),
            *_unless("picked up both files" in result["verdict"], "asked: not both files were picked up"),
        ]


def _unless(good: bool, problem: str) -> list[str]:
    return [] if good else [problem]


def text_of(log: Path) -> str:
    return log.read_text(errors="replace").replace("\r", "\n")


def end(process: subprocess.Popen[bytes]) -> int | None:
    """Kill the server and all its processes; the code with which it had ended before, None if it ran."""
    code = process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dense", default="")
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--home", type=lambda text: Path(text).absolute(), default=Path("/tmp/moefix-verdicts"))
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--wait", type=float, default=400, help="seconds for one start to come to its verdict")
    parser.add_argument("--only", default="taken,repaired,never,dense,asked")
    parser.add_argument("--never-flags", default="--enable-deterministic-inference")
    parser.add_argument("flags", nargs="*", help="further SGLang flags, after --")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.home.mkdir(parents=True, exist_ok=True)
    parse_flags(("--model", options.model, *options.flags))
    prover = Prover(options)
    starts: list[dict[str, Any]] = []
    problems: list[str] = []
    for name in options.only.split(","):
        scenario: Callable[[], ScenarioResult] = getattr(prover, name)
        results, found = scenario()
        starts += results
        problems += found
        content = {"date": time.strftime("%Y-%m-%d"), "starts": starts, "problems": problems}
        (options.out / "verdicts.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(problems) or f"proved: {options.only}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
