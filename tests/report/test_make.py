"""The report: what it says of a tuning, where it takes it from, its page, its short form, its command."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

import fixer.report.make
from fixer.artefacts.shelf import artefact_path, save_artefact
from fixer.base.voice import Voice
from fixer.cli import main
from fixer.families.fused_moe.work import experts_in_use, layer_work, work_of
from fixer.kernel.source import read_kernel_source
from fixer.machine.cards import find_card, known_cards
from fixer.report.evidence import Evidence, Part, Sources, gather, own_of
from fixer.report.make import choose, default_path, report_after_tuning, summary_of, write_report
from fixer.report.page import render
from fixer.report.roofline import peak_of, share_of
from fixer.report.search_course import course_of
from fixer.report.summary import Fate, Worth, microseconds, percent, summarise
from fixer.report.terminal import print_report
from fixer.serve import find_or_tune
from fixer.serve.find_or_tune import verdict
from fixer.serve.options import MoefixOptions
from fixer.serve.run import Run
from fixer.serve.situation import OnCard
from fixer.sglang.own_choices import OwnChoice
from fixer.sglang.tree import Tree
from fixer.tuning.journal import RunKey, read_looks
from fixer.tuning.search.trials import Outcome
from fixer.workload import BOTH, Kernel, NumberFormat, Projection, RowTiles, Tile, Workload
from tests.support import report_samples as samples
from tests.support.artefacts import renamed

BLANK = "2026-11-24T00:47:54Z"


def summary_with(*rows, **changes):
    return summarise(Evidence(samples.artefact_of(*rows, **changes), "a.json"))


# --- the answer ------------------------------------------------------------------------------------------------------

HEADLINES = {
    "faster": ((samples.faster(1), samples.kept(2)), Worth.FASTER, "5.1 % less time in the MoE layer on average"),
    "crash and faster": (
        (samples.faster(1), samples.cured(2)),
        Worth.CURED,
        "The crash is fixed, and the other rows take 10.0 % less time in the MoE layer on average",
    ),
    "crash alone": ((samples.cured(1), samples.kept(2)), Worth.NEUTRAL, "Neutral: only the crash is fixed"),
    "crash in every row": ((samples.cured(1), samples.cured(2)), Worth.NEUTRAL, "Neutral: only the crash is fixed"),
    "nothing found": (
        (samples.kept(1), samples.kept(2, None)),
        Worth.NEUTRAL,
        "Neutral: SGLang's own configuration was already as good",
    ),
    "not worth it": (
        (samples.faster(1, 100.0, 99.5), *(samples.kept(batch) for batch in (2, 4, 8))),
        Worth.NEUTRAL,
        "Neutral: 0.1 % less time in the MoE layer on average",
    ),
    "could not be timed": (
        (samples.unjudged(1),),
        Worth.NEUTRAL,
        "Neutral: SGLang's own configuration was kept, for it could not be timed",
    ),
}


@pytest.mark.parametrize(("rows", "worth", "headline"), HEADLINES.values(), ids=HEADLINES)
def test_headline(rows, worth, headline):
    summary = summary_with(*rows)
    assert (summary.worth, summary.headline) == (worth, headline)


def test_headline_of_what_was_not_measured():
    summary = summary_with(samples.unjudged(1), measured=False)
    assert (summary.worth, summary.headline) == (Worth.NOT_MEASURED, "Not measured: chosen because it fits this card")
    assert summary.rows[0].words == "fits the card; not measured"


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("qwen3-30b-a3b-fp8-dynamic", "7.2 % less time in the MoE layer on average"),
        ("qwen3-30b-a3b-fp8", "3.0 % less time in the MoE layer on average"),
        ("qwen3-30b-a3b", "1.1 % less time in the MoE layer on average"),
        ("mixtral-8x7b-fp8", "2.5 % less time in the MoE layer on average"),
    ],
)
def test_the_measured_tunings(name, headline):
    artefact = samples.real(samples.RESULTS / f"{name}.artefact.json")
    summary = summarise(Evidence(artefact, "a.json"))
    assert summary.headline == headline
    assert summary.model == name
    # The same number as the line that tuning prints.
    assert headline.split(" less")[0] in verdict(artefact, 1 / (1 - summary.less))
    assert sum(summary.count(fate) for fate in Fate) == len(artefact.rows) == 19


def test_what_changed():
    rows = (samples.faster(1), samples.faster(4, 100, 80), samples.kept(8), samples.cured(16), samples.cured(32))
    assert summary_with(*rows).changed == (
        "2 of 5 batch sizes got a faster configuration; at M = 16, 32 SGLang's own does not run on this card, and this "
        "one does; 1 keeps SGLang's own. The largest gain is 20.0 % (19.7 to 20.3 %), at M = 4."
    )
    assert summary_with(samples.kept(1), samples.kept(2)).changed == "All keep SGLang's own."


def test_the_words_of_a_row():
    words = [row.words for row in summary_with(*(row for row in _each_fate())).rows]
    assert words == [
        "10.0 % less time",
        "kept SGLang's row: gain within noise (0.6 %)",
        "kept SGLang's row: nothing faster was found",
        "SGLang's own does not run on this card",
        "kept SGLang's row: it could not be timed",
    ]


def _each_fate():
    return samples.faster(1), samples.kept(2), samples.kept(4, None), samples.cured(8), samples.unjudged(16)


def test_a_row_that_does_not_fit_says_by_how_much():
    own = Tile(128, 256, 128, 32, 8, 4)
    artefact = samples.artefact_of(samples.cured(1))
    artefact = replace(artefact, environment=replace(artefact.environment, shared_memory=101376))
    shared = {Kernel(projection, own): 147456 for projection in BOTH}
    evidence = Evidence(artefact, "a.json", {1: OwnChoice(RowTiles(own, own), ("default", "default"))}, shared)
    assert summarise(evidence).rows[0].words == "SGLang's own does not fit: 147456 of 101376 bytes"


def test_a_row_without_the_layers_times_is_judged_by_the_kernels():
    row = replace(samples.faster(1), layer_us=None, sglang_layer_us=None)
    summary = summary_with(row)
    assert (summary.rows[0].own_us, summary.rows[0].tuned_us) == pytest.approx((250 / 3, 75))
    assert not summary.through_layer


def test_numbers():
    assert [percent(value) for value in (0.0719, 0.0, -0.0001, 0.9)] == ["7.2 %", "0.0 %", "0.0 %", "90.0 %"]
    assert [microseconds(value) for value in (9.104, 25.408, 116.28, 1051.9)] == ["9.104", "25.41", "116.3", "1052"]


# --- how near to the card's limits -----------------------------------------------------------------------------------

LAYER = Workload(8, 64, 128, 2)


def test_experts_in_use():
    assert experts_in_use(LAYER, 1) == pytest.approx(2)
    assert experts_in_use(LAYER, 10_000) == pytest.approx(8)
    # Uniform alone would be 8 * (1 - (6 / 8) ** 4) = 5.47; half of the routings are skewed, so it is a little less.
    assert 4.8 < experts_in_use(LAYER, 4) < 5.47
    assert experts_in_use(replace(LAYER, experts=4, ep_size=2), 4) == pytest.approx(experts_in_use(LAYER, 4) / 2)


def test_work_by_hand():
    up, down = (work_of(LAYER, projection, 1) for projection in (Projection.GATE_UP, Projection.DOWN))
    # bf16: two experts' [128, 128] weights, one row in, two rows out; then two experts' [128, 64], two in, two out.
    assert up.moved == pytest.approx(2 * (2 * 128 * 128 + 128 + 2 * 128))
    assert up.operations == 2 * 2 * 128 * 128
    assert down.moved == pytest.approx(2 * (2 * 128 * 64 + 2 * 64 + 2 * 128))
    assert down.operations == 2 * 2 * 128 * 64
    assert layer_work(LAYER, 1).operations == up.operations + down.operations


def test_work_of_packed_weights_and_scales():
    packed = replace(LAYER, number_format=NumberFormat.INT4_W4A16, intermediate=32, group_size=32)
    # Two experts: half a byte a weight, and a bf16 scale for each 32 of them; activations as in bf16.
    weights = 2 * (128 * 128 // 2 + 128 * (128 // 32) * 2)
    assert work_of(packed, Projection.GATE_UP, 1).moved == pytest.approx(weights + 2 * (128 + 2 * 128))
    assert work_of(packed, Projection.GATE_UP, 1).operations == work_of(LAYER, Projection.GATE_UP, 1).operations


def test_shares_of_the_measured_tunings_make_sense():
    for path in samples.RESULTS.glob("*.artefact.json"):
        summary = summarise(Evidence(samples.real(path), "a.json"))
        for row in summary.rows:
            assert row.share is not None
            # Few draws of few experts: Mixtral's M = 2 comes to 103 % (the page says why).
            assert 0.05 < row.share.memory < 1.05
            assert 0 < row.share.compute < 1
            assert row.own_share.memory <= row.share.memory * 1.2


def test_share():
    peak = peak_of("NVIDIA H200")
    work = layer_work(replace(LAYER, number_format=NumberFormat.FP8_W8A8), 1)
    assert peak.bandwidth == 4.8e12
    share = share_of((work.moved, work.operations), 1e6, peak, NumberFormat.FP8_W8A8)
    assert share.memory == pytest.approx(work.moved / 4.8e12)
    assert share.compute == pytest.approx(work.operations / 1979e12)
    assert share_of((work.moved, work.operations), 1e6, peak, NumberFormat.INT8_W8A8).compute is None


def test_the_table_of_limits():
    cards = {card.name: card for card in known_cards()}
    table = json.loads((Path(fixer.report.__file__).parents[1] / "data" / "peaks.json").read_text())
    assert max(Counter(row["name"] for row in table).values()) == 1
    for row in table:
        card, peak = cards[row["name"]], peak_of(row["name"])
        assert 1e11 < peak.bandwidth < 1e13
        assert peak.source
        assert peak.fp8 is None or card.capability >= (8, 9)
        assert peak.fp8 is None or 1.9 < peak.fp8 / peak.half < 2.1
    assert peak_of("NVIDIA RTX 9999") is None


# --- what it rests on ------------------------------------------------------------------------------------------------


def test_looks_come_in_the_order_of_the_trials(tmp_path):
    artefact, found = samples.real(), samples.looks()
    samples.keep_looks(tmp_path, artefact, found)
    key = RunKey(artefact.environment, artefact.workload)
    assert list(read_looks(tmp_path / "journal.sqlite", key)) == found
    other = RunKey(replace(artefact.environment, driver="999.1"), artefact.workload)
    assert read_looks(tmp_path / "journal.sqlite", other) == ()


def test_a_journal_is_only_read(tmp_path):
    key = RunKey(samples.real().environment, samples.real().workload)
    path = tmp_path / "journal.sqlite"
    assert read_looks(path, key) == ()
    assert not path.exists()
    path.write_bytes(b"no journal at all, " * 100)
    before = path.read_bytes()
    assert read_looks(path, key) == ()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_course_of_a_search():
    found = samples.looks((1, 16))
    course = course_of(found, (1, 16), BOTH)
    assert course.kernels == len(found)
    assert course.usable == sum(look.build.outcome is Outcome.OK for look in found) < len(found)
    assert list(course.tried) == list(range(course.tried[0], len(found) + 1))
    assert course.above[0] > 0 == course.above[-1]
    assert all(later <= earlier for earlier, later in zip(course.above, course.above[1:], strict=False))
    # Both projections of one BLOCK_SIZE_M have to be there for every row.
    assert course_of(found[:1], (1, 16), BOTH) is None
    assert course_of(found, (1, 16, 999), BOTH) is None
    assert course_of([], (1,), BOTH) is None


def test_sglangs_own_and_shared_memory(trees, moefix_home, tmp_path):
    """With the real tree and the real compiler, on two rows: what was kept is SGLang's own, and bytes are compiled."""
    artefact = samples.real()
    artefact = replace(artefact, rows=(artefact.rows[0], artefact.rows[-1]))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "trees").symlink_to(moefix_home / "cache" / "trees")
    evidence = gather(artefact, "a.json", Sources(tmp_path))
    assert set(evidence.missing) == {Part.SEARCH}
    first, last = summarise(evidence).rows
    assert last.own == last.pair
    assert last.shared == last.own_shared == (196608, 196608)
    assert first.own != first.pair
    assert all(0 < size < 232448 for size in (*first.shared, *first.own_shared))
    # Without a compiler the second time, from the cache; and from the journal first of all.
    again = gather(artefact, "a.json", Sources(tmp_path, compiles=False))
    assert again.shared == evidence.shared
    up = first.pair.kernels[0]
    found = replace(samples.looks()[0], build=replace(samples.looks()[0].build, kernel=up, shared_bytes=77))
    samples.keep_looks(tmp_path, artefact, [found])
    assert gather(artefact, "a.json", Sources(tmp_path, compiles=False)).shared[up] == 77


def test_the_kept_rows_of_the_measured_tunings_are_sglangs_own(trees):
    for path in samples.RESULTS.glob("*.artefact.json"):
        artefact = samples.real(path)
        own = own_of(artefact, trees["0.5.17"])
        for row in artefact.rows:
            same = (own[row.batch].gate_up, own[row.batch].down) == (row.gate_up, row.down)
            assert same == (row.decision.value == "kept_sglang")


def test_what_is_missing_is_said(tmp_path, trees):
    artefact = samples.artefact_of(samples.kept(1))
    elsewhere = replace(artefact, environment=replace(artefact.environment, sglang="0.4.0"))
    evidence = gather(elsewhere, "a.json", Sources(tmp_path, compiles=False))
    assert set(evidence.missing) == set(Part)
    assert "0.4.0 is not at hand" in evidence.missing[Part.OWN]
    other_kernel = replace(artefact, environment=replace(artefact.environment, kernel_hash="ab" * 32))
    evidence = gather(other_kernel, "a.json", Sources(tmp_path, trees["0.5.17"]))
    assert "another source" in evidence.missing[Part.SHARED]
    assert evidence.own
    broken = Tree(tmp_path, "0.5.17", "3.6.0")
    evidence = gather(artefact, "a.json", Sources(tmp_path, broken))
    assert "lacks" in evidence.missing[Part.OWN]
    assert Part.SHARED in evidence.missing
    page = render(summarise(evidence), tmp_path)
    for sentence in evidence.missing.values():
        assert sentence.partition("'")[0] in page


# --- the page --------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """A page's identifiers, references to them, headings, words and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids, self.refs, self.headings, self.loads, self.tags = [], set(), [], [], Counter()
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        named = dict(attributes)
        if "id" in named:
            self.ids.append(named["id"])
        for name in ("aria-labelledby", "for"):
            self.refs.update((named.get(name) or "").split())
        for value in named.values():
            self.refs.update(re.findall(r"url\(#([^)]*)\)", value or ""))
        if (named.get("href") or "").startswith("#"):
            self.refs.add(named["href"][1:])
        elif "href" in named or "src" in named or "srcset" in named:
            self.loads.append((tag, named))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_together(tmp_path):
    path = samples.full_home(tmp_path)
    page = render(summary_of(choose(path, tmp_path), tmp_path, compiles=False), tmp_path)
    outline = Outline(page)
    assert [name for name, count in Counter(outline.ids).items() if count > 1] == []
    assert outline.refs - set(outline.ids) == set()
    assert outline.loads == []
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(outline.headings, outline.headings[1:], strict=False))
    assert "default-src 'none'" in page
    assert re.search(r"https?://", page) is None
    assert outline.tags["svg"] == 8
    assert outline.tags["title"] == 1 + outline.tags["svg"]
    assert "#00000" not in page
    assert len(page) < 1_000_000


def test_names_are_text_and_nothing_else(tmp_path):
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
    artefact = samples.artefact_of(samples.faster(1), model=evil)
    card = evil.replace("/", "")  # a slash is in no file's name, and so in no artefact's card
    artefact = renamed(artefact, environment=replace(artefact.environment, card=card))
    summary = summarise(Evidence(artefact, evil))
    page = render(summary, tmp_path)
    outline = Outline(page)
    assert outline.tags["script"] == 1
    assert outline.tags["img"] == 0
    assert evil in "".join(outline.words)
    assert card in "".join(outline.words)
    assert "49" not in "".join(word for word in outline.words if "script" in word)


def test_the_page_and_the_terminal_have_the_same_numbers(tmp_path):
    summary = summary_of(choose(samples.FP8, tmp_path), tmp_path, compiles=False)
    words = " ".join(Outline(render(summary, tmp_path)).words)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    print_report(summary, console)
    printed = console.export_text()
    for row in summary.rows:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [str(row.batch)])
        for number in (microseconds(row.own_us), microseconds(row.tuned_us), percent(row.less), row.words):
            assert number in line
            assert number in words
    for text in (summary.changed, summary.artefact.gate_up_file, summary.artefact.down_file):
        assert text in printed
        assert text in words.replace("\N{NO-BREAK SPACE}", " ")


def test_a_server_benchmark_is_in_the_report(tmp_path):
    path = samples.full_home(tmp_path)
    summary = summary_of(choose(path, tmp_path), tmp_path, compiles=False)
    words = " ".join(Outline(render(summary, tmp_path)).words)
    for text in (
        *("In the server", "16 streams, 512 in, 128 out", "+5.1 %", "+3.9 to +6.3 %", "41.5 (77.25)", "neutral"),
        *("<b>there</b>", "prefill of 4000 (input tokens/s)", "36000", "39600", "same configuration"),
        "More than the MoE layer's own gain can give, so something else differs too (16 streams, 512 in, 128 out: +5.1 "
        "% of +4.0 %).",
        "no effect of the tuning (prefill of 4000: +10.0 %)",
    ):
        assert text in words
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    print_report(summary, console)
    verdict = "he server: faster with the tuned configuration (+2.7 % over all loads, +1.7 to +3.6 %)"
    assert f"bench    t{verdict}" in console.export_text()
    assert f"T{verdict}.".replace(" %", "\N{NO-BREAK SPACE}%") in words


def test_one_start_of_each_server_decides_nothing_beside_the_headline(tmp_path):
    """The published page said "faster (+9.3 %)" of one start each."""
    path = samples.full_home(tmp_path)
    artefact = samples.Artefact.from_json(path.read_bytes())
    result = samples.served(artefact, path.name, "2026-11-25T01:00:00Z")
    load = replace(
        result.serve[0], sglang=samples.Passes((99.0,), (0,)), tuned=samples.Passes((110.0,), (1,)), interval=None
    )
    load = replace(load, verdict=samples.Verdict.UNDECIDED)
    result = replace(result, serve=(load,), interval=None, verdict=samples.Verdict.UNDECIDED)
    samples.save_result(samples.result_path(tmp_path, result), result)
    page = render(summary_of(choose(path, tmp_path), tmp_path, compiles=False), tmp_path)
    hero = page[page.index('class="answer"') : page.index("<nav")]
    assert "The server: not decided (one start each)." in hero
    assert "faster with the tuned" not in page


LIMITED = "101376 of 232448 bytes of shared memory a block"


def test_a_simulated_limit_is_in_the_title_the_hero_and_the_terminals_head(tmp_path):
    real = samples.real(samples.RESULTS.parent / "h100" / "qwen3-30b-a3b-fp8-dynamic.101376.artefact.json")
    summary = summarise(Evidence(real, "a.json"))
    page = render(summary, tmp_path)
    assert f"on {real.environment.card} with {LIMITED}</title>" in page
    hero = page[page.index('class="answer"') : page.index("<nav")]
    assert LIMITED in hero
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    print_report(summary, console)
    assert LIMITED in console.export_text().splitlines()[1]
    free = summarise(Evidence(samples.real(), "a.json"))
    assert free.limit == ""
    assert "as a smaller card has" not in render(free, tmp_path)


def test_a_gain_of_the_bare_kernels_is_not_called_the_layers():
    row = replace(samples.faster(1), layer_us=None, sglang_layer_us=None)
    assert summary_with(row).headline == "10.0 % less time in the MoE kernels on average"


def test_the_largest_gain_has_its_interval(tmp_path):
    best = summary_with(samples.faster(1), samples.faster(4, 100, 76, noise=0.03)).best
    assert best.bounds == "15.0 to 33.0 %"
    assert "15.0 to 33.0 %" in render(summary_with(samples.faster(4, 100, 76, noise=0.03)), tmp_path)


def test_no_folder_of_the_machine_is_on_the_page(tmp_path):
    artefact = samples.artefact_of(samples.faster(1), model="/home/somebody/models/m")
    assert "somebody" not in render(summarise(Evidence(artefact, "a.json")), tmp_path)


def test_drawing_leaves_no_trace_for_the_server(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    render(summarise(Evidence(samples.real(), "a.json")), tmp_path)
    assert "MPLCONFIGDIR" not in os.environ


@pytest.mark.parametrize("count", [1, 2, 60])
def test_few_and_many_rows(tmp_path, count):
    rows = tuple(samples.faster(place + 1) for place in range(count))
    assert len(Outline(render(summary_with(*rows), tmp_path)).ids) > 30


@pytest.mark.parametrize("rows", [(samples.cured(1),), (samples.unjudged(1),), (samples.kept(1, None),)])
def test_rows_of_one_kind_alone(tmp_path, rows):
    assert "<h1" in render(summary_with(*rows), tmp_path)


def test_what_was_not_measured_has_a_page_too(tmp_path):
    page = render(summary_with(samples.unjudged(1), measured=False), tmp_path)
    assert "Nothing was timed." in page


# --- where it comes from and goes ------------------------------------------------------------------------------------


def run(*arguments, env=None):
    return CliRunner().invoke(main, ["report", *map(str, arguments)], env=env)


def test_the_newest_is_the_default(tmp_path):
    older = samples.artefact_of(samples.kept(1), created="2026-11-23T00:00:00Z")
    older = replace(older, workload=replace(older.workload, top_k=4))
    save_artefact(tmp_path, older)
    newest = save_artefact(tmp_path, samples.real())
    result = run("--home", tmp_path, "--no-compile")
    assert result.exit_code == 0, result.output
    assert "7.2 % less time in the MoE layer on average" in result.stdout
    page = default_path(tmp_path, newest)
    assert result.stdout.splitlines()[-1] == f"report   {page}"
    assert "7.2\N{NO-BREAK SPACE}% less time in the MoE layer on average</h1>" in page.read_text()
    assert stat.S_IMODE(page.stat().st_mode) == 0o644


def test_a_named_file_and_a_named_page(tmp_path):
    result = run(samples.FP8, "--home", tmp_path / "home", "--out", tmp_path / "deep" / "r.html", "--no-compile")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "deep" / "r.html").read_text().startswith("<!doctype html>")
    assert not (tmp_path / "home" / "reports").exists()


def test_nothing_to_report(tmp_path):
    result = run("--home", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("moefix: nothing was tuned yet")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff" * 10], ids=["absent", "empty", "other", "no text"])
def test_a_file_that_is_no_tuning(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    result = run(path, "--home", tmp_path)
    assert result.exit_code == 2
    assert "x.json is no tuning" in result.stderr
    assert content is None or path.read_bytes() == content


def test_a_damaged_artefact_is_set_aside_and_said(tmp_path):
    save_artefact(tmp_path, samples.real())
    broken = tmp_path / "artefacts" / "NVIDIA_H200" / "broken.json"
    broken.write_text("{")
    result = run("--home", tmp_path, "--no-compile")
    assert result.exit_code == 0, result.output
    assert "broken.json is not used" in result.stderr
    assert not broken.exists()


def test_another_sglang_is_refused(tmp_path, trees):
    root = trees["0.5.23"].package.parent
    result = run(samples.FP8, "--home", tmp_path, "--sglang-root", root)
    assert result.exit_code == 5
    assert "0.5.23" in result.stderr


def test_after_a_tuning(tmp_path, trees):
    artefact = samples.real()
    path = default_path(tmp_path, artefact_path(tmp_path, artefact.environment, artefact.workload))
    assert report_after_tuning(tmp_path, artefact, trees["0.5.17"]) == f"report: {path}"
    assert path.is_file()
    assert path.parent == tmp_path / "reports"


def test_a_report_that_fails_is_a_line_and_leaves_no_old_page(tmp_path, trees, monkeypatch):
    artefact = samples.real()
    report_after_tuning(tmp_path, artefact, trees["0.5.17"])

    def fail(*_):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(fixer.report.make, "render", fail)
    line = report_after_tuning(tmp_path, artefact, trees["0.5.17"])
    assert line == "the report could not be written: RuntimeError: no fonts"
    assert list((tmp_path / "reports").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path, trees):
    (tmp_path / "reports").write_text("in the way")
    line = report_after_tuning(tmp_path, samples.real(), trees["0.5.17"])
    assert line.startswith("the report could not be written: ")


def test_tuning_writes_it(tmp_path, trees, monkeypatch, capsys):
    """The hook in `find_or_tune.tune_kind`, with a tuning that is at hand already."""
    artefact = samples.real()
    tuned = SimpleNamespace(notes=(), artefact=artefact, looks=(), timings=(), timeline={"search": 1.0})
    monkeypatch.setattr("fixer.tuning.session.tune", lambda *_: tuned)
    monkeypatch.setattr("fixer.tuning.turn.state_of_cards", lambda job: ())
    on = OnCard((find_card(artefact.environment.card),), SimpleNamespace(workload=artefact.workload))
    model = SimpleNamespace(name="m", revision=None)
    situation = SimpleNamespace(tree=trees["0.5.17"], model=model, rows=lambda on: (1,))
    run = Run(tmp_path, MoefixOptions(), Voice(), report_after_tuning)
    find_or_tune.tune_kind(run, situation, on, find_or_tune.Wish((1,)))
    told = capsys.readouterr().err
    (page,) = (tmp_path / "reports").iterdir()
    assert f"moefix: report: {page}" in told


def test_the_kernels_source_of_the_measured_tunings_is_the_pinned_one(trees):
    assert read_kernel_source(trees["0.5.17"].kernel_source).sha256 == samples.real().environment.kernel_hash


def test_writing_is_atomic(tmp_path, monkeypatch):
    summary = summarise(Evidence(samples.real(), "a.json"))
    page = tmp_path / "r.html"
    write_report(summary, page, tmp_path)
    before = page.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result = run(samples.FP8, "--home", tmp_path, "--out", page, "--no-compile")
    assert result.exit_code == 9
    assert page.read_bytes() == before
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert "matplotlib" in sys.modules
