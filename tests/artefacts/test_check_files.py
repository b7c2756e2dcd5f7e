"""Files that SGLang would stop at are moved aside before it reads them; what a release can read stays."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from fixer.artefacts.check_files import set_damaged_aside
from fixer.machine.cards import Card
from fixer.sglang.lookup import CONFIG_DIR_VARIABLE
from fixer.sglang.own_choices import own_choices
from fixer.sglang.tree import Tree
from fixer.workload import Projection, Tile, Workload

ADA = Card("NVIDIA GeForce RTX 4090", (8, 9), 101376, 24564)
LAYER = Workload(128, 768, 2048, 8)
ROW = Tile(16, 32, 64, 1, 4, 2)


@pytest.fixture
def tree_with(trees, tmp_path, monkeypatch):
    """Gives a copy of a release's tree with a gate-up and a down file, one row each."""
    monkeypatch.delenv(CONFIG_DIR_VARIABLE, raising=False)

    def make(version, gate_up, down):
        package = tmp_path / version / "sglang"
        shutil.copytree(trees[version].package, package)
        tree = Tree(package, version, trees[version].triton)
        for projection, tile in ((Projection.GATE_UP, gate_up), (Projection.DOWN, down)):
            path = tree.triton_folder / tree.file_name(LAYER, ADA, projection)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"16": tile.to_json()}))
        return tree

    return make


@pytest.mark.parametrize(("version", "moved"), [("0.5.17", True), ("0.5.18", False), ("0.5.23", False)])
def test_use_tma_in_a_gate_up_file_is_good_where_the_release_takes_it(tree_with, version, moved):
    tree = tree_with(version, replace(ROW, use_tma=True), ROW)
    bad = set_damaged_aside(tree, LAYER, ADA).bad
    assert [file.path.name for file in bad] == ([tree.file_name(LAYER, ADA, Projection.GATE_UP)] if moved else [])
    assert all("USE_TMA" in file.reason for file in bad)


@pytest.mark.parametrize(("version", "moved"), [("0.5.9", True), ("0.5.12.post1", True), ("0.5.17", False)])
def test_a_pair_at_whose_block_m_sglang_stops_loses_its_down_file(tree_with, version, moved):
    tree = tree_with(version, ROW, replace(ROW, block_m=64))
    vetted = set_damaged_aside(tree, LAYER, ADA)
    assert [file.path.name for file in vetted.bad] == ([tree.file_name(LAYER, ADA, Projection.DOWN)] if moved else [])
    assert not vetted.is_stuck
    left = tree.lookup(LAYER, ADA)
    assert own_choices(tree, left, LAYER, ADA)(1).down.block_m == ROW.block_m
    assert (left.down_path is None) == moved


def test_a_pair_that_agrees_stays(tree_with):
    tree = tree_with("0.5.9", ROW, replace(ROW, block_n=64))
    assert set_damaged_aside(tree, LAYER, ADA).bad == ()
