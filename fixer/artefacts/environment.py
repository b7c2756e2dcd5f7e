"""The environment that an artefact holds for: card, driver, SGLang, Triton, kernel."""

from __future__ import annotations

from dataclasses import replace

from fixer import __version__
from fixer.artefacts.artefact import Environment
from fixer.families.family import Family
from fixer.families.registry import UNNAMED
from fixer.kernel.source import read_kernel_source
from fixer.machine.cards import Card, known_cards
from fixer.sglang.tree import Tree


def environment_of(tree: Tree, card: Card, family: Family = UNNAMED) -> Environment:
    """Everything that makes an artefact of a family hold or not."""
    return Environment(
        card=card.name,
        capability=card.capability,
        shared_memory=card.shared_memory,
        driver=card.driver,
        triton=tree.triton,
        sglang=tree.version,
        kernel_hash=read_kernel_source(family.kernel_source(tree), family.kernel_names).sha256,
        moefix=__version__,
    )


def card_of(environment: Environment) -> Card:
    """The card that an artefact says it is for, with no more shared memory than such a card is known to have."""
    named = Card(environment.card, environment.capability, environment.shared_memory, 0)
    known = next((card for card in known_cards() if card.name == environment.card), None)
    if known is None:
        return named
    return replace(known, shared_memory=min(known.shared_memory, environment.shared_memory))
