"""Plans against three SGLang releases: the numbers that are known, proposals that fit, files that SGLang finds."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fixer.base.errors import SGLangError, StoreError, UsageError
from fixer.families.fused_moe.rules import makes_sense
from fixer.kernel.cache import CompileCache
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome
from fixer.kernel.fit import CompileFunction, compiler_for
from fixer.kernel.space import least_bytes
from fixer.machine.cards import Card, find_card, with_shared_memory_limit
from fixer.model.config import model_from_config
from fixer.model.rules.case import Outcome
from fixer.plan.make_plan import make_plan
from fixer.plan.plan import Plan, Source, Verdict
from fixer.plan.proposals import Offers, choose, offers
from fixer.plan.view import verdict_line
from fixer.plan.write import sidecar_name, write_plan
from fixer.sglang.flags import parse_flags
from fixer.sglang.own_choices import own_choices
from fixer.sglang.tree import Found, Tree
from fixer.sglang.tuning_files import read_rows
from fixer.workload import BOTH, RowTiles, Tile

RELEASES = ["0.4.9", "0.5.17", "0.5.23"]
BLOG_POST = "q3_30b_fp8dyn_tp1_l40s"
KEYS = {"schema", "model", "gpu", "sglang", "outcome", "kernel", "reason", "workload", "lookup", "rows", "verdict"}


def by_formula(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
    """Stands in for the compiler where its exact numbers do not matter."""
    return {
        candidate: Compiled(CompileOutcome.OK, least_bytes(candidate.tile, candidate.workload), 0.1)
        for candidate in candidates
    }


def plan_of(
    case: dict[str, Any], card: str | Card, tree: Tree, compiler: CompileFunction | None, flags: str | None = None
) -> Plan:
    parsed = parse_flags(case["flags"] if flags is None else flags.split())
    wanted = find_card(card) if isinstance(card, str) else card
    return make_plan(model_from_config(case["model"], case["config"], parsed), parsed, wanted, tree, compiler)


def compiled_plan(case: dict[str, Any], card: str | Card, tree: Tree, home: Path, flags: str | None = None) -> Plan:
    wanted = find_card(card) if isinstance(card, str) else card
    with CompileCache(home) as cache:
        return plan_of(case, wanted, tree, compiler_for(tree, wanted, home, cache), flags)


def crashing(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
    """Stands in for a compiler that dies of everything, as Triton 3.2.0's does on a card with compute capability 12."""
    return {candidate: Compiled(CompileOutcome.CRASHED, message="the compiler died") for candidate in candidates}


def sound(plan: Plan) -> None:
    """What holds for every plan that proposes something."""
    workload = plan.decision.workload
    assert workload is not None
    for row in plan.rows:
        assert row.proposed is not None, (row.tokens, plan.notes)
        assert row.proposed.gate_up.block_m == row.proposed.down.block_m
        assert not row.proposed.gate_up.use_tma


# --- the numbers that are known --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "verdict", "most"),
    [("0.4.9", "out_of_resources", 147456), ("0.5.17", "fits", 73728), ("0.5.23", "fits", 73728)],
)
def test_the_blog_posts_error(
    cases: Any, trees: dict[str, Tree], moefix_home: Path, release: str, verdict: str, most: int
) -> None:
    plan = compiled_plan(cases[BLOG_POST], "RTX 4090", trees[release], moefix_home, "")
    shown = plan.to_json()
    assert shown["verdict"] == verdict
    assert shown["gpu"]["shared_memory_per_block_optin"] == 101376
    bytes_needed = [row[which]["shared_bytes"] for row in shown["rows"] for which in ("gate_up", "down")]
    assert max(bytes_needed) == most
    refused = [row["M"] for row in shown["rows"] if not row["gate_up"]["fits"]]
    assert refused == ([256, 512, 1024, 1536, 2048, 3072, 4096] if release == "0.4.9" else [])
    sound(plan)


def test_the_same_default_fits_an_h100(cases: Any, trees: dict[str, Tree], moefix_home: Path) -> None:
    plan = compiled_plan(cases[BLOG_POST], "H100", trees["0.4.9"], moefix_home, "")
    assert plan.verdict is Verdict.FITS
    limited = with_shared_memory_limit(find_card("H100"), 101376)
    refused = compiled_plan(cases[BLOG_POST], limited, trees["0.4.9"], moefix_home, "")
    assert refused.verdict is Verdict.OUT_OF_RESOURCES
    sound(refused)


# --- the JSON --------------------------------------------------------------------------------------------------------


def test_the_keys_to_the_letter(cases: Any, trees: dict[str, Tree]) -> None:
    shown = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], by_formula, "").to_json()
    assert json.loads(json.dumps(shown)) == shown
    assert shown.keys() == KEYS | {"compiled_with", "notes"}
    assert shown["schema"] == 1
    assert shown["model"] == {
        "name": cases[BLOG_POST]["model"],
        "architecture": "Qwen3MoeForCausalLM",
        "is_moe": True,
    }
    assert shown["gpu"] == {
        "name": "NVIDIA GeForce RTX 4090",
        "sglang_name": "NVIDIA_GeForce_RTX_4090",
        "compute_capability": "8.9",
        "shared_memory_per_block_optin": 101376,
    }
    assert shown["sglang"] == {"version": "0.5.17", "triton": "3.6.0"}
    assert (shown["outcome"], shown["kernel"]) == ("asks", "fused_moe_triton")
    assert shown["workload"] == {
        "E": 128,
        "N": 768,
        "hidden_size": 2048,
        "top_k": 8,
        "dtype": "fp8_w8a8",
        "block_shape": None,
        "per_channel_quant": True,
        "tp_size": 1,
        "ep_size": 1,
    }
    name = "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8,per_channel_quant=True"
    assert shown["lookup"] == {
        "folder": "configs/triton_3_6_0",
        "gate_up": name + ".json",
        "down": name + "_down.json",
        "found": "none",
    }
    row = shown["rows"][0]
    assert row.keys() == {"M", "source", "gate_up", "down", "proposed"}
    assert (row["M"], row["source"]) == (1, "default")
    assert row["gate_up"].keys() == row["down"].keys() == {"config", "shared_bytes", "fits"}
    assert row["proposed"].keys() == {"gate_up", "down"}
    assert row["gate_up"]["config"] == Tile(32, 64, 256, 1, 4, 4).to_json()


@pytest.mark.parametrize("release", RELEASES)
def test_names_by_release(cases: Any, trees: dict[str, Tree], release: str) -> None:
    lookup = plan_of(cases["q3_30b_fp8block_tp2_4090"], "RTX 4090", trees[release], None).to_json()["lookup"]
    name = "E=128,N=384,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8,block_shape=[128, 128]"
    assert lookup["gate_up"] == name + ".json"
    assert lookup["down"] == (None if release == "0.4.9" else name + "_down.json")


@pytest.mark.parametrize(
    "case_id",
    [
        f"{case['id']}"
        for case in json.loads((Path(__file__).resolve().parents[1] / "data" / "lookup-cases.json").read_text())
    ],
)
def test_look_ups_of_all_cases(cases: Any, trees: dict[str, Tree], case_id: str) -> None:
    case = cases[case_id]
    shown = plan_of(case, case["gpu"]["name"], trees["0.5.17"], None).to_json()
    expected = case["expect"]
    assert shown["outcome"] == expected["outcome"]
    assert (shown["lookup"] or {}).get("gate_up") == expected["file_up"]
    assert (shown["lookup"] or {}).get("down") == expected["file_down"]
    assert (shown["workload"] or {"E": None})["E"] == expected["E"]
    assert shown["verdict"] == "not_applicable"
    assert bool(shown["rows"]) == (expected["outcome"] in {"asks", "no_lookup", "uncertain"})
    for row in shown["rows"]:
        assert row["gate_up"]["shared_bytes"] is row["gate_up"]["fits"] is row["proposed"]["gate_up"] is None


def test_a_dense_model(cases: Any, trees: dict[str, Tree]) -> None:
    shown = plan_of(cases["qwen3_8b_bf16_4090"], "RTX 4090", trees["0.5.17"], by_formula).to_json()
    assert (shown["outcome"], shown["kernel"], shown["model"]["is_moe"]) == ("no_moe", "none", False)
    assert shown["workload"] is shown["lookup"] is None
    assert (shown["rows"], shown["verdict"]) == ([], "not_applicable")


def test_fp8_on_a_3090_crashes(cases: Any, trees: dict[str, Tree]) -> None:
    shown = plan_of(cases[BLOG_POST], "RTX 3090", trees["0.5.17"], by_formula, "").to_json()
    assert (shown["outcome"], shown["kernel"]) == ("asks_then_crashes", "fused_moe_triton")
    assert shown["lookup"]["gate_up"].startswith("E=128,N=768,device_name=NVIDIA_GeForce_RTX_3090")
    assert (shown["rows"], shown["verdict"]) == ([], "not_applicable")


def test_dense_products_are_noted(cases: Any, trees: dict[str, Tree]) -> None:
    plan = plan_of(cases["q3_30b_fp8block_tp2_4090"], "RTX 4090", trees["0.5.17"], None)
    assert any("N=2560,K=2048, N=2048,K=2048" in note for note in plan.notes)


def test_deterministic_inference(cases: Any, trees: dict[str, Tree], tmp_path: Path) -> None:
    plan = plan_of(cases["q3_30b_bf16_deterministic_h100"], "H100", trees["0.5.17"], by_formula)
    assert plan.decision.outcome is Outcome.NO_LOOKUP
    assert plan.lookup is None
    assert {row.source for row in plan.rows} == {Source.DETERMINISTIC}
    assert {row.gate_up.tile for row in plan.rows} == {Tile(64, 64, 32, 8)}
    assert {row.proposed for row in plan.rows} == {None}
    assert plan.verdict is Verdict.FITS
    with pytest.raises(UsageError, match="no file to write"):
        write_plan(plan, tmp_path)


# --- proposals -------------------------------------------------------------------------------------------------------

COMPILED = [
    ("q3_30b_bf16_tp1_h100", "RTX 3090", "0.5.17"),
    ("q3_30b_bf16_tp1_h100", "H100", "0.5.17"),
    ("q3_30b_fp8block_tp2_4090", "RTX 5090", "0.5.23"),
    ("q3_30b_awq_tp4_3090", "RTX 3090", "0.5.17"),
    ("q3_30b_int8_flag_3090", "RTX 3090", "0.4.9"),
    ("dsv3_fp8_tp8_h200", "H200", "0.5.17"),
    ("glm45air_fp8_tp2_pro6000", "RTX PRO 6000", "0.5.17"),
]


@pytest.mark.parametrize(("case_id", "card", "release"), COMPILED)
def test_every_proposal_fits_as_compiled(
    cases: Any, trees: dict[str, Tree], moefix_home: Path, case_id: str, card: str, release: str
) -> None:
    plan = compiled_plan(cases[case_id], card, trees[release], moefix_home)
    sound(plan)
    assert all(row.gate_up.fits is not None for row in plan.rows)
    with CompileCache(moefix_home) as cache:
        compile_again = compiler_for(trees[release], plan.card, moefix_home, cache)
        workload = plan.decision.workload
        assert workload is not None
        wanted = [
            Candidate(workload, projection, tile)
            for row in plan.rows
            if row.proposed
            for projection, tile in zip(BOTH, (row.proposed.gate_up, row.proposed.down), strict=True)
        ]
        for compiled in compile_again(wanted).values():
            assert compiled.outcome is CompileOutcome.OK
            assert compiled.shared_bytes <= plan.card.shared_memory


CARDS = ["RTX 3090", "RTX 4090", "H200", "RTX PRO 6000"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("release", RELEASES)
def test_every_case_on_every_card_has_sensible_proposals(
    cases: Any, trees: dict[str, Tree], card: str, release: str
) -> None:
    proposed = 0
    for case in cases.values():
        plan = plan_of(case, card, trees[release], by_formula)
        if not plan.rows or plan.lookup is None:
            continue
        sound(plan)
        proposed += 1
        workload = plan.decision.workload
        assert workload is not None
        for row in plan.rows:
            assert row.proposed is not None
            own = RowTiles(row.gate_up.tile, row.down.tile)
            if RowTiles(dataclasses.replace(own.gate_up, use_tma=False), own.down) != row.proposed:
                assert makes_sense(row.proposed.gate_up, workload, row.tokens)
                assert least_bytes(row.proposed.gate_up, workload) <= plan.card.shared_memory
            if release == "0.4.9":  # one file serves both projections
                assert row.proposed.gate_up == row.proposed.down
    assert proposed > 2


def test_small_batches_get_low_blocks(cases: Any, trees: dict[str, Tree]) -> None:
    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], by_formula, "")
    heights = {row.tokens: row.proposed.gate_up.block_m for row in plan.rows if row.proposed}
    assert heights[1] == 16
    assert heights[4096] >= 64
    assert heights[1] <= heights[256] <= heights[4096]


def test_a_shipped_file_that_fits_is_proposed_as_it_is(cases: Any, trees: dict[str, Tree]) -> None:
    plan = plan_of(cases["q3next_fp8_tp1_h200"], "H200", trees["0.5.17"], by_formula)
    assert plan.lookup is not None
    assert plan.lookup.found is Found.SHIPPED
    for row in plan.rows:
        assert row.source is Source.SHIPPED
        assert row.proposed == RowTiles(row.gate_up.tile, row.down.tile)


def test_a_shipped_file_that_does_not_fit_is_replaced(cases: Any, trees: dict[str, Tree]) -> None:
    card = with_shared_memory_limit(find_card("H200"), 40 << 10)
    plan = plan_of(cases["q3next_fp8_tp1_h200"], card, trees["0.5.17"], by_formula)
    assert plan.verdict is Verdict.OUT_OF_RESOURCES
    sound(plan)
    kept = {row.proposed == RowTiles(row.gate_up.tile, row.down.tile) for row in plan.rows if row.fits}
    assert kept == {True}
    assert not any(row.proposed == RowTiles(row.gate_up.tile, row.down.tile) for row in plan.rows if not row.fits)


def test_a_tiny_limit_is_met_or_said(cases: Any, trees: dict[str, Tree], tmp_path: Path) -> None:
    small = with_shared_memory_limit(find_card("RTX 4090"), 4096)
    sound(plan_of(cases[BLOG_POST], small, trees["0.5.17"], by_formula, ""))
    nothing = plan_of(cases[BLOG_POST], with_shared_memory_limit(small, 1024), trees["0.5.17"], by_formula, "")
    assert {row.proposed for row in nothing.rows} == {None}
    assert any("nothing fits for M = 1, 2," in note for note in nothing.notes)
    with pytest.raises(UsageError, match="no file to write"):
        write_plan(nothing, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_compile_does_not_fit_and_says_so(cases: Any, trees: dict[str, Tree]) -> None:
    def refusing(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
        failed = Compiled(CompileOutcome.FAILED, message="PTXASError: no")
        return {
            candidate: failed if candidate.tile.block_k == 256 else compiled
            for candidate, compiled in by_formula(candidates).items()
        }

    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], refusing, "")
    assert plan.verdict is Verdict.OUT_OF_RESOURCES
    assert plan.to_json()["rows"][0]["gate_up"]["shared_bytes"] is None
    assert plan.to_json()["rows"][0]["gate_up"]["fits"] is False
    assert any("PTXASError: no" in note for note in plan.notes)
    sound(plan)
    assert all(row.proposed and row.proposed.gate_up.block_k != 256 for row in plan.rows)


def test_few_kernels_are_compiled(cases: Any, trees: dict[str, Tree]) -> None:
    for case in cases.values():
        asked: list[Candidate] = []

        def counting(candidates: Iterable[Candidate], asked: list[Candidate] = asked) -> Mapping[Candidate, Compiled]:
            wanted = list(candidates)
            asked.extend(wanted)
            return by_formula(wanted)

        plan = plan_of(case, case["gpu"]["name"], trees["0.5.17"], counting)
        own = {tile for row in plan.rows for tile in ((1, row.gate_up.tile), (2, row.down.tile))}
        assert len(asked) == len(set(asked))
        assert len(asked) <= len(own) + 2 * 8, case["id"]


def test_the_cover_serves_every_row() -> None:
    a, b, c = Tile(16, 64, 64, 1), Tile(32, 64, 64, 1), Tile(64, 64, 64, 1)
    wanted = Offers({1: (a, b), 2: (b, a), 4: (b, c), 8: (c,), 16: ()})
    assert set(wanted.cover()) == {b, c}
    done: list[Tile] = []
    chosen = choose(wanted, done.extend, lambda tile: tile != b)
    assert chosen == {1: a, 2: a, 4: c, 8: c}
    assert len(done) == len(set(done)) == 3
    assert choose(wanted, done.extend, lambda _: False) == {}


def test_offers_keep_their_order_whatever_the_files_order(cases: Any, trees: dict[str, Tree]) -> None:
    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], None, "")
    workload = plan.decision.workload
    assert workload is not None
    files = list(trees["0.5.17"].shipped_files())
    first = offers(files, workload, plan.card, [1, 64, 4096])
    for tokens, tiles in offers(files[::-1], workload, plan.card, [1, 64, 4096]).rows.items():
        assert tiles[0] == first.rows[tokens][0]


# --- --write ---------------------------------------------------------------------------------------------------------


def copied(tree: Tree, folder: Path) -> Tree:
    shutil.copytree(tree.package, folder / "sglang")
    return Tree(folder / "sglang", tree.version, tree.triton)


@pytest.mark.parametrize("release", RELEASES)
def test_sglang_finds_what_was_written(cases: Any, trees: dict[str, Tree], tmp_path: Path, release: str) -> None:
    tree = copied(trees[release], tmp_path)
    plan = plan_of(cases[BLOG_POST], "RTX 4090", tree, by_formula, "")
    before = len(list(tree.shipped_files()))
    written = write_plan(plan, tree.triton_folder)
    workload = plan.decision.workload
    assert workload is not None
    lookup = tree.lookup(workload, plan.card)
    assert lookup.found is Found.SHIPPED
    assert lookup.gate_up_path == written[0]
    assert lookup.down_path == (None if release == "0.4.9" else written[1])
    choose_own = own_choices(tree, lookup, workload, plan.card)
    for row in plan.rows:
        choice = choose_own(row.tokens)
        assert RowTiles(choice.gate_up, choice.down) == row.proposed
    again = plan_of(cases[BLOG_POST], "RTX 4090", tree, by_formula, "")
    assert {row.source for row in again.rows} == {Source.SHIPPED}
    assert [row.proposed for row in again.rows] == [row.proposed for row in plan.rows]
    assert len(list(tree.shipped_files())) == before + len(written) - 1


# --- a compiler that fails -------------------------------------------------------------------------------------------


def test_a_crash_of_the_compiler_is_no_misfit(cases: Any, trees: dict[str, Tree]) -> None:
    tried: list[Candidate] = []

    def counting(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
        tried.extend(wanted := list(candidates))
        return crashing(wanted)

    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], counting, "")
    assert plan.verdict is Verdict.COMPILER_CRASHED
    assert plan.to_json()["verdict"] == "compiler_crashed"
    assert {(row.fits, row.gate_up.fits, row.gate_up.crashed, row.proposed) for row in plan.rows} == {
        (None, None, True, None)
    }
    assert plan.crash == "crashed: the compiler died"
    assert "whether SGLang's own fits at M = 1, " in verdict_line(plan)
    assert not any("nothing fits" in note or "does not compile" in note for note in plan.notes)
    assert any("is not known to fit: the compiler failed: crashed" in note for note in plan.notes)
    assert len(tried) <= 64  # it does not try every tile of the space on a compiler that dies of all


@pytest.mark.parametrize("message", ["OSError: [Errno 28] No space left on device", "MemoryError: "])
def test_a_full_disk_is_no_misfit_either(cases: Any, trees: dict[str, Tree], message: str) -> None:
    def full(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
        return {candidate: Compiled(CompileOutcome.FAILED, message=message) for candidate in candidates}

    assert plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], full, "").verdict is Verdict.COMPILER_CRASHED


def test_a_crash_on_sglangs_own_tile_alone_leaves_the_proposals(cases: Any, trees: dict[str, Tree]) -> None:
    own = {row.gate_up.tile for row in plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], None, "").rows}

    def picky(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
        wanted = list(candidates)
        return by_formula(wanted) | crashing(each for each in wanted if each.tile in own)

    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], picky, "")
    assert plan.verdict is Verdict.COMPILER_CRASHED
    sound(plan)


def test_a_tile_that_does_not_compile_is_a_misfit_still(cases: Any, trees: dict[str, Tree]) -> None:
    def refusing(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
        return {candidate: Compiled(CompileOutcome.FAILED, message="CompilationError: no") for candidate in candidates}

    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], refusing, "")
    assert plan.verdict is Verdict.OUT_OF_RESOURCES
    assert any("nothing fits for M = 1, " in note for note in plan.notes)


def test_the_sidecar(cases: Any, trees: dict[str, Tree], tmp_path: Path) -> None:
    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], by_formula, "")
    up, down, sidecar = write_plan(plan, tmp_path / "new" / "folder")
    assert plan.lookup is not None
    assert (up.name, down.name, sidecar.name) == (plan.lookup.gate_up, plan.lookup.down, sidecar_name(plan.lookup))
    assert not sidecar.name.endswith(".json")
    content = json.loads(sidecar.read_text())
    assert content["measured"] is False
    assert "not measured" in content["what"]
    assert content["files"] == [up.name, down.name]
    assert (content["card"], content["sglang"], content["triton"]) == (plan.card.name, "0.5.17", "3.6.0")
    assert content["shared_memory_per_block_optin"] == 101376
    assert content["date"].endswith("Z")
    assert list(read_rows(up)) == [row.tokens for row in plan.rows]


def test_a_folder_that_cannot_be_written(cases: Any, trees: dict[str, Tree], tmp_path: Path) -> None:
    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], by_formula, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        write_plan(plan, tmp_path / "file")


def test_a_file_that_would_stop_sglang_is_named(cases: Any, trees: dict[str, Tree], tmp_path: Path) -> None:
    tree = copied(trees["0.5.17"], tmp_path)
    plan = plan_of(cases[BLOG_POST], "RTX 4090", tree, by_formula, "")
    up = write_plan(plan, tree.triton_folder)[0]
    up.write_text("{half")
    with pytest.raises(SGLangError, match="would read"):
        plan_of(cases[BLOG_POST], "RTX 4090", tree, None, "")


def test_sources_of_all_kinds_are_reachable(cases: Any, trees: dict[str, Tree]) -> None:
    seen = {
        row.source
        for case, card in itertools.product(cases.values(), ["H100", "H200", "RTX 4090"])
        for row in plan_of(case, card, trees["0.5.17"], None).rows
    }
    assert seen == set(Source)


def test_a_plan_is_frozen(cases: Any, trees: dict[str, Tree]) -> None:
    plan = plan_of(cases[BLOG_POST], "RTX 4090", trees["0.5.17"], None, "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rows = ()  # type: ignore[misc]
