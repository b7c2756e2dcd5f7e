"""The data folder: what moefix keeps from one start to the next, and how it is written so that no fault harms it.

Everything is written to a temporary file beside its place and moved there in one step, so that a reader finds the old
content or the new, never half. What is found damaged is moved aside under a name that says so: it is reported, not
used, not deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fixer.artefacts.artefact import Artefact, Environment
from fixer.base.data_folder import DataFolder
from fixer.base.files import Damaged, read_or_set_aside, safe_name, write_atomically
from fixer.base.json_reading import plain_json
from fixer.families.registry import UNNAMED, family_of
from fixer.workload import AnyWorkload, Tile


@dataclass(frozen=True)
class Mismatch:
    """An artefact for the same workload that does not hold here.

    Attributes:
        path: the artefact.
        parts: which parts differ: "Triton", "driver".
        reasons: the same as phrases: "Triton was 3.5.1, is 3.6.0".
    """

    path: Path
    parts: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The answer of `find_artefact`.

    Attributes:
        artefact: the one that holds here, or None.
        mismatch: where there is none, the nearest one of the same workload, if any.
        damaged: files that could not be used, for the caller to report.
        path: where the artefact is.
    """

    artefact: Artefact | None
    mismatch: Mismatch | None
    damaged: tuple[Damaged, ...]
    path: Path | None = field(default=None, compare=False)


def artefact_path(home: Path, environment: Environment, workload: AnyWorkload) -> Path:
    """Where the artefact for that environment and workload is: artefacts/<card>/<label>-<hash of all that counts>."""
    family = family_of(workload)
    # The first family is left out: artefacts of earlier versions, which had one only, stay where they are.
    named = [] if family is UNNAMED else [family.name]
    key = json.dumps([environment.counting_parts(), asdict(workload), *named], default=plain_json, sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    shape = family.label(workload)
    return DataFolder(home).artefacts / safe_name(environment.card.replace(" ", "_")) / f"{shape}-{digest}.json"


def save_artefact(home: Path, artefact: Artefact) -> Path:
    """Keep an artefact, in place of an older one for the same environment and workload.

    Returns:
        Where it is.

    Raises:
        StoreError: it cannot be written; an older one is untouched.
    """
    path = artefact_path(home, artefact.environment, artefact.workload)
    write_atomically(path, artefact.to_json().encode())
    return path


def find_artefact(
    home: Path, environment: Environment, workload: AnyWorkload, *, without: Container[Path] = ()
) -> Found:
    """The kept artefact for this environment and workload, whatever state the folder is in. Never raises for a file.

    A damaged file is moved aside and reported. One that was not measured holds for any driver: nothing ran on one.

    Args:
        without: files to pass over.
    """
    path = artefact_path(home, environment, workload)
    artefact, damaged = _load(path) if path not in without else (None, None)
    reports = [damaged] if damaged else []
    if artefact and artefact.workload == workload and not artefact.environment.difference(environment):
        return Found(artefact, None, (), path)
    near: list[Mismatch] = []
    for other_path in _artefact_files(home):
        if other_path in without:
            continue
        other, damaged = _load(other_path)
        if damaged:
            reports.append(damaged)
        if other and other.workload == workload:
            was = other.environment if other.measured else replace(other.environment, driver=environment.driver)
            parts = was.difference(environment)
            near.append(Mismatch(other_path, parts, was.explain(environment)))
            if not parts:
                return Found(other, None, tuple(dict.fromkeys(reports)), other_path)
    return Found(None, min(near, key=lambda mismatch: len(mismatch.parts), default=None), tuple(dict.fromkeys(reports)))


def earlier_tiles(home: Path, workload: AnyWorkload, most: int = 24) -> tuple[Tile, ...]:
    """What earlier tunings on this volume chose for related workloads, the most frequent first.

    Whatever they were measured with: as something to try, a winner of another card, shape or Triton is good enough.
    """
    family = family_of(workload)
    wins: Counter[Tile] = Counter()
    for path in _artefact_files(home):
        artefact, _ = _load(path)
        if artefact is None or not artefact.measured:
            continue
        if artefact.family is family and family.is_related(workload, artefact.workload):
            wins.update(tile for row in artefact.rows for tile in row.tiles.tiles if not tile.use_tma)
    return tuple(tile for tile, _ in wins.most_common(most))


def kept_artefacts(home: Path) -> tuple[tuple[tuple[Path, Artefact], ...], tuple[Damaged, ...]]:
    """Every artefact in the data folder that can be read, the newest first; and what was damaged, moved aside."""
    loaded = [(path, *_load(path)) for path in _artefact_files(home)]
    usable = [(path, artefact) for path, artefact, _ in loaded if artefact is not None]
    usable.sort(key=lambda entry: entry[1].created, reverse=True)
    return tuple(usable), tuple(damaged for _, _, damaged in loaded if damaged)


def _artefact_files(home: Path) -> tuple[Path, ...]:
    try:
        return tuple(sorted((DataFolder(home).artefacts).glob("*/*.json")))
    except OSError:
        return ()


def _load(path: Path) -> tuple[Artefact | None, Damaged | None]:
    return read_or_set_aside(path, Artefact.from_json)


# --- one at a time ---------------------------------------------------------------------------------------------------
