"""SGLang's own look-up, cut out of every release: names, folders, found files, tiles, and what is not known."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.base.errors import SGLangError
from fixer.families.fused_moe.arguments import LaunchContext, Product, launch_arguments, operands
from fixer.kernel.source import KERNELS, read_kernel_source
from fixer.machine.cards import Card, find_card
from fixer.model.config import load_model
from fixer.plan.make_plan import make_plan
from fixer.sglang.cut import UnknownFormError
from fixer.sglang.flags import parse_flags
from fixer.sglang.lookup import CALLER, CONFIG_DIR_VARIABLE, LookupStopsError, OwnLookup, lookup_source
from fixer.sglang.own_choices import own_choices
from fixer.sglang.releases import NEWEST, RELEASES
from fixer.sglang.tree import Found, Tree
from fixer.workload import NumberFormat, Projection, Tile, Workload

DATA = Path(__file__).resolve().parents[1] / "data" / "releases"
ORACLES = {path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("0.*.json"))}
CONFIGS = json.loads((DATA / "configs.json").read_text())

ADA = Card("NVIDIA GeForce RTX 4090", (8, 9), 101376, 24564)
HOPPER = Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 81559)
QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
BF16 = Workload(128, 768, 2048, 8)
ROW = Tile(16, 32, 64, 1, 4, 2)
UP, DOWN = Projection.GATE_UP, Projection.DOWN


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv(CONFIG_DIR_VARIABLE, raising=False)


@pytest.fixture
def bare(trees, tmp_path):
    """Gives a copy of a release's look-up without its tuning files, and with changes to its source."""

    def make(version: str, changes: tuple[tuple[str, str], ...] = ()) -> Tree:
        package = tmp_path / version / "sglang"
        known = trees[version]
        for path in {lookup_source(known.package), lookup_source(known.package).parent / CALLER, known.kernel_source}:
            copied = package / path.relative_to(known.package)
            copied.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text("utf-8")
            for old, new in changes:
                text = text.replace(old, new)
            copied.write_text(text)
        (lookup_source(package).parent / "configs").mkdir()
        return Tree(package, version, known.triton)

    return make


def put(tree: Tree, triton: str, name: str, rows: dict[int, Tile]) -> Path:
    path = tree.shipped_configs / f"triton_{triton}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({str(key): tile.to_json() for key, tile in rows.items()}))
    return path


def at_least(version: str, since: str) -> bool:
    order = list(RELEASES)
    return order.index(version) >= order.index(since)


# --- the answers of the releases' own functions, worked out from their wheels by another program

NOT_YET = {("0.4.6.post5", "dsv3-tp8"), *((version, "triton-kernel-moe") for version in ("0.4.9.post6", "0.5.2"))}
"""The model and its number format are taken for something else: the rules for these are not the look-up's."""

CASES = [(version, case) for version, oracle in ORACLES.items() for case in oracle["cases"]]


@pytest.mark.parametrize(("version", "case"), CASES, ids=[f"{version}-{case['name']}" for version, case in CASES])
def test_a_plan_says_what_the_release_says(request, trees, tmp_path, version, case):
    if (version, case["name"]) in NOT_YET:
        request.applymarker(pytest.mark.xfail(strict=True, reason="a rule for the model or its number format"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[case["config"]]))
    flags = parse_flags([*case["flags"], f"--model-path={tmp_path}"])
    model, oracle = load_model("", flags), ORACLES[version]
    for card, *expected in case["cards"]:
        plan = make_plan(model, flags, find_card(card), trees[version])
        if len(expected) == 1:
            assert plan.decision.outcome.value != expected[0], card
            continue
        name, found, curve = expected
        assert plan.lookup is not None, card
        down = name.replace(".json", "_down.json") if oracle["facts"]["layout"] == "pair" else ""
        triton = "/triton_" + oracle["facts"]["triton"].replace(".", "_")
        folder = "configs" + (triton if oracle["facts"]["triton_folders"] else "")
        assert (plan.lookup.gate_up, plan.lookup.down) == (name, down), card
        assert (plan.lookup.folder, plan.lookup.found.value) == (folder, found), card
        rows = {str(row.tokens): [numbers(row.gate_up.tile), numbers(row.down.tile)] for row in plan.rows}
        assert {tokens: rows.get(tokens) for tokens in oracle["tiles"][curve]} == oracle["tiles"][curve], card


def numbers(tile: Tile) -> list[int]:
    return [tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.num_warps, tile.num_stages]


# --- what each release does, and since when


@pytest.mark.parametrize("version", RELEASES)
def test_where_things_change(trees, version):
    tree = trees[version]
    assert tree.reads_down_file == at_least(version, "0.5.4.post3")
    assert tree.reads_config_dir_variable == at_least(version, "0.5.3.post3")
    assert tree.takes_gate_up_tma == at_least(version, "0.5.18")
    folder = "triton_" + RELEASES[version].triton.replace(".", "_")
    flat = version == "0.4.6.post5"
    assert tree.triton_folder == (tree.shipped_configs if flat else tree.shipped_configs / folder)
    assert tree.configs == tree.shipped_configs
    assert tree.shipped_configs.is_relative_to(tree.package)
    assert tree.guess == ""


@pytest.mark.parametrize("version", RELEASES)
def test_names_to_the_letter(trees, version):
    tree = trees[version]
    stem = "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8"
    # The caller hands the argument on from 0.5.6 only, though the parameter is older.
    stem += ",per_channel_quant=True" if at_least(version, "0.5.6.post2") else ""
    assert tree.file_name(QWEN, ADA, UP) == stem + ".json"
    assert tree.file_name(QWEN, ADA, DOWN) == (stem + "_down.json" if tree.reads_down_file else "")


@pytest.mark.parametrize("version", RELEASES)
def test_a_shipped_file_is_found_by_what_its_name_says(trees, version):
    """0.5.1 to 0.5.11 look through a fixed list of Triton versions, which leaves out folders that they ship."""
    tree, found, missed = trees[version], 0, []
    for file in tree.shipped_files():
        if file.projection is DOWN:
            continue
        workload = Workload(file.experts, file.intermediate, 1024, 8, file.number_format)
        workload = replace(workload, block_shape=file.block_shape, per_channel_quant=file.per_channel_quant)
        path = tree.lookup(workload, Card(file.device, (9, 0), 0, 0)).gate_up_path
        found += path is not None
        if path is None:
            missed.append(file.path.parent.name + "/" + file.path.name)
    assert found >= 125
    between = at_least(version, "0.5.1.post3") and not at_least(version, "0.5.12.post1")
    assert len(missed) == {"0.5.11": 84}.get(version, int(between)), missed


BIG, SMALL = Tile(128, 256, 128, 32, 8, 4), Tile(64, 128, 256, 64, 4, 2)


@pytest.mark.parametrize(
    ("version", "low", "high"), [("0.4.9", BIG, BIG), ("0.5.13.post1", BIG, BIG), ("0.5.14", SMALL, BIG)]
)
def test_the_default_goes_by_the_cards_shared_memory_from_0_5_14(trees, version, low, high):
    tree = trees[version]
    for card, tile in ((ADA, low), (HOPPER, high)):
        lookup = tree.lookup(QWEN, card).without_files
        assert own_choices(tree, lookup, QWEN, card)(8192).gate_up == tile


def test_a_file_of_another_triton_is_found_by_the_releases_own_order(bare):
    """Up to 0.5.11 a fixed list of versions, the newest first; then every folder."""
    fixed, every = bare("0.5.11"), bare("0.5.12.post1")
    name = fixed.file_name(BF16, ADA, UP)
    for tree in (fixed, every):
        for triton in ("3_5_1", "3_9_0"):
            put(tree, triton, name, {1: ROW})
    assert fixed.lookup(BF16, ADA).found is Found.NONE
    assert every.lookup(BF16, ADA).gate_up_path.parent.name == "triton_3_9_0"
    old = put(fixed, "3_3_1", name, {1: ROW})
    assert fixed.lookup(BF16, ADA).gate_up_path == old
    assert fixed.lookup(BF16, ADA).found is Found.OTHER_TRITON


def test_a_folder_that_stops_sglang_is_said(bare):
    tree = bare("0.5.17")
    (tree.shipped_configs / "triton_cpu").mkdir()
    with pytest.raises(LookupStopsError, match=r"stops for M = 1: ValueError: .*'cpu'") as caught:
        tree.lookup(BF16, ADA)
    assert str(tree.shipped_configs) in caught.value.hint
    old = bare("0.5.11")
    (old.shipped_configs / "triton_cpu").mkdir()
    assert old.lookup(BF16, ADA).found is Found.NONE


@pytest.mark.parametrize(("version", "stops"), [("0.5.4.post3", True), ("0.5.12.post1", True), ("0.5.13.post1", False)])
def test_a_pair_that_differs_in_block_m(bare, version, stops):
    tree = bare(version)
    triton = tree.triton.replace(".", "_")
    put(tree, triton, tree.file_name(BF16, ADA, UP), {1: ROW})
    put(tree, triton, tree.file_name(BF16, ADA, DOWN), {1: replace(ROW, block_m=64)})
    choose = own_choices(tree, tree.lookup(BF16, ADA), BF16, ADA)
    if stops:
        with pytest.raises(LookupStopsError, match="AssertionError"):
            choose(1)
    else:
        assert choose(1).down.block_m == ROW.block_m


def test_use_tma_of_a_gate_up_row_serves_the_down_product_too_where_it_has_no_file(bare):
    """0.5.17 and newer take the gate-up file for both, and then USE_TMA out of each."""
    tree = bare("0.5.23")
    put(tree, "3_8_0", tree.file_name(BF16, ADA, UP), {1: replace(ROW, use_tma=True)})
    choice = own_choices(tree, tree.lookup(BF16, ADA), BF16, ADA)(1)
    assert (choice.gate_up.use_tma, choice.down.use_tma) == (True, True)
    old = bare("0.5.9")
    put(old, "3_5_1", old.file_name(BF16, ADA, UP), {1: replace(ROW, use_tma=True)})
    assert not own_choices(old, old.lookup(BF16, ADA), BF16, ADA)(1).down.use_tma


def test_the_variable_takes_the_place_of_sglangs_folder(bare, tmp_path, monkeypatch):
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(tmp_path / "mine"))
    joint, old = bare("0.5.3.post3"), bare("0.5.2")
    assert joint.triton_folder == tmp_path / "mine" / "configs" / "triton_3_4_0"
    assert joint.shipped_configs.is_relative_to(joint.package)
    assert old.triton_folder == old.shipped_configs / "triton_3_4_0"


@pytest.mark.parametrize("version", ["0.5.4.post3", "0.5.9", "0.5.17", "0.5.23"])
def test_deterministic_inference_has_one_tile(trees, version):
    assert trees[version].deterministic_tile(QWEN, ADA) == Tile(64, 64, 32, 8)


def test_packed_weights_and_their_groups_reach_the_look_up(trees):
    packed = Workload(64, 704, 2048, 6, NumberFormat.INT4_W4A16, group_size=128)
    name = trees["0.5.17"].file_name(packed, ADA, UP)
    assert name == "E=64,N=704,device_name=NVIDIA_GeForce_RTX_4090,dtype=int4_w4a16.json"


# --- what is not known


def unknown_forms(tree: Tree) -> list[str]:
    """What of a release moefix does not know, one line each."""
    found = []
    try:
        lookup = OwnLookup.of(tree.package)
        assert lookup.guess == ""
        tree.lookup(QWEN, ADA)
    except SGLangError as fault:
        found.append(fault.message)
    try:
        source = read_kernel_source(tree.kernel_source)
    except SGLangError as fault:
        return [*found, fault.message]
    packed = Workload(8, 64, 128, 2, NumberFormat.INT4_W4A16, group_size=32)
    for name, workload in zip(KERNELS, (QWEN, packed), strict=True):
        parameters = parameters_of(source.text, name)
        product, tile = Product(workload, UP, 16), Tile(16, 64, 64, 1)
        try:
            launch_arguments(parameters, product, tile, operands(product, tile, 64), LaunchContext(89, None))
        except SGLangError as fault:
            found.append(fault.message)
    return found


def parameters_of(text: str, name: str) -> list[str]:
    (function,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == name]
    return [argument.arg for argument in function.args.args]


@pytest.mark.parametrize("version", RELEASES)
def test_nothing_in_a_release_is_unknown(trees, version):
    """For a new release: add its line to the table, and read here what of it moefix does not know."""
    assert unknown_forms(trees[version]) == []


NEW_FORMS = [
    ("def get_default_config(", "def get_first_config(", "it lacks get_default_config"),
    (
        "device_name = get_device_name()",
        "device_name = name_of_card()",
        "get_config_file_name uses name_of_card",
    ),
    (
        "    config, (down_config, _) = try_get",
        "    for _ in (1,): config, (down_config, _) = try_get",
        "no function calls",
    ),
    ("is not None or _use_aiter", "is not None or use_new_thing", "_prepare_fused_moe_run uses use_new_thing"),
    ("return_down_config=True,", "return_down_config=True, new_argument=1,", "its look-up ends with TypeError"),
    ("triton.__version__", "triton.version.number", "its look-up ends with AttributeError"),
    ("    config_dir = os.environ", "    import subprocess\n    config_dir = os.environ", "ends with ImportError"),
    ("return config, (down_config, max_block_m)", "return [config]", "stops for M = 1: ValueError"),
]


@pytest.mark.parametrize(("old", "new", "said"), NEW_FORMS)
def test_what_a_new_release_has_that_moefix_does_not_know(bare, old, new, said):
    tree = bare(NEWEST, ((old, new),))
    with pytest.raises(UnknownFormError, match=f"not known to moefix: .*({said})") as caught:
        tree.lookup(QWEN, ADA)
    assert caught.value.exit_code == 5
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_a_kernel_argument_that_is_not_known_is_named(bare):
    tree = bare(NEWEST, (("    even_Ks: tl.constexpr,", "    even_Ks: tl.constexpr,\n    BRAND_NEW: tl.constexpr,"),))
    assert any("BRAND_NEW" in line for line in unknown_forms(tree))


def test_a_look_up_that_is_not_known_is_guessed_by_the_nearest_release_and_marked(bare, trees):
    renamed = bare(NEWEST, (("def get_default_config(", "def get_first_config("),))
    tree = replace(renamed, nearest=lambda: trees["0.5.22"])
    assert tree.lookup(QWEN, ADA) == trees["0.5.22"].lookup(QWEN, ADA) or tree.lookup(QWEN, ADA).found is Found.NONE
    assert tree.triton_folder.is_relative_to(tree.package)  # the other's rules, this one's files
    assert "lacks get_default_config" in tree.guess
    assert tree.guess.endswith("Guessed by the rules of SGLang 0.5.22.")


def test_a_guess_is_in_the_plans_notes(bare, trees, models):
    renamed = bare(NEWEST, (("def get_default_config(", "def get_first_config("),))
    tree = replace(renamed, nearest=lambda: trees["0.5.22"])
    flags = parse_flags([f"--model-path={models['q3_30b_bf16_tp1_h100']}"])
    plan = make_plan(load_model("", flags), flags, HOPPER, tree)
    assert any("Guessed by the rules of SGLang 0.5.22" in note for note in plan.notes)


def test_there_is_no_guess_without_a_tree_to_guess_by(bare):
    def none() -> Tree:
        raise SGLangError("not in the cache")

    tree = replace(bare(NEWEST, (("def get_default_config(", "def get_first_config("),)), nearest=none)
    with pytest.raises(UnknownFormError, match="it lacks get_default_config"):
        tree.lookup(QWEN, ADA)


def test_a_look_up_that_moved_to_another_file_is_found(bare):
    tree = bare("0.5.17")
    source = lookup_source(tree.package)
    moved = source.parent.parent / "elsewhere"
    shutil.move(source.parent, moved)
    (moved / source.name).rename(moved / "new_name.py")
    assert lookup_source(tree.package) == moved / "new_name.py"
    assert tree.triton_folder == moved / "configs" / "triton_3_6_0"


def test_only_the_look_up_runs(bare):
    tree = bare("0.5.17")
    source = lookup_source(tree.package)
    source.write_text("raise SystemExit('imported')\n" + source.read_text() + "\nimport os\nos.abort()\n")
    assert tree.lookup(QWEN, ADA).found is Found.NONE
