"""The report's plots: drawn by matplotlib, inlined as SVG whose colours are the page's CSS variables.

Both sides of a comparison differ in marker and line as well as in colour, and each plot says in words what it shows.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fixer.bench_results import BenchResult, ServeLoad
from fixer.report.search_course import Course
from fixer.report.summary import Fate, Row, Summary, percent
from fixer.tuning.duel import CONFIDENCE

# Stand-ins that matplotlib can draw with; `_themed` puts the page's variables in their places.
INK, MUTED, GRID, OWN, TUNED, LIMIT, THIRD = (f"#00000{number}" for number in range(1, 8))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", OWN: "own", TUNED: "tuned", LIMIT: "limit", THIRD: "third"}

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moefix",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that text is measured alike everywhere
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.borderaxespad": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.constrained_layout.use": True,
}
_OWN_LINE = {"color": OWN, "linestyle": (0, (4, 2)), "marker": "o", "markerfacecolor": "none", "linewidth": 1.4}
_TUNED_LINE = {"color": TUNED, "marker": "s"}


@dataclass(frozen=True)
class Figure:
    """A plot: its markup, its title, which the markup has too, and a word more for those who see it."""

    svg: str
    title: str
    note: str = ""


@dataclass(frozen=True)
class _Frame:
    """What is put around a drawing. `name` keeps the identifiers of several plots on one page apart."""

    name: str
    title: str
    description: str
    note: str = ""
    width: float = 6.4
    height: float = 3.0


@contextlib.contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Have matplotlib here, with its font cache in `folder` where the user has not set another place for it."""
    before = os.environ.get("MPLCONFIGDIR")
    os.environ.setdefault("MPLCONFIGDIR", str(folder))
    try:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            yield
    finally:
        # The server that this process may become must not find it.
        if before is None:
            os.environ.pop("MPLCONFIGDIR", None)


def _draw(frame: _Frame, paint: Callable[[Any], None]) -> Figure:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(frame.width, frame.height))
    paint(canvas)
    text = io.StringIO()
    canvas.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    return Figure(_themed(text.getvalue(), frame), frame.title, frame.note)


def _themed(text: str, frame: _Frame) -> str:
    """The drawing for inlining: the page's colours and font, identifiers of its own, a title and a description."""
    root = ElementTree.fromstring(text)  # noqa: S314 (matplotlib wrote it a moment ago)
    for style in [(parent, child) for parent in root.iter() for child in parent if child.tag == f"{{{_SVG}}}style"]:
        style[0].remove(style[1])  # it would hold for the whole page
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        _rename(element, frame.name)
        if "style" in element.attrib:
            element.set("style", _page_style(element.get("style", "")))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{frame.name}-title {frame.name}-desc")
    for place, (tag, words) in enumerate((("title", frame.title), ("desc", frame.description))):
        element = ElementTree.Element(tag, {"id": f"{frame.name}-{tag}"})
        element.text = words
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _rename(element: ElementTree.Element, prefix: str) -> None:
    if "id" in element.attrib:
        element.set("id", f"{prefix}-{element.get('id')}")
    if _LINK in element.attrib:
        element.set("href", f"#{prefix}-{element.attrib.pop(_LINK).removeprefix('#')}")
    if "clip-path" in element.attrib:
        element.set("clip-path", element.get("clip-path", "").replace("url(#", f"url(#{prefix}-"))


def _page_style(style: str) -> str:
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var(--{variable})")
    return style


# --- axes ------------------------------------------------------------------------------------------------------------


def _row_axis(axes: Any, batches: Sequence[int], inches: float) -> None:
    """M along the bottom, one place a row; from the right, every one is named that has room."""
    axes.set_xlim(-0.7, len(batches) - 0.3)
    axes.set_xlabel("M, tokens in a forward")
    pitch = 72 * inches / (len(batches) + 0.4)
    places: list[int] = []
    for place in reversed(range(len(batches))):
        digits = len(str(batches[place])) + len(str(batches[places[-1]])) if places else 0
        if not places or pitch * (places[-1] - place) >= 2.9 * digits + 3:
            places.append(place)
    axes.set_xticks(places, [str(batches[place]) for place in places], size=9.2)


def _legend(axes: Any, columns: int, **more: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, columnspacing=1.4, **more)


def _percents(axes: Any, name: str = "y") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def _plain_log(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


# --- the plots -------------------------------------------------------------------------------------------------------


def gains(summary: Summary) -> Figure | None:
    """Time saved at each row, with its noise; None where no row is faster."""
    rows = summary.rows
    if not summary.count(Fate.FASTER):
        return None
    best = summary.best
    frame = _Frame(
        "plot-gains",
        "Time saved at each batch size",
        f"Bars for {summary.count(Fate.FASTER)} of {len(rows)} batch sizes that take less time than with SGLang's own "
        f"configuration{f', at most {percent(best.less or 0)} at M = {best.batch}' if best else ''}. Circles at zero "
        "are rows that keep SGLang's own. The whiskers are three standard errors.",
        note="The whiskers are three standard errors.",
        height=3.3,
    )

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        faster = [(place, row) for place, row in enumerate(rows) if row.fate is Fate.FASTER and row.less is not None]
        values = [100 * (row.less or 0) for _, row in faster]
        noise = [100 * CONFIDENCE * (row.choice.noise or 0) for _, row in faster]
        places = [place for place, _ in faster]
        axes.bar(places, values, 0.62, color=TUNED, label="faster")
        axes.errorbar(places, values, yerr=noise, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5)
        for place, value, spread in zip(places, values, noise, strict=True):
            axes.annotate(
                f"{value:.1f}", (place, value + spread), xytext=(0, 3), textcoords="offset points", ha="center", size=9
            )
        kept = [place for place, row in enumerate(rows) if row.fate in (Fate.KEPT, Fate.UNJUDGED)]
        if kept:
            style = {"markerfacecolor": "none", "markeredgecolor": OWN, "markeredgewidth": 1.6, "clip_on": False}
            axes.plot(kept, [0] * len(kept), "o", label="SGLang's own kept", **style)
        cured = [place for place, row in enumerate(rows) if row.fate is Fate.CURED]
        if cured:
            axes.plot(cured, [0] * len(cured), "D", color=THIRD, label="SGLang's own does not run", clip_on=False)
        top = max([5.0, *(1.18 * (value + spread) for value, spread in zip(values, noise, strict=True))])
        axes.set_ylim(-0.035 * top, top)
        axes.axhline(0, color=MUTED, linewidth=1)
        _percents(axes)
        _row_axis(axes, [row.batch for row in rows], 5.7)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda place: labels[place] != "faster")
        _legend(axes, 3, handles=[handles[place] for place in order])

    return _draw(frame, paint)


@dataclass(frozen=True)
class Quantity:
    """Something that was timed on both sides: its name, and a row's times of SGLang's own and the tuned one."""

    name: str
    title: str
    times: Callable[[Row], tuple[float | None, float | None]]


QUANTITIES = (
    Quantity("layer", "Whole layer", lambda row: (row.choice.sglang_layer_us, row.choice.layer_us)),
    Quantity("gate-up", "Gate-up kernel", lambda row: (row.choice.sglang_gate_up_us, row.choice.gate_up_us)),
    Quantity("down", "Down kernel", lambda row: (row.choice.sglang_down_us, row.choice.down_us)),
)


def times(summary: Summary, quantity: Quantity) -> Figure | None:
    """Microseconds at each row, both sides, and the ratio with its noise; None where nothing was timed."""
    both = [quantity.times(row) for row in summary.rows]
    if not any(tuned is not None for _, tuned in both):
        return None
    places = range(len(both))
    own_known = [place for place in places if both[place][0] is not None]
    tuned_known = [place for place in places if both[place][1] is not None]
    ratios = [(place, own, tuned) for place in places for own, tuned in (both[place],) if own and tuned]
    frame = _Frame(
        f"plot-time-{quantity.name}",
        f"{quantity.title}: time at each batch size",
        "Above, microseconds on a logarithmic scale: SGLang's own configuration as hollow circles on a dashed line, "
        "the tuned one as squares on a solid line. Below, how much less time the tuned one takes, in percent"
        + (", with three standard errors." if quantity.name == "layer" else "."),
        note="Above in microseconds, below the tuned one's gain"
        + (" with three standard errors." if quantity.name == "layer" else "."),
        width=4.6,
        height=3.9,
    )

    def paint(canvas: Any) -> None:
        upper, lower = canvas.subplots(2, 1, sharex=True, height_ratios=(5, 2))
        own_label, tuned_label = "SGLang's own", "tuned"
        upper.plot(own_known, [both[place][0] for place in own_known], label=own_label, **_OWN_LINE)
        upper.plot(tuned_known, [both[place][1] for place in tuned_known], label=tuned_label, **_TUNED_LINE)
        _plain_log(upper)
        upper.set_ylabel("microseconds")
        _legend(upper, 2)
        noise = [(summary.rows[place].choice.noise or 0) if quantity.name == "layer" else 0 for place, *_ in ratios]
        lower.errorbar(
            [place for place, *_ in ratios],
            [100 * (1 - tuned / own) for _, own, tuned in ratios],
            yerr=[100 * CONFIDENCE * one for one in noise] if any(noise) else None,
            fmt="s",
            color=TUNED,
            ecolor=MUTED,
            markersize=4,
            elinewidth=1.1,
        )
        lower.axhline(0, color=OWN, linestyle=(0, (4, 2)), linewidth=1.2)
        lower.set_ylabel("less time")
        _percents(lower)
        lower.yaxis.get_major_locator().set_params(nbins=3)
        _row_axis(lower, [row.batch for row in summary.rows], 3.9)

    return _draw(frame, paint)


def shared_memory(summary: Summary) -> Figure | None:
    """What each row's kernels need of the card's shared memory; None where nothing is known of it."""
    rows, limit = summary.rows, summary.artefact.environment.shared_memory
    series = (
        ("SGLang's own, gate-up", OWN, "o", [row.own_shared[0] for row in rows]),
        ("SGLang's own, down", OWN, "v", [row.own_shared[1] for row in rows]),
        ("tuned, gate-up", TUNED, "s", [row.shared[0] for row in rows]),
        ("tuned, down", TUNED, "^", [row.shared[1] for row in rows]),
    )
    known = [size for *_, sizes in series for size in sizes if size is not None]
    if not known:
        return None
    over = [row.batch for row in rows if any(size is not None and size > limit for size in row.own_shared)]
    frame = _Frame(
        "plot-shared",
        "Shared memory at each batch size, against the card's limit",
        f"The card lets a block have {limit} bytes. The tuned kernels need at most "
        f"{max((size for *_, sizes in series[2:] for size in sizes if size is not None), default=0)}. "
        + (f"SGLang's own need more than there is at M = {', '.join(map(str, over))}." if over else ""),
        height=3.1,
    )

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        for (label, colour, marker, sizes), shift in zip(series, (-0.21, -0.07, 0.07, 0.21), strict=True):
            places = [place for place, size in enumerate(sizes) if size is not None]
            if places:
                values = [(sizes[place] or 0) / 1024 for place in places]
                fill = "none" if colour == OWN else colour
                xs = [place + shift for place in places]
                axes.vlines(xs, 0, values, color=colour, linewidth=1.1, alpha=0.55)
                axes.plot(xs, values, marker, color=colour, markerfacecolor=fill, label=label, markersize=5)
        axes.axhline(limit / 1024, color=LIMIT, linewidth=1.8, linestyle=(0, (6, 2)))
        axes.annotate(
            f"the card's limit: {limit} bytes",
            (-0.6, limit / 1024),
            xytext=(0, 4),
            textcoords="offset points",
            color=LIMIT,
            size=9.5,
        )
        axes.set_ylim(0, 1.14 * max(limit, *known) / 1024)
        axes.set_ylabel("KiB a block")
        _row_axis(axes, [row.batch for row in rows], 5.7)
        _legend(axes, 2)

    return _draw(frame, paint)


def roofs(summary: Summary) -> Figure | None:
    """Which share of the card's bandwidth and matrix operations each row reaches; None where that is not known."""
    rows = [row for row in summary.rows if row.share is not None]
    if not rows or summary.peak is None:
        return None
    frame = _Frame(
        "plot-roofs",
        "Share of the card's limits that both kernels reach",
        f"The tuned kernels reach {summary.reached}. Dashed lines are SGLang's own configuration.",
        height=3.1,
    )

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        places = list(range(len(rows)))
        own = [(place, row.own_share) for place, row in enumerate(rows) if row.own_share is not None]
        ghost = {"linestyle": (0, (4, 2)), "linewidth": 1.2, "markerfacecolor": "none", "markersize": 4}
        shares = [row.share for row in rows if row.share is not None]
        for name, colour, marker, label in (
            ("memory", TUNED, "s", "bandwidth"),
            ("compute", THIRD, "^", "matrix operations"),
        ):
            values = [getattr(share, name) for share in shares]
            if None in values:
                continue
            own_values = [100 * getattr(share, name) for _, share in own]
            axes.plot([p for p, _ in own], own_values, marker, color=colour, label=f"{label}, own", **ghost)
            axes.plot(places, [100 * value for value in values], marker, color=colour, linestyle="-", label=label)
        axes.axhline(100, color=MUTED, linewidth=1)
        axes.set_ylim(0, max(105, *(105 * share.memory for share in shares)))
        _percents(axes)
        _row_axis(axes, [row.batch for row in rows], 5.7)
        _legend(axes, 2)

    return _draw(frame, paint)


def search(course: Course) -> Figure:
    """The best choice so far, against the kernels tried."""
    near = next((count for count, above in zip(course.tried, course.above, strict=True) if above <= 0.01), None)
    frame = _Frame(
        "plot-search",
        "The search: best choice so far",
        f"{course.kernels} kernels were tried, {course.usable} of them usable."
        + (f" After {near} the best choice was within 1 percent of the final one." if near else ""),
        height=2.7,
    )

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        values = [100 * above for above in course.above]
        axes.step(course.tried, values, where="post", color=TUNED, linewidth=2)
        axes.fill_between(course.tried, values, step="post", color=TUNED, alpha=0.12, linewidth=0)
        axes.axvline(course.tried[0], color=GRID, linewidth=1)
        if near is not None and values[0] > 1:
            axes.annotate(
                f"within 1 % after {near} kernels",
                (near, 1),
                xytext=(12, 26) if near < 0.6 * course.kernels else (-12, 34),
                textcoords="offset points",
                ha="left" if near < 0.6 * course.kernels else "right",
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 1},
            )
        axes.set_xlim(0, course.kernels * 1.01)
        axes.set_ylim(0, max(1.0, 1.08 * max(values)))
        axes.set_xlabel("kernels tried")
        axes.set_ylabel("above the final choice")
        _percents(axes)

    return _draw(frame, paint)


def server(result: BenchResult) -> Figure | None:
    """Output tokens a second, tuned against SGLang's own, by load; None where no load has both sides yet."""
    loads: list[ServeLoad] = [load for load in result.serve if load.ratio is not None]
    if not loads:
        return None
    frame = _Frame(
        "plot-server",
        "In the server: output tokens a second, tuned against SGLang's own",
        "; ".join(f"{load.load.name}: {100 * ((load.ratio or 1) - 1):+.1f} percent" for load in loads)
        + ". The whiskers are what a difference has to clear.",
        height=0.9 + 0.36 * len(loads),
    )

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        heights = list(range(len(loads)))
        values = [100 * ((load.ratio or 1) - 1) for load in loads]
        margins = [100 * (load.margin or 0) for load in loads]
        axes.errorbar(values, heights, xerr=margins, fmt="s", color=TUNED, ecolor=MUTED, capsize=3, markersize=6)
        axes.axvline(0, color=OWN, linestyle=(0, (4, 2)), linewidth=1.4)
        axes.set_yticks(heights, [load.load.name for load in loads])
        axes.set_ylim(len(loads) - 0.4, -0.6)
        reach = max([1.0, *(abs(value) + margin for value, margin in zip(values, margins, strict=True))])
        axes.set_xlim(-1.1 * reach, 1.1 * reach)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("more tokens a second than SGLang's own")
        _percents(axes, "x")

    return _draw(frame, paint)
