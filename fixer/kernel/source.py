"""Cut the kernels out of SGLang's source file, with every other line left blank."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fixer.base.errors import CompileError, SGLangError
from fixer.base.files import write_atomically
from fixer.sglang.cut import Source, UnknownFormError, cut_text, parse
from fixer.sglang.stand_ins import CARD_NAMES

KERNELS = ("fused_moe_kernel", "fused_moe_kernel_gptq_awq")

SWAP_RULE = "should_enable_swap_ab"
"""SGLang's function of BLOCK_SIZE_M and BLOCK_SIZE_N that says whether an FP8 launch swaps its operands (0.5.8)."""


@dataclass(frozen=True)
class KernelSource:
    """SGLang's kernels, cut out of their file.

    Attributes:
        path: the file they come from.
        text: the file with all but the kernels blanked out, line numbers kept.
        sha256: of `text`; what was measured with another text does not count.
        swap_rule: SGLang's own function that says when a launch swaps its operands, "" in releases that never do.
    """

    path: Path
    text: str
    sha256: str
    swap_rule: str = ""


def read_kernel_source(path: Path, names: Sequence[str] = KERNELS) -> KernelSource:
    """Cut the kernels and the `@triton.jit` functions they call out of a file of SGLang.

    Args:
        names: the kernels; the first one must be there.

    Raises:
        SGLangError: the file cannot be read or lacks the kernel.
    """
    source = Source.read(path)
    functions = {node.name: node for node in parse(source).body if isinstance(node, ast.FunctionDef)}
    jitted = {name: node for name, node in functions.items() if _is_jitted(node)}
    wanted = {name for name in names if name in jitted}
    if names[0] not in wanted:
        raise SGLangError(f"{path} has no @triton.jit function {names[0]}.")
    while True:  # the functions that they call, and those that these call
        called = {name.id for kernel in wanted for name in ast.walk(jitted[kernel]) if isinstance(name, ast.Name)}
        found = wanted | (called & jitted.keys())
        if found == wanted:
            break
        wanted = found
    text = _blank_all_but(source.text.splitlines(), [jitted[name] for name in wanted])
    rule = cut_text(source, (SWAP_RULE,), CARD_NAMES)
    if not rule and "swap_ab" in {argument.arg for argument in jitted[names[0]].args.args}:
        raise UnknownFormError(path, f"its kernel takes swap_ab, and it lacks {SWAP_RULE}")
    return KernelSource(path, text, hashlib.sha256(text.encode()).hexdigest(), rule)


def _is_jitted(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def _blank_all_but(lines: list[str], functions: list[ast.FunctionDef]) -> str:
    keep = {
        number
        for function in functions
        for number in range(function.decorator_list[0].lineno, (function.end_lineno or function.lineno) + 1)
    }
    kept = [line if number in keep else "" for number, line in enumerate(lines, start=1)]
    if kept[0]:
        raise SGLangError("SGLang's kernel starts on the first line of its file; there is no room for the imports.")
    kept[0] = "import triton; import triton.language as tl"
    return "\n".join(kept).rstrip() + "\n"


@lru_cache(maxsize=4)
def load_kernels(source: KernelSource, folder: Path) -> Any:
    """Import the cut-out kernels as a module; its file is kept in `folder`, since Triton reads sources from files."""
    path = folder / f"sglang_kernels_{source.sha256[:16]}.py"
    # A copy that somebody changed is worth nothing: it is written anew.
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
        write_atomically(path, source.text.encode())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CompileError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
