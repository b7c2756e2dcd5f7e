from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.artefacts import install
from fixer.artefacts.install import install_files, installed, read_files
from fixer.base import files
from fixer.families.fused_moe.family import FUSED_MOE
from fixer.sglang.tuning_files import parse_table, render_table
from fixer.workload import check_tile
from tests.support.fakes import eventually
from tests.support.pairs import DOWN, LARGE, PAIR, SMALL, UP, moe_files

ROOT = Path(__file__).resolve().parents[2]
OTHER = "E=8,N=14336,device_name=NVIDIA_GeForce_RTX_4090.json"
# The first bytes of SGLang 0.5.17's own configs/triton_3_6_0/E=128,N=704,device_name=NVIDIA_H200_down.json.
SHIPPED = """{
    "1": {
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 64,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 1,
        "num_warps": 4,
        "num_stages": 5
    },
    "2": {
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 64,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 1,
        "num_warps": 4,
        "num_stages": 4
    }
}
"""


@pytest.fixture
def tree():
    """SGLang's configs folder, with two Triton versions, where other users can reach it."""
    root = Path(tempfile.mkdtemp(prefix="moefix-test-"))
    root.chmod(0o755)
    for version in ("triton_3_5_1", "triton_3_6_0"):
        (root / "sglang" / "configs" / version).mkdir(parents=True)
        (root / "sglang" / "configs" / version / OTHER).write_text(SHIPPED)
    yield root
    shutil.rmtree(root)


def running(tree):
    return tree / "sglang" / "configs" / "triton_3_6_0"


def sglang_finds(root, version, name):
    """What get_moe_configs of SGLang 0.5.17 would read: the running Triton's folder, then every other, newest first."""
    configs = root / "configs"
    if (configs / version / name).exists():
        return (configs / version / name).read_bytes()
    others = [entry.removeprefix("triton_") for entry in os.listdir(configs) if entry.startswith("triton_")]
    for other in sorted(others, key=lambda v: tuple(int(x) for x in v.split("_")), reverse=True):
        if (configs / f"triton_{other}" / name).exists():
            return (configs / f"triton_{other}" / name).read_bytes()
    return None


def test_files_look_as_sglangs_own_do():
    table = parse_table(SHIPPED.encode())
    assert render_table(table) == SHIPPED.encode()
    assert list(json.loads(render_table({4096: LARGE, 8: SMALL, 16: SMALL}))) == ["8", "16", "4096"]
    assert json.loads(render_table(PAIR.tables[1]))["64"]["USE_TMA"] is True


def test_a_pair_is_installed_once(tree):
    folder = running(tree)
    assert not installed(folder, PAIR)
    done = install_files(folder, PAIR, tree / "home", "0.5.17")
    assert done == install.Installation(folder, (folder / UP, folder / DOWN), (), ())
    assert installed(folder, PAIR)
    assert done.paths[0].read_bytes() == render_table(PAIR.tables[0])
    times = [path.stat().st_mtime_ns for path in (*done.paths, folder)]
    assert install_files(folder, PAIR, tree / "home", "0.5.17").notes == ()
    assert times == [path.stat().st_mtime_ns for path in (*done.paths, folder)]
    # All that the data folder has are the names of what moefix wrote.
    marks = [path for path in (tree / "home").rglob("*") if path.is_file()]
    wrote = {hashlib.sha256(render_table(table)).hexdigest() for table in PAIR.tables}
    assert {(mark.parent.name, mark.name, mark.stat().st_size) for mark in marks} == {("written", m, 0) for m in wrote}
    read = read_files(folder, FUSED_MOE, (UP, DOWN))
    assert (read.tables, read.damaged) == (PAIR.tables, ())


JOINT = moe_files(UP, "", {64: LARGE, 1: SMALL}, {1: SMALL, 64: LARGE})


def test_a_joint_file_is_installed_like_a_pair(tree):
    folder = running(tree)
    (folder / UP).write_text(SHIPPED)
    done = install_files(folder, JOINT, tree / "home", "0.4.9")
    assert (*done.paths, done.env) == (folder / UP, folder / UP, ())
    assert (folder / UP).read_bytes() == render_table(JOINT.tables[0])
    assert (folder / f"{UP}.before-moefix").read_text() == SHIPPED
    assert not (folder / DOWN).exists()
    assert installed(folder, JOINT)
    assert install_files(folder, JOINT, tree / "home", "0.4.9").notes == ()


def test_a_joint_file_goes_into_an_overlay_where_the_release_reads_one(tree, monkeypatch):
    monkeypatch.setattr(install, "_write", lambda *_: (_ for _ in ()).throw(install.StoreError("read-only")))
    done = install_files(running(tree), JOINT, tree / "home", "0.5.4.post1")
    assert sglang_finds(Path(done.env[0][1]), "triton_3_6_0", UP) == render_table(JOINT.tables[0])
    with pytest.raises(install.StoreError, match=r"read-only; SGLang 0\.4\.9 reads its tuning files from there only"):
        install_files(running(tree), JOINT, tree / "home", "0.4.9", overlay=False)


def test_a_joint_file_has_one_tile_for_both_projections():
    with pytest.raises(ValueError, match="one file for several products"):
        moe_files(UP, "", {1: SMALL}, {1: replace(SMALL, block_n=128)})


def test_any_change_of_a_file_is_seen(tree):
    folder = running(tree)
    install_files(folder, PAIR, tree / "home", "0.5.17")
    (folder / DOWN).write_bytes(render_table(PAIR.tables[1]) + b" ")
    assert not installed(folder, PAIR)
    (folder / DOWN).unlink()
    assert not installed(folder, PAIR)


def test_a_triton_that_sglang_does_not_know_gets_its_folder(tree):
    folder = running(tree).with_name("triton_9_9_9")
    assert install_files(folder, PAIR, tree / "home", "0.5.17").folder == folder
    assert installed(folder, PAIR)


def test_what_was_there_first_is_kept_once(tree):
    folder = running(tree)
    (folder / UP).write_text(SHIPPED)
    done = install_files(folder, PAIR, tree / "home", "0.5.17")
    assert [UP in note and ".before-moefix" in note for note in done.notes] == [True]
    newer = replace(PAIR, tables=(PAIR.tables[1] | {64: LARGE}, PAIR.tables[1]))
    assert install_files(folder, newer, tree / "home", "0.5.17").notes == ()
    assert (folder / f"{UP}.before-moefix").read_text() == SHIPPED
    assert (folder / f"{DOWN}.before-moefix").read_bytes() == b""  # there was none, and moefix's own is no "before"
    assert installed(folder, newer)


@pytest.mark.parametrize(
    "change",
    [
        {"tables": (PAIR.tables[0], {1: SMALL, 64: SMALL})},
        {"tables": (PAIR.tables[0], {1: SMALL})},
        {"tables": ({}, {})},
        {"tables": ({0: SMALL}, {0: SMALL})},
        {"tables": ({1: replace(SMALL, use_tma=True)}, {1: SMALL})},
        {"tables": ({1: replace(SMALL, block_k=4096)}, {1: SMALL})},
        {"tables": ({1: SMALL}, {1: replace(SMALL, block_n=24)})},
        {"names": ("../x.json", DOWN)},
        {"names": ("x.txt", DOWN)},
        {"names": (DOWN, DOWN)},
    ],
)
def test_a_pair_that_cannot_be_right_is_refused(change):
    with pytest.raises(ValueError, match=r"."):
        replace(PAIR, **change)


# --- the overlay -----------------------------------------------------------------------------------------------------

INSTALL = """
import os, pathlib, sys
sys.path[:0] = [sys.argv[1]]
from tests.support.pairs import PAIR
from fixer.artefacts.install import install_files
from fixer.base.errors import StoreError
if os.geteuid() == 0:
    # Only now: Python itself may be closed to other users.
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    done = install_files(pathlib.Path(sys.argv[2]), PAIR, pathlib.Path(sys.argv[3]), "0.5.17")
    print(done.folder, done.env, len(done.notes), sep="|")
except StoreError as fault:
    print("StoreError", fault.message)
"""


def install_as_another(tree, folder):
    """Install from a process for which SGLang's tree is read-only: nobody, or this user where it is not root."""
    subprocess.run(["chmod", "-R", "a-w", str(tree / "sglang")], check=True)
    command = [sys.executable, "-c", INSTALL, str(ROOT), str(folder), str(tree / "home")]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    subprocess.run(["chmod", "-R", "u+w", str(tree / "sglang")], check=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip().split("|")


def make_home(tree):
    (tree / "home").mkdir()
    (tree / "home").chmod(0o777)


def test_a_read_only_tree_gets_an_overlay_that_holds_all_that_is_shipped(tree):
    make_home(tree)
    folder = running(tree)
    root = tree / "home" / "overlay" / "0.5.17"
    for _ in range(2):
        answer = install_as_another(tree, folder)
        assert answer == [str(root / "configs" / "triton_3_6_0"), f"(('SGLANG_MOE_CONFIG_DIR', '{root}'),)", "1"]
    assert sglang_finds(root, "triton_3_6_0", UP) == render_table(PAIR.tables[0])
    assert sglang_finds(root, "triton_3_6_0", DOWN) == render_table(PAIR.tables[1])
    assert sglang_finds(root, "triton_3_6_0", OTHER) == SHIPPED.encode()
    (folder / OTHER).unlink()
    install_as_another(tree, folder)
    assert sglang_finds(root, "triton_3_6_0", OTHER) == SHIPPED.encode()  # now the older Triton's
    assert not (root / "configs" / "triton_3_6_0" / OTHER).is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == []  # the tree itself is untouched


def test_an_overlay_serves_several_triton_versions(tree):
    make_home(tree)
    root = tree / "home" / "overlay" / "0.5.17"
    install_as_another(tree, running(tree))
    install_as_another(tree, running(tree).with_name("triton_3_5_1"))
    for version in ("triton_3_5_1", "triton_3_6_0"):
        assert (root / "configs" / version / UP).read_bytes() == render_table(PAIR.tables[0])
        assert (root / "configs" / version / OTHER).read_text() == SHIPPED
    assert sorted(path.name for path in running(tree).with_name("triton_3_5_1").iterdir()) == [OTHER]


def test_without_links_the_overlay_holds_copies(tree, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    monkeypatch.setattr(install, "_write", lambda *_: (_ for _ in ()).throw(install.StoreError("read-only")))
    done = install_files(running(tree), PAIR, tree / "home", "0.5.17")
    shutil.rmtree(tree / "sglang")
    root = Path(done.env[0][1])
    assert sglang_finds(root, "triton_3_6_0", UP) == render_table(PAIR.tables[0])
    assert sglang_finds(root, "triton_3_6_0", OTHER) == SHIPPED.encode()
    assert (root / "configs" / "triton_3_5_1" / OTHER).read_text() == SHIPPED


def test_when_nothing_can_be_written_there_is_one_clear_error(tree):
    (tree / "home").mkdir(mode=0o555)
    assert "StoreError" in install_as_another(tree, running(tree))[0]


def test_the_version_cannot_lead_out_of_the_data_folder(tree, monkeypatch):
    monkeypatch.setattr(install, "_write", lambda *_: (_ for _ in ()).throw(install.StoreError("read-only")))
    done = install_files(running(tree), PAIR, tree / "home", "../../../etc")
    assert done.folder.resolve().is_relative_to(tree / "home" / "overlay")


def state(path):
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def test_kill_9_while_installing_leaves_whole_files(tree):
    code = "import sys, pathlib, itertools\nsys.path[:0] = [sys.argv[1]]\n"
    code += "from fixer.artefacts.install import install_files\nfrom fixer.workload import Tile\n"
    code += "from tests.support.pairs import DOWN, UP, moe_files\n"
    code += "folder = pathlib.Path(sys.argv[2])\nprint('ready', flush=True)\n"
    code += "for turn in itertools.count(int(sys.argv[3])):\n"
    code += " tile = Tile(16, 64, 128, 1 + turn % 64)\n"
    code += " table = {batch: tile for batch in range(1, 200)}\n"
    code += " install_files(folder, moe_files(UP, DOWN, table, table), folder, '0')"
    folder = running(tree)
    seed = random.Random(7)
    seen = set()
    for number in range(10):
        before = state(folder / UP)
        command = [sys.executable, "-c", code, str(ROOT), str(folder), str(6 * number)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
        child.stdout.readline()
        assert eventually(lambda before=before: state(folder / UP) != before, 60)  # it installs by now
        time.sleep(seed.uniform(0, 0.05))
        child.kill()
        child.communicate()
        read = read_files(folder, FUSED_MOE, (UP, DOWN))
        assert read.damaged == ()
        for table in read.tables:
            assert table is None or len(set(table.values())) == 1
        seen.add(read.tables[0] and read.tables[0][1])
    assert len(seen) > 2
    assert install_files(folder, PAIR, folder, "0").env == ()
    assert installed(folder, PAIR)


# --- damaged files ---------------------------------------------------------------------------------------------------


def test_no_files_are_nothing_to_report(tree):
    assert read_files(running(tree), FUSED_MOE, (UP, DOWN)) == install.FilesOnDisk((None, None), ())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (SHIPPED[:100], "Expecting"),
        ("", "Expecting value"),
        ("not JSON", "Expecting value"),
        ("[]", "not an object"),
        ("{}", "1 to 1024 rows"),
        ('{"1": []}', "row 1 is not an object"),
        (SHIPPED.replace("16", '"16"'), "BLOCK_SIZE_M"),
        (SHIPPED.replace("16", "16.0"), "BLOCK_SIZE_M"),
        (SHIPPED.replace("16", "true"), "BLOCK_SIZE_M"),
        (SHIPPED.replace("16", "8"), "block_m"),
        (SHIPPED.replace("16", "2048"), "block_m"),
        (SHIPPED.replace("16", "48"), "power of two"),
        (SHIPPED.replace('_stages": 5', '_stages": 50'), "num_stages"),
        (SHIPPED.replace('"num_warps": 4,', '"num_warps": 4, "waves_per_eu": 0,'), "waves_per_eu"),
        (SHIPPED.replace('"num_warps": 4,', '"num_warps": 4, "num_ctas": 2,'), "clusters"),
        (SHIPPED.replace('"num_warps": 4,', '"num_warps": 4, "USE_TMA": true,'), "USE_TMA"),
        (SHIPPED.replace('"1"', '"-1"'), "batch size"),
        (SHIPPED.replace('"1"', '"one"'), "batch size"),
        (SHIPPED.replace('"1"', '"02"'), "twice"),
        (SHIPPED.replace('"1"', '"2"'), "twice"),
        (SHIPPED.replace("16", "NaN"), "NaN"),
    ],
)
def test_a_damaged_file_is_set_aside_and_named(tree, content, reason):
    folder = running(tree)
    install_files(folder, PAIR, tree / "home", "0.5.17")
    (folder / UP).write_text(content)
    read = read_files(folder, FUSED_MOE, (UP, DOWN))
    assert (read.tables[0], read.tables[1]) == (None, PAIR.tables[1])
    (report,) = read.damaged
    assert reason in report.reason
    assert report.kept_as.read_text() == content
    assert not (folder / UP).exists()


def test_tma_in_a_down_file_is_right(tree):
    (running(tree) / DOWN).write_text(SHIPPED.replace('"num_warps": 4,', '"num_warps": 4, "USE_TMA": true,'))
    assert read_files(running(tree), FUSED_MOE, (UP, DOWN)).tables[1][1].use_tma


def mutate(data):
    content = bytearray(SHIPPED.encode())
    for place, value in data:
        content[place % len(content)] = value
    return bytes(content)


@settings(max_examples=600, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.integers(0, len(SHIPPED) - 3).map(lambda length: SHIPPED.encode()[:length]),
        st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=6).map(mutate),
    )
)
def test_whatever_is_in_a_file_it_is_sane_or_set_aside(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / UP).write_bytes(content)
    read = read_files(folder, FUSED_MOE, (UP, DOWN))
    if read.tables[0] is None:
        (report,) = read.damaged
        assert report.kept_as.read_bytes() == content
        assert str(report).isprintable()
        return
    assert read.damaged == ()
    assert all(check_tile(tile) and not tile.use_tma for tile in read.tables[0].values())
    assert (folder / UP).read_bytes() == content


def test_a_name_with_a_folder_in_it_is_refused(tree):
    with pytest.raises(ValueError, match="no name"):
        read_files(running(tree), FUSED_MOE, ("../" + UP, DOWN))
    assert files.check_file_name(UP) == UP


# --- one joint file


def test_a_joint_file_is_one_file(tree, tmp_path):
    joint = moe_files(UP, "", {1: SMALL, 64: LARGE}, {1: SMALL, 64: LARGE})
    installation = install_files(running(tree), joint, tmp_path / "home", "0.4.9")
    assert installation.paths == (running(tree) / UP,) * 2
    assert str(installation) == str(running(tree) / UP)
    assert installation.paths[0].read_bytes() == render_table(joint.tables[0])
    assert not (running(tree) / DOWN).exists()
    assert installed(running(tree), joint)
    with pytest.raises(ValueError, match="one file for several products"):
        moe_files(UP, "", {1: SMALL}, {1: replace(SMALL, block_n=128)})


def test_a_gate_up_file_has_descriptors_where_the_release_takes_them_out():
    described = {1: replace(SMALL, use_tma=True)}
    with pytest.raises(ValueError, match="USE_TMA"):
        moe_files(UP, DOWN, described, {1: SMALL})
    assert replace(PAIR, tables=(described, {1: SMALL}), sglang="0.5.18").tables[0] == described
