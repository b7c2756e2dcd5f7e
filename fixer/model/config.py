"""The model: its config.json, from a folder, a hub or the built-in catalogue of public geometries.

Nothing here runs a model's code or needs transformers; config.json is untrusted input. From a hub only config.json and
hf_quant_config.json are fetched, by huggingface_hub, which reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE; or
from ModelScope by its own client, where SGLANG_USE_MODELSCOPE has SGLang do so.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from fixer.base.errors import HubError, ModelError, UsageError
from fixer.sglang.flags import ServerFlags, json_depth
from fixer.model.hub import NoSuchFileError, OFFLINE_HINT, UnreachableError, commit_of, is_hub_id, refusal, uses_modelscope

MAX_CONFIG_BYTES = 16 << 20
"""Largest config.json that is read."""

MAX_DEPTH = 64
"""Deepest nesting that is read."""

_MAX_DIGITS = 20
_MAX_NAME = 4096
_MAX_TEXT = 500
_BAD_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_CATALOGUE_FILE = Path(__file__).parent / "data" / "catalogue.json"

_T = TypeVar("_T")


class Source(Enum):
    """Where a model's config came from."""

    FOLDER = "folder"
    HUB = "hub"
    CATALOGUE = "catalogue"


@dataclass(frozen=True)
class Hub:
    """How to reach the hub; the defaults leave everything to huggingface_hub and its environment variables.

    Attributes:
        endpoint: the hub's address, None for HF_ENDPOINT or the public hub.
        token: an access token, None for HF_TOKEN or the stored one; never printed.
        cache: the cache folder, None for HF_HOME's.
        timeout_s: seconds for one answer.
        deadline_s: seconds for one file altogether.
    """

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    cache: Path | None = None
    timeout_s: float = 8.0
    deadline_s: float = 30.0


@dataclass(frozen=True)
class Model:
    """A model as its config.json has it, read-only.

    Attributes:
        name: as the user gave it.
        architecture: the first of `architectures`.
        config: the whole config.json with `--json-model-override-args` applied.
        text_config: the part that describes the language model; `config` itself where nothing is nested.
        quant_config: the checkpoint's quantisation, None for none.
        revision: the commit on the hub, or the revision asked for; None for a folder.
        source: where the config came from.
        note: one sentence where the source is not what the user named, else "".
        from_cache: the hub was out of reach, and the config is its client's cache's.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    quant_config: Mapping[str, Any] | None
    revision: str | None
    source: Source
    note: str = ""
    from_cache: bool = False


@dataclass(frozen=True)
class _Files:
    """The two files of a model, parsed, and where they came from."""

    config: Mapping[str, Any]
    quant: Mapping[str, Any] | None
    revision: str | None
    source: Source
    note: str = ""
    from_cache: bool = False


class _Fetched(NamedTuple):
    """A file of a repository, and its commit; whether the hub was out of reach, so that it is the cache's."""

    path: Path
    commit: str | None
    from_cache: bool = False


def load_model(name: str, flags: ServerFlags, *, hub: Hub | None = None) -> Model:
    """The model of that name: a folder, a hub id ("owner/name"), or a name of the catalogue.

    Args:
        name: as after `--model`; "" takes the flags' own `--model-path`.
        flags: for `--revision` and `--json-model-override-args`.
        hub: how to reach the hub.

    Raises:
        UsageError: no model is named.
        ModelError: there is no such model, or its config makes no sense.
        HubError: the hub refuses it, or is out of reach and the catalogue does not have it.
    """
    name = name or flags.model_path
    if not name:
        raise UsageError("no model is named", "give --model FOLDER or --model OWNER/NAME")
    if len(name) > _MAX_NAME or not name.isprintable():
        raise ModelError("the model's name is too long or holds characters that no name has")
    return _model(name, _files(name, flags, hub or Hub()), flags)


def model_from_config(
    name: str,
    config: Mapping[str, Any],
    flags: ServerFlags,
    *,
    hf_quant_config: Mapping[str, Any] | None = None,
) -> Model:
    """The model that a parsed config.json describes, as `load_model` would give it from a folder.

    Raises:
        ModelError: the config makes no sense.
    """
    return _model(name, _Files(config, hf_quant_config, None, Source.FOLDER), flags)


def _model(name: str, files: _Files, flags: ServerFlags) -> Model:
    config = _frozen(_overridden(files.config, flags.model_overrides))
    text = _text_config(config)
    return Model(
        name,
        _architecture(config),
        config,
        text,
        _quant_config(config, text, files.quant),
        files.revision,
        files.source,
        files.note,
        files.from_cache,
    )


# --- where the files come from ----------------------------------------------------------------------------------


def _files(name: str, flags: ServerFlags, hub: Hub) -> _Files:
    path = Path(name)
    try:
        if path.is_dir():
            return _from_folder(path)
        exists = path.exists()
    except OSError as error:
        raise ModelError(f"{name!r} cannot be read: {error.strerror}") from None
    if exists:
        raise _not_a_folder(path)
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name!r}", "give a folder with config.json, or OWNER/NAME on the hub")
    known = _catalogued(name)
    if is_hub_id(name):
        if uses_modelscope():
            return _from_modelscope(name, flags, hub, known)
        return _from_hub(name, flags, hub, known)
    if known is None:
        close = get_close_matches(name.lower(), list(_catalogue()), n=3, cutoff=0.5)
        near = f"; did you mean {', '.join(close)}?" if close else ""
        raise ModelError(f"{name!r} is no folder and no hub id{near}", "give a folder or OWNER/NAME on the hub")
    return _from_catalogue(known, "")


def _not_a_folder(path: Path) -> ModelError:
    if path.suffix.lower() == ".gguf":
        return ModelError(
            f"{path.name} is a GGUF file, which SGLang serves with kernels of its own",
            "moefix has nothing to tune there; give a folder with config.json",
        )
    return ModelError(f"{str(path)!r} is a file, not a model's folder", "give the folder that holds config.json")


def _from_folder(folder: Path) -> _Files:
    config = folder / "config.json"
    if not config.is_file():
        present = {child.name for child in _children(folder)}
        gguf = any(name.endswith(".gguf") for name in present)
        why = " (it holds GGUF files, which SGLang serves with kernels of its own)" if gguf else ""
        raise ModelError(f"{str(folder)!r} has no config.json{why}", "give the folder that holds the model")
    quant = folder / "hf_quant_config.json"
    return _Files(read_json(config), read_json(quant) if quant.is_file() else None, None, Source.FOLDER)


def _children(folder: Path) -> list[Path]:
    try:
        return [child for child, _ in zip(folder.iterdir(), range(4096), strict=False)]
    except OSError:
        return []


def _from_hub(name: str, flags: ServerFlags, hub: Hub, known: CatalogueEntry | None) -> _Files:
    """From the hub, or where that is out of reach from the catalogue."""
    try:
        config, commit, from_cache = _fetch(name, "config.json", flags.revision, hub)
    except UnreachableError as out:
        if known is None:
            raise out.error from None
        return _from_catalogue(known, f"{out.error.message}; ")
    parsed, note = read_json(config), ""
    quant: Mapping[str, Any] | None = None
    try:
        quant = read_json(_fetch(name, "hf_quant_config.json", flags.revision, hub).path)
    except NoSuchFileError:
        pass  # most models have none
    except UnreachableError:
        # SGLang takes it as not there as well (model_config.py:1200-1211).
        note = "the hub is out of reach: config.json is the cache's, which has no hf_quant_config.json"
    return _Files(parsed, quant, commit or flags.revision, Source.HUB, note, from_cache)


def _from_modelscope(name: str, flags: ServerFlags, hub: Hub, known: CatalogueEntry | None) -> _Files:
    """From ModelScope's cache or by its client, as SGLang does (server_args.py:4095-4160); else from the catalogue."""
    try:
        config = _before(hub.deadline_s, lambda late: _modelscope_file(name, "config.json", flags))
    except ImportError:
        fault = HubError("SGLANG_USE_MODELSCOPE is set, and there is no modelscope here", "pip install modelscope")
    except Exception as error:  # the client's own, its transport's, or the deadline
        what = f"ModelScope gave no config.json of {name} ({type(error).__name__})"
        fault = HubError(what, "check the name and the network, or unset SGLANG_USE_MODELSCOPE")
    else:
        quant: Mapping[str, Any] | None = None
        with contextlib.suppress(Exception):  # most models have none
            found = _before(hub.deadline_s, lambda late: _modelscope_file(name, "hf_quant_config.json", flags))
            quant = read_json(found)
        return _Files(read_json(config), quant, flags.revision, Source.HUB)
    if known is None:
        raise fault
    return _from_catalogue(known, f"{fault.message}; ")


def _modelscope_file(name: str, filename: str, flags: ServerFlags) -> Path:
    from modelscope.hub.file_download import model_file_download
    from modelscope.utils.file_utils import get_model_cache_root

    for root in filter(None, (get_model_cache_root(), flags.download_dir)):
        path = Path(root, name, filename)
        if path.is_file():
            return path
    return Path(model_file_download(name, filename, revision=flags.revision, cache_dir=flags.download_dir))


# --- the hub ----------------------------------------------------------------------------------------------------


def _fetch(name: str, filename: str, revision: str | None, hub: Hub) -> _Fetched:
    """One file of a repository on the hub, out of the client's cache where it is there; and its commit.

    Raises:
        HubError: the hub says no.
        UnreachableError: it says nothing, and the cache does not have the file.
    """
    try:
        return _before(hub.deadline_s, lambda late: _download(name, filename, revision, hub, late))
    except (HubError, UnreachableError):
        raise
    except Exception as error:  # the client's own, its transport's (which differs by version), or a full disk
        raise refusal(name, revision, error, filename) from None


def _download(name: str, filename: str, revision: str | None, hub: Hub, late: threading.Event) -> _Fetched:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    def cached() -> _Fetched:
        path = Path(
            hf_hub_download(
                name, filename, revision=revision, cache_dir=hub.cache, token=hub.token, local_files_only=True
            )
        )
        return _Fetched(path, commit_of(path) or revision, not constants.HF_HUB_OFFLINE)

    if constants.HF_HUB_OFFLINE:
        return cached()
    url = hf_hub_url(name, filename, revision=revision, endpoint=hub.endpoint)
    try:
        about = get_hf_file_metadata(url, token=hub.token, timeout=hub.timeout_s)
    except Exception as error:
        refused = refusal(name, revision, error, filename)
        if not isinstance(refused, UnreachableError):
            raise refused from None
        try:
            return cached()
        except Exception:  # not in the cache either: the first fault is the one to tell
            raise refused from None
    if about.size is not None and about.size > MAX_CONFIG_BYTES:
        raise HubError(f"{name}: {filename} on the hub is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    if late.is_set():  # nobody waits any more: spare the client's own retries
        raise UnreachableError(HubError(f"the hub was too slow for {name}", OFFLINE_HINT))
    path = hf_hub_download(
        name,
        filename,
        revision=revision,  # not the commit: the cache files what "main" is only when asked for it
        endpoint=hub.endpoint,
        token=hub.token,
        cache_dir=hub.cache,
        etag_timeout=hub.timeout_s,
    )
    return _Fetched(Path(path), about.commit_hash or revision)


def _before(seconds: float, task: Callable[[threading.Event], _T]) -> _T:
    """The task's result, or `UnreachableError` after that many seconds, however slowly bytes trickle in.

    The task is given an event that says that nobody waits for it any more.
    """
    late = threading.Event()
    results: list[_T] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            results.append(task(late))
        except Exception as error:  # handed over to the caller's thread
            faults.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(seconds)
    late.set()
    if faults:
        raise faults[0]
    if not results:
        raise UnreachableError(HubError(f"the hub gave no answer within {seconds:g} s", OFFLINE_HINT))
    return results[0]


# --- the catalogue ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatalogueEntry:
    """A public model's geometry.

    Attributes:
        names: the hub id, then other names for it.
        config: the fields of its config.json that moefix needs.
        source: where the numbers come from.
    """

    names: tuple[str, ...]
    config: Mapping[str, Any]
    source: str


def catalogue() -> tuple[CatalogueEntry, ...]:
    """Every entry, in the file's order."""
    return tuple({id(entry): entry for entry in _catalogue().values()}.values())


@lru_cache(maxsize=1)
def _catalogue() -> Mapping[str, CatalogueEntry]:
    """The entries by name in lower case."""
    rows = read_json(_CATALOGUE_FILE)["models"]
    entries = [CatalogueEntry(tuple(row["names"]), row["config"], row["source"]) for row in rows]
    return {name.lower(): entry for entry in entries for name in entry.names}


def _catalogued(name: str) -> CatalogueEntry | None:
    return _catalogue().get(name.strip().lower())


def _from_catalogue(entry: CatalogueEntry, why: str) -> _Files:
    note = f"{why}the geometry is that of {entry.names[0]} in moefix's catalogue"
    return _Files(entry.config, None, None, Source.CATALOGUE, note)


# --- untrusted JSON ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object out of a file of bounded size and nesting.

    Raises:
        ModelError: it cannot be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        value = json.loads(raw, parse_int=_whole)
    except RecursionError:
        raise ModelError(f"{path.name} is nested too deep") from None
    except _LongNumberError:
        raise ModelError(f"{path.name} holds a number of more than {_MAX_DIGITS} digits, which no size has") from None
    except ValueError as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ModelError(f"{path.name} is not JSON{where}", "was the download cut short?") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is no JSON object")
    if json_depth(value) > MAX_DEPTH:
        raise ModelError(f"{path.name} is nested deeper than {MAX_DEPTH}")
    return value


class _LongNumberError(ValueError):
    """A number of more digits than any size has."""


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _LongNumberError
    return int(digits)


def _told(text: str) -> str:
    """A text as a person may be shown it: no control characters for the terminal, no half characters, not endless."""
    if len(text) <= _MAX_TEXT and text.isprintable():
        return text
    return "".join(c if c.isprintable() else _BAD_CHARACTER for c in text[:_MAX_TEXT])


def _frozen(value: Any) -> Any:
    """The same value, read-only all through; nesting is bounded before."""
    if isinstance(value, Mapping):
        return MappingProxyType({_told(str(key)): _frozen(item) for key, item in value.items()})
    if isinstance(value, str):
        return _told(value)
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


# --- what is where in the config --------------------------------------------------------------------------------

# utils/hf_transformers/common.py:368-392 (0.5.17), in this order.
_NESTED = ("thinker_config", "llm_config", "language_config", "text_config")
_SUB_CONFIGS = frozenset({*_NESTED, "vision_config", "audio_config", "talker_config"})


def _overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with `--json-model-override-args`; a sub-config is merged, all else replaced (config.py:256-265)."""
    result = dict(config)
    for key, value in overrides.items():
        current = result.get(key)
        merged = key in _SUB_CONFIGS and isinstance(current, Mapping) and isinstance(value, Mapping)
        result[key] = {**current, **value} if merged else value  # type: ignore[dict-item]
    return result


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    first = names[0] if isinstance(names, tuple) and names else None
    if not isinstance(first, str) or not first or len(first) > 200 or _BAD_CHARACTER in first:
        raise ModelError("config.json names no architecture", "is it the config of a language model?")
    return first


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of the config."""
    for name in _NESTED:
        inner = config.get(name)
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise ModelError(f"config.json: {name} is no object")
        if name == "thinker_config" and isinstance(inner.get("text_config"), Mapping):
            deeper: Mapping[str, Any] = inner["text_config"]
            return deeper
        return inner
    return config


def _quant_config(
    config: Mapping[str, Any], text: Mapping[str, Any], hf_quant: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The checkpoint's quantisation, from the first place that has one (model_config.py:1145-1220)."""
    for body, name in (
        (config, "quantization_config"),
        (text, "quantization_config"),
        (config, "compression_config"),
        (text, "compression_config"),
    ):
        value = body.get(name)
        if value is None or value == {}:
            continue
        if not isinstance(value, Mapping):
            raise ModelError(f"config.json: {name} is no object")
        return value
    if hf_quant is None:
        return None
    frozen: Mapping[str, Any] = _frozen(hf_quant)
    return frozen
