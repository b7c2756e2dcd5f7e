"""The card: SGLang's name for it, architecture, opt-in shared memory, memory.

A card comes from one of two places: the table in data/cards.json (`find_card`), or the driver (`visible_cards`).

The table's names are the CUDA driver's, its memory is what nvidia-smi shows. Jetson and GB10 share the machine's
memory, and nvidia-smi shows none: theirs is CUDA's total on a common configuration. SGLang takes its memory class from
that number and nothing else does, so a few MiB more or less, as between two driver releases, change nothing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources

from fixer.base.errors import CardError, UsageError

SHARED_MEMORY_BYTES = {
    (7, 0): 98304,
    (7, 5): 65536,
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 3): 232448,
    (11, 0): 232448,
    (12, 0): 101376,
    (12, 1): 101376,
}
"""Opt-in shared memory per block in bytes by compute capability: CUDA C++ Programming Guide, "Technical Specifications
per Compute Capability" (maximum per block, 1 KiB a block being CUDA's own). 10.3 and 11.0 are as 10.0 there."""

SMALLEST_LIMIT = 1024
"""`--smem-limit` under this is a slip of the hand (kilobytes for bytes): no kernel with a tile fits into it."""


@dataclass(frozen=True)
class Card:
    """One kind of card, from the table or read from the driver.

    Attributes:
        name: as the CUDA driver writes it ("NVIDIA GeForce RTX 4090").
        capability: compute capability, (major, minor).
        shared_memory: opt-in shared memory per block, in bytes.
        memory_mib: the card's memory as nvidia-smi reports it, in MiB.
        index: position among the visible devices; None for a card of the table.
        driver: the driver's version ("580.159.03"), "" for a card of the table.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int
    memory_mib: int
    index: int | None = None
    driver: str = ""

    @property
    def sglang_name(self) -> str:
        """The `device_name=` part of SGLang's file names: every blank becomes an underscore, nothing else changes."""
        return self.name.replace(" ", "_")

    @property
    def arch(self) -> int:
        """The architecture as Triton counts it: 89 for compute capability 8.9."""
        return self.capability[0] * 10 + self.capability[1]


# --- the table -------------------------------------------------------------------------------------------------------

_NOISE = ("nvidia", "geforce", "tesla", "rtx", "gpu", "generation", "edition")
"""Words that people leave out or add at will. No two cards of the table differ by these alone (a test holds that)."""


@dataclass(frozen=True)
class _Entry:
    card: Card
    keys: tuple[str, ...]


def _key(text: str) -> str:
    """What is left of a name when case, blanks, punctuation and noise words are gone: "4090", "4090d", "h100nvl"."""
    key = re.sub(r"[^a-z0-9]", "", text.lower())
    for word in _NOISE:
        key = key.replace(word, "")
    return key


@lru_cache(maxsize=1)
def _table() -> tuple[_Entry, ...]:
    text = resources.files("fixer").joinpath("data/cards.json").read_text("utf-8")
    entries = []
    for row in json.loads(text):
        major, minor = (int(part) for part in row["capability"].split("."))
        card = Card(row["name"], (major, minor), SHARED_MEMORY_BYTES[major, minor], row["memory_mib"])
        entries.append(_Entry(card, tuple(_key(name) for name in (row["name"], *row.get("aliases", ())))))
    return tuple(entries)


def known_cards() -> tuple[Card, ...]:
    """Every card of the table, in its order: consumer, workstation, data centre, system on a chip."""
    return tuple(entry.card for entry in _table())


def find_card(text: str) -> Card:
    """The card of the table that a person means by `text`.

    Case, blanks, punctuation and words such as "NVIDIA", "GeForce" and "RTX" do not matter; everything else does, so
    that "4090" is never the 4090 D or the laptop's. Where a short name is sold in several builds that ask for
    different files, the table has one of them under it: "A100" is A100-SXM4-80GB, "H100" is H100 80GB HBM3, "V100" is
    V100-SXM2-32GB, "GH200" the 96 GB one, "RTX PRO 6000" the Workstation Edition, "4060 Ti" and "5060 Ti" the 8 GB.

    Raises:
        CardError: no card, or more than one, goes by that name; the message lists the near ones.
    """
    key = _key(text)
    matches = [entry.card for entry in _table() if key and key in entry.keys] or _by_memory(text)
    if matches:
        return matches[0]
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    near = _near_cards(key)
    fault = f"no card called {shown} is known" + (f"; near it: {', '.join(near)}" if near else "")
    raise CardError(
        fault,
        "Name the card as nvidia-smi -L does. For a card that is not in the table, take one of the same compute "
        "capability and, if its shared memory is smaller, --smem-limit BYTES.",
    )


def _by_memory(text: str) -> list[Card]:
    """The cards of a name that ends in their memory ("RTX 4090 24GB"), which nvidia-smi shows a little less of."""
    named = re.fullmatch(r"(.*[^0-9])\(?([0-9]{1,4}) ?gi?b?\)?", text.strip().lower())
    if named is None:
        return []
    key, sold = _key(named[1]), int(named[2]) * 1024
    cards = [entry.card for entry in _table() if key and key in entry.keys]
    return [card for card in cards if 0.9 * sold <= card.memory_mib <= 1.05 * sold]


def _near_cards(key: str, most: int = 6) -> tuple[str, ...]:
    """Names that hold `key` ("6000" is in five cards' names), else names that are spelt nearly so."""
    if not key:
        return ()
    holding = [entry for entry in _table() if any(key in candidate for candidate in entry.keys)]
    if not holding:
        spellings = [candidate for entry in _table() for candidate in entry.keys]
        close = difflib.get_close_matches(key[:60], spellings, n=most, cutoff=0.6)
        holding = [entry for candidate in close for entry in _table() if candidate in entry.keys]
    return tuple(dict.fromkeys(entry.card.name for entry in holding))[:most]


# --- cards at large --------------------------------------------------------------------------------------------------


def with_shared_memory_limit(card: Card, limit_bytes: int) -> Card:
    """The card with less opt-in shared memory per block, for experiments (`--smem-limit`).

    Args:
        card: the card.
        limit_bytes: the new limit in bytes; only ever lower than the card's own.

    Raises:
        UsageError: the limit is above the card's own, or too small for any kernel.
    """
    if not SMALLEST_LIMIT <= limit_bytes <= card.shared_memory:
        raise UsageError(
            f"a shared memory limit of {limit_bytes} bytes makes no sense for {card.name}",
            f"Give --smem-limit in bytes, from {SMALLEST_LIMIT} to the card's own {card.shared_memory}.",
        )
    return replace(card, shared_memory=limit_bytes)


def kinds(cards: Sequence[Card]) -> tuple[tuple[Card, ...], ...]:
    """Group cards of one kind (name, capability, shared memory), in the order in which the kinds first come."""
    groups: dict[tuple[str, tuple[int, int], int], list[Card]] = {}
    for card in cards:
        groups.setdefault((card.name, card.capability, card.shared_memory), []).append(card)
    return tuple(tuple(group) for group in groups.values())
