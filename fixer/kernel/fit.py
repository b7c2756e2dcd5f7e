"""Whether a tile fits a card's shared memory: the compiler's answer in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fixer.base.data_folder import DataFolder
from fixer.base.errors import CompileError
from fixer.kernel.cache import CompileCache, compile_with_cache, is_lasting
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome, Target
from fixer.kernel.source import read_kernel_source
from fixer.machine.cards import Card
from fixer.sglang.tree import Tree

CompileFunction = Callable[[Iterable[Candidate]], Mapping[Candidate, Compiled]]
"""Gives a result for each candidate."""


def compiler_for(tree: Tree, card: Card, home: Path, cache: CompileCache) -> CompileFunction:
    """A function that compiles SGLang's kernel for a card, asking the cache first.

    Args:
        tree: whose kernel.
        home: the data folder, for the cut-out kernel and Triton's own cache.
        cache: results of earlier plans.

    Raises:
        SGLangError: the tree has no kernel that moefix knows.
    """
    target = Target(read_kernel_source(tree.kernel_source), card.arch, DataFolder(home).kernels, card.name)

    def compile_candidates(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
        return compile_with_cache(target, candidates, cache, DataFolder(home).triton)

    return compile_candidates


def complaint(compiled: Compiled, card: Card) -> str:
    """One line on a tile that does not run on a card: bytes needed and had, or the compiler's own words."""
    if compiled.outcome is not CompileOutcome.OK and not is_lasting(compiled):
        raise CompileError(f"The compiler cannot be used here: {compiled.message or compiled.outcome.value}.")
    if compiled.outcome is not CompileOutcome.OK:
        return f"does not compile for this card: {compiled.message or compiled.outcome.value}"
    if compiled.shared_bytes > card.shared_memory:
        return f"needs {compiled.shared_bytes} bytes of shared memory a block, and the card has {card.shared_memory}"
    return ""
