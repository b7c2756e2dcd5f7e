"""The server under load, with SGLang's own configuration and with the tuned one, started in turn."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import httpx

from fixer.arms import Side, make_arm
from fixer.base.errors import SGLangError, UsageError
from fixer.base.files import make_folder, read_bounded
from fixer.base.progress import Progress
from fixer.base.voice import Voice
from fixer.bench import Subject
from fixer.bench_results import Arm, Arms, BenchResult, Kind, Latency, Load, ServeLoad, Verdict
from fixer.bench_verdict import judged, overall
from fixer.load import FIRST_ID, Pass, run_pass
from fixer.machine.processes import end_group, free_port, start_child
from fixer.machine.signals import deferred
from fixer.model.config import Model
from fixer.sglang.declared import declared_of
from fixer.sglang.lookup import CONFIG_DIR_VARIABLE
from fixer.sglang.secrets import plain_flags
from fixer.sglang.server import HEALTH, OUT_OF_SHARED_MEMORY, SERVER_INFO, files_used, local_flags, server_command
from fixer.sglang_server import client_command, is_plain_model, read_client_output

FULL_LOADS = (
    Load(1, 256, 256, 8),
    Load(4, 512, 256, 32),
    Load(16, 512, 256, 96),
    Load(64, 512, 256, 256),
    Load(1, 8000, 1, 40),
)
"""Decoding at 1, 4, 16 and 64 streams, and a long prefill: 20 to 40 seconds each on an H100 with a 30B-A3B model."""

QUICK_LOADS = (
    Load(1, 128, 128, 4),
    Load(4, 256, 128, 8),
    Load(16, 512, 128, 32),
    Load(64, 512, 128, 128),
    Load(1, 4000, 1, 16),
)
"""The same in 2 to 6 seconds each."""

MOST_REQUESTS, MOST_TOKENS, MOST_STREAMS = 100_000, 1_000_000, 4096
"""Bounds of a load: more is a slip of the keyboard."""

SEED = 20261

LOG_LINES = 12
"""How much of a dead server's log is shown."""

CLIENT_SECONDS = 1800.0
"""How long one pass of `sglang.bench_serving` may take, its imports included."""

FIRST_START_SECONDS, FIRST_LOADS_SECONDS = 75.0, 50.0
"""What a start of the server and all its loads are taken to need before one has been timed."""


class Client(Enum):
    """What makes the load."""

    AUTO = "auto"
    """SGLang's own tool where the server has a tokenizer, else token ids."""
    BENCH_SERVING = "sglang.bench_serving"
    TOKEN_IDS = "token ids"


@dataclass(frozen=True)
class ServePlan:
    """How to measure.

    Attributes:
        loads: in this order on each start.
        rounds: starts of each side; every second round runs the sides in the other order.
        passes: measured passes of each load on each start.
        full_warm: the warm pass has as many requests as a measured one, not just one for each stream.
        wait_seconds: how long a server may take to become healthy.
        budget_seconds: begin nothing that would end later than this after `began`; None for no limit.
        began: the monotonic time that the budget counts from.
        client: what makes the load.
    """

    loads: tuple[Load, ...] = FULL_LOADS
    rounds: int = 2
    passes: int = 3
    full_warm: bool = True
    wait_seconds: float = 600.0
    budget_seconds: float | None = None
    began: float = field(default_factory=time.monotonic)
    client: Client = Client.AUTO

    def seconds_left(self) -> float:
        """Of the budget."""
        return float("inf") if self.budget_seconds is None else self.began + self.budget_seconds - time.monotonic()


def parse_loads(text: str, preset: Sequence[Load]) -> tuple[Load, ...]:
    """Loads from the command line: "1,16,prefill" picks of the preset, "16:512:128:48" spells one out.

    The parts are streams, input tokens, output tokens and requests.

    Raises:
        UsageError: it makes no sense.
    """
    known = {"prefill" if load.is_prefill else str(load.streams): load for load in preset}
    loads = tuple(_load(part.strip(), known) for part in text.split(","))
    if len(set(loads)) != len(loads):
        raise UsageError(f"--loads {text[:60]!r} names a load twice")
    return loads


def _load(part: str, known: Mapping[str, Load]) -> Load:
    if part in known:
        return known[part]
    words = part.split(":")
    if len(words) != 4 or not all(word.isascii() and word.isdigit() and len(word) < 9 for word in words):
        raise UsageError(
            f"--loads: {part[:40]!r} is no load",
            f"Choose of {', '.join(known)}, or write STREAMS:INPUT:OUTPUT:REQUESTS, such as 16:512:128:48.",
        )
    load = Load(*map(int, words))
    bounds = ((load.streams, MOST_STREAMS), (load.requests, MOST_REQUESTS))
    tokens = ((load.input_tokens, MOST_TOKENS), (load.output_tokens, MOST_TOKENS))
    if not all(1 <= value <= most for value, most in (*bounds, *tokens)) or load.requests < load.streams:
        raise UsageError(f"--loads: {part} is out of bounds", "Each part is at least 1, and requests at least streams.")
    return load


# --- one server ------------------------------------------------------------------------------------------------------


class Server:
    """A server of our own on 127.0.0.1, for use in a `with` statement: at its end the whole process group is gone.

    Args:
        flags: the user's SGLang flags.
        configs: its SGLANG_MOE_CONFIG_DIR.
        log: what it prints goes there.
        wait_seconds: how long it may take to become healthy.

    Raises:
        SGLangError: on entering, where it dies or does not become healthy.
    """

    def __init__(self, flags: Sequence[str], configs: Path, log: Path, wait_seconds: float) -> None:
        self.port = free_port()
        self.log = log
        self._command = server_command(local_flags(flags, self.port))
        self._environment = local_environment() | {CONFIG_DIR_VARIABLE: str(configs), "PYTHONUNBUFFERED": "1"}
        self._wait = wait_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        make_folder(self.log.parent)
        try:
            with self.log.open("wb") as stream, deferred():
                self._process = start_child(self._command, self._environment, stream)
            self._wait_healthy()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process group, whatever its members do with SIGTERM."""
        if self._process is not None:
            end_group(self._process)
        self._process = None

    def _wait_healthy(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self._wait
        while time.monotonic() < end:
            code = self._process.poll()
            if code is not None:
                raise SGLangError(f"The server ended with code {code} before it was healthy.", f"Its log: {self.log}")
            if self._is_healthy():
                return
            time.sleep(0.25)
        raise SGLangError(
            f"The server was not healthy after {self._wait:.0f} s.", f"Its log: {self.log}; --wait gives it longer."
        )

    def _is_healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.ask(HEALTH).status_code == httpx.codes.OK
        return False

    def ask(self, path: str) -> httpx.Response:
        """A short answer of the server.

        Raises:
            httpx.HTTPError: there is none.
        """
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5, trust_env=False)

    def log_text(self) -> str:
        """What it has printed so far, with progress bars' pieces as lines of their own."""
        with contextlib.suppress(OSError, ValueError):
            return read_bounded(self.log, 1 << 28).decode(errors="replace").replace("\r", "\n")
        return ""

    def has_tokenizer(self) -> bool:
        """Whether the server loaded one: it does not start without, unless it is told to."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = self.ask(SERVER_INFO)
            if answer.status_code == httpx.codes.OK:
                return answer.json().get("skip_tokenizer_init") is False
        return False


def local_environment() -> dict[str, str]:
    """This process's environment, with no proxy between programs on this machine."""
    around = "127.0.0.1,localhost"
    here = {name: os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")}
    return {**os.environ, **{name: f"{value},{around}" if value else around for name, value in here.items()}}


def last_lines(text: str, most: int = LOG_LINES) -> list[str]:
    """The end of a log, without control characters and empty lines."""
    lines = ["".join(char for char in line if char.isprintable())[:300].rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-most:]


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """One start of a server: of which comparison, which side, and its number there."""

    subject: int
    side: Side
    number: int


def schedule(subjects: int, rounds: int) -> tuple[tuple[Start, Start], ...]:
    """The starts in order, as pairs of both sides: own first, tuned first, and so on, in turn."""
    pairs = []
    for round_ in range(rounds):
        for subject in range(subjects):
            sides = (Side.SGLANG, Side.TUNED) if (round_ + subject) % 2 == 0 else (Side.TUNED, Side.SGLANG)
            first, second = (Start(subject, side, 2 * round_ + place) for place, side in enumerate(sides))
            pairs.append((first, second))
    return tuple(pairs)


def bench_serve(
    subjects: Sequence[Subject],
    flags: Sequence[str],
    plan: ServePlan,
    say: Voice,
    progress: Progress,
    publish: Callable[[int, BenchResult], None],
    earlier: Sequence[BenchResult | None] = (),
) -> tuple[BenchResult, ...]:
    """Start the servers, put them under load, and compare.

    Args:
        subjects: the comparisons, which share the model and the card.
        flags: the user's SGLang flags.
        publish: gets each new state of a result, with its place.
        earlier: for each subject a result to go on from.

    Raises:
        MoefixError: a server did not start or did not answer. What was measured before has been published.
    """
    session = _Session(subjects, flags, plan, say, progress, publish, earlier)
    if plan.client is Client.BENCH_SERVING and not session.runs_no_code():
        raise UsageError(
            "sglang.bench_serving would run code that the model brings, or moefix cannot tell",
            "Use --client token-ids, or give --trust-remote-code.",
        )
    with subjects[0].lock(progress):
        session.run()
    return tuple(session.results)


class _Session:
    """One run over all starts."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        flags: Sequence[str],
        plan: ServePlan,
        say: Voice,
        progress: Progress,
        publish: Callable[[int, BenchResult], None],
        earlier: Sequence[BenchResult | None],
    ) -> None:
        self._subjects, self._plan, self._say = subjects, plan, say
        self._flags = plain_flags(flags, declared_of(subjects[0].situation.tree))
        self._progress, self._publish = progress, publish
        self._client = plan.client
        self._broken: set[tuple[int, Side]] = set()
        self._start_seconds = 0.0
        self._load_seconds: dict[Load, float] = {}
        self.results = [subject.empty_result(Kind.SERVE) for subject in subjects]
        for place, result in enumerate(earlier):
            if result is not None:
                self._take_up(place, result)
        for place, result in enumerate(self.results):
            if not result.serve:
                empty = tuple(ServeLoad(load, Arms()) for load in plan.loads)
                self.results[place] = replace(result, serve=empty, client=self._client.value)

    def _take_up(self, place: int, result: BenchResult) -> None:
        """Go on from a result: its whole starts are kept, and the client that made its load goes on making it."""
        whole = {
            start
            for start in {start for load in result.serve for side in Side for start in _arm(load, side).starts}
            if all(_passes_of(load, start) == self._plan.passes for load in result.serve)
        }
        serve = tuple(_keep_starts(load, whole) for load in result.serve)
        self.results[place] = replace(result, serve=serve, notes=(), complete=False)
        if whole and result.client != Client.AUTO.value:
            self._client = Client(result.client)

    # ---- the order of things

    def run(self) -> None:
        """All starts that are not done, as long as there is time for both of a pair."""
        self._progress.phase("server starts", sum(map(len, self._to_do())))
        for pair in self._to_do():
            if not self._has_time(len(pair)):
                break
            for start in pair:
                if not self._is_done(start):  # the other one may have shown that this side does not run
                    self._run_start(start)
                self._progress.advance(f"{start.side.value}, {self._subjects[start.subject].name}")
        self._finish()

    def _to_do(self) -> list[tuple[Start, ...]]:
        pairs = schedule(len(self._subjects), self._plan.rounds)
        left = [tuple(start for start in pair if not self._is_done(start)) for pair in pairs]
        return [pair for pair in left if pair]

    def _is_done(self, start: Start) -> bool:
        if (start.subject, start.side) in self._broken:
            return True
        return all(
            list(_arm(load, start.side).starts).count(start.number) >= self._plan.passes
            for load in self.results[start.subject].serve
        )

    def _has_time(self, starts: int) -> bool:
        """Whether that many starts can be done, but for half of the last one's loads: some passes are worth having."""
        loads = sum(self._load_seconds.get(load, 0.0) for load in self._plan.loads) or FIRST_LOADS_SECONDS
        each = (self._start_seconds or FIRST_START_SECONDS) + loads
        return self._plan.seconds_left() > starts * each - loads / 2

    def _finish(self) -> None:
        left = [start for pair in self._to_do() for start in pair]
        if left:
            self._say.warning(f"the time is up: {len(left)} server starts are missing (--resume goes on from here)")
        for place, result in enumerate(self.results):
            missing = sum(start.subject == place for start in left)
            notes = (f"the time did not last for {missing} of the servers' starts",) if missing else ()
            self._update(place, replace(result, notes=(*result.notes, *notes), complete=not missing))

    # ---- one start

    def _run_start(self, start: Start) -> None:
        subject, plan = self._subjects[start.subject], self._plan
        folder = subject.home / "bench" / "arms" / subject.file.removesuffix(".json") / start.side.value
        pair = subject.tuned_pair if start.side is Side.TUNED else subject.own_pair
        own = make_arm(folder, subject.situation.tree, pair)
        stem = self.results[start.subject].created.replace(":", "").replace("-", "")
        limit = f"-{subject.smem_limit}" if subject.smem_limit is not None else ""
        log = subject.home / "bench" / "logs" / f"{stem}{limit}-{start.number}-{start.side.value}.log"
        self._say.line(f"starting the server: {start.side.value}, {subject.name} ({log})")
        began = time.monotonic()
        server = Server(self._flags, folder, log, plan.wait_seconds)
        try:
            with server:
                seconds = time.monotonic() - began
                self._start_seconds = seconds  # the latest: the first start on a machine is the slowest
                self._say.line(f"healthy after {seconds:.0f} s")
                self._choose_client(server)
                self._loads(start, server, own)
        except SGLangError as fault:
            self._explain(start, server, fault)

    def _explain(self, start: Start, server: Server, fault: SGLangError) -> None:
        """A server that did not start or serve ends the run, unless that is what tuning cures.

        Raises:
            SGLangError: the fault itself, after the log's last lines.
        """
        text = server.log_text()
        if start.side is Side.SGLANG and OUT_OF_SHARED_MEMORY.search(text):
            self._broken.add((start.subject, start.side))
            result = self.results[start.subject]
            note = "SGLang's own configuration does not run on this card: out of shared memory"
            self._say.warning(note)
            self.results[start.subject] = replace(result, notes=(*result.notes, note))
            return
        for line in last_lines(text):
            self._say.warning(f"| {line}")
        raise SGLangError(
            f"{start.side.value} side: {fault.message}", fault.hint or f"Its log: {server.log}"
        ) from fault

    def _choose_client(self, server: Server) -> None:
        if self._client is Client.AUTO:
            fits = server.has_tokenizer() and self.runs_no_code()
            self._set_client(Client.BENCH_SERVING if fits else Client.TOKEN_IDS)
            self._say.line(f"the load comes from {self._client.value}")

    def runs_no_code(self) -> bool:
        """Whether SGLang's own client may read the tokenizer: it runs the code that a model brings, asked or not."""
        flags = self._subjects[0].situation.flags
        return flags.trust_remote_code or is_plain_model(flags.model_path, flags.revision)

    def _has_passes(self) -> bool:
        return any(_arm(load, side).starts for result in self.results for load in result.serve for side in Side)

    def _set_client(self, client: Client) -> None:
        self._client = client
        for place, result in enumerate(self.results):
            self.results[place] = replace(result, client=client.value)

    def _loads(self, start: Start, server: Server, own: Path) -> None:
        checked = False
        for load in self._plan.loads:
            began = time.monotonic()
            if self._plan.seconds_left() < self._load_seconds.get(load, 0.0):
                return  # `run` sees what is missing
            self._warm(start, server, load)
            if not checked:
                self._check_files(start, server, own)
                checked = True
            for turn in range(self._plan.passes):
                passed = self._pass(start, server, load, _seed(load, turn))
                self._record(start, load, passed)
            self._load_seconds[load] = time.monotonic() - began

    def _warm(self, start: Start, server: Server, load: Load) -> None:
        """What the server does first is slower: kernels are loaded, and compiled where no cache has them."""
        warm = load if self._plan.full_warm else replace(load, requests=min(load.requests, max(load.streams, 3)))
        run_pass(server.port, warm, _seed(load, -1), vocabulary(self._subjects[start.subject].situation.model))

    def _pass(self, start: Start, server: Server, load: Load, seed: int) -> Pass:
        if self._client is Client.BENCH_SERVING:
            package = self._subjects[start.subject].situation.tree.package
            try:
                return bench_serving_pass(package, server.port, load, seed)
            except SGLangError as fault:
                if self._plan.client is not Client.AUTO or self._has_passes():
                    raise  # two clients' figures are not for one table
                self._say.warning(f"{fault.message}; the load comes from token ids instead")
                self._set_client(Client.TOKEN_IDS)
        return run_pass(server.port, load, seed, vocabulary(self._subjects[start.subject].situation.model))

    def _check_files(self, start: Start, server: Server, own: Path) -> None:
        """What SGLang's log says it read is recorded; the tuned side must have read its pair.

        Raises:
            SGLangError: it did not.
        """
        used = files_used(server.log_text())
        pair = self._subjects[start.subject].tuned_pair
        missing = {own / pair.gate_up_name, own / pair.down_name} - set(used)
        if start.side is Side.TUNED and missing:
            names = ", ".join(sorted(path.name for path in missing))
            raise SGLangError(f"SGLang's log does not say that it read {names}.", f"Its log: {server.log}")
        result, names_used = self.results[start.subject], tuple(f"{path.parent.name}/{path.name}" for path in used)
        serve = tuple(
            _with_arm(load, start.side, replace(_arm(load, start.side), files=names_used)) for load in result.serve
        )
        self._update(start.subject, replace(result, serve=serve))

    # ---- keeping

    def _record(self, start: Start, load: Load, passed: Pass) -> None:
        result = self.results[start.subject]
        serve = tuple(
            judged(_with_arm(row, start.side, _with_pass(_arm(row, start.side), start.number, passed)))
            if row.load == load
            else row
            for row in result.serve
        )
        if passed.failed:
            self._say.warning(f"{load.name}: {passed.failed} requests failed, the first with: {passed.fault}")
        self._update(start.subject, replace(result, serve=serve))

    def _update(self, place: int, result: BenchResult) -> None:
        if (place, Side.SGLANG) in self._broken:
            measured = any(load.arms.tuned.output_tokens_per_s for load in result.serve)
            cured = Verdict.CURED if measured else None
            serve = tuple(replace(load, verdict=cured) for load in result.serve)
            result = replace(result, serve=serve, verdict=cured)
        else:
            ratio, margin, verdict = overall(result.serve)
            result = replace(result, ratio=ratio, margin=margin, verdict=verdict)
        self.results[place] = result
        self._publish(place, result)


def vocabulary(model: Model) -> int:
    """How many token ids the model knows; a small number where its config does not say."""
    size = model.text_config.get("vocab_size")
    return size if isinstance(size, int) and not isinstance(size, bool) and size > FIRST_ID else 1000


def _seed(load: Load, turn: int) -> int:
    """The prompts' seed: the same for both sides, another for each load and pass."""
    return SEED + 1000 * (turn + 1) + 7 * load.streams + load.input_tokens


def _arm(load: ServeLoad, side: Side) -> Arm:
    return load.arms.sglang if side is Side.SGLANG else load.arms.tuned


def _with_arm(load: ServeLoad, side: Side, arm: Arm) -> ServeLoad:
    arms = replace(load.arms, sglang=arm) if side is Side.SGLANG else replace(load.arms, tuned=arm)
    return replace(load, arms=arms)


def _with_pass(arm: Arm, start: int, passed: Pass) -> Arm:
    return replace(
        arm,
        output_tokens_per_s=(*arm.output_tokens_per_s, passed.output_tokens_per_s),
        starts=(*arm.starts, start),
        ttft_ms=_with_times(arm.ttft_ms, passed.ttft_ms),
        itl_ms=_with_times(arm.itl_ms, passed.itl_ms),
        failed=arm.failed + passed.failed,
    )


def _with_times(latency: Latency | None, times: tuple[float, float] | None) -> Latency | None:
    if times is None:
        return latency
    passes = (*(latency.passes if latency else ()), times[0])
    p99s = (*(latency.p99_passes if latency else ()), times[1])
    return Latency(round(statistics.median(passes), 3), round(statistics.median(p99s), 3), passes, p99s)


def _passes_of(load: ServeLoad, start: int) -> int:
    return sum(list(_arm(load, side).starts).count(start) for side in Side)


def _keep_starts(load: ServeLoad, starts: set[int]) -> ServeLoad:
    """The load with the passes of these starts only."""
    for side in Side:
        load = _with_arm(load, side, _kept(_arm(load, side), starts))
    return judged(load)


def _kept(arm: Arm, starts: set[int]) -> Arm:
    keep = [place for place, start in enumerate(arm.starts) if start in starts]

    def times(latency: Latency | None) -> Latency | None:
        if latency is None or not keep:
            return None
        pairs = [(latency.passes[place], latency.p99_passes[place]) for place in keep]
        made: Latency | None = None
        for pair in pairs:
            made = _with_times(made, pair)
        return made

    return replace(
        arm,
        output_tokens_per_s=tuple(arm.output_tokens_per_s[place] for place in keep),
        starts=tuple(arm.starts[place] for place in keep),
        ttft_ms=times(arm.ttft_ms),
        itl_ms=times(arm.itl_ms),
    )


# --- SGLang's own client ---------------------------------------------------------------------------------------------


def bench_serving_pass(package: Path, port: int, load: Load, seed: int) -> Pass:
    """One pass by `sglang.bench_serving` in a process of its own.

    Raises:
        SGLangError: it failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory(prefix="moefix-bench-") as scratch:
        output, log = Path(scratch, "result.jsonl"), Path(scratch, "log")
        with log.open("wb") as stream:
            child = start_child(client_command(package, port, load, seed, output), local_environment(), stream)
        try:
            code = child.wait(CLIENT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(child)
        text = log.read_text(errors="replace")
        try:
            return read_client_output(output.read_bytes(), load)
        except (OSError, ValueError) as fault:
            why = (last_lines(text, 1) or ["it printed nothing"])[0]
            raise SGLangError(
                f"sglang.bench_serving gave no result (exit code {code}; {fault}): {why}",
                "Use --client token-ids.",
            ) from fault
