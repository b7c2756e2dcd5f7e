from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fixer.sglang import declared as module
from fixer.sglang.declared import Declared, declared_of
from fixer.sglang.tree import Tree


@pytest.fixture(autouse=True)
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read_here", {})


@pytest.mark.parametrize(
    ("release", "flags", "architectures", "methods", "runners"),
    [("0.4.9", 166, 89, 23, 0), ("0.5.17", 474, 241, 29, 16), ("0.5.23", 531, 290, 29, 22)],
)
def test_what_a_release_has(
    release: str, flags: int, architectures: int, methods: int, runners: int, trees: dict[str, Tree]
) -> None:
    found = declared_of(trees[release])
    counts = (len(found.flags), len(found.architectures), len(found.quantization_methods), len(found.runner_backends))
    assert counts == (flags, architectures, methods, runners)
    assert {"Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "MixtralForCausalLM"} <= found.architectures
    assert {"fp8", "compressed-tensors", "awq_marlin"} <= found.quantization_methods


def test_what_came_later_and_what_is_for_other_devices(trees: dict[str, Tree]) -> None:
    old, new, newest = (declared_of(trees[release]) for release in ("0.4.9", "0.5.17", "0.5.23"))
    assert "Glm4MoeForCausalLM" in new.architectures - old.architectures
    assert "mxfp4" in new.quantization_methods - old.quantization_methods
    assert "mlx_q4" not in new.quantization_methods
    assert "gptq" in new.quantization_methods - newest.quantization_methods  # 0.5.23: CPU, NPU and XPU only
    assert "triton" in new.runner_backends


def a_tree(folder: Path, text: str) -> Tree:
    (folder / "srt" / "models").mkdir(parents=True)
    (folder / "srt" / "models" / "a.py").write_text(f"import nothing\nEntryClass = [\n    {text},\n]\n\nx = [y]\n")
    (folder / "srt" / "models" / "b.py").write_text("EntryClass = B\n")
    (folder / "srt" / "models" / "c.py").write_text("EntryClass = [\n")
    return Tree(folder, "0.5.17", "3.6.0")


def test_a_tree_that_shows_only_a_part(tmp_path: Path) -> None:
    found = declared_of(a_tree(tmp_path / "sglang", "A"))
    assert found == Declared(architectures=frozenset({"A", "B"}), package=str(tmp_path / "sglang"))
    assert found.runner_backends == ()


def test_no_tree_declares_nothing(tmp_path: Path) -> None:
    assert declared_of(Tree(tmp_path, "0.5.17", "3.6.0")) == Declared(package=str(tmp_path))


def test_it_is_kept_by_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, home = a_tree(tmp_path / "sglang", "A"), tmp_path / "home"
    first = declared_of(tree, home)
    module._read_here.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", lambda package: pytest.fail("read anew"))
        assert declared_of(tree, home) == first
    moved = shutil.copytree(tmp_path / "sglang", tmp_path / "other")
    assert declared_of(Tree(moved, "0.5.17", "3.6.0"), home).package == str(moved)
    module._read_here.clear()
    (tree.package / "srt" / "models" / "b.py").write_text("EntryClass = [C]\n")
    assert declared_of(tree, home).architectures == {"A", "C"}
    assert len(list((home / "cache" / "declared").iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"flags": 1}', b"\xff", b'{"architectures": [[]]}'])
def test_a_damaged_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    tree, home = a_tree(tmp_path / "sglang", "A"), tmp_path / "home"
    first = declared_of(tree, home)
    (kept,) = (home / "cache" / "declared").iterdir()
    kept.write_bytes(content)
    module._read_here.clear()
    assert declared_of(tree, home) == first
    assert sorted(kept.parent.glob("*.damaged-*"))


def test_a_data_folder_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    assert declared_of(a_tree(tmp_path / "sglang", "A"), tmp_path / "home").architectures == {"A", "B"}
