"""SGLang's own fused MoE layer, called in this process with configurations of our choice.

Used by the finals: quantisation of activations, sorting of tokens, both products, activation and reduction, exactly as
the server runs them. Imports SGLang and PyTorch; belongs into a process of its own, since that takes seconds.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fixer.base.errors import SGLangError
from fixer.workload import NumberFormat, Tile, Workload

MODULES = (
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe",
    "sglang.srt.layers.moe.fused_moe_triton.fused_moe",
)
"""Where `fused_experts_impl` lives: 0.5.17 and 0.5.23, then 0.4.9."""


class OwnLayer:
    """SGLang's layer for one workload.

    Args:
        package: the `sglang` package folder to import.
        workload: gives the number format's flags.

    Raises:
        SGLangError: this SGLang cannot be imported here, or has no such function.
    """

    def __init__(self, package: Path, workload: Workload) -> None:
        self._module = _import_layer(package)
        self._workload = workload
        self._pair = (Tile(16, 32, 64, 1), Tile(16, 32, 64, 1))
        # What a server sets up before its first forward, as far as this function looks at it.
        exec_flags = SimpleNamespace(
            moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
            deterministic=SimpleNamespace(enable_deterministic_inference=False),
        )
        self._replace("get_exec", lambda: exec_flags)
        # The small-batch sum is compiled by torch.compile for each M; the plain kernel costs both sides the same.
        self._replace("_use_moe_sum_reduce_torch_compile", lambda tokens: False)
        self._replace("try_get_optimal_moe_config", self._chosen_config)
        accepted = inspect.signature(self._module.fused_experts_impl).parameters
        self._flags = {name: value for name, value in _flags(workload).items() if name in accepted}

    def _replace(self, name: str, value: Callable[..., Any]) -> None:
        if hasattr(self._module, name):
            setattr(self._module, name, value)

    def _chosen_config(self, *_: object, return_down_config: bool = False, **__: object) -> Any:
        """Stands in for SGLang's look-up; the dictionaries are fresh, since SGLang takes keys out of them."""
        up, down = (tile.to_json() for tile in self._pair)
        return (up, (down, down["BLOCK_SIZE_M"])) if return_down_config else up

    def __call__(
        self, pair: tuple[Tile, Tile], hidden: Any, weights: LayerWeights, topk_weights: Any, topk_ids: Any
    ) -> Any:
        """Run the layer with a pair of configurations, gate-up first.

        Args:
            pair: a captured graph keeps those of its capture.
            hidden: [tokens, hidden_size]; it is left as it is: SGLang's layer works in place, so it gets a copy.

        Returns:
            The copy, with what the layer made of it.
        """
        self._pair = pair
        out = hidden.clone()
        self._module.fused_experts_impl(
            out, weights.w1, weights.w2, topk_weights, topk_ids, **weights.scales, **self._flags
        )
        return out


class LayerWeights:
    """Both projections' weights and their scales under SGLang's parameter names."""

    def __init__(self, w1: Any, w2: Any, scales: dict[str, Any]) -> None:
        self.w1 = w1
        self.w2 = w2
        self.scales = scales


def _flags(workload: Workload) -> dict[str, Any]:
    block_shape = list(workload.block_shape) if workload.block_shape else None
    if workload.group_size:
        block_shape = [0, workload.group_size]
    return {
        "inplace": True,
        "activation": "silu" if workload.gated else "relu2",
        "is_gated": workload.gated,
        "use_fp8_w8a8": workload.number_format is NumberFormat.FP8_W8A8,
        "use_int8_w8a8": workload.number_format is NumberFormat.INT8_W8A8,
        "use_int8_w8a16": workload.number_format is NumberFormat.INT8_W8A16,
        "use_int4_w4a16": workload.number_format is NumberFormat.INT4_W4A16,
        "per_channel_quant": workload.per_channel_quant,
        "block_shape": block_shape,
        "filter_expert": workload.ep_size > 1,
    }


def _import_layer(package: Path) -> Any:
    if str(package.parent) not in sys.path:
        sys.path.insert(0, str(package.parent))
    problem: Exception | None = None
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # SGLang's imports reach far: any of them may fail in many ways
            problem = problem or error
            continue
        if hasattr(module, "fused_experts_impl"):
            return module
    raise SGLangError(f"SGLang's own MoE layer cannot be called here: {problem}.".replace("\n", " ")[:400])
