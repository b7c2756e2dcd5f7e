"""How large the weights are that SGLang would load, before any is fetched."""

from __future__ import annotations

import os
from pathlib import Path

from fixer.model.config import Model, Source
from fixer.model.download.attempt import listing
from fixer.model.download.cached import cached
from fixer.model.download.weights import FETCHED, Presence, RepoFile, choose, files_of
from fixer.model.fetch_file import Hub, before
from fixer.model.hub import hub_cache, is_hub_id, snapshot_folder, uses_modelscope
from fixer.sglang.flags import ServerFlags


def weight_bytes(model: Model, flags: ServerFlags, hub: Hub | None = None) -> int | None:
    """Bytes of the weights that SGLang would load: in the folder, by the hub's listing, or in the cache.

    Returns:
        None where that cannot be known: another load format, no hub in reach, or weights that SGLang converts while it
        loads them (`--quantization` for a checkpoint that has none).
    """
    hub = hub or Hub()
    if flags.load_format not in FETCHED or (flags.quantization and model.quant_config is None):
        return None
    if model.source is Source.FOLDER:
        files = files_of(Path(os.path.expanduser(model.name)))
    elif uses_modelscope() or not is_hub_id(model.name):
        return None
    else:
        listed = _listed(model, flags, hub)
        if listed is None:
            return None
        files = listed
    weights = choose(files, model.name, flags.load_format).weights
    return sum(file.size for file in weights) or None


def _listed(model: Model, flags: ServerFlags, hub: Hub) -> list[RepoFile] | None:
    """The repository's files: by the cache, where it has all weights, else by the hub; None where neither says."""
    from huggingface_hub import constants

    revision = model.revision or flags.revision
    commit, found = cached(model.name, revision, flags.load_format, flags.download_dir)
    if commit is not None and found is Presence.COMPLETE:
        for cache in (Path(flags.download_dir).expanduser() if flags.download_dir else hub_cache(), hub_cache()):
            if files := files_of(snapshot_folder(cache, model.name, commit)):
                return files
    if constants.HF_HUB_OFFLINE or model.from_cache:
        return None
    try:
        return before(hub.deadline_s, lambda late: listing(model.name, revision or "main", hub.endpoint))
    except Exception:  # whatever keeps the hub from saying it: the download will say so, or SGLang
        return None
