"""A benchmark's result as JSON: written, read back, refused."""

import json
from dataclasses import replace

import pytest

from fixer.bench_results import (
    Arm,
    Arms,
    BenchEnvironment,
    BenchResult,
    KernelRow,
    Kind,
    Latency,
    Load,
    ServeLoad,
    Verdict,
    headline,
    result_path,
    results_for,
    save_result,
)
from fixer.bench_view import print_result

WHERE = BenchEnvironment(
    "NVIDIA X", (9, 0), "580.1", 232448, "0.5.17", "3.6.0", "2.11.0", "0.1", "3.12.3", "ab" * 32, 16
)
ARM = Arm((100.5, 101.25), (0, 0), Latency(10.5, 20.0, (10.0, 11.0), (19.0, 21.0)), None, ("triton_3_6_0/a.json",), 1)
LOADS = (
    ServeLoad(Load(1, 4000, 1, 6), Arms(ARM, replace(ARM, starts=(1, 1))), 1.1, 0.01, 0.02, Verdict.FASTER),
    ServeLoad(Load(16, 512, 128, 48), Arms()),
)
SERVED = BenchResult(
    Kind.SERVE, "2026-11-24T06:50:00Z", WHERE, "m", "", "E=8-0123.json", 101376, "token ids", LOADS, (), 1.1, 0.02,
    Verdict.FASTER, True, ("a note",),
)  # fmt: skip
ROWS = (
    KernelRow(1, (10.0, 10.5), (9.0, 9.5), False, 1.1, (1.1,), 0.01, 0.02, Verdict.FASTER),
    KernelRow(8, (), (9.0, 9.5), False, None, (), 0.01, 0.02, Verdict.CURED),
    KernelRow(16, (9.0,), (9.0,), True, 1.0, (1.0,), 0.01, 0.02, Verdict.NEUTRAL),
)
TIMED = replace(SERVED, kind=Kind.KERNEL, serve=(), rows=ROWS, client="", smem_limit=None)


@pytest.mark.parametrize("result", [SERVED, TIMED, replace(SERVED, serve=(), ratio=None, margin=None, verdict=None)])
def test_there_and_back(result):
    assert BenchResult.from_json(result.to_json()) == result


def test_the_shape_that_others_read():
    row = json.loads(SERVED.to_json())
    assert row["schema"] == 1
    assert (row["kind"], row["verdict"], row["artefact"], row["smem_limit"]) == (
        "serve",
        "faster",
        "E=8-0123.json",
        101376,
    )
    assert row["serve"][0]["load"] == {"streams": 1, "input_tokens": 4000, "output_tokens": 1, "requests": 6}
    assert row["serve"][0]["arms"]["sglang"]["output_tokens_per_s"] == [100.5, 101.25]
    assert row["serve"][0]["arms"]["tuned"]["ttft_ms"]["median"] == 10.5


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(body, path, value):
    for key in path[:-1]:
        body = body[key]
    body[path[-1]] = value


@pytest.mark.parametrize("result", [SERVED, TIMED])
@pytest.mark.parametrize("strange", [{"x": 1}, [[]], -5, "\x1b[31m", 1e300])
def test_any_part_that_makes_no_sense_is_refused(result, strange):
    body = json.loads(result.to_json())
    for path in places(body):
        changed = json.loads(result.to_json())
        put(changed, path, strange)
        if strange == -5 and path[-1] in ("ratio", "margin", "spread", "median", "p99"):
            continue
        with pytest.raises(ValueError, match=r"."):
            BenchResult.from_json(json.dumps(changed))


def test_a_missing_and_a_strange_name():
    body = json.loads(SERVED.to_json())
    for path in [path for path in places(body) if isinstance(path[-1], str)]:
        changed = json.loads(SERVED.to_json())
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(ValueError, match=r"."):
            BenchResult.from_json(json.dumps(changed))
    with pytest.raises(ValueError, match="unknown part"):
        BenchResult.from_json(json.dumps(body | {"more": 1}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": true}', "[" * 90_000])
def test_something_else_entirely(content):
    with pytest.raises(ValueError, match=r"."):
        BenchResult.from_json(content)


def test_kept_by_artefact(tmp_path):
    later = replace(SERVED, created="2026-11-25T00:00:00Z")
    other = replace(SERVED, artefact="E=8-9999.json")
    for result in (SERVED, later, TIMED, other):
        save_result(result_path(tmp_path, result), result)
    assert result_path(tmp_path, SERVED).name == "E=8-0123-serve-20261124T065000Z.json"
    broken = tmp_path / "bench" / "E=8-0123-serve-x.json"
    broken.write_text("{")
    assert results_for(tmp_path, "E=8-0123.json")[0] == later
    assert set(results_for(tmp_path, "E=8-0123.json")) == {SERVED, later, TIMED}
    assert not broken.exists()
    assert results_for(tmp_path / "no", "E=8-0123.json") == ()


def test_headlines():
    assert headline(SERVED) == "the server: faster with the tuned configuration (+10.0 % over all loads)"
    assert "neutral (+1.0 % over all loads, within 2.0 %)" in headline(
        replace(SERVED, ratio=1.01, verdict=Verdict.NEUTRAL)
    )
    mixed = tuple(
        replace(load, verdict=verdict) for load, verdict in zip(LOADS, (Verdict.FASTER, Verdict.SLOWER), strict=True)
    )
    assert "some faster, some slower" in headline(replace(SERVED, serve=mixed, verdict=Verdict.NEUTRAL))
    assert headline(replace(TIMED, verdict=Verdict.CURED, ratio=None)) == "SGLang's MoE layer: runs only tuned"
    assert "nothing to compare yet" in headline(replace(SERVED, verdict=None))


def test_printed(capsys):
    print_result(SERVED)
    print_result(TIMED)
    text = capsys.readouterr().out
    assert "limited to 101376 bytes" in text
    assert "prefill of 4000" in text
    assert "403500 ± 0.4 %" in text  # input tokens a second
    assert "10 (20) -> 10 (20)" in text
    assert "does not run" in text
    assert "neutral (the same tiles)" in text
    assert "+10.0 %" in text
