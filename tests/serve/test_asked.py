"""From a name that SGLang asked for to the layer that is tuned, and the record of it."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.machine.cards import find_card
from fixer.model.config import load_model
from fixer.model.rules.case import Outcome
from fixer.model.rules.decide import decide, layer_workload
from fixer.serve import asked as asking
from fixer.serve.asked import Asked, Question, find, keep, record_path
from fixer.serve.asked_question import decision_for, limits_of, question_of
from fixer.serve.possible_names import Limits
from fixer.serve.situation import OnCard, Situation
from fixer.sglang.flags import parse_flags
from fixer.sglang.tree import workload_of_name
from fixer.workload import NumberFormat, Projection, Workload

QUESTION = Question("Qwen/Qwen3-30B-A3B", "0123456789abcdef", "NVIDIA H100 80GB HBM3", "0.5.17", "tp_size=2")
ASKED = Asked(
    QUESTION, "E=8,N=64,device_name=X.json", "E=8,N=64,device_name=X_down.json", "log", "2026-11-24T07:00:00Z"
)
BASE = Workload(128, 768, 2048, 8)


def first_question(situation):
    return question_of(situation, situation.first)


def situation(trees, models, case="q3_30b_bf16_tp1_h100", *words, gpu="H100"):
    flags = parse_flags(("--model", str(models[case]), *words))
    model, card, tree = load_model("", flags), find_card(gpu), trees["0.5.17"]
    return Situation(model, flags, tree, (OnCard((card,), decide(model, flags, card, tree.version)),))


def test_kept_and_found(tmp_path):
    assert find(tmp_path, QUESTION) == (None, None)
    path = keep(tmp_path, ASKED)
    assert path == record_path(tmp_path, QUESTION)
    assert path.parent == tmp_path / "asked"
    assert find(tmp_path, QUESTION) == (ASKED, None)
    for change in ({"flags": ""}, {"card": "X"}, {"sglang": "0.5.23"}, {"config": "f"}, {"model": "m"}):
        assert find(tmp_path, replace(QUESTION, **change)) == (None, None)


def test_the_relays_way_of_keeping(tmp_path):
    path = record_path(tmp_path, QUESTION)
    asking.keep_name(path, {**QUESTION.__dict__}, ASKED.gate_up, ASKED.down)
    assert replace(find(tmp_path, QUESTION)[0], created=ASKED.created) == ASKED
    with pytest.raises(ValueError, match="no name"):
        asking.keep_name(path, {**QUESTION.__dict__}, "../x.json", "")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:40],
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace("E=8,N=64", "../../etc/E=8,N=64"),
        lambda text: text.replace('"down"', '"up"'),
        lambda text: text.replace('"log"', "7"),
        lambda text: text.replace('"gate_up": "E=8,N=64,device_name=X.json"', '"gate_up": ""'),
        lambda text: "[]",
    ],
)
def test_a_damaged_record_is_set_aside(tmp_path, change):
    path = keep(tmp_path, ASKED)
    path.write_text(change(path.read_text()))
    asked, damaged = find(tmp_path, QUESTION)
    assert asked is None
    assert damaged.kept_as.exists()
    assert find(tmp_path, QUESTION) == (None, None)


@given(st.binary(max_size=300) | st.from_regex(r'\{"schema": 1, "(question|gate_up)": .{0,80}\}', fullmatch=True))
def test_no_content_is_more_than_a_value_error(content):
    with contextlib.suppress(ValueError):
        Asked.from_json(content if isinstance(content, bytes) else content.encode())


def test_the_question_counts_what_decides_the_name(trees, models):
    plain = first_question(situation(trees, models))
    assert plain.flags == ""
    assert first_question(situation(trees, models, "q3_30b_bf16_tp1_h100", "--tp", "2")).flags == "tp_size=2"
    rows_only = situation(trees, models, "q3_30b_bf16_tp1_h100", "--chunked-prefill-size", "2048", "--port", "1")
    assert first_question(rows_only) == plain
    other = situation(trees, models, "q3_30b_bf16_tp1_h100", "--json-model-override-args", '{"num_experts": 64}')
    assert first_question(other).config != plain.config


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("E=128,N=768,device_name=X.json", {}),
        ("E=128,N=384,device_name=X.json", {"intermediate": 384}),
        ("E=129,N=768,device_name=X.json", {"experts": 129, "top_k": 9}),
        ("E=32,N=768,device_name=X.json", {"experts": 32, "ep_size": 4}),
        ("E=128,N=768,device_name=X,dtype=fp8_w8a8.json", {"number_format": NumberFormat.FP8_W8A8}),
        (
            "E=128,N=768,device_name=X,dtype=fp8_w8a8,block_shape=[128, 128].json",
            {"number_format": NumberFormat.FP8_W8A8, "block_shape": (128, 128)},
        ),
        (
            "E=128,N=768,device_name=X,dtype=int8_w8a8,per_channel_quant=True.json",
            {"number_format": NumberFormat.INT8_W8A8, "per_channel_quant": True},
        ),
    ],
)
def test_a_name_becomes_a_workload(name, changes):
    assert workload_of_name(name, BASE) == replace(BASE, **changes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("E=128,N=768,device_name=X,dtype=fp4_w4a4.json", "number format fp4_w4a4"),
        ("E=128,N=384,device_name=X,dtype=int4_w4a16.json", "group size"),
        ("E=128,N=768,device_name=X_down.json", "no name"),
        ("something.json", "no name"),
        ("E=0,N=768,device_name=X.json", "sizes"),
        ("E=999999999999,N=768,device_name=X.json", "sizes"),
    ],
)
def test_a_name_that_is_none(name, words):
    with pytest.raises(ValueError, match=words):
        workload_of_name(name, BASE)


def test_every_shipped_name_is_read_back(trees):
    """What SGLang ships is what it asks for."""
    tree, count = trees["0.5.17"], 0
    for file in tree.shipped_files():
        if file.projection is Projection.GATE_UP and "w4a16" not in file.path.name and "w8a16" not in file.path.name:
            workload = workload_of_name(file.path.name, BASE)
            assert (workload.experts, workload.intermediate) == (file.experts, file.intermediate)
            assert (workload.block_shape, workload.number_format) == (file.block_shape, file.number_format)
            count += 1
    assert count > 200


def test_the_decision_is_for_exactly_that_file(trees, models):
    here = situation(trees, models)
    card = here.first.card
    wanted = replace(here.first.decision.workload, number_format=NumberFormat.FP8_W8A8, block_shape=(128, 128))
    name = here.tree.file_name(wanted, card, Projection.GATE_UP)
    decision = decision_for(here, here.first, Asked(first_question(here), name, "", "log", ""))
    assert decision.outcome is Outcome.ASKS
    assert here.tree.file_name(decision.workload, card, Projection.GATE_UP) == name
    same = here.tree.file_name(here.first.decision.workload, card, Projection.GATE_UP)
    assert (
        decision_for(here, here.first, Asked(first_question(here), same, "", "asking", "")).workload
        == here.first.decision.workload
    )
    with pytest.raises(ValueError, match="no file for NVIDIA H100"):
        decision_for(here, here.first, Asked(first_question(here), "E=128,N=768,device_name=Y.json", "", "log", ""))


def test_asked_for_though_another_kernel_was_expected(trees, models):
    here = situation(trees, models, "q3_30b_bf16_tp1_h100", "--moe-runner-backend", "flashinfer_cutlass")
    assert here.first.decision.workload is None
    assert layer_workload(here.model, here.flags, here.first.card, "0.5.17").experts == 128
    name = f"E=128,N=768,device_name={here.first.card.sglang_name}.json"
    decision = decision_for(here, here.first, Asked(first_question(here), name, "", "log", ""))
    assert (decision.outcome, decision.workload.experts) == (Outcome.ASKS, 128)


def test_asked_for_nothing(trees, models):
    here = situation(trees, models)
    decision = decision_for(
        here, here.first, Asked(first_question(here), "", "", "asking", "", "marlin runs its experts")
    )
    assert (decision.outcome, decision.workload) == (Outcome.NO_LOOKUP, None)
    assert "marlin" in decision.reason


def test_a_dense_model_that_asks_is_an_error(trees, models):
    here = situation(trees, models, "qwen3_8b_bf16_4090", gpu="RTX 4090")
    with pytest.raises(ValueError, match="dense"):
        decision_for(here, here.first, Asked(first_question(here), "E=8,N=64,device_name=X.json", "", "log", ""))


@pytest.mark.parametrize("sizes", ["E=128,N=4096", "E=128,N=9000", "E=4000,N=768"])
def test_a_name_that_cannot_be_this_models_is_not_tuned(trees, models, sizes):
    """Marlin in sglang-kt looks for twice the hidden size (4096 here); an earlier version kept that name."""
    here = situation(trees, models)
    name = f"{sizes},device_name={here.first.card.sglang_name}.json"
    with pytest.raises(ValueError, match="another kernel looked for it"):
        decision_for(here, here.first, Asked(first_question(here), name, "", "log", ""))


def test_the_largest_sizes(trees, models):
    here = situation(trees, models)  # 128 experts, 768 wide
    assert limits_of(here, ("/a",)) == Limits(("/a",), 128 + 64, 768)
    assert limits_of(situation(trees, models, "qwen3_8b_bf16_4090", gpu="RTX 4090")) == Limits()
    spare = situation(trees, models, "q3_30b_bf16_tp1_h100", "--ep-num-redundant-experts", "32")
    assert limits_of(spare).experts == 128 + 64 + 32
