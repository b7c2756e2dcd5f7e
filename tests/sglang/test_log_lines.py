"""SGLang's log lines: our words against the sources of three releases, and lines as they come out of a server."""

import pytest

from fixer.sglang.log_lines import LONGEST_PATH, MARKERS, Said, is_request, own_message, read_line
from tests.support.log_lines import STAMP, line_of

NAME = "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
FOLDER = "/opt/a b/sglang/configs/triton_3_6_0"


@pytest.mark.parametrize("before", ["", STAMP, " 50%|###  | 3/6 [00:01<00:01]\r" + STAMP, "100%|###| 6/6" + STAMP])
@pytest.mark.parametrize(
    ("said", "paths", "wanted", "used"),
    [
        (Said.USING, (f"{FOLDER}/{NAME}",), "", f"{FOLDER}/{NAME}"),
        (Said.FALLBACK, (f"/a/{NAME}", f"/b/{NAME}"), f"/a/{NAME}", f"/b/{NAME}"),
        (Said.REUSED_UP, ("/a/E=1,N=2_down.json",), "/a/E=1,N=2_down.json", ""),
        (Said.DEFAULT, (f"{FOLDER}/{NAME}",), f"{FOLDER}/{NAME}", ""),
        (Said.DETERMINISTIC, (), "", ""),
        (Said.READY, (), "", ""),
        (Said.NO_DOWN, ("/a/E=1,N=2_down.json",), "/a/E=1,N=2_down.json", ""),
        (Said.DENSE_USING, ("/a/N=1,K=2.json",), "", "/a/N=1,K=2.json"),
        (Said.DENSE_DEFAULT, ("/a/N=1,K=2.json",), "/a/N=1,K=2.json", ""),
    ],
)
def test_lines_are_read(before, said, paths, wanted, used):
    text = before + line_of(said, *paths)
    line = read_line(text + " you can create them with https://x" if said in (Said.DEFAULT, Said.NO_DOWN) else text)
    assert line is not None
    assert (line.said, line.wanted, line.used) == (said, wanted, used)
    assert said in (Said.DENSE_USING, Said.DENSE_DEFAULT) or any(marker in text.encode() for marker in MARKERS)


@pytest.mark.parametrize(
    "text",
    [
        "server_args=ServerArgs(model_path='m', moe_runner_backend='triton_kernel', moe_a2a_backend='none', x=1)",
        "server_args={'model_path': 'm', 'moe_runner_backend': 'triton_kernel', 'moe_a2a_backend': 'none', 'x': 1}",
    ],
)
def test_arguments_are_read_as_0_5_17_and_0_5_23_print_them(text):
    line = read_line(STAMP + text)
    assert dict(line.facts) == {"moe_runner_backend": "triton_kernel", "moe_a2a_backend": "none"}


def test_who_runs_the_experts_is_read():
    line = read_line(STAMP + "Using CompressedTensorsWNA16MarlinMoEMethod")
    assert dict(line.facts) == {"method": "CompressedTensorsWNA16MarlinMoEMethod"}


@pytest.mark.parametrize(
    "text",
    [
        STAMP + "Decode batch, #running-req: 1, #token: 77",
        'INFO:     127.0.0.1:55 - "POST /generate HTTP/1.1" 200 OK',
        'INFO:     127.0.0.1:55 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
    ],
)
def test_a_served_request_is_seen(text):
    assert read_line(text).said is Said.SERVED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Using default W8A8 Block FP8 kernel config. Performance might be bad! Config file not found at /a.json",
        "Using MoE kernel config from nowhere",
        "Using MoE kernel config from " + "x" * (LONGEST_PATH + 1) + ".json.",
        'INFO:     127.0.0.1:55 - "POST /generate HTTP/1.1" 503',
        'INFO:     127.0.0.1:55 - "GET /health HTTP/1.1" 200 OK',
        "a prompt that says: the server is fired up",
    ],
)
def test_other_lines_say_nothing(text):
    assert read_line(text) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[2026-11-23 23:48:52] x", "x"),
        ("[2026-11-23 23:48:52.123 DP0 PP1 ATTN_CP0 MOE_DP1 TP0 EP3] x", "x"),
        ("Loading safetensors:  75%|###| 3/4 [00:01<00:00, 2.0it/s]\r[2026-11-23 23:48:52 TP0] x\r", "x\r"),
        ("Capturing batches (bs=1 avail_mem=2.1 GB): 100%|###| 6/6 [00:01<00:00][2026-11-23 23:48:52 TP0] x", "x"),
        ("x [2026-11-23 23:48:52] y", None),
        ("the model says: a | b | [2026-11-23 23:48:52] y", None),
        (" [2026-11-23 23:48:52] y", None),
        ("[2026-11-23 23:48:52]", None),
        ("", None),
    ],
)
def test_sglangs_own_lines_begin_with_its_prefix(line, message):
    assert own_message(line) == message


def test_what_stands_within_a_line_is_not_the_lines_message():
    prompt = STAMP + "Receive: obj=GenerateReqInput(text='100%|#| 1/1 [0]" + STAMP + line_of(Said.READY) + "')"
    assert read_line(prompt) is None
    assert is_request(own_message(prompt))
    assert is_request('{"timestamp": "x", "event": "request.finished"}')
    assert is_request("Receive OpenAI: obj={}")
    assert not is_request("Finished loading")
