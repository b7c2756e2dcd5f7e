"""Runs each kind of expert layer and quantised linear layer on meta tensors, up to the names that SGLang looks up."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fixer.model.asking.child.build import Built, find, on_meta
from fixer.model.asking.child.world import no_launches

TOKENS = 16
"""Rows of the hidden states that a layer is run with. No name depends on it."""

MOST_NAMES = 2000
"""Layer names of one kind that are given back."""

_CONFIG_MODULES = (
    "layers.moe.moe_runner.triton_utils.fused_moe_triton_config",
    "layers.moe.fused_moe_triton.fused_moe_triton_config",
    "layers.moe.fused_moe_triton.fused_moe",
)
_LAYER = ("layers.moe.fused_moe_triton.layer:FusedMoE",)
_LINEAR = ("layers.linear:LinearBase",)


class _Enough(BaseException):
    """Everything that was to be seen was seen: nothing between here and the layer's forward may catch it."""


def look(built: Built, root: str) -> dict[str, Any]:
    """What every expert layer and every quantised linear layer of a model looks up.

    Args:
        built: the model.
        root: SGLang's package folder, to name the place where a forward ended.

    Returns:
        {"experts": [...], "dense": [...]}, one row a kind of layer (`answer.py` says what each holds).
    """
    text = getattr(built.model_config, "hf_text_config", None) or built.model_config.hf_config
    with on_meta(built.model_config.dtype), no_launches(), _unpacked_shapes(), torch.no_grad():
        experts = [_expert_row(kind, text, root) for kind in _kinds(built.model, find(*_LAYER))]
        dense = [_dense_row(kind, root) for kind in _kinds(built.model, find(*_LINEAR)) if _is_quantised(kind[0][1])]
    return {"outcome": "looked", "experts": experts, "dense": dense}


def _kinds(model: torch.nn.Module, layer_class: Any) -> list[list[tuple[str, Any]]]:
    """The layers of a class, with their names, those that are alike together."""
    kinds: dict[Any, list[tuple[str, Any]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, layer_class):
            method = getattr(layer, "quant_method", None)
            scheme = getattr(layer, "scheme", None)
            shapes = tuple((key, tuple(value.shape), str(value.dtype)) for key, value in layer.named_parameters())
            kinds.setdefault((type(layer), type(method), type(scheme), shapes), []).append((name, layer))
    return list(kinds.values())


# --- experts ---------------------------------------------------------------------------------------------------------


def _expert_row(kind: list[tuple[str, Any]], text: Any, root: str) -> dict[str, Any]:
    layer = kind[0][1]
    weights_fault = _process_weights(layer)
    _give_loader_attributes(layer)
    asked: list[dict[str, Any]] = []
    with _listening(asked) as looked_up:
        ended, fault = _ends(lambda: layer.forward(*_inputs(layer, text)), root)
    hidden, top_k = _sizes(layer, text)
    return {
        "layers": len(kind),
        "names": [name for name, _ in kind][:MOST_NAMES],
        "hidden": hidden,
        "top_k": top_k,
        "activation": str(torch.get_default_dtype()).removeprefix("torch."),
        "layer_class": type(layer).__name__,
        "method": type(layer.quant_method).__name__,
        "scheme": _class_name(getattr(layer, "scheme", None)),
        "runner": _runner(layer),
        "asked": asked,
        "looked_up": bool(looked_up),
        "ended": ended,
        "fault": fault,
        "weights_fault": weights_fault,
    }


def _process_weights(layer: Any) -> str:
    """What the loader does after the weights are read; it may fail on tensors without numbers, and that is noted."""
    try:
        layer.quant_method.process_weights_after_loading(layer)
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}"[:300]
    return ""


def _give_loader_attributes(layer: Any) -> None:
    """bitsandbytes' loader hangs the packing's state on the weights; the forward reads it."""
    if "BitsAndBytes" in type(layer.quant_method).__name__:
        for name in ("w13_weight", "w2_weight"):
            weight = getattr(layer, name, None)
            if weight is not None and not hasattr(weight, "bnb_quant_state"):
                weight.bnb_quant_state = {0: None}


@contextlib.contextmanager
def _unpacked_shapes() -> Iterator[None]:
    """Two packages' unpacking of 4-bit weights gives an empty tensor of the unpacked shape, and launches no kernel."""
    changed = []
    for name, function, unpack in (
        ("bitsandbytes.functional", "dequantize_4bit", lambda packed, *_, **__: torch.empty(packed.numel() * 2)),
        ("triton_kernels.numerics_details.mxfp", "upcast_from_mxfp", _upcast),
    ):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            changed.append((module, function, getattr(module, function, None)))
            setattr(module, function, unpack)
    try:
        yield
    finally:
        for module, function, kept in changed:
            setattr(module, function, kept)


def _upcast(packed: Any, *_: Any, dtype: Any = None, axis: int = -1, **__: Any) -> Any:
    shape = list(packed.shape)
    shape[axis] *= 2
    return torch.empty(shape, dtype=dtype or torch.get_default_dtype())


def _sizes(layer: Any, text: Any) -> tuple[int, int]:
    """The hidden size and the experts a token goes to; a few models leave them to their configuration."""
    hidden = getattr(layer, "hidden_size", None) or text.hidden_size
    top_k = getattr(layer, "top_k", None) or _first(
        text, "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk"
    )
    return int(hidden), top_k if isinstance(top_k, int) else 2


def _inputs(layer: Any, text: Any) -> tuple[Any, Any]:
    """Hidden states and the router's choice for some tokens, as meta tensors."""
    hidden, top_k = _sizes(layer, text)
    dtype = torch.get_default_dtype()
    weights = torch.empty((TOKENS, top_k), dtype=torch.float32)
    ids = torch.empty((TOKENS, top_k), dtype=torch.int32)
    logits = torch.empty((TOKENS, int(layer.num_experts)), dtype=torch.float32)
    return torch.empty((TOKENS, hidden), dtype=dtype), find("layers.moe.topk:StandardTopKOutput")(weights, ids, logits)


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@contextlib.contextmanager
def _listening(asked: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Hear each file name that SGLang builds; the forward ends at the down name, or the first where files are joint."""
    module = next(m for m in map(_import, _CONFIG_MODULES) if m is not None and hasattr(m, "get_config_file_name"))
    name_of, configs_of = module.get_config_file_name, module.get_moe_configs
    has_pairs = "down_moe" in inspect.signature(name_of).parameters
    came: list[str] = []

    def heard(*args: Any, **kwargs: Any) -> str:
        bound = inspect.signature(name_of).bind(*args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        name = str(name_of(*args, **kwargs))
        block = values.get("block_shape")
        asked.append(
            {
                "E": int(values["E"]),
                "N": int(values["N"]),
                "dtype": values.get("dtype"),
                "block_shape": [int(side) for side in block] if block and all(block) else None,
                "per_channel_quant": bool(values.get("per_channel_quant", False)),
                "down": bool(values.get("down_moe", False)),
                "name": name,
            }
        )
        if values.get("down_moe") or not has_pairs:
            raise _Enough
        return name

    def wanted(*args: Any, **kwargs: Any) -> Any:
        came.append("get_moe_configs")
        return configs_of(*args, **kwargs)

    if hasattr(configs_of, "cache_clear"):
        configs_of.cache_clear()
    module.get_config_file_name, module.get_moe_configs = heard, wanted
    try:
        yield came
    finally:
        module.get_config_file_name, module.get_moe_configs = name_of, configs_of


def _import(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(f"sglang.srt.{name}")
    return None


def _runner(layer: Any) -> str:
    """The back end that SGLang chose for the layer, where it says so."""
    for owner in (getattr(layer, "scheme", None), layer.quant_method, getattr(layer.quant_method, "scheme", None)):
        runner = getattr(owner, "runner", None)
        backend = getattr(runner, "runner_backend", None)
        if backend is not None:
            return str(getattr(backend, "value", backend))
    return ""


def _class_name(value: Any) -> str:
    return "" if value is None else type(value).__name__


def _ends(run: Callable[[], Any], root: str) -> tuple[list[str], str]:
    """Run something; give the places inside SGLang on the way to where it ended, and with what."""
    try:
        run()
    except _Enough:
        return [], ""
    except Exception as fault:
        frames = traceback.extract_tb(fault.__traceback__)
        return [_place(frame, root) for frame in frames][-12:], f"{type(fault).__name__}: {fault}"[:300]
    return [], ""


def _place(frame: traceback.FrameSummary, root: str) -> str:
    """ "layers/moe/moe_runner/triton.py:fused_experts" for SGLang's own code, "flashinfer/...:f" for another's."""
    path = Path(frame.filename)
    with contextlib.suppress(ValueError):
        return f"{path.resolve().relative_to(Path(root).resolve() / 'srt')}:{frame.name}"
    return f"{'/'.join(path.parts[-3:])}:{frame.name}"


# --- linear layers ---------------------------------------------------------------------------------------------------


def _is_quantised(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.dim() == 2 and weight.dtype in (torch.float8_e4m3fn, torch.int8)


def _dense_row(kind: list[tuple[str, Any]], root: str) -> dict[str, Any]:
    layer = kind[0][1]
    method, scheme = layer.quant_method, getattr(layer, "scheme", None)
    rows, columns = (int(side) for side in layer.weight.shape)
    held = [item for owner in (scheme, method) if owner is not None for item in vars(owner).items()]
    functions = [value for name, value in held if name.endswith("_linear") and callable(value)]
    weights_fault = _process_weights(layer)
    asked: list[str] = []
    with _listening_dense(asked):
        ended, fault = _ends(lambda: layer.quant_method.apply(layer, torch.empty((TOKENS, columns))), root)
    return {
        "layers": len(kind),
        "names": [name for name, _ in kind][:MOST_NAMES],
        "method": type(method).__name__,
        "scheme": _class_name(scheme),
        "weight": str(layer.weight.dtype).removeprefix("torch."),
        "function": getattr(functions[0], "__name__", "") if functions else "",
        "N": rows,
        "K": columns,
        "asked": asked,
        "ended": ended,
        "fault": fault,
        "weights_fault": weights_fault,
    }


@contextlib.contextmanager
def _listening_dense(asked: list[str]) -> Iterator[None]:
    """Hear which of SGLang's look-ups of a dense product's file is reached, past the activations' quantisation."""
    import sys

    changed: list[tuple[Any, str, Any]] = []

    def replace(module: Any, name: str, value: Any) -> None:
        changed.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def hear(name: str) -> Callable[..., Any]:
        def heard(*_: Any, **__: Any) -> Any:
            asked.append(name)
            raise _Enough

        return heard

    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("sglang.") or module is None:
            continue
        for name, value in list(vars(module).items()):
            if not callable(value) or isinstance(value, type):
                continue
            if name.startswith("get_w8a8_") and name.endswith(("_config", "_configs")):
                replace(module, name, hear(name))
            elif name.endswith(("quant_fp8", "quant_int8")):
                replace(module, name, _quantised(value, torch.int8 if "int8" in name else torch.float8_e4m3fn))
    try:
        yield
    finally:
        for module, name, value in reversed(changed):
            setattr(module, name, value)


def _quantised(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The activations' quantisation, which has no answer for meta tensors: values of that type, one scale a row."""

    def quantise(x: Any, *args: Any, **kwargs: Any) -> Any:
        group = next((value for value in (*args, *kwargs.values()) if isinstance(value, int) and value > 1), 0)
        scales = torch.empty((x.shape[0], x.shape[1] // group if group else 1), dtype=torch.float32)
        return torch.empty_like(x, dtype=dtype), scales

    return quantise
