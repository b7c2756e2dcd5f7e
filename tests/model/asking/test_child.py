"""Which errors of SGLang's are load errors. The child's code is imported here without SGLang."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fixer.model.asking.child.main import _is_check, _words

SOURCE = """
import json

def check(size):
    if size % 128:
        raise ValueError(
            f"size {size} "
            f"is not divisible by {128}"
        )

def promise(size):
    assert size % 128 == 0, (
        f"{size} does not divide"
    )

def slip():
    first, second = ()

def number():
    return int("x")

def elsewhere():
    return json.loads("{")

def passed_on():
    try:
        {}["moe_layer_freq"]
    except KeyError as fault:
        raise ValueError("the config cannot be read") from fault

def turned():
    try:
        int("x")
    except ValueError as fault:
        raise ValueError("the flag is no number") from fault
"""


@pytest.fixture
def sglang(tmp_path: Path) -> ModuleType:
    root = tmp_path / "sglang"
    root.mkdir()
    (root / "checks.py").write_text(SOURCE)
    sys.path.insert(0, str(root))
    try:
        sys.modules.pop("checks", None)
        return __import__("checks")
    finally:
        sys.path.remove(str(root))


def raised(run: Callable[[], object]) -> BaseException:
    try:
        run()
    except Exception as fault:
        return fault
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("name", "arguments", "is_check"),
    [
        ("check", (96,), True),
        ("promise", (96,), True),
        ("turned", (), True),
        ("slip", (), False),
        ("number", (), False),
        ("elsewhere", (), False),
        ("passed_on", (), False),
    ],
)
def test_only_a_check_of_sglangs_own_is_a_load_error(
    sglang: ModuleType, name: str, arguments: tuple[int, ...], is_check: bool
) -> None:
    fault = raised(lambda: getattr(sglang, name)(*arguments))
    root = str(Path(sglang.__file__ or "").parent)
    assert _is_check(root, fault) is is_check
    assert not _is_check(root + "-other", fault)


def test_words_name_the_error_and_the_place(sglang: ModuleType) -> None:
    assert _words(raised(sglang.slip)).startswith("ValueError: not enough values to unpack")
    assert _words(raised(sglang.slip)).endswith(
        f"/sglang/checks.py:{SOURCE[: SOURCE.index('second = ()')].count(chr(10)) + 1})"
    )
