"""Reads the server's flags off SGLang's source, by syntax tree: nothing of SGLang is imported or run.

Two forms are known. Up to 0.5.16 `ServerArgs.add_cli_args` is a list of `parser.add_argument(...)` calls. From 0.5.17
on most flags are annotated fields, `name: A[type, Arg(aliases=[...])] = default`, of `ServerArgs` itself or (0.5.22
and newer) of the classes in `srt/arg_groups/fields/`; srt/arg_groups/arg_utils.py:add_cli_args_from_dataclass (0.5.17)
says how a field becomes a flag. What cannot be worked out (choices that are computed) is left open, so that nothing is
refused that SGLang would take.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fixer.sglang.flag import Flag, Plain, flag_files

_ARITHMETIC = MappingProxyType({ast.Add: operator.add, ast.Mult: operator.mul, ast.LShift: operator.lshift})

_CHANGES = frozenset({"add", "append", "extend", "update", "insert"})
"""Methods that change a list of choices after it was written down."""


class _UnreadableError(Exception):
    """A value that is computed when SGLang runs."""


def read_flags(srt: Path) -> tuple[Flag, ...]:
    """The flags of a tree, in the order in which SGLang adds them.

    Args:
        srt: the folder `sglang/srt`.

    Raises:
        OSError, SyntaxError, ValueError: the source cannot be read, or has neither of the two forms.
    """
    modules = {path: ast.parse(path.read_bytes()) for path in flag_files(srt)}
    server_args = modules[srt / "server_args.py"]
    names = _Names(modules.values())
    method = next(
        (
            node
            for node in ast.walk(server_args)
            if isinstance(node, ast.FunctionDef) and node.name == "add_cli_args" and node.args.args
        ),
        None,
    )
    if method is None:
        raise ValueError("srt/server_args.py has no add_cli_args")
    annotated = bool(_calls(method, "add_cli_args_from_dataclass"))
    if annotated and len(modules) == 1:
        raise ValueError("srt/arg_groups, which declares flags and their actions, is missing")
    flags = [*_from_fields(modules.values(), names)] if annotated else []
    flags += [flag for call in _calls(method, "add_argument") if (flag := _from_call(call, names)) is not None]
    if not any("--model-path" in flag.spellings for flag in flags):
        raise ValueError("srt/server_args.py declares no --model-path in a form that moefix knows")
    return tuple(flags)


# --- values ----------------------------------------------------------------------------------------------------------


class _Names:
    """Constants of the modules, defaults of the classes' fields, and of the arguments of the classes' `__init__`.

    A constant that a module changes again is left out: what it holds depends on where SGLang runs.
    """

    def __init__(self, modules: Iterable[ast.Module]) -> None:
        self.constants: dict[str, Plain] = {}
        self.fields: dict[str, Plain] = {}
        self.arguments: dict[tuple[str, str], Plain] = {}
        for module in modules:
            for node in module.body:
                self._see(node)
            for name in _changed(module):
                self.constants.pop(name, None)

    def _see(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            self._keep(self.constants, node.targets[0].id, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            self._keep(self.constants, node.target.id, node.value)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name) and inner.value is not None:
                    self._keep(self.fields, inner.target.id, inner.value)
                elif isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    self._see_init(node.name, inner)

    def _keep(self, into: dict[str, Plain], name: str, value: ast.expr) -> None:
        try:
            into[name] = self.value(value)
        except _UnreadableError:
            into.pop(name, None)

    def _see_init(self, name: str, init: ast.FunctionDef) -> None:
        given = init.args.args[len(init.args.args) - len(init.args.defaults) :]
        for argument, default in zip(given, init.args.defaults, strict=True):
            self.arguments[name, argument.arg] = self.value_or_none(default)

    def value(self, node: ast.expr) -> Plain:
        """What an expression is worth.

        Raises:
            _UnreadableError: it is computed when SGLang runs.
        """
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
            return node.value
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.constants[node.id]
        if isinstance(node, ast.Attribute) and _name(node.value) == "ServerArgs" and node.attr in self.fields:
            return self.fields[node.attr]
        if isinstance(node, ast.BinOp):
            return self._sum(node)
        return self._called(node)

    def _sum(self, node: ast.BinOp) -> Plain:
        left, right = self.value(node.left), self.value(node.right)
        compute = _ARITHMETIC.get(type(node.op))
        if compute is None or type(left) is not type(right) or not isinstance(left, int | list):
            raise _UnreadableError
        try:
            result: Plain = compute(left, right)
        except TypeError:
            raise _UnreadableError from None
        return result

    def _called(self, node: ast.expr) -> Plain:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand)
        if not isinstance(node, ast.Call):
            raise _UnreadableError
        name = _name(node.func)
        if name in {"list", "sorted", "set"} and len(node.args) == 1:
            return self.value(node.args[0])
        if name == "_declared_default" and str(self.value(node.args[0])) in self.fields:
            return self.fields[str(self.value(node.args[0]))]
        if [_name(word.value) for word in node.keywords] == ["list"]:
            return []  # field(default_factory=list)
        raise _UnreadableError

    def _number(self, node: ast.expr) -> int | float:
        value = self.value(node)
        if not isinstance(value, (int, float)):
            raise _UnreadableError
        return value

    def value_or_none(self, node: ast.expr | None) -> Plain:
        """The same, None for what cannot be read or is not there."""
        if node is None:
            return None
        try:
            return self.value(node)
        except _UnreadableError:
            return None

    def texts(self, node: ast.expr | None) -> tuple[str, ...]:
        """A list of texts, () for anything else."""
        value = self.value_or_none(node)
        return tuple(map(str, value)) if isinstance(value, list) else ()

    def choices(self, node: ast.expr | None) -> tuple[Plain, ...] | None:
        """A list of choices, None where there is none that can be read."""
        value = self.value_or_none(node)
        return tuple(value) if isinstance(value, list) and value else None


def _changed(module: ast.Module) -> set[str]:
    """Names of lists that a module changes outside of its functions and classes."""
    outside = [node for node in module.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    calls = [call for node in outside for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {
        _name(call.func.value) for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in _CHANGES
    }


def _name(node: ast.expr | None) -> str:
    """The last part of a dotted name, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _calls(node: ast.AST, name: str) -> list[ast.Call]:
    found = [call for call in ast.walk(node) if isinstance(call, ast.Call) and _name(call.func) == name]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


# --- parser.add_argument(...) ----------------------------------------------------------------------------------------


def _from_call(call: ast.Call, names: _Names) -> Flag | None:
    """The flag of one call; None for one that adds no option."""
    spellings = tuple(text for node in call.args if isinstance(text := names.value_or_none(node), str))
    if not spellings or not spellings[0].startswith("-"):
        return None
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    dest = names.value_or_none(given.get("dest"))
    return Flag(
        spellings=spellings,
        dest=dest if isinstance(dest, str) else _dest(spellings),
        **_how(given, names),
        choices=names.choices(given.get("choices")),
        const=names.value_or_none(given.get("const_value") or given.get("const")),
    )


def _how(given: Mapping[str, ast.expr], names: _Names) -> dict[str, Any]:
    """Action, type, number of values and default of a flag."""
    node = given.get("action")
    action = str(names.value_or_none(node) if isinstance(node, ast.Constant) else _name(node) or "store")
    unset = False if action == "store_true" else names.arguments.get((action, "default"))
    return {
        "action": action,
        "type": _name(given.get("type")) or "str",
        "nargs": names.value_or_none(given["nargs"]) if "nargs" in given else names.arguments.get((action, "nargs")),
        "default": names.value_or_none(given["default"]) if "default" in given else unset,
    }


def _dest(spellings: tuple[str, ...]) -> str:
    """What argparse calls the field where it is not told: the first long name."""
    first = next((spelling for spelling in spellings if spelling.startswith("--")), spellings[0])
    return first.lstrip("-").replace("-", "_")


# --- name: A[type, Arg(...)] = default -------------------------------------------------------------------------------


def _from_fields(modules: Iterable[ast.Module], names: _Names) -> Iterator[Flag]:
    """The flags of annotated fields, of `ServerArgs` or of classes that name their part of the configuration."""
    for module in modules:
        for node in module.body:
            if isinstance(node, ast.ClassDef) and (node.name == "ServerArgs" or _is_namespace(node)):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        flag = _from_field(field.target.id, field.annotation, field.value, names)
                        if flag is not None:
                            yield flag


def _is_namespace(node: ast.ClassDef) -> bool:
    return any(
        isinstance(inner, ast.Assign) and _name(inner.targets[0]) == "_NS_PATH"
        for inner in node.body
        if isinstance(inner, ast.Assign)
    )


def _from_field(name: str, annotation: ast.expr, default: ast.expr | None, names: _Names) -> Flag | None:
    """The flag of one field; None for a field that the command line does not set."""
    if not isinstance(annotation, ast.Subscript) or _name(annotation.value) not in {"A", "Annotated"}:
        return None
    kind, *extras = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    extra = next((each for each in extras if _is_text(each) or _is_arg(each)), None)
    if extra is None:
        return None
    given = {word.arg: word.value for word in extra.keywords if word.arg} if isinstance(extra, ast.Call) else {}
    if names.value_or_none(given.get("no_cli")) is True:
        return None
    named = names.value_or_none(given.get("cli_name"))
    spellings = (str(named) if named else "--" + name.replace("_", "-"), *names.texts(given.get("aliases")))
    if "action" in given:
        extra_words = given.get("action_kwargs")
        if isinstance(extra_words, ast.Dict):
            pairs = zip(extra_words.keys, extra_words.values, strict=True)
            given |= {str(names.value_or_none(key)): value for key, value in pairs if key is not None}
        return Flag(spellings, name, **_how(given if default is None else given | {"default": default}, names))
    return Flag(
        spellings,
        name,
        **_by_type(kind, given, names),
        default=names.value_or_none(default),
        const=names.value_or_none(given.get("const")),
    )


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, (ast.Constant, ast.JoinedStr)) or (isinstance(node, ast.BinOp) and _is_text(node.left))


def _is_arg(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) == "Arg"


def _by_type(kind: ast.expr, given: Mapping[str, ast.expr], names: _Names) -> dict[str, Any]:
    """Action, type, number of values and choices of a field without an action of its own."""
    inner = _without_none(kind)
    parser, choices = _name(given.get("type_parser")), names.choices(given.get("choices"))
    nargs = names.value_or_none(given.get("nargs"))
    outer = _name(inner.value) if isinstance(inner, ast.Subscript) else ""
    if isinstance(inner, ast.Subscript) and outer == "Literal":
        literals = names.choices(inner.slice if isinstance(inner.slice, ast.Tuple) else ast.Tuple([inner.slice]))
        kind_of = type(literals[0]).__name__ if literals and literals[0] is not None else "str"
        return {"type": parser or kind_of, "choices": choices if "choices" in given else literals}
    if isinstance(inner, ast.Subscript) and outer in {"list", "List"} and not parser:
        return {"type": _scalar(inner.slice), "nargs": nargs or "+", "choices": choices}
    if _name(inner) == "bool":
        return {"action": "store_true"}
    return {"type": parser or _scalar(inner), "nargs": nargs, "choices": choices}


def _scalar(node: ast.expr) -> str:
    return _name(node) if _name(node) in {"str", "int", "float"} else "str"


def _without_none(node: ast.expr) -> ast.expr:
    """The type X of `Optional[X]`, `Union[X, None]` or `X | None`; any other as it is."""
    if isinstance(node, ast.Subscript) and _name(node.value) == "Optional":
        return node.slice
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        parts = [node.left, node.right]
    elif isinstance(node, ast.Subscript) and _name(node.value) == "Union" and isinstance(node.slice, ast.Tuple):
        parts = list(node.slice.elts)
    else:
        return node
    kept = [part for part in parts if not (isinstance(part, ast.Constant) and part.value is None)]
    return kept[0] if len(kept) == 1 and len(kept) < len(parts) else node
