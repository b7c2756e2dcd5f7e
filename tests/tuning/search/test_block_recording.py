"""The search against the whole landscape of block-wise FP8 on an H200, which was not there when it was written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RECORDING = ROOT / "benchmarks" / "recordings" / "qwen3-30b-a3b-fp8-block.h200.csv.gz"


def test_the_search_finds_what_the_exhaustive_sweep_found(moefix_home):
    command = [sys.executable, "benchmarks/replay.py", str(RECORDING), "--json", "--dtype", "fp8_w8a8"]
    result = subprocess.run(
        [*command, "--block-shape", "128,128"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"MOEFIX_HOME": str(moefix_home), "PATH": "/usr/bin:/bin"},
    )
    report = json.loads(result.stdout)
    assert report["kernels"] <= 300 < report["space"]
    assert report["regret"]["geomean"] <= 1.003
    assert report["regret"]["max"] <= 1.015
    assert len(report["regret"]["rows"]) == 19
