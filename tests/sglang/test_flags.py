"""SGLang's flags in all their spellings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.base.errors import UsageError
from fixer.sglang.declared import declared_of
from fixer.sglang.flags import BUNDLED, ServerFlags, json_depth, parse_flags
from fixer.sglang.tree import Tree


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
    ],
)
def test_bad_values_name_the_flag(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_flags(words)
    assert words[0].partition("=")[0] in caught.value.message
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message


def test_flags_that_are_not_read_are_reported() -> None:
    assert parse_flags(["--cuda-graph-config", "{}"]).unread == ("--cuda-graph-config",)


def test_every_flag_sets_a_field_or_is_known_otherwise() -> None:
    known = {flag.dest: flag for flag in BUNDLED.flags}
    fields = set(ServerFlags.__dataclass_fields__) - {"model_overrides", "unread", "unchecked"}
    assert known.keys() - fields == {
        *("config", "cuda_graph_config", "model_overrides"),
        *("api_key", "admin_api_key", "ssl_keyfile_password", "ssl_keyfile", "ssl_ca_certs"),
    }
    assert fields <= known.keys()
    spellings = [spelling for flag in BUNDLED.flags for spelling in flag.spellings]
    assert len(spellings) == len(set(spellings))


def test_without_a_tree_unknown_flags_pass_and_are_told() -> None:
    flags = parse_flags(["m", "--tpp", "2", "--enable-metrics", "--tpp=3"])
    assert (flags.model_path, flags.tp_size, flags.unchecked) == ("m", 1, ("--tpp", "--enable-metrics"))


@pytest.mark.parametrize("release", ["0.4.9", "0.5.17", "0.5.23"])
def test_every_field_is_read_of_a_tree_that_has_it(release: str, trees: dict[str, Tree]) -> None:
    declared = declared_of(trees[release])
    bundled = {spelling: flag.dest for flag in BUNDLED.flags for spelling in flag.spellings}
    values = {"dtype": "half", "model_overrides": '{"a": 1}', "load_format": "dummy", "log_level": "warning"}
    defaults = ServerFlags()
    for flag in declared.flags:
        name = next((bundled[spelling] for spelling in flag.spellings if spelling in bundled), "")
        if name in ServerFlags.__dataclass_fields__:
            chosen = next((str(choice) for choice in flag.choices or () if choice not in ("auto", "none")), "7")
            value = [values.get(name, chosen)] if flag.takes_value else []
            read = parse_flags([flag.spellings[0], *value], declared)
            assert getattr(read, name) != getattr(defaults, name), flag.spellings


def test_older_and_newer_names_of_the_same(trees: dict[str, Tree]) -> None:
    old, newest = declared_of(trees["0.4.9"]), declared_of(trees["0.5.23"])
    assert parse_flags(["--enable-flashinfer-moe"], old).moe_runner_backend == "flashinfer_cutlass"
    flags = parse_flags(["--tp-size=8", "--attn-dp-size", "4"], newest)
    assert (flags.enable_dp_attention, flags.dp_size) == (True, 4)


@pytest.mark.parametrize(("text", "tokens"), [("8k", 8000), ("8Ki", 8192), ("1M", 1000000), ("8192", 8192)])
def test_numbers_that_people_can_read(text: str, tokens: int, trees: dict[str, Tree]) -> None:
    assert parse_flags(["--max-prefill-tokens", text], declared_of(trees["0.5.17"])).max_prefill_tokens == tokens


def test_depth() -> None:
    assert [json_depth(value) for value in (1, [], {"a": 1}, {"a": [1, {"b": 2}]})] == [0, 1, 1, 3]


_WORD = st.one_of(
    st.sampled_from(
        [spelling for flag in BUNDLED.flags if flag.dest != "cuda_graph_config" for spelling in flag.spellings]
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
