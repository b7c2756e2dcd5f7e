"""Asks SGLang on a machine with a card and real packages: answers, seconds, and that no card memory is taken.

    asking_on_card.py OUT [--models FOLDER] [--capability 9.0] [--stand-ins]

Run in the repository's root with the interpreter that has SGLang 0.5.17. Cards that differ in capability are asked
side by side, each in one import; nvidia-smi is read twice a second meanwhile.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from fixer.machine.cards import find_card
from fixer.model.asking.ask import CardFacts, Question, ask
from tests.support.asking import ask_cases, cases_of, difference, package_root, rule_difference

RELEASE = "0.5.17"
PACKAGES = ("sglang", "torch", "triton", "transformers", "sglang-kernel", "flashinfer-python", "compressed-tensors")
SMI = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


class Memory(threading.Thread):
    """Reads the card's memory until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples, self.processes, self._over = [], set(), threading.Event()

    def run(self):
        while not self._over.wait(0.5):
            self.samples.append(read(SMI))
            apps = read(("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"))
            self.processes.update(filter(None, apps.splitlines()))

    def stop(self):
        self._over.set()
        self.join()


def read(command):
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError as fault:
        return str(fault)


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def group(cases, stand_ins):
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answers = ask_cases(cases, sys.executable, Path(folder), stand_ins)
    return answers, time.monotonic() - began


def single(model, kept, flags=()):
    """One question as `serve` would ask it, and the same one again."""
    card = find_card("H100")
    facts = CardFacts(card.name, card.capability, card.shared_memory, card.memory_mib)
    question = Question(sys.executable, package_root(sys.executable), tuple(flags), model, facts)
    began = time.monotonic()
    answer = ask(question, folder=kept)
    middle = time.monotonic()
    again = ask(question, folder=kept)
    return {
        "model": model.name,
        "seconds": middle - began,
        "kept_seconds": time.monotonic() - middle,
        "same_when_kept": again == answer,
        "answer": json.loads(msgspec.json.encode(answer)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--capability", help="ask the cases of cards of this compute capability only")
    parser.add_argument("--stand-ins", action="store_true")
    given = parser.parse_args()
    before, memory = read(SMI), Memory()
    memory.start()
    by_capability = defaultdict(list)
    for case in cases_of(RELEASE):
        if given.capability in (None, "{}.{}".format(*case.card.capability)):
            by_capability[case.card.capability].append(case)
    rows, groups, singles = [], {}, []
    with ThreadPoolExecutor(8) as pool, tempfile.TemporaryDirectory() as kept:
        models = sorted(path for path in given.models.iterdir() if path.is_dir()) if given.models else []
        running = {key: pool.submit(group, cases, given.stand_ins) for key, cases in by_capability.items()}
        for key, future in running.items():
            answers, seconds = future.result()
            groups[".".join(map(str, key))] = {"cases": len(answers), "seconds": seconds}
            for case in by_capability[key]:
                answer = answers[case.name]
                rows.append(
                    {
                        "case": case.name,
                        "card": case.card.name,
                        "flags": list(case.flags),
                        "outcome": answer.outcome.value,
                        "kernel": answer.kernel,
                        "names": [one.name for one in answer.look_ups],
                        "reason": answer.reason,
                        "kinds": [kind.reason for kind in answer.experts],
                        "dense": [[d.family, d.n, d.k, d.kernel, d.asks, d.reason] for d in answer.dense],
                        "import_seconds": answer.import_seconds,
                        "build_seconds": answer.build_seconds,
                        "layer_seconds": answer.layer_seconds,
                        "against_case": difference(case, answer),
                        "against_rules": rule_difference(case, answer, RELEASE),
                    }
                )
        singles += [single(model, Path(kept)) for model in models]
    memory.stop()
    result = {
        "machine": platform.platform(),
        "card": read(("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "memory_mib_before": before,
        "memory_mib_during": sorted(set(memory.samples)),
        "memory_samples": len(memory.samples),
        "processes_on_the_card": sorted(memory.processes),
        "groups": groups,
        "cases": rows,
        "model_folders": singles,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "asking.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row["case"], row["outcome"], row["kernel"], row["against_case"] or "-", row["against_rules"] or "-")
    print(
        json.dumps({**groups, "memory": [before, result["memory_mib_during"]], "apps": result["processes_on_the_card"]})
    )
    for one in singles:
        print(
            one["model"], one["answer"]["outcome"], f"{one['seconds']:.1f} s, kept {one['kept_seconds'] * 1000:.0f} ms"
        )


if __name__ == "__main__":
    main()
