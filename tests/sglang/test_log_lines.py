"""SGLang's log lines: our words against the sources of three releases, and lines as they come out of a server."""

import ast

import pytest

from fixer.sglang.log_lines import LONGEST_PATH, MARKERS, WORDING, Said, read_line
from fixer.sglang.lookup import LOOKUP_SOURCES
from tests.support.log_lines import STAMP, line_of

NAME = "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
FOLDER = "/opt/a b/sglang/configs/triton_3_6_0"


def texts_of(package):
    """Every text in the look-up's source, with %s for what is filled in."""
    path = next(package / relative for relative in LOOKUP_SOURCES if (package / relative).exists())
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "%s" for part in node.values)
            found.append("".join(parts))
    return found


@pytest.mark.parametrize("version", ["0.4.9", "0.5.17", "0.5.23"])
@pytest.mark.parametrize("said", [Said.USING, Said.FALLBACK, Said.DEFAULT, Said.REUSED_UP, Said.DETERMINISTIC])
def test_the_words_are_sglangs(trees, version, said):
    if version == "0.4.9" and said in (Said.REUSED_UP, Said.DETERMINISTIC):
        return  # came later
    wording = WORDING[said].replace("%v", "%s")
    assert [text for text in texts_of(trees[version].package) if text.startswith(wording)]


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
    ],
)
def test_lines_are_read(before, said, paths, wanted, used):
    text = before + line_of(said, *paths)
    line = read_line(text + " you can create them with https://x" if said is Said.DEFAULT else text)
    assert line is not None
    assert (line.said, line.wanted, line.used) == (said, wanted, used)
    assert any(marker in text.encode() for marker in MARKERS)


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
