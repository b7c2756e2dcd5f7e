"""Asks SGLang itself which MoE file it will look for: starts it with dummy weights and few layers, reads its log.

For models that the rules call uncertain, and on --moefix-ask. The user's flags stay as they are but for what makes the
start quick and harmless; none of that decides the kernel. The answer is kept (`fixer.serve.asked`), so it is asked for
once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fixer.base.errors import SGLangError, StoreError, TuneError
from fixer.base.files import write_atomically
from fixer.base.text import harmless
from fixer.machine.processes import HURRY_SECONDS, end_group, free_port, start_child
from fixer.machine.signals import deferred
from fixer.model.config import Model
from fixer.serve.asking.few_layers import few_layers, thawed
from fixer.serve.log.verdict import SETTLING_SECONDS, Expected, Seen, ran_instead
from fixer.sglang.declared import NOTHING_DECLARED, Declared, declared_of
from fixer.sglang.flags import ServerFlags
from fixer.sglang.log_lines import read_line
from fixer.sglang.secrets import plain_flags
from fixer.sglang.server import server_command

if TYPE_CHECKING:
    from fixer.serve.situation import Situation

LIMIT_SECONDS = 300.0
"""How long SGLang may take to answer; 30 to 60 s are usual."""

LOG_BYTES = 1 << 20
"""Of SGLang's output so much is kept, the end of it, without tokens, in `ask.log` in the data folder."""

GONE_SECONDS = 2.0
"""How long the killed server is waited for, so that its memory on the card is free for what comes next."""

DROPPED_SWITCHES = ("--skip-server-warmup", "--enable-metrics", "--log-requests", "--delete-ckpt-after-loading")
"""The warm-up is what reaches the experts; the others would only write or delete something."""

ADDED_FLAGS = (
    *("--load-format", "dummy", "--skip-tokenizer-init", "--disable-cuda-graph", "--log-level", "info"),
    *("--host", "127.0.0.1", "--max-total-tokens", "8192"),
)
"""Last on the command line, where they count (argparse). In every release from 0.4.9 to 0.5.23."""


@dataclass(frozen=True)
class Answer:
    """What SGLang looked for.

    Attributes:
        gate_up: the first file's name, "" for none.
        others: further names, for layers of another kind.
        ran: where it looked for none: what runs the experts.
    """

    gate_up: str
    others: tuple[str, ...] = ()
    ran: str = ""


def ask(situation: Situation, argv: Sequence[str], home: Path, limit: float = LIMIT_SECONDS) -> Answer:
    """Start SGLang, wait until it has looked for a file or has served a request without, and end it.

    Raises:
        SGLangError: it cannot be asked, or ended before it came to that.
        TuneError: it did not answer in time.
    """
    flags = situation.flags
    if not (situation.tree.package / "launch_server.py").is_file():
        raise SGLangError(f"SGLang in {situation.tree.package} cannot be started, only read")
    if flags.nnodes > 1:
        raise SGLangError("SGLang cannot be asked about several nodes from one of them")
    port = free_port()
    declared = declared_of(situation.tree)
    words = asking_flags(argv, situation.model, flags, situation.tree.release, port, declared)
    with _server(server_command(words), home / "ask.log") as server:
        return _conversation(server, situation, limit)


# --- the command line ------------------------------------------------------------------------------------------------


def asking_flags(
    argv: Sequence[str],
    model: Model,
    flags: ServerFlags,
    release: str,
    port: int,
    declared: Declared = NOTHING_DECLARED,
) -> tuple[str, ...]:
    """The user's flags but for secrets and TLS, and after them those that make the start quick."""
    added = [*ADDED_FLAGS, "--port", str(port), "--max-running-requests", str(8 * flags.dp_size)]
    overrides = {**thawed(flags.model_overrides)}
    for name, value in few_layers(model, flags, release).items():
        inner = overrides.get(name)
        overrides[name] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    if overrides:
        added += ["--json-model-override-args", json.dumps(overrides)]
    return (*(word for word in plain_flags(argv, declared) if word not in DROPPED_SWITCHES), *added)


# --- the server ------------------------------------------------------------------------------------------------------


@dataclass
class _Server:
    """A started SGLang and what it has written."""

    process: subprocess.Popen[bytes]
    output: int
    tail: bytearray = field(default_factory=bytearray)
    carry: bytes = b""
    ended: bool = False

    def lines(self, seconds: float) -> list[str]:
        """Lines that come within the time, as soon as some do; [] at the end and when none came."""
        if not select.select([self.output], [], [], max(0.0, seconds))[0]:
            return []
        data = os.read(self.output, 1 << 16)
        self.ended = not data
        self.tail += data
        del self.tail[:-LOG_BYTES]
        *whole, rest = (self.carry + data).split(b"\n")
        self.carry = rest[-LOG_BYTES:]
        return [line.decode("utf-8", "replace") for line in whole]


@contextlib.contextmanager
def _server(command: list[str], log: Path) -> Iterator[_Server]:
    """A server in a process group of its own, which is gone afterwards, whatever happens."""
    reader = writer = -1
    server, patience = None, GONE_SECONDS
    try:
        reader, writer = os.pipe()
        with deferred():
            process = start_child(command, {**os.environ, "PYTHONUNBUFFERED": "1"}, writer)
            server = _Server(process, reader)
        os.close(writer)
        writer = -1
        yield server
    except (SystemExit, KeyboardInterrupt):
        patience = HURRY_SECONDS
        raise
    except OSError as fault:
        raise SGLangError(f"SGLang could not be asked: {fault.strerror or fault}") from fault
    finally:
        if server is not None:
            end_group(server.process, 0, patience)
            _keep_log(server, log)
        for end in (reader, writer):
            if end >= 0:
                os.close(end)


def _keep_log(server: _Server, log: Path) -> None:
    """Keep the end of what the server wrote, without tokens."""
    text = bytes(server.tail).decode("utf-8", "replace")
    if len(server.tail) >= LOG_BYTES:
        text = text.partition("\n")[2]  # half a line may hold half a token
    lines = "".join(harmless(line) + "\n" for line in text.splitlines())
    with contextlib.suppress(StoreError):
        write_atomically(log, lines.encode())


def _conversation(server: _Server, situation: Situation, limit: float) -> Answer:
    """Read the log until it has an answer: a server that is ready has served its warm-up, so it never will look."""
    seen, settles, end = Seen(), float("inf"), time.monotonic() + limit
    while (now := time.monotonic()) < end:
        if now >= settles:
            return _answer(seen, situation)
        over = server.process.poll() is not None  # its children may hold the pipe open
        texts = server.lines(0.0 if over else min(end, settles, now + 0.5) - now)
        for text in texts:
            line = read_line(text)
            before, seen = seen, seen.plus(line) if line is not None else seen
            if seen != before and (seen.looked or seen.deterministic or seen.ready):
                settles = time.monotonic() + SETTLING_SECONDS
        if server.ended or (over and not texts):
            if seen.looked or seen.deterministic:
                return _answer(seen, situation)
            raise _ended(server)
    raise TuneError(f"SGLang did not say within {limit:.0f} s which MoE file it looks for")


def _answer(seen: Seen, situation: Situation) -> Answer:
    if not seen.looked:
        decision = situation.first.decision
        return Answer("", ran=ran_instead(Expected(asks=False, reason=decision.reason, kernel=decision.kernel), seen))
    first, *others = seen.asked
    return Answer(first, tuple(others))


def _ended(server: _Server) -> SGLangError:
    text = bytes(server.tail[-4000:]).decode("utf-8", "replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    return SGLangError(f"SGLang, started to be asked, ended before it looked for a MoE file: {harmless(last)[:200]}")
