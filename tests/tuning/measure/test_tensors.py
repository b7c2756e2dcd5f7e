from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.families.fused_moe.arguments import Operand, Product, Role, operands, padded_tokens
from fixer.families.fused_moe.routing import MIX, Routing
from fixer.tuning.measure.memory import Rotation, needed_bytes
from fixer.tuning.measure.tensors import (
    align,
    choose_experts,
    make_layer,
    random_scale,
    random_tensor,
    reference,
    relative_error,
    route,
)
from fixer.workload import BOTH, NumberFormat, Projection, Tile, Workload

BASE = Workload(4, 12, 20, 2)
LAYERS = {
    "bf16": BASE,
    "fp16-ungated": replace(BASE, activation_dtype="float16", gated=False),
    "float32": replace(BASE, number_format=NumberFormat.FLOAT32, activation_dtype="float32"),
    "fp8-tensor": replace(BASE, number_format=NumberFormat.FP8_W8A8),
    "fp8-channel": replace(BASE, number_format=NumberFormat.FP8_W8A8, per_channel_quant=True),
    "fp8-block": replace(BASE, number_format=NumberFormat.FP8_W8A8, block_shape=(8, 6)),
    "int8-channel": replace(BASE, number_format=NumberFormat.INT8_W8A8, per_channel_quant=True),
    "int8-block": replace(BASE, number_format=NumberFormat.INT8_W8A8, block_shape=(5, 8)),
    "int8-weights-channel": replace(BASE, number_format=NumberFormat.INT8_W8A16),
    "int8-weights": replace(BASE, number_format=NumberFormat.INT8_W8A16, group_size=4),
    "int8-weights-zero": replace(BASE, number_format=NumberFormat.INT8_W8A16, group_size=4, has_zero_points=True),
    "int4": replace(BASE, number_format=NumberFormat.INT4_W4A16, intermediate=6, group_size=4),
    "int4-zero": replace(
        BASE, number_format=NumberFormat.INT4_W4A16, intermediate=6, group_size=4, has_zero_points=True
    ),
}


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


# --- alignment


def plain_align(chosen, block, experts, length):
    """SGLang's documented moe_align_block_size, in plain Python (each expert's tokens in order)."""
    flat = [expert for row in chosen for expert in row]
    sorted_ids, expert_ids = [], []
    for expert in range(experts):
        mine = [place for place, other in enumerate(flat) if other == expert]
        mine += [len(flat)] * (-len(mine) % block)
        sorted_ids += mine
        expert_ids += [expert] * (len(mine) // block)
    used = len(sorted_ids)
    return sorted_ids + [len(flat)] * (length - used), expert_ids, used


@st.composite
def choices(draw):
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    row = st.permutations(range(experts)).map(lambda order: order[:top_k])
    return experts, draw(st.lists(row, min_size=1, max_size=40)), draw(st.sampled_from([1, 2, 4, 16, 64]))


@settings(deadline=None)
@given(choices())
def test_alignment_is_the_documented_one(case):
    experts, chosen, block = case
    workload = Workload(experts, 8, 8, len(chosen[0]))
    length = padded_tokens(workload, len(chosen), block)
    aligned = align(torch.tensor(chosen, dtype=torch.int32), block, experts, length)
    sorted_ids, expert_ids, used = plain_align(chosen, block, experts, length)
    assert aligned.sorted_token_ids.tolist() == sorted_ids
    assert aligned.tokens_post_padded.tolist() == [used]
    assert aligned.expert_ids[: used // block].tolist() == expert_ids
    assert len(aligned.expert_ids) == math.ceil(length / block)
    assert all(0 <= expert < experts for expert in aligned.expert_ids.tolist())
    for tensor in (aligned.sorted_token_ids, aligned.expert_ids, aligned.tokens_post_padded):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()


def test_the_example_of_sglangs_documentation():
    chosen = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]) - 1
    aligned = align(chosen, 4, 4, 16)
    assert aligned.sorted_token_ids.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert aligned.expert_ids.tolist() == [0, 1, 2, 3]
    assert aligned.tokens_post_padded.tolist() == [16]


def test_what_is_routed_to_other_ranks_comes_first_and_is_nobodys():
    chosen = torch.tensor([[1, -1], [-1, 0], [-1, 1]], dtype=torch.int32)
    length = padded_tokens(Workload(2, 8, 8, 2, ep_size=2), 3, 2)
    aligned = align(chosen, 2, 2, length)
    used = int(aligned.tokens_post_padded)
    assert aligned.sorted_token_ids[:used].tolist() == [1, 2, 4, 6, 3, 6, 0, 5]
    assert aligned.expert_ids[: used // 2].tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize("experts", [16, 1])  # one expert a rank is less than top_k
def test_a_rank_sees_its_share_of_the_tokens(experts):
    workload = Workload(experts, 8, 8, 2, ep_size=8)
    chosen = route(Routing.UNIFORM, 4096, workload, generator())
    assert chosen.shape == (4096, 2)
    assert chosen.dtype is torch.int32
    assert chosen.min() == -1
    assert chosen.max() == experts - 1
    assert (chosen >= 0).float().mean().item() == pytest.approx(1 / 8, rel=0.1)


def test_the_reference_leaves_zeros_for_other_ranks():
    layer = make_layer(Product(BASE, Projection.GATE_UP, 5), 1, generator())
    out = reference(layer, torch.tensor([[0, -1], [-1, 3]]))
    assert (out.abs().sum(dim=2) > 0).tolist() == [[True, False], [False, True]]


# --- routing


@settings(deadline=None, max_examples=50)
@given(
    routing=st.sampled_from(list(Routing)),
    tokens=st.integers(1, 50),
    experts=st.integers(1, 40),
    data=st.data(),
    seed=st.integers(0, 1 << 30),
)
def test_each_token_chooses_distinct_experts_that_exist(routing, tokens, experts, data, seed):
    top_k = data.draw(st.integers(1, experts))
    chosen = choose_experts(routing, tokens, experts, top_k, generator(seed))
    assert (chosen.shape, chosen.dtype) == ((tokens, top_k), torch.int32)
    for row in chosen.tolist():
        assert len(set(row)) == top_k
        assert all(0 <= expert < experts for expert in row)
    assert torch.equal(chosen, choose_experts(routing, tokens, experts, top_k, generator(seed)))


def shares(routing, top_k=1, experts=64, tokens=40_000):
    """How often each expert is chosen, in multiples of the mean, most popular first; and the experts in that order."""
    chosen = choose_experts(routing, tokens, experts, top_k, generator())
    counts = torch.bincount(chosen.flatten().long(), minlength=experts).sort(descending=True)
    return (counts.values * experts / counts.values.sum()).tolist(), counts.indices.tolist()


def test_uniform_is_uniform():
    counts, _ = shares(Routing.UNIFORM, top_k=8)
    assert counts[0] < 1.1
    assert counts[-1] > 0.9


def test_zipf_is_as_skewed_as_it_says():
    counts, order = shares(Routing.ZIPF)
    weights = [rank**-0.7 for rank in range(1, 65)]
    mean = sum(weights) / 64
    for rank in (0, 1, 3, 7):
        assert counts[rank] == pytest.approx(weights[rank] / mean, rel=0.1)
    assert order[:8] != list(range(8))  # the popular ones are anywhere


def test_a_few_hot_experts_get_eight_times_as_much():
    counts, order = shares(Routing.HOT)
    assert counts[:4] == pytest.approx([8 * 64 / (4 * 8 + 60)] * 4, rel=0.1)
    assert counts[4] < 1.0
    assert sorted(order[:4]) != [0, 1, 2, 3]


def test_the_mix_is_half_uniform():
    assert sorted(routing.value for routing in MIX) == ["hot", "uniform", "uniform", "zipf"]


# --- the reference, against loops over single numbers


def stored_weight(layer, expert, n, k):
    """One weight as a number, from the stored tensors, by the format's definition."""
    workload, role = layer.product.workload, layer.tensors
    stored = layer.weights[0][expert]
    number = workload.number_format
    group = workload.group_size
    if number is NumberFormat.INT4_W4A16:
        byte = int(stored[n, k // 2])
        value, zero = (byte >> 4 if k % 2 else byte & 15), 8
        if Role.B_ZERO_POINT in role:
            packed = int(role[Role.B_ZERO_POINT][expert, n // 2, k // group])
            zero = packed >> 4 if n % 2 else packed & 15
        return (value - zero) * float(role[Role.B_SCALE][expert, n, k // group])
    if number is NumberFormat.INT8_W8A16 and group:
        zero = 128
        if Role.B_ZERO_POINT in role:
            zero = int(role[Role.B_ZERO_POINT][expert, n, k // group])
        return (int(stored[n, k]) - zero) * float(role[Role.B_SCALE][expert, n, k // group])
    value = float(stored[n, k])
    if Role.B_SCALE not in role:
        return value
    scale = role[Role.B_SCALE][expert]
    if workload.block_shape:
        return value * float(scale[n // workload.block_shape[0], k // workload.block_shape[1]])
    if workload.per_channel_quant or number is NumberFormat.INT8_W8A16:
        return value * float(scale.flatten()[n])
    return value * float(scale)


def stored_activation(layer, row, k):
    value = float(layer.tensors[Role.A][row, k])
    scale = layer.tensors.get(Role.A_SCALE)
    if scale is None:
        return value
    if scale.dim() == 1:
        return value * float(scale[0])
    return value * float(scale[row, k // layer.product.workload.block_shape[1] if scale.shape[1] > 1 else 0])


@pytest.mark.parametrize("projection", BOTH)
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_reference_is_what_loops_compute(name, projection):
    workload, tokens = LAYERS[name], 3
    layer = make_layer(Product(workload, projection, 5), 1, generator())  # room for more tokens than are used
    chosen = choose_experts(Routing.UNIFORM, tokens, workload.experts, workload.top_k, generator(2))
    product = Product(workload, projection, tokens)
    out = reference(layer, chosen)
    assert (out.shape, out.dtype) == ((tokens, workload.top_k, product.columns), torch.float32)
    for token, slot, n in itertools.product(range(tokens), range(workload.top_k), range(product.columns)):
        row = token if product.is_up else token * workload.top_k + slot
        expert = int(chosen[token, slot])
        terms = [stored_activation(layer, row, k) * stored_weight(layer, expert, n, k) for k in range(product.depth)]
        weight = 1.0 if product.is_up else float(layer.tensors[Role.TOPK_WEIGHTS][token, slot])
        largest = max(abs(term) for term in terms)
        assert float(out[token, slot, n]) == pytest.approx(weight * sum(terms), rel=1e-4, abs=1e-5 * largest)


# --- operands


@pytest.mark.parametrize("projection", BOTH)
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_launch_for_fewer_tokens_gets_the_shapes_that_it_would_have_alone(name, projection):
    workload = LAYERS[name]
    for room, tokens in ((6, 1), (6, 5), (6, 6), (1, 1)):
        layer = make_layer(Product(workload, projection, room), 3, generator())
        chosen = choose_experts(Routing.UNIFORM, tokens, workload.experts, workload.top_k, generator())
        length = padded_tokens(workload, tokens, 16)
        tensors = layer.launch_tensors(tokens, align(chosen, 16, workload.experts, length), turn=4)
        shapes = operands(Product(workload, projection, tokens), Tile(16, 32, 64, 1), length)
        assert {role: tuple(tensor.shape) for role, tensor in tensors.items()} == {
            role: operand.shape for role, operand in shapes.items()
        }
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        assert tensors[Role.B] is layer.weights[1]


def test_consecutive_launches_use_different_weights():
    layer = make_layer(Product(BASE, Projection.GATE_UP, 2), 3, generator())
    assert len({weight.data_ptr() for weight in layer.weights}) == 3
    assert not torch.equal(layer.weights[0], layer.weights[1])


@pytest.mark.parametrize("experts", [4, 3])
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_memory_that_layers_take_is_known_before(name, experts):
    workload, copies = LAYERS[name], 2
    products = tuple(Product(workload, projection, 5) for projection in BOTH)
    layers = [make_layer(product, copies, generator(), experts) for product in products]
    real = sum(tensor.nbytes for layer in layers for tensor in (*layer.weights, *layer.tensors.values()))
    lists = 2 * (16 + 1 + 1) * 4  # sorted tokens, experts and their count belong to a launch, not to the layer
    assert sum(needed_bytes(product, Rotation(copies, experts)) for product in products) == real + lists


@pytest.mark.parametrize("projection", BOTH)
@pytest.mark.parametrize("name", list(LAYERS))
def test_experts_without_weights_of_their_own_read_others(name, projection):
    """A layer with weights for three of four experts is the layer whose fourth expert is the first one again."""
    workload, tokens = LAYERS[name], 5
    few = make_layer(Product(workload, projection, tokens), 2, generator(), experts=3)
    repeat = [0, 1, 2, 0]
    scales = {role: few.tensors[role][repeat] for role in (Role.B_SCALE, Role.B_ZERO_POINT) if role in few.tensors}
    whole = replace(few, weights=tuple(w[repeat] for w in few.weights), tensors={**few.tensors, **scales})
    chosen = torch.tensor([[3, 1], [0, 3], [2, 1], [-1, 3], [3, -1]], dtype=torch.int32)
    assert torch.equal(reference(few, chosen), reference(whole, chosen))
    aligned = align(chosen, 16, workload.experts, padded_tokens(workload, tokens, 16))
    mapped, plain = (layer.launch_tensors(tokens, aligned, 0) for layer in (few, whole))
    ids = plain[Role.EXPERT_IDS].tolist()
    assert {-1, 3} <= set(ids)
    assert mapped[Role.EXPERT_IDS].tolist() == [repeat[e] if e >= 0 else e for e in ids]
    assert mapped[Role.EXPERT_IDS].dtype == torch.int32
    assert torch.equal(mapped[Role.SORTED_TOKEN_IDS], plain[Role.SORTED_TOKEN_IDS])


@pytest.mark.parametrize("element", ["fp8e4nv", "int8", "uint8", "bfloat16", "float16", "float32"])
def test_random_operands_are_finite_varied_and_reproducible(element):
    operand = Operand(element, (37, 41))
    tensor = random_tensor(operand, generator())
    assert tuple(tensor.shape) == operand.shape
    assert tensor.float().isfinite().all()
    assert len(tensor.float().unique()) > 50
    assert torch.equal(tensor.float(), random_tensor(operand, generator()).float())


def test_random_integers_use_the_whole_range():
    for element, low, high in (("int8", -127, 127), ("uint8", 0, 255)):
        tensor = random_tensor(Operand(element, (200, 200)), generator())
        assert (int(tensor.min()), int(tensor.max())) == (low, high)


def test_random_scales_are_near_a_fiftieth():
    scale = random_scale(Operand("float32", (100, 100)), generator())
    assert 0.01 <= float(scale.min()) < 0.011
    assert 0.029 < float(scale.max()) <= 0.03


# --- the error


def test_the_error_is_relative_and_nan_is_infinitely_wrong():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected.clone(), expected) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), expected) == math.inf
    assert relative_error(torch.tensor([3.0, float("inf")]), expected) == math.inf


@pytest.mark.parametrize("name", ["bf16", "fp8-block"])
def test_rows_in_sorted_order_are_those_of_their_tokens_with_nan_between(name):
    workload = LAYERS[name]
    product = Product(workload, Projection.DOWN, 9)
    length = padded_tokens(workload, 9, 4)
    layer = make_layer(product, 1, generator(), sorted_rows=length)
    assert set(layer.in_order) == ({Role.A, Role.A_SCALE} if name == "fp8-block" else {Role.A})
    aligned = align(route(Routing.ZIPF, 9, workload, generator()), 4, workload.experts, length)
    made = layer.sorted_as(aligned)
    for role, tensor in made.in_order.items():
        assert len(tensor) == length
        for place, row in enumerate(aligned.sorted_token_ids.tolist()):
            if row < product.rows:
                assert torch.equal(tensor[place].float(), layer.tensors[role][row].float())
            else:
                assert tensor[place].float().isnan().all()
    views = made.launch_tensors(9, aligned, 0, in_order=True)
    assert views[Role.A] is not made.tensors[Role.A]
    assert len(views[Role.A]) == length
    assert torch.equal(made.launch_tensors(9, aligned, 0)[Role.A].float(), made.tensors[Role.A].float())
