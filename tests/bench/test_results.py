"""A benchmark's result as JSON: written, read back, refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.bench.passes import Latency, Load, Passes
from fixer.bench.results import KernelRow, Kind, ServeLoad, Side, Verdict, short_name
from fixer.bench.shelf import read_result, result_path, results_for, save_result
from fixer.bench.verdict import judged
from fixer.bench.view import print_result
from fixer.bench.words import cautions, headline, verdict_words
from tests.support.bench_results import result_of

DATA = Path(__file__).resolve().parents[1] / "data"
OWN = Passes(
    (100.5, 101.25), (0, 0), Latency(10.5, 20.0, (10.0, 11.0), (19.0, 21.0)), None, ("triton_3_6_0/a.json",), 1
)
TUNED = replace(OWN, starts=(1, 1), output_tokens_per_s=(110.55, 111.375))
LOADS = (
    ServeLoad(Load(1, 4000, 1, 6), OWN, TUNED, False, 1.2, 1.1, (1.08, 1.12), Verdict.FASTER),
    ServeLoad(Load(16, 512, 128, 48)),
)
SERVED = replace(
    result_of(*LOADS),
    smem_limit=101376,
    ratio=1.1,
    interval=(1.08, 1.12),
    verdict=Verdict.FASTER,
    complete=True,
    notes=("a note",),
)
ROWS = (
    KernelRow(1, (10.0, 10.5), (9.0, 9.5), False, 1.1, (1.1,), 0.01, 0.02, Verdict.FASTER),
    KernelRow(8, (), (9.0, 9.5), False, None, (), 0.01, 0.02, Verdict.CURED),
    KernelRow(16, (9.0,), (9.0,), True, 1.0, (1.0,), 0.01, 0.02, Verdict.NEUTRAL),
)
TIMED = replace(SERVED, kind=Kind.KERNEL, serve=(), rows=ROWS, smem_limit=None)


@pytest.mark.parametrize("result", [SERVED, TIMED, replace(SERVED, serve=(), ratio=None, interval=None, verdict=None)])
def test_there_and_back(result):
    assert read_result(result.to_json()) == result


def test_the_shape_that_others_read():
    row = json.loads(SERVED.to_json())
    assert row["schema"] == 2
    assert (row["kind"], row["verdict"], row["artefact"], row["smem_limit"]) == (
        "serve",
        "faster",
        "E=8-0123.json",
        101376,
    )
    assert row["serve"][0]["load"] == {"streams": 1, "input_tokens": 4000, "output_tokens": 1, "requests": 6}
    assert row["serve"][0]["sglang"]["output_tokens_per_s"] == [100.5, 101.25]
    assert row["serve"][0]["tuned"]["ttft_ms"]["median"] == 10.5
    assert row["serve"][0]["interval"] == [1.08, 1.12]


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
        with pytest.raises(ValueError, match=r"."):
            read_result(json.dumps(changed))


def test_a_missing_and_a_strange_name():
    body = json.loads(SERVED.to_json())
    for path in [path for path in places(body) if isinstance(path[-1], str)]:
        changed = json.loads(SERVED.to_json())
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(ValueError, match=r"."):
            read_result(json.dumps(changed))
    with pytest.raises(ValueError, match="unknown part"):
        read_result(json.dumps(body | {"more": 1}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": true}', "[" * 90_000])
def test_something_else_entirely(content):
    with pytest.raises(ValueError, match=r"."):
        read_result(content)


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
    assert (
        headline(SERVED) == "the server: faster with the tuned configuration (+10.0 % over all loads, +8.0 to +12.0 %)"
    )
    neutral = replace(SERVED, ratio=1.01, interval=(0.99, 1.03), verdict=Verdict.NEUTRAL)
    assert headline(neutral) == "the server: neutral (+1.0 % over all loads, -1.0 to +3.0 %)"
    mixed = tuple(
        replace(load, verdict=verdict) for load, verdict in zip(LOADS, (Verdict.FASTER, Verdict.SLOWER), strict=True)
    )
    assert "some faster, some slower" in headline(replace(SERVED, serve=mixed, verdict=Verdict.NEUTRAL))
    assert headline(replace(TIMED, verdict=Verdict.CURED, ratio=None)) == "SGLang's MoE layer: runs only tuned"
    assert "nothing to compare yet" in headline(replace(SERVED, verdict=None))
    assert headline(replace(SERVED, verdict=Verdict.SAME)).endswith("same configuration on both sides under every load")
    undecided = replace(SERVED, serve=(replace(LOADS[0], verdict=Verdict.UNDECIDED),), verdict=Verdict.UNDECIDED)
    assert headline(undecided) == "the server: not decided (one start each)"


def test_a_verdict_says_how_many_starts_it_lacks():
    def words(own, tuned):
        sides = [replace(OWN, starts=starts, output_tokens_per_s=(9.0,) * len(starts)) for starts in (own, tuned)]
        return verdict_words(replace(LOADS[0], sglang=sides[0], tuned=sides[1], verdict=Verdict.UNDECIDED))

    assert words((0, 0), (1, 1)) == "not decided (one start each)"
    assert words((0, 3), (1, 2)) == "not decided (two starts each)"
    assert words((0, 3, 4), (1, 2)) == "not decided (3 and 2 starts)"
    assert verdict_words(ServeLoad(Load(1, 8, 8, 1))) == "-"


def test_a_gain_that_tuning_cannot_give_is_flagged():
    above = replace(LOADS[0], most=1.069)
    assert cautions(SERVED) == ()
    (said,) = cautions(replace(SERVED, serve=(above,)))
    assert said.startswith("More than the MoE layer's own gain can give")
    assert "prefill of 4000: +10.0 % of +6.9 %" in said
    assert "more than the MoE layer can give" in headline(replace(SERVED, serve=(above,)))
    (said,) = cautions(replace(SERVED, serve=(replace(above, same=True, verdict=Verdict.SAME),)))
    assert "no effect of the tuning (prefill of 4000: +10.0 %)" in said


def test_a_folder_is_named_without_those_around_it():
    assert [short_name(name) for name in ("/tmp/a/m", "./m", "~/x/m", "own/m")] == ["m", "m", "m", "own/m"]


def test_a_change_is_the_quotient_of_the_numbers_beside_it(capsys):
    """Rates of starts with unequal passes, where the median of the passes and the mean of the starts differ."""
    own = replace(OWN, output_tokens_per_s=(2931.666, 3003.125, 2905.221), starts=(0, 0, 0))
    tuned = replace(OWN, output_tokens_per_s=(2916.081, 3135.21, 2935.654), starts=(1, 1, 1))
    load = judged(ServeLoad(Load(64, 512, 128, 128), own, tuned))
    print_result(replace(SERVED, serve=(load, judged(replace(load, load=Load(1, 4000, 1, 16))))))
    lines = [line for line in capsys.readouterr().out.splitlines() if "streams" in line or "prefill" in line]
    for line, unit in zip(lines, (1, 4000), strict=True):
        left, right, change = re.search(r"  +([\d.]+)  +([\d.]+)  +([+-][\d.]+) %", line).groups()
        assert 100 * (float(right) / float(left) - 1) == pytest.approx(float(change), abs=0.06)
        assert float(left) == pytest.approx(unit * load.rate(Side.SGLANG), rel=1e-4)


def test_printed(capsys):
    print_result(SERVED)
    print_result(TIMED)
    text = capsys.readouterr().out
    assert "limited to 101376 bytes" in text
    assert "prefill of 4000" in text
    assert "403497" in text  # input tokens a second
    assert "10 (20) -> 10 (20)" in text
    assert "does not run" in text
    assert "neutral (the same tiles)" in text
    assert "+10.0 %" in text
    assert "+8.0 to +12.0 %" in text


# --- what earlier versions kept --------------------------------------------------------------------------------------


def schema_1(name="qwen3-30b-a3b-fp8-dynamic"):
    return json.loads((DATA / f"{name}.serve.schema-1.json").read_bytes())


def test_a_result_of_an_earlier_version_is_read_and_judged_anew():
    """One start of each side: it said "faster" (+9.3 %) then."""
    body = schema_1()
    assert (body["schema"], body["verdict"], body["ratio"]) == (1, "faster", 1.09255)
    result = read_result(json.dumps(body))
    assert [load.verdict for load in result.serve] == [Verdict.UNDECIDED] * 5
    assert headline(result) == "the server: not decided (one start each)"
    own = body["serve"][0]["arms"]["sglang"]
    assert result.serve[0].sglang.output_tokens_per_s == tuple(own["output_tokens_per_s"])
    assert result.serve[0].sglang.ttft_ms.median == own["ttft_ms"]["median"]
    assert read_result(result.to_json()) == result


def test_another_load_tool_of_an_earlier_version_is_a_note():
    assert read_result(json.dumps(schema_1() | {"client": "sglang.bench_serving"})).notes == (
        "the load came from sglang.bench_serving",
    )


def test_kernels_and_a_cure_of_an_earlier_version_stay_as_they_were():
    body = json.loads(TIMED.to_json()) | {"schema": 1, "client": "", "margin": 0.02}
    del body["interval"]
    result = read_result(json.dumps(body))
    assert result.rows == TIMED.rows
    assert result.interval == pytest.approx((1.1 / 1.02, 1.1 * 1.02))
    body = schema_1() | {"verdict": "cured"}
    assert read_result(json.dumps(body)).verdict is Verdict.CURED


def test_a_damaged_result_of_an_earlier_version_is_refused():
    whole = schema_1()
    for path in list(places(whole)):
        if any(name in ("spread", "margin", "ratio") for name in path):
            continue  # worked out anew, or gone
        body = schema_1()
        put(body, path, {"x": 1})
        with pytest.raises(ValueError, match=r"."):
            read_result(json.dumps(body))
