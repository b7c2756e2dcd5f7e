"""The built-in list of well-known models, for plans without a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fixer.model.config_file import read_json

_CATALOGUE_FILE = Path(__file__).resolve().parents[1] / "data" / "catalogue.json"


@dataclass(frozen=True)
class CatalogueEntry:
    """A public model's geometry.

    Attributes:
        names: the hub id, then other names for it.
        config: the fields of its config.json that moefix needs.
        source: where the numbers come from.
    """

    names: tuple[str, ...]
    config: Mapping[str, Any]
    source: str


def catalogue() -> tuple[CatalogueEntry, ...]:
    """Every entry, in the file's order."""
    return tuple({id(entry): entry for entry in catalogue_by_name().values()}.values())


@lru_cache(maxsize=1)
def catalogue_by_name() -> Mapping[str, CatalogueEntry]:
    """The entries by name in lower case."""
    rows = read_json(_CATALOGUE_FILE)["models"]
    entries = [CatalogueEntry(tuple(row["names"]), row["config"], row["source"]) for row in rows]
    return {name.lower(): entry for entry in entries for name in entry.names}


def catalogued(name: str) -> CatalogueEntry | None:
    """The built-in entry of a model's name, in any case; None where there is none."""
    return catalogue_by_name().get(name.strip().lower())
