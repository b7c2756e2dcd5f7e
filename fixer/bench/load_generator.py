"""Puts a server on this machine under load with token ids, which needs no tokenizer, and times every token.

Only 127.0.0.1 is ever asked, and a pass has a known number of requests and tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import httpx

from fixer.base.errors import SGLangError
from fixer.bench.passes import Load, Pass
from fixer.sglang.server import FLUSH_CACHE

REQUEST_SECONDS = 300.0
"""A request that takes longer has failed."""

FIRST_ID, MOST_IDS = 10, 150_000
"""Prompts are made of ids from the first on: below it are control tokens. A smaller vocabulary has fewer."""

MOST_EVENT_BYTES = 1 << 24
"""No event of a stream is longer: it holds one request's token ids."""

_TOTAL = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')


@dataclass(frozen=True)
class Answer:
    """One request's times in seconds: to the first token, and between tokens (those of one piece share its time)."""

    first: float
    between: tuple[float, ...]
    tokens: int


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def prompts(load: Load, seed: int, vocabulary: int) -> list[list[int]]:
    """Each request's token ids, the same for the same seed. No two begin alike, so that none shares a cached prefix."""
    top = max(FIRST_ID + 1, min(vocabulary, MOST_IDS))
    chance = random.Random(seed)  # noqa: S311 (a load, no secret)
    ids = range(FIRST_ID, top)
    first = chance.sample(ids, load.requests) if load.requests <= len(ids) else chance.choices(ids, k=load.requests)
    return [[start, *chance.choices(ids, k=load.input_tokens - 1)] for start in first]


def run_pass(port: int, load: Load, seed: int, vocabulary: int) -> Pass:
    """Empty the server's prefix cache, put it under the load, and wait for the last answer.

    Args:
        port: the server's, on 127.0.0.1.
        load: how many requests, how many at a time, and how long.
        seed: of the prompts.
        vocabulary: ids stay below it.

    Raises:
        SGLangError: not one request was answered.
    """
    return asyncio.run(_pass(port, load, prompts(load, seed, vocabulary)))


async def _pass(port: int, load: Load, ids: Sequence[Sequence[int]]) -> Pass:
    limits = httpx.Limits(max_connections=load.streams + 1, max_keepalive_connections=load.streams + 1)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_SECONDS, limits=limits, trust_env=False
    ) as client:
        await _flush(client)
        await _connect(client, load.streams)
        # Encoded before the clock starts: the server's time is what is measured.
        bodies = [_body(prompt, load.output_tokens) for prompt in ids]
        turns = asyncio.Semaphore(load.streams)
        began = time.perf_counter()
        answers = await asyncio.gather(*(_one(client, turns, body, load.output_tokens) for body in bodies))
        seconds = time.perf_counter() - began
    return summary([answer for answer in answers if isinstance(answer, Answer)], _faults(answers), seconds)


def _faults(answers: Sequence[Answer | str]) -> list[str]:
    return [answer for answer in answers if isinstance(answer, str)]


def summary(answers: Sequence[Answer], faults: Sequence[str], seconds: float) -> Pass:
    """A pass from its answers.

    Raises:
        SGLangError: there is none.
    """
    if not answers:
        raise SGLangError(f"The server answered not one request of a load: {faults[0] if faults else 'no requests'}.")
    first = [1e3 * answer.first for answer in answers]
    between = [1e3 * gap for answer in answers for gap in answer.between]
    return Pass(
        output_tokens_per_s=round(sum(answer.tokens for answer in answers) / seconds, 3),
        ttft_ms=_median_and_p99(first),
        itl_ms=_median_and_p99(between) if between else None,
        failed=len(faults),
        fault=faults[0] if faults else "",
    )


def _median_and_p99(values: Sequence[float]) -> tuple[float, float]:
    # Never zero, which would be no time: two tokens may come in one piece.
    return max(1e-3, round(percentile(values, 0.5), 3)), max(1e-3, round(percentile(values, 0.99), 3))


async def _flush(client: httpx.AsyncClient) -> None:
    """Empty the prefix cache. A server that still works on something refuses; it gets a few tries."""
    for _ in range(20):
        with contextlib.suppress(httpx.HTTPError):
            if (await client.post(FLUSH_CACHE)).status_code == httpx.codes.OK:
                return
        await asyncio.sleep(0.1)


async def _connect(client: httpx.AsyncClient, streams: int) -> None:
    """Open as many connections as the load will use, so that no request's time holds that of its connection."""
    asked = [client.get("/model_info", timeout=5) for _ in range(streams)]
    await asyncio.gather(*asked, return_exceptions=True)


def _body(ids: Sequence[int], tokens: int) -> bytes:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return json.dumps({"input_ids": list(ids), "sampling_params": sampling, "stream": True}).encode()


async def _one(client: httpx.AsyncClient, turns: asyncio.Semaphore, body: bytes, tokens: int) -> Answer | str:
    """One request in its turn: its times, or what went wrong."""
    async with turns:
        try:
            headers = {"Content-Type": "application/json"}
            began = time.perf_counter()
            async with client.stream("POST", "/generate", content=body, headers=headers) as response:
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread())[:300].decode(errors="replace")
                    return f"{response.status_code}: {' '.join(text.split())}"
                return await timed(response.aiter_raw(), began, tokens)
        except (httpx.HTTPError, ValueError) as fault:
            return f"{type(fault).__name__}: {fault}"[:300]


async def timed(pieces: AsyncIterator[bytes], began: float, tokens: int) -> Answer:
    """Follow a stream of server-sent events to its end.

    Args:
        pieces: the response's bytes as they come.
        began: when the request was sent, by `time.perf_counter`.
        tokens: how many are to come.

    Raises:
        ValueError: an error of the server's, a stream that ends early or is none.
    """
    first, last, count, rest = None, began, 0, b""
    between: list[float] = []
    async for piece in pieces:
        now = time.perf_counter()
        events, separator, tail = (rest + piece).rpartition(b"\n\n")
        if not separator:
            rest = rest + piece
            if len(rest) > MOST_EVENT_BYTES:
                raise ValueError("an event without end")
            continue
        rest = tail
        total = _total(events)
        if total > count:
            if first is None:
                first = now - began
            else:
                between += [(now - last) / (total - count)] * (total - count)
            last, count = now, total
    if first is None or count < tokens:
        raise ValueError(f"the stream ended after {count} of {tokens} tokens")
    return Answer(first, tuple(between), count)


def _total(events: bytes) -> int:
    """How many tokens there are after these events; 0 where they do not say.

    Raises:
        ValueError: one of them is an error.
    """
    found = _TOTAL.findall(events)
    if b'"error"' in events:
        raise ValueError(" ".join(events[:300].decode(errors="replace").split()))
    return int(found[-1]) if found else 0
