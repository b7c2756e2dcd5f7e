"""What is to be baked: the user's order, checked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fixer.base.errors import UsageError
from fixer.image.docker_engine import Gpus
from fixer.model.hub import may_be_folder
from fixer.serve.options import split_flags

ALL_GPUS = Gpus()


PASSED_ON = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")
"""Environment variables that the tuning container gets, and that no layer ever sees."""


IMAGE_NAME = re.compile(
    r"(?:[a-z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
)


@dataclass(frozen=True)
class Order:
    """What a user wants baked.

    Attributes:
        model: a hub id or a folder.
        tag: the new image's name.
        flags: the server's SGLang flags; moefix's own (--moefix-...) among them count for the server too.
        image: the moefix image to build on.
        gpus: the cards to tune on; None where the engine's default runtime gives them without being asked.
        planned_for: bake the plan for this card instead, without any.
        artefact: bake what this file has instead.
        with_weights: put the weights in.
        revision: the model's on the hub, None for its default.
        volume: a named volume for the tuning container's data, "" for a throw-away one.
        force: take the tag even if an image has it.
    """

    model: str
    tag: str
    flags: tuple[str, ...] = ()
    image: str = "moefix"
    gpus: Gpus | None = ALL_GPUS
    planned_for: str | None = None
    artefact: Path | None = None
    with_weights: bool = False
    revision: str | None = None
    volume: str = ""
    force: bool = False

    @property
    def folder(self) -> Path | None:
        """The model's folder on this machine, absolute; None for a model on the hub."""
        path = Path(os.path.expanduser(self.model))
        return path.absolute() if may_be_folder(self.model) and path.is_dir() else None

    @property
    def model_name(self) -> str:
        """What the container calls the model: a folder is mounted under its own path."""
        return str(self.folder or self.model)

    @property
    def all_flags(self) -> tuple[str, ...]:
        """SGLang's flags, the model and its revision among them; moefix's own are not."""
        named = () if self.revision is None else (f"--revision={self.revision}",)
        return (*split_flags(self.flags, {})[1], *named, f"--model-path={self.model_name}")


def parse_gpus(text: str) -> Gpus | None:
    """Cards as `docker run --gpus` takes them: all, 2, device=0, device=0,2 or device=GPU-...; None for "none".

    Raises:
        UsageError: it is neither.
    """
    words = text.strip().strip('"')
    if words == "all":
        return ALL_GPUS
    if words == "none":
        return None
    if words.isascii() and words.isdigit() and 0 < int(words) < 1000:
        return Gpus(int(words))
    if re.fullmatch(r"device=[A-Za-z0-9:./-]+(,[A-Za-z0-9:./-]+)*", words):
        return Gpus(devices=tuple(words.removeprefix("device=").split(",")))
    raise UsageError(
        f"--gpus is {text[:60]!r}",
        "Write it as all, 1, device=0, device=0,2, or none where Docker's default runtime is NVIDIA's.",
    )
