"""The report as one HTML page that needs nothing else: no network, no file, no script to be read."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import fixer
from fixer.bench.passes import Latency
from fixer.bench.results import BenchResult, Kind, Side
from fixer.bench.words import cautions, change, headline, rate, span, verdict_words
from fixer.report import figures
from fixer.report.drawing import drawing
from fixer.report.evidence import Part
from fixer.report.search_course import course_of
from fixer.report.summary import Fate, Summary, microseconds, percent

if TYPE_CHECKING:
    from jinja2 import Environment

MARKS = {Fate.FASTER: "▲", Fate.KEPT: "○", Fate.CURED: "◆", Fate.UNJUDGED: "○", Fate.UNMEASURED: "\N{EN DASH}"}
"""A sign for each fate, so that colour is not all that tells them apart."""

_NOTHING = "\N{EN DASH}"


def render(summary: Summary, font_cache: Path) -> str:
    """The page as HTML.

    Args:
        summary: what it shows.
        font_cache: where matplotlib may keep what it knows of fonts.
    """
    artefact, evidence = summary.artefact, summary.evidence
    family = artefact.family
    course = (
        course_of(evidence.looks, [row.batch for row in artefact.rows], artefact.family.products)
        if evidence.looks
        else None
    )
    missing = {part.name: evidence.missing.get(part, "") for part in Part}
    if course is None and not missing["SEARCH"]:
        missing["SEARCH"] = "The journal does not have every row of this tuning, so its search is not shown."
    benches = [evidence.bench[kind] for kind in (Kind.SERVE, Kind.KERNEL) if kind in evidence.bench]
    with drawing(font_cache):
        gains = figures.gains(summary)
        drawn = {
            "gains": gains,
            "times": [one for quantity in figures.quantities(family) if (one := figures.times(summary, quantity))],
            "shared": figures.shared_memory(summary),
            "roofs": figures.roofs(summary),
            "search": figures.search(course) if course else None,
        }
        servers = [(result, figures.server(result)) for result in benches]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            artefact=artefact,
            family=family,
            environment=artefact.environment,
            figures=drawn,
            course=course,
            benches=servers,
            missing=missing,
            marks=MARKS,
            tiles=_tiles(summary),
            facts=_facts(summary),
            sections=_sections(benches),
            peak_compute=summary.peak.compute(family.number_format(artefact.workload)) if summary.peak else None,
            headline=headline,
            cautions=cautions,
            side=Side,
            moefix=fixer.__version__,
            style=_text("report.css"),
            script=_text("report.js"),
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Names of models and cards are whatever somebody typed: everything is escaped unless a line says otherwise.
    environment = Environment(
        loader=PackageLoader("fixer.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "percent": lambda value: _NOTHING if value is None else percent(value),
        "us": lambda value: _NOTHING if value is None else microseconds(value),
        "whole": lambda value: _NOTHING if value is None else str(value),
        "middle": _middle,
        "change": change,
        "span": span,
        "rate": rate,
        "verdict": verdict_words,
        "latency": _latency,
        "when": when,
        "whole_percents": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
        "capitalised": lambda text: text[:1].upper() + text[1:],
    }
    return environment


def _text(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _middle(values: Sequence[float]) -> str:
    return microseconds(statistics.median(values)) if values else _NOTHING


def _latency(latency: Latency | None) -> str:
    return _NOTHING if latency is None else f"{latency.median:.4g} ({latency.p99:.4g})"


def when(created: str) -> str:
    """A time as an artefact writes it, for a person: "24 November 2026, 00:47 UTC"."""
    time = datetime.strptime(created, "%Y-%m-%dT%H:%M:%SZ")
    return f"{time.day} {time:%B %Y, %H:%M} UTC"


def _tiles(summary: Summary) -> list[tuple[str, str, tuple[str, ...]]]:
    """The numbers beside the headline: name, value, what follows in small."""
    total = len(summary.rows)
    tiles: list[tuple[str, str, tuple[str, ...]]] = [("Rows faster", str(summary.count(Fate.FASTER)), (f"of {total}",))]
    if summary.count(Fate.CURED):
        tiles.append(("Rows that could not run", str(summary.count(Fate.CURED)), ("run now",)))
    if summary.best is not None:
        tiles.append(
            ("Largest gain", percent(summary.best.less or 0.0), (summary.best.bounds, f"at M = {summary.best.batch}"))
        )
    if summary.artefact.measured:
        slower = sum(1 for row in summary.rows if row.less is not None and row.less < 0)
        tiles.append(("Rows slower", str(slower), (f"of {total}",)))
        tiles.append(("Tuning took", f"{summary.artefact.seconds:.0f} s", ()))
    return tiles


def _sections(benches: Sequence[BenchResult]) -> list[tuple[str, str]]:
    """Identifier and name of each section, in the page's order."""
    names = {Kind.SERVE: "In the server", Kind.KERNEL: "Measured again"}
    return [
        ("time", "Time"),
        *((f"bench-{result.kind.value}", names[result.kind]) for result in benches),
        ("rows", "Rows"),
        ("shared", "Shared memory"),
        ("limits", "Limits"),
        ("search", "Search"),
        ("files", "Files"),
        ("environment", "Environment"),
        ("method", "How to read this"),
    ]


def _facts(summary: Summary) -> list[tuple[str, str, bool]]:
    """The environment's table: name, value, whether a change makes the measurement void."""
    artefact = summary.artefact
    environment = artefact.environment
    return [
        ("Card", environment.card, True),
        ("Compute capability", "{}.{}".format(*environment.capability), True),
        ("Shared memory limit", f"{environment.shared_memory} bytes a block", True),
        ("Driver", f"{environment.driver} (its major version counts)", True),
        ("SGLang", environment.sglang, True),
        ("Triton", environment.triton, True),
        ("Kernel source", environment.kernel_hash, True),
        ("moefix", environment.moefix, False),
        ("Model", summary.model, False),
        ("Revision", artefact.revision or "\N{EN DASH}", False),
        *((name, value, True) for name, value in artefact.family.facts(artefact.workload)),
        ("Tuned", f"{when(artefact.created)}, in {artefact.seconds:.1f} s", False),
    ]
