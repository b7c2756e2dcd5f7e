"""Untrusted and damaged input by the thousand: no exception but those documented, nothing lost, nothing outside.

Seeded mutations of valid samples, and Hypothesis for what has no sample. The inputs are counted; the last test prints
the count and holds it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.install import read_files
from fixer.artefacts.shelf import find_artefact, save_artefact
from fixer.base.errors import MoefixError, StoreError
from fixer.base.files import Damaged, check_file_name, safe_name
from fixer.base.json_reading import parse_json
from fixer.base.status import Phase, Share, Status
from fixer.base.status_reading import states
from fixer.families.fused_moe.family import FUSED_MOE
from fixer.kernel.cache import CompileCache
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome, Target
from fixer.kernel.source import KernelSource
from fixer.machine.cards import find_card, known_cards
from fixer.model.config import load_model
from fixer.model.rules.decide import decide
from fixer.model.rules.ladder import ladder
from fixer.sglang.flags import parse_flags
from fixer.sglang.tuning_files import parse_table, render_table
from fixer.tuning.journal import Journal, RunKey
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import BOTH, Kernel, Projection, Tile
from tests.support.fuzz_samples import ARTEFACT, DOWN, HERE, LARGE, LAYER, SMALL, UP
from tests.support.lookup_cases import CASES

SEED = 20261124
LEAST_INPUTS = 20_000
COUNTED: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()


ODD = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**19, -(10**19), 0.5, -0.0, 1e308, "", "x", "-1", "1e9", "NaN",
    "\x00", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\ud7ff\U0001f600", "$(reboot)", "; rm -rf /", "%s%n",
    [], {}, [[]],
    [None] * 50, [1, "x"], {"a": {"b": {"c": []}}}, {"": None}, ["Qwen3MoeForCausalLM"], {"quant_method": "fp8"},
    {"weight_block_size": [0, 0]}, {"weight_block_size": [128]}, {"config_groups": {}}, {"bits": "4"},
)  # fmt: skip
"""Values that a field may hold and should not."""


PIECES = (b"{", b"}", b'"', b"[", b",", b"\\u0000", b"NaN", b"1e999", b"9" * 30)


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, put in or taken out."""
    out = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 30))):
        place = chance.randrange(len(out) + 1)
        match chance.randrange(7):
            case 0 if out:
                out[place % len(out)] = chance.randrange(256)
            case 1 if out:
                out[place % len(out)] ^= 1 << chance.randrange(8)
            case 2:
                del out[place : place + chance.choice((1, 2, 40, 4096))]
            case 3:
                out[place:place] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 8, 200))))
            case 4:
                del out[place:]
            case 5:
                size = chance.choice((16, 512, 4096))
                out[place : place + size] = bytes([chance.choice((0, 255))]) * size
            case 6:
                out[place:place] = chance.choice(
                    (b"{", b"}", b'"', b"[", b",", b"\\u0000", b"NaN", b"1e999", b"9" * 30)
                )
    return bytes(out)


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, as a path."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


def mutated_value(value: object, chance: random.Random) -> object:
    """A few fields with odd values, gone, renamed or in each other's place."""
    out = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        paths = places(out)
        if not paths:
            return copy.deepcopy(chance.choice(ODD))
        *way, last = chance.choice(paths)
        holder = out
        for step in way:
            holder = holder[step]
        match chance.randrange(6):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[str(last) + chance.choice(("_", " ", "s"))] = holder.pop(last)
            case 2:
                source = out
                for step in chance.choice(paths):
                    source = source[step] if not (isinstance(source, list) and step >= len(source)) else source
                    if not isinstance(source, (dict, list)):
                        break
                holder[last] = json.loads(json.dumps(source))
            case 3 if isinstance(holder[last], (int, float)) and not isinstance(holder[last], bool):
                holder[last] = chance.choice((-holder[last], holder[last] + 1, holder[last] * 1000, str(holder[last])))
            case _:
                holder[last] = copy.deepcopy(chance.choice(ODD))
    return out


def tried(kind: str, call: Callable[[], object], *allowed: type[Exception]) -> object | None:
    """Count an input and run; what it gives, None where it is refused as documented."""
    COUNTED[kind] += 1
    try:
        return call()
    except allowed as fault:
        refusal = fault
    REFUSED[kind] += 1
    if isinstance(refusal, MoefixError):  # a person reads it
        assert len(refusal.message + refusal.hint) < 2000, refusal.message[:300]
    return None


@pytest.fixture(scope="module", autouse=True)
def fenced(tmp_path_factory):
    """A folder of its own as HOME and working folder, with nothing in it in the end."""
    fence = tmp_path_factory.mktemp("fence")
    before, folder = dict(os.environ), Path.cwd()
    os.environ |= {"HOME": str(fence), "HF_HOME": str(fence / "hf"), "XDG_CACHE_HOME": str(fence / "cache")}
    os.chdir(fence)
    yield fence
    left = [str(path.relative_to(fence)) for path in fence.rglob("*") if path.is_file()]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(before)
    assert left == []


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- config.json -----------------------------------------------------------------------------------------------------

FLAGS = tuple(
    parse_flags(arguments)
    for arguments in (
        (),
        ("--tp", "2"),
        ("--tp", "8", "--ep-size", "4"),
        ("--quantization", "fp8"),
        ("--quantization", "awq"),
        ("--moe-runner-backend", "triton"),
        ("--enable-dp-attention", "--tp", "4", "--dp", "4"),
        ("--speculative-algorithm", "EAGLE"),
        ("--chunked-prefill-size", "-1"),
    )
)
CARDS = tuple(find_card(name) for name in ("4090", "H100", "B200", "A100", "RTX PRO 6000", "T4"))


def follow(folder: Path, flags, card, version: str) -> None:
    """What plan, tune and serve do with a model before anything is compiled."""
    model = load_model(str(folder), flags)
    decision = decide(model, flags, card, version)
    assert decision.reason
    assert decision.reason.isprintable()
    if decision.workload is None:
        return
    rows = ladder(flags, card, version, decision.workload)
    assert len(rows) <= 32
    assert all(0 < row <= 1 << 24 for row in rows)
    assert list(rows) == sorted(set(rows))


def test_configs(tmp_path):
    chance = random.Random(SEED)
    versions = ("0.4.9", "0.5.17", "0.5.23")
    quant = tmp_path / "hf_quant_config.json"
    for turn in range(9000):
        config = CASES[turn % len(CASES)]["config"]
        raw = json.dumps(mutated_value(config, chance)).encode()
        if turn % 3 == 0:
            raw = mutated_bytes(raw, chance)
        (tmp_path / "config.json").write_bytes(raw)
        if turn % 50 == 0:
            quant.write_bytes(mutated_bytes(b'{"quantization": {"quant_algo": "FP8", "exclude_modules": []}}', chance))
        elif turn % 50 == 10:
            quant.unlink()
        flags, card, version = chance.choice(FLAGS), chance.choice(CARDS), chance.choice(versions)
        try:
            tried("config.json", lambda f=flags, c=card, v=version: follow(tmp_path, f, c, v), MoefixError)
        except Exception as error:
            raise AssertionError(f"turn {turn}: {raw[:3000]!r}") from error
    assert REFUSED["config.json"] < 0.9 * COUNTED["config.json"]  # else it tests the parser only
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "hf_quant_config.json"}


BAD_FORMS = (
    b"", b"null", b"[]", b"{", b'"x"', b"{}{}", b"[" * 200000, b'{"a":' * 5000, b"\xff\xfe{}", b"{" * 10**6,
    b'{"num_experts": ' + b"9" * 10**6 + b"}", b" " * (17 << 20), b'{"architectures": [' + b'"a",' * 10**5,
)  # fmt: skip


def test_configs_of_bad_form(tmp_path):
    for raw in BAD_FORMS:
        (tmp_path / "config.json").write_bytes(raw)
        assert tried("config.json", lambda: load_model(str(tmp_path), FLAGS[0]), MoefixError) is None


def test_names_of_models(monkeypatch, fenced, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    chance = random.Random(SEED + 1)
    pieces = (
        "..",
        ".",
        "/",
        "\\",
        "owner",
        "name",
        "~",
        "-",
        "--",
        "\x00",
        "\n",
        "%2e%2e",
        "é",
        " ",
        "$HOME",
        "C:",
        "a" * 97,
    )
    for _ in range(400):
        name = "".join(chance.choice(pieces) for _ in range(chance.randrange(1, 6)))
        if os.path.isdir(name.replace("\x00", "")):
            continue
        assert tried("model name", lambda name=name: load_model(name, FLAGS[0]), MoefixError) is None, name
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


# --- artefacts -------------------------------------------------------------------------------------------------------


def with_checksum(body: object) -> bytes:
    """The mutated content under a checksum that is right: what only the reader's own checks can refuse."""
    from fixer.artefacts.artefact import _checksum

    if isinstance(body, dict):
        body.pop("checksum", None)
        body["checksum"] = _checksum(body)
    return json.dumps(body).encode()


def test_artefacts():
    chance, good = random.Random(SEED + 2), ARTEFACT.to_json().encode()
    for turn in range(3500):
        raw = with_checksum(mutated_value(json.loads(good), chance)) if turn % 4 else mutated_bytes(good, chance)
        found = tried("artefact", lambda raw=raw: Artefact.from_json(raw), ValueError)
        if found is not None:
            assert Artefact.from_json(found.to_json()) == found
            check_file_name(found.gate_up_file)
            assert all(math.isfinite(t) for row in found.rows for t in row.times if t is not None)
    assert 0 < COUNTED["artefact"] - REFUSED["artefact"] < 1200


def test_artefacts_in_the_data_folder(tmp_path):
    chance, good = random.Random(SEED + 3), ARTEFACT.to_json().encode()
    for turn in range(700):
        home = tmp_path / f"home-{turn % 7}"
        path = save_artefact(home, ARTEFACT)
        raw = mutated_bytes(good, chance)
        path.write_bytes(raw)
        found = tried("artefact on disk", lambda home=home: find_artefact(home, HERE, LAYER))
        if found.artefact is None:
            (report,) = found.damaged
            assert report.kept_as.read_bytes() == raw
            assert not path.exists()
            report.kept_as.unlink()
        else:
            assert path.read_bytes() == raw
        assert find_artefact(home, HERE, replace(LAYER, experts=9)).artefact is None
    assert {path.name for path in tmp_path.iterdir()} == {f"home-{number}" for number in range(7)}


# --- tuning files ----------------------------------------------------------------------------------------------------

TABLE = render_table({1: SMALL, 16: SMALL, 64: LARGE, 4096: replace(LARGE, use_tma=True)})


def test_tuning_files():
    chance = random.Random(SEED + 4)
    for turn in range(4500):
        raw = json.dumps(mutated_value(json.loads(TABLE), chance)).encode()
        raw = raw if turn % 3 else mutated_bytes(TABLE, chance)
        table = tried("tuning file", lambda raw=raw, turn=turn: parse_table(raw, tma=bool(turn % 2)), ValueError)
        for batch, tile in (table or {}).items():
            assert 0 < batch < 10**8
            assert max(tile.block_m, tile.block_n, tile.block_k) <= 1024
            assert not (tile.use_tma and turn % 2 == 0)
    assert REFUSED["tuning file"] > 2000


def test_tuning_files_on_disk(tmp_path):
    chance = random.Random(SEED + 5)
    for _ in range(500):
        raws = {UP: mutated_bytes(TABLE, chance), DOWN: mutated_bytes(TABLE, chance)}
        for name, raw in raws.items():
            (tmp_path / name).write_bytes(raw)
        found = tried("tuning files on disk", lambda: read_files(tmp_path, FUSED_MOE, (UP, DOWN)))
        COUNTED["tuning files on disk"] += 1  # two files
        there = files_below(tmp_path)
        assert sorted(there.values()) == sorted(raws.values())
        for name, table in zip((UP, DOWN), found.tables, strict=True):
            assert (table is None) == (tmp_path / name not in there)
        for report in found.damaged:
            assert there[report.kept_as] == raws[report.path.name]
            report.kept_as.unlink()


# --- journals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """A journal with some trials, and its bytes."""
    path = tmp_path_factory.mktemp("journal") / "journal.sqlite"
    journal = Journal(path, RunKey(HERE, LAYER))
    for projection in BOTH:
        for block_n in (32, 64, 128, 256):
            kernel = Kernel(projection, Tile(16, block_n, 64, 1, 4, 3))
            timings = tuple(Timing(kernel, tokens, 10.0 + tokens, 9.0, 3) for tokens in (1, 16, 512))
            journal.write(Look(Build(kernel, Outcome.OK, 4096, 40, 0, 0.5), timings))
    journal.close()
    return path.read_bytes()


def test_journals(tmp_path, journal):
    good = journal
    chance, path = random.Random(SEED + 6), tmp_path / "journal.sqlite"
    kernel = Kernel(Projection.DOWN, Tile(32, 32, 64, 1, 4, 3))
    added = Look(Build(kernel, Outcome.OK, 4096, 40, 0, 0.5), (Timing(kernel, 1, 5.0, 5.0, 3),))

    def use() -> tuple[str, ...]:
        opened = Journal(path, RunKey(HERE, LAYER))
        try:
            for look in opened.looks().values():
                assert all(0 < timing.microseconds < 1e9 for timing in look.timings)
            opened.timings()
            opened.write(added)
            assert opened.looks()[kernel] == added
        finally:
            opened.close()
        return opened.notes

    for _ in range(1100):
        for stale in tmp_path.iterdir():
            stale.unlink()
        raw = mutated_bytes(good, chance)
        path.write_bytes(raw)
        notes = tried("journal", use, StoreError)
        if notes:  # it was set aside, to the byte
            (aside,) = tmp_path.glob("journal.sqlite.damaged-*")
            assert aside.read_bytes() == raw
            assert aside.name in notes[0]
    names = {path.name.split(".damaged-")[0] for path in tmp_path.iterdir()}
    assert names <= {"journal.sqlite", "journal.sqlite-journal"}


def test_what_was_compiled(tmp_path):
    target = Target(KernelSource(tmp_path, "", "ab" * 32), 90, tmp_path)
    candidates = [Candidate(LAYER, projection, tile) for projection in BOTH for tile in (SMALL, LARGE)]
    known = {candidate: Compiled(CompileOutcome.OK, 4096, 0.5) for candidate in candidates}
    path, chance = tmp_path / "compiled.sqlite", random.Random(SEED + 9)
    with CompileCache(tmp_path) as cache:
        cache.keep(target, known)
    good = path.read_bytes()

    def use() -> tuple[Damaged, ...]:
        with CompileCache(tmp_path) as cache:
            for found in cache.find(target, candidates).values():
                assert 0 <= found.shared_bytes <= 1 << 24
            cache.keep(target, known)
        return cache.damaged

    for _ in range(400):
        for stale in tmp_path.iterdir():
            stale.unlink()
        raw = mutated_bytes(good, chance)
        path.write_bytes(raw)
        for report in tried("what was compiled", use) or ():
            assert report.kept_as.is_file()


# --- states, cards, JSON ---------------------------------------------------------------------------------------------

STATE = Status(
    "host", 42, "2026-11-23T22:58:01Z", "2026-11-23T22:59:01Z", Phase.TUNING, "search", "owner/name", "c0ffee",
    Share(10, 300, "kernels"), Share(1 << 30, 1 << 34, "bytes"), (UP, DOWN), "", "",
)  # fmt: skip


def test_states(tmp_path):
    chance, good = random.Random(SEED + 7), STATE.to_json().encode()
    assert Status.from_json(good) == STATE
    (tmp_path / "run").mkdir()
    for turn in range(2000):
        raw = json.dumps(mutated_value(json.loads(good), chance)).encode() if turn % 3 else mutated_bytes(good, chance)
        found = tried("state", lambda raw=raw: Status.from_json(raw), ValueError)
        if found is not None:
            assert Status.from_json(found.to_json().encode()) == found
        if turn % 20 == 0:
            (tmp_path / "run" / f"{turn}.json").write_bytes(raw)
    assert len(states(tmp_path)) <= 100
    assert len(list((tmp_path / "run").iterdir())) == 100


def test_cards():
    chance, names = random.Random(SEED + 8), [card.name for card in known_cards()]
    for _ in range(700):
        text = mutated_bytes(chance.choice(names).encode(), chance).decode(errors="replace")[:200]
        found = tried("card", lambda text=text: find_card(text), MoefixError)
        assert found is None or found in known_cards()


@settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300) | st.text(max_size=300))
def test_any_bytes_are_refused_or_read(content):
    for parse in (parse_json, Artefact.from_json, Status.from_json, parse_table):
        raw = content if isinstance(content, bytes) else content.encode()
        tried("any bytes", lambda parse=parse, raw=raw: parse(raw), ValueError)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(VALUES, st.sampled_from(CASES), st.data())
def test_any_value_in_any_field_of_a_config(tmp_path_factory, value, case, data):
    config = dict(case["config"])
    config[data.draw(st.sampled_from(sorted(config)))] = value
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tried("config.json", lambda: follow(folder, FLAGS[0], CARDS[1], "0.5.17"), MoefixError)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_one_name_in_a_folder(text):
    name = safe_name(text)
    COUNTED["name"] += 1
    assert name == Path(name).name
    assert not name.startswith(".")
    assert len(name) <= 100
    tried("name", lambda: check_file_name(text), ValueError)


def test_enough_was_tried(capsys, request):
    total = sum(COUNTED.values())
    with capsys.disabled():
        print(f"\n[{total} inputs: " + ", ".join(f"{count} {kind}" for kind, count in COUNTED.items()) + "] ", end="")
    session = [item for item in request.session.items if item.path == request.node.path]
    if len(session) >= 15:  # else the user chose some of the tests only
        assert total >= LEAST_INPUTS
