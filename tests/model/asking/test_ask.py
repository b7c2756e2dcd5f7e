"""The parent: what it starts, how long it waits, what it keeps, and that a child which fails is no stop.

A program of the test's own stands in for the user's interpreter; SGLang itself is asked in test_releases.py.
"""

import json
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fixer.model.asking import ask as module
from fixer.model.asking.answer import Outcome
from fixer.model.asking.ask import CardFacts, Question, ask, ask_all, question_hash

CARD = CardFacts("NVIDIA L40S", (8, 9), 101376, 46068)
NO_MOE = '{"outcome": "looked", "release": "0.5.17"}'


def interpreter(path: Path, body: str) -> str:
    """A program that is started as the interpreter is; `questions` and `answers` are its descriptors."""
    path.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys, time\nquestions, answers = map(int, sys.argv[-2:])\n"
        f"asked = json.load(os.fdopen(questions))\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def question(folder: Path, body: str = "", **changes: Any) -> Question:
    root, model = folder / "site" / "sglang", folder / "model"
    (root / "srt").mkdir(parents=True, exist_ok=True)
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    values: dict[str, Any] = {"python": interpreter(folder / "python", body), "root": root, "argv": ("--tp", "2")}
    return Question(**{**values, "model": model, "card": CARD, **changes})


def answers(text: str) -> str:
    return f"os.write(answers, {text.encode() + b'%c' % 10!r})"


def test_the_child_gets_the_question_and_sees_no_card(tmp_path: Path) -> None:
    body = (
        "row = {'outcome': 'not_known', 'reason': json.dumps([asked, os.environ['CUDA_VISIBLE_DEVICES']])}\n"
        "os.write(answers, json.dumps(row).encode())"
    )
    (answer,) = ask_all([question(tmp_path, body)])
    asked, visible = json.loads(answer.reason)
    assert visible == ""
    assert asked["root"] == str(tmp_path / "site" / "sglang")
    (one,) = asked["questions"]
    assert one["argv"] == ["--tp", "2"]
    assert one["folder"] == str(tmp_path / "model")
    assert one["card"]["capability"] == [8, 9]


def test_an_answer_is_kept_and_the_next_time_nothing_is_started(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n{answers(NO_MOE)}"
    for _ in range(2):
        answer = ask(question(tmp_path, body), folder=tmp_path / "kept")
        assert (answer.outcome, answer.release) == (Outcome.NO_MOE, "0.5.17")
    assert (tmp_path / "starts").read_text() == "x"
    (kept,) = (tmp_path / "kept").glob("*.json")
    kept.write_text("{")
    assert ask(question(tmp_path, body), folder=tmp_path / "kept").outcome is Outcome.NO_MOE
    assert (tmp_path / "starts").read_text() == "xx"


def test_a_crash_is_not_known_with_the_last_words_and_is_not_kept(tmp_path: Path) -> None:
    body = "print('first'); print('Segmentation fault', flush=True); os.kill(os.getpid(), 11)"
    answer = ask(question(tmp_path, body), folder=tmp_path / "kept")
    assert answer.outcome is Outcome.NOT_KNOWN
    assert answer.reason.endswith("Segmentation fault")
    assert not (tmp_path / "kept").exists()


def test_a_child_that_hangs_is_ended_with_its_own_children(tmp_path: Path) -> None:
    body = f"inner = os.fork()\nif inner:\n    open({str(tmp_path / 'id')!r}, 'w').write(str(inner))\ntime.sleep(60)"
    began = time.monotonic()
    answer = ask(question(tmp_path, body), folder=tmp_path / "kept", seconds=2.0)
    assert time.monotonic() - began < 10
    assert answer.outcome is Outcome.NOT_KNOWN
    assert "within 2 s" in answer.reason
    state = Path(f"/proc/{(tmp_path / 'id').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert not (tmp_path / "kept").exists()


def test_questions_from_several_threads_close_nobody_elses_files(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(24)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda folder: ask_all([question(folder, answers(NO_MOE))]), folders))
    assert [answer.outcome for (answer,) in given] == [Outcome.NO_MOE] * len(folders)


def test_an_interpreter_that_is_not_there_is_not_known(tmp_path: Path) -> None:
    (answer,) = ask_all([question(tmp_path, python=str(tmp_path / "nothing"))])
    assert answer.outcome is Outcome.NOT_KNOWN
    assert "no such program" in answer.reason


def test_what_some_questions_got_counts_when_the_child_ends_early(tmp_path: Path) -> None:
    given = ask_all([question(tmp_path, answers(NO_MOE))] * 3)
    assert [answer.outcome for answer in given] == [Outcome.NO_MOE, Outcome.NOT_KNOWN, Outcome.NOT_KNOWN]


def test_an_answer_holds_for_one_question_only(tmp_path: Path) -> None:
    same = question(tmp_path)
    hashes = [question_hash(same), question_hash(question(tmp_path, argv=("--tp", "4")))]
    hashes.append(question_hash(question(tmp_path, card=CardFacts("NVIDIA L40", (8, 9), 101376, 46068))))
    hashes.append(question_hash(question(tmp_path, environment={"SGLANG_SHARED_EXPERT_TP1": "1"})))
    (same.root / "srt" / "server_args.py").write_text("x = 1\n")
    hashes.append(question_hash(same))
    (same.root.parent / "transformers-5.12.1.dist-info").mkdir()
    hashes.append(question_hash(same))
    (same.model / "config.json").write_text('{"model_type": "qwen3_moe"}')
    hashes.append(question_hash(same))
    (same.model / "hf_quant_config.json").write_text("{}")
    hashes.append(question_hash(same))
    assert len(set(hashes)) == len(hashes)
    assert question_hash(same) == hashes[-1]


def test_a_newer_moefix_asks_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = question_hash(question(tmp_path))
    monkeypatch.setattr(module, "PROTOCOL", module.PROTOCOL + 1)
    assert question_hash(question(tmp_path)) != before
