"""Rows: SGLang's defaults by memory, and a ladder without gaps."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.machine.cards import Card
from fixer.model.rules.ladder import (
    BASE_ROWS,
    LARGEST_ROW,
    MAX_ROWS,
    chunked_prefill_size,
    decode_graph_max_batch,
    decode_graph_sizes,
    ladder,
    prefill_graph_sizes,
)
from fixer.sglang.flags import ServerFlags, parse_flags
from fixer.workload import Workload

CASES = json.loads((Path(__file__).resolve().parents[2] / "data" / "lookup-cases.json").read_text())
WORKLOAD = Workload(experts=128, intermediate=768, hidden_size=2048, top_k=8)


def card(mib: int) -> Card:
    return Card("NVIDIA GeForce RTX 4090", (8, 9), 101376, mib)


def nearest(rows: tuple[int, ...], m: int) -> int:
    return min(rows, key=lambda row: (abs(row - m), row))


def worst(rows: tuple[int, ...], largest: int) -> float:
    return max(max(m / nearest(rows, m), nearest(rows, m) / m) for m in range(1, largest + 1))


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
@pytest.mark.parametrize(("release", "key"), [("0.5.17", "rows_0_5_17"), ("0.5.23", "rows_0_5_23")])
def test_cases(case: dict[str, Any], release: str, key: str) -> None:
    flags, box = parse_flags(case["flags"]), card(case["gpu"]["memory_mib"])
    assert chunked_prefill_size(flags, box, release) == case[key]["chunked_prefill_size"]
    assert decode_graph_max_batch(flags, box, release) == case[key]["decode_cuda_graph_max_bs"]


@pytest.mark.parametrize(
    ("release", "mib", "tp", "chunk", "batch"),
    [
        ("0.4.9", 24564, 1, 2048, 8),
        ("0.4.9", 24564, 4, 2048, 80),
        ("0.4.9", 81559, 1, 8192, 160),
        ("0.4.9", 143771, 1, 8192, 256),
        ("0.4.9", 183359, 1, 16384, 512),
        ("0.5.17", 16380, 8, 2048, 8),
        ("0.5.17", 183359, 1, 16384, 512),
        ("0.5.17", 20480, 1, 2048, 24),
        ("0.5.17", 35840, 1, 4096, 32),
        ("0.5.17", 61440, 1, 8192, 256),
        ("0.5.17", 163840, 1, 16384, 512),
        ("0.5.17", 0, 1, 4096, 160),
    ],
)
def test_memory_classes(release: str, mib: int, tp: int, chunk: int, batch: int) -> None:
    flags = ServerFlags(tp_size=tp)
    assert chunked_prefill_size(flags, card(mib), release) == chunk
    assert decode_graph_max_batch(flags, card(mib), release) == batch


def test_flags_win() -> None:
    flags = parse_flags(["--chunked-prefill-size", "1024", "--cuda-graph-max-bs", "7"])
    assert chunked_prefill_size(flags, card(24564), "0.5.17") == 1024
    assert decode_graph_sizes(flags, card(24564), "0.5.17") == (1, 2, 4, 7)
    named = parse_flags(["--cuda-graph-bs", "3", "9"])
    assert decode_graph_sizes(named, card(24564), "0.5.17") == (3, 9)


def test_dp_attention_divides_the_chunk_and_gathers_the_tokens() -> None:
    flags = parse_flags(["--tp", "8", "--dp-size", "8", "--enable-dp-attention"])
    assert chunked_prefill_size(flags, card(143771), "0.5.17") == 1024
    rows = ladder(flags, card(143771), "0.5.17", WORKLOAD)
    assert {512 * 8, 8192} <= set(rows)


def test_speculative_decoding_multiplies_the_rows() -> None:
    flags = parse_flags(["--speculative-algorithm", "EAGLE", "--speculative-num-draft-tokens", "5"])
    assert max(decode_graph_sizes(flags, card(81559), "0.5.17")) == 48
    assert {5, 240} <= set(ladder(flags, card(81559), "0.5.17", WORKLOAD))


def test_running_requests_cap_the_graphs() -> None:
    flags = parse_flags(["--max-running-requests", "10"])
    assert decode_graph_sizes(flags, card(24564), "0.5.17") == (1, 2, 4, 8, 10)


def test_graph_sizes() -> None:
    sizes = decode_graph_sizes(ServerFlags(), card(81559), "0.5.17")
    assert sizes[:7] == (1, 2, 4, 8, 12, 16, 24)
    assert sizes[-1] == 256
    assert decode_graph_sizes(parse_flags(["--disable-cuda-graph"]), card(81559), "0.5.17") == ()
    prefill = prefill_graph_sizes(ServerFlags(), card(24564), "0.5.17")
    assert (prefill[0], prefill[7], prefill[8], prefill[-1]) == (4, 32, 48, 2048)
    assert prefill_graph_sizes(ServerFlags(), card(24564), "0.4.9") == ()


def test_ladder_has_what_the_tuner_and_the_server_run() -> None:
    rows = ladder(ServerFlags(), card(81559), "0.5.17", WORKLOAD)
    assert set(BASE_ROWS) <= set(rows)
    assert 8192 in rows
    assert 16384 in ladder(ServerFlags(), card(183359), "0.5.17", WORKLOAD)
    assert 80 in ladder(ServerFlags(tp_size=4), card(24564), "0.5.17", WORKLOAD)


@settings(deadline=None, max_examples=60)
@given(
    mib=st.sampled_from([0, 16380, 24564, 46068, 81559, 143771, 183359]),
    tp=st.sampled_from([1, 2, 4, 8]),
    dp=st.sampled_from([1, 2, 4, 8]),
    attention=st.booleans(),
    chunk=st.sampled_from([None, -1, 1, 100, 5000, 16384, 131072]),
    batch=st.sampled_from([None, 1, 7, 200, 1000]),
    draft=st.sampled_from([None, 3, 8]),
    release=st.sampled_from(["0.4.9", "0.5.17", "0.5.23"]),
)
def test_no_row_the_server_runs_is_far_from_a_tuned_one(
    mib: int,
    tp: int,
    dp: int,
    attention: bool,
    chunk: int | None,
    batch: int | None,
    draft: int | None,
    release: str,
) -> None:
    flags = ServerFlags(
        tp_size=tp,
        dp_size=min(dp, tp),
        enable_dp_attention=attention,
        chunked_prefill_size=chunk,
        cuda_graph_max_bs=batch,
        speculative_algorithm="EAGLE" if draft else None,
        speculative_num_draft_tokens=draft,
    )
    rows = ladder(flags, card(mib), release, WORKLOAD)
    assert rows == tuple(sorted(set(rows)))
    assert rows[0] == 1
    assert len(rows) <= MAX_ROWS
    ranks = flags.dp_size if attention else 1
    chunk_now = chunked_prefill_size(flags, card(mib), release)
    decode = max(decode_graph_sizes(flags, card(mib), release)) * (draft or 1) * ranks
    largest = max(16384 if chunk_now < 0 else chunk_now * ranks, decode)
    assert worst(rows, min(largest, 20000)) <= 1.5
    assert rows[-1] >= largest or largest <= BASE_ROWS[-1]


@pytest.mark.parametrize("words", [["--chunked-prefill-size", "2147483647"], ["--cuda-graph-max-bs", "2147483647"]])
def test_absurd_sizes_cost_nothing(words: list[str]) -> None:
    flags = parse_flags([*words, "--disable-cuda-graph-padding"])
    rows = ladder(flags, card(24564), "0.5.17", WORKLOAD)
    assert len(rows) <= MAX_ROWS
    assert rows[-1] == LARGEST_ROW
    assert len(decode_graph_sizes(flags, card(24564), "0.5.17")) < 20000
    assert len(prefill_graph_sizes(flags, card(24564), "0.5.17")) < 20000
