"""SGLang's own look-up of tuning files: its functions, cut out of the user's tree and run with stand-ins.

Which names it asks for, where it looks and in which order, which row it takes for a number of tokens, what it computes
where it finds no file: nothing of that is written here. Checked against 26 releases, 0.4.6.post5 to 0.5.23. Only the
functions that look up run, and only for a tree that the user would run as a server.
"""

from __future__ import annotations

import copy
import functools
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import IO, Any, Protocol

from fixer.base.errors import SGLangError
from fixer.base.text import told
from fixer.machine.cards import Card
from fixer.sglang.cut import Slice, Source, UnknownFormError, cut, cut_slice, namespace
from fixer.sglang.stand_ins import LOOKUP_NAMES, Tensor, layer_arguments, lookup_stand_ins
from fixer.workload import Workload

CONFIG_DIR_VARIABLE = "SGLANG_MOE_CONFIG_DIR"
"""Names a folder that takes the place of SGLang's own tree of tuning files, in releases that read it."""

BEFORE_MOEFIX = ".before-moefix"
"""What moefix appends to the name of a file that it replaces; empty where there was none."""

LOOKUP_SOURCES = (
    "srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py",
    "srt/layers/moe/fused_moe_triton/fused_moe_triton_config.py",
    "srt/layers/moe/fused_moe_triton/fused_moe.py",
)
"""Where the look-up is: from 0.5.11, from 0.5.2, before."""

CALLER = "fused_moe.py"
"""Beside the look-up; the file whose function asks for a configuration and runs both kernels with it."""

_ENTRY = "try_get_optimal_moe_config"
_FUNCTIONS = ("get_config_file_name", "get_moe_configs", "get_default_config", _ENTRY, "get_config_dtype_str")
_USE_TMA = "USE_TMA"

_OF_OUR_STAND_INS = (AttributeError, ImportError, KeyError, NameError, TypeError)
"""What a form that moefix does not know raises: it meets a stand-in that lacks something."""

_OF_SGLANG = (AssertionError, OSError, ValueError)
"""What SGLang's own functions raise on files that they cannot use."""


class LookupStopsError(SGLangError):
    """SGLang's own look-up raises here: the server would stop."""


# --- what the look-up sees of the files ------------------------------------------------------------------------------


class Files(Protocol):
    """The tuning files as the look-up is to see them."""

    def find(self, path: str) -> Path | None:
        """The file that is read where SGLang opens `path`; None where SGLang is to see none."""

    def names(self, folder: str) -> list[str]:
        """The names in a folder; none for one that is not there."""


@dataclass(frozen=True)
class Disk:
    """The files that are there.

    Attributes:
        ignored: files that SGLang is to be taken not to see.
        without_moefix: show what was there before moefix wrote.
    """

    ignored: frozenset[Path] = frozenset()
    without_moefix: bool = False

    def find(self, path: str) -> Path | None:
        """The file itself, or what moefix kept of it."""
        file = Path(path)
        if self.without_moefix:
            before = file.with_name(file.name + BEFORE_MOEFIX)
            if before.exists():
                if before.stat().st_size == 0:
                    return None  # there was no file of that name here, so SGLang went on to the other folders
                file = before
        return file if file not in self.ignored and file.exists() else None

    @staticmethod
    def names(folder: str) -> list[str]:
        """What the folder holds. SGLang from 0.5.12 on stops at one that is not there; moefix makes it before that."""
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []


@dataclass(frozen=True)
class Chosen:
    """Files that were found already, by the name that SGLang asks for; there are no others."""

    files: Mapping[str, Path | None]

    def find(self, path: str) -> Path | None:
        """The file of that name, whatever the folder."""
        return self.files.get(os.path.basename(path))

    @staticmethod
    def names(_: str) -> list[str]:
        """None: what is asked for is found in the first folder, or not at all."""
        return []


# --- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What the look-up is told of its surroundings.

    Attributes:
        card: its name goes into the files' names, its shared memory decides the default of newer releases.
        triton: the running Triton's version.
        files: the tuning files.
        environ: the environment variables.
        deterministic: `--enable-deterministic-inference` is given.
        content: what every file is taken to hold; None reads the files. No rows are enough for a file's name and place.
    """

    card: Card
    triton: str
    files: Files
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    deterministic: bool = False
    content: str | None = "{}"


@dataclass(frozen=True)
class Rows:
    """What one launch of both kernels gets, as rows of a file.

    Attributes:
        gate_up, down: the rows; `down` is None where the gate-up's row is used for both.
        leaves_tma: USE_TMA of a gate-up row is left in it, for a kernel that has no such argument.
    """

    gate_up: Mapping[str, Any]
    down: Mapping[str, Any] | None
    leaves_tma: bool


@dataclass(frozen=True)
class OwnLookup:
    """The look-up of one tree, cut out.

    Attributes:
        place: the file that it takes itself to be: configurations lie beside it.
        functions: code that defines the look-up's functions.
        caller: the statements that call them.
        guess: "" for the tree's own; else why it is another release's, and whose.
    """

    place: Path
    functions: CodeType
    caller: Slice
    guess: str = ""

    @classmethod
    def of(cls, package: Path) -> OwnLookup:
        """The look-up of the tree in a package folder.

        Raises:
            UnknownFormError: it is not there, or not of a form that moefix knows.
        """
        source = Source.read(lookup_source(package))
        caller = Source.read(source.path.parent / CALLER)
        functions = cut(source, _FUNCTIONS, LOOKUP_NAMES, needed=_FUNCTIONS)
        return cls(source.path, functions, cut_slice(caller, _ENTRY, _USE_TMA, LOOKUP_NAMES | set(_FUNCTIONS)))

    def ask(self, workload: Workload, world: World) -> Asking:
        """Begin to ask for a layer."""
        return Asking(self, workload, world)


def lookup_source(package: Path) -> Path:
    """The file with the look-up's functions.

    Raises:
        UnknownFormError: there is none.
    """
    known = (package / relative for relative in LOOKUP_SOURCES)
    elsewhere = (path for path in sorted(package.glob("srt/layers/moe/**/*.py")) if _has_lookup(path))
    for path in (*(path for path in known if path.is_file()), *elsewhere):
        return path
    raise UnknownFormError(package, "it lacks the look-up of MoE tuning files (get_moe_configs)")


def _has_lookup(path: Path) -> bool:
    return b"\ndef get_moe_configs(" in path.read_bytes()


class Asking:
    """One layer on one card: the names that SGLang asks for, what it opens, and its rows for any M.

    Raises:
        UnknownFormError: when it is used: the functions are not of a form that moefix knows.
        LookupStopsError: when it is used: SGLang itself would stop.
    """

    def __init__(self, own: OwnLookup, workload: Workload, world: World) -> None:
        self._own = own
        self._world = world
        self._looked_at: list[str] = []
        self._opened: dict[str, Path] = {}
        self._asked: list[str] = []
        self._result: Any = None
        self._arguments = layer_arguments(workload)
        self._space = namespace({**self._stand_ins(), "__file__": str(own.place)})
        exec(own.functions, self._space)  # noqa: S102 (functions of the user's own SGLang, cut out)
        self._listen("get_config_file_name", self._asked.append)
        self._listen(_ENTRY, self._keep)

    def _stand_ins(self) -> dict[str, Any]:
        world = self._world
        return lookup_stand_ins(
            world.card,
            triton=world.triton,
            environ=world.environ,
            exists=self._exists,
            names=world.files.names,
            opened=self._open,
            deterministic=world.deterministic,
        )

    def _listen(self, name: str, hear: Any) -> None:
        function = self._space[name]

        @functools.wraps(function)
        def heard(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            hear(result)
            return result

        self._space[name] = heard

    def _keep(self, result: Any) -> None:
        self._result = copy.deepcopy(result)  # the caller takes USE_TMA out of it

    def rows(self, tokens: int) -> Rows:
        """The rows for M = `tokens`."""
        values = {**self._arguments, "hidden_states": Tensor((tokens, *self._arguments["hidden_states"].shape[1:]))}
        values["hidden_states"].dtype = self._arguments["hidden_states"].dtype
        missing = self._own.caller.parameters - values.keys()
        if missing:
            raise UnknownFormError(
                self._own.place, f"{self._own.caller.function} decides by {', '.join(sorted(missing))}"
            )
        space = {**self._space, **values}
        try:
            exec(self._own.caller.code, space)  # noqa: S102 (as above)
        except _OF_OUR_STAND_INS as error:
            raise self._unknown(f"its look-up ends with {told(error)}") from error
        except _OF_SGLANG as error:
            raise LookupStopsError(
                f"SGLang's own look-up stops for M = {tokens}: {told(error)}{self._files_meant()}",
                f"Look at the tuning files and folders in {self._looked_in()}.",
            ) from error
        gate_up, down = self._parts()
        return Rows(gate_up, down, _USE_TMA in space[self._own.caller.targets[0]])

    def _parts(self) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        gate_up, down = self._result, None
        if isinstance(gate_up, tuple):  # a pair: (gate-up, (down, its largest BLOCK_SIZE_M))
            gate_up, down = gate_up
            if isinstance(down, tuple):
                down = down[0]
        if not isinstance(gate_up, dict) or not isinstance(down, dict | None):
            raise UnknownFormError(
                self._own.place, f"{_ENTRY} gives {type(gate_up).__name__} and {type(down).__name__}"
            )
        return gate_up, down

    def _unknown(self, what: str) -> UnknownFormError:
        return UnknownFormError(self._own.place, what)

    def _looked_in(self) -> str:
        return str(Path(self._looked_at[0]).parent) if self._looked_at else str(self._own.place.parent)

    def _files_meant(self) -> str:
        return f" ({', '.join(str(path) for path in self._opened.values())})" if self._opened else ""

    # ---- what was asked for, after the first `rows`

    @property
    def gate_up(self) -> str:
        """The gate-up file's name, or the joint file's; "" where none was asked for."""
        return next(iter(self._asked), "")

    @property
    def down(self) -> str:
        """The down file's name; "" where none of its own was asked for."""
        return next((name for name in self._asked if name != self.gate_up), "")

    @property
    def folder(self) -> Path:
        """Where SGLang looks first.

        Raises:
            UnknownFormError: it looked nowhere.
        """
        for path in self._looked_at:
            if os.path.basename(path) == self.gate_up:
                return Path(path).parent
        raise self._unknown("it looks for no file")

    def opened(self, name: str) -> Path | None:
        """The file that is read under a name, None where none is found."""
        return self._opened.get(name) if name else None

    # ---- for the stand-ins

    def _exists(self, path: str) -> bool:
        self._looked_at.append(str(path))
        return self._world.files.find(str(path)) is not None

    def _open(self, path: str, *_: Any, **__: Any) -> IO[str]:
        file = self._world.files.find(str(path))
        if file is None:
            raise FileNotFoundError(str(path))
        self._opened.setdefault(os.path.basename(path), file)
        content = self._world.content
        return file.open(encoding="utf-8") if content is None else io.StringIO(content)
