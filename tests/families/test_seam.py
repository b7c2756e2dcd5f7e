"""A second family of another shape goes from the space to the report, and nothing on the way knows it by name."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fixer.artefacts.artefact import Artefact, Decision
from fixer.artefacts.check_files import misfit, set_damaged_aside, vet
from fixer.artefacts.environment import environment_of
from fixer.artefacts.forms import write_artefact, write_config_dir, write_sglang, write_vllm
from fixer.artefacts.gains import geometric_gain
from fixer.artefacts.install import TunedFiles, read_files
from fixer.artefacts.shelf import earlier_tiles, find_artefact, save_artefact
from fixer.artefacts.transfer import artefacts_in, describe, install_in, keep
from fixer.base.errors import UsageError
from fixer.families.registry import family_named, family_of
from fixer.kernel.compile import Compiled, CompileOutcome
from fixer.kernel.space import Space, last_resorts
from fixer.report.evidence import Sources, gather
from fixer.report.page import render
from fixer.report.summary import summarise
from fixer.report.terminal import print_report
from fixer.sglang.tree import Found, Tree
from fixer.tuning.duel import Duel, DuelRequest, KernelDuel, Via
from fixer.tuning.journal import Journal, JournaledRunner, RunKey, read_looks
from fixer.tuning.row_choice import Finals
from fixer.tuning.search.recording import write_recording
from fixer.tuning.search.replay import Recording, Regret, ReplayRunner
from fixer.tuning.search.runner import Look, run_search
from fixer.tuning.search.search import Search
from fixer.tuning.search.seeds import seeds
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel, Projection, RowTiles, Tile
from tests.support.artefacts import RTX_4090
from tests.support.toy_family import DEFAULT, KERNEL, TOY, ToyWorkload

LAYER = ToyWorkload(4096, 2048)
ROWS = (1, 64, 512)
FOREIGN = re.compile(r"gate.?up|\bdown\b|GROUP_SIZE_M|BLOCK_SIZE_[NK]|\bMoE\b", re.IGNORECASE)
"""Words of the fused MoE family."""


def microseconds(tile: Tile, tokens: int) -> float:
    """A landscape that gets faster with each step towards one tile, which no default is."""
    best = {"block_m": min(32, max(16, tokens)), "block_n": 64, "block_k": 512, "num_warps": 2, "num_stages": 3}
    return 10.0 + tokens / 64 + sum(abs(math.log2(getattr(tile, name) / value)) for name, value in best.items())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    package = tmp_path / "sglang"
    TOY.folder(Tree(package, "0.5.17", "3.6.0")).mkdir(parents=True)
    (package / "toy_kernel.py").write_text(KERNEL)
    return Tree(package, "0.5.17", "3.6.0")


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    path = tmp_path / "toy.csv.gz"
    kernels = [Kernel(Projection.ONLY, tile) for tile in Space(LAYER).all()]
    looks = [Look(Build(kernel, Outcome.OK, 1000, 32, 0, 0.1)) for kernel in kernels]
    timings = [Timing(kernel, m, us := microseconds(kernel.tile, m), us, 3) for kernel in kernels for m in ROWS]
    assert write_recording(path, looks, timings, TOY) == len(kernels) * len(ROWS)
    return Recording.read(path, family=TOY)


class Timed:
    """Bare kernels, timed by the landscape."""

    def duel(self, request: DuelRequest) -> KernelDuel:
        times = {pair: microseconds(pair.of(Projection.ONLY), request.tokens) for pair in request.pairs}
        own = (times[request.own],) * 9 if request.own is not None else ()
        medians = {kernel: times[pair] for pair in request.pairs for kernel in pair.kernels}
        return KernelDuel(Duel(request.tokens, Via.KERNELS, own, (times[request.tuned],) * 9), medians)


def tuned(tree: Tree, recording: Recording, home: Path) -> Artefact:
    """Search, keep each trial, decide each row: all that `moefix tune` does but for the card."""
    key = RunKey(environment_of(tree, RTX_4090, TOY), LAYER)
    lookup = TOY.lookup(tree, LAYER, RTX_4090)
    choose = TOY.own_choices(tree, lookup, LAYER, RTX_4090)
    own = {tokens: choose(tokens).tiles for tokens in ROWS}
    search = Search(LAYER, ROWS, seeds(TOY.shipped_files(tree), LAYER, RTX_4090), [DEFAULT])
    journal = Journal(home / "journal.sqlite", key)
    run_search(search, JournaledRunner(ReplayRunner(recording), journal))
    finals = Finals(own, search, Timed(), None, lambda note: None)
    rows = tuple(finals.row(tokens, own_runs=True) for tokens in ROWS)
    journal.close()
    assert Regret.of(search, recording).geomean <= 1.003
    return Artefact(key.environment, "toy/model", "", LAYER, lookup.names, rows, "2026-11-25T17:00:00Z", 3.0, True)


@pytest.fixture
def artefact(tree: Tree, recording: Recording, tmp_path: Path) -> Artefact:
    return tuned(tree, recording, tmp_path / "home")


def test_the_registry_has_it() -> None:
    assert family_of(LAYER) is TOY is family_named("toy")
    with pytest.raises(ValueError, match="no kernel family 'dance'"):
        family_named("dance")


def test_a_child_process_knows_it(tmp_path: Path) -> None:
    code = "import pickle, sys; from fixer.families.registry import family_of\n"
    code += "print(family_of(pickle.load(open(sys.argv[1], 'rb'))).name)"
    (tmp_path / "layer").write_bytes(pickle.dumps(LAYER))
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "layer"], capture_output=True, text=True, check=False)
    assert done.stdout == "toy\n", done.stderr


def test_the_space_has_its_axes_only() -> None:
    tiles = list(Space(LAYER).all())
    assert len(tiles) == 2 * 3 * 3 * 2 * 3
    assert {tile.group_m for tile in tiles} == {1}
    assert {tile.block_k for tile in Space(replace(LAYER, depth=640)).all()} == {128}
    assert {step.axis for step, _ in Space(LAYER).steps(tiles[0])} == set(TOY.axis)
    assert last_resorts(LAYER)[0] == Tile(16, 16, 128, num_warps=2, num_stages=1)


def test_seeds_are_the_shipped_files(tree: Tree) -> None:
    shipped = Tile(32, 64, 1024, num_warps=2, num_stages=3)
    (TOY.folder(tree) / "shipped-1.toy").write_bytes(TOY.render({8: shipped}))
    assert seeds(TOY.shipped_files(tree), LAYER, RTX_4090) == (shipped,)


def test_the_journal_resumes_and_keeps_families_apart(artefact: Artefact, tmp_path: Path) -> None:
    key = RunKey(artefact.environment, LAYER)
    looks = read_looks(tmp_path / "home" / "journal.sqlite", key)
    assert looks
    assert {look.build.kernel.projection for look in looks} == {Projection.ONLY}
    journal = Journal(tmp_path / "home" / "journal.sqlite", key)
    assert journal.notes == ()
    assert JournaledRunner(ReplayRunner(Recording({})), journal).resumed == len(looks)
    journal.close()


def test_the_artefact_names_its_family(artefact: Artefact) -> None:
    text = artefact.to_json()
    body = json.loads(text)
    assert body["family"] == "toy"
    assert set(body["rows"][0]["only"]) == {"TOY_M", "TOY_N", "TOY_K", "toy_warps", "toy_stages"}
    assert body["rows"][0]["only_us"] < body["rows"][0]["sglang_only_us"]
    assert not FOREIGN.search(text)
    assert Artefact.from_json(text) == artefact
    assert {row.decision for row in artefact.rows} == {Decision.TUNED}
    assert (geometric_gain(artefact) or 0) > 1


def test_a_row_of_another_shape_is_refused(artefact: Artefact) -> None:
    two = replace(artefact.rows[0], tiles=RowTiles(DEFAULT, DEFAULT), us=(1.0, 1.0), sglang_us=(1.0, 1.0))
    with pytest.raises(ValueError, match="toy has 1 products"):
        replace(artefact, rows=(two,))
    with pytest.raises(ValueError, match="num_warps is 16, outside 1 to 8"):
        replace(artefact, rows=(replace(artefact.rows[0], tiles=RowTiles(replace(DEFAULT, num_warps=16))),))


def test_it_is_kept_found_and_tried_again(artefact: Artefact, tmp_path: Path) -> None:
    path = save_artefact(tmp_path / "home", artefact)
    assert path.name.startswith("toy-4096x2048-")
    assert find_artefact(tmp_path / "home", artefact.environment, LAYER).artefact == artefact
    won = {row.tiles.of(Projection.ONLY) for row in artefact.rows}
    assert set(earlier_tiles(tmp_path / "home", replace(LAYER, columns=1))) == won
    assert earlier_tiles(tmp_path / "home", replace(LAYER, depth=128)) == ()


def test_it_is_installed_where_the_family_says_and_read_back(artefact: Artefact, tree: Tree, tmp_path: Path) -> None:
    before = TOY.folder(tree) / artefact.files[0]
    before.write_bytes(TOY.render({1: DEFAULT}))
    done = install_in(tree, artefact, tmp_path / "home")
    assert done.paths == (before,)
    assert str(done) == str(before)
    assert before.with_name(before.name + ".before-moefix").exists()
    read = read_files(done.folder, TOY, artefact.files)
    assert read.tables == ({row.batch: row.tiles.of(Projection.ONLY) for row in artefact.rows},)
    lookup = TOY.lookup(tree, LAYER, RTX_4090)
    assert (lookup.found, lookup.paths) == (Found.SHIPPED, (before,))
    choose = TOY.own_choices(tree, lookup, LAYER, RTX_4090)
    assert [choose(row.batch).tiles for row in artefact.rows] == [row.tiles for row in artefact.rows]
    assert install_in(tree, artefact, tmp_path / "home").notes == ()


def test_bad_files_are_moved_aside(artefact: Artefact, tree: Tree, tmp_path: Path) -> None:
    (path,) = install_in(tree, artefact, tmp_path / "home").paths
    path.write_text('{"1": {"BLOCK_SIZE_M": 16}}')
    (damaged,) = set_damaged_aside(tree, LAYER, RTX_4090).bad
    assert damaged.path == path
    assert not path.exists()
    install_in(tree, artefact, tmp_path / "home")

    def compiler(candidates):
        return {one: Compiled(CompileOutcome.OK, 1 if one.tile == DEFAULT else 1 << 20) for one in candidates}

    vetted = vet(tree, LAYER, RTX_4090, ROWS, compiler)
    assert vetted.fits
    assert [bad.path for bad in vetted.bad] == [path]
    assert misfit(artefact, RTX_4090, compiler).startswith("its row for M = 1 (")


def test_it_leaves_and_comes_back(artefact: Artefact, tree: Tree, tmp_path: Path) -> None:
    write_artefact(artefact, tmp_path / "a.json")
    (back,) = artefacts_in(tmp_path / "a.json")
    assert back == artefact
    assert keep(back, tmp_path / "other").exists()
    assert describe(back).startswith("toy/model on NVIDIA GeForce RTX 4090, toy-4096x2048, ")
    written = write_sglang(artefact, tmp_path / "files")
    assert [path.name for path in written.paths] == list(artefact.files)
    assert written.notes == ("SGLang 0.5.17 looks in elsewhere/toys",)
    assert TunedFiles.of(artefact).files(tmp_path / "files")[0][1] == written.paths[0].read_bytes()
    with pytest.raises(UsageError, match="vLLM reads no file of the toy product"):
        write_vllm(artefact, tmp_path / "vllm")
    (path,) = write_config_dir(artefact, tmp_path / "dir", None).paths
    assert path.parent == tmp_path / "dir" / "elsewhere" / "toys"


def test_the_report_shows_it(artefact: Artefact, tree: Tree, tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = save_artefact(home, artefact)
    summary = summarise(gather(artefact, path.name, Sources(home, tree, compiles=False)))
    assert summary.evidence.missing == {}
    assert len(summary.rows[0].shared) == 1
    assert summary.headline.endswith("less time in the toy kernels on average")
    out = io.StringIO()
    print_report(summary, Console(file=out, width=200))
    assert artefact.files[0] in out.getvalue()
    assert not FOREIGN.search(out.getvalue())
    page = render(summary, tmp_path / "fonts")
    body = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "product, tuned" in body
    assert "Toy depth" in body
    assert "toy product" in body
    assert not re.search(r"gate.?up|\bdown\b|GROUP_SIZE_M|\bMoE\b", body)
