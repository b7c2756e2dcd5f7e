"""The flags read off the source, held against SGLang's own parser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixer.sglang.flag import Flag
from fixer.sglang.flag_source import read_flags
from fixer.sglang.tree import Tree

REAL_PARSER = Path(__file__).resolve().parents[1] / "support" / "real_parser.py"
CLASSES = {"store": "_StoreAction", "store_true": "_StoreTrueAction"}


def own_rows(tree: Tree) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(REAL_PARSER), str(tree.package.parent)]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    return {row["spellings"][0]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize(("release", "count"), [("0.4.9", 166), ("0.5.17", 474), ("0.5.23", 531)])
def test_every_flag_is_as_sglangs_own_parser_has_it(release: str, count: int, trees: dict[str, Tree]) -> None:
    own = own_rows(trees[release])
    read = {flag.spellings[0]: flag for flag in read_flags(trees[release].package / "srt")}
    assert (len(own), read.keys()) == (count, own.keys())
    for name, row in own.items():
        flag = read[name]
        negative = ["--no-" + each[2:] for each in flag.spellings if flag.action == "BooleanOptionalAction"]
        assert sorted(row["spellings"]) == sorted([*flag.spellings, *negative])
        assert (row["dest"], row["class"]) == (flag.dest, CLASSES.get(flag.action, flag.action)), name
        assert (row["nargs"] != 0) == flag.takes_value, name
        if flag.takes_value:
            assert row["nargs"] == flag.nargs, name
            assert row["type"] in (flag.type, None) or (row["type"], flag.type) == ("str", "str"), name
        # What is computed when SGLang runs is left open.
        assert flag.choices is None or sorted(map(str, row["choices"])) == sorted(map(str, flag.choices)), name
        assert flag.default is None or flag.default == row["default"], name
    assert sum(flag.choices is None and bool(own[name]["choices"]) for name, flag in read.items()) <= 7


def source(tmp_path: Path, text: str) -> dict[str, Flag]:
    (tmp_path / "server_args.py").write_text(text)
    return {flag.dest: flag for flag in read_flags(tmp_path)}


CALLS = """
KINDS = ["a", "b"]
GROWS = ["a"]
GROWS.append("b")
class Old(argparse.Action):
    def __init__(self, option_strings, dest, nargs=0, **more): ...
class ServerArgs:
    size: int = 2 * 8
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model", type=str, required=True)
        parser.add_argument("--size", "-s", type=int, default=ServerArgs.size)
        parser.add_argument("--kind", choices=KINDS + ["c"], default=[*KINDS][0])
        parser.add_argument("--grows", choices=GROWS)
        parser.add_argument("--computed", choices=list(Registry.names))
        parser.add_argument("--gone", action=Old)
        parser.add_argument("--many", nargs="+", type=json.loads)
"""


def test_a_list_of_calls(tmp_path: Path) -> None:
    flags = source(tmp_path, CALLS)
    assert flags["model_path"].spellings == ("--model-path", "--model")
    assert flags["size"] == Flag(("--size", "-s"), "size", type="int", default=16)
    assert flags["kind"].choices == ("a", "b", "c")
    assert (flags["grows"].choices, flags["computed"].choices) == (None, None)
    assert (flags["gone"].takes_value, flags["many"].nargs, flags["many"].type) == (False, "+", "loads")


FIELDS = """
class ServerArgs:
    model_path: A[str, Arg(help="x", aliases=["--model"])]
    tp_size: A[int, "ranks", NS("parallel")] = 1
    ratio: A[Optional[float], "x" f"y"] = None
    on: A[bool, "x"] = False
    both: A[Optional[bool], Arg(action=argparse.BooleanOptionalAction)] = None
    kind: A[Literal["a", "b"], "x"] = "a"
    open: A[Literal["a", "b"], Arg(choices=computed())] = "a"
    many: A[List[int] | None, Arg(nargs="*")] = None
    size: A[Optional[int], Arg(type_parser=human_readable_int, cli_name="--big")] = None
    inner: A[int, Arg(no_cli=True)] = 0
    plain: int = 0
    @staticmethod
    def add_cli_args(parser):
        add_cli_args_from_dataclass(parser, ServerArgs)
        parser.add_argument("--config", type=str)
"""


def test_annotated_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arg_groups"):
        source(tmp_path, FIELDS)  # without the classes of actions nobody could say which flags take a value
    (tmp_path / "arg_groups").mkdir()
    (tmp_path / "arg_groups" / "arg_utils.py").touch()
    flags = source(tmp_path, FIELDS)
    assert list(flags) == ["model_path", "tp_size", "ratio", "on", "both", "kind", "open", "many", "size", "config"]
    assert flags["tp_size"] == Flag(("--tp-size",), "tp_size", type="int", default=1)
    assert (flags["ratio"].type, flags["on"].action, flags["both"].takes_value) == ("float", "store_true", False)
    assert (flags["kind"].choices, flags["open"].choices) == (("a", "b"), None)
    assert (flags["many"].type, flags["many"].nargs) == ("int", "*")
    assert (flags["size"].spellings, flags["size"].type) == (("--big",), "human_readable_int")


@pytest.mark.parametrize("text", ["", "def add_cli_args(parser): parser.add_argument('--other')", "def f(:", "\0"])
def test_a_form_that_is_not_known_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        source(tmp_path, text)
