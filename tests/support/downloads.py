"""A repository to download, and the download's process against a local hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from fixer.model.download.messages import Request, from_line
from fixer.model.hub import repository_folder, snapshot_folder
from tests.support.hub import COMMIT, noise

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_fakefakefakefake"
MIB = 1 << 20
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = {
    "config.json": b'{"architectures": ["A"]}',
    "tokenizer.json": b"{}" * 999,
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: noise(12 * MIB, 1),
    SHARDS[1]: noise(9 * MIB, 2),
    "README.md": b"# not needed",
    "original/consolidated.00.pth": noise(2 * MIB, 3),
    "pytorch_model.bin": noise(2 * MIB, 4),
}
WANTED = {name for name in FILES if not name.startswith(("README", "original", "pytorch"))}
TOTAL = sum(len(FILES[name]) for name in WANTED)
REQUEST = Request("owner/name", None, COMMIT, "auto")

# Waiting is for people and for hubs under load; files here are smaller than the client's usual 10 MB at a time.
PROGRAM = """
import sys, time, types
import huggingface_hub.utils._http as http
import huggingface_hub.file_download as file_download
from huggingface_hub import constants
import fixer.model.download.process
constants.DOWNLOAD_CHUNK_SIZE = 1 << 20
quick = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
http.time = file_download.time = quick
fixer.model.download.process.PAUSES = (0.1, 0.1)
fixer.model.download.attempt.LEFTOVER_SECONDS = 1.0
fixer.model.download.attempt.TELL_INTERVAL = 0.05
fixer.model.download.attempt.QUIET_SECONDS = 1.0
constants.HF_HUB_DOWNLOAD_TIMEOUT = 3
fixer.model.download.process.main()
"""


def start(endpoint: str, home: Path, request: Request = REQUEST, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "FETCH": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(asdict(request)), str(os.getpid())],
        env={**kept, **ours, "PYTHONPATH": str(ROOT), **environment},
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(endpoint: str, home: Path, request: Request = REQUEST, **environment: str) -> list[object]:
    """All messages; nothing else is on standard output, and the token nowhere."""
    out, err = start(endpoint, home, request, **environment).communicate(timeout=120)
    assert TOKEN not in out + err
    messages = [from_line(line) for line in out.splitlines()]
    assert None not in messages, out
    return messages


def snapshot(home: Path, commit: str = COMMIT) -> Path:
    return snapshot_folder(home / "hub", "owner/name", commit)


def is_whole(home: Path) -> bool:
    folder = snapshot(home)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return there == WANTED and all((folder / name).read_bytes() == FILES[name] for name in WANTED)


def parts(home: Path) -> list[Path]:
    return sorted((repository_folder(home / "hub", "owner/name") / "blobs").glob("*.incomplete"))
