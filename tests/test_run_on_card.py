"""benchmarks/run_on_card, with a stand-in for the site of SGLang that the GPU machine gets."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.support.serve_machine import ServeMachine
from tests.support.serving import ROOT

SCRIPT = ROOT / "benchmarks" / "run_on_card"
FLAGS = (
    *("--load-format", "dummy", "--skip-tokenizer-init", "--attention-backend", "triton"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none", "--moe-runner-backend", "triton"),
    *("--fp8-gemm-backend", "triton", "--mm-feature-transport", "cpu", "--cuda-graph-backend-prefill", "disabled"),
    *("--cuda-graph-max-bs-decode", "64", "--mem-fraction-static", "0.85"),
)


def test_both_limits_and_a_models_folder(tmp_path, trees, driver, models, compiled):
    machine = ServeMachine(tmp_path, trees["0.5.17"].package, driver, models, compiled)
    model = tmp_path / "base" / "models" / "small"
    shutil.copytree(machine.model, model)
    site = tmp_path / ".site"
    site.mkdir()
    (site / "setup.sh").write_text(f"export SITE_BASE={tmp_path / 'base'}\n")
    machine.flags = ("--model", str(model), *FLAGS)
    machine.tuned()
    machine.artefact(shared_memory=101376)
    out = tmp_path / "out"
    environment = machine.env | {
        "OUT": str(out),
        "SITE": str(site),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(*words):
        command = ["bash", str(SCRIPT), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    done = run("-L", "1:8:4:3", "-r", "1", "small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["key"] for record in machine.records] == ["none", "16", "16", "16"]
    assert machine.records[0]["argv"][: len(FLAGS)] == [*FLAGS]
    assert sorted(path.name for path in out.iterdir()) == [
        *("artefacts.tar.gz", "env.txt", "logs.tar.gz", "run.log", "serve-101376.json", "serve-own.json")
    ]
    results = [json.loads((out / f"serve-{limit}.json").read_text()) for limit in ("own", "101376")]
    assert [(row["smem_limit"], row["complete"]) for row in results] == [(None, True), (101376, True)]
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert len([name for name in logs.getnames() if name.endswith(".log")]) == 4
    machine.record.unlink()
    limits = ("-L", "1:8:4:3", "-r", "1", "-p", "1", "-l", "own")
    assert run(*limits, str(model), "--chunked-prefill-size", "4096").returncode == 0
    assert [record["key"] for record in machine.records] == ["none", "16"]
    assert machine.records[0]["argv"][: len(FLAGS) + 2] == [*FLAGS, "--chunked-prefill-size", "4096"]
    assert json.loads((out / "serve.json").read_text())["serve"][0]["tuned"]["starts"] == [1]
    assert run("none").returncode == 2
    assert "run_on_card [-l" in run("-h").stdout
