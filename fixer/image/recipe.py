"""A ready-tuned image as data: what goes into it, its labels, its command, and the build context made of them.

Nothing here talks to Docker. `dockerfile` is the one place where instructions are written.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

from fixer import __version__
from fixer.artefacts.artefact import Artefact
from fixer.artefacts.baked import COMMAND_FILE, VARIABLE
from fixer.artefacts.gains import geometric_gain
from fixer.artefacts.shelf import artefact_path

FOLDER = PurePosixPath("/opt/moefix-baked")
"""Where the image keeps what it brings: not below /data, which is a volume."""

WEIGHTS = FOLDER / "model"

BANDS = ((1, 8), (9, 64), (65, 512), (513, None))
"""Rows M whose gain is told together: one stream, some, many, prefill."""

_BLOCK = 512
_PIECE = 1 << 20


@dataclass(frozen=True)
class Weights:
    """The files of a model that SGLang loads: their folder, and their names in it."""

    folder: Path
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum((self.folder / name).stat().st_size for name in self.names)


@dataclass(frozen=True)
class Recipe:
    """What a ready-tuned image is made of.

    Attributes:
        base, base_name: the moefix image's id, and its name.
        entrypoint: the moefix image's.
        artefacts: one for each kind of card.
        command: the arguments that `docker run` without any has.
        model, revision: whose image it is; `revision` is "" for a folder.
        weights: the model's files to put in, None for an image without weights.
        date: UTC, as artefacts write it.
    """

    base: str
    base_name: str
    entrypoint: tuple[str, ...]
    artefacts: tuple[Artefact, ...]
    command: tuple[str, ...]
    model: str
    revision: str
    weights: Weights | None
    date: str


def default_command(model: str, revision: str | None, flags: Sequence[str], *, weights: bool) -> tuple[str, ...]:
    """The image's own command line.

    Args:
        model: a hub id or an absolute folder.
        revision: the hub's commit or branch, None for its default.
        flags: the user's SGLang flags, left as they are.
        weights: the weights are in the image; the server goes by the model's name all the same.
    """
    given = {word.partition("=")[0] for word in flags}
    words = ["--model", str(WEIGHTS) if weights else model]
    if weights and "--served-model-name" not in given:
        words += ["--served-model-name", model]
    if revision and not weights:
        words += ["--revision", revision]
    if "--host" not in given:
        words += ["--host", "0.0.0.0"]  # noqa: S104 (what a published port of a container needs)
    return (*words, *flags)


# --- labels ----------------------------------------------------------------------------------------------------------


def labels(recipe: Recipe) -> dict[str, str]:
    """The image's labels; of several cards' values, one behind the other. What is not known is "", never left out:
    an image that was built on a ready-tuned one would have that one's.
    """
    artefacts = recipe.artefacts
    environments = [artefact.environment for artefact in artefacts]

    def joined(values: Sequence[object]) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values))

    cards = joined([environment.card for environment in environments])
    own = {
        "card": cards,
        "compute-capability": joined(["{}.{}".format(*environment.capability) for environment in environments]),
        "shared-memory": joined([environment.shared_memory for environment in environments]),
        "driver": joined([environment.driver for environment in environments]),
        "model": recipe.model,
        "revision": recipe.revision,
        "weights": "yes" if recipe.weights else "no",
        "sglang": joined([environment.sglang for environment in environments]),
        "triton": joined([environment.triton for environment in environments]),
        "moefix": __version__,
        "base": recipe.base,
        "rows": joined([len(artefact.rows) for artefact in artefacts]),
        "basis": joined(["measured" if artefact.measured else "plan" for artefact in artefacts]),
        "date": joined([artefact.created for artefact in artefacts]),
    }
    gains = {f"gain.{band_name(*band)}": joined([_gain(artefact, *band) for artefact in artefacts]) for band in BANDS}
    image = {
        "title": f"{recipe.model} on {cards}",
        "created": recipe.date,
        "base.name": recipe.base_name,
    }
    return {f"moefix.baked.{name}": value for name, value in (own | gains).items()} | {
        f"org.opencontainers.image.{name}": value for name, value in image.items()
    }


def band_name(least: int, most: int | None) -> str:
    """A band's part of its label's name: "m1-8", "m513-"."""
    return f"m{least}-{'' if most is None else most}"


def _gain(artefact: Artefact, least: int, most: int | None) -> str:
    """By which factor a band's rows are faster than SGLang's own, as a geometric mean; "" where nothing is known."""
    gain = geometric_gain(artefact, lambda batch: least <= batch and (most is None or batch <= most))
    return "" if gain is None else f"{gain:.4f}"


# --- the build context -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One file of the build context: its path there, and its content or the file that has it."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def dockerfile(recipe: Recipe) -> str:
    """The Dockerfile. Values come in as JSON, in which nothing is substituted, or quoted as a label's value."""
    install = [*recipe.entrypoint, "import", "--install", "--home", str(FOLDER)]
    lines = [
        f"FROM {recipe.base}",
        *([f"COPY model {WEIGHTS}"] if recipe.weights else []),
        f"COPY baked {FOLDER}",
        f"ENV {VARIABLE}={FOLDER}",
        "RUN " + json.dumps([*install, *(str(artefact_file(artefact)) for artefact in recipe.artefacts)]),
        "CMD " + json.dumps(recipe.command),
        "LABEL " + " ".join(f"{name}={_quoted(value)}" for name, value in labels(recipe).items()),
    ]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    """A label's value: within double quotes a Dockerfile substitutes $ and unescapes backslashes."""
    return '"' + re.sub(r'(["\\$])', r"\\\1", " ".join(value.split())) + '"'


def artefact_file(artefact: Artefact) -> Path:
    """Where the image keeps an artefact."""
    return artefact_path(Path(FOLDER), artefact.environment, artefact.workload)


def context(recipe: Recipe) -> Iterator[Entry]:
    """All that is sent to the engine: nothing of the folder that moefix was called in."""
    yield Entry("Dockerfile", dockerfile(recipe).encode())
    yield Entry(f"baked/{COMMAND_FILE}", (json.dumps(recipe.command) + "\n").encode())
    for artefact in recipe.artefacts:
        inside = artefact_file(artefact).relative_to(FOLDER)
        yield Entry(f"baked/{inside}", artefact.to_json().encode())
    if recipe.weights is not None:
        for name in recipe.weights.names:
            yield Entry(f"model/{name}", recipe.weights.folder / name)


def tar_pieces(
    entries: Iterator[Entry], sent: Callable[[int], None] = lambda count: None
) -> Generator[bytes, None, None]:
    """The entries as one tar file, piece by piece, so that weights never are in memory as a whole.

    Args:
        sent: told how many bytes of content went out since it was last told.

    Raises:
        OSError: a file cannot be read, or shrank.
    """
    folders: set[str] = set()
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.name).parents[:-1]):
            if str(parent) not in folders:
                folders.add(str(parent))
                yield _header(str(parent), 0, tarfile.DIRTYPE)
        size = entry.size
        yield _header(entry.name, size, tarfile.REGTYPE)
        left = size
        with BytesIO(entry.content) if isinstance(entry.content, bytes) else entry.content.open("rb") as file:
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise OSError(f"{entry.content!s:.200} shrank while it was read")
                left -= len(piece)
                yield piece
                sent(len(piece))
        yield bytes(-size % _BLOCK)
    yield bytes(2 * _BLOCK)


def _header(name: str, size: int, kind: bytes) -> bytes:
    """Root's, readable by everybody, without a date: the same content is the same layer."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode = size, kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
