"""Which files of a repository are loaded, and whether a folder has them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.model.download.weights import FETCHED, Presence, RepoFile, choose, is_safe, presence

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
BESIDE = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model"]
NOT = ["README.md", "LICENSE", "figure.png", ".gitattributes", "model.gguf", "model.onnx", "modeling_x.py"]


def files(*names: str) -> list[RepoFile]:
    return [RepoFile(name, 7, "c" * 40) for name in names]


def chosen(*names: str, repository: str = "owner/name", load_format: str = "auto", **more: bool) -> set[str]:
    choice = choose(files(*names), repository, load_format, **more)
    return {file.path for file in (*choice.weights, *choice.small)}


def test_safetensors_and_what_lies_beside() -> None:
    wanted = {*SHARDS, INDEX, *BESIDE}
    assert chosen(*wanted, *NOT) == wanted


def test_other_copies_of_the_weights_are_left_out() -> None:
    copies = [
        *("pytorch_model.bin", "consolidated.safetensors", "consolidated.safetensors.index.json", "model.pt"),
        *("original/consolidated.00.pth", "original/params.json", "onnx/model.safetensors", "onnx/config.json"),
        *("fp32/model.safetensors", "optimizer.bin", "training_args.bin"),
    ]
    assert chosen(*SHARDS, INDEX, *copies) == {*SHARDS, INDEX}


@pytest.mark.parametrize(
    ("load_format", "weights"),
    [
        ("auto", {"a.safetensors"}),
        ("safetensors", {"a.safetensors"}),
        ("fastsafetensors", {"a.safetensors"}),
        ("npcache", {"a.bin"}),
        ("pt", {"a.pt"}),
        ("mistral", {"consolidated-1.safetensors"}),
    ],
)
def test_load_formats(load_format: str, weights: set[str]) -> None:
    there = ("a.safetensors", "a.bin", "a.pt", "consolidated-1.safetensors", "model-1.safetensors", "optimizer.pt")
    wanted = weights | {"model-1.safetensors"} if weights == {"a.safetensors"} else weights
    assert chosen(*there, load_format=load_format) == wanted


def test_older_formats_where_there_is_nothing_better() -> None:
    assert chosen("a.bin", "b.pt", "training_args.bin") == {"a.bin"}
    assert chosen("b.pt", "scheduler.pt", "a.gguf") == {"b.pt"}
    assert choose(files("a.gguf", "config.json"), "owner/name", "auto").weights == ()


def test_mistrals_own_format() -> None:
    own = ["consolidated.safetensors", "params.json", "tekken.json"]
    assert chosen(*own) == set(own)
    assert chosen(*own, "model.safetensors") == set(own)  # as SGLang: only "model-*" counts against it
    assert chosen(*own, *SHARDS, INDEX) == {*SHARDS, INDEX, "params.json", "tekken.json"}
    by_name = chosen(*own, *SHARDS, INDEX, repository="mistralai/Mistral-Large-3-675B")
    assert by_name == set(own)


def test_a_branch_by_name_leaves_nothing_out_that_sglang_would_fetch_again() -> None:
    more = ("consolidated.safetensors", "fp32/model.safetensors", "consolidated.safetensors.index.json")
    assert chosen(*SHARDS, INDEX, *more, "original/x.safetensors", moves=True) == {*SHARDS, INDEX, *more}


def test_the_models_code_only_where_it_will_be_run() -> None:
    assert chosen("a.safetensors", "modeling.py") == {"a.safetensors"}
    assert chosen("a.safetensors", "modeling.py", code=True) == {"a.safetensors", "modeling.py"}


@pytest.mark.parametrize("path", ["../a.json", "/a.json", "a//b.json", "a/../b.json", "a\\b.json", "a\nb.json", ""])
def test_names_that_leave_the_folder(path: str) -> None:
    assert not is_safe(path)
    assert chosen("a.safetensors", path) == {"a.safetensors"}


@given(st.lists(st.text(max_size=12) | st.sampled_from([*SHARDS, INDEX, *BESIDE, *NOT]), max_size=12))
def test_any_names(names: list[str]) -> None:
    for load_format in FETCHED:
        assert all(is_safe(path) for path in chosen(*names, load_format=load_format))


# --- what is there ---------------------------------------------------------------------------------------------------


def folder(path: Path, *names: str, index: object = None) -> Path:
    for name in names:
        (path / name).write_bytes(b"x")
    if index is not None:
        (path / INDEX).write_text(json.dumps(index))
    return path


def there(path: Path, load_format: str = "auto") -> Presence:
    return presence(path, "owner/name", load_format)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (SHARDS, Presence.COMPLETE),
        (SHARDS[:2], Presence.INCOMPLETE),
        (["model.safetensors"], Presence.COMPLETE),
        (["model.safetensors", "mtp.safetensors"], Presence.UNSURE),
        (["a.safetensors"], Presence.UNSURE),
        (["pytorch_model.bin"], Presence.COMPLETE),
        (["training_args.bin"], Presence.INCOMPLETE),
        (["config.json"], Presence.INCOMPLETE),
        ([], Presence.INCOMPLETE),
    ],
)
def test_presence_by_names(tmp_path: Path, names: list[str], found: Presence) -> None:
    assert there(folder(tmp_path, *names)) is found


def test_presence_by_index(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    assert there(folder(tmp_path, "a.safetensors", index=index)) is Presence.INCOMPLETE
    assert there(folder(tmp_path, "b.safetensors")) is Presence.COMPLETE


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 10000])
def test_an_index_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    folder(tmp_path, *SHARDS)
    (tmp_path / INDEX).write_text(text)
    assert there(tmp_path) is Presence.COMPLETE


def test_a_link_to_nothing_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    assert there(tmp_path) is Presence.INCOMPLETE
    assert there(tmp_path / "nowhere") is Presence.INCOMPLETE


def test_presence_by_load_format(tmp_path: Path) -> None:
    folder(tmp_path, "model.safetensors")
    assert there(tmp_path, "npcache") is Presence.INCOMPLETE
    assert there(tmp_path, "safetensors") is Presence.COMPLETE
