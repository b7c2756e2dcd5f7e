"""Where results are kept (`bench/` in the data folder), and how those of earlier versions are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from fixer.base.data_folder import DataFolder
from fixer.base.files import read_or_set_aside, write_atomically
from fixer.bench.results import SCHEMA, BenchResult, Kind, Verdict
from fixer.bench.verdict import judged, judged_whole

_LOAD_BY = ("", "token ids")
"""Of schema 1: "" for kernels. Another one (SGLang's own load tool) is worth a note."""


def read_result(content: str | bytes) -> BenchResult:
    """The result in a JSON text, of this version or an earlier one.

    What schema 1 concluded of servers is concluded anew from its passes: it called one start of each side enough.

    Raises:
        ValueError: it is none, or damaged.
    """
    body = _object_in(content)
    schema = body.get("schema")
    if schema == SCHEMA:
        return _result_from(body)
    if schema != 1 or isinstance(schema, bool):
        raise ValueError(f"its schema is not 1 or {SCHEMA}")
    try:
        result = _result_from(_from_schema_1(body))
    except (KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"it lacks a part: {fault}") from fault
    if result.kind is Kind.KERNEL or result.verdict is Verdict.CURED:
        return result
    return judged_whole(replace(result, serve=tuple(judged(load) for load in result.serve)))


def _object_in(content: str | bytes) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        ValueError: it is none.
    """
    try:
        body = msgspec.json.decode(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("it is not an object")
    return body


def _result_from(body: dict[str, Any]) -> BenchResult:
    """The result in such an object.

    Raises:
        ValueError: a part is not as `to_json` writes it; the text says which.
    """
    result = msgspec.convert(body, BenchResult)
    # By `asdict`: msgspec leaves out of an object, and of what it writes of it, what has its default.
    if msgspec.json.decode(msgspec.json.encode(asdict(result))) != body:
        raise ValueError("it lacks a part, or has an unknown part")
    return result


def _from_schema_1(body: dict[str, Any]) -> dict[str, Any]:
    client, ratio, margin = body["client"], body["ratio"], body["margin"]
    notes = [] if client in _LOAD_BY else ["the load came from " + client]
    return {
        **{name: value for name, value in body.items() if name not in ("client", "margin")},
        "schema": SCHEMA,
        "interval": None if ratio is None or margin is None else [ratio / (1 + margin), ratio * (1 + margin)],
        "serve": [
            {
                "load": load["load"],
                **load["arms"],
                **dict.fromkeys(("most", "ratio", "interval")),
                "same": False,
                "verdict": load["verdict"],
            }
            for load in body["serve"]
        ],
        "notes": body["notes"] + notes,
    }


def result_path(home: Path, result: BenchResult) -> Path:
    """Where a result is kept: bench/<artefact's stem>-<kind>-<UTC>.json."""
    stamp = result.created.replace("-", "").replace(":", "")
    return DataFolder(home).bench / f"{result.artefact.removesuffix('.json')}-{result.kind.value}-{stamp}.json"


def save_result(path: Path, result: BenchResult) -> None:
    """Write a result in one step, in place of an earlier state of it.

    Raises:
        StoreError: it cannot be written.
    """
    write_atomically(path, result.to_json().encode())


def results_for(home: Path, artefact: str) -> tuple[BenchResult, ...]:
    """The kept results for an artefact's file name, the newest first. A damaged one is moved aside and passed over."""
    return tuple(sorted(_results(home, artefact), key=lambda result: result.created, reverse=True))


def _results(home: Path, artefact: str) -> Iterator[BenchResult]:
    try:
        paths = [path for path in (DataFolder(home).bench).iterdir() if path.suffix == ".json"]
    except OSError:
        return
    for path in sorted(path for path in paths if path.name.startswith(artefact.removesuffix(".json") + "-")):
        result, _ = read_or_set_aside(path, read_result)
        if result is not None and result.artefact == artefact:
            yield result
