"""Cuts functions out of a file of SGLang by its syntax tree, so that they run without the rest of SGLang.

Nothing of SGLang is imported. A function brings along what it uses of its own file; all else it must find among the
names that the caller of this module gives. A name that is neither is a form that moefix does not know.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

from fixer.base.errors import SGLangError

_NOT_FOR_THEM = {
    "__import__",
    "breakpoint",
    "compile",
    "eval",
    "exec",
    "exit",
    "globals",
    "input",
    "open",
    "quit",
    "vars",
}

BUILTINS = frozenset(name for name in dir(builtins) if name not in _NOT_FOR_THEM)
"""What a cut function may use of Python itself. It reads files and imports modules only through what it is given."""

_FIELDS_LEFT_OUT = {"annotation", "returns", "type_comment"}
"""Annotations are never evaluated, so that their names need not be known."""

_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.Expr)
"""Statements that a slice may hold; a loop, a `with` or a `try` around the call is a form of another kind."""


class UnknownFormError(SGLangError):
    """A part of SGLang's source is not of a form that moefix knows. The message says which part, and of what file."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"not known to moefix: {path}: {what}.",
            "This SGLang differs from the releases that moefix knows: take one of those (README), or a newer moefix.",
        )


@dataclass(frozen=True)
class Source:
    """A file of SGLang: its path and its text."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Source:
        """The file's text.

        Raises:
            UnknownFormError: it cannot be read as text.
        """
        try:
            return cls(path, path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UnknownFormError(path, f"it cannot be read ({error})") from error

    @property
    def sha256(self) -> str:
        """Of the text, which is what a cut depends on."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Slice:
    """The statements of a function that lead to one call, made runnable on their own.

    Attributes:
        code: to be run in a namespace that holds `parameters` and what the statements use.
        function: the name of the function that they come from.
        parameters: the function's own parameters that the statements use.
        targets: the names that the call's result is assigned to, in order; a nested tuple is taken apart.
    """

    code: CodeType
    function: str
    parameters: frozenset[str]
    targets: tuple[str, ...]


def cut_text(source: Source, wanted: Iterable[str], given: Iterable[str]) -> str:
    """The same as `cut`, as text, for a process that does not have the file; "" where the file has nothing of it."""
    nodes = _chosen(source, tuple(wanted), frozenset(given))
    return ast.unparse(ast.Module(list(nodes), []))


def code_of(text: str) -> CodeType:
    """What `cut_text` gave, ready to run."""
    return _compiled(Path("<cut out of SGLang>"), ast.parse(text).body)


def cut(source: Source, wanted: Iterable[str], given: Iterable[str], *, needed: Iterable[str] = ()) -> CodeType:
    """Functions and constants of a file, with all that they use of it, as code that defines them.

    Args:
        wanted: names at the file's top level; one that the file lacks is left out.
        given: names that the namespace will have; they win over the file's own.
        needed: those of `wanted` that the file must have.

    Raises:
        UnknownFormError: the file lacks something needed, or a function uses a name that is neither its own nor given.
    """
    return _cut(source.sha256, source, tuple(wanted), frozenset(given), frozenset(needed))


@lru_cache(maxsize=64)
def _cut(_: str, source: Source, wanted: tuple[str, ...], given: frozenset[str], needed: frozenset[str]) -> CodeType:
    missing = sorted(needed - _definitions(source).keys())
    if missing:
        raise UnknownFormError(source.path, f"it lacks {', '.join(missing)}")
    return _compiled(source.path, _chosen(source, wanted, given))


def _chosen(source: Source, wanted: tuple[str, ...], given: frozenset[str]) -> list[ast.stmt]:
    """What defines the names that are wanted and all that they use, in the file's order."""
    defined = _definitions(source)
    chosen: dict[str, ast.stmt] = {}
    waiting = [name for name in wanted if name in defined]
    while waiting:
        name = waiting.pop()
        if name in chosen:
            continue
        chosen[name] = defined[name]
        for used in sorted(_free_names(defined[name]) - given - BUILTINS):
            if used not in defined:
                raise UnknownFormError(source.path, f"{name} uses {used}")
            waiting.append(used)
    return sorted({id(node): node for node in chosen.values()}.values(), key=lambda node: node.lineno)


def cut_slice(source: Source, callee: str, constant: str, given: Iterable[str]) -> Slice:
    """The statements that lead to a call, and those after it that handle a key, of whichever function makes the call.

    Args:
        callee: the function that is called, outright or through `functools.partial`.
        constant: a text; statements after the call that hold it are part of the slice ("USE_TMA").
        given: names that the namespace will have.

    Raises:
        UnknownFormError: nothing in the file calls it in a form that is known.
    """
    return _cut_slice(source.sha256, source, callee, constant, frozenset(given))


@lru_cache(maxsize=64)
def _cut_slice(_: str, source: Source, callee: str, constant: str, given: frozenset[str]) -> Slice:
    for function in parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name != callee:
            body = [node for node in function.body if isinstance(node, _SIMPLE)]
            place = _call_in(body, callee)
            if place is not None:
                return _slice(source, function, body, place, constant, given)
    raise UnknownFormError(source.path, f"no function calls {callee} in a form that is known")


def _slice(
    source: Source,
    function: ast.FunctionDef,
    body: Sequence[ast.stmt],
    place: int,
    constant: str,
    given: frozenset[str],
) -> Slice:
    call = body[place]
    assert isinstance(call, ast.Assign)
    kept = {place, *(place + 1 + number for number, node in enumerate(body[place + 1 :]) if _holds(node, constant))}
    needed = set().union(*(_loaded(body[number]) for number in kept))
    for number in reversed(range(max(kept))):
        if number not in kept and _stored(body[number]) & needed:
            kept.add(number)
            needed |= _loaded(body[number])
    statements = [body[number] for number in sorted(kept)]
    arguments = function.args
    parameters = {each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    used = set().union(*map(_loaded, statements))
    stored = set().union(*map(_stored, statements))
    unknown = sorted(used - parameters - stored - given - BUILTINS)
    if unknown:
        raise UnknownFormError(source.path, f"{function.name} uses {', '.join(unknown)}")
    targets = tuple(node.id for target in call.targets for node in ast.walk(target) if isinstance(node, ast.Name))
    return Slice(_compiled(source.path, statements), function.name, frozenset(parameters & used), targets)


def _call_in(body: Sequence[ast.stmt], callee: str) -> int | None:
    """The place of the assignment of the call's result; a `partial` is followed to the statement that calls it."""
    names = {callee}
    for number, node in enumerate(body):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        called = node.value.func
        if isinstance(called, ast.Name) and called.id in names:
            return number
        first = node.value.args[:1]
        if first and isinstance(first[0], ast.Name) and first[0].id in names and isinstance(node.targets[0], ast.Name):
            names.add(node.targets[0].id)
    return None


@lru_cache(maxsize=4)
def parse(source: Source) -> ast.Module:
    """A file's syntax tree, read once; not to be changed.

    Raises:
        UnknownFormError: this Python cannot read it.
    """
    try:
        return ast.parse(source.text)
    except (SyntaxError, ValueError) as error:
        raise UnknownFormError(source.path, f"this Python cannot read it ({error})") from error


def _definitions(source: Source) -> Mapping[str, ast.stmt]:
    """What a file defines at its top level, by name: functions, and constants that are assigned once."""
    found: dict[str, ast.stmt] = {}
    for node in parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def _compiled(path: Path, statements: Iterable[ast.stmt]) -> CodeType:
    module = ast.Module(list(statements), [])
    code = compile(module, str(path), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    assert isinstance(code, CodeType)
    return code


# --- names -----------------------------------------------------------------------------------------------------------


def _walk(node: ast.AST) -> Iterable[ast.AST]:
    """All nodes below one, annotations left out."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in _FIELDS_LEFT_OUT:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _loaded(node: ast.AST) -> set[str]:
    return {each.id for each in _walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}


def _stored(node: ast.AST) -> set[str]:
    """The names that a statement assigns; what a comprehension binds is among them, which does no harm."""
    return {each.id for each in _walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}


def _free_names(node: ast.AST) -> set[str]:
    """The names that a definition takes from around it."""
    bound = _stored(node) if isinstance(node, ast.FunctionDef) else set()
    for each in _walk(node):
        if isinstance(each, ast.arg):
            bound.add(each.arg)
        elif isinstance(each, ast.FunctionDef):
            bound.add(each.name)
        elif isinstance(each, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in each.names}
        elif isinstance(each, ast.ExceptHandler) and each.name:
            bound.add(each.name)
    return _loaded(node) - bound


def _holds(node: ast.AST, constant: str) -> bool:
    return any(isinstance(each, ast.Constant) and each.value == constant for each in _walk(node))


def namespace(given: Mapping[str, Any]) -> dict[str, Any]:
    """A namespace for what was cut: the names given (`__import__` among them), and of Python only `BUILTINS`."""
    allowed = {name: getattr(builtins, name) for name in BUILTINS}
    return {"__builtins__": {**allowed, "__import__": given["__import__"]}, "__name__": "sglang", **given}
