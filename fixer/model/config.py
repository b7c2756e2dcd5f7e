"""The model: its config.json, from a folder, a hub or the built-in catalogue of public geometries.

Nothing here runs a model's code or needs transformers; config.json is untrusted input. From a hub only config.json and
hf_quant_config.json are fetched, by huggingface_hub, which reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE; or
from ModelScope by its own client, where SGLANG_USE_MODELSCOPE has SGLang do so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fixer.base.errors import HubError, ModelError, UsageError
from fixer.model.catalogue import CatalogueEntry, catalogue_by_name, catalogued
from fixer.model.config_file import read_json
from fixer.model.fetch_file import Hub, before, fetch
from fixer.model.hub import NoSuchFileError, UnreachableError, is_hub_id, may_be_folder, uses_modelscope
from fixer.sglang.flags import ServerFlags

_MAX_NAME = 4096
_MAX_TEXT = 500
_BAD_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Source(Enum):
    """Where a model's config came from."""

    FOLDER = "folder"
    HUB = "hub"
    CATALOGUE = "catalogue"


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
    if may_be_folder(name):
        path = Path(os.path.expanduser(name))
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
    known = catalogued(name)
    if is_hub_id(name):
        if uses_modelscope():
            return _from_modelscope(name, flags, hub, known)
        return _from_hub(name, flags, hub, known)
    if known is None:
        close = get_close_matches(name.lower(), list(catalogue_by_name()), n=3, cutoff=0.5)
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
        config, commit, from_cache = fetch(name, "config.json", flags.revision, hub)
    except UnreachableError as out:
        if known is None:
            raise out.error from None
        return _from_catalogue(known, f"{out.error.message}; ")
    parsed, note = read_json(config), ""
    quant: Mapping[str, Any] | None = None
    try:
        quant = read_json(fetch(name, "hf_quant_config.json", flags.revision, hub).path)
    except NoSuchFileError:
        pass  # most models have none
    except UnreachableError:
        # SGLang takes it as not there as well (model_config.py:1200-1211).
        note = "the hub is out of reach: config.json is the cache's, which has no hf_quant_config.json"
    return _Files(parsed, quant, commit or flags.revision, Source.HUB, note, from_cache)


def _from_modelscope(name: str, flags: ServerFlags, hub: Hub, known: CatalogueEntry | None) -> _Files:
    """From ModelScope's cache or by its client, as SGLang does (server_args.py:4095-4160); else from the catalogue."""
    try:
        config = before(hub.deadline_s, lambda late: _modelscope_file(name, "config.json", flags))
    except ImportError:
        fault = HubError("SGLANG_USE_MODELSCOPE is set, and there is no modelscope here", "pip install modelscope")
    except Exception as error:  # the client's own, its transport's, or the deadline
        what = f"ModelScope gave no config.json of {name} ({type(error).__name__})"
        fault = HubError(what, "check the name and the network, or unset SGLANG_USE_MODELSCOPE")
    else:
        quant: Mapping[str, Any] | None = None
        with contextlib.suppress(Exception):  # most models have none
            found = before(hub.deadline_s, lambda late: _modelscope_file(name, "hf_quant_config.json", flags))
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


# --- the catalogue ----------------------------------------------------------------------------------------------


def _from_catalogue(entry: CatalogueEntry, why: str) -> _Files:
    note = f"{why}the geometry is that of {entry.names[0]} in moefix's catalogue"
    return _Files(entry.config, None, None, Source.CATALOGUE, note)


# --- untrusted JSON ---------------------------------------------------------------------------------------------


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
