"""The load generator, against a server that speaks as SGLang does."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from fixer.base.errors import SGLangError
from fixer.bench.load_generator import FIRST_ID, percentile, prompts, run_pass, summary, timed
from fixer.bench.passes import Load
from fixer.machine.processes import free_port


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    running = []

    def begin(step: float, fault: str = "") -> int:
        folder, port = tmp_path_factory.mktemp("server"), free_port()
        (folder / "srt/layers/moe/moe_runner/triton_utils/configs").mkdir(parents=True)
        program = folder / "launch_server.py"
        program.write_bytes((Path(__file__).resolve().parents[1] / "support" / "fake_server.py").read_bytes())
        settings = {"FAKE_FILES": "a.json|a_down.json", "FAKE_STEPS": json.dumps({"none": step})}
        settings |= {"FAKE_FAULT": json.dumps({"none": fault}), "RECORD": str(folder / "record")}
        command = [sys.executable, str(program), "--port", str(port)]
        environment = {name: value for name, value in os.environ.items() if name != "SGLANG_MOE_CONFIG_DIR"}
        running.append(
            subprocess.Popen(command, env=environment | settings, stdout=subprocess.DEVNULL, start_new_session=True)
        )
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                return port
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError("the stand-in did not start")

    yield begin
    for process in running:
        os.killpg(process.pid, 9)
        process.wait()


def test_times_are_those_of_the_server(start):
    step = 0.03
    passed = run_pass(start(step), Load(4, 16, 20, 8), 1, 1000)
    assert passed.failed == 0
    assert 0.9 * step < passed.itl_ms[0] / 1e3 < 10 * step
    assert passed.itl_ms[1] >= passed.itl_ms[0]
    assert 0.4 / step < passed.output_tokens_per_s < 4.5 / step  # a first token may come within a step


def test_a_pass_empties_the_cache_and_sends_so_many_requests(start):
    port = start(0.001)
    counts = [count(port)]
    run_pass(port, Load(2, 5, 3, 7), 1, 1000)
    counts.append(count(port))
    assert counts[1]["requests"] - counts[0]["requests"] == 7
    assert counts[1]["flushes"] - counts[0]["flushes"] == 1


def count(port):
    return httpx.get(f"http://127.0.0.1:{port}/server_info", trust_env=False).json()["counts"]


def test_a_prefill_has_no_time_between_tokens(start):
    passed = run_pass(start(0.005), Load(1, 64, 1, 3), 1, 1000)
    assert passed.itl_ms is None
    assert passed.ttft_ms[1] >= passed.ttft_ms[0] > 0


def test_no_answer_at_all(start):
    with pytest.raises(SGLangError, match=r"not one request.*500.*no luck"):
        run_pass(start(0.005, "errors"), Load(2, 8, 4, 3), 1, 1000)
    with pytest.raises(SGLangError, match="not one request"):
        run_pass(free_port(), Load(1, 8, 4, 2), 1, 1000)


def test_the_client_keeps_up_with_64_streams(start):
    """Its own time for an event is far below what 64 streams leave it: a token each 17 ms makes 265 us an event."""
    port, load = start(0.017), Load(64, 512, 64, 64)
    run_pass(port, load, 1, 150_000)
    before = time.process_time()
    passed = run_pass(port, load, 2, 150_000)
    spent = (time.process_time() - before) / (64 * 64)
    assert passed.failed == 0
    assert spent < 265e-6, f"{1e6 * spent:.0f} us an event"


def test_prompts_are_the_same_for_a_seed_and_begin_differently():
    load = Load(1, 12, 1, 200)
    assert prompts(load, 1, 5000) == prompts(load, 1, 5000) != prompts(load, 2, 5000)
    made = prompts(load, 1, 5000)
    assert len({ids[0] for ids in made}) == 200
    assert all(len(ids) == 12 and min(ids) >= FIRST_ID and max(ids) < 5000 for ids in made)
    assert max(max(ids) for ids in prompts(Load(1, 50, 1, 50), 1, 40)) < 40  # fewer ids than requests
    assert max(max(ids) for ids in prompts(load, 1, 10**9)) < 150_000


def test_percentiles():
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([3.0], 0.99) == 3.0


def follow(*pieces, tokens=3):
    async def stream():
        for piece in pieces:
            yield piece

    return asyncio.run(timed(stream(), time.perf_counter(), tokens))


def event(count, **more):
    return b"data: " + json.dumps({"meta_info": {"completion_tokens": count}, **more}).encode() + b"\n\n"


def test_events_in_any_pieces():
    whole = event(1) + event(2) + event(3) + b"data: [DONE]\n\n"
    assert follow(whole).tokens == 3
    assert follow(*(whole[place : place + 1] for place in range(len(whole)))).tokens == 3
    assert len(follow(event(1), event(3)).between) == 2
    assert follow(event(1, text='an "error" in the text'), event(3)).tokens == 3


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((), "after 0 of 3"),
        ((event(1), event(2)), "after 2 of 3"),
        ((event(1), b'data: {"error": {"message": "boom"}}\n\n'), "boom"),
        ((b"x" * (1 << 24), b"y"), "without end"),
    ],
)
def test_a_stream_that_is_none(pieces, words):
    with pytest.raises(ValueError, match=words):
        follow(*pieces)


def test_a_pass_without_requests():
    with pytest.raises(SGLangError):
        summary([], [], 1.0)
