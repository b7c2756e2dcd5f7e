"""How large the weights are: by the folder, the hub's listing, or the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fixer.model.config import Model, Source
from fixer.model.download.weight_bytes import weight_bytes
from fixer.model.fetch_file import Hub
from fixer.model.hub import repository_folder, snapshot_folder
from fixer.sglang.flags import ServerFlags, parse_flags
from tests.support.downloads import FILES, SHARDS
from tests.support.hub import COMMIT, Site, serve


@pytest.fixture
def site() -> Site:
    return Site(FILES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def endpoint(site: Site) -> Iterator[str]:
    with serve(site) as address:
        yield address


def model(name: str = "owner/name", revision: str | None = COMMIT, source: Source = Source.HUB) -> Model:
    return Model(name, "A", {}, {}, None, revision, source)


def fill(cache: Path, *names: str) -> None:
    folder = snapshot_folder(cache, "owner/name", COMMIT)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(FILES[name])
    refs = repository_folder(cache, "owner/name") / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(COMMIT)


def test_the_bytes_of_the_weights(site: Site, endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(len(FILES[name]) for name in SHARDS)
    hub, flags = Hub(endpoint=endpoint), ServerFlags()
    assert weight_bytes(model(), flags, hub) == total
    assert site.sent.total() == 0
    assert weight_bytes(model(), parse_flags(["--load-format", "gguf"]), hub) is None
    assert weight_bytes(model(), parse_flags(["--quantization", "fp8"]), hub) is None
    assert weight_bytes(model("Qwen3-30B-A3B", source=Source.CATALOGUE), flags, hub) is None
    site.refuse = lambda path: (403, "GatedRepo")
    assert weight_bytes(model(), flags, hub) is None
    fill(cache, *SHARDS, "model.safetensors.index.json")
    assert weight_bytes(model(), flags, hub) == total
    folder = snapshot_folder(cache, "owner/name", COMMIT)
    assert weight_bytes(model(str(folder), source=Source.FOLDER), flags) == total
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert weight_bytes(model(), flags, hub) == total
    (folder / SHARDS[0]).unlink()
    assert weight_bytes(model(), flags, hub) is None
