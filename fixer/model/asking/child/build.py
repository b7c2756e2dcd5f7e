"""From the server's flags to the whole model on the meta device: SGLang's own steps, in the server's order.

Names in SGLang move and their parameters change between releases, so every function is called by its signature: it
gets what its parameters name, of all that is known here, and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fixer.model.asking.child.world import OnCpu, OnMeta


class FlagsError(Exception):
    """SGLang's own argument parser refused the flags."""


@dataclass
class Built:
    """What was built: SGLang's model configuration, the model on the meta device, and its quantisation."""

    model_config: Any
    model: Any
    quant_config: Any


def call(function: Callable[..., Any], **known: Any) -> Any:
    """Call a function with those of the known values that its parameters name."""
    parameters = inspect.signature(function).parameters
    return function(**{name: known[name] for name in parameters if name in known})


def find(*places: str) -> Any:
    """The first of some "module:name" that exists, None where none does."""
    for place in places:
        module, _, name = place.partition(":")
        with contextlib.suppress(ImportError):
            found: Any = importlib.import_module(f"sglang.srt.{module}")
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is not None:
                return found
    return None


def import_sglang() -> None:
    """Import what every question needs, the registry of models included."""
    for name in ("server_args", "model_loader.loader", "models.registry", "layers.moe.fused_moe_triton.layer"):
        importlib.import_module(f"sglang.srt.{name}")
    find("distributed.bootstrap:init_torch_distributed")


def build(argv: Sequence[str], folder: str) -> Built:
    """Build the model of a folder as the server with these flags would.

    Args:
        argv: SGLang's flags, as the user gave them.
        folder: holds config.json and what lies beside it.

    Raises:
        FlagsError: SGLang's parser refuses the flags.
        Exception: whatever SGLang raises.
    """
    args = _server_args([*_without_code(argv), "--model-path", folder, *_ours(argv)])
    _publish(args)
    resolved = _Resolved(args)
    model_config = find("configs.model_config:ModelConfig").from_server_args(args)
    for place in (
        "layers.moe:initialize_moe_config",
        "layers.quantization.fp8_utils:initialize_fp8_gemm_config",
        "layers.quantization.fp4_utils:initialize_fp4_gemm_config",
        "layers.quantization.unquant:initialize_bf16_gemm_config",
    ):
        initialize = find(place)
        if initialize is not None:
            call(initialize, server_args=args)
    _make_world(args, resolved, model_config)
    _spread_experts(args, model_config)
    downgrade = find("model_executor.model_runner_components.load_model_utils:maybe_downgrade_dtype_for_legacy_gpu")
    if downgrade is not None:
        call(downgrade, server_args=args, model_config=model_config)
    load_config = find("configs.load_config:LoadConfig")(load_format="dummy", tp_rank=0)
    quant_config = find("model_loader.loader:_get_quantization_config")(model_config, load_config)
    with on_meta(model_config.dtype):
        model = find("model_loader.loader:_initialize_model")(model_config, load_config, quant_config)
    _check_blocks(args, resolved, model_config)
    return Built(model_config, model, quant_config)


@contextlib.contextmanager
def on_meta(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of that dtype and on the meta device, wherever the code asks for them."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with OnMeta(), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(kept)


# --- the flags -------------------------------------------------------------------------------------------------------


def _without_code(argv: Sequence[str]) -> list[str]:
    """The flags without the one that would have a model's own code run."""
    return [flag for flag in argv if flag not in ("--trust-remote-code", "--trust_remote_code")]


def _ours(argv: Sequence[str]) -> list[str]:
    flags = ["--skip-tokenizer-init", "--load-format", "dummy"]
    if any(flag.split("=")[0] == "--nnodes" for flag in argv):
        flags += ["--node-rank", "0"]
        if not any(flag.split("=")[0] in ("--dist-init-addr", "--nccl-init-addr") for flag in argv):
            flags += ["--dist-init-addr", "127.0.0.1:29500"]
    return flags


def _server_args(argv: list[str]) -> Any:
    import argparse

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise FlagsError(f"{parser.prog}: error: {message}")

    kept = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign, assignment]
    try:
        args = find("server_args:prepare_server_args")(argv)
    finally:
        argparse.ArgumentParser.error = kept  # type: ignore[method-assign]
    resolve = getattr(args, "resolve_once", None)
    if resolve is not None:
        resolve()
    check = getattr(args, "check_server_args", None)
    if check is not None:
        check()
    return args


class _Resolved:
    """The flags' values after SGLang's own choices, wherever the release keeps them."""

    def __init__(self, args: Any) -> None:
        resolved = getattr(args, "resolved_dict", None)
        self._values: dict[str, Any] = resolved() if resolved is not None else {}
        self._args = args

    def get(self, name: str, default: Any) -> Any:
        """One flag's value; the default where the release has no such flag or leaves it None."""
        value = self._values.get(name, getattr(self._args, name, None))
        return default if value is None else value


def _publish(args: Any) -> None:
    publish = find("runtime_context:publish")
    ranks = find("runtime_context:SpawnRanks")
    if publish is None:
        find("server_args:set_global_server_args_for_scheduler", "server_args:set_global_server_args")(args)
        return
    more = {"ranks": call(ranks, world_rank=0, dp_rank=None, gpu_id=0)} if ranks is not None else {}
    call(publish, server_args=args, role="scheduler", **more)


# --- the parallel world ----------------------------------------------------------------------------------------------


def _make_world(args: Any, resolved: _Resolved, model_config: Any) -> None:
    tp, pp = int(resolved.get("tp_size", 1)), int(resolved.get("pp_size", 1))
    is_dp = bool(resolved.get("enable_dp_attention", False))
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": int(resolved.get("ep_size", 1)),
        "attention_data_parallel_size": int(resolved.get("dp_size", 1)) if is_dp else 1,
        "attention_context_model_parallel_size": int(resolved.get("attn_cp_size", 1)),
        "moe_data_model_parallel_size": int(resolved.get("moe_dp_size", 1)),
        "decode_context_parallel_size": int(resolved.get("dcp_size", 1)),
    }
    state = find("distributed.parallel_state:set_custom_all_reduce")
    if state is not None:
        state(False)
    with OnMeta():
        call(
            find("distributed.parallel_state:init_distributed_environment"),
            backend="nccl",
            world_size=tp * pp,
            rank=0,
            local_rank=0,
            distributed_init_method="tcp://127.0.0.1:29500",
            moe_a2a_backend=resolved.get("moe_a2a_backend", None),
        )
        call(
            find("distributed.parallel_state:initialize_model_parallel"),
            duplicate_tp_group=bool(resolved.get("enable_pdmux", False)),
            **sizes,
        )
        call(find("layers.dp_attention:initialize_dp_attention"), server_args=args, model_config=model_config)
        runtime = find("distributed.bootstrap:init_layer_runtime")
        if runtime is not None:
            call(runtime, model_config=model_config)


def _spread_experts(args: Any, model_config: Any) -> None:
    """Redundant experts count only where the experts' places are known, as the server's runner sets them."""
    compute = find("eplb.expert_location:compute_initial_expert_location_metadata")
    keep = find("eplb.expert_location:set_global_expert_location_metadata")
    if compute is not None and keep is not None:
        with torch.device("cpu"), OnCpu():
            keep(call(compute, server_args=args, model_config=model_config, moe_ep_rank=0))


def _check_blocks(args: Any, resolved: _Resolved, model_config: Any) -> None:
    """The check after building that the experts' width divides into quantisation blocks."""
    check = find("model_executor.model_runner_components.moe_ep_setup:check_quantized_moe_compatibility")
    known = {
        "model_config": model_config,
        "server_args": args,
        "tp_size": int(resolved.get("tp_size", 1)),
        "moe_ep_size": int(resolved.get("ep_size", 1)),
        "moe_dp_size": int(resolved.get("moe_dp_size", 1)),
    }
    if check is not None:
        call(check, **known)
        return
    method = find("model_executor.model_runner:ModelRunner.check_quantized_moe_compatibility")
    if method is not None:
        import types

        method(types.SimpleNamespace(**known))
