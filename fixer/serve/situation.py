"""What `tune` and `serve` start from: the model, the cards, SGLang's tree, and what SGLang does with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fixer.base.data_folder import DataFolder
from fixer.base.errors import CardError, SGLangError
from fixer.machine.cards import Card, kinds, with_shared_memory_limit
from fixer.machine.driver import visible_cards
from fixer.model.config import Model, load_model
from fixer.model.rules.case import Decision, Outcome
from fixer.model.rules.decide import decide
from fixer.model.rules.ladder import ladder
from fixer.sglang.declared import declared_of
from fixer.sglang.find_tree import find_tree
from fixer.sglang.flags import ServerFlags, parse_flags
from fixer.sglang.tree import Tree
from fixer.workload import Workload

TUNABLE = (Outcome.ASKS, Outcome.UNCERTAIN)
"""Outcomes with which SGLang reads a tuning file and gets past it."""


@dataclass(frozen=True)
class OnCard:
    """One kind of card in this machine, and what SGLang does with the model on it.

    Attributes:
        cards: the visible cards of that kind, one or more.
        decision: which kernel SGLang runs on them, and for which layer.
    """

    cards: tuple[Card, ...]
    decision: Decision

    @property
    def card(self) -> Card:
        """The kind of card: its first one."""
        return self.cards[0]

    @property
    def is_tunable(self) -> bool:
        """Whether SGLang reads a tuning file here, for a layer that is known, and gets past it."""
        return self.decision.outcome in TUNABLE and self.decision.workload is not None

    @property
    def workload(self) -> Workload:
        """The layer on one shard, of a kind that is tunable.

        Raises:
            SGLangError: there is none; the message has the decision's reason.
        """
        if self.decision.workload is None:
            raise SGLangError(f"There is nothing to tune: {self.decision.reason}.".replace("..", "."))
        return self.decision.workload


@dataclass(frozen=True)
class Situation:
    """One model on this machine.

    Attributes:
        model: its geometry.
        flags: the user's SGLang flags.
        tree: the SGLang that will serve.
        kinds: the kinds of cards, each with what SGLang does on it; SGLang names its files after the first.
    """

    model: Model
    flags: ServerFlags
    tree: Tree
    kinds: tuple[OnCard, ...]

    @property
    def first(self) -> OnCard:
        """The kind of the first card."""
        return self.kinds[0]

    def rows(self, on: OnCard) -> tuple[int, ...]:
        """The batch sizes M that a server on that kind of card needs rows for."""
        return ladder(self.flags, on.card, self.tree.release, on.workload)


def look_around(
    argv: Sequence[str], *, home: Path, sglang_root: Path | None = None, smem_limit: int | None = None
) -> Situation:
    """Find out everything that needs no measuring. Imports neither PyTorch nor Triton nor SGLang.

    Args:
        argv: the user's SGLang flags, the model among them.
        home: the data folder.
        sglang_root: a tree to use instead of the installed one.
        smem_limit: a lower limit of shared memory per block, in bytes.

    Raises:
        MoefixError: no card, no SGLang, no such model, flags that contradict one another.
    """
    tree = find_tree(str(sglang_root) if sglang_root else None, None, DataFolder(home).cache, fetch=False)
    declared = declared_of(tree, home)
    flags = parse_flags(argv, declared)
    model = load_model("", flags)
    cards = visible_cards()
    if not cards:
        raise CardError(
            "No NVIDIA card is visible here.",
            "In Docker, start with --gpus all; to plan without a card: moefix plan --gpu NAME.",
        )
    if smem_limit is not None:
        cards = tuple(with_shared_memory_limit(card, smem_limit) for card in cards)
    by_kind = (OnCard(group, decide(model, flags, group[0], tree.release, declared)) for group in kinds(cards))
    return Situation(model, flags, tree, tuple(by_kind))
