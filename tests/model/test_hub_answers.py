"""A hostile hub against the real client: nothing is written outside of the cache, nothing grows without end."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.base.errors import HubError
from fixer.model.config import load_model
from fixer.model.download.messages import Bytes, Done, Failed, Plan, Trouble
from fixer.model.fetch_file import Hub
from fixer.model.hub import UnreachableError
from fixer.model.hub_answers import MOST_CONFIG_BYTES, MOST_FILE_BYTES, Answer, BusyError, Checks, check_listing
from fixer.sglang.flags import parse_flags
from tests.support.downloads import FILES, MIB, REQUEST, SHARDS, TOTAL, fetch, is_whole, parts, snapshot
from tests.support.hub import COMMIT, Body, Site, noise, serve

CONFIG = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048}
Rows = list[dict[str, object]]


@pytest.fixture
def site() -> Site:
    return Site(FILES)


@pytest.fixture
def hub(site: Site) -> Iterator[str]:
    with serve(site) as endpoint:
        yield endpoint


def failure(endpoint: str, home: Path) -> str:
    """How the download ended, in its own words."""
    last = fetch(endpoint, home)[-1]
    assert isinstance(last, Failed), last
    assert last.exit_code == 6
    assert "http" not in last.message + last.hint
    return last.message


def outside(folder: Path, *homes: Path) -> list[Path]:
    """Files that are not in one of the cache folders."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return [path for path in files if not any(home in path.parents for home in homes)]


def changed(name: str, **values: object) -> Callable[[Rows], Rows]:
    return lambda rows: [row | values if row["path"] == name else row for row in rows]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "etag", ['"../../../../elsewhere"', "../../x", '"/nowhere-moefix/x"', '"a\\\\b"', '".."', '"a b"']
)
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_an_etag_that_is_a_path(site: Site, hub: str, tmp_path: Path, header: str, etag: str) -> None:
    site.heads = {header: etag}
    assert "ETag" in failure(hub, tmp_path / "hf")
    assert outside(tmp_path, tmp_path / "hf") == []
    assert not snapshot(tmp_path / "hf").exists()


def test_an_etag_that_is_a_path_for_config_json(hub: str, site: Site, tmp_path: Path) -> None:
    site.files["config.json"] = json.dumps(CONFIG).encode()
    site.heads = {"ETag": '"../../../../elsewhere"'}
    with pytest.raises(HubError, match="ETag") as caught:
        load_model("owner/name", parse_flags([]), hub=Hub(endpoint=hub, cache=tmp_path / "cache" / "hub"))
    assert "HF_ENDPOINT" in caught.value.hint
    assert outside(tmp_path, tmp_path / "cache") == []


@pytest.mark.parametrize("commit", ["../../../x", "main", "A" * 40, "a" * 39, "/" + "a" * 39])
def test_a_commit_that_is_none(site: Site, hub: str, tmp_path: Path, commit: str) -> None:
    site.heads = {"X-Repo-Commit": commit}
    assert "which is none" in failure(hub, tmp_path / "hf")
    site.heads = {}
    site.revisions = {"main": commit}
    last = fetch(hub, tmp_path / "hf", replace(REQUEST, commit=None))[-1]
    assert isinstance(last, Failed)
    assert "which is none" in last.message
    assert outside(tmp_path, tmp_path / "hf") == []


@pytest.mark.parametrize("blob", ["../../../../x", "/x", "A" * 40, "", "a" * 41])
@pytest.mark.parametrize("where", ["oid", "lfs", "xetHash"])
def test_a_blob_id_that_is_none(site: Site, hub: str, tmp_path: Path, where: str, blob: str) -> None:
    size = len(FILES[SHARDS[0]])
    lfs = {"oid": blob, "size": size, "pointerSize": 134}
    site.rows = changed(SHARDS[0], **({"lfs": lfs, "xetHash": "c" * 64} if where == "lfs" else {where: blob}))
    assert "the id" in failure(hub, tmp_path / "hf")
    assert outside(tmp_path, tmp_path / "hf") == []


@pytest.mark.parametrize(
    "name",
    ["../../../../outside.json", "/outside.json", "a/../../outside.json", "a\\..\\outside.json", "a\x1boutside.json"],
)
def test_a_file_name_that_leaves_its_folder_is_not_fetched(site: Site, hub: str, tmp_path: Path, name: str) -> None:
    site.files[name] = b"{}"
    assert isinstance(fetch(hub, tmp_path / "hf")[-1], Done)
    assert is_whole(tmp_path / "hf")
    assert site.sent[name] == 0
    assert not list(tmp_path.rglob("*outside.json"))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [-1_000_000, MOST_FILE_BYTES + 1, 1 << 70, "12", None, True, 1.5])
def test_a_size_in_the_listing_that_is_none(site: Site, hub: str, tmp_path: Path, size: object) -> None:
    site.rows = changed(SHARDS[0], size=size)
    said = failure(hub, tmp_path / "hf")
    assert SHARDS[0] in said
    assert str(size) in said
    assert site.sent.total() == 0


@pytest.mark.parametrize("size", ["-5", "abc", str(1 << 70)])
def test_a_size_in_the_head_that_is_none(site: Site, hub: str, tmp_path: Path, size: str) -> None:
    site.heads = {"X-Linked-Size": size}
    assert size in failure(hub, tmp_path / "hf")


def test_a_size_that_is_not_the_listings(site: Site, hub: str, tmp_path: Path) -> None:
    site.rows = changed(SHARDS[0], size=5000)
    said = failure(hub, tmp_path / "hf")
    assert said == f"the hub lists {SHARDS[0]} with 5000 bytes, and offers {12 * MIB}"
    assert site.sent[SHARDS[0]] == 0


def test_a_config_that_is_announced_too_large(site: Site, hub: str, tmp_path: Path) -> None:
    site.heads = {"X-Linked-Size": str(MOST_CONFIG_BYTES + 1)}
    with pytest.raises(HubError, match="larger than 16 MiB"):
        load_model("owner/name", parse_flags([]), hub=Hub(endpoint=hub, cache=tmp_path / "hub"))
    assert site.sent.total() == 0


# --- bodies ----------------------------------------------------------------------------------------------------------


def endless(piece: bytes = bytes(1 << 20)) -> Iterator[bytes]:
    while True:
        yield piece


def bomb() -> Iterator[bytes]:
    yield from endless(gzip.compress(bytes(16 << 20)))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json"])
def test_a_body_without_an_end(site: Site, hub: str, tmp_path: Path, name: str) -> None:
    site.bodies = {name: Body(endless)}
    assert f"more than the {len(FILES[name])} bytes of {name}" in failure(hub, tmp_path / "hf")
    assert site.sent[name] < len(FILES[name]) + 32 * MIB  # what the sockets hold besides
    assert parts(tmp_path / "hf") == []


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json"])
def test_a_packed_body_is_not_unpacked(site: Site, hub: str, tmp_path: Path, name: str) -> None:
    site.bodies = {name: Body(bomb, {"Content-Encoding": "gzip"})}
    assert "packs" in failure(hub, tmp_path / "hf")
    assert on_disk(tmp_path) < TOTAL + MIB


def test_starts_against_such_a_hub_do_not_fill_the_disk(site: Site, hub: str, tmp_path: Path) -> None:
    site.bodies = {SHARDS[0]: Body(endless)}
    for _ in range(3):
        failure(hub, tmp_path / "hf")
    assert on_disk(tmp_path) < TOTAL + MIB
    assert parts(tmp_path / "hf") == []


@pytest.mark.parametrize("body", [Body(endless), Body(bomb, {"Content-Encoding": "gzip"})])
def test_a_config_without_an_end(site: Site, hub: str, tmp_path: Path, body: Body) -> None:
    site.bodies = {"config.json": body}
    with pytest.raises(HubError, match=r"packs|more than the 24 bytes of config.json"):
        load_model("owner/name", parse_flags([]), hub=Hub(endpoint=hub, cache=tmp_path / "hub"))
    assert site.sent["config.json"] < 32 * MIB
    assert on_disk(tmp_path) < MIB


def test_a_listing_without_an_end() -> None:
    checks = Checks()
    answer = Answer("GET", "https://hub/api/models/owner/name/tree/main", 200, {})
    for _ in range(2):  # all listings together
        most, wanted = checks.begin(answer)
        with pytest.raises(HubError, match="bytes of a listing"):
            for _ in checks.body(endless(), answer, most, wanted):
                pass
    assert checks.received < (256 + 3) * MIB


def test_a_refusals_body_is_bounded_and_not_unpacked(site: Site, hub: str, tmp_path: Path) -> None:
    site.refuse = lambda path: (403, "") if path.startswith("/api/") else None
    site.retry = {"Content-Encoding": "gzip"}
    assert "is gated" in failure(hub, tmp_path / "hf")


def test_a_short_body_is_no_file(site: Site, hub: str, tmp_path: Path) -> None:
    site.bodies = {SHARDS[0]: Body(lambda: iter([bytes(MIB)]))}
    messages = fetch(hub, tmp_path / "hf")
    troubles = [message.what for message in messages if isinstance(message, Trouble)]
    assert f"the hub sent {MIB} of the {12 * MIB} bytes of {SHARDS[0]}" in troubles
    assert isinstance(messages[-1], Failed)
    assert not (snapshot(tmp_path / "hf") / SHARDS[0]).exists()
    assert parts(tmp_path / "hf") == []


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_a_silence_is_told_once_with_its_length(site: Site, hub: str, tmp_path: Path) -> None:
    def slow() -> Iterator[bytes]:
        yield FILES[SHARDS[0]][:MIB]
        time.sleep(2.5)
        yield FILES[SHARDS[0]][MIB:]

    site.bodies = {SHARDS[0]: Body(slow)}
    messages = fetch(hub, tmp_path / "hf")
    assert isinstance(messages[-1], Done), messages[-1]
    (trouble,) = [message for message in messages if isinstance(message, Trouble)]
    assert trouble == Trouble("nothing has come from the hub for 1 s: waiting", 0.0)
    assert is_whole(tmp_path / "hf")


def test_a_listing_that_does_not_come_is_told_too(site: Site, hub: str, tmp_path: Path) -> None:
    site.delay = 1.5
    messages = fetch(hub, tmp_path / "hf", replace(REQUEST, commit=None))
    assert isinstance(messages[0], Trouble)
    assert isinstance(messages[-1], Done)


@pytest.mark.parametrize("path", ["/tree/", ".safetensors"])
@pytest.mark.parametrize("retry", [{"Retry-After": "1"}, {"RateLimit": '"api";r=0;t=1'}])
def test_a_busy_hub_is_waited_for_as_it_asks(
    site: Site, hub: str, tmp_path: Path, path: str, retry: dict[str, str]
) -> None:
    left = [1, 1]
    site.retry = retry
    site.refuse = lambda asked: (429, "") if path in asked and left and left.pop() else None
    began = time.monotonic()
    messages = fetch(hub, tmp_path / "hf")
    assert isinstance(messages[-1], Done)
    assert time.monotonic() - began > 1
    troubles = [message for message in messages if isinstance(message, Trouble) and message.seconds]
    assert troubles[0] == Trouble("the hub has too many requests (status 429), and asks to wait 1 s", 1.0)


def test_a_hub_that_asks_to_wait_for_a_day_is_given_up(site: Site, hub: str, tmp_path: Path) -> None:
    site.retry = {"Retry-After": "86400"}
    site.refuse = lambda asked: (429, "") if "/tree/" in asked else None
    began = time.monotonic()
    assert "asks to wait 86400 s" in failure(hub, tmp_path / "hf")
    assert time.monotonic() - began < 20


def test_a_busy_hub_does_not_keep_a_plan_waiting(site: Site, hub: str, tmp_path: Path) -> None:
    site.retry = {"Retry-After": "3600"}
    site.refuse = lambda asked: (429, "")
    began = time.monotonic()
    with pytest.raises(HubError, match="asks to wait 3600 s"):
        load_model("owner/name", parse_flags([]), hub=Hub(endpoint=hub, cache=tmp_path / "hub"))
    assert time.monotonic() - began < 5


# --- the rules -------------------------------------------------------------------------------------------------------


def head(**headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer("HEAD", f"https://hub/owner/name/resolve/{COMMIT}/a%20b/c.json", 200, named)


@pytest.mark.parametrize(
    "etag",
    [
        f'"{"a" * 64}"',
        f'W/"{"0" * 40}"',
        "0" * 40,
        '"{SHA1{0123456789abcdef0123456789abcdef01234567}}"',
        '"d41d8cd98f00b204e9800998ecf8427e-12"',
    ],
)
def test_etags_of_hubs_and_mirrors(etag: str) -> None:
    Checks().begin(head(x_repo_commit=COMMIT, etag=etag))


def test_an_etag_that_the_client_makes_no_path_of() -> None:
    Checks().begin(Answer("GET", "https://hub/api/whoami-v2", 200, {"etag": 'W/"a1f-4kq5+X/J"'}))
    Checks().begin(head(etag='W/"a1f-4kq5+X/J"'))


def test_a_files_name_and_what_is_left_of_it() -> None:
    checks = Checks()
    checks.sizes = {(COMMIT, "a b/c.json"): 100}
    assert head().file == (COMMIT, "a b/c.json")
    checks.begin(head())  # a HEAD without a size: the listing's counts
    answer = Answer("GET", "https://cdn/x", 206, {"content-range": "bytes 40-99/100"})
    most, wanted = checks.begin(answer)
    assert (most, wanted) == (60, 60)
    assert list(checks.body([b"x" * 60], answer, most, wanted)) == [b"x" * 60]
    with pytest.raises(UnreachableError, match="59 of the 60 bytes of a b/c"):
        list(checks.body([b"x" * 59], answer, most, wanted))
    with pytest.raises(HubError, match="more than the 60 bytes of a b/c"):
        list(checks.body([b"x" * 61], answer, most, wanted))


def test_a_wait_that_is_no_number() -> None:
    for said in ("", "soon", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "1e99"):
        with pytest.raises(BusyError) as caught:
            Checks().begin(Answer("GET", "https://hub/api/models/a/b", 429, {"retry-after": said}))
        assert caught.value.seconds is None


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b'["x"]', b"3", b"[" * 100_000])
def test_a_listing_that_is_none(content: bytes) -> None:
    with pytest.raises(HubError):
        check_listing(content)


def test_what_hubs_say_of_a_repository() -> None:
    check_listing(b"{}")
    check_listing(json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "a"}]}).encode())
    check_listing(json.dumps({"accessToken": "x", "exp": 1, "casUrl": "https://cas"}).encode())
    check_listing(json.dumps([{"type": "directory", "oid": "b" * 40, "size": 0, "path": "a"}]).encode())


def test_nothing_but_what_came_is_counted(site: Site, hub: str, tmp_path: Path) -> None:
    site.files["pad.json"] = noise(100)
    messages = fetch(hub, tmp_path / "hf")
    plan = next(message for message in messages if isinstance(message, Plan))
    assert plan.total == TOTAL + 100
    assert max(message.done for message in messages if isinstance(message, Bytes)) == plan.total
    assert os.listdir(tmp_path) == ["hf"]
