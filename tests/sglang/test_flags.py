"""SGLang's flags in all their spellings."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.base.errors import UsageError
from fixer.sglang.flags import OPTIONS, Kind, ServerFlags, json_depth, parse_flags


@pytest.mark.parametrize("spelling", ["--tp", "--tp-size", "--tensor-parallel-size"])
@pytest.mark.parametrize("joined", [True, False])
def test_tensor_parallel_spellings(spelling: str, joined: bool) -> None:
    words = [f"{spelling}=4"] if joined else [spelling, "4"]
    assert parse_flags(words).tp_size == 4


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--ep", "2"], "ep_size", 2),
        (["--expert-parallel-size=2"], "ep_size", 2),
        (["--dp-size", "8"], "dp_size", 8),
        (["--moe-dp-size", "2"], "moe_dp_size", 2),
        (["--enable-dp-attention"], "enable_dp_attention", True),
        (["--quantization", "W8A8_INT8"], "quantization", "w8a8_int8"),
        (["--dtype", "half"], "dtype", "float16"),
        (["--moe-runner-backend", "triton"], "moe_runner_backend", "triton"),
        (["--moe-a2a-backend", "deepep"], "moe_a2a_backend", "deepep"),
        (["--ep-num-redundant-experts", "0"], "ep_num_redundant_experts", 0),
        (["--chunked-prefill-size", "-1"], "chunked_prefill_size", -1),
        (["--cuda-graph-max-bs", "64"], "cuda_graph_max_bs", 64),
        (["--cuda-graph-max-bs-decode", "64"], "cuda_graph_max_bs", 64),
        (["--cuda-graph-bs", "1", "2", "4"], "cuda_graph_bs", (1, 2, 4)),
        (["--speculative-num-draft-tokens", "4"], "speculative_num_draft_tokens", 4),
        (["--enable-deterministic-inference"], "enable_deterministic_inference", True),
        (["--model", "a/b"], "model_path", "a/b"),
        (["--model-path=a/b"], "model_path", "a/b"),
        (["--revision", "main"], "revision", "main"),
        (["--load-format", "Dummy"], "load_format", "dummy"),
        (["--download-dir=/models"], "download_dir", "/models"),
        (["--speculative-draft-model", "c/d"], "speculative_draft_model_path", "c/d"),
        (["--speculative-draft-model-path=c/d"], "speculative_draft_model_path", "c/d"),
        (["--kt-num-gpu-experts", "16"], "kt_num_gpu_experts", 16),
        (["--json-model-override-args", '{"num_experts": 64}'], "model_overrides", {"num_experts": 64}),
        (["--disable-shared"], "disable_shared_experts_fusion", True),
    ],
)
def test_values(words: list[str], name: str, value: object) -> None:
    assert getattr(parse_flags(words), name) == value


def test_nothing_given() -> None:
    assert parse_flags([]) == ServerFlags()


def test_last_one_wins() -> None:
    assert parse_flags(["--tp", "2", "--tp-size=8"]).tp_size == 8


def test_unknown_flags_do_not_eat_the_model() -> None:
    flags = parse_flags(["--enable-metrics", "--model-path", "a/b", "--port", "30000", "--host=0.0.0.0", "--tp", "2"])
    assert (flags.model_path, flags.tp_size) == ("a/b", 2)


def test_a_list_ends_at_the_next_flag() -> None:
    flags = parse_flags(["--cuda-graph-bs", "1", "2", "--tp", "4"])
    assert (flags.cuda_graph_bs, flags.tp_size) == ((1, 2), 4)


@pytest.mark.parametrize(
    "words",
    [
        ["--tp", "x"],
        ["--tp", "0"],
        ["--tp", "-1"],
        ["--tp", "1.5"],
        ["--tp", "99999999999"],
        ["--tp", "²"],
        ["--tp"],
        ["--tp", "--ep", "2"],
        ["--chunked-prefill-size", "0"],
        ["--chunked-prefill-size", "-2"],
        ["--dtype", "int3"],
        ["--model-path", " "],
        ["--enable-lora=perhaps"],
        ["--cuda-graph-bs", "1", "x"],
        ["--json-model-override-args", "{"],
        ["--json-model-override-args", "[1]"],
        ["--json-model-override-args", "[" * 100000],
        ["--json-model-override-args", '{"a":' * 40 + "1" + "}" * 40],
        ["--json-model-override-args", '{"a": NaN}'],
        ["--config", "/does/not/exist.yaml"],
    ],
)
def test_bad_values_name_the_flag(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_flags(words)
    assert words[0].partition("=")[0] in caught.value.message
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message


def test_config_file_comes_before_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("# ours\nmodel-path: a/b\ntp_size: 4  # four\nenable-dp-attention: true\ncuda-graph-bs: [1, 2]\n")
    flags = parse_flags(["--config", str(file), "--tp", "2"])
    assert (flags.model_path, flags.tp_size, flags.enable_dp_attention) == ("a/b", 2, True)
    assert flags.cuda_graph_bs == (1, 2)
    assert flags.unread == ()


def test_config_file_that_is_more_than_plain_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("tp-size: 2\ncuda-graph-bs:\n  - 1\n  - 2\n")
    flags = parse_flags(["--config", str(file)])
    assert (flags.tp_size, flags.unread) == (2, ("--config",))


def test_flags_that_are_not_read_are_reported() -> None:
    assert parse_flags(["--cuda-graph-config", "{}"]).unread == ("--cuda-graph-config",)


def test_every_option_sets_a_field() -> None:
    names = set(ServerFlags.__dataclass_fields__)
    assert {option.name for option in OPTIONS} - names == {"config", "cuda_graph_config"}
    spellings = [spelling for option in OPTIONS for spelling in option.spellings]
    assert len(spellings) == len(set(spellings))


def test_depth() -> None:
    assert [json_depth(value) for value in (1, [], {"a": 1}, {"a": [1, {"b": 2}]})] == [0, 1, 1, 3]


_WORD = st.one_of(
    st.sampled_from(
        [spelling for option in OPTIONS if option.kind is not Kind.UNREAD for spelling in option.spellings]
    ),
    st.text(max_size=12),
    st.integers(-3, 9).map(str),
)


@given(st.lists(_WORD, max_size=8))
def test_any_words_give_flags_or_a_usage_error(words: list[str]) -> None:
    try:
        flags = parse_flags(words)
    except UsageError as caught:
        flags, said = None, caught.message
    else:
        said = ""
    assert "\n" not in said
    assert flags is None or flags.tp_size >= 1
