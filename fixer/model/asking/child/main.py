"""Reads questions, builds each model, writes what SGLang would look up: the child's whole life.

The questions come as one JSON object, and each answer goes as one line of JSON to a pipe of its own: whatever SGLang
prints goes elsewhere. Several questions share one import of SGLang: each is answered in a fork.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LOAD_ERRORS = (ValueError, NotImplementedError, AssertionError)
"""What SGLang's own checks raise. Anything else (a missing key, a missing module) says nothing about the server."""

MOST_WORDS = 1000
"""Characters of an error that are given back. A load error's are SGLang's own; no other is read to its end."""


def main(questions: int, answers: int) -> None:
    """Answer the questions.

    Args:
        questions: the file descriptor that they are read from, one JSON object.
        answers: the file descriptor that the answers go to, a line of JSON each.
    """
    with open(questions, "rb") as file:
        asked = json.load(file)
    begin = time.monotonic()
    try:
        card = _import(asked)
    except BaseException as fault:
        for _ in asked["questions"]:
            _write(answers, {"outcome": "not_known", "reason": "SGLang cannot be imported: " + _words(fault)})
        return
    shared = {"release": _release(), "import_seconds": time.monotonic() - begin}
    for question in asked["questions"]:
        card.set(question.get("card", asked["card"]))
        if len(asked["questions"]) == 1:
            _write(answers, {**_answer(asked["root"], question), **shared})
            return
        child = os.fork()
        if child == 0:
            try:
                _write(answers, {**_answer(asked["root"], question), **shared})
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            _write(answers, {"outcome": "not_known", "reason": "SGLang's process ended while it was asked"})


def _import(asked: dict[str, Any]) -> Any:
    """Pretend the card and the world, and import SGLang from the package root that the question names."""
    import importlib.util

    root = Path(asked["root"]).resolve()
    found = importlib.util.find_spec("sglang")
    if (
        found is None
        or not found.submodule_search_locations
        or Path(next(iter(found.submodule_search_locations))).resolve() != root
    ):
        sys.path.insert(0, str(root.parent))
    from fixer.model.asking.child import build, world
    from fixer.model.asking.child.card import Card, pretend_card

    card = Card(asked["card"])
    pretend_card(card)
    world.pretend_world()
    world.plain_operators()
    world.no_compiling()
    world.lonely_groups()
    build.import_sglang()
    return card


def _release() -> str:
    import sglang

    return str(getattr(sglang, "__version__", "unknown"))


def _answer(root: str, question: dict[str, Any]) -> dict[str, Any]:
    from fixer.model.asking.child import build, layers

    begin = time.monotonic()
    try:
        built = build.build(question["argv"], question["folder"])
    except build.FlagsError as fault:
        return {"outcome": "load_error", "reason": str(fault)}
    except LOAD_ERRORS as fault:
        if _is_check(root, fault):
            return {"outcome": "load_error", "reason": str(fault)[:MOST_WORDS] or _words(fault)}
        return {"outcome": "not_known", "reason": _words(fault)}
    except Exception as fault:
        return {"outcome": "not_known", "reason": _words(fault)}
    middle = time.monotonic()
    answer = layers.look(built, root)
    return {
        **answer,
        "build_seconds": middle - begin,
        "layer_seconds": time.monotonic() - middle,
    }


def _is_check(root: str, fault: BaseException) -> bool:
    """Whether a check of SGLang's own raised it: a `raise` or `assert` in its code, not a slip inside an expression.

    A check that passes on another error (`raise ... from`) says no more than that error does.
    """
    frames = traceback.extract_tb(fault.__traceback__)
    if not frames or (fault.__cause__ is not None and not isinstance(fault.__cause__, LOAD_ERRORS)):
        return False
    path, line = Path(frames[-1].filename), frames[-1].lineno or 0
    if not path.resolve().is_relative_to(Path(root).resolve()):
        return False
    try:
        tree = ast.parse(path.read_text())
    except (OSError, ValueError):
        return False
    checks = (node for node in ast.walk(tree) if isinstance(node, (ast.Raise, ast.Assert)))
    return any(check.lineno <= line <= (check.end_lineno or 0) for check in checks)


def _words(fault: BaseException) -> str:
    frames = traceback.extract_tb(fault.__traceback__)
    place = f" ({'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno})" if frames else ""
    lines = [line for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {' '.join(lines[:2])}"[: MOST_WORDS // 2] + place


def _write(answers: int, answer: dict[str, Any]) -> None:
    line = json.dumps(answer).encode() + b"\n"
    while line:
        line = line[os.write(answers, line) :]
