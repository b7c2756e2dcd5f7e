"""SGLang's own kernels under Triton's interpreter on the CPU: launch arguments, alignment and reference together.

The interpreter is on or off for a whole process, so others run the cases and the tests look at their answers.
Activations are float16: the interpreter has no bfloat16 product.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fixer.sglang.releases import KNOWN_RELEASES

FORMATS = (
    "fp16",
    "fp16-ungated",
    "fp16-ep",
    "fp8-tensor",
    "fp8-channel",
    "fp8-channel-swapped",
    "fp8-block",
    "int8-channel",
    "int8-block",
    "int8-weights",
    "int8-weights-zero",
    "int4",
    "int4-zero",
)
FAULTS = (
    "none",
    "experts shifted",
    "tokens reversed",
    "list cut short",
    "weights forgotten",
    "scale off",
    "stride off",
)
PROJECTIONS = ("gate_up", "down")
GOOD = 0.01

SCRIPT = r"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import triton.language as tl

from fixer.kernel.compile import Target, kernel_function
from fixer.kernel.source import read_kernel_source
from fixer.families.fused_moe.arguments import LaunchContext, Product, Role, launch_arguments, padded_tokens
from fixer.families.fused_moe.routing import Routing
from fixer.tuning.measure.tensors import align, choose_experts, make_layer, reference, relative_error
from fixer.workload import BOTH, NumberFormat, Projection, Tile, Workload

BASE = Workload(4, 96, 160, 2, activation_dtype="float16")  # neither a multiple of both block sizes below
FP8, INT8 = replace(BASE, number_format=NumberFormat.FP8_W8A8), replace(BASE, number_format=NumberFormat.INT8_W8A8)
W8 = replace(BASE, number_format=NumberFormat.INT8_W8A16, group_size=32)
W4 = replace(BASE, number_format=NumberFormat.INT4_W4A16, group_size=32, intermediate=48)
WORKLOADS = {
    "fp16": BASE,
    "fp16-ungated": replace(BASE, gated=False),
    "fp16-ep": replace(BASE, ep_size=2),
    "fp8-tensor": FP8,
    "fp8-channel": replace(FP8, per_channel_quant=True),
    "fp8-channel-swapped": replace(FP8, per_channel_quant=True),
    "fp8-block": replace(FP8, block_shape=(32, 64)),
    "int8-channel": replace(INT8, per_channel_quant=True),
    "int8-block": replace(INT8, block_shape=(32, 64)),
    "int8-weights": W8,
    "int8-weights-zero": replace(W8, has_zero_points=True),
    "int4": W4,
    "int4-zero": replace(W4, has_zero_points=True),
}
TILE = Tile(16, 64, 64, 2)
TOKENS = 29


def error_of(target, name, projection, fault="none"):
    workload = WORKLOADS[name]
    generator = torch.Generator().manual_seed(1)
    product = Product(workload, projection, TOKENS)
    layer = make_layer(product, 1, generator)
    chosen = choose_experts(Routing.ZIPF, TOKENS, workload.experts, workload.top_k, generator)
    counts = torch.bincount(chosen.flatten(), minlength=workload.experts)
    assert counts.max() > TILE.block_m, "one expert must need more than one block"
    length = padded_tokens(workload, TOKENS, TILE.block_m)
    aligned = align(chosen, TILE.block_m, workload.experts, length)
    tensors = layer.launch_tensors(TOKENS, aligned, 0)
    expected = reference(layer, chosen)
    if fault == "experts shifted":
        tensors[Role.EXPERT_IDS] = (tensors[Role.EXPERT_IDS] + 1) % workload.experts
    elif fault == "tokens reversed":
        used = int(tensors[Role.TOKENS_POST_PADDED])
        tensors[Role.SORTED_TOKEN_IDS][:used] = tensors[Role.SORTED_TOKEN_IDS][:used].flip(0)
    elif fault == "list cut short":
        tensors[Role.TOKENS_POST_PADDED] -= TILE.block_m
    elif fault == "scale off":
        tensors[Role.B_SCALE] = tensors[Role.B_SCALE].flip(1)
    tensors[Role.C].fill_(float("nan"))  # what the kernel leaves out must not look right
    function = kernel_function(target, workload)
    arch = 90 if name.endswith("swapped") else 89
    context = LaunchContext(arch, tl.float16, swap_ab=arch == 90)
    arguments = launch_arguments(function.arg_names, product, TILE, tensors, context)
    for option in ("num_warps", "num_stages", "launch_pdl"):  # the interpreter has none
        arguments.pop(option, None)
    if "swap_ab" in arguments:
        assert arguments["swap_ab"] == name.endswith("swapped")
    if "USE_GDC" in arguments:
        arguments["USE_GDC"] = False  # an instruction of the card
    if fault == "weights forgotten":
        arguments["MUL_ROUTED_WEIGHT"] = not arguments["MUL_ROUTED_WEIGHT"]
    elif fault == "stride off":
        arguments["stride_bn"] -= 1
    grid = (-(-length // TILE.block_m) * -(-product.columns // TILE.block_n),)
    function[grid](**arguments)
    return relative_error(tensors[Role.C].view_as(expected), expected)


version, path, formats, faults, folder = json.loads(sys.argv[1])
target = Target(read_kernel_source(Path(path)), 89, Path(folder))
answers = {}
for projection in BOTH:
    for name in formats:
        answers[f"{version} {name} {projection.value}"] = error_of(target, name, projection)
    for fault in faults if version == "0.5.17" else ():
        answers[f"fault {fault} {projection.value}"] = error_of(target, "fp8-channel", projection, fault)
print(json.dumps({key: str(value) for key, value in answers.items()}))
"""


@pytest.fixture(scope="module")
def errors(trees, tmp_path_factory):
    """The relative error of every case."""
    folder = tmp_path_factory.mktemp("interpreter")
    (folder / "cases.py").write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}

    def run(version):
        request = json.dumps([version, str(trees[version].kernel_source), FORMATS, FAULTS, str(folder / version)])
        command = [sys.executable, str(folder / "cases.py"), request]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(run, KNOWN_RELEASES))
    return {key: float(value) for answer in answers for key, value in answer.items()}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("version", KNOWN_RELEASES)
def test_sglangs_kernel_computes_the_reference(errors, version, name, projection):
    assert errors[f"{version} {name} {projection}"] < GOOD


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_launch_would_be_seen(errors, fault, projection):
    error = errors[f"fault {fault} {projection}"]
    if fault == "none":
        assert error < GOOD
    else:
        assert error > 5 * GOOD
