"""The files of a model on the local hub: shards to fetch, and copies to leave."""

from __future__ import annotations

import json

from tests.support.hub import noise

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
