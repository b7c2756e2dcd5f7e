"""`moefix bench`: kernels row by row, with a stand-in for the process that has SGLang's layer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

import fixer.bench.kernels
import fixer.bench.subject
import fixer.serve.situation
from fixer.base.status_reading import states
from fixer.bench.results import Kind, Verdict
from fixer.bench.shelf import read_result
from fixer.cli import main
from tests.support import fake_layer, fakes
from tests.support.serving import H100, LARGE, SMALL, Machine


@pytest.fixture
def machine(tmp_path, trees, driver, models, compiled, monkeypatch):
    made = Machine(tmp_path, trees["0.5.17"].package, driver, models, compiled)
    made.log = tmp_path / "layer.log"
    monkeypatch.setenv(fake_layer.LOG, str(made.log))
    monkeypatch.setenv("MOEFIX_HOME", str(made.home))
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    monkeypatch.setattr(fixer.serve.situation, "visible_cards", lambda: (H100,))
    monkeypatch.setattr(fixer.bench.subject, "visible_cards", lambda: (H100,))
    monkeypatch.setattr(fixer.bench.kernels, "_layer", lambda subject: partial(fake_layer.layer, LARGE.block_m))
    return made


def bench(machine, capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--sglang-root", str(machine.package), *words, *machine.flags])
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err


def test_rows_against_sglangs_own(machine, capsys, tmp_path):
    artefact = machine.artefact()
    code, out, err = bench(machine, capsys, "--json", "--out", str(tmp_path / "kernel.json"))
    assert code == 0, err
    result = read_result(out)
    assert result.kind is Kind.KERNEL
    assert result.complete
    assert [row.batch for row in result.rows] == [row.batch for row in artefact.rows]
    # SGLang's own is 16x32x64 up to M = E = 8, then 64x64x32: LARGE has its BLOCK_SIZE_M, and so takes the same time.
    assert {row.verdict for row in result.rows} == {Verdict.NEUTRAL}
    assert result.verdict is Verdict.NEUTRAL
    assert all(len(row.round_ratios) == 3 and len(row.sglang_us) == 27 for row in result.rows)
    requests = [line.split() for line in machine.log.read_text().splitlines()]
    rows = [str(row.batch) for row in artefact.rows]
    assert [request[0] for request in requests] == [*rows, *reversed(rows), *rows]
    # The first round has SGLang's own first, the second one the tuned side.
    assert requests[-1][1:] == ["64", "64"]
    by_round = [[request[1:] for request in requests if request[0] == "32"][turn] for turn in range(3)]
    assert by_round == [["64", "16"], ["16", "64"], ["64", "16"]]
    assert (tmp_path / "kernel.json").read_text() == out
    (kept,) = (machine.home / "bench").glob("*-kernel-*.json")
    assert kept.read_text() == out
    (state,) = states(machine.home)
    assert (state.phase.value, state.detail) == ("ended", "")


def test_a_faster_side_and_the_table(machine, capsys, monkeypatch):
    machine.artefact()
    monkeypatch.setattr(fixer.bench.kernels, "_layer", lambda subject: partial(slower_own, 0.9))
    code, out, _ = bench(machine, capsys, "--rounds", "2")
    assert code == 0
    assert "faster with the tuned configuration (+11." in out
    assert out.count(" faster") >= 10
    monkeypatch.setattr(fixer.bench.kernels, "_layer", lambda subject: partial(slower_own, 1.1))
    assert "slower with the tuned configuration (-9." in bench(machine, capsys, "--rounds", "2")[1]


def slower_own(factor: float):
    """A handler for which SMALL and LARGE take that much of the others' time."""

    def handle(request):
        fakes_duel = [
            tuple(
                (20 + request.tokens / 4) * (factor if pair.gate_up in (SMALL, LARGE) else 1) * (1 + turn / 1e5)
                for turn in range(7)
            )
            for pair in (request.own, request.tuned)
        ]
        from fixer.tuning.duel import Duel, Via

        return Duel(request.tokens, Via.LAYER, *fakes_duel)

    return handle


def test_where_sglangs_own_does_not_run(machine, capsys, monkeypatch):
    machine.artefact()
    monkeypatch.setenv(fake_layer.FAULTS, json.dumps({"1": "own", "64": "own"}))
    code, out, err = bench(machine, capsys, "--json")
    assert code == 0, err
    rows = {row.batch: row for row in read_result(out).rows}
    assert {batch for batch, row in rows.items() if row.verdict is Verdict.CURED} == {1, 64}
    assert rows[1].sglang_us == ()
    assert len(rows[1].tuned_us) == 27


@pytest.mark.parametrize(
    ("fault", "words"), [("crash", "crashed at M=16"), ("error", "no luck"), ("tuned", "out of resource")]
)
def test_a_tuned_side_that_does_not_run_is_an_error(machine, capsys, monkeypatch, fault, words):
    machine.artefact()
    monkeypatch.setenv(fake_layer.FAULTS, json.dumps({"16": fault}))
    code, out, err = bench(machine, capsys)
    assert code == 8
    assert words in err
    assert out == ""
    assert states(machine.home)[0].phase.value == "failed"
    assert not fakes.descendants_of_me() - fakes.helpers()


def test_no_artefact_says_what_to_do(machine, capsys):
    code, _, err = bench(machine, capsys)
    assert code == 9
    assert "Run `moefix tune` with the same flags first." in err
    machine.artefact(shared_memory=101376)
    code, out, _ = bench(machine, capsys, "--smem-limit", "101376", "--json", "--rounds", "1")
    assert code == 0
    assert json.loads(out)["smem_limit"] == 101376
    code, _, err = bench(machine, capsys, "--smem-limit", "own", "--smem-limit", "101376")
    assert code == 9


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--loads", "1"), 2),
        (("--quick",), 2),
        (("--smem-limit", "much"), 2),
        (("--smem-limit", "101376", "--smem-limit", "101376"), 2),
        (("--smem-limit", "999999999"), 2),
        (("--rounds", "0"), 2),
        (("--serve", "--loads", "7"), 2),
        (("--serve", "--passes", "0"), 2),
        (("--moefix-nonsense",), 2),
    ],
)
def test_words_that_make_no_sense(machine, capsys, words, code):
    machine.artefact()
    got, out, err = bench(machine, capsys, *words)
    assert (got, out) == (code, "")
    assert err.startswith("moefix: ")


def test_a_dense_model_has_nothing_to_compare(machine, capsys):
    machine.flags = ("--model", str(machine.dense))
    code, _, err = bench(machine, capsys)
    assert code == 5
    assert "nothing to compare" in err


def test_a_tree_that_is_only_read_has_no_layer(tmp_path, trees, driver, models, compiled, monkeypatch, capsys):
    machine = Machine(tmp_path, trees["0.5.17"].package, driver, models, compiled)
    monkeypatch.setenv("MOEFIX_HOME", str(machine.home))
    monkeypatch.setattr(fixer.serve.situation, "visible_cards", lambda: (H100,))
    monkeypatch.setattr(fixer.bench.subject, "visible_cards", lambda: (H100,))
    machine.artefact()
    Path(machine.package, "launch_server.py").unlink()
    code, _, err = bench(machine, capsys)
    assert code == 5
    assert "only there to be read" in err
