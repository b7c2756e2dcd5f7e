"""What the look-up of a tree writes into SGLang's log, read off its source by syntax tree.

So the verdict understands a release that changes its words, and needs no list of them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from fixer.sglang.log_lines import Said, Wording

_LOOK_UP = "get_moe_configs"
"""The function that looks for a file and logs what it found."""


def wordings_of(source: str) -> tuple[Wording, ...]:
    """What the look-up of a tree writes into the log.

    Each text of a logging call in `get_moe_configs` is judged by its form: two paths are a fallback; a path behind "not
    found" was not found; any other path was read; without a path it is the word about determinism.

    Args:
        source: the module with the look-up.

    Returns:
        Nothing where the source is not Python or has no such function.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == _LOOK_UP]
    calls = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)]
    found = (_wording(call.args) for call in calls if _logs(call.func))
    return tuple(dict.fromkeys(wording for wording in found if wording is not None))


def _logs(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name.startswith(("info", "warning", "error", "log_info", "log_warning"))


def _wording(arguments: Sequence[ast.expr]) -> Wording | None:
    """The words of one logging call, None where they speak of no file."""
    texts = [node for node in arguments if isinstance(node, ast.JoinedStr) or _is_text(node)]
    if not texts:
        return None
    values = iter(arguments[arguments.index(texts[0]) + 1 :])
    pieces: list[str] = []
    for piece in texts[0].values if isinstance(texts[0], ast.JoinedStr) else [texts[0]]:
        if isinstance(piece, ast.FormattedValue):
            pieces.append(_filled(piece.value))
        elif isinstance(piece, ast.Constant):
            spread = re.split("(%[sd])", str(piece.value)) if isinstance(texts[0], ast.Constant) else [str(piece.value)]
            pieces += [_filled(next(values, None)) if part in ("%s", "%d") else part for part in spread]
    words = "".join(pieces)
    paths = words.count("%s")
    if paths:
        # Up to what follows the last path, so that the path has an end.
        words = words[: words.rindex("%s") + 3]
    said = {0: Said.DETERMINISTIC, 1: Said.USING, 2: Said.FALLBACK}.get(paths)
    if paths == 1 and "not found at %s" in words:
        said = Said.REUSED_UP if words.startswith("Down ") or "down_moe=False" in words else Said.DEFAULT
    if said is None or (said is Said.DETERMINISTIC and "eterministic" not in words):
        return None
    return said, words


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _filled(value: ast.expr | None) -> str:
    """What stands for a value in the words: a path where its name says so."""
    return "%s" if value is not None and "path" in ast.unparse(value) else "%v"
