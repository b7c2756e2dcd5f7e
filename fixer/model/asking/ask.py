"""Asks SGLang: starts the child with the user's own interpreter, reads its answer, and keeps it.

The child imports SGLang and builds the model on the meta device (`child/`): 7 to 11 s of import, then 0.2 to 1 s a
question and 0.6 GB of memory on two cores; it sees no card. A crash, a hang or an answer that cannot be read is
`Outcome.NOT_KNOWN`, never a stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from fixer.base.errors import MoefixError
from fixer.base.files import read_or_set_aside, write_atomically
from fixer.machine.processes import HURRY_SECONDS, end_group, start_child
from fixer.machine.signals import deferred
from fixer.model.asking.answer import Answer, Outcome, not_known
from fixer.model.asking.judge import judge

PROTOCOL = 1
"""Changes with what the child looks at, so that an answer of an older moefix is asked for anew."""

SECONDS = 60.0
"""How long SGLang is given by default: the slowest import seen took 11 s on two busy cores."""

_CHILD = Path(__file__).parent / "child"
_BOOT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "moefix_child", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]]
)
package = importlib.util.module_from_spec(spec)
sys.modules["moefix_child"] = package
spec.loader.exec_module(package)
from moefix_child.main import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""
"""Loads the child's package from its folder, whatever that interpreter has installed."""

_CONFIG_FILES = (
    "config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "model.safetensors.index.json",
)
_COUNTING_VARIABLES = ("SGLANG_", "SGL_")
_MOST_ANSWER = 32 << 20
_SAID = 600


@dataclass(frozen=True)
class CardFacts:
    """The card that SGLang is to see, whatever is in the machine.

    Attributes:
        name: as the CUDA driver writes it.
        capability: compute capability, (major, minor).
        shared_memory: opt-in shared memory per block, in bytes.
        memory_mib: the card's memory, in MiB.
        processors: streaming multiprocessors. No name depends on it.
        count: cards of the machine.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int
    memory_mib: int
    processors: int = 132
    count: int = 8


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        python: the interpreter that SGLang is started with.
        root: SGLang's package folder (".../site-packages/sglang").
        argv: SGLang's flags, as the user gave them; the model's path among them does not count.
        model: a folder with config.json and what lies beside it (hf_quant_config.json).
        card: the card.
        environment: environment variables of the server, None for this process's.
    """

    python: str
    root: Path
    argv: tuple[str, ...]
    model: Path
    card: CardFacts
    environment: Mapping[str, str] | None = field(default=None, compare=False)


def ask(question: Question, *, folder: Path, seconds: float = SECONDS) -> Answer:
    """SGLang's answer, from an earlier time where the same question was asked.

    Args:
        question: what is asked.
        folder: where answers are kept, one file each.
        seconds: how long SGLang is given.

    Returns:
        The answer. What was kept and is damaged is set aside and asked anew; an answer that cannot be kept is given
        all the same.
    """
    path = folder / f"{question_hash(question)}.json"
    kept, _ = read_or_set_aside(path, _read)
    if kept is not None:
        return kept
    (answer,) = ask_all((question,), seconds=seconds)
    if answer.outcome is not Outcome.NOT_KNOWN or answer.release:
        with contextlib.suppress(MoefixError):
            write_atomically(path, msgspec.json.format(msgspec.json.encode(answer), indent=1) + b"\n")
    return answer


def ask_all(questions: Sequence[Question], *, seconds: float = SECONDS) -> list[Answer]:
    """SGLang's answers to questions about one interpreter, one SGLang and cards of one capability: one import for all.

    Args:
        questions: one or more; the first one's interpreter, SGLang, environment and card are the import's.
        seconds: how long SGLang is given for all of them together.
    """
    first = questions[0]
    asked = {
        "root": str(first.root),
        "card": asdict(first.card),
        "questions": [
            {"argv": list(one.argv), "folder": str(one.model), "card": asdict(one.card)} for one in questions
        ],
    }
    lines, fault = _converse(first, msgspec.json.encode(asked), seconds)
    answers = [judge(line) for line in lines[: len(questions)]]
    return answers + [not_known(fault or "SGLang's process ended without an answer")] * (len(questions) - len(answers))


def _read(content: bytes) -> Answer:
    return msgspec.json.decode(content, type=Answer)


# --- what an answer holds for ----------------------------------------------------------------------------------------


def question_hash(question: Question) -> str:
    """What an answer holds for: SGLang's files, the packages beside it, the model's files, flags, card, variables."""
    digest = hashlib.sha256()
    environment = os.environ if question.environment is None else question.environment
    parts: list[Any] = [
        PROTOCOL,
        question.python,
        str(question.root),
        question.argv,
        asdict(question.card),
        sorted(item for item in environment.items() if item[0].startswith(_COUNTING_VARIABLES)),
        sorted(_packages(question)),
        *_sources(question.root),
    ]
    digest.update(msgspec.json.encode(parts))
    digest.update(repr(sorted(path.name for path in question.model.glob("*.safetensors"))).encode())
    for path in sorted({*(question.model / name for name in _CONFIG_FILES), *question.model.glob("*.py")}):
        with contextlib.suppress(OSError):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _packages(question: Question) -> set[str]:
    """Names and versions of the packages that are installed beside SGLang, from the names of their folders."""
    places = {question.root.parent}
    if question.python == sys.executable:
        places |= {Path(place) for place in sys.path if place}
    found: set[str] = set()
    for place in places:
        with contextlib.suppress(OSError):
            found |= {entry.name for entry in os.scandir(place) if entry.name.endswith(".dist-info")}
    return found


def _sources(root: Path) -> tuple[int, int, int]:
    """Number, size and newest change of SGLang's modules, so that a tree that somebody edits is asked anew."""
    stats = [path.stat() for path in sorted((root / "srt").rglob("*.py")) if path.is_file()]
    return len(stats), sum(one.st_size for one in stats), max((one.st_mtime_ns for one in stats), default=0)


# --- the child -------------------------------------------------------------------------------------------------------


def _converse(question: Question, asked: bytes, seconds: float) -> tuple[list[bytes], str]:
    """Start the child, give it the questions, and read whole lines until it ends or its time is over."""
    environment = dict(os.environ if question.environment is None else question.environment)
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with contextlib.ExitStack() as files:
        said, questions = (files.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        reader, writer = (
            files.enter_context(os.fdopen(end, mode)) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        )
        questions.write(asked)
        questions.seek(0)
        passed = (questions.fileno(), writer.fileno())
        command = [question.python, "-c", _BOOT, str(_CHILD), *map(str, passed)]
        process = None
        try:
            with deferred():
                process = start_child(command, environment, said, passed)
            writer.close()
            content, is_over = _read_all(reader.fileno(), seconds)
        except MoefixError as fault:
            return [], fault.message
        finally:
            if process is not None:
                end_group(process, 0, HURRY_SECONDS)
        lines = [line for line in content.split(b"\n") if line]
        if is_over:
            return lines, f"SGLang gave no answer within {seconds:.0f} s"
        return lines, f"SGLang's process ended without an answer: {_last_words(said, process)}"


def _read_all(reader: int, seconds: float) -> tuple[bytes, bool]:
    """What comes until the other end closes, and whether the time was over first."""
    content = b""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and len(content) < _MOST_ANSWER:
        if not select.select([reader], [], [], left)[0]:
            break
        part = os.read(reader, 1 << 16)
        if not part:
            return content, False
        content += part
    return content, True


def _last_words(said: IO[bytes], process: subprocess.Popen[bytes]) -> str:
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - _SAID))
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"
