"""vLLM's tuning files: what it names them, and what of a tuning for SGLang carries over.

vLLM's fused MoE kernel has the same ancestor. It reads one joint file for both projections, from
VLLM_TUNED_CONFIG_FOLDER (since 0.10) or its own `fused_moe/configs` folder. Source of the rules: `get_config_file_name`
and `try_get_optimal_moe_config` in vllm/model_executor/layers/fused_moe/fused_moe.py, `_get_config_dtype_str` in
config.py beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fixer.artefacts.artefact import Artefact
from fixer.base.file_name import FileName
from fixer.workload import NumberFormat, Tile, Workload

_DTYPES: Mapping[NumberFormat, str] = {
    NumberFormat.NONE: "",
    NumberFormat.FP8_W8A8: "fp8_w8a8",
    NumberFormat.INT8_W8A8: "",
    NumberFormat.INT8_W8A16: "int8_w8a16",
    NumberFormat.INT4_W4A16: "int4_w4a16",
    NumberFormat.FLOAT32: "float32",
}
"""What vLLM puts behind `dtype=`, "" where it puts nothing: INT8 weights and activations ask for the bf16 file."""


def vllm_file_name(workload: Workload, card: str) -> FileName:
    """The name that vLLM asks for.

    Args:
        workload: the layer on one shard.
        card: the card's name as the CUDA driver writes it.

    Raises:
        ValueError: the card's name cannot be part of a file's.
    """
    device = card.replace(" ", "_")
    if "H200" in device.split("_"):
        device = "NVIDIA_H200"  # one file for the whole family
    packed = workload.number_format is NumberFormat.INT4_W4A16
    # Two 4-bit weights lie in a byte: vLLM counts weights, SGLang bytes.
    parts = [f"E={workload.experts},N={workload.intermediate * (2 if packed else 1)},device_name={device}"]
    if _DTYPES[workload.number_format]:
        parts.append(f"dtype={_DTYPES[workload.number_format]}")
    if workload.block_shape is not None and all(workload.block_shape):
        parts.append("block_shape=[{},{}]".format(*workload.block_shape))
    return FileName(",".join(parts) + ".json")


def vllm_table(artefact: Artefact) -> dict[int, Tile]:
    """One tile for each M: the gate-up projection's, which has the larger part of the work."""
    return {row.batch: replace(row.gate_up, use_tma=False) for row in artefact.rows}


def approximations(artefact: Artefact) -> tuple[str, ...]:
    """In what the vLLM file is a guess, one sentence each."""
    workload = artefact.workload
    assert isinstance(workload, Workload)
    split = sum(row.gate_up != row.down for row in artefact.rows)
    said = {
        "nothing was measured in vLLM, whose kernel and Triton are its own": True,
        f"vLLM runs one configuration for both projections: in {split} of {len(artefact.rows)} rows the down "
        "projection gets the gate-up projection's": split,
        "vLLM's name does not tell a scale per channel from one per tensor: the file serves both": (
            workload.per_channel_quant
        ),
        "vLLM asks for one file for bf16 and for INT8 weights and activations: the name stands for both": (
            workload.number_format is NumberFormat.INT8_W8A8
        ),
        "E is SGLang's, which may count a shared expert that vLLM keeps apart": True,
    }
    return tuple(text for text, holds in said.items() if holds)
