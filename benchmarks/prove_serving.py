"""Prove the main job on a machine with a card: from an empty data folder to a tuned server that answers, twice.

    python benchmarks/prove_serving.py --model FOLDER --out FOLDER [--dense FOLDER] [-- SGLang flags]

Starts `python entrypoint.py --model FOLDER ...` three times (empty data folder; kept artefact; a dense model), waits
until the server is healthy, asks /generate once, stops it with SIGTERM, and writes what happened to OUT/proof.json with
the logs beside it. After the first answer each start is asked for one token at several prompt lengths, the first time
and four times more: `first_token_seconds`. With --unwarmed a fourth start uses an empty Triton cache, to show what
compiling ahead is worth. Exits 1 when a start did not do what it should: the first must tune and SGLang's log must name
both files, the second must not tune.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
USING = re.compile(r"Using MoE kernel config from (.*?\.json)")
DEFAULT = re.compile(r"Using default MoE kernel config.*?not found at (.*?\.json)")
LAUNCHED = re.compile(r"moefix: .*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dense")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--home", type=Path, default=Path("/tmp/moefix-proof"))
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--wait", type=float, default=400)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--unwarmed", action="store_true")
    parser.add_argument("flags", nargs="*", help="further SGLang flags, after --")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    starts = [("first", options.model), ("second", options.model)][: options.starts]
    starts += [("dense", options.dense)] if options.dense else []
    starts += [("unwarmed", options.model)] if options.unwarmed else []
    results = [start(name, model, options) for name, model in starts]
    proof = {"environment": environment(), "starts": results}
    (options.out / "proof.json").write_text(json.dumps(proof, indent=1) + "\n")
    failures = [problem for result in results for problem in problems(result)]
    print("\n".join(failures) or "proved: tuned, both files picked up, answered; the second start tuned nothing")
    return 1 if failures else 0


def start(name: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One start of moefix, to the answer of /generate and the end of the server."""
    log = options.out / f"{name}.log"
    command = [sys.executable, str(ROOT / "entrypoint.py"), "--model", model, "--host", "127.0.0.1"]
    command += ["--port", str(options.port), *options.flags]
    variables = {**os.environ, "MOEFIX_HOME": str(options.home), "PYTHONUNBUFFERED": "1"}
    if name == "unwarmed":
        variables["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="moefix-unwarmed-")
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables, cwd=ROOT
        )
    seconds_to_server = seconds_to_health = None
    while time.monotonic() - began < options.wait and process.poll() is None:
        if seconds_to_server is None and is_server(process.pid):
            seconds_to_server = time.monotonic() - began
        if seconds_to_server is not None and ask(options.port, "/health") is not None:
            seconds_to_health = time.monotonic() - began
            break
        time.sleep(0.02 if seconds_to_server is None else 1.0)
    answer = generate(options.port) if seconds_to_health else None
    first_tokens = first_token_seconds(options.port) if answer else None
    same_process = is_server(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        code: int | None = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    text = log.read_text(errors="replace").replace("\r", "\n")
    return {
        "name": name,
        "command": command[1:],
        "seconds_to_server_process": seconds_to_server,
        "seconds_to_health": seconds_to_health,
        "server_has_moefix_process_id": same_process,
        "exit_code_after_sigterm": code,
        "generate": answer,
        "first_token_seconds": first_tokens,
        "files_used": sorted({Path(path).name for path in USING.findall(text)}),
        "files_missing": sorted({Path(path).name for path in DEFAULT.findall(text)}),
        "moefix_lines": LAUNCHED.findall(text),
        "trouble": re.findall(r".*(?:OutOfResources|out of memory|Scheduler hit an exception).*", text)[:5],
    }


def is_server(pid: int) -> bool:
    """Whether the process is SGLang's launcher by now."""
    try:
        return b"sglang.launch_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ask(port: int, path: str, body: Any = None) -> Any:
    """An answer of the server, None where there is none."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=200 if body else 5) as response:
            return json.loads(response.read() or b"true")
    except (OSError, ValueError, urllib.error.URLError):
        return None


def generate(port: int) -> dict[str, Any] | None:
    """Sixteen tokens for a prompt of 64 token ids."""
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    began = time.monotonic()
    answer = ask(port, "/generate", {"input_ids": list(range(1000, 1064)), "sampling_params": sampling})
    if answer is None:
        return None
    return {"seconds": round(time.monotonic() - began, 3), "output_ids": answer["output_ids"]}


def first_token_seconds(port: int) -> dict[str, dict[str, float]]:
    """For prompts of several lengths: seconds to the first token, of the first such request and of later ones."""
    seconds = {}
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    ids = random.Random(7)
    for length in (50, 300, 700, 1400, 1900, 3000, 4000):
        times = []
        for _ in range(5):
            prompt = [ids.randrange(10, 150000) for _ in range(length)]  # new ids: nothing is cached
            began = time.monotonic()
            ask(port, "/generate", {"input_ids": prompt, "sampling_params": sampling})
            times.append(time.monotonic() - began)
        later = statistics.median(times[1:])
        seconds[str(length)] = {"first": round(times[0], 4), "later": round(later, 4), "ratio": times[0] / later}
    return seconds


def problems(result: dict[str, Any]) -> list[str]:
    """What a start did not do as it should."""
    name, found = result["name"], []
    if not result["generate"] or len(result["generate"]["output_ids"]) != 16:
        found.append(f"{name}: /generate did not answer")
    if not result["server_has_moefix_process_id"]:
        found.append(f"{name}: the server is another process than moefix was")
    tuned = any("searched" in line for line in result["moefix_lines"])
    if tuned != (name == "first"):
        found.append(f"{name}: {'tuned' if tuned else 'did not tune'}")
    if name != "dense" and (len(result["files_used"]) != 2 or result["files_missing"]):
        found.append(f"{name}: SGLang used {result['files_used']} and missed {result['files_missing']}")
    return found


def environment() -> dict[str, str]:
    """Where this was measured."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    packages = {package: version_of(package) for package in ("sglang", "torch", "triton")}
    return {
        "card": card,
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "date": time.strftime("%Y-%m-%d"),
        **packages,
    }


if __name__ == "__main__":
    sys.exit(main())
