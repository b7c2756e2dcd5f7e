from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.artefacts import artefact as artefact_module
from fixer.artefacts.artefact import Artefact, Decision, Environment
from fixer.artefacts.shelf import Found, artefact_path, earlier_tiles, find_artefact, save_artefact
from fixer.base import files
from fixer.base.data_folder import data_home, wanted_home
from fixer.base.errors import StoreError
from fixer.base.files import safe_name, set_aside, write_atomically, write_together
from fixer.base.locks import Lock
from fixer.workload import NumberFormat, RowTiles, Tile, Workload, check_tile
from tests.support.artefacts import renamed
from tests.support.moe_rows import moe_row

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
# Python itself may be closed to other users, so a child starts as this one, imports, and only then becomes nobody.
BECOME_NOBODY = "import os\nif os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing owners takes root")

HERE = Environment("NVIDIA GeForce RTX 4090", (8, 9), 101376, "580.159.03", "3.6.0", "0.5.17", "ab" * 32, "0.1.0")
LAYER = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, block_shape=(128, 128))
SMALL, LARGE = Tile(16, 64, 128, 1, 4, 3), Tile(64, 128, 128, 16, 8, 2)
ROWS = (
    moe_row(1, SMALL, SMALL, Decision.TUNED, 10.5, 7.25, 12.0, 8.0, 0.002),
    moe_row(64, LARGE, replace(LARGE, block_n=64, use_tma=True), Decision.KEPT_SGLANG, 10.0, 7, 10.0, 7, 0.0),
    moe_row(4096, LARGE, LARGE, Decision.FITTING_ONLY, 900.0, 450.0),
)
ARTEFACT = Artefact(
    environment=HERE,
    model="Qwen/Qwen3-30B-A3B-FP8",
    revision="d" * 40,
    workload=LAYER,
    files=(
        "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8,block_shape=[128, 128].json",
        "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8,block_shape=[128, 128]_down.json",
    ),
    rows=ROWS,
    created="2026-11-23T22:58:13Z",
    seconds=312.5,
    measured=True,
)


def python(code, *arguments, **options):
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True, "cwd": "/", **options}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture
def open_folder():
    """A folder that another user can reach: pytest's own are closed to all but this user."""
    folder = Path(tempfile.mkdtemp(prefix="moefix-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_home_by_rank(tmp_path):
    environ = {"MOEFIX_HOME": str(tmp_path / "a" / "b"), "XDG_DATA_HOME": str(tmp_path / "xdg")}
    assert data_home(tmp_path / "chosen", environ) == tmp_path / "chosen"
    assert data_home(None, environ) == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    assert data_home(None, {"XDG_DATA_HOME": str(tmp_path / "xdg")}) == tmp_path / "xdg" / "moefix"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_home_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_home(None, {}) == tmp_path / ".local" / "share" / "moefix"
    assert data_home(None, {"XDG_DATA_HOME": "relative"}) == tmp_path / ".local" / "share" / "moefix"
    assert wanted_home(None, {"MOEFIX_IMAGE": "1", "XDG_DATA_HOME": "/x"}) == Path("/data")
    assert data_home(None, {"MOEFIX_HOME": "~/here"}) == tmp_path / "here"


@pytest.mark.parametrize("name", ["file", "file/inside", "nul\0byte"])
def test_a_home_that_cannot_be_is_one_clear_error(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError) as caught:
        data_home(None, {"MOEFIX_HOME": str(tmp_path / name)})
    assert "MOEFIX_HOME" in caught.value.hint
    assert caught.value.exit_code == 9


def test_a_read_only_home_is_one_clear_error(open_folder):
    open_folder.chmod(0o555)
    code = (
        "import sys, pathlib\nfrom fixer.base.data_folder import data_home\nfrom fixer.base.errors import StoreError\n"
        + BECOME_NOBODY
    )
    code += "for name in ('', 'inside'):\n  try: data_home(pathlib.Path(sys.argv[1], name)); print('made')\n"
    code += "  except StoreError as fault: print(fault.message)"
    out, err = python(code, open_folder).communicate(timeout=20)
    assert out.count("Permission denied") == 2, out + err


# --- writing ---------------------------------------------------------------------------------------------------------


def test_written_files_have_sane_modes_and_leave_nothing_behind(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "new" / "deep" / "file", b"one")
        write_atomically(tmp_path / "new" / "deep" / "file", b"two")
    finally:
        os.umask(before)
    path = tmp_path / "new" / "deep" / "file"
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o755
    assert list(path.parent.iterdir()) == [path]


@as_root
def test_root_gives_files_the_volumes_owner(tmp_path):
    os.chown(tmp_path, NOBODY, NOBODY)
    path = save_artefact(tmp_path, ARTEFACT)
    with Lock(tmp_path / "locks" / "one"):
        pass
    for made in (path, path.parent, tmp_path / "artefacts", tmp_path / "locks" / "one"):
        assert (made.stat().st_uid, made.stat().st_gid) == (NOBODY, NOBODY)


def test_a_folder_in_the_way_changes_nothing(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(StoreError, match="a folder is in the way"):
        write_together(((tmp_path / "a", b"new"), (tmp_path / "b", b"new")))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_leftovers_of_dead_writers_go_in_time(tmp_path):
    path = tmp_path / "file"
    temporary = files._stage(path, b"half")
    write_atomically(path, b"whole")
    assert temporary.exists()  # it may be a living writer's
    os.utime(temporary, (time.time() - 7200,) * 2)
    write_atomically(path, b"whole")
    assert list(tmp_path.iterdir()) == [path]


@as_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a mount of its own")
@pytest.mark.parametrize("readonly", [False, True])
def test_full_disk_and_read_only_volume_keep_the_old(tmp_path, readonly):
    code = (
        "import sys, pathlib\nfrom fixer.base.files import write_together\nfrom fixer.base.errors import StoreError\n"
    )
    code += "folder = pathlib.Path(sys.argv[1])\n"
    code += "try: write_together(((folder / 'a', b'new'), (folder / 'b', b'x' * 100000))); print('all done')\n"
    code += "except StoreError as fault: print(fault.message, '|', fault.hint)\n"
    code += "print((folder / 'a').read_text(), len(list(folder.iterdir())))"
    remount = 'mount -o remount,ro "$1" && ' if readonly else ""
    script = f'mount -t tmpfs -o size=64k t "$1" && echo old >"$1/a" && {remount} exec "$2" -c "$3" "$1"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if "mount" in child.stderr or "unshare" in child.stderr:
        pytest.skip("mounting is not allowed here")
    assert ("Read-only" if readonly else "No space left") in child.stdout, child.stderr
    assert "all done" not in child.stdout
    assert child.stdout.endswith("old\n 1\n")


def test_kill_9_leaves_the_old_or_the_new_content(tmp_path):
    code = "import sys, pathlib, itertools\nfrom fixer.base.files import write_atomically\n"
    code += "print('ready', flush=True)\n"
    code += "for turn in itertools.count(): write_atomically(pathlib.Path(sys.argv[1]), (b'%06d' % turn) * 50000)"
    path = tmp_path / "file"
    write_atomically(path, b"before" * 50000)
    seed = random.Random(20261123)
    contents = set()
    for _ in range(25):
        process = python(code, path)
        process.stdout.readline()
        end = time.monotonic() + seed.uniform(0, 0.06)
        while time.monotonic() < end:
            content = path.read_bytes()
            assert content == content[:6] * 50000  # a reader beside the writer never sees half
        process.kill()
        process.communicate()
        content = path.read_bytes()
        assert content == content[:6] * 50000
        contents.add(content[:6])
    assert len(contents) > 5  # it was killed in the middle of work, not before
    assert {entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")} == {"file"}


# --- artefacts -------------------------------------------------------------------------------------------------------


def test_a_joint_artefact_has_one_file_and_one_tile_a_row():
    rows = (replace(ROWS[0], tiles=RowTiles(ROWS[0].gate_up, SMALL)), ROWS[2])
    joint = replace(ARTEFACT, files=(ARTEFACT.files[0], ""), rows=rows)
    assert Artefact.from_json(joint.to_json()) == joint
    with pytest.raises(ValueError, match="joint file"):
        replace(ARTEFACT, files=(ARTEFACT.files[0], ""))


def test_notes_come_back_and_one_without_them_is_read():
    noted = replace(ARTEFACT, notes=("M=3072: a tuned one failed",))
    assert Artefact.from_json(noted.to_json()) == noted
    body = json.loads(ARTEFACT.to_json())
    del body["notes"], body["checksum"]
    body["checksum"] = artefact_module._checksum(body)
    assert Artefact.from_json(json.dumps(body)) == ARTEFACT
    with pytest.raises(ValueError, match="too long"):
        replace(ARTEFACT, notes=("x" * 5000,))


def test_descriptors_in_a_gate_up_file_are_for_releases_that_take_them():
    rows = (replace(ROWS[1], tiles=RowTiles(replace(LARGE, use_tma=True), ROWS[1].down)),)
    with pytest.raises(ValueError, match="USE_TMA"):
        replace(ARTEFACT, rows=rows)
    newer = replace(ARTEFACT, rows=rows, environment=replace(HERE, sglang="0.5.18"))
    assert Artefact.from_json(newer.to_json()) == newer


def test_an_artefact_comes_back_as_it_was(tmp_path):
    assert Artefact.from_json(ARTEFACT.to_json()) == ARTEFACT
    path = save_artefact(tmp_path, ARTEFACT)
    found = find_artefact(tmp_path, HERE, LAYER)
    assert found == Found(ARTEFACT, None, ())
    assert path.relative_to(tmp_path).parts[:2] == ("artefacts", "NVIDIA_GeForce_RTX_4090")
    assert path.name.startswith("E=128,N=768,fp8_w8a8-")


def test_only_what_counts_makes_an_artefact_void(tmp_path):
    save_artefact(tmp_path, ARTEFACT)
    for same in (replace(HERE, moefix="9.9"), replace(HERE, driver="580.999")):
        assert HERE.difference(same) == ()
        assert find_artefact(tmp_path, same, LAYER).artefact == ARTEFACT


@pytest.mark.parametrize(
    ("change", "part", "phrase"),
    [
        ({"card": "NVIDIA GeForce RTX 4090 D"}, "card", "is NVIDIA GeForce RTX 4090 D"),
        ({"capability": (12, 0)}, "compute capability", "was 8.9, is 12.0"),
        ({"shared_memory": 50000}, "shared memory limit", "was 101376, is 50000"),
        ({"driver": "590.1"}, "driver", "was 580, is 590"),
        ({"driver": ""}, "driver", "is unknown"),
        ({"triton": "3.8.0"}, "Triton", "Triton was 3.6.0, is 3.8.0"),
        ({"sglang": "0.5.23"}, "SGLang", "was 0.5.17, is 0.5.23"),
        ({"kernel_hash": "cd" * 32}, "kernel source", "was abababababab, is cdcdcdcdcdcd"),
    ],
)
def test_another_environments_artefact_is_not_used_and_the_part_is_named(tmp_path, change, part, phrase):
    save_artefact(tmp_path, ARTEFACT)
    now = replace(HERE, **change)
    found = find_artefact(tmp_path, now, LAYER)
    assert found.artefact is None
    assert found.mismatch.parts == (part,)
    assert phrase in found.mismatch.reasons[0]
    # Tuned anew, both are kept, each for its own environment.
    save_artefact(tmp_path, renamed(ARTEFACT, environment=now))
    assert find_artefact(tmp_path, now, LAYER).artefact.environment == now
    assert find_artefact(tmp_path, HERE, LAYER).artefact == ARTEFACT


def test_another_workload_is_nothing_to_report(tmp_path):
    save_artefact(tmp_path, ARTEFACT)
    assert find_artefact(tmp_path, HERE, replace(LAYER, top_k=4)) == Found(None, None, ())


def test_the_nearest_mismatch_is_the_one_reported(tmp_path):
    save_artefact(tmp_path, replace(ARTEFACT, environment=replace(HERE, triton="3.5.1", sglang="0.4.9")))
    save_artefact(tmp_path, replace(ARTEFACT, environment=replace(HERE, triton="3.5.1")))
    assert find_artefact(tmp_path, HERE, LAYER).mismatch.parts == ("Triton",)


def test_a_copied_file_does_not_pass_for_another(tmp_path):
    source = save_artefact(tmp_path, ARTEFACT)
    now = replace(HERE, triton="3.8.0")
    shutil.copy(source, artefact_path(tmp_path, now, LAYER))
    assert find_artefact(tmp_path, now, LAYER).artefact is None


def damaged_once(home, content):
    """Put `content` in the artefact's place; check what has to hold for any content; return the lookup's answer."""
    shutil.rmtree(home, ignore_errors=True)
    path = artefact_path(home, HERE, LAYER)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    found = find_artefact(home, HERE, LAYER)
    if found.artefact is not None:
        assert found.artefact == ARTEFACT
        return found
    (report,) = found.damaged
    assert not path.exists()
    assert report.kept_as.name.startswith(path.name + ".damaged-")
    assert report.kept_as.read_bytes() == content
    assert str(report).isprintable()
    assert find_artefact(home, HERE, LAYER).damaged == ()
    return found


GOOD = ARTEFACT.to_json().encode()


def signed(body):
    """A text whose checksum is right, so that only the reading of each part stands between it and being believed."""
    body = {name: value for name, value in body.items() if name != "checksum"}
    return json.dumps({**body, "checksum": artefact_module._checksum(body)}).encode()


def forged_environment(**changes):
    body = json.loads(GOOD)
    return {**body, "environment": {**body["environment"], **changes}}


BF16_FILE = "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090.json"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_set_aside(tmp_path_factory, content):
    assert damaged_once(tmp_path_factory.getbasetemp() / "random", content).artefact is None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 3))
def test_truncated_artefacts_are_set_aside(tmp_path_factory, length):
    assert damaged_once(tmp_path_factory.getbasetemp() / "truncated", GOOD[:length]).artefact is None


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(GOOD) * 8 - 1))
def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path_factory, bit):
    content = bytearray(GOOD)
    content[bit // 8] ^= 1 << bit % 8
    found = damaged_once(tmp_path_factory.getbasetemp() / "flipped", bytes(content))
    # Only white space may change without effect.
    assert found.artefact is None or GOOD[bit // 8 : bit // 8 + 1].isspace()


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.sampled_from([0, -1, 10**400, 1e308, 48, 8192, "\ud800", "a\nb", "x" * 5000, "../../etc/passwd", [1, 2, 3]]),
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([path for path in places(json.loads(GOOD)) if path and path != ("checksum",)]), WRONG)
def test_wrong_types_and_values_never_raise(tmp_path_factory, place, value):
    body = json.loads(GOOD)
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    home = tmp_path_factory.getbasetemp() / "types"
    try:
        parsed = Artefact.from_json(signed(body))
    except ValueError:
        assert damaged_once(home, signed(body)).artefact is None
    else:
        # Some values are as good as those that were there; then they come back, and write out, unharmed.
        assert Artefact.from_json(parsed.to_json()) == parsed
        assert all(check_tile(tile) for row in parsed.rows for tile in (row.gate_up, row.down))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[]", "not an object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "nested too deeply"),
        (b'{"schema": 1, "schema": 1}', "twice"),
        (b'{"schema": NaN}', "NaN"),
        (b'{"schema": ' + b"9" * 10_000 + b"}", "digits"),
        (b'{"schema": 2}', "schema"),
        (b'{"schema": true}', "schema"),
        (GOOD.replace(b"101376", b"101377"), "checksum"),
        (GOOD + b" " * files.MOST_BYTES, "longer"),
        (signed({**json.loads(GOOD), "extra": 1}), "unknown part 'extra'"),
        (signed({**json.loads(GOOD), "rows": json.loads(GOOD)["rows"][::-1]}), "ascending"),
        (signed({**json.loads(GOOD), "rows": json.loads(GOOD)["rows"][:1] * 2}), "ascending"),
        (signed({**json.loads(GOOD), "rows": []}), "1 to 1024"),
        (signed({**json.loads(GOOD), "down_file": "../x.json"}), "no name for a tuning file"),
        (
            signed({**json.loads(GOOD), "gate_up_file": "package.json"}),
            "it names the file package.json, and its layer's is E=128,N=768",
        ),
        (
            signed({**json.loads(GOOD), "gate_up_file": BF16_FILE}),
            f"it names the file {BF16_FILE}, and its layer's is E=128,N=768",
        ),
        (signed(forged_environment(card="x/../../victim/config")), "and its layer's is E=128,N=768,device_name=x/.."),
        (signed(forged_environment(triton="3/6")), "'triton_3/6' is no file name"),
        (signed({**json.loads(GOOD), "measured": False}), "nothing was measured"),
        (signed({**json.loads(GOOD), "created": "yesterday"}), "yesterday"),
        (signed({**json.loads(GOOD), "seconds": float("1e300")}), "seconds"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, reason):
    (report,) = damaged_once(tmp_path / "home", content).damaged
    assert reason in report.reason


def test_pipes_folders_and_links_to_nowhere_do_not_block(tmp_path):
    path = artefact_path(tmp_path, HERE, LAYER)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert "regular file" in find_artefact(tmp_path, HERE, LAYER).damaged[0].reason
    path.mkdir()
    assert len(find_artefact(tmp_path, HERE, LAYER).damaged) == 1
    path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
    path.symlink_to("nowhere")
    assert find_artefact(tmp_path, HERE, LAYER).damaged == ()
    assert save_artefact(tmp_path, ARTEFACT) == path
    assert find_artefact(tmp_path, HERE, LAYER).artefact == ARTEFACT


def test_setting_aside_goes_over_no_other_file(tmp_path):
    kept = []
    for turn in range(3):
        (tmp_path / "x.json").write_text(str(turn))
        kept.append(set_aside(tmp_path / "x.json", "r" * 1000).kept_as)
    assert [path.read_text() for path in kept] == ["0", "1", "2"]
    gone = set_aside(tmp_path / "x.json", "gone")
    assert gone.kept_as is None
    assert "could not be moved" in str(gone)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"batch": 1 << 25},
        {"tiles": RowTiles(SMALL, LARGE)},
        {"tiles": RowTiles(SMALL)},
        {"us": (None, 7.25)},
        {"us": (float("nan"), 7.25)},
        {"us": (10.5, 0.0)},
        {"us": (10.5, 7.25, 1.0)},
        {"sglang_us": (12.0, float("inf"))},
        {"noise": -0.1},
        {"noise": float("nan")},
        {"tiles": RowTiles(replace(SMALL, block_n=4096), SMALL)},
        {"tiles": RowTiles(replace(SMALL, block_n=48), SMALL)},
        {"tiles": RowTiles(replace(SMALL, num_stages=100), SMALL)},
    ],
)
def test_a_row_that_contradicts_itself_cannot_be_in_an_artefact(change):
    with pytest.raises(ValueError, match=r"."):
        replace(ARTEFACT, rows=(replace(ROWS[0], **change), *ROWS[1:]))


def test_names_stay_in_their_folder():
    assert safe_name("../../etc/passwd") == "_.._etc_passwd"
    assert safe_name("..") == "unnamed"
    assert safe_name("a b\0/") == "a_b__"
    assert len(safe_name("x" * 999)) == 100
    evil = replace(HERE, card="../../../tmp/evil")
    assert artefact_path(Path("/home"), evil, LAYER).resolve().is_relative_to("/home/artefacts")


# --- the lock --------------------------------------------------------------------------------------------------------

HOLDER = "import sys, pathlib, time\nfrom fixer.base.locks import Lock\nwith Lock(pathlib.Path(sys.argv[1])):\n"
HOLDER += " print('held', flush=True); time.sleep(30)"


def test_the_lock_waits_and_says_for_whom(tmp_path):
    path = tmp_path / "locks" / "tune"
    holder = python(HOLDER, path)
    assert holder.stdout.readline() == "held\n"
    waits = []

    def waiting(seconds, who):
        waits.append((seconds, who))
        if len(waits) == 3:
            holder.send_signal(signal.SIGKILL)

    began = time.monotonic()
    with Lock(path, waiting, poll_seconds=0.05):
        assert time.monotonic() - began < 5
    holder.communicate()
    assert len(waits) >= 3
    assert waits[0][1] == f"process {holder.pid} on {socket.gethostname()}"
    assert [seconds for seconds, _ in waits] == sorted(seconds for seconds, _ in waits)


def test_patience_ends(tmp_path):
    with (
        Lock(tmp_path / "lock"),
        pytest.raises(StoreError, match=f"process {os.getpid()}"),
        Lock(tmp_path / "lock", poll_seconds=0.01, patience_seconds=0.05),
    ):
        pass


def test_a_lock_of_a_dead_process_does_not_block_even_if_its_child_lives(tmp_path):
    code = HOLDER.replace("print('held'", "import os; child = os.fork(); child == 0 and time.sleep(5); print('held'")
    holder = python(code, tmp_path / "lock")
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    with Lock(tmp_path / "lock", poll_seconds=0.05, patience_seconds=2):
        pass
    holder.stdout.close()
    holder.stderr.close()


def test_a_lock_file_that_was_left_behind_does_not_block(tmp_path):
    (tmp_path / "lock").write_bytes(b"process 1 on \xff\x00 somewhere")
    with Lock(tmp_path / "lock", patience_seconds=0):
        pass


def test_only_one_at_a_time(tmp_path):
    # Each of four processes adds one to a number 25 times, by reading and writing: without the lock, some are lost.
    code = (
        "import sys, pathlib, time\nfrom fixer.base.files import write_atomically\nfrom fixer.base.locks import Lock\n"
    )
    code += "folder = pathlib.Path(sys.argv[1])\n"
    code += "for _ in range(25):\n with Lock(folder / 'lock', poll_seconds=0.002):\n"
    code += "  number = int((folder / 'number').read_text()); time.sleep(0.001)\n"
    code += "  write_atomically(folder / 'number', str(number + 1).encode())"
    (tmp_path / "number").write_text("0")
    processes = [python(code, tmp_path) for _ in range(4)]
    for process in processes:
        _, err = process.communicate(timeout=50)
        assert process.returncode == 0, err
    assert (tmp_path / "number").read_text() == "100"


def test_a_lock_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(StoreError, match="cannot be taken"), Lock(tmp_path / "lock"):
        pass


@as_root
def test_another_users_lock_file_still_locks(open_folder):
    (open_folder / "lock").touch(mode=0o644)
    holder = python(HOLDER.replace("with", BECOME_NOBODY + "with", 1), open_folder / "lock")
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError), Lock(open_folder / "lock", poll_seconds=0.01, patience_seconds=0.05):
        pass
    holder.kill()
    holder.communicate()


# --- what earlier tunings chose -------------------------------------------------------------------------------------


def test_earlier_tiles_are_those_of_the_same_format_the_most_frequent_first(tmp_path):
    other_shape = renamed(ARTEFACT, workload=replace(LAYER, experts=64))
    other_format = renamed(ARTEFACT, workload=replace(LAYER, block_shape=None), environment=replace(HERE, card="other"))
    for artefact in (other_shape, other_format):
        save_artefact(tmp_path, artefact)
    tiles = earlier_tiles(tmp_path, LAYER)
    assert tiles[0] == LARGE  # three rows of it against two of the small one
    assert set(tiles) == {LARGE, SMALL}  # and no tile that needs TMA
    assert earlier_tiles(tmp_path, replace(LAYER, number_format=NumberFormat.NONE)) == ()


def test_a_tuning_that_was_not_measured_is_no_seed(tmp_path):
    fitting = tuple(moe_row(row.batch, row.gate_up, row.gate_up, Decision.FITTING_ONLY) for row in ROWS)
    save_artefact(tmp_path, replace(ARTEFACT, rows=fitting, measured=False))
    assert earlier_tiles(tmp_path, LAYER) == ()
