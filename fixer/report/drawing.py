"""What all figures of a report share: frame, colours, axes, legend."""

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


@dataclass(frozen=True)
class Figure:
    """A plot: its markup, its title, which the markup has too, and a word more for those who see it."""

    svg: str
    title: str
    note: str = ""


@dataclass(frozen=True)
class Frame:
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


def draw_figure(frame: Frame, paint: Callable[[Any], None]) -> Figure:
    """One figure as SVG, painted by a function that gets matplotlib's canvas."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(frame.width, frame.height))
    paint(canvas)
    text = io.StringIO()
    canvas.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    return Figure(_themed(text.getvalue(), frame), frame.title, frame.note)


def _themed(text: str, frame: Frame) -> str:
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


def row_axis(axes: Any, batches: Sequence[int], inches: float) -> None:
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


def put_legend(axes: Any, columns: int, **more: Any) -> None:
    """Put the legend above the axes, in so many columns."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, columnspacing=1.4, **more)


def percents(axes: Any, name: str = "y") -> None:
    """Label an axis in whole percents."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def plain_log(axes: Any) -> None:
    """A logarithmic axis of plain numbers, a tick for each row's M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
