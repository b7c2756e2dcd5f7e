"""The Docker Engine, through the docker SDK: images, a container's run, a build. Every fault is a DockerError."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fixer.base.errors import DockerError
from fixer.base.progress import Progress

MOST_OUTPUT = 16 << 20
"""No command of moefix prints more bytes on its standard output."""

TAIL_LINES = 3
"""How many of a failed container's last lines an error quotes."""


@dataclass(frozen=True)
class Image:
    """An image that is there.

    Attributes:
        id: "sha256:...".
        labels, environ: its labels and environment.
        entrypoint: its entry point.
        size: in bytes.
    """

    id: str
    labels: Mapping[str, str]
    environ: Mapping[str, str]
    entrypoint: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Gpus:
    """Cards for a container: a number of them (-1 for all), or some by index or UUID."""

    count: int = -1
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContainerRun:
    """One run of a container that is removed afterwards, with its anonymous volumes.

    Attributes:
        image: the image's id.
        command: arguments behind its entry point.
        environ: environment variables, of this run only; may hold a token.
        gpus: which cards it gets; None for none.
        mounts: host folders that it may read, by their path in the container.
        volume: a named volume for /data, "" for a throw-away one.
    """

    image: str
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    gpus: Gpus | None = None
    mounts: Mapping[str, str] = field(default_factory=dict)
    volume: str = ""


@dataclass(frozen=True)
class Finished:
    """What a run came to: its exit code, its standard output, and the last lines of its standard error."""

    code: int
    output: bytes
    tail: tuple[str, ...]


class Engine:
    """A Docker Engine that answers."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    def connect(cls) -> Engine:
        """The engine that the docker command line would talk to (DOCKER_HOST, DOCKER_CONTEXT, its own settings).

        Raises:
            DockerError: there is none, or this user may not talk to it.
        """
        try:
            import docker
        except ImportError as fault:
            raise DockerError(f"Python's docker package is missing: {fault}", "pip install docker") from fault
        with _told("Docker cannot be reached"):
            client = docker.from_env()
            client.ping()
            return cls(client)

    def image(self, name: str) -> Image | None:
        """The image of that name, None where there is none."""
        from docker.errors import ImageNotFound

        with _told(f"the image {name} cannot be looked up"):
            try:
                found = self._client.images.get(name)
            except ImageNotFound:
                return None
        config = found.attrs.get("Config") or {}
        environ = dict(entry.partition("=")[::2] for entry in config.get("Env") or ())
        size = int(found.attrs.get("Size") or 0)
        return Image(found.id, config.get("Labels") or {}, environ, tuple(config.get("Entrypoint") or ()), size)

    def pull(self, name: str, progress: Progress) -> None:
        """Fetch an image from its registry.

        Raises:
            DockerError: the registry does not have it, refuses, or is out of reach.
        """
        from docker.utils import parse_repository_tag

        repository, tag = parse_repository_tag(name)
        layers: dict[str, bool] = {}
        progress.phase(f"pulling {name}", 0)
        with _told(f"{name} cannot be pulled"):
            for line in self._client.api.pull(repository, tag=tag or "latest", stream=True, decode=True):
                _check(line, f"{name} cannot be pulled")
                layer, status = line.get("id"), line.get("status", "")
                if layer and layer not in layers and status == "Pulling fs layer":
                    layers[layer] = False
                if layer in layers and status in ("Pull complete", "Already exists") and not layers[layer]:
                    layers[layer] = True
                    progress.advance(layer, total=len(layers))

    def run(self, wanted: ContainerRun, on_line: Callable[[str], None]) -> Finished:
        """Run a container to its end; whatever happens, it and its anonymous volumes are removed.

        Args:
            on_line: gets every line of its standard error as it comes.

        Raises:
            DockerError: it cannot be started, or prints without end.
        """
        name = f"moefix-bake-{uuid.uuid4().hex[:12]}"
        output, lines = bytearray(), _Lines(on_line)
        try:
            with _told("the container cannot be run"):
                container = self._create(name, wanted)
                # Attached before it starts, so that no line is lost.
                stream = container.attach(stdout=True, stderr=True, stream=True, demux=True)
                container.start()
                for printed, said in stream:
                    output += printed or b""
                    lines.feed(said or b"")
                    if len(output) > MOST_OUTPUT:
                        raise DockerError(f"the container printed more than {MOST_OUTPUT} bytes")
                lines.end()
                return Finished(int(container.wait()["StatusCode"]), bytes(output), lines.tail)
        finally:
            self._remove(name, on_line)

    def _create(self, name: str, wanted: ContainerRun) -> Any:
        from docker.types import DeviceRequest, Mount

        mounts = [Mount(there, here, type="bind", read_only=True) for there, here in wanted.mounts.items()]
        if wanted.volume:
            mounts.append(Mount("/data", wanted.volume, type="volume"))
        requests = None
        if wanted.gpus is not None:
            which = {"device_ids": list(wanted.gpus.devices)} if wanted.gpus.devices else {"count": wanted.gpus.count}
            requests = [DeviceRequest(capabilities=[["gpu"]], **which)]
        return self._client.containers.create(
            wanted.image,
            list(wanted.command),
            name=name,
            environment=dict(wanted.environ),
            mounts=mounts,
            device_requests=requests,
            labels={"moefix.bake": "tuning"},
        )

    def _remove(self, name: str, say: Callable[[str], None]) -> None:
        from docker.errors import DockerException, NotFound

        try:
            self._client.api.remove_container(name, v=True, force=True)
        except NotFound:
            pass
        except (DockerException, OSError) as fault:
            # Said and no more, so that it hides no fault before it.
            say(f"the container stays ({_first_line(fault)}): docker rm --force --volumes {name}")

    def build(self, context: Generator[bytes, None, None], tag: str, on_line: Callable[[str], None]) -> str:
        """Build an image without any network.

        Args:
            context: the build context as a tar file, piece by piece.
            tag: what to call it.
            on_line: gets every line that the engine says.

        Returns:
            The image's id.

        Raises:
            DockerError: a step fails, or there is no space.
        """
        built, lines = "", _Lines(on_line)
        what = f"{tag} cannot be built"
        with _told(what), contextlib.closing(context):
            for line in self._client.api.build(
                fileobj=context,
                custom_context=True,
                tag=tag,
                network_mode="none",
                rm=True,
                forcerm=True,
                decode=True,
            ):
                lines.feed(line.get("stream", "").encode())
                _check(line, what, lines.tail)
                built = (line.get("aux") or {}).get("ID", built)
            lines.end()
        if not built:
            raise DockerError(f"{what}: the engine did not say which image it built")
        return built

    def free_bytes(self) -> int | None:
        """Free space where the engine keeps its images, in bytes; None where that cannot be seen from here."""
        import shutil

        with _told("Docker gives no answer"):
            root = self._client.info().get("DockerRootDir", "")
        try:
            return shutil.disk_usage(root).free
        except OSError:
            return None


class _Lines:
    """Whole lines out of pieces, with nothing in them that would move a terminal's cursor."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self.tail: tuple[str, ...] = ()

    def feed(self, piece: bytes) -> None:
        *whole, self._rest = (self._rest + piece).split(b"\n")
        for line in whole:
            self._say(line)
        if len(self._rest) > 1 << 16:
            self.end()

    def end(self) -> None:
        rest, self._rest = self._rest, b""
        self._say(rest)

    def _say(self, line: bytes) -> None:
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.decode("utf-8", "replace"))
        text = "".join(character if character.isprintable() else " " for character in text).strip()
        if text:
            self.tail = (*self.tail, text)[-TAIL_LINES:]
            self._on_line(text)


def _check(line: Mapping[str, Any], what: str, tail: Sequence[str] = ()) -> None:
    """Raise the error that a line of the engine's answer tells of."""
    if "error" in line:
        said = " ".join((*tail, str(line["error"]))) if tail else str(line["error"])
        raise _error(what, said)


_REASONS: tuple[tuple[str, str, str], ...] = (
    (
        r"could not select device driver|no known GPU vendor|unknown or invalid runtime name: nvidia",
        "Docker has no NVIDIA runtime here",
        "Install the NVIDIA Container Toolkit (nvidia-ctk runtime configure --runtime=docker, restart Docker); "
        'without a GPU: moefix bake --for "RTX 4090".',
    ),
    (
        r"nvidia-container-cli|nvidia-container-runtime|libnvidia-ml",
        "Docker's NVIDIA runtime does not get at the card",
        "Check the driver with nvidia-smi on this machine, and --gpus.",
    ),
    (
        r"no space left on device|not enough space|disk quota exceeded",
        "there is no space left",
        "Free some where Docker keeps its images: docker system df, docker system prune.",
    ),
    (
        r"permission ?denied.*docker.*sock|PermissionError",
        "this user may not talk to Docker",
        "Join the group docker (sudo usermod -aG docker $USER, log in anew), or use sudo.",
    ),
    (
        r"pull access denied|manifest unknown|not found: manifest|repository does not exist|No such image",
        "there is no such image",
        "Check its name, log in with docker login, or build it: docker build -t moefix .",
    ),
    (
        r"bind source path does not exist",
        "the model's folder is not on the machine where Docker runs",
        "Put it there under the same path, or name the model as on the hub.",
    ),
    (
        r"FileNotFoundError|Connection ?refused|ConnectionRefusedError|Name or service not known|timed? ?out",
        "no Docker Engine answers",
        "Install or start Docker (systemctl start docker), or set DOCKER_HOST; `docker version` must work.",
    ),
)
"""What the engine says (a pattern), what that means, and what to do."""


def _error(what: str, said: str) -> DockerError:
    for pattern, meaning, hint in _REASONS:
        if re.search(pattern, said, re.IGNORECASE | re.DOTALL):
            return DockerError(f"{what}: {meaning} ({_cut(said)})", hint)
    return DockerError(f"{what}: {_cut(said)}")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else line[:199] + " ... " + line[-196:]


def _first_line(fault: BaseException) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what the SDK and its transport raise into a DockerError that says what could not be done."""
    from docker.errors import APIError, DockerException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except APIError as fault:
        raise _error(what, fault.explanation or str(fault)) from fault
    except (DockerException, HTTPError, OSError) as fault:  # requests' own are OSErrors
        raise _error(what, _first_line(fault)) from fault
