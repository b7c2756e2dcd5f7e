from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.workload import Tile

ROW = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 256,
    "GROUP_SIZE_M": 32,
    "num_warps": 8,
    "num_stages": 4,
}

tiles = st.builds(
    Tile,
    block_m=st.sampled_from([16, 32, 64, 128, 256]),
    block_n=st.sampled_from([32, 64, 128, 256]),
    block_k=st.sampled_from([32, 64, 128, 256]),
    group_m=st.integers(1, 64),
    num_warps=st.sampled_from([1, 2, 4, 8, 16]),
    num_stages=st.integers(1, 8),
    use_tma=st.booleans(),
)


@given(tiles)
def test_a_tile_comes_back_from_its_row(tile):
    assert Tile.from_json(tile.to_json()) == tile


def test_a_row_is_spelt_as_sglang_spells_it():
    assert Tile(64, 128, 256, 32, 8, 4).to_json() == ROW
    assert Tile(64, 128, 256, 32, 8, 4, use_tma=True).to_json() == ROW | {"USE_TMA": True}


def test_a_row_that_names_neither_warps_nor_stages_runs_with_tritons_defaults():
    row = {key: value for key, value in ROW.items() if key not in ("num_warps", "num_stages")}
    assert Tile.from_json(row) == Tile(64, 128, 256, 32, num_warps=4, num_stages=3)


def test_keys_for_other_cards_are_ignored():
    assert Tile.from_json(ROW | {"waves_per_eu": 2}) == Tile(64, 128, 256, 32, 8, 4)


@pytest.mark.parametrize("key", ["BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"])
def test_a_row_without_a_block_size_names_the_key(key):
    row = {name: value for name, value in ROW.items() if name != key}
    with pytest.raises(ValueError, match=f"^{key} is None"):
        Tile.from_json(row)


@pytest.mark.parametrize("key", list(ROW))
@pytest.mark.parametrize("value", [0, -16, 8192, True, "64", 64.0, None, [64]])
def test_a_senseless_value_names_the_key(key, value):
    with pytest.raises(ValueError, match=f"^{key} is {re.escape(repr(value))}, not a whole number from 1 to 4096$"):
        Tile.from_json(ROW | {key: value})


@pytest.mark.parametrize("key", ["BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps"])
def test_block_sizes_and_warps_are_powers_of_two(key):
    with pytest.raises(ValueError, match=f"{key}.*power"):
        Tile.from_json(ROW | {key: 48})


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_use_tma_is_true_or_false(value):
    with pytest.raises(ValueError, match=r"^USE_TMA is"):
        Tile.from_json(ROW | {"USE_TMA": value})


def test_a_tile_reads_well():
    assert str(Tile(64, 128, 256, 32, 8, 4)) == "64x128x256 group 32, 8 warps, 4 stages"
    assert str(Tile(64, 128, 256, 32, 8, 4, use_tma=True)).endswith(", TMA")
