"""What moefix knows of SGLang's server as its user: flags, addresses, the log's lines about files, its own load tool.

Read off 0.5.17 (`srt/entrypoints/http_server.py`, `benchmark/serving.py`, `fused_moe_triton_config.py`) and 0.5.23.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fixer.base.errors import MoefixError
from fixer.bench_results import Load
from fixer.load import Pass
from fixer.model.config_file import read_json

# --- SGLang's own load tool ------------------------------------------------------------------------------------------


def client_module(package: Path) -> str:
    """`bench_serving`'s module: it moved, and the old name warns that it will go."""
    return "sglang.benchmark.serving" if (package / "benchmark" / "serving.py").is_file() else "sglang.bench_serving"


def is_plain_model(model_path: str, revision: str | None) -> bool:
    """Whether a model's configuration and tokenizer name no code of their own; False where that cannot be told.

    The tool loads the tokenizer with `trust_remote_code=True` (benchmark/serving.py, check_chat_template).
    """
    paths = [_model_file(model_path, name, revision) for name in ("config.json", "tokenizer_config.json")]
    if paths[0] is None:
        return False
    for path in filter(None, paths):
        try:
            if "auto_map" in read_json(path):
                return False
        except MoefixError:
            return False
    return True


def _model_file(model_path: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a hub's model as the server's download left it in the cache."""
    folder = Path(model_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model_path, name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def client_command(package: Path, port: int, load: Load, seed: int, output: Path) -> list[str]:
    """Its command line for one pass: random token ids of exactly the load's lengths, results appended to `output`."""
    options = {
        "--backend": "sglang",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dataset-name": "random-ids",
        "--num-prompts": str(load.requests),
        "--random-input-len": str(load.input_tokens),
        "--random-output-len": str(load.output_tokens),
        "--random-range-ratio": "1.0",
        "--max-concurrency": str(load.streams),
        "--seed": str(seed),
        "--warmup-requests": "0",
        "--output-file": str(output),
    }
    words = [word for option in options.items() for word in option]
    return [
        sys.executable,
        "-m",
        client_module(package),
        *words,
        "--tokenize-prompt",
        "--flush-cache",
        "--disable-tqdm",
    ]


def read_client_output(content: bytes, load: Load) -> Pass:
    """The pass in the last line of its output file.

    Raises:
        ValueError: it is none.
    """
    lines = content.strip().splitlines()
    try:
        row = json.loads(lines[-1]) if lines else None  # not `parse_json`: an unlimited request rate is Infinity there
    except RecursionError:
        raise ValueError("sglang.bench_serving wrote something nested without end") from None
    if not isinstance(row, dict):
        raise ValueError("sglang.bench_serving wrote no result")

    def number(name: str) -> float:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
            raise ValueError(f"sglang.bench_serving's {name} is no number")
        return float(value)

    def times(name: str) -> tuple[float, float] | None:
        middle, high = number(f"median_{name}_ms"), number(f"p99_{name}_ms")
        return (middle, high) if middle > 0 and high > 0 else None

    completed = int(number("completed"))
    if completed < 1 or number("output_throughput") <= 0:
        raise ValueError("sglang.bench_serving completed not one request")
    return Pass(
        output_tokens_per_s=number("output_throughput"),
        ttft_ms=times("ttft"),
        itl_ms=None if load.is_prefill else times("itl"),
        failed=max(0, load.requests - completed),
        fault="" if completed >= load.requests else "sglang.bench_serving does not say why",
    )
