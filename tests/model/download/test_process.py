"""The download's process: the real client against a local hub that is slow, breaks off or refuses."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fixer.model.download.messages import Bytes, Done, Failed, Plan, Request, Trouble, from_line, to_line
from fixer.model.hub import commit_in_cache, repository_folder, snapshot_folder
from tests.support import fakes
from tests.support.downloads import (
    FILES,
    MIB,
    PROGRAM,
    REQUEST,
    ROOT,
    SHARDS,
    TOKEN,
    TOTAL,
    WANTED,
    fetch,
    is_whole,
    parts,
    snapshot,
    start,
)
from tests.support.hub import COMMIT, Site, serve


@pytest.fixture
def site() -> Site:
    return Site(FILES)


@pytest.fixture
def hub(site: Site) -> Iterator[str]:
    with serve(site) as endpoint:
        yield endpoint


def test_messages_there_and_back() -> None:
    messages = [
        Plan(COMMIT, 3, 1, 2, "/x"),
        Bytes(1, 2),
        Trouble("x", 2.0),
        Done(COMMIT, ("a",)),
        Failed("x", "y", 6, True),
    ]
    assert [from_line(to_line(message)) for message in messages] == messages
    for line in ("", "noise", "[]", "{}", '{"say": "Bytes"}', '{"say": "Path"}'):
        assert from_line(line) is None


def test_what_sglang_loads_comes_and_nothing_else(site: Site, hub: str, tmp_path: Path) -> None:
    first, *_, last = fetch(hub, tmp_path / "hf")
    assert first == Plan(COMMIT, len(WANTED), 0, TOTAL, str(tmp_path / "hf" / "hub"))
    assert isinstance(last, Done)
    assert is_whole(tmp_path / "hf")
    assert set(last.files) == {str(snapshot(tmp_path / "hf") / name) for name in WANTED}
    assert commit_in_cache(tmp_path / "hf" / "hub", "owner/name", None) == COMMIT
    assert {name: site.sent[name] for name in SHARDS} == {name: len(FILES[name]) for name in SHARDS}
    assert set(site.sent) == WANTED
    assert f"Bearer {TOKEN}" in site.tokens
    assert parts(tmp_path / "hf") == []
    # The second time one question, or none where the client remembers the list.
    asked = len(site.requests)
    again = fetch(hub, tmp_path / "hf")
    questions = [request for request in site.requests[asked:] if "/owner/name" in request]
    assert again[0] == Plan(COMMIT, len(WANTED), TOTAL, TOTAL, str(tmp_path / "hf" / "hub"))
    assert isinstance(again[-1], Done)
    assert len(questions) <= 1


def test_sglangs_client_finds_it_offline_by_name(site: Site, hub: str, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "hf")
    asked = len(site.requests)
    program = (
        "from huggingface_hub import snapshot_download as s; print(s('owner/name', allow_patterns='*.safetensors'))"
    )
    environ = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub}
    found = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(snapshot(tmp_path / "hf"))
    assert len(site.requests) == asked


@pytest.mark.parametrize("revision", ["v2", "refs/pr/7"])
def test_a_branch_by_name(site: Site, hub: str, tmp_path: Path, revision: str) -> None:
    site.revisions[revision] = "d" * 40
    request = Request("owner/name", revision, None, "auto")
    messages = fetch(hub, tmp_path / "hf", request)
    assert isinstance(messages[-1], Done), messages
    assert messages[-1].commit == "d" * 40
    assert commit_in_cache(tmp_path / "hf" / "hub", "owner/name", revision) == "d" * 40
    assert (snapshot(tmp_path / "hf", "d" * 40) / SHARDS[0]).exists()


def test_the_pinned_commit_is_fetched_though_the_branch_has_moved(site: Site, hub: str, tmp_path: Path) -> None:
    site.revisions = {"main": "e" * 40, "old": COMMIT}
    assert isinstance(fetch(hub, tmp_path / "hf")[-1], Done)
    assert is_whole(tmp_path / "hf")
    assert commit_in_cache(tmp_path / "hf" / "hub", "owner/name", None) == COMMIT


def test_a_download_folder_of_its_own(site: Site, hub: str, tmp_path: Path) -> None:
    request = Request("owner/name", None, COMMIT, "auto", str(tmp_path / "models"))
    assert isinstance(fetch(hub, tmp_path / "hf", request)[-1], Done)
    own = snapshot_folder(tmp_path / "models", "owner/name", COMMIT)
    assert {path.name for path in own.iterdir()} == {*WANTED}
    assert {path.name for path in snapshot(tmp_path / "hf").iterdir()} == WANTED - set(SHARDS)
    assert commit_in_cache(tmp_path / "models", "owner/name", None) == COMMIT
    assert sum(site.sent[name] for name in SHARDS) == sum(len(FILES[name]) for name in SHARDS)


# --- broken off ------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_off_goes_on_where_it_was(site: Site, hub: str, tmp_path: Path) -> None:
    site.cuts = {SHARDS[0]: [5 * MIB, 3 * MIB], SHARDS[1]: [4 * MIB]}
    assert isinstance(fetch(hub, tmp_path / "hf")[-1], Done)
    assert is_whole(tmp_path / "hf")
    for name in SHARDS:  # what was on its way when the line broke comes twice, no more
        assert len(FILES[name]) <= site.sent[name] < len(FILES[name]) + 2 * MIB


def test_a_hub_that_never_gets_further_is_given_up(site: Site, hub: str, tmp_path: Path) -> None:
    site.cuts = {SHARDS[0]: [5 * MIB, *[0] * 1000]}
    messages = fetch(hub, tmp_path / "hf")
    assert any(isinstance(message, Trouble) for message in messages)
    last = messages[-1]
    assert isinstance(last, Failed)
    assert (last.exit_code, last.lasting) == (6, False)
    assert "the files that came whole are kept" in last.hint
    assert parts(tmp_path / "hf") == []
    site.cuts = {}
    before = site.sent.copy()
    assert isinstance(fetch(hub, tmp_path / "hf")[-1], Done)
    assert is_whole(tmp_path / "hf")
    assert site.sent - before == {SHARDS[0]: len(FILES[SHARDS[0]])}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_start_fetches_only_what_did_not_come_whole(site: Site, hub: str, tmp_path: Path, number: int) -> None:
    site.rates = {SHARDS[0]: MIB}
    process = start(hub, tmp_path / "hf")
    assert fakes.eventually((snapshot(tmp_path / "hf") / SHARDS[1]).exists, 60)
    assert fakes.eventually(lambda: len(parts(tmp_path / "hf")) == 1, 60)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    assert len(parts(tmp_path / "hf")) == (number == signal.SIGKILL)
    site.rates = {}
    time.sleep(1.1)  # LEFTOVER_SECONDS
    before = site.sent.copy()
    messages = fetch(hub, tmp_path / "hf")
    assert isinstance(messages[0], Plan)
    assert messages[0].done == TOTAL - len(FILES[SHARDS[0]])
    assert is_whole(tmp_path / "hf")
    assert site.sent - before == {SHARDS[0]: len(FILES[SHARDS[0]])}
    assert parts(tmp_path / "hf") == []


def test_killed_again_and_again_it_comes_to_its_end_and_leaves_no_parts(site: Site, hub: str, tmp_path: Path) -> None:
    chance = random.Random(7)
    site.rate = 3 * MIB
    for _ in range(6):
        process = start(hub, tmp_path / "hf")
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.1, 3))
        process.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
        out, err = process.communicate(timeout=30)
        assert "Traceback" not in err
        said = [message.done for message in map(from_line, out.splitlines()) if isinstance(message, (Plan, Bytes))]
        assert said == sorted(said)
    assert len(parts(tmp_path / "hf")) <= 4  # of the last two starts: LEFTOVER_SECONDS is 1 here
    site.rate = 0
    time.sleep(1.1)
    assert isinstance(fetch(hub, tmp_path / "hf")[-1], Done)
    assert is_whole(tmp_path / "hf")
    assert parts(tmp_path / "hf") == []


def test_only_parts_of_these_files_that_nobody_writes_are_removed(site: Site, hub: str, tmp_path: Path) -> None:
    folder = repository_folder(tmp_path / "hf" / "hub", "owner/name")
    blobs, locks = folder / "blobs", tmp_path / "hf" / "hub" / ".locks" / folder.name
    blobs.mkdir(parents=True)
    locks.mkdir(parents=True)
    first, second = site.hash(SHARDS[0]), site.hash(SHARDS[1])
    old = {f"{first}.01234567.incomplete", f"{first}.89abcdef.incomplete"}
    kept = {f"{second}.01234567.incomplete", "0123.01234567.incomplete", f"{'e' * 64}.01234567.incomplete"}
    for name in old | kept:
        (blobs / name).write_bytes(b"x")
        os.utime(blobs / name, (1, 1))
    young = f"{first}.fedcba98.incomplete"
    with (locks / f"{second}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(hub, tmp_path / "hf")
        (blobs / young).write_bytes(b"x")
        os.utime(blobs / young, (time.time() + 60, time.time() + 60))
        assert fakes.eventually((snapshot(tmp_path / "hf") / SHARDS[0]).exists, 60)
    out, _ = process.communicate(timeout=60)
    assert isinstance(from_line(out.splitlines()[-1]), Done), out
    assert {path.name for path in parts(tmp_path / "hf")} == {*kept, young}
    assert is_whole(tmp_path / "hf")


def test_two_at_once_fetch_each_file_once(site: Site, hub: str, tmp_path: Path) -> None:
    site.rate = 20 * MIB
    both = [start(hub, tmp_path / "hf") for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert isinstance(from_line(out.splitlines()[-1]), Done), out
    assert is_whole(tmp_path / "hf")
    assert {site.sent[name] for name in SHARDS} == {len(FILES[name]) for name in SHARDS}


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "says", "lasting"),
    [
        (401, "RepoNotFound", "needs a token", True),
        (401, "", "needs a token", True),
        (403, "GatedRepo", "is gated", True),
        (403, "", "is gated", True),
        (404, "RepoNotFound", "not on the hub", True),
        (404, "RevisionNotFound", "not on the hub", True),
        (429, "", "too many requests", False),
        (500, "", "status 500", False),
        (503, "", "status 503", False),
    ],
)
@pytest.mark.parametrize("path", ["/api/", ".safetensors"])
def test_refusals(
    site: Site, hub: str, tmp_path: Path, status: int, code: str, says: str, lasting: bool, path: str
) -> None:
    site.refuse = lambda asked: (status, code) if path in asked and not asked.endswith(".json") else None
    last = fetch(hub, tmp_path / "hf")[-1]
    assert isinstance(last, Failed)
    assert says in last.message
    assert (last.exit_code, last.lasting) == (6, lasting)
    assert last.hint
    assert "\n" not in last.message + last.hint
    assert "http" not in last.message + last.hint
    assert not list(tmp_path.rglob(f"*{TOKEN}*"))


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    last = fetch("http://127.0.0.1:9", tmp_path / "hf")[-1]
    assert isinstance(last, Failed)
    assert "out of reach" in last.message
    assert not last.lasting


def test_a_hub_that_is_gone_is_asked_once_where_all_weights_are_there(site: Site, hub: str, tmp_path: Path) -> None:
    by_name = replace(REQUEST, commit=None)
    assert isinstance(fetch(hub, tmp_path / "hf", by_name)[-1], Done)
    for request in (REQUEST, by_name):
        (only,) = fetch("http://127.0.0.1:9", tmp_path / "hf", request)
        assert isinstance(only, Failed)
        assert not only.lasting
    (snapshot(tmp_path / "hf") / SHARDS[1]).unlink()
    assert any(isinstance(message, Trouble) for message in fetch("http://127.0.0.1:9", tmp_path / "hf", by_name))


def test_a_repository_without_weights(site: Site, hub: str, tmp_path: Path) -> None:
    site.files = {"config.json": b"{}", "model.gguf": b"GGUF"}
    last = fetch(hub, tmp_path / "hf")[-1]
    assert isinstance(last, Failed)
    assert last.lasting
    assert "has no weights" in last.message


def test_names_from_the_hub_stay_in_the_folder(site: Site, hub: str, tmp_path: Path) -> None:
    site.files |= {"../../outside.json": b"{}", "[a-z]*.json": b"{}"}
    assert isinstance(fetch(hub, tmp_path / "hf")[-1], Done)
    assert not list(tmp_path.rglob("outside.json"))
    assert (snapshot(tmp_path / "hf") / "[a-z]*.json").exists()


# --- the disk --------------------------------------------------------------------------------------------------------


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_said_ahead(site: Site, hub: str, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "10m") as small:
        last = fetch(hub, small / "hf")[-1]
    assert isinstance(last, Failed)
    assert (last.exit_code, last.lasting) == (6, True)
    assert "GB more" in last.message
    assert "HF_HOME" in last.hint
    assert site.sent.total() == 0


def test_a_disk_that_fills_up(site: Site, hub: str, tmp_path: Path) -> None:
    site.rate = 6 * MIB
    with disk(tmp_path / "disk", "32m") as small:
        process = start(hub, small / "hf")
        assert fakes.eventually(lambda: site.sent.total() > 2 * MIB, 60)
        (small / "ballast").write_bytes(bytes(20 * MIB))
        out, err = process.communicate(timeout=120)
    last = from_line(out.splitlines()[-1])
    assert isinstance(last, Failed), out + err
    assert (last.exit_code, last.lasting) == (6, True)
    assert "no space is left" in last.message


def test_a_cache_that_cannot_be_written(hub: str, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "64m") as small:
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        last = fetch(hub, small / "hf")[-1]
    assert isinstance(last, Failed)
    assert (last.exit_code, last.lasting) == (9, True)
    assert "cannot be written" in last.message


def test_it_ends_with_its_parent(site: Site, hub: str, tmp_path: Path) -> None:
    site.rate = MIB
    home = tmp_path / "hf"
    child = "[sys.executable, '-c', *sys.argv[1:3], str(os.getpid())]"
    middle = f"import os, sys; os.spawnve(os.P_NOWAIT, sys.executable, {child}, os.environ); input()"
    command = [sys.executable, "-c", middle, PROGRAM, json.dumps(asdict(REQUEST))]
    environ = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "FETCH": str(home)}
    parent = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert fakes.eventually(lambda: site.sent.total() > 0, 60)
    assert len(fakes.processes_with("FETCH", str(home))) == 2
    parent.kill()
    parent.wait()
    assert fakes.eventually(lambda: fakes.processes_with("FETCH", str(home)) == set(), 5)
