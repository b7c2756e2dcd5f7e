"""What stands in for a card: a measuring process with synthetic times, a PyTorch that only imports, process helpers.

Imported by name in child processes, so it must stay free of pytest.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

from fixer.tuning.duel import Duel, DuelRequest, KernelDuel, Via
from fixer.tuning.measure.requests import LOOK_REPLAYS, TimeCloser
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel, Projection, Tile

LOG, FAULTS, PAUSE = "FAKE_LOG", "FAKE_FAULTS", "FAKE_PAUSE"
"""Environment variables: the file that every measurement is written to; what misbehaves; seconds a measurement."""

TORCH = """
import os, time
class _Anything:
    def __getattr__(self, name):
        return _Anything()
class _Cuda(_Anything):
    def set_device(self, device):
        if os.environ.get("FAKE_TORCH") == "slow":
            time.sleep(600)
        raise AssertionError("Torch not compiled with CUDA enabled")
cuda = _Cuda()
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()
"""
"""A PyTorch that imports at once, for children that only need its name. `FAKE_TORCH=slow` makes it hang at the card."""


def stub_torch(folder: Path) -> Path:
    """A folder for `sys.path` with the stand-in PyTorch."""
    (folder / "torch").mkdir(parents=True, exist_ok=True)
    (folder / "torch" / "__init__.py").write_text(TORCH)
    return folder


def stub_modelscope(folder: Path, model: Path) -> None:
    """A stand-in for ModelScope's client in a folder for `sys.path`; it has config.json of one model."""
    package = folder / "modelscope"
    for inner in ("hub", "utils"):
        (package / inner).mkdir(parents=True)
        (package / inner / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "utils" / "file_utils.py").write_text(
        f"def get_model_cache_root():\n    return {str(folder / 'modelscope-cache')!r}\n"
    )
    (package / "hub" / "file_download.py").write_text(f"""
import os
def model_file_download(model_id, file_path, revision=None, *, cache_dir=None):
    assert model_id == "owner/name" and cache_dir is None
    path = os.path.join({str(model)!r}, file_path)
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return path
""")


# --- the measuring process -------------------------------------------------------------------------------------------


def name_of(kernel: Kernel) -> str:
    """A kernel in one word."""
    tile = kernel.tile
    parts = (tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.num_warps, tile.num_stages)
    return "/".join([kernel.projection.value, *map(str, parts)])


def microseconds(kernel: Kernel, tokens: int) -> float:
    """A smooth landscape whose best tile depends on M and the projection, with no two tiles quite alike."""
    tile = kernel.tile
    wanted_m = 16 if tokens < 64 else 32
    wanted = (wanted_m, 64 if kernel.projection is Projection.GATE_UP else 128, 128, 4, 4)
    have = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)
    steps = sum(abs(math.log2(a / b)) for a, b in zip(have, wanted, strict=True))
    unlike = crc32(f"{name_of(kernel)} {tokens}".encode()) % 1000 / 1e5
    return (20 + tokens / 4) * (1 + 0.08 * steps + unlike)


def measure(setup):
    """Stands in for `measuring_handler`."""
    device = setup.device
    faults = json.loads(os.environ.get(FAULTS, "{}"))
    pause = float(os.environ.get(PAUSE, "0"))

    def note(*parts: object) -> None:
        if os.environ.get(LOG):
            with open(os.environ[LOG], "a") as log:
                log.write(" ".join(map(str, (device, *parts))) + "\n")

    def timing(kernel: Kernel, tokens: int, replays: int) -> Timing:
        time.sleep(pause)
        note("time", name_of(kernel), tokens, replays)
        value = microseconds(kernel, tokens)
        return Timing(kernel, tokens, value, value * 0.99, replays)

    def handle(request):
        if isinstance(request, DuelRequest):
            note("duel", request.tokens)
            if "crash in a duel" in [faults.get(name_of(kernel)) for kernel in request.tuned.kernels]:
                os.kill(os.getpid(), signal.SIGSEGV)
            return duel(request)
        if isinstance(request, TimeCloser):
            for kernel in request.kernels:
                misbehave(kernel)
            return tuple(timing(kernel, request.tokens, request.replays) for kernel in request.kernels)
        kernel = request.kernel
        wrong = misbehave(kernel)
        if wrong is not None:
            return wrong
        note("look", name_of(kernel))
        timings = tuple(timing(kernel, tokens, LOOK_REPLAYS) for tokens in request.rows)
        return Look(Build(kernel, Outcome.OK, 4096, 40, 0), timings)

    def misbehave(kernel: Kernel) -> Look | None:
        """What goes wrong for a kernel; the answer where there still is one."""
        fault = faults.get(name_of(kernel))
        if fault == "crash only on 1":
            fault = "crash" if device == 1 else None
        match fault:
            case "crash":
                note("crash", name_of(kernel))
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hang":
                note("hang", name_of(kernel))
                time.sleep(600)
            case "wrong":
                return Look(Build(kernel, Outcome.WRONG_RESULT, 4096, message="relative error 0.5"))
        return None

    note("start", os.getpid())
    return handle


def duel(request: DuelRequest) -> KernelDuel:
    """Both sides' times over seven rounds, 0.01 % apart."""
    rounds = [1 + turn / 1e4 for turn in range(7)]

    def sums(pair) -> tuple[float, ...]:
        return tuple(sum(microseconds(kernel, request.tokens) for kernel in pair.kernels) * turn for turn in rounds)

    pairs = [pair for pair in (request.own, request.tuned) if pair is not None]
    medians = {kernel: microseconds(kernel, request.tokens) for pair in pairs for kernel in pair.kernels}
    own = sums(request.own) if request.own is not None else ()
    return KernelDuel(Duel(request.tokens, Via.KERNELS, own, sums(request.tuned)), medians)


def kernel(projection: Projection, *values: int) -> Kernel:
    """A kernel from its tile's numbers."""
    return Kernel(projection, Tile(*values))


def logged(log: Path, kind: str) -> list[tuple[str, ...]]:
    """What the measuring processes wrote of one kind: (device, ...)."""
    if not log.exists():
        return []
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(line[0], *line[2:]) for line in lines if line[1] == kind]


def repeated(log: Path) -> list[tuple[str, ...]]:
    """Every (kernel, row, replays) that was timed more than once, as often as it was too often."""
    counts = Counter(line[1:] for line in logged(log, "time"))
    return [line for line, count in counts.items() for _ in range(count - 1)]


# --- processes -------------------------------------------------------------------------------------------------------


def processes_with(name: str, value: str) -> set[int]:
    """The running processes that have an environment variable of that value."""
    wanted, found = f"{name}={value}".encode(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if wanted in environment and state != "Z":
            found.add(int(folder.name))
    return found


def descendants(pid: int) -> set[int]:
    """The running children of a process, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def eventually(condition, seconds: float = 10.0) -> bool:
    """Whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def cubins(folder: Path) -> set[str]:
    """The compiled kernels in a cache folder of Triton's."""
    return {path.parent.name for path in folder.rglob("*.cubin")}


def unique(items: Iterable[object]) -> bool:
    """Whether nothing comes twice."""
    listed = list(items)
    return len(set(listed)) == len(listed)


def dead(setup):
    """A factory that dies, but not for ever: a runner that starts it over and over must come to its test's end."""
    with open(os.environ[LOG], "a") as log:
        log.write(f"{setup.device} dies\n")
    if len(logged(Path(os.environ[LOG]), "dies")) <= 3:
        os._exit(1)
    return measure(setup)


def descendants_of_me() -> set[int]:
    """This process's children, and theirs."""
    return descendants(os.getpid())


def helpers() -> set[int]:
    """multiprocessing's own two, which live as long as this process: the fork server and the resource tracker."""
    found = set()
    for pid in descendants_of_me():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"multiprocessing.forkserver" in command or b"resource_tracker" in command:
            found.add(pid)
    return found


# --- a whole tuning --------------------------------------------------------------------------------------------------

TUNE_ROWS = (1, 16, 128)


def small_job(package: Path, home: Path, *, cards: int = 1, **options):
    """A job of few rows for a small layer on a card that is not there."""
    from fixer.machine.cards import Card
    from fixer.sglang.tree import Tree
    from fixer.tuning.job import Job
    from fixer.workload import Workload

    tree = Tree(Path(package), "0.5.17", "3.6.0")
    there = tuple(
        Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 81559, index=index, driver="580.159.03") for index in range(cards)
    )
    return Job(tree, Workload(8, 64, 128, 2), there, TUNE_ROWS, "small", "", Path(home), **options)


def tune_small(job, progress=None, kernels: int = 24, factory=measure):
    """`tune` with a small search and the stand-in for the process that measures."""
    from functools import partial
    from unittest import mock

    import fixer.tuning.session
    import fixer.tuning.turn
    from fixer.base.progress import Silent
    from fixer.tuning.measure import card_runner
    from fixer.tuning.search.search import Limits, Search

    limits = Limits(seeds=8, round_size=8, kernels=kernels)
    with (
        mock.patch.object(card_runner, "CardRunner", partial(card_runner.CardRunner, factory=factory)),
        mock.patch.object(fixer.tuning.session, "Search", partial(Search, limits=limits)),
    ):
        progress = progress or Silent()
        with fixer.tuning.turn.turn(job.home, job.card, progress):
            return fixer.tuning.session.tune(job, progress)


def tune_in_child(package: str, home: str) -> None:
    """For a process of its own: tune, and print what came of it as JSON."""
    from fixer.base.progress import PlainLines

    tuned = tune_small(small_job(Path(package), Path(home)), PlainLines())
    print(json.dumps({"rows": choices(tuned.artefact), "resumed": tuned.resumed, "looks": len(tuned.looks)}))


def choices(artefact) -> dict[str, list[str]]:
    """What an artefact chooses, by M."""
    return {str(row.batch): [str(row.gate_up), str(row.down), row.decision.value] for row in artefact.rows}


# --- the whole program -----------------------------------------------------------------------------------------------

INSTANT, BROKEN = "FAKE_COMPILER", "FAKE_BROKEN"
"""Environment variables: kernels count as compiled at once; tuning ends with an error of this text."""


class InstantPool:
    """Stands in for `CompilePool`: every candidate is compiled as soon as it is asked for."""

    def __init__(self, *_: object) -> None:
        self._waiting: list = []
        self.connections: list = []

    busy = property(lambda self: len(self._waiting))
    waiting = property(lambda self: 0)

    def submit(self, candidates, *_: object, **__: object) -> None:
        self._waiting += candidates

    def poll(self, timeout: float = 0.0) -> list:
        from fixer.kernel.compile import Compiled, CompileOutcome

        some, self._waiting = self._waiting[:4], self._waiting[4:]
        return [(candidate, Compiled(CompileOutcome.OK, 4096, 0.5)) for candidate in some]

    def drain(self):
        while self._waiting:
            yield from self.poll()

    def close(self) -> None:
        self._waiting = []


def stand_in() -> None:
    """Have this process measure on a card that is not there, and search little."""
    from functools import partial

    import fixer.tuning.session
    from fixer.tuning.measure import card_runner
    from fixer.tuning.search.search import Limits, Search

    card_runner.CardRunner = partial(card_runner.CardRunner, factory=measure)
    fixer.tuning.session.Search = partial(Search, limits=Limits(seeds=8, round_size=8, kernels=24))
    if os.environ.get(INSTANT):
        card_runner.CompilePool = InstantPool
    if os.environ.get(BROKEN):

        def broken(*_: object):
            raise RuntimeError(os.environ[BROKEN])

        fixer.tuning.session.tune = broken
