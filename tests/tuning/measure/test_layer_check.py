"""The float32 reference of a whole layer, the tokens that are held against it, and poisoned buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fixer.families.fused_moe.arguments import Product
from fixer.families.fused_moe.routing import Routing
from fixer.tuning.layer_check import LayerInputs, layer_reference, most_off, poisoned, sample_of, wrong_by
from fixer.tuning.measure.tensors import expert_weights, make_layer, route
from fixer.workload import BOTH, NumberFormat, Projection, Workload

BASE = Workload(4, 12, 20, 2)
LAYERS = {
    "bf16": BASE,
    "ungated": replace(BASE, gated=False),
    "another rank's": replace(BASE, ep_size=2),
    "fp8-channel": replace(BASE, number_format=NumberFormat.FP8_W8A8, per_channel_quant=True),
    "fp8-block": replace(BASE, number_format=NumberFormat.FP8_W8A8, block_shape=(8, 6)),
    "int4": replace(BASE, number_format=NumberFormat.INT4_W4A16, intermediate=6, group_size=4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_reference_is_the_layer_written_out(name):
    workload, generator = LAYERS[name], torch.Generator().manual_seed(1)
    up, down = (make_layer(Product(workload, projection, 1), 2, generator) for projection in BOTH)
    ids = route(Routing.ZIPF, 9, workload, generator)
    inputs = LayerInputs(torch.randn(9, 20, generator=generator), ids, torch.rand(ids.shape, generator=generator), 1)
    tokens = torch.tensor([8, 0, 3])
    expected = []
    for token in tokens.tolist():
        total = torch.zeros(20)
        for place, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                both = expert_weights(up, expert, 1) @ inputs.hidden[token]
                half = len(both) // 2
                inner = (
                    both.clamp(min=0) ** 2 if name == "ungated" else both[:half].sigmoid() * both[:half] * both[half:]
                )
                total += inputs.topk_weights[token, place] * (expert_weights(down, expert, 1) @ inner)
        expected.append(total)
    assert torch.allclose(layer_reference(up, down, inputs, tokens), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_each_turn_reads_its_own_copy_of_the_weights():
    generator = torch.Generator().manual_seed(1)
    layer = make_layer(Product(BASE, Projection.DOWN, 1), 2, generator)
    assert not torch.equal(expert_weights(layer, 0, 0), expert_weights(layer, 0, 1))
    assert torch.equal(expert_weights(layer, 0, 0), expert_weights(layer, 0, 2))


def test_the_tokens_that_differ_most_are_looked_at():
    generator, ours = torch.Generator().manual_seed(1), torch.zeros(500, 3)
    other = ours.clone()
    other[123], other[321, 1] = 0.5, float("nan")
    picked = sample_of(ours, other, generator).tolist()
    assert {123, 321, 499} <= set(picked)
    assert len(picked) == len(set(picked)) == 4
    assert sample_of(ours, None, generator).tolist()[0] == 499
    assert sample_of(ours[:1], other[:1], generator).tolist() == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_infinitely_wrong(value):
    right = torch.ones(4, 4)
    out = right.clone()
    assert wrong_by(out, right) == 0
    out[2, 2] = value
    assert wrong_by(out, right) == float("inf")


def test_what_quantises_activations_may_be_further_off():
    assert most_off(NumberFormat.NONE) < most_off(NumberFormat.INT8_W8A8) < most_off(NumberFormat.FP8_W8A8) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_buffers_without_a_value_are_nan(dtype):
    with poisoned():
        made = torch.empty((3, 5), dtype=dtype)
        like = torch.empty_like(torch.ones(4, dtype=dtype))
        numbers = torch.empty(3, dtype=torch.int32)
        scalar = torch.empty((), dtype=torch.float32)
    assert made.float().isnan().all()
    assert like.float().isnan().all()
    assert (numbers.shape, scalar.shape) == ((3,), ())
    assert torch.empty.__name__ == "empty"


def test_the_poison_goes_with_an_error():
    plain = torch.empty
    with pytest.raises(ValueError, match="stop"), poisoned():
        raise ValueError("stop")
    assert torch.empty is plain
