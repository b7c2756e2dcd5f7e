"""Command lines read by moefix, held against SGLang's own parser."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixer.base.errors import UsageError
from fixer.sglang.declared import Declared, declared_of
from fixer.sglang.flag import Flag
from fixer.sglang.flags import parse_flags
from fixer.sglang.parser import UnknownFlagError, nearest, read_words
from fixer.sglang.tree import Tree

REAL_PARSER = Path(__file__).resolve().parents[1] / "support" / "real_parser.py"
FIELDS = ("model_path", "tp_size", "ep_size", "dp_size", "quantization", "enable_dp_attention")
OLD_NAMES = {
    "tp_size": "tensor_parallel_size",
    "ep_size": "expert_parallel_size",
    "dp_size": "data_parallel_size",
}
"""What add_cli_args of 0.4.9 calls them; from_cli_args renames."""

PIECES = (
    *(
        ["--tp", "4"],
        ["--tp=2"],
        ["--tensor-parallel-size", "8"],
        ["--tensor-p=2"],
        ["--ep-size=2"],
        ["--expert-p", "4"],
    ),
    *(["--dp", "2"], ["--chunked-prefill-size", "-1"], ["--chunked-prefill-size=8192"], ["--quantization=fp8"]),
    *(["--quant", "fp8"], ["--quantization", "FP8"], ["--enable-dp-attention"], ["--enable-dp-a"], ["--enable-d"]),
    *(["--host", "::"], ["--ho=1"], ["--h"], ["--enable-metrics"], ["--enable-metrics=1"], ["--tpp", "2"], ["stray"]),
    *(["--tp"], ["--tp", "two"], ["--port", "1.5"], ["--cuda-graph-bs", "1", "2", "3"], ["--load-format", "dummy"]),
    *(["--mem-fraction-static", "0.8"], ["--mem-fraction-static", "x"], ["--served-model-name", "a b"], ["-x"], ["-"]),
    *(
        ["--json-model-override-args", '{"a": -1}'],
        ["--model-path=b"],
        ["--model", "c"],
        ["--model-pa", "d"],
        ["--", "e"],
    ),
)


def lines() -> list[list[str]]:
    dice = random.Random(7)
    return [
        ["--model-path", "m", *(word for piece in dice.sample(PIECES, dice.randint(1, 3)) for word in piece)]
        for _ in range(400)
    ]


@pytest.mark.parametrize("release", ["0.4.9", "0.5.17", "0.5.23"])
def test_command_lines_are_read_as_sglang_reads_them(release: str, trees: dict[str, Tree]) -> None:
    tree, asked = trees[release], lines()
    command = [sys.executable, str(REAL_PARSER), str(tree.package.parent)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    refused = 0
    for words, own in zip(asked, json.loads(done.stdout), strict=True):
        try:
            flags: Any = parse_flags(words, declared_of(tree))
        except UsageError as fault:
            flags = fault
        assert isinstance(own, str) == isinstance(flags, UsageError), (words, own, flags)
        refused += isinstance(own, str)
        if not isinstance(own, str):
            assert {name: own[name] if name in own else own[OLD_NAMES[name]] for name in FIELDS} == {
                name: getattr(flags, name) for name in FIELDS
            }, words
    assert 100 < refused < 380


def given(*words: str) -> Any:
    declared = Declared((Flag(("--size", "-s"), "size", type="int"), Flag(("--many",), "many", nargs="+")))
    found, rest = read_words(words, declared)
    return [(each.spelling, *each.texts) for each in found], rest


def test_words_are_kept_with_their_full_name() -> None:
    assert given("--si=4", "--many", "1", "-2", "--other", "x", "-s", "5") == (
        [("--size", "4"), ("--many", "1", "-2"), ("-s", "5")],
        ["--other", "x"],
    )


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--tpp", "--tp-size"),
        ("--modle", "--model"),
        ("--quantisation=fp8", "--quantization"),
        ("--tp_size", "--tp-size"),
        ("--enable-metric-s", "--enable-metrics"),
        ("--zzzzzzzz", ""),
    ],
)
@pytest.mark.parametrize("release", ["0.5.17", "0.5.23"])
def test_the_nearest_flag(word: str, flag: str, release: str, trees: dict[str, Tree]) -> None:
    declared = declared_of(trees[release])
    assert nearest(word, (name for each in declared.flags for name in each.spellings)) == flag
    with pytest.raises(UnknownFlagError) as caught:
        parse_flags(["m", word, "2"], declared)
    assert word.partition("=")[0] in caught.value.message
    assert flag in caught.value.hint


def test_a_word_behind_the_flags_is_no_model(trees: dict[str, Tree]) -> None:
    with pytest.raises(UnknownFlagError, match="'Qwen/X' belongs to no flag"):
        parse_flags(["--enable-metrics", "Qwen/X"], declared_of(trees["0.5.17"]))


@pytest.mark.parametrize("words", [["--a=HUSH"], ["--api-kee=HUSH"], ["--api-kee", "HUSH"], ["--ssl-k=HUSH"]])
def test_no_message_holds_what_may_be_a_secret(words: list[str], trees: dict[str, Tree]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_flags(words, declared_of(trees["0.5.17"]))
    assert "HUSH" not in caught.value.message + caught.value.hint


def test_an_own_option_that_is_nearer_is_named(trees: dict[str, Tree]) -> None:
    with pytest.raises(UnknownFlagError) as caught:
        parse_flags(["--lookup"], declared_of(trees["0.5.17"]))
    better = caught.value.or_of(["--gpu", "--lookup-only"])
    assert (better.message, better.hint) == ("there is no option '--lookup'", "Did you mean --lookup-only?")
    assert caught.value.or_of(["--gpu"]) is caught.value


def test_plugins_may_add_flags_and_choices(trees: dict[str, Tree], monkeypatch: pytest.MonkeyPatch) -> None:
    words, declared = ["--plugin-flag", "1", "--quantization", "plugin"], declared_of(trees["0.5.17"])
    with pytest.raises(UsageError):
        parse_flags(words, declared)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [group])
    assert parse_flags(words, declared).quantization == "plugin"
