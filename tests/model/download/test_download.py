"""The download beside the tuning, and through entrypoint.py with stand-ins for SGLang, the driver and the hub."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fixer.base.progress
from fixer.base.errors import HubError, MoefixError, TuneError
from fixer.base.status import Phase, Share
from fixer.base.status_board import new_board
from fixer.machine.signals import ALARM
from fixer.model.config import Model, Source
from fixer.model.download.download import Download, Nothing, cached, downloading, is_recorded, wanted
from fixer.model.download.messages import Request
from fixer.model.download.weights import Presence
from fixer.model.hub import repository_folder, snapshot_folder
from fixer.sglang.flags import ServerFlags, parse_flags
from tests.support import fakes
from tests.support import hub as hub_
from tests.support.downloads import FILES, MIB, SHARDS, TOKEN, TOTAL, WANTED
from tests.support.hub import COMMIT, Site
from tests.support.serving import Machine, Result, installed

NAME = ("--model", "owner/name")


class Said:
    """What moefix said."""

    quiet = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    warning = line

    def __str__(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def say() -> Said:
    return Said()


@pytest.fixture
def site() -> Site:
    return Site(FILES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's cache, for this process and its children."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("DOWNLOAD", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf" / "hub"


@pytest.fixture
def endpoint(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with hub_.serve(site) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address


def model(name: str = "owner/name", revision: str | None = COMMIT, source: Source = Source.HUB) -> Model:
    return Model(name, "A", {}, {}, None, revision, source)


def children(tmp_path: Path) -> set[int]:
    return fakes.processes_with("DOWNLOAD", str(tmp_path)) - {os.getpid()}


# --- what is to be fetched -------------------------------------------------------------------------------------------


def test_what_is_fetched(cache: Path, tmp_path: Path) -> None:
    flags = parse_flags(["--load-format", "safetensors", "--download-dir", "/models", "--trust-remote-code"])
    assert wanted(model(), flags, tmp_path, {}) == Request("owner/name", None, COMMIT, "safetensors", "/models", True)
    by_tag = wanted(model(revision="v1"), parse_flags(["--revision", "v1"]), tmp_path, {})
    assert by_tag == Request("owner/name", "v1", None, "auto")
    unknown = wanted(model(revision=None, source=Source.CATALOGUE), ServerFlags(), tmp_path, {})
    assert unknown == Request("owner/name", None, None, "auto")


@pytest.mark.parametrize(
    ("what", "flags", "environ", "why"),
    [
        (model(source=Source.FOLDER), [], {}, ""),
        (model(), [], {"SGLANG_USE_MODELSCOPE": "true"}, "ModelScope"),
        (model(), ["--load-format", "dummy"], {}, "no weights"),
        (model(), ["--load-format", "gguf"], {}, "left to SGLang"),
        (model(), ["--load-format", "sharded_state"], {}, "left to SGLang"),
        (model("Qwen3-30B-A3B", source=Source.CATALOGUE), [], {}, "no name on a hub"),
    ],
)
def test_nothing_is_fetched(
    cache: Path, tmp_path: Path, what: Model, flags: list[str], environ: dict[str, str], why: str
) -> None:
    plan = wanted(what, parse_flags(flags), tmp_path, environ)
    assert isinstance(plan, Nothing)
    assert why in plan.why
    assert bool(plan.why) == bool(why)


def fill(cache: Path, *names: str) -> None:
    folder = snapshot_folder(cache, "owner/name", COMMIT)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(FILES[name])
    refs = repository_folder(cache, "owner/name") / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(COMMIT)


@pytest.mark.parametrize("revision", [None, COMMIT, "main"])
def test_offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ServerFlags(revision=revision)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the cache"):
        wanted(model(revision=revision), flags, tmp_path, {})
    fill(cache, SHARDS[0], "model.safetensors.index.json")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the cache"):
        wanted(model(revision=revision), flags, tmp_path, {})
    fill(cache, SHARDS[1])
    plan = wanted(model(revision=revision), flags, tmp_path, {})
    assert isinstance(plan, Nothing)
    assert plan.commit == COMMIT
    assert cached("owner/name", revision, ServerFlags(download_dir=str(tmp_path / "x")))[1] is Presence.COMPLETE
    assert wanted(model(), ServerFlags(download_dir=str(tmp_path / "x")), tmp_path, {}) == plan


# --- beside something else -------------------------------------------------------------------------------------------


def test_it_goes_on_beside_the_body(
    site: Site, endpoint: str, cache: Path, tmp_path: Path, say: Said, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(fixer.base.progress, "PLAIN_INTERVAL", 0.5)
    site.rate = 6 * MIB
    home, handler = tmp_path / "home", signal.getsignal(ALARM)
    board = new_board(home)
    with downloading(model(), ServerFlags(), home, say, board) as download:
        assert fakes.eventually(lambda: sum(site.sent.values()) > MIB, 60)  # while the body does something else
        download.wait()
        assert board.status.phase is Phase.DOWNLOADING
    assert signal.getsignal(ALARM) is handler
    folder = snapshot_folder(cache, "owner/name", COMMIT)
    assert {path.name for path in folder.iterdir()} == WANTED
    assert board.status.download == Share(TOTAL, TOTAL, "bytes")
    assert board.status.revision == COMMIT
    assert f"downloading owner/name at commit {COMMIT} (5 files, 0.022 GB)" in str(say)
    lines = [line for line in capsys.readouterr().err.splitlines() if " MB/s" in line]
    assert lines
    assert all(line.startswith("moefix: download: 0.0") for line in lines)
    assert "s left" in lines[-1] or "0.022 of 0.022" in lines[-1]
    assert children(tmp_path) == set()
    # The next time nothing is started and nothing asked.
    assert is_recorded(home, "owner/name", COMMIT, ServerFlags())
    asked = len(site.requests)
    with downloading(model(), ServerFlags(), home, say, board) as download:
        download.wait()
    assert len(site.requests) == asked
    assert "nothing to fetch" in say.lines[-1]
    # A file that is gone, other settings, or a damaged record: it is asked for again.
    assert not is_recorded(home, "owner/name", COMMIT, ServerFlags(load_format="npcache"))
    (folder / SHARDS[0]).unlink()
    assert not is_recorded(home, "owner/name", COMMIT, ServerFlags())
    (record,) = (home / "downloads").iterdir()
    record.write_text('{"settings": {}}')
    assert not is_recorded(home, "owner/name", COMMIT, ServerFlags())
    assert [path.name.partition(".damaged")[1] for path in (home / "downloads").iterdir()] == [".damaged"]


def test_a_refusal_ends_the_body_whatever_it_does(site: Site, endpoint: str, tmp_path: Path, say: Said) -> None:
    site.refuse = lambda path: (403, "GatedRepo") if path.endswith(".safetensors") else None
    handler, began = signal.getsignal(ALARM), time.monotonic()

    def work() -> None:
        with downloading(model(), ServerFlags(), tmp_path, say):
            while time.monotonic() - began < 60:
                with contextlib.suppress(Exception):  # as a broad guard in the midst of tuning might
                    time.sleep(60)

    with pytest.raises(HubError, match="is gated") as caught:
        work()
    assert "HF_TOKEN" in caught.value.hint
    assert time.monotonic() - began < 30
    assert signal.getsignal(ALARM) is handler
    assert children(tmp_path) == set()


def test_the_bodys_own_end_is_the_downloads(site: Site, endpoint: str, tmp_path: Path, say: Said) -> None:
    site.rate = MIB

    def work() -> None:
        with downloading(model(), ServerFlags(), tmp_path, say):
            assert fakes.eventually(lambda: sum(site.sent.values()) > 0, 60)
            assert len(children(tmp_path)) == 1
            raise TuneError("strict")

    with pytest.raises(TuneError):
        work()
    assert children(tmp_path) == set()


@pytest.mark.parametrize("complete", [False, True])
def test_a_download_that_dies(
    site: Site, endpoint: str, cache: Path, tmp_path: Path, say: Said, complete: bool
) -> None:
    site.delay = 60
    if complete:
        fill(cache, *SHARDS, "model.safetensors.index.json")
    with downloading(model(), ServerFlags(), tmp_path, say) as download:
        assert fakes.eventually(lambda: len(children(tmp_path)) == 1)
        for pid in children(tmp_path):
            os.kill(pid, signal.SIGKILL)
        if complete:
            download.wait()
            assert "ended with signal 9" in str(say)
            assert "serves from it" in str(say)
        else:
            with pytest.raises(HubError, match="ended with signal 9"):
                download.wait()


@pytest.mark.parametrize("complete", [False, True])
def test_a_watcher_that_stumbles_does_not_keep_the_start_waiting(
    endpoint: str, cache: Path, tmp_path: Path, complete: bool
) -> None:
    class Stumbling(Said):
        def line(self, text: str) -> None:
            raise RuntimeError("oh")

    say = Stumbling()
    if complete:
        fill(cache, *SHARDS, "model.safetensors.index.json")
    with downloading(model(), ServerFlags(), tmp_path, say) as download:
        assert download._over.wait(60)
        if complete:
            download.wait()
            assert "could not be followed: RuntimeError: oh; the cache has all weights" in str(say)
        else:
            with pytest.raises(HubError, match="could not be followed: RuntimeError: oh"):
                download.wait()


def test_it_is_left_to_sglang(site: Site, endpoint: str, tmp_path: Path, say: Said) -> None:
    flags = ServerFlags(speculative_draft_model_path="owner/draft")
    with downloading(model(), flags, tmp_path, say, skip=True) as download:
        download.wait()
    assert site.requests == []
    assert str(say) == "the draft model owner/draft is left to SGLang"


def test_a_fault_before_anything_was_heard() -> None:
    assert isinstance(Download(Nothing(), ServerFlags(), Path(), Said()).fault(), MoefixError)


# --- from the command line to the server -----------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, trees, driver, models, compiled, site, endpoint):
    machine = Machine(tmp_path, trees["0.5.17"].package, driver, models, compiled)
    site.files["config.json"] = (machine.model / "config.json").read_bytes()
    machine.env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    return machine


def complete(cache: Path) -> bool:
    folder = snapshot_folder(cache, "owner/name", COMMIT)
    return all((folder / name).exists() for name in WANTED)


def no_token(result: Result, *folders: Path) -> bool:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return TOKEN not in result.out + result.err and not any(
        TOKEN.encode() in path.read_bytes() for path in files if path.name != "record"
    )


def test_tuned_before_and_downloaded_then_served(machine, site, cache, tmp_path):
    artefact = machine.artefact()
    result = machine.run(*NAME, "--port", "31000")
    assert result.served, result.err
    assert result.record["argv"] == [*NAME, "--port", "31000"]
    assert installed(machine, artefact)
    assert complete(cache)
    blobs = [path.stat().st_mtime for path in (repository_folder(cache, "owner/name") / "blobs").iterdir()]
    assert max(blobs) <= result.record["at"]
    assert f"at commit {COMMIT}" in result.err
    assert "nothing to measure" in result.err
    assert f"Bearer {TOKEN}" in site.tokens
    assert no_token(result, tmp_path / "hf", machine.home)
    # Again: the hub is asked for config.json's state only; offline for nothing.
    asked = len(site.requests)
    assert machine.run(*NAME).served
    questions = [request for request in site.requests[asked:] if "/owner/name" in request]
    assert all(request.startswith("HEAD") and request.endswith("config.json") for request in questions), questions
    asked = len(site.requests)
    offline = machine.run(*NAME, env={"HF_HUB_OFFLINE": "1"})
    assert offline.served, offline.err
    assert f"serving from the cache, commit {COMMIT}" in offline.err
    assert len(site.requests) == asked


def test_a_dense_model_is_downloaded_too(machine, site, cache):
    site.files["config.json"] = (machine.dense / "config.json").read_bytes()
    result = machine.run(*NAME)
    assert result.served, result.err
    assert "nothing to tune" in result.err
    assert complete(cache)


def test_a_failing_tuning_does_not_hurt_the_download(machine, site, cache):
    result = machine.run(*NAME)
    assert result.served, result.err
    assert "serving with SGLang's own configuration" in result.err
    assert "the download is complete" in result.err
    assert complete(cache)


@pytest.mark.parametrize(
    ("status", "code", "says"), [(403, "GatedRepo", "is gated"), (404, "", "not on the hub"), (401, "", "a token")]
)
def test_a_refusal_ends_the_tuning_at_once(machine, site, tmp_path, status, code, says):
    site.refuse = lambda path: (status, code) if path.endswith(".safetensors") else None
    result = machine.run(*NAME, env={"FAKE_TORCH": "slow"})  # tuning hangs
    assert (result.code, result.record) == (6, None), result.err
    assert says in result.err.splitlines()[-2]
    assert result.err.splitlines()[-1].startswith("  ")
    assert "Traceback" not in result.err
    assert no_token(result, tmp_path / "hf")
    assert fakes.eventually(lambda: fakes.processes_with("RECORD", str(machine.record)) == set(), 5)


def test_offline_without_the_weights(machine, site):
    machine.artefact()
    assert machine.run(*NAME, "--moefix-skip-download").served  # config.json is in the cache now
    asked = len(site.requests)
    result = machine.run(*NAME, env={"HF_HUB_OFFLINE": "1"})
    assert (result.code, result.record) == (6, None)
    assert "HF_HUB_OFFLINE is set" in result.err
    assert len(site.requests) == asked


def test_a_hub_that_is_gone_and_a_cache_that_has_all(machine, cache):
    machine.artefact()
    assert machine.run(*NAME).served
    shutil.rmtree(machine.home / "downloads")  # another data folder, so to speak
    result = machine.run(*NAME, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert result.served, result.err
    assert f"the hub is out of reach, and the weights are in the cache, commit {COMMIT}" in result.err
    assert "trying again" not in result.err
    assert result.err.count("config.json is the cache's") == 1
    (snapshot_folder(cache, "owner/name", COMMIT) / SHARDS[1]).unlink()
    gone = Model("owner/name", "A", {}, {}, None, COMMIT, Source.HUB, from_cache=True)
    assert isinstance(wanted(gone, ServerFlags(), machine.home, {}), Request)


def test_dummy_weights_and_skipping_fetch_nothing(machine, site):
    machine.artefact()
    for more in (("--load-format", "dummy"), ("--moefix-skip-download",)):
        assert machine.run(*NAME, *more).served
    assert set(site.sent) == {"config.json"}


@pytest.mark.parametrize("torch", ["", "slow"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_next_start_goes_on(machine, site, cache, tmp_path, number, torch):
    if not torch:  # else it measures meanwhile
        machine.artefact()
    site.rate = 2 * MIB
    process = machine.start(*NAME, env={"FAKE_TORCH": torch})
    assert fakes.eventually(lambda: sum(site.sent[name] for name in SHARDS) > 4 * MIB, 60)
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    took = time.monotonic() - began
    assert took < 2
    assert process.returncode == (143 if number == signal.SIGTERM else 130), err
    assert "Traceback" not in err
    assert TOKEN not in out + err
    assert fakes.eventually(lambda: fakes.processes_with("RECORD", str(machine.record)) == set(), 2)
    assert not machine.record.exists()
    site.rate = 0
    machine.artefact()
    result = machine.run(*NAME)
    assert result.served, result.err
    assert complete(cache)
    assert not list((repository_folder(cache, "owner/name") / "blobs").glob("*.incomplete"))


def test_killed_outright_nothing_stays_behind(machine, site):
    machine.artefact()
    site.rate = MIB
    process = machine.start(*NAME)
    assert fakes.eventually(lambda: sum(site.sent[name] for name in SHARDS) > 0, 60)
    process.kill()
    process.communicate(timeout=30)
    assert fakes.eventually(lambda: fakes.processes_with("RECORD", str(machine.record)) == set(), 5)


def test_modelscope_is_left_to_sglang(machine, site):
    artefact = machine.artefact()
    fakes.stub_modelscope(machine.site, machine.model)
    result = machine.run(*NAME, env={"SGLANG_USE_MODELSCOPE": "true"})
    assert result.served, result.err
    assert "from ModelScope" in result.err
    assert installed(machine, artefact)
    assert site.requests == []
