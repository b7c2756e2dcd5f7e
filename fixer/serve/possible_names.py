"""Whether a file's name, or a path, can be one that this model's Triton kernel looks for.

Other kernels look for MoE files too (Marlin in sglang-kt, for its block height), and a line in the log may not be
SGLang's at all. What cannot be this model's is neither tuned nor kept for the next start.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

WEIGHT_ONLY_KERNELS = ("marlin",)
"""Kernels of 4-bit and 8-bit weights. Where they look for a file, its name has no dtype, and N = 2 * hidden size."""

_SIZES = re.compile(r"E=(?P<E>\d{1,9}),N=(?P<N>\d{1,9}),device_name=[^/]*?(?P<dtype>,dtype=\w+)?(?:,.*)?\.json")


@dataclass(frozen=True)
class Limits:
    """What this model's files cannot go beyond.

    Attributes:
        roots: folders below which SGLang looks for files; empty: anywhere.
        experts, width: the largest E and N on any shard; 0: not known.
    """

    roots: tuple[str, ...] = ()
    experts: int = 0
    width: int = 0


def why_not(path: str, limits: Limits, kernel: str = "") -> str:
    """Why a file is none of this model's Triton kernel, "" where it can be one.

    Args:
        path: of a gate-up file, or its name alone where `limits` has no folders.
        limits: the model's.
        kernel: what runs the experts, by the rules, where they say that SGLang looks for no file.
    """
    folder, name = os.path.split(path)
    sizes = _SIZES.fullmatch(name)
    if sizes is None:
        return "that is no name of a MoE file"
    if limits.roots and not _below(path, limits.roots):
        return f"{folder} is no folder where this SGLang looks"
    if kernel.lower() in WEIGHT_ONLY_KERNELS and not sizes["dtype"]:
        return f"a name without a dtype is what the {kernel.capitalize()} kernel looks for, for its block height"
    if limits.experts and int(sizes["E"]) > limits.experts:
        return f"this model has at most {limits.experts} experts on a shard: another kernel looked for it"
    if limits.width and int(sizes["N"]) > limits.width:
        return f"this model's experts are at most {limits.width} wide: another kernel looked for it"
    return ""


def _below(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a path, however it is spelt, is below one of the folders."""
    real = os.path.realpath(path)
    return any(real.startswith(os.path.realpath(root).rstrip("/") + "/") for root in roots)
