"""How SGLang is asked: the fewest layers, and a command line that leaves the user's as it is. The rest: test_proof."""

import json

import pytest

from fixer.model.config import model_from_config
from fixer.serve.asking.ask import asking_flags
from fixer.serve.asking.few_layers import few_layers, layers_to_experts
from fixer.sglang.flags import parse_flags


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, 1),
        ({"first_k_dense_replace": 3}, 4),
        ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, 5),
        ({"moe_layer_freq": [0, 0, 1, 1]}, 3),
        ({"decoder_sparse_step": 2}, 2),
        ({"mlp_only_layers": [0, 1]}, 3),
        ({"interleave_moe_layer_step": 2}, 2),
        ({"moe_layer_start_index": 1, "moe_layer_interval": 1}, 2),
        ({"num_dense_layers": 2}, 3),
        ({"moe_layers_enum": "4,5,6"}, 5),
        ({"hybrid_override_pattern": "MM-M*E"}, 6),
        ({"full_attention_interval": 4}, 4),
        ({"layer_types": ["sliding", "sliding", "full", "sliding"]}, 3),
        ({"first_k_dense_replace": "x", "moe_layer_freq": 0, "mlp_only_layers": None}, 1),
    ],
)
def test_the_fewest_layers(config, layers):
    assert layers_to_experts(config) == layers


BASE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_hidden_layers": 6}


def overrides(config, *words, release="0.5.17"):
    flags = parse_flags(("--model", "m", *words))
    return few_layers(model_from_config("m", config, flags), flags, release)


def test_layers_are_left_out():
    assert overrides(BASE) == {"num_hidden_layers": 1}
    assert overrides(BASE, "--pp", "2") == {"num_hidden_layers": 2}
    assert overrides({**BASE, "num_hidden_layers": 1}) == {}
    typed = {**BASE, "layer_types": ["a", "b", "a", "b", "a", "b"], "eos_token_id": [1, 2]}
    assert overrides(typed) == {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    shell = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": BASE}
    assert overrides(shell) == {"text_config": {"num_hidden_layers": 1}}
    assert overrides(shell, release="0.4.9") == {}  # which would replace the whole object
    assert overrides({"architectures": ["X"], "thinker_config": {"text_config": BASE}}) == {}
    assert overrides({"architectures": ["X"], "num_experts": 4}) == {}


def test_the_users_flags_stay_and_win_nothing():
    mine = '{"num_experts": 16, "text_config": {"a": 1}}'
    words = ("--model", "m", "--tp", "2", "--port", "1", "--skip-server-warmup", "--json-model-override-args", mine)
    flags = parse_flags(words)
    model = model_from_config("m", {"architectures": ["X"], "text_config": BASE}, flags)
    asked = asking_flags(words, model, flags, "0.5.17", 4242)
    assert asked[:6] == words[:6]
    assert "--skip-server-warmup" not in asked
    read = parse_flags(asked)
    assert (read.port, read.tp_size, read.host, read.disable_cuda_graph) == (4242, 2, "127.0.0.1", True)
    assert json.loads(asked[-1]) == {"num_experts": 16, "text_config": {"a": 1, "num_hidden_layers": 1}}
