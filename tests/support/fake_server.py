"""Stands in for `sglang.launch_server`: HTTP, server-sent events, SGLang's log lines, its search for tuning files.

Copied into a stand-in `sglang` package and run by itself; nothing of moefix or of a package index is imported.

FAKE_FILES    the names it looks up, gate-up and down, with "|" between them
FAKE_STEPS    JSON: BLOCK_SIZE_M of the gate-up file's first row ("none" without a file) to seconds a token
FAKE_FAULT    JSON: the same key to "die" (at its start), "oor" (dies with OutOfResources), "mute" (never healthy),
              "errors" (every answer is an error), "stubborn" (its child ignores SIGTERM)
RECORD        a file: one line of JSON for each start
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDERS = ("triton_3_6_0",)
NOT_FOUND = "Using default MoE kernel config. Performance might be sub-optimal! Config file not found at {}, you can"
NO_DOWN = "Down MoE config file not found at {}; reusing the tuned up-projection config without TMA."
FALLBACK = (
    "Config file not found at {}. Fallback to triton version {} and use MoE kernel config from {}. Performance"
    " might be sub-optimal!"
)


def log(text):
    print(time.strftime("[%Y-%m-%d %H:%M:%S]"), text, flush=True)


def find(configs, name):
    """SGLang's search: the running Triton's folder, then the others, the newest first."""
    wanted = configs / "triton_3_6_0" / name
    if wanted.exists():
        log(f"Using MoE kernel config from {wanted}.")
        return wanted
    others = [folder for folder in configs.iterdir() if folder.name.startswith("triton_")]
    for folder in sorted(others, key=lambda path: [int(part) for part in path.name.split("_")[1:]], reverse=True):
        if (folder / name).exists():
            version = folder.name.removeprefix("triton_").replace("_", ".")
            log(FALLBACK.format(wanted, version, folder / name))
            return folder / name
    down = name.endswith("_down.json")
    log((NO_DOWN if down else NOT_FOUND).format(wanted))
    return None


def look_up():
    root = os.environ.get("SGLANG_MOE_CONFIG_DIR")
    package = Path(__file__).parent / "srt/layers/moe/moe_runner/triton_utils"
    found = [find((Path(root) if root else package) / "configs", name) for name in os.environ["FAKE_FILES"].split("|")]
    tables = [json.loads(path.read_text()) if path else None for path in found]
    key = str(next(iter(tables[0].values()))["BLOCK_SIZE_M"]) if tables[0] else "none"
    with open(os.environ["RECORD"], "a") as file:
        environment = {name: os.environ.get(name) for name in ("SGLANG_MOE_CONFIG_DIR", "NO_PROXY", "no_proxy")}
        listing = sorted(str(path.relative_to(root)) for path in Path(root).rglob("*.json")) if root else []
        record = {"argv": sys.argv[1:], "pid": os.getpid(), "key": key, "env": environment, "listing": listing}
        file.write(json.dumps({**record, "tables": tables}) + "\n")
    return key


class Engine:
    """Gives every running request a token in each step, as SGLang does."""

    def __init__(self, step):
        self.step, self.running = step, []

    async def run(self):
        while True:
            await asyncio.sleep(self.step)
            for queue in self.running:
                queue.put_nowait(None)


class Server:
    def __init__(self, engine, fault):
        self.engine, self.fault, self.counts = engine, fault, {"requests": 0, "flushes": 0}

    async def serve(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path = head.decode().split(" ")[:2]
                length = re.search(rb"content-length: (\d+)", head, re.I)
                body = await reader.readexactly(int(length[1])) if length else b""
                await self.answer(writer, method, path.split("?")[0], body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, writer, method, path, body):
        if path == "/generate":
            return await self.generate(writer, json.loads(body))
        code, answer = 200, {}
        if path == "/health" and self.fault == "mute":
            code = 503
        elif path == "/flush_cache":
            self.counts["flushes"] += 1
        elif path == "/server_info":
            answer = {"skip_tokenizer_init": "--skip-tokenizer-init" in sys.argv, "counts": self.counts}
        elif path == "/model_info":
            answer = {"model_path": "small", "tokenizer_path": "none"}
        elif path == "/v1/models":
            answer = {"data": [{"id": "small"}]}
        elif path != "/health":
            code = 404
        reply(writer, code, json.dumps(answer).encode())
        await writer.drain()

    async def generate(self, writer, request):
        self.counts["requests"] += 1
        ids, tokens = request["input_ids"], request["sampling_params"]["max_new_tokens"]
        if not all(isinstance(one, int) for one in ids):
            return reply(writer, 400, b"ids are no numbers")
        if self.fault == "errors":
            return reply(writer, 500, b'{"error": {"message": "no luck"}}')
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        queue = asyncio.Queue()
        self.engine.running.append(queue)
        out = []
        for count in range(1, tokens + 1):
            await queue.get()
            out.append(17)
            event = {"text": "x" * count, "output_ids": out, "meta_info": {"id": "a", "completion_tokens": count}}
            chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
        self.engine.running.remove(queue)
        chunk(writer, b"data: [DONE]\n\n")
        chunk(writer, b"")
        await writer.drain()


def reply(writer, code, body):
    writer.write(f"HTTP/1.1 {code} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


def chunk(writer, data):
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


async def main(key):
    fault = json.loads(os.environ.get("FAKE_FAULT", "{}")).get(key)
    if fault in ("die", "oor"):
        name = "triton.runtime.errors.OutOfResources" if fault == "oor" else "RuntimeError"
        log(f"Scheduler hit an exception: Traceback\n{name}: out of resource: shared memory, Required: 147456\x1b[0m")
        sys.exit(3)
    body = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", body if fault == "stubborn" else "import time; time.sleep(600)"])
    engine = Engine(json.loads(os.environ["FAKE_STEPS"])[key])
    server = Server(engine, fault)
    port = int([word for flag, word in zip(sys.argv, sys.argv[1:], strict=False) if flag == "--port"][-1])
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 0)
    async with await asyncio.start_server(server.serve, "127.0.0.1", port):
        log("The server is fired up and ready to roll!")
        await engine.run()


if __name__ == "__main__":
    asyncio.run(main(look_up()))
