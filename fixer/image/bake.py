"""Makes a ready-tuned image: has a container of moefix tune, takes the artefact out, builds a small image with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.transfer import artefacts_in, asks_for, check_versions, missing_rows, read_artefacts
from fixer.base.data_folder import DataFolder, data_home
from fixer.base.errors import DockerError, HubError, ModelError, SGLangError, StoreError, UsageError
from fixer.base.files import utc_now
from fixer.base.progress import Progress, Silent, Transfer, gigabytes
from fixer.image.docker_engine import ContainerRun, Engine, Image
from fixer.image.order import IMAGE_NAME, PASSED_ON, Order
from fixer.image.recipe import Recipe, Weights, context, default_command, tar_pieces
from fixer.model.config import load_model
from fixer.model.download.messages import Bytes, Failed, Message, Plan, Request, Trouble
from fixer.model.download.process import fetch
from fixer.model.download.weights import FETCHED, choose, files_of
from fixer.model.hub import hub_cache, is_commit, is_hub_id, snapshot_folder
from fixer.serve.options import split_flags
from fixer.sglang.declared import Declared, declared_of
from fixer.sglang.find_tree import find_tree
from fixer.sglang.flags import BUNDLED, ServerFlags, parse_flags
from fixer.sglang.parser import read_words
from fixer.sglang.secrets import secret_flags

_SENT = 64 << 20
"""Bytes of weights between two steps of progress."""


@dataclass(frozen=True)
class Baked:
    """What came of it: the image, and the recipe that it was made by."""

    image: str
    recipe: Recipe


def bake(order: Order, progress: Progress, environ: Mapping[str, str] = os.environ) -> Baked:
    """Bake an image.

    Raises:
        MoefixError: whatever keeps it from that; nothing but a pulled image stays behind.
    """
    flags = check_order(order, environ)
    given = artefacts_in(order.artefact) if order.artefact is not None else ()
    engine = Engine.connect()
    base = base_image(engine, order.image, progress)
    check_tag(engine, order, base)
    check_flags(order, base, progress)
    for artefact in given:
        check_artefact(artefact, order, flags, base)
        if missing := missing_rows(artefact, flags):
            progress.note(f"the artefact has no rows for M = {', '.join(map(str, missing))}: a server will tune them")
    weights, revision = None, order.revision
    if order.with_weights:
        weights, revision = weights_of(order, flags, progress)
        check_room(weights, engine)
    artefacts = given or artefacts_from(engine, base, order, revision, environ, progress)
    recipe = Recipe(
        base=base.id,
        base_name=order.image,
        entrypoint=base.entrypoint,
        artefacts=artefacts,
        command=default_command(order.model_name, order.revision, order.flags, weights=weights is not None),
        model=order.model_name,
        revision=revision or artefacts[0].revision,
        weights=weights,
        date=utc_now(),
    )
    return Baked(build(engine, recipe, order.tag, progress), recipe)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_order(order: Order, environ: Mapping[str, str]) -> ServerFlags:
    """Refuse what cannot be meant, and whatever would put a secret into a layer.

    Returns:
        The order's SGLang flags, read.

    Raises:
        UsageError: it is such an order.
    """
    if order.planned_for is not None and order.artefact is not None:
        raise UsageError("--for and --artefact exclude each other", "Give one of them.")
    if not IMAGE_NAME.fullmatch(order.tag):
        raise UsageError(f"{order.tag[:80]!r} is no name for an image", "Write it as me/qwen3:rtx4090, in lower case.")
    if order.flags and not order.flags[0].startswith("-"):
        raise UsageError(f"{order.flags[0][:60]!r} belongs to no flag", "Name the model with --model.")
    _refuse_secrets(order, None)
    tokens = [environ[name] for name in PASSED_ON[:2] if environ.get(name)]
    if any(token in word for token in tokens for word in (*order.flags, order.model, order.tag, order.revision or "")):
        raise UsageError("your hub token is among the arguments", "Leave it out: HF_TOKEN is passed on by itself.")
    given, _ = read_words(order.all_flags, BUNDLED)
    if any(each.flag.dest == "config" for each in given):
        raise UsageError("--config names a file that is not in the image", "Write its flags out.")
    return parse_flags(order.all_flags)


def check_flags(order: Order, base: Image, progress: Progress) -> None:
    """Hold the flags against the list of the image's SGLang, if this machine has or can fetch the same release.

    Raises:
        UsageError: that SGLang has no such flag, or it is one that holds a secret.
    """
    version = base.labels.get("moefix.sglang.version", "")
    try:
        declared = declared_of(find_tree(None, version or None, DataFolder(data_home()).cache), data_home())
    except (SGLangError, StoreError) as fault:
        progress.note(f"the flags are checked in the container only: {fault.message}")
        return
    _refuse_secrets(order, declared)
    parse_flags(order.all_flags, declared)


def _refuse_secrets(order: Order, declared: Declared | None) -> None:
    secrets = secret_flags(order.all_flags, declared)
    if secrets:
        raise UsageError(
            f"{secrets[0]} would be readable by everybody who has the image",
            "Leave it out here and give it to docker run, behind the image's name.",
        )


def base_image(engine: Engine, name: str, progress: Progress) -> Image:
    """The moefix image to build on, pulled where it is not there and its name has an owner.

    Raises:
        DockerError: there is none of that name, or it is not moefix's.
    """
    found = engine.image(name)
    if found is None and "/" in name:
        engine.pull(name, progress)
        found = engine.image(name)
    if found is None:
        raise DockerError(
            f"there is no image {name} here", "Build it (docker build -t moefix .), or name one with --image."
        )
    if found.environ.get("MOEFIX_IMAGE") != "1" or not found.entrypoint:
        raise DockerError(
            f"{name} is no image of moefix", "Name one with --image, or build it: docker build -t moefix ."
        )
    return found


def check_tag(engine: Engine, order: Order, base: Image) -> None:
    """Refuse a tag that is taken.

    Raises:
        DockerError: an image has it, and it is not to be replaced.
        UsageError: it is the name of the image that is built on.
    """
    taken = engine.image(order.tag)
    if taken is None:
        return
    if taken.id == base.id:
        raise UsageError(f"{order.tag} is the image that is built on", "Give the new one another --tag.")
    if not order.force:
        raise DockerError(f"there is an image {order.tag} already", "Take another --tag, or replace it with --force.")


def check_artefact(artefact: Artefact, order: Order, flags: ServerFlags, base: Image) -> None:
    """Refuse an artefact that the image would not use.

    Raises:
        SGLangError: it is of another SGLang or Triton than the image's.
        UsageError: it is not what that model's server asks for.
    """
    check_versions(
        artefact.environment,
        base.labels.get("moefix.sglang.version", ""),
        base.labels.get("moefix.triton.version", ""),
    )
    if not asks_for(artefact, load_model("", flags), flags):
        raise UsageError(
            f"{order.model} with these flags does not ask for this artefact's "
            f"{artefact.family.describe(artefact.workload)}",
            "Give the model and the flags (--tp, --quantization, ...) that it was tuned for.",
        )


# --- what goes in ----------------------------------------------------------------------------------------------------


def artefacts_from(
    engine: Engine,
    base: Image,
    order: Order,
    revision: str | None,
    environ: Mapping[str, str],
    progress: Progress,
) -> tuple[Artefact, ...]:
    """Have a container of the moefix image tune, or plan; one artefact for each kind of card.

    Raises:
        DockerError: the container cannot run or fails.
        UsageError: SGLang reads no tuning file there.
    """
    doing = "tuning" if order.planned_for is None else "planning"
    wanted = ContainerRun(
        image=base.id,
        command=container_command(order, revision),
        environ={name: environ[name] for name in PASSED_ON if environ.get(name)},
        gpus=order.gpus if order.planned_for is None else None,
        mounts={str(order.folder): str(order.folder)} if order.folder else {},
        volume=order.volume,
    )
    progress.phase(f"{doing} in a container of {order.image}", 1)
    finished = engine.run(wanted, lambda line: progress.note(line.removeprefix("moefix: ")))
    progress.advance()
    said = " ".join(finished.tail)
    if finished.code != 0:
        raise DockerError(f"{doing} in {order.image} ended with exit code {finished.code}: {said}")
    try:
        artefacts = read_artefacts(finished.output)
    except ValueError as fault:
        raise DockerError(
            f"{doing} in {order.image} gave no artefact: {fault}", "Is it this moefix's image?"
        ) from fault
    if not artefacts:
        raise UsageError(
            f"there is nothing to bake for {order.model}: {said}", "Serve it with the moefix image itself."
        )
    return artefacts


def container_command(order: Order, revision: str | None) -> tuple[str, ...]:
    """What the container of the moefix image is to do; it prints artefacts as JSON."""
    options, flags = split_flags(order.flags, {})
    limit = () if options.smem_limit is None else (f"--smem-limit={options.smem_limit}",)
    pinned = () if revision is None else (f"--revision={revision}",)
    what = ("tune", "--json") if order.planned_for is None else ("export", "--out=-", f"--for={order.planned_for}")
    return (*what, *limit, f"--model={order.model_name}", *pinned, *flags)


def weights_of(order: Order, flags: ServerFlags, progress: Progress) -> tuple[Weights, str]:
    """The files of the model that SGLang loads, just those that `serve` would fetch; and the commit, "" for a folder.

    Raises:
        UsageError: the load format is one whose files only SGLang knows.
        HubError, StoreError: the hub does not give them, or the disk has no room for them.
        ModelError: the folder has none.
    """
    if flags.load_format not in FETCHED:
        raise UsageError(
            f"with load format {flags.load_format} only SGLang itself knows the files", "Leave out --with-weights."
        )
    folder = order.folder
    if folder is None:
        return _fetched(order, flags, progress)
    choice = choose(files_of(folder), order.model, flags.load_format, code=flags.trust_remote_code)
    if not choice.weights:
        raise ModelError(f"{folder} has no weights", "Leave out --with-weights, or name the folder that has them.")
    return Weights(folder, tuple(file.path for file in (*choice.small, *choice.weights))), ""


def _fetched(order: Order, flags: ServerFlags, progress: Progress) -> tuple[Weights, str]:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    revision = load_model("", flags).revision
    if not is_hub_id(order.model):
        raise HubError(f"{order.model} is no name on a hub", "Give --model OWNER/NAME, or the model's folder.")
    commit = revision if is_commit(revision) else None
    # By its commit: the image's server loads a folder, and so no file but those that it loads.
    asked = Request(order.model, commit or order.revision, commit, flags.load_format, code=flags.trust_remote_code)

    shown = Transfer("download", quiet=isinstance(progress, Silent))

    def hear(message: Message) -> None:
        if isinstance(message, Plan):
            progress.note(f"{message.files} files of {order.model}, {gigabytes(message.total)}, at {message.commit}")
        elif isinstance(message, Bytes):
            shown.update(message.done, message.total)
        elif isinstance(message, Trouble):
            progress.note(f"download: {message.what}")

    disable_progress_bars()  # the client's own
    ended = fetch(asked, hear)
    if isinstance(ended, Failed):
        kind = StoreError if ended.exit_code == StoreError.exit_code else HubError
        raise kind(ended.message, ended.hint)
    folder = snapshot_folder(hub_cache(), order.model, ended.commit)
    return Weights(folder, tuple(str(Path(file).relative_to(folder)) for file in ended.files)), ended.commit


def check_room(weights: Weights, engine: Engine) -> None:
    """Refuse weights that have no room where the engine keeps its images.

    Raises:
        DockerError: they have none.
    """
    size, free = weights.size, engine.free_bytes()
    # Sent once, then copied into the layer.
    if free is not None and free < 2 * size:
        raise DockerError(
            f"the weights need {2 * size / 2**30:.1f} GiB where Docker keeps its images; {free / 2**30:.1f} are free",
            "Free some: docker system df, docker system prune; or leave out --with-weights.",
        )


def build(engine: Engine, recipe: Recipe, tag: str, progress: Progress) -> str:
    """Build the image.

    Returns:
        Its id.

    Raises:
        DockerError: a step fails.
    """
    total = sum(entry.size for entry in context(recipe))
    steps, sent = max(1, total // _SENT), 0

    def count(size: int) -> None:
        nonlocal sent
        before, sent = sent, sent + size
        for _ in range(before // _SENT, min(sent // _SENT, steps)):
            progress.advance(f"{sent / 2**30:.1f} GiB sent")

    progress.phase(f"building {tag}", steps)
    return engine.build(tar_pieces(context(recipe), count), tag, lambda line: _tell(line, progress))


def _tell(line: str, progress: Progress) -> None:
    """A line of the engine's build, less what it says of its own intermediate containers."""
    if not line.startswith(("--->", "Removing intermediate", "Successfully")):
        progress.note(line.removeprefix("moefix: ")[:200])


# --- what to say -----------------------------------------------------------------------------------------------------


def how_to_start(order: Order) -> str:
    """The command that starts the baked image."""
    mount = f" -v {order.folder}:{order.folder}:ro" if order.folder and not order.with_weights else ""
    return f"docker run --gpus all --ipc host -p 30000:30000 -v moefix:/data{mount} {order.tag}"
