"""Asks SGLang itself which MoE file it will look for: starts it with dummy weights and few layers, reads its log.

For models that the rules call uncertain, and on --moefix-ask. The user's flags stay as they are but for what makes the
start quick and harmless; none of that decides the kernel. The answer is kept (`fixer.serve.asked`), so it is asked for once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixer.serve.asked import Asked, decision_for, find, keep, question_of
from fixer.machine.processes import HURRY_SECONDS, end_group, free_port, start_child
from fixer.model.rules.decide import Decision, Outcome
from fixer.base.errors import SGLangError, StoreError, TuneError, harmless
from fixer.model.rules.families import NEW, at_least, look_up
from fixer.sglang.flags import ServerFlags, parse_flags, plain_flags
from fixer.serve.launch import MoefixOptions, server_command
from fixer.model.config import Model
from fixer.base.progress import terminal_progress
from fixer.sglang.log_lines import read_line
from fixer.machine.signals import deferred
from fixer.base.status_board import Phase
from fixer.artefacts.shelf import utc_now, write_atomically
from fixer.serve.log.verdict import Expected, SETTLING_SECONDS, Seen, down_name, ran_instead

if TYPE_CHECKING:
    from fixer.serve.serve import Voice
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


def as_asked(situation: Situation, argv: Sequence[str], options: MoefixOptions, home: Path, say: Voice) -> Situation:
    """The situation with what SGLang asked for, at an earlier start or now, in place of what the rules worked out.

    SGLang names its files after the first card, so it is asked once, and its answer holds for every kind of card.
    """
    asked = _known(situation, options, home, say)
    if asked is None and any(_wanted(decision.outcome, options) for decision in situation.decisions):
        asked = _asked_in_turn(situation, argv, home, say, strict=options.strict)
    if asked is None:
        return situation
    decisions = (
        _corrected(situation, kind, asked, say) if kind == 0 or decision.outcome not in UNABLE else decision
        for kind, decision in enumerate(situation.decisions)
    )
    return replace(situation, decisions=tuple(decisions))


def _corrected(situation: Situation, kind: int, asked: Asked, say: Voice) -> Decision:
    try:
        return decision_for(situation, kind, asked)
    except ValueError as fault:
        say.warning(f"{fault}; SGLang's own configuration is served")
        return replace(situation.decisions[kind], outcome=Outcome.NO_LOOKUP, reason=str(fault), workload=None)


def _known(situation: Situation, options: MoefixOptions, home: Path, say: Voice) -> Asked | None:
    asked, damaged = find(home, question_of(situation, 0))
    if damaged is not None:
        say.warning(str(damaged))
    fresh = options.ask and options.fresh
    return None if fresh else asked


UNABLE = (Outcome.NO_MOE, Outcome.LOAD_ERROR, Outcome.ASKS_THEN_CRASHES)
"""Outcomes with which there is nothing to ask."""


def _wanted(outcome: Outcome, options: MoefixOptions) -> bool:
    """Whether SGLang is to be asked. A start that measures nothing does not wait for an answer either."""
    able = outcome not in UNABLE and not options.skip_tune and not options.dry_run
    return able and (options.ask or outcome is Outcome.UNCERTAIN)


def _asked_in_turn(situation: Situation, argv: Sequence[str], home: Path, say: Voice, *, strict: bool) -> Asked | None:
    """Ask while nobody measures on the card, or take what another moefix was answered meanwhile.

    Returns:
        None, with a note, where there is no answer.

    Raises:
        SGLangError, TuneError, StoreError: there is none, and `strict`.
    """
    from fixer.tuning.session import turn

    question = question_of(situation, 0)
    before, _ = find(home, question)
    try:
        with contextlib.ExitStack() as stack:
            progress = say.follow(stack.enter_context(terminal_progress(quiet=say.quiet)))
            # In one order for all, or two that ask could wait for each other.
            for card in sorted((cards[0] for cards in situation.cards), key=lambda card: card.sglang_name):
                stack.enter_context(turn(home, card, progress))
            meanwhile, _ = find(home, question)
            if meanwhile not in (None, before):
                return meanwhile
            with _on_board(say):
                return _asked_now(situation, argv, home, say)
    except (SGLangError, TuneError, StoreError) as fault:
        if strict:
            raise
        say.warning(f"{fault.message} {fault.hint}".strip() + "; going by moefix's rules")
        return None


@contextlib.contextmanager
def _on_board(say: Voice) -> Iterator[None]:
    if say.board is not None:
        say.board.update(phase=Phase.ASKING, detail="SGLang, which file it looks for")
    try:
        yield
    finally:
        if say.board is not None:
            say.board.update(phase=Phase.STARTING, detail="")


def _asked_now(situation: Situation, argv: Sequence[str], home: Path, say: Voice) -> Asked:
    """Ask, and keep the answer.

    Raises:
        SGLangError, TuneError: there is none.
    """
    say.line("asking SGLang itself which MoE file it looks for (dummy weights, few layers) ...")
    began = time.monotonic()
    answer = ask(situation, argv, home)
    took = f"asked in {time.monotonic() - began:.0f} s"
    if answer.gate_up:
        say.line(f"{took}: SGLang looks for {answer.gate_up}" + ("" if len(answer.others) == 0 else " and for others"))
    else:
        say.line(f"{took}: SGLang looks for no MoE file; {answer.ran}")
    down = down_name(answer.gate_up) if answer.gate_up and situation.tree.reads_down_file else ""
    asked = Asked(question_of(situation, 0), answer.gate_up, down, "asking", utc_now(), answer.ran)
    try:
        keep(home, asked)
    except StoreError as fault:
        say.warning(fault.message)
    return asked


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
    if parse_flags(_kept(argv)).skip_server_warmup:
        raise SGLangError("SGLang cannot be asked while its --config file has skip-server-warmup")
    port = free_port()
    words = asking_flags(argv, situation.model, flags, situation.tree.version, port)
    with _server(server_command(words), home / "ask.log") as server:
        return _conversation(server, situation, limit)


# --- the command line ------------------------------------------------------------------------------------------------


def asking_flags(argv: Sequence[str], model: Model, flags: ServerFlags, release: str, port: int) -> tuple[str, ...]:
    """The user's flags but for secrets and TLS, and after them those that make the start quick."""
    added = [*ADDED_FLAGS, "--port", str(port), "--max-running-requests", str(8 * flags.dp_size)]
    overrides = {**_thawed(flags.model_overrides)}
    for name, value in few_layers(model, flags, release).items():
        inner = overrides.get(name)
        overrides[name] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    if overrides:
        added += ["--json-model-override-args", json.dumps(overrides)]
    return (*_kept(argv), *added)


def _kept(argv: Sequence[str]) -> list[str]:
    return [word for word in plain_flags(argv) if word not in DROPPED_SWITCHES]


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _thawed(item) for name, item in value.items()}
    return [_thawed(item) for item in value] if isinstance(value, (list, tuple)) else value


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
SHELLS = ("text_config", "llm_config", "language_config")


def few_layers(model: Model, flags: ServerFlags, release: str) -> dict[str, Any]:
    """Overrides of config.json that leave the first layers only, up to an MoE layer; {} to leave it as it is.

    SGLang 0.4.9 replaces a nested object as a whole, and no release merges two levels deep.
    """
    config = model.text_config
    name = next((name for name in LAYER_COUNTS if isinstance(config.get(name), int)), "")
    whole = config.get(name, 0)
    wanted = max(layers_to_experts(config), flags.pp_size)
    if not name or wanted >= whole:
        return {}
    # Lists and patterns of one entry a layer are checked against the number of layers by transformers.
    short = {
        field_name: _thawed(value[:wanted])
        for field_name, value in config.items()
        if isinstance(value, (tuple, list, str)) and len(value) == whole and field_name not in {"architectures"}
    }
    change = {name: wanted, **short}
    if config is model.config:
        return change
    shell = next((shell for shell in SHELLS if model.config.get(shell) is config), "")
    return {shell: change} if shell and at_least(release, NEW) else {}


MOST_LAYERS = 4096


def layers_to_experts(config: Mapping[str, Any]) -> int:
    """The least number of leading layers with an MoE layer and each kind of attention among them."""
    first = next((index for index in range(MOST_LAYERS) if _is_moe(config, index)), 0)
    return max(first + 1, _kinds_of_attention(config))


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = look_up(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value)
    return None


def _is_moe(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer has experts, by the fields that SGLang's and transformers' models read."""
    dense_before = _number(config, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") or 0
    steps = [
        (_number(config, "decoder_sparse_step", "interleave_moe_layer_step"), index + 1),  # qwen2_moe.py, llama4.py
        (_number(config, "moe_layer_interval"), index + 1),  # ernie4.py
        (_number(config, "moe_layer_freq"), index),  # deepseek_v2.py
    ]
    listed = config.get("moe_layers_enum", config.get("moe_layers"))  # step3
    numbers = listed.split(",") if isinstance(listed, str) else listed
    frequency = config.get("moe_layer_freq")
    pattern = config.get("hybrid_override_pattern")  # nemotron_h.py: one letter a layer
    dense = config.get("mlp_only_layers")
    return (
        index >= dense_before
        and all(not step or step < 1 or place % step == 0 for step, place in steps)
        and not (isinstance(numbers, (list, tuple)) and numbers and str(index) not in {str(n).strip() for n in numbers})
        and not (isinstance(frequency, (list, tuple)) and index < len(frequency) and not frequency[index])
        and not (isinstance(pattern, str) and index < len(pattern) and pattern[index] != "E")
        and not (isinstance(dense, (list, tuple)) and index in dense)
    )


def _kinds_of_attention(config: Mapping[str, Any]) -> int:
    """Leading layers that hold every kind of layer: the memory pools of hybrid models need one of each."""
    interval = _number(config, "full_attention_interval") or 1
    needed = [interval if 0 < interval < MOST_LAYERS else 1]
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        kinds = config.get(name)
        if isinstance(kinds, (list, tuple, str)) and kinds and all(isinstance(kind, str) for kind in kinds):
            needed.append(1 + max(list(kinds).index(kind) for kind in set(kinds)))
    return max(needed)


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
        decision = situation.decisions[0]
        return Answer("", ran=ran_instead(Expected(asks=False, reason=decision.reason, kernel=decision.kernel), seen))
    first, *others = seen.asked
    return Answer(first, tuple(others))


def _ended(server: _Server) -> SGLangError:
    text = bytes(server.tail[-4000:]).decode("utf-8", "replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    return SGLangError(f"SGLang, started to be asked, ended before it looked for a MoE file: {harmless(last)[:200]}")
