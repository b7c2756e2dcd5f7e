"""The verdict on what SGLang's log says of MoE files."""

import json

import pytest

from fixer.serve.log.verdict import SETTLING_SECONDS, Expected, Outcome, Watch, down_name, up_name
from fixer.serve.possible_names import Limits
from fixer.sglang.log_lines import Said, read_line
from tests.support.log_lines import DOWN, EXPECTED, FOLDER, OTHER, OTHER_DOWN, READY, STAMP, UP, line_of, missing, using

ARGUMENTS = STAMP + "server_args=ServerArgs(moe_runner_backend='{}', moe_a2a_backend='none')"


def verdicts(expected, *lines, end=False):
    """All verdicts of a log whose lines come quickly; then a pause."""
    watch, now, given = Watch(expected), 100.0, []

    def ask():
        while (verdict := watch.news(now)) is not None:
            given.append(verdict)

    ask()
    for text in lines:
        line = read_line(text)
        assert line is not None, text
        watch.see(line, now)
        ask()
        now += 0.1
    now += 10
    ask()
    if end:
        watch.end()
        ask()
    return given


def only(*given):
    (verdict,) = verdicts(*given)
    return verdict


def test_both_files_picked_up():
    verdict = only(EXPECTED, using(UP), using(DOWN), READY)
    assert verdict.outcome is Outcome.TAKEN
    assert UP in verdict.text
    assert DOWN in verdict.text
    assert verdict.asked is None


def test_ranks_repeat_themselves():
    lines = [using(UP), using(UP), using(DOWN), using(DOWN), using(UP), READY]
    assert only(EXPECTED, *lines).outcome is Outcome.TAKEN


def test_the_other_half_may_come_late():
    watch = Watch(EXPECTED)
    watch.see(read_line(using(UP)), 100.0)
    assert watch.news(110.0).outcome is Outcome.PARTLY
    watch.see(read_line(using(DOWN)), 120.0)
    assert watch.news(120.0).outcome is Outcome.TAKEN


def test_half_a_pair_waits_for_the_other_half():
    watch = Watch(EXPECTED)
    watch.see(read_line(using(UP)), 100.0)
    assert watch.news(100.1) is None
    assert watch.wakes_at == 100.0 + SETTLING_SECONDS
    watch.see(read_line(using(DOWN)), 100.2)
    assert watch.news(100.3).outcome is Outcome.TAKEN
    assert watch.wakes_at is None
    assert watch.news(999) is None


def test_one_joint_file_for_releases_that_read_one():
    expected = Expected(pairs=((f"{FOLDER}/{UP}", ""),), names=((UP, ""),), reads_down=False)
    verdict = only(expected, using(UP))
    assert verdict.outcome is Outcome.TAKEN
    assert verdict.text == f"SGLang picked up the file: {UP}"


def test_an_overlay_behind_a_link_is_the_same_place(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    pair = (str(tmp_path / "link" / UP), str(tmp_path / "link" / DOWN))
    lines = [using(UP, str(tmp_path / "real")), using(DOWN, str(tmp_path / "real"))]
    assert verdicts(Expected(pairs=(pair,)), *lines)[-1].outcome is Outcome.TAKEN


@pytest.mark.parametrize(
    ("lines", "fate"),
    [
        ([missing(OTHER), missing(OTHER_DOWN)], "found no"),
        ([using(OTHER), using(OTHER_DOWN)], "read /s/"),
        ([line_of(Said.FALLBACK, f"{FOLDER}/{OTHER}", f"/s/configs/triton_3_5_1/{OTHER}")], "fell back to"),
    ],
)
def test_another_file_asked_for(lines, fate):
    verdict = only(EXPECTED, lines[0])
    assert verdict.outcome is Outcome.OTHER_FILE
    assert verdict.asked == (OTHER, OTHER_DOWN)
    assert f"asked for another file: {OTHER}, not for {UP}" in verdict.text
    assert fate in verdict.text
    assert "the next start tunes exactly that" in verdict.text
    assert [each.outcome for each in verdicts(EXPECTED, *lines, READY)] == [Outcome.OTHER_FILE]


def test_a_file_asked_for_though_none_was_expected():
    expected = Expected(asks=False, reason="--moe-runner-backend marlin runs the experts", kernel="marlin")
    verdict = only(expected, missing(OTHER))
    assert verdict.outcome is Outcome.OTHER_FILE
    assert verdict.asked == (OTHER, OTHER_DOWN)
    assert "although --moe-runner-backend marlin runs the experts" in verdict.text


def test_a_name_on_record_that_cannot_be_tuned_is_not_promised_again():
    expected = Expected(names=((OTHER, OTHER_DOWN),), asks=False, reason="moefix cannot tune that format")
    verdict = only(expected, missing(OTHER))
    assert verdict.outcome is Outcome.NOT_INSTALLED
    assert verdict.asked is None


def test_nothing_installed_and_sglangs_own_taken():
    expected = Expected(names=((UP, DOWN),))
    assert only(expected, missing(UP)).outcome is Outcome.NOT_INSTALLED
    assert f"read {FOLDER}/{UP}" in only(expected, using(UP)).text


def test_the_down_file_alone_is_missing():
    reused = line_of(Said.REUSED_UP, f"{FOLDER}/{DOWN}")
    given = verdicts(EXPECTED, using(UP), reused)
    assert given[-1].outcome is Outcome.PARTLY
    assert f"picked up {UP}, but not {DOWN}" in given[-1].text


def test_another_tritons_folder():
    fallback = line_of(Said.FALLBACK, f"/s/configs/triton_3_5_1/{UP}", f"{FOLDER}/{UP}")
    verdict = only(EXPECTED, fallback)
    assert verdict.outcome is Outcome.OTHER_FOLDER
    assert "triton_3_5_1" in verdict.text
    assert verdict.asked is None
    assert only(EXPECTED, using(UP, "/elsewhere")).outcome is Outcome.OTHER_FOLDER


@pytest.mark.parametrize("runner", ["triton_kernel", "flashinfer_trtllm", "marlin"])
def test_never_looked_up_says_what_ran(runner):
    verdict = only(EXPECTED, ARGUMENTS.format(runner), READY)
    assert verdict.outcome is Outcome.NEVER
    assert f"moe_runner_backend={runner} runs its experts" in verdict.text


def test_never_looked_up_for_other_reasons():
    deterministic = only(EXPECTED, line_of(Said.DETERMINISTIC), READY)
    assert deterministic.outcome is Outcome.NEVER
    assert "deterministic inference" in deterministic.text
    a2a = STAMP + "server_args=ServerArgs(moe_runner_backend='auto', moe_a2a_backend='deepep')"
    assert "moe_a2a_backend=deepep" in only(EXPECTED, a2a, READY).text
    method = STAMP + "Using CompressedTensorsWNA16MarlinMoEMethod"
    assert "CompressedTensorsWNA16MarlinMoEMethod runs" in only(EXPECTED, ARGUMENTS.format("auto"), method, READY).text
    unknown = only(EXPECTED, ARGUMENTS.format("auto"), READY)
    assert "moefix had worked out: SGLang looks" in unknown.text


def test_a_dense_model_looks_nothing_up_as_expected():
    verdict = only(Expected(asks=False, reason="the model is dense", kernel="none"), READY)
    assert verdict.outcome is Outcome.AS_EXPECTED
    assert "the model is dense" in verdict.text


def test_without_graphs_and_warm_up_the_first_request_decides():
    lazy = Expected(pairs=EXPECTED.pairs, names=EXPECTED.names, lazy=True)
    served = 'INFO: 1 - "POST /generate HTTP/1.1" 200 OK'
    outcomes = [verdict.outcome for verdict in verdicts(lazy, READY, using(UP), using(DOWN), served)]
    assert outcomes[0] is Outcome.NOT_YET
    assert outcomes[-1] is Outcome.TAKEN
    assert [verdict.outcome for verdict in verdicts(lazy, READY, served)] == [Outcome.NOT_YET, Outcome.NEVER]


def test_a_quiet_log_cannot_be_read():
    quiet = Expected(pairs=EXPECTED.pairs, names=EXPECTED.names, log_level="warning")
    unseen, other = verdicts(quiet, missing(OTHER))
    assert (unseen.outcome, other.outcome) == (Outcome.UNSEEN, Outcome.OTHER_FILE)
    assert "--log-level warning" in unseen.text
    (error,) = verdicts(Expected(log_level="error"))
    assert "would say" not in error.text


def test_a_server_that_ends_early():
    assert only_at_end(EXPECTED) is Outcome.ENDED
    assert verdicts(Expected(asks=False), end=True) == []


def only_at_end(expected):
    (verdict,) = verdicts(expected, end=True)
    return verdict.outcome


def test_later_files_of_another_shape_are_told_once():
    given = verdicts(EXPECTED, using(DOWN), using(UP), missing(OTHER), missing(OTHER_DOWN), missing(OTHER))
    assert "also asked for" in given[-1].text
    assert OTHER in given[-1].text
    assert len([verdict for verdict in given if "also" in verdict.text]) == 1
    assert given[-1].asked is None


def test_names_of_a_pair():
    assert down_name(UP) == DOWN
    assert up_name(DOWN) == up_name(UP) == UP


def test_the_expectation_survives_the_command_line():
    full = Expected(EXPECTED.pairs, EXPECTED.names, limits=Limits(("/a",), 1, 7), wordings=(("USING", "Using %s."),))
    for expected in (EXPECTED, full):
        assert Expected.from_json(json.loads(json.dumps(expected.to_json()))) == expected


MARLIN = "E=384,N=14336,device_name=X.json"


def test_a_name_that_marlin_asked_for_is_not_kept():
    expected = Expected(asks=False, reason="4-bit experts run in the Marlin kernel", kernel="marlin")
    verdict = only(expected, missing(MARLIN))
    assert verdict.asked is None
    assert "names E=384,N=14336,device_name=X.json, which is not kept and not tuned" in verdict.text
    assert "Marlin kernel looks for" in verdict.text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("E=8,N=9000,device_name=X.json", "at most 4096 wide"),
        ("E=900,N=64,device_name=X.json", "at most 72 experts"),
        ("package.json", "no name of a MoE file"),
    ],
)
def test_a_name_that_is_not_this_models_is_not_kept(name, why):
    limits = Limits(experts=72, width=4096)
    verdict = only(Expected(asks=False, reason="another kernel", limits=limits), missing(name))
    assert verdict.asked is None
    assert why in verdict.text
    # Where SGLang looks for files itself, such a line is passed over.
    expected = Expected(pairs=EXPECTED.pairs, names=EXPECTED.names, limits=limits)
    assert only(expected, missing(name), using(UP), using(DOWN)).outcome is Outcome.TAKEN
    assert only(expected, missing(name), READY).outcome is Outcome.NEVER
    assert len(verdicts(expected, using(UP), using(DOWN), missing(name))) == 1


def test_a_strange_name_counts_only_in_a_folder_where_sglang_looks(tmp_path):
    (tmp_path / "configs" / "triton_3_6_0").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "configs")
    expected = Expected(names=((UP, DOWN),), limits=Limits((str(tmp_path / "configs"),)))
    elsewhere = str(tmp_path / "configs" / ".." / "elsewhere")
    assert only(expected, missing(OTHER), READY).outcome is Outcome.NEVER
    assert only(expected, line_of(Said.DEFAULT, f"{elsewhere}/{OTHER}"), READY).outcome is Outcome.NEVER
    inside = line_of(Said.DEFAULT, f"{tmp_path}/link/triton_3_6_0/{OTHER}")
    assert only(expected, inside, READY).asked == (OTHER, OTHER_DOWN)


def test_the_down_file_alone_is_missing_in_the_releases_between():
    lines = [using(UP), line_of(Said.NO_DOWN, f"{FOLDER}/{DOWN}") + " you can"]
    assert f"not {DOWN}: it found no {FOLDER}/{DOWN}" in verdicts(EXPECTED, *lines)[-1].text


@pytest.mark.parametrize("lines", [[READY], [using(UP), READY], []])
def test_what_was_not_read_is_no_ground_for_a_verdict(lines):
    watch = Watch(EXPECTED)
    watch.lose()
    for text in lines:
        watch.see(read_line(text), 100.0)
    watch.end()
    verdict = watch.news(200.0)
    assert verdict.outcome is Outcome.UNSEEN
    assert "came faster than moefix reads" in verdict.text


def test_with_a_form_of_the_users_own_the_log_may_say_nothing():
    expected = Expected(pairs=EXPECTED.pairs, names=EXPECTED.names, own_form=True)
    assert "SGLANG_LOGGING_CONFIG_PATH" in only(expected).text
    assert (
        verdicts(expected, using(UP), using(DOWN), READY)[-1].outcome is Outcome.TAKEN
    )  # it may be SGLang's after all


def test_lines_of_the_dense_kernel_change_nothing():
    dense = [line_of(Said.DENSE_USING, "/a/N=1,K=2.json"), line_of(Said.DENSE_DEFAULT, "/a/N=1,K=2.json")]
    assert only(EXPECTED, *dense, READY).outcome is Outcome.NEVER
