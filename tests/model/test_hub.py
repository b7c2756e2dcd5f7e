"""Names, commits and refusals."""

from pathlib import Path

import httpx
import pytest
from huggingface_hub import errors

from fixer.base.errors import HubError
from fixer.model.hub import (
    UnreachableError,
    commit_in_cache,
    commit_of,
    is_commit,
    is_hub_id,
    may_be_folder,
    refusal,
    uses_modelscope,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_names() -> None:
    assert is_hub_id("Qwen/Qwen3-30B-A3B")
    for name in ("Qwen3", "a/b/c", "a/..", "a/b--c", "../b", "a/", "/b", "a b/c", "a/b\n", "a" * 97 + "/b"):
        assert not is_hub_id(name), name


def test_commits(tmp_path: Path) -> None:
    assert is_commit(COMMIT)
    assert not any(map(is_commit, (None, "", "main", COMMIT[:7], COMMIT + "0", COMMIT.upper())))
    assert commit_of(Path(f"/x/models--a--b/snapshots/{COMMIT}/config.json")) == COMMIT
    assert commit_of(Path(f"/snapshots/{'f' * 40}/hub/models--a--b/snapshots/{COMMIT}/x/y.json")) == COMMIT
    assert commit_of(Path("/x/snapshots/main/config.json")) is None
    assert commit_of(Path("/x/config.json")) is commit_of(Path("snapshots")) is None


@pytest.mark.parametrize("text", ["", "main", COMMIT[:8], "\xff" * 40, COMMIT + "\n"])
def test_a_ref_in_the_cache(tmp_path: Path, text: str) -> None:
    refs = tmp_path / "models--a--b" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(text.encode("latin-1"))
    assert commit_in_cache(tmp_path, "a/b", None) == (COMMIT if text.startswith(COMMIT) else None)
    assert commit_in_cache(tmp_path, "a/b", COMMIT) == COMMIT
    assert commit_in_cache(tmp_path, "a/b", "v1") is None


def test_modelscope_is_read_as_sglang_reads_it() -> None:
    assert all(uses_modelscope({"SGLANG_USE_MODELSCOPE": word}) for word in ("1", "true", "True", "YES", "y"))
    assert not any(uses_modelscope({"SGLANG_USE_MODELSCOPE": word}) for word in ("", "0", "false", "maybe"))
    assert not uses_modelscope({})


def test_the_clients_wrapping_does_not_hide_what_the_hub_said() -> None:
    said = Exception("https://hub/secret?token=hf_x")
    said.response = httpx.Response(403)  # type: ignore[attr-defined]
    wrapped = errors.LocalEntryNotFoundError("cannot find")
    wrapped.__cause__ = said
    refused = refusal("a/b", None, wrapped)
    assert isinstance(refused, HubError)
    assert "is gated" in refused.message
    wrapped.__cause__ = ConnectionError("https://hub/secret")
    refused = refusal("a/b", "v1", wrapped)
    assert isinstance(refused, UnreachableError)
    assert refused.error.message == "a/b at revision v1 is not in the cache, and the hub is out of reach"


def test_a_name_on_a_hub_is_not_asked_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "empty").mkdir(parents=True)
    (tmp_path / "me" / "model").mkdir()
    (tmp_path / "me" / "model" / "config.json").write_text("{}")
    (tmp_path / "me" / "x.gguf").write_text("GGUF")
    assert not may_be_folder("me/nothing")
    assert not may_be_folder("me/empty")
    assert may_be_folder("me/model")
    assert may_be_folder("me/x.gguf")
    for name in ("./me/empty", "../me/empty", "/me/empty", "~/me/empty", "model", "a/b/c"):
        assert may_be_folder(name), name
