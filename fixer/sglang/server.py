"""What moefix knows of SGLang's server as its user: flags, addresses, and the log's lines about tuning files.

Read off 0.5.17 (`srt/entrypoints/http_server.py`, `fused_moe_triton_config.py`) and 0.5.23.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fixer.base.errors import SGLangError
from fixer.sglang.log_lines import read_line
from fixer.sglang.secrets import plain_flags

HEALTH, FLUSH_CACHE = "/health", "/flush_cache"

OUT_OF_SHARED_MEMORY = re.compile(r"OutOfResources|out of resources?: shared memory")


def local_flags(flags: Sequence[str], port: int) -> list[str]:
    """The user's flags for a server on 127.0.0.1 that only this process asks. The last of a repeated flag counts."""
    return [*plain_flags(flags), "--host", "127.0.0.1", "--port", str(port)]


def files_used(log: str) -> tuple[Path, ...]:
    """The MoE tuning files that the server's log says it read, each once, in order; none for its built-in defaults."""
    lines = (read_line(line) for line in log.splitlines())
    return tuple(dict.fromkeys(Path(line.used) for line in lines if line is not None and line.used))


def server_command(argv: Sequence[str]) -> list[str]:
    """The server's command line: this Python, SGLang's launcher, and exactly the user's flags.

    `python -m sglang.launch_server` is in every release. From 0.5.17 on it recommends `sglang serve`, which ends in the
    same two calls (prepare_server_args, run_server; cli/serve.py:113-119) but takes less: no model from a --config
    file, none behind an abbreviation of --model-path (cli/utils.py:get_model_path), and it asks the hub for a
    model_index.json at every start, cached or not. So the launcher it is.
    """
    return [sys.executable, "-m", "sglang.launch_server", *argv]


def require_sglang(environment: Mapping[str, str]) -> None:
    """Look for SGLang's launcher, without importing it: that takes seconds, and the server does it anyway."""
    if not sys.executable:
        raise SGLangError("Python does not know where it is itself", "Start moefix by the full path of its Python.")
    added = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    found = importlib.util.find_spec("sglang") or importlib.machinery.PathFinder.find_spec("sglang", added)
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise SGLangError(
            f"SGLang is not installed for {sys.executable}",
            "Install it there (pip install sglang), or run moefix's image.",
        )
    if not any(Path(folder, "launch_server.py").is_file() for folder in folders):
        raise SGLangError(
            f"there is no sglang.launch_server in {folders[0]}",
            "Install SGLang anew; a folder called sglang without the package in it may be in the way.",
        )
