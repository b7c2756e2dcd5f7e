"""The names that SGLang's releases give the tuning files of a layer, for where no SGLang is at hand to be asked."""

from __future__ import annotations

from fixer.workload import NumberFormat, Workload


def pairs_of_names(workload: Workload, card: str) -> tuple[tuple[str, str], ...]:
    """Every pair of names (gate-up, down) that a release may have for a layer on a card, as of 0.4.6 to 0.5.23.

    A release with one joint file has no second name (up to 0.5.4.post1). Up to 0.5.5 none writes
    `per_channel_quant=True` (fused_moe_triton_config.py:44-58 of 0.5.17).

    Args:
        card: its name as the CUDA driver writes it ("NVIDIA GeForce RTX 4090").
    """
    parts = [f"E={workload.experts},N={workload.intermediate},device_name={card.replace(' ', '_')}"]
    if workload.number_format is not NumberFormat.NONE:
        parts.append(f"dtype={workload.number_format.value}")
    if workload.block_shape is not None and all(workload.block_shape):
        parts.append(f"block_shape={list(workload.block_shape)}")
    stem = ",".join(parts)
    stems = (f"{stem},per_channel_quant=True", stem) if workload.per_channel_quant else (stem,)
    return tuple((f"{one}.json", down) for one in stems for down in (f"{one}_down.json", ""))
