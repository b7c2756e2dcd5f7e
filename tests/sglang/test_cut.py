"""Cutting functions out of a file by its syntax tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixer.sglang.cut import Source, UnknownFormError, code_of, cut, cut_slice, cut_text, namespace

PATH = Path("srt/some.py")


def refuse(*_: object) -> None:
    raise ImportError("nothing is imported here")


def run(code, **given):
    space = namespace({"__import__": refuse, **given})
    exec(code, space)
    return space


def source(text: str) -> Source:
    return Source(PATH, text)


def test_a_function_brings_along_what_it_uses_of_its_file():
    text = """
import a_module_that_is_not_there
LIMIT: int = 4
_FACTOR = LIMIT * 2
unused = a_module_that_is_not_there.value
class Unused: pass
def helper(x): return x * _FACTOR
@functools.lru_cache
def wanted(x: Optional[Tensor], *, y: int = LIMIT) -> Dict[str, int]:
    z: Sometype = [helper(each) for each in (x, y)]
    def inner(a): return a + z[0]
    return inner(1)
"""
    import functools

    space = run(cut(source(text), ["wanted", "absent"], {"functools"}), functools=functools)
    assert space["wanted"](2) == 17
    assert "unused" not in space
    assert "Unused" not in space


def test_what_is_given_wins_over_the_files_own():
    text = "_is_hip = is_hip()\ndef wanted(): return _is_hip\n"
    assert run(cut(source(text), ["wanted"], {"_is_hip"}), _is_hip="given")["wanted"]() == "given"


def test_a_name_that_nobody_knows_is_named_with_the_function():
    with pytest.raises(UnknownFormError, match=r"srt/some.py: wanted uses new_helper"):
        cut(source("def wanted(): return new_helper()\n"), ["wanted"], ())


def test_what_is_needed_and_not_there_is_named():
    with pytest.raises(UnknownFormError, match=r"it lacks other, wanted"):
        cut(source("x = 1\n"), ["wanted"], (), needed=["wanted", "other"])


@pytest.mark.parametrize("text", ["def f(:\n", "\0", "def f(): return ^x\n"])
def test_a_file_that_this_python_cannot_read(text):
    with pytest.raises(UnknownFormError, match="this Python cannot read it"):
        cut(source(text), ["f"], ())


def test_a_file_that_is_no_text(tmp_path):
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(UnknownFormError, match="it cannot be read"):
            Source.read(path)
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    with pytest.raises(UnknownFormError, match="it cannot be read"):
        Source.read(tmp_path / "bytes.py")


@pytest.mark.parametrize("word", ["open", "eval", "exec", "compile", "__import__", "globals", "input"])
def test_a_cut_function_does_not_reach_for_what_it_is_not_given(word):
    with pytest.raises(UnknownFormError, match=f"wanted uses {word}"):
        cut(source(f"def wanted(): return {word}\n"), ["wanted"], ())


def test_as_text_for_a_process_without_the_file():
    text = "LIMIT = 3\ndef wanted(x: Tensor) -> Dict[str, int]: return x < LIMIT\n"
    copied = cut_text(source(text), ["wanted"], ())
    assert run(code_of(copied))["wanted"](2) is True
    assert cut_text(source(text), ["absent"], ()) == ""


SLICE = """
def decide(shape, n, flag): return {"USE_TMA": flag, "n": n}, shape
def caller(x, flag, *, padded, unused=None):
    assert padded
    size = 7
    if not flag:
        size = 0
    unrelated = torch.empty(size)
    config, (down, _) = decide(x.shape[0] - size, 2, flag)
    config = dict(config)
    other = config["n"]
    wanted = config.pop("USE_TMA", False)
    for _ in range(3):
        decide(1, 2, 3)
"""


def test_a_slice_holds_the_call_what_it_needs_and_what_is_done_with_the_key():
    part = cut_slice(source(SLICE.replace(", shape\n", ", (shape, 0)\n")), "decide", "USE_TMA", {"decide"})
    assert (part.function, part.parameters, part.targets[:2]) == ("caller", {"x", "flag"}, ("config", "down"))

    class Box:
        shape = (10,)

    space = run(part.code, decide=lambda shape, n, flag: ({"USE_TMA": flag}, (shape, 0)), x=Box, flag=True)
    assert (space["wanted"], space["config"], space["down"]) == (True, {}, 3)
    assert "unrelated" not in space
    assert "other" not in space


def test_a_partial_is_followed_to_its_call():
    text = """
def caller(x, tokens):
    size = 2
    ask = functools.partial(decide, x, size)
    tokens = min(tokens, 64)
    config = ask(tokens)
"""
    import functools

    part = cut_slice(source(text), "decide", "USE_TMA", {"decide", "functools"})
    space = run(part.code, decide=lambda *all_: all_, functools=functools, x=1, tokens=100)
    assert space["config"] == (1, 2, 64)
    assert part.targets == ("config",)


@pytest.mark.parametrize(
    "body",
    [
        "for _ in (1,): config = decide(x)",
        "with x: config = decide(x)",
        "return decide(x)",
        "config = first(decide(x))",
        "decide = x",
    ],
)
def test_a_call_of_another_form_is_not_known(body):
    with pytest.raises(UnknownFormError, match="no function calls decide in a form that is known"):
        cut_slice(source(f"def decide(x): return x\ndef caller(x):\n    {body}\n"), "decide", "USE_TMA", {"decide"})


def test_a_slice_that_uses_what_nobody_knows():
    text = "def caller(x):\n    size = new_rule(x)\n    config = decide(size)\n"
    with pytest.raises(UnknownFormError, match="caller uses new_rule"):
        cut_slice(source(text), "decide", "USE_TMA", {"decide"})
