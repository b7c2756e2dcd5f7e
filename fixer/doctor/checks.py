"""What on this machine keeps SGLang or moefix from working, each point with its cure. Looks only: nothing is changed.

Every check runs in a thread of its own with a deadline, so that a driver or a hub that hangs costs one line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import fixer
from fixer.base.errors import CardError, MoefixError, SGLangError, UsageError, told
from fixer.model.rules.families import rules_for
from fixer.sglang.flags import ServerFlags, parse_flags
from fixer.machine.cards import Card, SHARED_MEMORY_BYTES, occupancy, visible_cards
from fixer.model.hub import hub_cache, uses_modelscope
from fixer.sglang.tree import PINNED, RELEASES, Tree, find_tree

SCHEMA = 1

SHM = "/dev/shm"  # noqa: S108 (that very folder)

ENOUGH_SHM = 1 << 30
"""Bytes of /dev/shm: Docker's default of 64 MiB is too small for NCCL and for SGLang's processes among themselves."""

LITTLE_DISK, TOO_LITTLE_DISK = 2 << 30, 128 << 20
"""Bytes free for the data folder: Triton's caches of one model take some hundred MiB."""

LITTLE_HUB_DISK = 30 << 30
"""Bytes free for weights that are not there yet."""

FREE_SHARE = 0.9
"""A card with less of its memory free is not only moefix's and SGLang's."""

MOST_ENTRIES = 20000
"""Files of a folder whose owner is looked at."""

BUILD_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""What an image's kernels are compiled for as a proof."""

FP8_SINCE = 89
"""The first architecture for which Triton compiles FP8 (fp8e4nv)."""

NOBODY = 54321
"""A user without a name, for the proof that any user can start the image."""


class State(Enum):
    """What a finding means."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at.
        state: what it means.
        text: what is so.
        fix: what to do, "" where nothing is to be done.
    """

    check: str
    state: State
    text: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """The row of `moefix doctor --json`."""
        return {"check": self.check, "state": self.state.value, "text": self.text, "fix": self.fix}


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        home: the data folder; it may not exist.
        argv: the model and other SGLang flags; () for none.
        sglang_root: a tree to use instead of the installed one.
    """

    home: Path
    argv: tuple[str, ...] = ()
    sglang_root: Path | None = None

    @cached_property
    def cards(self) -> tuple[Card, ...]:
        """The visible cards; a driver that fails is for the driver's own check to tell."""
        with contextlib.suppress(CardError):
            return visible_cards()
        return ()

    @cached_property
    def tree(self) -> Tree:
        """SGLang's.

        Raises:
            SGLangError: there is none.
        """
        return find_tree(str(self.sglang_root) if self.sglang_root else None, None, self.home / "cache", fetch=False)

    @cached_property
    def flags(self) -> ServerFlags:
        """The parsed flags."""
        return parse_flags(self.argv)


@dataclass(frozen=True)
class Check:
    """One look: its name, what it does, its deadline in seconds, and what it means when the deadline passes."""

    name: str
    look: Callable[[Patient], Iterable[Finding]]
    seconds: float = 20.0
    hung: State = State.FAILURE


def examine(patient: Patient, checks: Sequence[Check]) -> Iterator[Finding]:
    """Every finding, in the order of the checks, which run at the same time."""
    rooms = [_Room(check, patient) for check in checks]
    for room in rooms:
        yield from room.findings()


def worst(findings: Iterable[Finding]) -> State:
    """The gravest state."""
    states = {finding.state for finding in findings}
    return next((state for state in (State.FAILURE, State.WARNING) if state in states), State.OK)


class _Room:
    """A check at work. The thread is a daemon: one that hangs in the driver does not keep the program from ending."""

    def __init__(self, check: Check, patient: Patient) -> None:
        self._check = check
        self._patient = patient
        self._found: list[Finding] = []
        self._is_done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._found = list(self._check.look(self._patient))
        except MoefixError as fault:
            self._found = [Finding(self._check.name, State.FAILURE, fault.message, fault.hint)]
        except Exception as fault:  # a check that fails is a finding, and the others go on
            self._found = [Finding(self._check.name, State.FAILURE, f"it could not be checked: {told(fault)}")]
        self._is_done.set()

    def findings(self) -> list[Finding]:
        if self._is_done.wait(self._check.seconds):
            return self._found
        return [Finding(self._check.name, self._check.hung, f"no answer within {self._check.seconds:g} s", _HUNG_FIX)]


_HUNG_FIX = "Something hangs: see nvidia-smi and dmesg for the driver, the network and proxy settings for the hub."


# --- the card --------------------------------------------------------------------------------------------------------


def look_at_driver(patient: Patient) -> Iterator[Finding]:
    """The driver answers, and shows a card."""
    cards = visible_cards()
    if not cards:
        yield Finding(
            "driver",
            State.FAILURE,
            "no NVIDIA card is visible",
            "In Docker start with --gpus all and the NVIDIA Container Toolkit; else install the driver. "
            "CUDA_VISIBLE_DEVICES must not be empty.",
        )
    for card in cards:
        capability = "{}.{}".format(*card.capability)
        yield Finding(
            "driver",
            State.OK,
            f"device {card.index}: {card.name}, compute capability {capability}, {card.memory_mib} MiB,"
            f" driver {card.driver or 'of unknown version'}",
        )


def look_at_shared_memory(patient: Patient) -> Iterator[Finding]:
    """The driver's limit is the one that CUDA documents for the architecture."""
    for card in patient.cards:
        capability = "{}.{}".format(*card.capability)
        documented = SHARED_MEMORY_BYTES.get(card.capability)
        said = f"device {card.index}: {card.shared_memory} bytes a block"
        if documented is None:
            yield Finding(
                "shared memory",
                State.WARNING,
                f"{said}; compute capability {capability} is not in moefix's table",
                "Nothing to do: the driver's number counts. A newer moefix may know the card.",
            )
        elif documented != card.shared_memory:
            yield Finding(
                "shared memory",
                State.WARNING,
                f"{said}, and CUDA documents {documented} for {capability}",
                "Nothing to do here: the driver's number counts. Plans made elsewhere for this card may be off.",
            )
        else:
            yield Finding("shared memory", State.OK, f"{said}, as documented for {capability}")


def look_at_use(patient: Patient) -> Iterator[Finding]:
    """Nothing else uses the card."""
    for card in patient.cards:
        found = occupancy(card)
        who = f"device {card.index}"
        if found.free_mib is None:
            yield Finding("use of the card", State.OK, f"{who}: the driver does not say (a MIG slice, or no NVML)")
            continue
        state = f"{who}: {found.free_mib} of {card.memory_mib} MiB are free"
        state += f", {found.busy_percent} % busy" if found.busy_percent is not None else ""
        if found.is_busy or found.free_mib < FREE_SHARE * card.memory_mib:
            yield Finding(
                "use of the card",
                State.WARNING,
                f"{state}, held {found.held_by()}",
                "Stop what else uses it: SGLang takes most of the memory, and tuning beside another is less certain.",
            )
        else:
            yield Finding("use of the card", State.OK, state)


def _run(command: Sequence[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program's answer. It ends a little before its check's deadline, so that it does not outlive this one."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        **options,
    )


# --- compiling -------------------------------------------------------------------------------------------------------


def look_at_compiler(patient: Patient) -> Iterator[Finding]:
    """A C compiler that finds Python's headers, where Triton looks for it (runtime/build.py: CC, gcc, clang)."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        yield Finding(
            "C compiler", State.FAILURE, "there is neither gcc nor clang", "apt-get install gcc libc6-dev, or set CC."
        )
        return
    include = sysconfig.get_paths()["include"]
    python = f"python3.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix="moefix-") as scratch:
        source = Path(scratch, "launcher.c")
        source.write_text("#include <Python.h>\nPyObject *moefix(void) { return PyLong_FromLong(1); }\n")
        command = [
            compiler,
            str(source),
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{include}",
            "-o",
            str(source.with_suffix(".so")),
        ]
        try:
            result = _run(command, 50.0)
        except OSError as fault:
            yield Finding(
                "C compiler", State.FAILURE, f"{compiler} does not start: {fault.strerror}", "Set CC to a C compiler."
            )
            return
    if result.returncode == 0:
        yield Finding("C compiler", State.OK, f"{compiler} builds what Triton launches kernels with")
    elif not Path(include, "Python.h").is_file():
        yield Finding(
            "C compiler", State.FAILURE, f"Python.h is not in {include}", f"apt-get install {python}-dev (python3-dev)."
        )
    else:
        first = next((line for line in result.stderr.splitlines() if "error" in line), "it gave no reason")
        yield Finding(
            "C compiler", State.FAILURE, f"{compiler} cannot build: {first[:200]}", "apt-get install gcc libc6-dev."
        )


IMPORT_TRITON = "import triton, triton.language; print(triton.__version__)"


def look_at_triton(patient: Patient) -> Iterator[Finding]:
    """Triton can be imported, and is the one that the SGLang runs with."""
    result = _run([sys.executable, "-c", IMPORT_TRITON], 110.0)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding(
            "Triton", State.FAILURE, f"it cannot be imported: {last[:200]}", "Install SGLang anew: it brings Triton."
        )
        return
    version = result.stdout.strip()[:40]
    with contextlib.suppress(SGLangError):
        release = RELEASES.get(patient.tree.version)
        if release is not None and release.triton != version:
            yield Finding(
                "Triton",
                State.WARNING,
                f"{version}, and SGLang {release.version} was released with {release.triton}",
                f"pip install triton=={release.triton}, unless you chose this one: tunings are kept apart by version.",
            )
            return
    yield Finding("Triton", State.OK, version)


# --- SGLang ----------------------------------------------------------------------------------------------------------


def look_at_sglang(patient: Patient) -> Iterator[Finding]:
    """A tree is found, of a known version, with the kernel and the folder of tuning files."""
    from fixer.kernel.compile import read_kernel_source

    tree = patient.tree
    if tree.version in RELEASES:
        yield Finding("SGLang", State.OK, f"{tree.version} in {tree.package}")
    else:
        yield Finding(
            "SGLang",
            State.WARNING,
            f"{tree.version} in {tree.package} is not among the tested releases ({', '.join(RELEASES)});"
            f" it is taken for {rules_for(tree.version)}",
            "If SGLang then looks for other files than moefix wrote, take a tested release.",
        )
    source = read_kernel_source(tree.kernel_source)
    yield Finding("SGLang's kernel", State.OK, f"{source.path.relative_to(tree.package)}, {source.sha256[:12]}")
    yield _place_of_files(tree)
    yield from _files_there(tree)


def _place_of_files(tree: Tree) -> Finding:
    folder = tree.triton_folder
    named = "" if tree.configs == tree.shipped_configs else " (SGLANG_MOE_CONFIG_DIR names it, in SGLang's own place)"
    if _is_writable(folder):
        return Finding("tuning files", State.OK, f"{folder} can be written{named}")
    return Finding("tuning files", State.OK, f"{folder} is read-only{named}: an overlay in the data folder is used")


def _files_there(tree: Tree) -> Iterator[Finding]:
    folder = tree.triton_folder
    entries = _entries(folder)
    if folder.is_dir():
        count = sum(entry.suffix == ".json" for entry in entries)
        yield Finding("Triton's folder", State.OK, f"{folder.name} holds {count} tuning files")
    else:
        yield Finding(
            "Triton's folder",
            State.OK,
            f"{folder.name} is not there yet: SGLang takes other Triton versions' files, moefix makes the folder",
        )
    aside = [entry.name for entry in entries if ".damaged-" in entry.name]
    if aside:
        yield Finding(
            "Triton's folder",
            State.WARNING,
            f"{len(aside)} damaged or overflowing files were moved aside there: {aside[0]}",
            "Look at them and remove them when you need them no more.",
        )


def look_at_model(patient: Patient) -> Iterator[Finding]:
    """The named model can be read, and what SGLang does with it on each kind of card."""
    from fixer.model.rules.decide import decide
    from fixer.machine.cards import kinds
    from fixer.model.config import load_model

    if not patient.flags.model_path:
        return
    model = load_model("", patient.flags)
    yield Finding("model", State.OK, f"{model.name}: {model.architecture}" + (f" ({model.note})" if model.note else ""))
    for group in kinds(patient.cards):
        decision = decide(model, patient.flags, group[0], patient.tree.version)
        yield Finding("model", State.OK, f"on {group[0].name}: {decision.reason}")
        if decision.workload is not None:
            yield from _files_for(patient.tree, decision.workload, group[0])


def _files_for(tree: Tree, workload: object, card: Card) -> Iterator[Finding]:
    from fixer.artefacts.install import parse_table
    from fixer.artefacts.shelf import read_bounded
    from fixer.workload import Workload

    assert isinstance(workload, Workload)
    lookup = tree.lookup(workload, card)
    for path in filter(None, (lookup.gate_up_path, lookup.down_path)):
        try:
            parse_table(read_bounded(path))
        except (OSError, ValueError) as fault:
            yield Finding(
                "tuning files",
                State.FAILURE,
                f"SGLang would read {path} and fail: {told(fault)}",
                "Start with moefix, which moves it aside, or move it away.",
            )
        else:
            yield Finding("tuning files", State.OK, f"SGLang reads {path.parent.name}/{path.name}")


# --- folders ---------------------------------------------------------------------------------------------------------


def look_at_home(patient: Patient) -> Iterator[Finding]:
    """The data folder can be written, and its files have its owner."""
    home = patient.home
    if not _is_writable(home):
        yield Finding(
            "data folder",
            State.FAILURE,
            f"{home} cannot be written by user {os.geteuid()}",
            f"chown it to that user, or set MOEFIX_HOME: {_chown(home, os.geteuid(), os.getegid())}",
        )
    else:
        yield Finding("data folder", State.OK, f"{home} can be written" + ("" if home.is_dir() else " (not made yet)"))
    yield from _owners("data folder", home)
    aside = [path.name for path in _walk(home) if ".damaged-" in path.name]
    if aside:
        yield Finding(
            "data folder",
            State.WARNING,
            f"{len(aside)} damaged files were set aside there: {aside[0]}",
            "Remove them when you need them no more; many of them hint at a bad disk.",
        )


def look_at_caches(patient: Patient) -> Iterator[Finding]:
    """The hub's and Triton's caches can be written by this user."""
    for name, folder in _caches():
        if _is_writable(folder):
            yield Finding(name, State.OK, f"{folder} can be written")
        else:
            yield Finding(
                name,
                State.FAILURE,
                f"{folder} cannot be written by user {os.geteuid()}",
                f"{_chown(folder, os.geteuid(), os.getegid())}, or name another folder with {_VARIABLES[name]}.",
            )
        yield from _owners(name, folder)


_VARIABLES = {"hub cache": "HF_HOME", "Triton's cache": "TRITON_CACHE_DIR"}


def _caches() -> tuple[tuple[str, Path], ...]:
    from fixer.tuning.precompile import server_triton_cache

    return (("hub cache", hub_cache()), ("Triton's cache", server_triton_cache()))


def _is_writable(folder: Path) -> bool:
    """Whether this user can make files in a folder, or make the folder where it is not there yet."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _owners(name: str, folder: Path) -> Iterator[Finding]:
    """Files of another user than the folder's, as an image that ran as root leaves them in a mounted folder."""
    try:
        owner = folder.stat()
    except OSError:
        return
    strange = [path for path in _walk(folder) if _uid(path) not in (owner.st_uid, None)]
    if strange:
        users = ", ".join(sorted({"root" if _uid(path) == 0 else f"user {_uid(path)}" for path in strange}))
        yield Finding(
            name,
            State.WARNING,
            f"{len(strange)} files in {folder} belong to {users}, and the folder to user {owner.st_uid}:"
            f" {strange[0].name}",
            _chown(folder, owner.st_uid, owner.st_gid),
        )


def _chown(folder: Path, uid: int, gid: int) -> str:
    return f"sudo chown -R {uid}:{gid} {folder}"


def _uid(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def _walk(folder: Path) -> list[Path]:
    paths = (Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files))
    return list(itertools.islice(paths, MOST_ENTRIES))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def look_at_shm(patient: Patient) -> Iterator[Finding]:
    """The memory that processes share is large enough."""
    try:
        found = os.statvfs(SHM)
    except OSError as fault:
        yield Finding(SHM, State.WARNING, f"not there: {fault.strerror}", "Mount a tmpfs there.")
        return
    size = found.f_frsize * found.f_blocks
    if size < ENOUGH_SHM:
        yield Finding(
            SHM,
            State.WARNING,
            f"{size >> 20} MiB; SGLang with more than one card needs more",
            "docker run --ipc host, or --shm-size 16g.",
        )
    else:
        yield Finding(SHM, State.OK, f"{size >> 20} MiB")


def look_at_disk(patient: Patient) -> Iterator[Finding]:
    """There is room for what is kept, and for weights."""
    for name, folder, little in (
        ("data folder", patient.home, LITTLE_DISK),
        ("hub cache", _caches()[0][1], LITTLE_HUB_DISK),
    ):
        there = next((path for path in (folder, *folder.parents) if path.exists()), None)
        if there is None:
            continue
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.1f} GiB are free for the {name}"
        if free < TOO_LITTLE_DISK:
            yield Finding("disk", State.FAILURE, text, f"Free some space on the file system of {there}.")
        elif free < little:
            yield Finding("disk", State.WARNING, text, f"Weights or caches may not fit: free some space at {there}.")
        else:
            yield Finding("disk", State.OK, text)


# --- the hub ---------------------------------------------------------------------------------------------------------


def look_at_hub(patient: Patient) -> Iterator[Finding]:
    """The hub answers, unless the user wants to be offline."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", State.OK, "offline by wish (HF_HUB_OFFLINE)")
        return
    if uses_modelscope():
        yield Finding("hub", State.OK, "ModelScope by wish (SGLANG_USE_MODELSCOPE): SGLang downloads by itself")
        return
    where = told_address(constants.ENDPOINT)
    try:
        code = httpx.get(constants.ENDPOINT, timeout=8.0, follow_redirects=False).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as fault:
        yield Finding(
            "hub",
            State.WARNING,
            f"{where} cannot be reached: {told(fault)}",
            "Check the network, HTTPS_PROXY and HF_ENDPOINT; for a model that is in the cache set HF_HUB_OFFLINE=1.",
        )
        return
    if code >= 500:
        yield Finding("hub", State.WARNING, f"{where} answers with status {code}", "Try again later.")
    else:
        yield Finding("hub", State.OK, f"{where} answers")


def told_address(endpoint: str) -> str:
    """Scheme and host of an address: what else is in it may be a secret."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(endpoint)
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        return "HF_ENDPOINT"
    return f"{parts.scheme}://{host}" if host else "HF_ENDPOINT"


def look_at_token(patient: Patient) -> Iterator[Finding]:
    """The token, if there is one, is valid. It is never printed."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token = get_token()
    if token is None:
        yield Finding("token", State.OK, "none: public models can be read")
        return
    if constants.HF_HUB_OFFLINE:
        yield Finding("token", State.OK, "there is one; not checked, offline by wish")
        return
    try:
        HfApi().whoami(token=token)
    except HfHubHTTPError as fault:
        code = getattr(fault.response, "status_code", 0)
        if code in (401, 403):
            yield Finding(
                "token",
                State.FAILURE,
                f"the hub does not accept it (status {code}), and refuses public models with it, too",
                "Set HF_TOKEN to a valid one (hub settings, Access Tokens), or unset it; `hf auth login` stores one.",
            )
        else:
            yield Finding("token", State.WARNING, f"not checked: the hub answered with status {code}")
    except Exception as fault:  # the transport's own errors, which differ by version; their texts may hold headers
        yield Finding("token", State.WARNING, f"not checked: the hub is out of reach ({type(fault).__name__})")
    else:
        yield Finding("token", State.OK, "valid")


# --- an image at build time ------------------------------------------------------------------------------------------


def look_at_pin(patient: Patient) -> Iterator[Finding]:
    """SGLang and Triton are the pinned ones."""
    tree = patient.tree
    good = tree.version == PINNED
    yield Finding(
        "SGLang",
        State.OK if good else State.WARNING,
        f"{tree.version} in {tree.package}",
        "" if good else f"This moefix is built and tested with {PINNED}: set SGLANG_VERSION.",
    )
    wanted = RELEASES.get(tree.version, RELEASES[PINNED]).triton
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    good = version == wanted
    fix = "" if good else f"SGLang {tree.version} runs with Triton {wanted}: set TRITON_VERSION."
    yield Finding("Triton", State.OK if good else State.FAILURE, version, fix)


def look_at_kernels(patient: Patient) -> Iterator[Finding]:
    """SGLang's kernel compiles for every supported architecture."""
    from fixer.kernel.pool import CompilePool, FixedDeadline, compile_all
    from fixer.kernel.compile import Candidate, CompileOutcome, Target, read_kernel_source
    from fixer.workload import NumberFormat, Projection, Tile, Workload

    source = read_kernel_source(patient.tree.kernel_source)
    with tempfile.TemporaryDirectory(prefix="moefix-") as scratch:
        for arch in BUILD_ARCHITECTURES:
            number_format = NumberFormat.FP8_W8A8 if arch >= FP8_SINCE else NumberFormat.NONE
            candidate = Candidate(
                Workload(8, 128, 256, 2, number_format), Projection.GATE_UP, Tile(16, 64, 128, 1, 4, 3)
            )
            target = Target(source, arch, Path(scratch, "kernels"))
            with CompilePool(target, Path(scratch, "triton"), 1, FixedDeadline(120.0)) as pool:
                compiled = compile_all(pool, [candidate])[candidate]
            what = f"sm_{arch}, {'FP8' if number_format is NumberFormat.FP8_W8A8 else 'bf16'}"
            if compiled.outcome is CompileOutcome.OK:
                yield Finding("kernel", State.OK, f"{what}: {compiled.shared_bytes} bytes of shared memory")
            else:
                fault = compiled.message or compiled.outcome.value
                yield Finding("kernel", State.FAILURE, f"{what}: {fault[:200]}", "Triton and SGLang do not match.")


def look_at_entry_point(patient: Patient) -> Iterator[Finding]:
    """moefix starts, as a user without a name where this one may change to it."""
    as_root = os.geteuid() == 0
    options: dict[str, Any] = {"user": NOBODY, "group": 0, "extra_groups": []} if as_root else {}
    beside = Path(fixer.__file__).resolve().parents[1] / "entrypoint.py"
    program = [str(beside)] if beside.is_file() else ["-c", "from fixer.cli import main; main()"]
    who = f"user {NOBODY}" if as_root else f"user {os.geteuid()} (only root can try others)"
    try:
        result = _run([sys.executable, *program, "--version"], 50.0, cwd="/", **options)
        said = (result.stderr or result.stdout).strip().splitlines()
        is_good = result.returncode == 0 and result.stdout.strip() == f"moefix {fixer.__version__}"
    except OSError as fault:
        said, is_good = [f"{fault.filename or sys.executable}: {fault.strerror}"], False
    if is_good:
        yield Finding("entry point", State.OK, f"it starts as {who}")
    else:
        last = said[-1][:200] if said else "no reason given"
        yield Finding(
            "entry point",
            State.FAILURE,
            f"it does not start as {who}: {last}",
            "Make Python and moefix readable to all.",
        )


CHECKS = (
    Check("driver", look_at_driver),
    Check("shared memory", look_at_shared_memory),
    Check("use of the card", look_at_use),
    Check("C compiler", look_at_compiler, 60.0),
    Check("Triton", look_at_triton, 120.0),
    Check("SGLang", look_at_sglang),
    Check("model", look_at_model, 60.0),
    Check("data folder", look_at_home),
    Check("caches", look_at_caches, 30.0),
    Check(SHM, look_at_shm),
    Check("disk", look_at_disk),
    Check("hub", look_at_hub, 15.0, State.WARNING),
    Check("token", look_at_token, 15.0, State.WARNING),
)
"""What `moefix doctor` looks at."""

BUILD_CHECKS = (
    Check("SGLang", look_at_pin),
    Check("SGLang's kernel", look_at_sglang),
    Check("C compiler", look_at_compiler, 60.0),
    Check("Triton", look_at_triton, 300.0),
    Check("kernel", look_at_kernels, 600.0),
    Check("entry point", look_at_entry_point, 60.0),
)
"""What `moefix doctor --build` looks at: without a card, a network or a hub, while an image is built."""


def wished_home(chosen: Path | None) -> Path:
    """The data folder, whether it can be written or not.

    Raises:
        UsageError: this user has no home folder, and none is named.
    """
    from fixer.base.errors import StoreError
    from fixer.artefacts.shelf import wanted_home

    try:
        return wanted_home(chosen)
    except StoreError as fault:
        raise UsageError(fault.message, fault.hint) from fault
