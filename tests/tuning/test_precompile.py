from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.families.fused_moe.arguments import Product, padded_tokens
from fixer.kernel.cache import server_triton_cache
from fixer.tuning.precompile import server_candidates
from fixer.workload import BOTH, Projection, RowTiles, Tile, Workload

SMALL = RowTiles(Tile(16, 64, 128, 1, 4, 4), Tile(16, 128, 128, 1, 4, 3))
LARGE = RowTiles(Tile(64, 128, 64, 16, 8, 3), Tile(64, 128, 64, 16, 8, 3))
LAYER = Workload(8, 64, 128, 2)


def launch(workload, rows, projection, tokens):
    """What Triton compiles one launch for: the tile, and of each whole-number argument whether it is 1 or 16 n.

    Worked out from SGLang's call (`num_tokens_post_padded` is a tensor; `EM` and `num_valid_tokens` are numbers) and
    from 0.5.23's flag for few rows.
    """
    nearest = min(rows, key=lambda row: abs(row - tokens))
    tile = rows[nearest].gate_up if projection is Projection.GATE_UP else rows[nearest].down
    length = padded_tokens(workload, tokens, tile.block_m)
    valid = tokens * workload.top_k
    product = Product(workload, projection, tokens)
    return (projection, tile, *((number == 1, number % 16 == 0) for number in (length, valid)), product.rows <= 512)


def all_launches(workload, rows, most):
    return {launch(workload, rows, projection, tokens) for projection in BOTH for tokens in range(1, most + 1)}


@settings(max_examples=60, deadline=None)
@given(
    experts=st.sampled_from([1, 2, 7, 8, 60, 128]),
    top_k=st.integers(1, 9),
    most=st.integers(1, 700),
    borders=st.sets(st.integers(1, 700), min_size=1, max_size=6),
    heights=st.lists(st.sampled_from([SMALL, LARGE]), min_size=6, max_size=6),
)
def test_every_launch_of_the_server_is_covered(experts, top_k, most, borders, heights):
    workload = Workload(experts, 64, 128, min(top_k, experts))
    rows = dict(zip(sorted(borders), heights, strict=False))
    candidates = server_candidates(workload, rows, most)
    covered = {launch(workload, rows, candidate.projection, candidate.tokens) for candidate in candidates}
    assert covered == all_launches(workload, rows, most)
    for candidate in candidates:
        assert candidate.tile == launch(workload, rows, candidate.projection, candidate.tokens)[1]


def test_there_are_no_more_than_there_are_launches():
    rows = {1: SMALL, 64: LARGE}
    candidates = server_candidates(LAYER, rows, 4096)
    assert len(set(candidates)) == len(candidates) == len(all_launches(LAYER, rows, 4096))
    assert len(candidates) < 30  # each costs a compilation


def test_a_row_that_no_token_count_is_nearest_to_is_not_compiled():
    candidates = server_candidates(LAYER, {1: SMALL, 4096: LARGE}, 100)
    assert {candidate.tile for candidate in candidates} == {SMALL.gate_up, SMALL.down}


def test_of_a_tie_the_first_row_counts_as_in_sglang():
    tiles = {c.tile for c in server_candidates(LAYER, {1: SMALL, 3: LARGE}, 2)}
    assert tiles == {SMALL.gate_up, SMALL.down}


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TRITON_CACHE_DIR": "/a/b", "TRITON_HOME": "/c", "HOME": "/h"}, "/a/b"),
        ({"TRITON_HOME": "/c", "HOME": "/h"}, "/c/.triton/cache"),
        ({"HOME": "/h"}, "/h/.triton/cache"),
        ({"TRITON_CACHE_DIR": "", "HOME": "/h"}, "/h/.triton/cache"),
    ],
)
def test_the_servers_cache_folder(monkeypatch, environment, folder):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert server_triton_cache() == Path(folder)


@pytest.mark.parametrize("environment", [{"TRITON_CACHE_DIR": "/a/b"}, {"TRITON_HOME": "/c"}, {}])
def test_it_is_tritons_own_rule(monkeypatch, environment):
    from triton import knobs

    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Path(knobs.cache_knobs().dir) == server_triton_cache()


def test_a_user_without_a_name_has_a_cache_too(monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_242_424)
    assert server_triton_cache() == Path("~", ".triton", "cache")  # below the working directory, as Triton takes it


def test_before_a_down_kernel_with_descriptors_the_gate_up_kernel_sorts_its_output():
    described = RowTiles(LARGE.gate_up, Tile(64, 128, 64, 16, 8, 3, use_tma=True))
    made = server_candidates(LAYER, {1: LARGE, 512: described}, 600)
    sorted_ups = [one for one in made if one.projection is Projection.GATE_UP and one.sorted_output]
    assert sorted_ups
    assert all(one.tokens > 256 for one in sorted_ups)
    plain = [one for one in made if one.projection is Projection.GATE_UP and not one.sorted_output]
    assert all(one.tokens <= 256 for one in plain)
    assert not any(one.sorted_output for one in made if one.projection is Projection.DOWN)
