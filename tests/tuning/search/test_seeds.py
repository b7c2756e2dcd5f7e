from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.families.fused_moe.seeds import RELATED
from fixer.kernel.space import Space
from fixer.machine.cards import Card
from fixer.sglang.tree import TuningFile
from fixer.tuning.search.seeds import anchors, seeds
from fixer.workload import NumberFormat, Projection, Tile, Workload
from tests.support.moe_space import AXES

ADA = Card("NVIDIA GeForce RTX 4090", (8, 9), 101376, 24564)
HOPPER = Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 81559)
QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
BF16 = Workload(128, 768, 2048, 8)
BLOCK = Workload(256, 256, 7168, 8, NumberFormat.FP8_W8A8, block_shape=(128, 128))

TILES = [Tile(16, 32, 64, 1, 4, stages) for stages in (2, 3, 4, 5)]


def file(*tiles, device="NVIDIA_A100-SXM4-80GB", **changes):
    plain = TuningFile(Path("x"), device, 128, 768, NumberFormat.NONE, None, False, Projection.GATE_UP, {})
    return replace(plain, rows=dict(enumerate(tiles, start=1)), **changes)


@pytest.fixture(scope="module")
def shipped(trees):
    return list(trees["0.5.17"].shipped_files())


# --- with files of the test's own


def test_the_most_frequent_come_first_each_once():
    a, b, c, _ = TILES
    assert seeds([file(a, b, b), file(b, c, c, a)], BF16, HOPPER) == (b, a, c)


def test_a_tie_is_broken_by_the_tile_itself():
    assert seeds([file(*reversed(TILES))], BF16, HOPPER) == tuple(TILES)


def test_the_order_of_the_files_does_not_matter(shipped):
    shuffled = random.Random(1).sample(shipped, len(shipped))
    for workload in (QWEN, BF16, BLOCK):
        # weights are sums of fractions: the head of the list must not hang on the order of the additions
        assert set(seeds(shuffled, workload, HOPPER)) == set(seeds(shipped, workload, HOPPER))
        assert seeds(shuffled, workload, HOPPER)[:10] == seeds(shipped, workload, HOPPER)[:10]


def test_the_same_cards_winners_come_before_its_relatives_and_these_before_others():
    own, relative, stranger, _ = TILES
    files = [
        file(stranger, device="NVIDIA_A100-SXM4-80GB"),
        file(relative, device="NVIDIA_H200"),
        file(own, device="NVIDIA_H100_80GB_HBM3"),
    ]
    assert seeds(files, BF16, HOPPER) == (own, relative, stranger)
    ada = [file(stranger, device="NVIDIA_H200"), file(own, device="NVIDIA_L40S")]
    assert seeds(ada, BF16, ADA) == (own, stranger)


def test_nearer_shapes_come_first():
    near, far, farther, _ = TILES
    files = [file(farther, experts=8, intermediate=14336), file(far, experts=256), file(near)]
    assert seeds(files, BF16, HOPPER) == (near, far, farther)


def test_a_related_formats_winners_only_fill_up():
    own, foreign, unrelated, _ = TILES
    files = [
        file(*[foreign] * 9, number_format=NumberFormat.INT8_W8A8),
        file(own, number_format=NumberFormat.FP8_W8A8, per_channel_quant=True),
        file(unrelated),
    ]
    assert seeds(files, QWEN, HOPPER) == (own, foreign)


def test_block_wise_files_are_relatives_of_the_others():
    own, foreign, _, _ = TILES
    files = [
        file(*[foreign] * 9, number_format=NumberFormat.FP8_W8A8),
        file(own, number_format=NumberFormat.FP8_W8A8, block_shape=(128, 128)),
    ]
    assert seeds(files, BLOCK, HOPPER) == (own, foreign)
    assert seeds(files, QWEN, HOPPER) == (foreign, own)


def test_what_is_not_allowed_is_left_out_and_tma_is_taken_off():
    tma, spilling, deep = replace(TILES[0], use_tma=True), Tile(128, 256, 64, 1, 4, 3), Tile(16, 32, 256, 1, 4, 2)
    files = [file(tma, spilling, deep, number_format=NumberFormat.FP8_W8A8, block_shape=(128, 128))]
    assert seeds(files, BLOCK, HOPPER) == (TILES[0],)


def test_extra_ones_come_first_in_their_own_order():
    a, b, c, d = TILES
    spilling = Tile(128, 256, 64, 1, 4, 3)
    assert seeds([file(b, b, c)], BF16, HOPPER, extra=(d, spilling, c, a)) == (d, c, a, b)
    assert seeds([], BF16, HOPPER) == ()


# --- with the files that SGLang ships


@pytest.mark.parametrize("workload", [QWEN, BF16, BLOCK], ids=["fp8", "bf16", "fp8-block"])
def test_there_are_64_and_all_are_allowed(shipped, workload):
    ranked = seeds(shipped, workload, HOPPER)
    assert len(ranked) >= 64
    assert len(set(ranked)) == len(ranked)
    assert all(Space(workload).allows(tile) for tile in ranked)
    assert ranked == seeds(shipped, workload, HOPPER)


@pytest.mark.parametrize("number_format", list(NumberFormat))
def test_every_format_has_a_start_though_few_or_no_files_are_its_own(shipped, number_format):
    workload = Workload(64, 1408, 2048, 6, number_format)
    own = {tile for file_ in shipped if file_.number_format is number_format for tile in file_.rows.values()}
    ranked = seeds(shipped, workload, ADA)
    assert len(ranked) >= 64
    assert number_format in RELATED
    if number_format is NumberFormat.FLOAT32:
        assert not own


def test_another_format_starts_elsewhere(shipped):
    heads = [set(seeds(shipped, workload, HOPPER)[:32]) for workload in (QWEN, BF16)]
    assert len(heads[0] & heads[1]) < 24


def test_the_card_changes_the_order(shipped):
    assert seeds(shipped, BF16, HOPPER) != seeds(shipped, BF16, ADA)
    assert set(seeds(shipped, BF16, HOPPER)) == set(seeds(shipped, BF16, ADA))


@pytest.mark.parametrize("block_m", AXES["block_m"])
@pytest.mark.parametrize("number_format", list(NumberFormat))
def test_every_height_has_plain_configurations_to_begin_with(number_format, block_m):
    tiles = anchors(replace(BF16, number_format=number_format), block_m)
    assert len(tiles) >= 2
    assert {tile.block_m for tile in tiles} == {block_m}
    assert all(Space(BF16).allows(tile) for tile in tiles)
    assert all(tile.block_k in (64, 128) for tile in anchors(BLOCK, block_m))
