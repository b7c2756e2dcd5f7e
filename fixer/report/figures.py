"""The report's plots: drawn by matplotlib, inlined as SVG whose colours are the page's CSS variables.

Both sides of a comparison differ in marker and line as well as in colour, and each plot says in words what it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fixer.bench.results import BenchResult, ServeLoad
from fixer.bench.words import change, span
from fixer.families.family import Family
from fixer.report.drawing import (
    GRID,
    INK,
    LIMIT,
    MUTED,
    OWN,
    THIRD,
    TUNED,
    Figure,
    Frame,
    draw_figure,
    percents,
    plain_log,
    put_legend,
    row_axis,
)
from fixer.report.search_course import Course
from fixer.report.summary import Fate, Row, Summary, percent
from fixer.tuning.duel import CONFIDENCE

_OWN_LINE = {"color": OWN, "linestyle": (0, (4, 2)), "marker": "o", "markerfacecolor": "none", "linewidth": 1.4}
_TUNED_LINE = {"color": TUNED, "marker": "s"}


# --- the plots -------------------------------------------------------------------------------------------------------


def gains(summary: Summary) -> Figure | None:
    """Time saved at each row, with its noise; None where no row is faster."""
    rows = summary.rows
    if not summary.count(Fate.FASTER):
        return None
    best = summary.best
    frame = Frame(
        "plot-gains",
        f"Time saved in the {summary.artefact.family.layer} at each batch size",
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
        percents(axes)
        row_axis(axes, [row.batch for row in rows], 5.7)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda place: labels[place] != "faster")
        put_legend(axes, 3, handles=[handles[place] for place in order])

    return draw_figure(frame, paint)


@dataclass(frozen=True)
class Quantity:
    """Something that was timed on both sides: its name, and a row's times of SGLang's own and the tuned one."""

    name: str
    title: str
    times: Callable[[Row], tuple[float | None, float | None]]


def quantities(family: Family) -> tuple[Quantity, ...]:
    """What is drawn of a family: the whole layer, then each product's kernel."""

    def kernel(place: int, name: str) -> Quantity:
        title = f"{name[:1].upper()}{name[1:]} kernel"
        return Quantity(name, title, lambda row: (row.choice.sglang_us[place], row.choice.us[place]))

    layer = Quantity("layer", "Whole layer", lambda row: (row.choice.sglang_layer_us, row.choice.layer_us))
    return (layer, *(kernel(place, name) for place, name in enumerate(family.product_names)))


def times(summary: Summary, quantity: Quantity) -> Figure | None:
    """Microseconds at each row, both sides, and the ratio with its noise; None where nothing was timed."""
    both = [quantity.times(row) for row in summary.rows]
    if not any(tuned is not None for _, tuned in both):
        return None
    places = range(len(both))
    own_known = [place for place in places if both[place][0] is not None]
    tuned_known = [place for place in places if both[place][1] is not None]
    ratios = [(place, own, tuned) for place in places for own, tuned in (both[place],) if own and tuned]
    frame = Frame(
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
        plain_log(upper)
        upper.set_ylabel("microseconds")
        put_legend(upper, 2)
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
        percents(lower)
        lower.yaxis.get_major_locator().set_params(nbins=3)
        row_axis(lower, [row.batch for row in summary.rows], 3.9)

    return draw_figure(frame, paint)


def shared_memory(summary: Summary) -> Figure | None:
    """What each row's kernels need of the card's shared memory; None where nothing is known of it."""
    rows, limit = summary.rows, summary.artefact.environment.shared_memory
    names = summary.artefact.family.product_names
    owns = [
        (f"SGLang's own, {name}", OWN, marker, [row.own_shared[place] for row in rows])
        for (place, name), marker in zip(enumerate(names), "ov", strict=False)
    ]
    tuned = [
        (f"tuned, {name}", TUNED, marker, [row.shared[place] for row in rows])
        for (place, name), marker in zip(enumerate(names), "s^", strict=False)
    ]
    series = [*owns, *tuned]
    shifts = [0.14 * (place - (len(series) - 1) / 2) for place in range(len(series))]
    known = [size for *_, sizes in series for size in sizes if size is not None]
    if not known:
        return None
    over = [row.batch for row in rows if any(size is not None and size > limit for size in row.own_shared)]
    frame = Frame(
        "plot-shared",
        "Shared memory at each batch size, against the card's limit",
        f"The card lets a block have {limit} bytes. The tuned kernels need at most "
        f"{max((size for *_, sizes in tuned for size in sizes if size is not None), default=0)}. "
        + (f"SGLang's own need more than there is at M = {', '.join(map(str, over))}." if over else ""),
        height=3.1,
    )

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        for (label, colour, marker, sizes), shift in zip(series, shifts, strict=True):
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
        row_axis(axes, [row.batch for row in rows], 5.7)
        put_legend(axes, 2)

    return draw_figure(frame, paint)


def roofs(summary: Summary) -> Figure | None:
    """Which share of the card's bandwidth and matrix operations each row reaches; None where that is not known."""
    rows = [row for row in summary.rows if row.share is not None]
    if not rows or summary.peak is None:
        return None
    frame = Frame(
        "plot-roofs",
        f"Share of the card's limits that the {summary.artefact.family.kernels} reach",
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
        percents(axes)
        row_axis(axes, [row.batch for row in rows], 5.7)
        put_legend(axes, 2)

    return draw_figure(frame, paint)


def search(course: Course) -> Figure:
    """The best choice so far, against the kernels tried."""
    near = next((count for count, above in zip(course.tried, course.above, strict=True) if above <= 0.01), None)
    frame = Frame(
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
        percents(axes)

    return draw_figure(frame, paint)


def server(result: BenchResult) -> Figure | None:
    """Tokens a second, tuned against SGLang's own, by load under which they differ; None without any."""
    loads: list[ServeLoad] = [load for load in result.serve if load.ratio is not None and not load.same]
    if not loads:
        return None
    frame = Frame(
        "plot-server",
        "In the server: tokens a second, tuned against SGLang's own",
        "; ".join(f"{load.load.name}: {change(load.ratio)}, {span(load.interval)}" for load in loads)
        + ". The whiskers are the interval that holds 95 times in 100.",
        height=0.9 + 0.36 * len(loads),
    )

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        heights = list(range(len(loads)))
        values = [100 * ((load.ratio or 1) - 1) for load in loads]
        bounds = [load.interval or (load.ratio or 1, load.ratio or 1) for load in loads]
        lows, highs = ([100 * (bound[end] - 1) for bound in bounds] for end in (0, 1))
        reaches = [
            [max(0.0, value - low) for value, low in zip(values, lows, strict=True)],
            [max(0.0, high - value) for value, high in zip(values, highs, strict=True)],
        ]
        axes.errorbar(values, heights, xerr=reaches, fmt="s", color=TUNED, ecolor=MUTED, capsize=3, markersize=6)
        axes.axvline(0, color=OWN, linestyle=(0, (4, 2)), linewidth=1.4)
        axes.set_yticks(heights, [load.load.name for load in loads])
        axes.set_ylim(len(loads) - 0.4, -0.6)
        reach = max([1.0, *map(abs, (*values, *lows, *highs))])
        axes.set_xlim(-1.1 * reach, 1.1 * reach)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("more tokens a second than SGLang's own")
        percents(axes, "x")

    return draw_figure(frame, paint)
