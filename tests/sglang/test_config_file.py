"""`--config`: merged by the tree's own code, where SGLang merges it, and ignored where SGLang ignores it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixer.base.errors import UsageError
from fixer.sglang.config_file import MAX_CONFIG_BYTES
from fixer.sglang.declared import declared_of
from fixer.sglang.flags import parse_flags
from fixer.sglang.parser import UnknownFlagError
from fixer.sglang.tree import Tree

CONTENT = "# ours\nmodel-path: a/b\ntp-size: 4  # four\ntrust-remote-code: true\ncuda-graph-bs-decode:\n  - 1\n  - 2\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(CONTENT)
    return path


def test_it_comes_before_the_command_line(file: Path, trees: dict[str, Tree]) -> None:
    declared = declared_of(trees["0.5.23"])
    flags = parse_flags(["--host", "::", "--config", str(file), "--tp-size", "2"], declared)
    assert (flags.model_path, flags.tp_size, flags.trust_remote_code, flags.host) == ("a/b", 2, True, "::")
    assert (flags.cuda_graph_bs, flags.unread) == ((1, 2), ())
    assert parse_flags(["--config", str(file)], declared).tp_size == 4


@pytest.mark.parametrize("release", ["0.5.17", "0.5.23"])
def test_only_the_very_word_is_merged(release: str, file: Path, trees: dict[str, Tree]) -> None:
    file.write_text("tp-size: 2\n")
    declared = declared_of(trees[release])
    assert parse_flags(["m", "--config", str(file)], declared).tp_size == 2
    for words in (["m", f"--config={file}"], ["m", "--confi", str(file)]):
        assert parse_flags(words, declared).tp_size == 1  # SGLang ignores the file in silence


def test_a_release_without_it_has_no_such_flag(file: Path, trees: dict[str, Tree]) -> None:
    with pytest.raises(UnknownFlagError, match="--config"):
        parse_flags(["m", "--config", str(file)], declared_of(trees["0.4.9"]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n", "dictionary"),
        ("api-key: HUSH: x\n", "ScannerError"),
        ("tp_size: 2\n", "--tp_size"),
        ("lora-paths: [a]\n", "lora_paths"),
        ("[" * 100000, "RecursionError"),
        ("a" * (MAX_CONFIG_BYTES + 1), "larger"),
    ],
)
def test_a_file_at_which_sglang_stops(content: str, said: str, file: Path, trees: dict[str, Tree], capfd) -> None:
    file.write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        parse_flags(["m", "--config", str(file)], declared_of(trees["0.5.17"]))
    assert "HUSH" not in caught.value.message + caught.value.hint + "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["server.json", "none.yaml", "a\0b.yaml", "\n.yaml"])
def test_a_file_that_is_none(name: str, tmp_path: Path, trees: dict[str, Tree]) -> None:
    (tmp_path / "server.json").write_text("{}")
    for words in (["--config", str(tmp_path / name)], ["--config"], ["--config", "a.yaml", "--config", "b.yaml"]):
        with pytest.raises(UsageError, match="--config") as caught:
            parse_flags(["m", *words], declared_of(trees["0.5.17"]))
        assert "\n" not in caught.value.message


def test_without_a_tree_it_is_said_that_it_was_not_read(file: Path) -> None:
    assert parse_flags(["m", "--config", str(file)]).unread == ("--config",)
