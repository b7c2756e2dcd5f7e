from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.base.errors import SGLangError
from fixer.machine.cards import Card
from fixer.sglang import find_tree as find_tree_module
from fixer.sglang.find_tree import fetched_tree, find_tree, tree_at
from fixer.sglang.lookup import BEFORE_MOEFIX, CONFIG_DIR_VARIABLE, LOOKUP_SOURCES
from fixer.sglang.own_choices import own_choices
from fixer.sglang.releases import PINNED, RELEASES
from fixer.sglang.tree import CALLERS, Found, Tree
from fixer.sglang.tuning_files import nearest_row, read_rows
from fixer.workload import NumberFormat, Projection, Tile, Workload

ADA = Card("NVIDIA GeForce RTX 4090", (8, 9), 101376, 24564)
HOPPER = Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 81559)
QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
BF16 = Workload(128, 768, 2048, 8)
BLOCK = Workload(256, 256, 7168, 8, NumberFormat.FP8_W8A8, block_shape=(128, 128))

ROW = Tile(16, 32, 64, 1, 4, 2)
UP, DOWN = Projection.GATE_UP, Projection.DOWN


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv(CONFIG_DIR_VARIABLE, raising=False)


@pytest.fixture
def own_tree(trees, tmp_path):
    """A copy of the pinned release's look-up, with tuning files of the test's own and none of SGLang's."""
    package = tmp_path / "sglang"
    for relative in (*LOOKUP_SOURCES, *CALLERS):
        source = trees["0.5.17"].package / relative
        if source.is_file():
            (package / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, package / relative)
    (package / find_tree_module.CONFIG_FOLDERS[0]).mkdir()
    return Tree(package, "0.5.17", "3.6.0")


def put(configs: Path, triton: str, name: str, rows: dict[int, Tile]) -> Path:
    path = configs / f"triton_{triton}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({str(key): tile.to_json() for key, tile in rows.items()}))
    return path


# --- file names


@pytest.mark.parametrize("version", ["0.5.17", "0.5.23"])
@pytest.mark.parametrize(
    ("workload", "card", "stem"),
    [
        (QWEN, ADA, "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8,per_channel_quant=True"),
        (BF16, HOPPER, "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3"),
        (BLOCK, HOPPER, "E=256,N=256,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128, 128]"),
        (
            Workload(64, 704, 2048, 6, NumberFormat.INT4_W4A16, group_size=128),
            ADA,
            "E=64,N=704,device_name=NVIDIA_GeForce_RTX_4090,dtype=int4_w4a16",
        ),
        (
            Workload(8, 14336, 4096, 2, NumberFormat.INT8_W8A8, per_channel_quant=True),
            ADA,
            "E=8,N=14336,device_name=NVIDIA_GeForce_RTX_4090,dtype=int8_w8a8,per_channel_quant=True",
        ),
        (
            Workload(8, 512, 4096, 2, NumberFormat.FLOAT32, activation_dtype="float32"),
            ADA,
            "E=8,N=512,device_name=NVIDIA_GeForce_RTX_4090,dtype=float32",
        ),
        (replace(BLOCK, block_shape=(0, 128)), ADA, "E=256,N=256,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8"),
    ],
)
def test_file_names_to_the_letter(trees, version, workload, card, stem):
    assert trees[version].file_name(workload, card, UP) == stem + ".json"
    assert trees[version].file_name(workload, card, DOWN) == stem + "_down.json"


def test_0_4_9_names_no_channel_and_reads_no_down_file(trees):
    tree = trees["0.4.9"]
    assert tree.file_name(QWEN, ADA, UP) == "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8.json"
    assert tree.file_name(QWEN, ADA, DOWN) == ""
    assert (
        tree.file_name(BLOCK, HOPPER, UP)
        == "E=256,N=256,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128, 128].json"
    )


@pytest.mark.parametrize("version", RELEASES)
def test_the_kernel_is_found_and_triton_is_the_releases(trees, version):
    tree = trees[version]
    assert (tree.version, tree.release, tree.triton) == (version, version, RELEASES[version].triton)
    assert "def fused_moe_kernel(" in tree.kernel_source.read_text("utf-8")


# --- the look-up


def test_the_running_tritons_folder_comes_first_then_the_newest_other_even_a_newer_one(own_tree):
    name = own_tree.file_name(QWEN, ADA, UP)
    order = ["3_6_0", "3_10_0", "3_9_0", "3_5_1", "3_1_0"]
    paths = [put(own_tree.configs, triton, name, {1: ROW}) for triton in order]
    for place, path in enumerate(paths):
        lookup = own_tree.lookup(QWEN, ADA)
        assert lookup.gate_up_path == path
        assert lookup.found is (Found.SHIPPED if place == 0 else Found.OTHER_TRITON)
        path.unlink()
    assert own_tree.lookup(QWEN, ADA).found is Found.NONE


def test_what_moefix_installed_under_another_triton_is_not_sglangs_own(own_tree):
    name = own_tree.file_name(QWEN, ADA, UP)
    ours = put(own_tree.configs, "3_5_1", name, {1: ROW})
    before = ours.with_name(name + BEFORE_MOEFIX)
    before.touch()
    assert own_tree.lookup(QWEN, ADA).gate_up_path == ours
    assert own_tree.lookup(QWEN, ADA, without_moefix=True).gate_up_path is None
    older = put(own_tree.configs, "3_1_0", name, {1: ROW})
    assert own_tree.lookup(QWEN, ADA, without_moefix=True).gate_up_path == older
    before.write_bytes(older.read_bytes())
    assert own_tree.lookup(QWEN, ADA, without_moefix=True).gate_up_path == before


def test_the_down_file_is_looked_up_on_its_own(own_tree):
    up = put(own_tree.configs, "3_2_0", own_tree.file_name(QWEN, ADA, UP), {1: ROW})
    down = put(own_tree.configs, "3_6_0", own_tree.file_name(QWEN, ADA, DOWN), {1: ROW})
    lookup = own_tree.lookup(QWEN, ADA)
    assert (lookup.gate_up_path, lookup.down_path, lookup.found) == (up, down, Found.OTHER_TRITON)


def test_a_shipped_file_is_found_in_the_real_tree(trees):
    workload = Workload(16, 14336, 4096, 2)
    path = trees["0.5.17"].lookup(workload, Card("NVIDIA A100-SXM4-80GB", (8, 0), 166912, 81920)).gate_up_path
    assert path is not None
    assert path.name == "E=16,N=14336,device_name=NVIDIA_A100-SXM4-80GB.json"
    assert path.is_relative_to(trees["0.5.17"].package)


def test_the_variable_replaces_the_whole_shipped_tree(own_tree, tmp_path, monkeypatch):
    name = own_tree.file_name(QWEN, ADA, UP)
    shipped = put(own_tree.configs, "3_6_0", name, {1: ROW})
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(tmp_path / "mine"))
    tree = replace(own_tree)  # what a tree knows of its folder is kept: look with a fresh one
    assert tree.lookup(QWEN, ADA).found is Found.NONE
    mine = put(tmp_path / "mine" / "configs", "3_1_0", name, {1: ROW})
    assert tree.lookup(QWEN, ADA).gate_up_path == mine
    assert tree.triton_folder == tmp_path / "mine" / "configs" / "triton_3_6_0"
    assert shipped.is_relative_to(tree.shipped_configs)


# --- what SGLang would run


def test_the_nearest_row_is_taken_and_the_files_order_breaks_ties():
    tiles = [replace(ROW, group_m=group) for group in (1, 2, 3)]
    rows = dict(zip((8, 16, 4), tiles, strict=True))
    assert nearest_row(rows, 12) is rows[8]
    assert nearest_row({16: tiles[1], 8: tiles[0]}, 12) is tiles[1]
    assert nearest_row(rows, 6) is rows[8]
    assert nearest_row(rows, 1) is rows[4]
    assert nearest_row(rows, 100_000) is rows[16]
    assert nearest_row(rows, 13) is rows[16]


def test_the_down_file_gets_the_gate_up_files_block_m(own_tree):
    up_path = put(own_tree.configs, "3_6_0", own_tree.file_name(QWEN, ADA, UP), {1: ROW, 64: replace(ROW, block_m=64)})
    down_tile = Tile(32, 128, 128, 16, 8, 3, use_tma=True)
    down_path = put(own_tree.configs, "3_6_0", own_tree.file_name(QWEN, ADA, DOWN), {1: down_tile})
    choose = own_choices(own_tree, own_tree.lookup(QWEN, ADA), QWEN, ADA)
    assert choose(1).gate_up == ROW
    assert choose(1).down == Tile(16, 128, 128, 16, 8, 3, use_tma=True)
    assert choose(63).gate_up.block_m == choose(63).down.block_m == 64
    assert choose(1).sources == (str(up_path), str(down_path))


def test_without_a_down_file_the_gate_up_rows_are_used_for_both(own_tree):
    path = put(own_tree.configs, "3_6_0", own_tree.file_name(QWEN, ADA, UP), {1: ROW})
    choice = own_choices(own_tree, own_tree.lookup(QWEN, ADA), QWEN, ADA)(7)
    assert (choice.gate_up, choice.down) == (ROW, ROW)
    assert choice.sources == (str(path), str(path))


def test_a_down_file_alone_runs_beside_the_default(own_tree):
    path = put(own_tree.configs, "3_6_0", own_tree.file_name(QWEN, ADA, DOWN), {1: ROW})
    choice = own_choices(own_tree, own_tree.lookup(QWEN, ADA), QWEN, ADA)(1)
    assert (choice.gate_up, choice.sources[0]) == (Tile(32, 64, 256, 1, 4, 4), "default")
    assert (choice.down, choice.sources[1]) == (replace(ROW, block_m=32), str(path))


@pytest.mark.parametrize(
    ("version", "card", "workload", "small", "large"),
    [
        ("0.4.9", ADA, QWEN, Tile(64, 128, 128, 1, 4, 4), Tile(128, 256, 128, 32, 8, 4)),
        ("0.4.9", HOPPER, QWEN, Tile(64, 128, 128, 1, 4, 4), Tile(128, 256, 128, 32, 8, 4)),
        ("0.5.17", ADA, QWEN, Tile(32, 64, 256, 1, 4, 4), Tile(64, 128, 256, 64, 4, 2)),
        ("0.5.23", ADA, QWEN, Tile(32, 64, 256, 1, 4, 4), Tile(64, 128, 256, 64, 4, 2)),
        ("0.5.17", HOPPER, QWEN, Tile(64, 128, 128, 1, 4, 4), Tile(128, 256, 128, 32, 8, 4)),
        ("0.5.17", ADA, BLOCK, Tile(64, 128, 128, 32, 4, 3), Tile(64, 128, 128, 32, 4, 3)),
        ("0.5.17", ADA, replace(BLOCK, block_shape=(64, 32)), Tile(64, 64, 32, 32), Tile(64, 64, 32, 32)),
        ("0.5.17", ADA, BF16, Tile(16, 32, 64, 1), Tile(64, 64, 32, 8)),
        (
            "0.5.23",
            HOPPER,
            replace(QWEN, number_format=NumberFormat.INT8_W8A8),
            Tile(16, 32, 64, 1),
            Tile(64, 64, 32, 8),
        ),
    ],
)
def test_defaults(trees, version, card, workload, small, large):
    tree = trees[version]
    choose = own_choices(tree, tree.lookup(workload, card).without_files, workload, card)
    for tokens, tile in ((1, small), (workload.experts, small), (workload.experts + 1, large), (8192, large)):
        choice = choose(tokens)
        assert (choice.gate_up, choice.down) == (tile, tile)
        assert choice.sources == ("default", "default")


# --- damaged files

DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b"null",
    b'"1"',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"1": []}',
    b'{"one": {}}',
    b'{"-1": {}}',
    b'{"1": {"BLOCK_SIZE_M": 16}}',
    b'{"1": {"BLOCK_SIZE_M": 17, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}}',
    b'{"1": {"BLOCK_SIZE_M": 1e9, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}}',
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_that_sglang_would_read_is_named(own_tree, content):
    path = put(own_tree.configs, "3_6_0", own_tree.file_name(QWEN, ADA, UP), {1: ROW})
    path.write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011 - the message is the parser's own
        read_rows(path)
    with pytest.raises(SGLangError) as caught:
        own_choices(own_tree, own_tree.lookup(QWEN, ADA), QWEN, ADA)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_damaged_and_foreign_files_are_no_seeds(own_tree):
    device = ",device_name=NVIDIA_H100_80GB_HBM3"
    good = put(own_tree.configs, "3_6_0", f"E=8,N=16{device}.json", {1: ROW, 2: ROW})
    down = put(own_tree.configs, "3_5_1", f"E=8,N=16{device},dtype=fp8_w8a8,block_shape=[128, 64]_down.json", {1: ROW})
    put(own_tree.configs, "3_6_0", f"E=8,N=16{device},dtype=mxfp4.json", {1: ROW})
    put(own_tree.configs, "3_6_0", "E=8,N=16,device_name=AMD_Instinct_MI300X.json", {1: ROW})
    put(own_tree.configs, "3_6_0", f"E=8,N=17{device}.json", {1: ROW}).write_text("{")
    files = list(own_tree.shipped_files())
    assert [file.path for file in files] == [down, good]
    assert (files[0].projection, files[0].block_shape, files[0].number_format) == (
        DOWN,
        (128, 64),
        NumberFormat.FP8_W8A8,
    )
    assert files[1].rows == {1: ROW, 2: ROW}
    assert files[1].device == "NVIDIA_H100_80GB_HBM3"


# --- finding a tree


def package_at(folder: Path, version: str = "0.5.17") -> Path:
    (folder / "srt").mkdir(parents=True)
    (folder / "version.py").write_text(f'__version__ = "{version}"\n')
    return folder


@pytest.mark.parametrize("layout", ["", "sglang", "python/sglang"])
def test_a_root_is_a_package_its_parent_or_a_checkout(tmp_path, layout):
    package = package_at(tmp_path / layout)
    tree = find_tree(str(tmp_path), None, tmp_path / "cache")
    assert tree.package == package.resolve()
    assert tree.version == "0.5.17"


@pytest.mark.parametrize("version", RELEASES)
def test_a_fetched_tree_is_found_by_its_root(trees, version, tmp_path):
    tree = find_tree(str(trees[version].package), None, tmp_path)
    assert (tree.package, tree.version) == (trees[version].package.resolve(), version)


def test_a_wrong_folder_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SGLangError, match="There is no SGLang in") as caught:
            find_tree(str(folder), None, tmp_path)
        assert str(folder) in caught.value.message
        assert "--sglang-root" in caught.value.hint


def test_a_package_that_does_not_say_its_version(tmp_path, monkeypatch):
    def absent(name):
        raise find_tree_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(find_tree_module.importlib.metadata, "version", absent)
    (tmp_path / "srt").mkdir()
    with pytest.raises(SGLangError, match="does not say which version it is"):
        tree_at(tmp_path)


def test_a_package_without_kernel_or_files(tmp_path):
    tree = tree_at(package_at(tmp_path))
    with pytest.raises(SGLangError, match="has no fused_moe_kernel"):
        _ = tree.kernel_source
    with pytest.raises(SGLangError, match="lacks the look-up"):
        _ = tree.configs
    with pytest.raises(SGLangError, match="lacks the look-up"):
        tree.file_name(QWEN, ADA, UP)


def test_an_unknown_release_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(SGLangError) as caught:
        find_tree(None, "0.5.99", tmp_path)
    assert caught.value.message.startswith("moefix cannot fetch SGLang 0.5.99: it knows 0.4.6.post5, 0.4.8.post1, ")
    assert "--sglang-root" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_nothing_installed_and_nothing_to_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(find_tree_module, "installed_tree", lambda: None)
    with pytest.raises(SGLangError, match="not installed"):
        find_tree(None, None, tmp_path, fetch=False)


def test_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = package_at(tmp_path / "site" / "sglang", "0.5.20")
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    tree = find_tree(None, None, tmp_path / "cache", fetch=False)
    assert (tree.package, tree.version) == (package.resolve(), "0.5.20")
    assert find_tree(None, "0.5.20", tmp_path / "cache", fetch=False) == tree
    assert tree.triton == importlib.metadata.version("triton")


# --- fetching


def test_a_fetched_tree_comes_from_the_cache_the_second_time(trees, monkeypatch):
    def no_pip(*args):
        raise AssertionError("pip was asked again")

    monkeypatch.setattr(find_tree_module, "_fetch", no_pip)
    for version, tree in trees.items():
        assert fetched_tree(version, tree.package.parents[2]) == tree
    monkeypatch.setattr(find_tree_module, "installed_tree", lambda: None)
    assert find_tree(None, None, trees[PINNED].package.parents[2]).version == PINNED


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(RELEASES, "0.4.9", replace(RELEASES["0.4.9"], wheel_sha256="0" * 64))
    with pytest.raises(SGLangError) as caught:
        fetched_tree("0.4.9", tmp_path)
    assert caught.value.message.startswith("pip could not fetch SGLang 0.4.9: ")
    assert "\n" not in caught.value.message
    assert [path for path in tmp_path.rglob("*") if path.name != "trees"] == []


def test_an_unreachable_index_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SGLangError) as caught:
        fetched_tree("0.4.9", tmp_path)
    assert "sglang==0.4.9" in caught.value.message
    assert "PyPI" in caught.value.hint


def test_two_processes_that_fetch_at_once_leave_one_tree(trees, tmp_path, monkeypatch):
    """The slower one finds the faster one's tree in its way, and uses it."""
    release = RELEASES["0.5.17"]
    wheel = tmp_path / "sglang.whl"
    with find_tree_module.zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sglang/version.py", '__version__ = "0.5.17"\n')
        archive.writestr("sglang/huge_and_unwanted.py", "")
    home = tmp_path / "trees" / f"0.5.17-{release.wheel_sha256[:12]}"

    def download(release, scratch):
        home.mkdir(parents=True)
        (home / "complete").write_text("the faster one's\n")
        return wheel

    monkeypatch.setattr(find_tree_module, "_download", download)
    assert fetched_tree("0.5.17", tmp_path).package == home / "sglang"
    assert (home / "complete").read_text() == "the faster one's\n"
    assert list((tmp_path / "trees").iterdir()) == [home]


def test_only_what_is_read_is_unpacked(trees):
    for tree in trees.values():
        files = [path for path in tree.package.rglob("*") if path.is_file()]
        assert all(path.suffix in (".py", ".json") for path in files)
        assert sum(path.suffix == ".py" for path in files) <= 500  # of thousands


@pytest.mark.parametrize(("version", "taken"), [("0.4.9", ""), ("0.5.17", "down"), ("0.5.23", "gate_up down")])
def test_who_takes_descriptors_is_read_off_the_tree(trees, version, taken):
    assert trees[version].takes_descriptors == {Projection(name) for name in taken.split()}


def test_a_layer_that_cannot_be_read_takes_no_descriptors_for_down(trees, tmp_path):
    shutil.copytree(trees["0.5.17"].package, tmp_path / "sglang")
    tree = Tree(tmp_path / "sglang", "0.5.17", "3.6.0")
    for path in tree.package.glob("srt/layers/moe/**/fused_moe.py"):
        path.write_text(path.read_text().replace("down_config.pop", "down_config.get"))
    assert tree.takes_descriptors == frozenset()
