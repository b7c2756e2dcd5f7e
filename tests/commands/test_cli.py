"""The command line as a user has it: separate processes, their output, their exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import fixer.cli
import fixer.machine.cards
from fixer.base.errors import HubError
from fixer.cli import INTERRUPTED, MoefixGroup, main
from fixer.machine.cards import find_card
from fixer.machine.driver import load
from fixer.sglang.tree import Tree

REPOSITORY = Path(__file__).resolve().parents[2]
BLOG_POST = "q3_30b_fp8dyn_tp1_l40s"
COLD_SECONDS, WARM_SECONDS, LOOKUP_SECONDS = 40.0, 5.0, 3.0
"""Generous: the cores of a test machine are shared. The product's own limits are 20 s, 3 s and 1 s."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(moefix_home: Path, trees: dict[str, Tree], tmp_path: Path) -> Run:
    """Run moefix in a process of its own, without a network and without a GPU."""
    environment = {**os.environ, "MOEFIX_HOME": str(moefix_home), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name in ("SGLANG_MOE_CONFIG_DIR", "HF_TOKEN", "FORCE_COLOR", "COLUMNS"):
        environment.pop(name, None)

    def start(*arguments: str, closing: str = "", **changes: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(REPOSITORY / "entrypoint.py"), *arguments]
        if closing:
            command = ["sh", "-c", f'exec "$@" {closing}', "sh", *command]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, env={**environment, **changes}
        )

    return start


def told(result: "subprocess.CompletedProcess[str]", code: int) -> str:
    """What a foreseeable fault looks like: one line, perhaps a hint, the documented code, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert 1 <= len(lines) <= 2, result.stderr
    assert lines[0].startswith("moefix: ")
    assert all(line.startswith("  ") for line in lines[1:])
    assert result.stdout == ""
    return lines[0]


# --- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_whose_compiler_crashes_says_so_and_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, trees: dict[str, Tree], models: dict[str, Path], tmp_path: Path
) -> None:
    from fixer.kernel.compile import Compiled, CompileOutcome

    def crashing(*_: object) -> Callable[..., object]:
        return lambda candidates: {each: Compiled(CompileOutcome.CRASHED, message="it died") for each in candidates}

    monkeypatch.setattr("fixer.kernel.fit.compiler_for", crashing)
    root = str(trees["0.5.17"].package)
    words = ["plan", "--gpu", "RTX 4090", "--model", str(models[BLOG_POST]), "--sglang-root", root, "--json"]
    result = CliRunner().invoke(main, [*words, "--home", str(tmp_path)])
    assert result.exit_code == 7
    assert json.loads(result.stdout)["verdict"] == "compiler_crashed"
    assert "whether SGLang's own configuration fits is not known: crashed: it died" in result.stderr


@pytest.mark.parametrize(
    ("flags", "said"), [((), "does not fit; --tp 2 does"), (("--tp", "2"), ""), (("--cpu-offload-gb", "20"), "")]
)
def test_weights_that_are_too_large_for_the_card(
    run: Run, models: dict[str, Path], tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models[BLOG_POST], model)
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(31 * 10**9)
    result = run("plan", "--model", str(model), "--gpu", "RTX 4090", *flags, "--json", "--sglang", "0.5.17")
    assert result.returncode == 0, result.stderr
    notes = [note for note in json.loads(result.stdout)["notes"] if "of weights" in note]
    assert [said in note for note in notes] == ([True] if said else [])


@pytest.mark.parametrize(
    ("release", "verdict"), [("0.4.9", "out_of_resources"), ("0.5.17", "fits"), ("0.5.23", "fits")]
)
def test_the_blog_posts_command(run: Run, models: dict[str, Path], release: str, verdict: str) -> None:
    result = run("plan", "--sglang", release, "--gpu", "RTX 4090", "--model", str(models[BLOG_POST]), "--json")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["verdict"] == verdict
    assert shown["sglang"]["version"] == release
    most = max(row[which]["shared_bytes"] for row in shown["rows"] for which in ("gate_up", "down"))
    assert most == (147456 if release == "0.4.9" else 73728)


def test_cold_and_warm(run: Run, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an empty data folder, the fetching of SGLang's wheel included; then once more."""
    command = ("plan", "--gpu", "RTX 4090", "--model", str(models[BLOG_POST]), "--home", str(tmp_path / "new"))
    took = []
    outputs = []
    for _ in range(2):
        started = time.monotonic()
        result = run(*command)
        took.append(time.monotonic() - started)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    with capsys.disabled():
        print(f"\n[plan: cold {took[0]:.1f} s, warm {took[1]:.2f} s] ", end="")
    assert outputs[0] == outputs[1]
    assert took[0] < COLD_SECONDS
    assert took[1] < WARM_SECONDS


def test_text(run: Run, models: dict[str, Path]) -> None:
    result = run("plan", "--sglang", "0.4.9", "--gpu", "4090", f"--model-path={models[BLOG_POST]}")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert "\x1b" not in text
    assert text.isascii()
    assert "NVIDIA GeForce RTX 4090, compute capability 8.9, 101376 bytes" in text
    assert "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8.json" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("256 "))
    assert row[1:3] == ["147456", "NO"]
    assert "out_of_resources: at M = 256, 512, 1024, 1536, 2048, 3072, 4096 SGLang's own needs 147456 bytes" in text


def test_brackets_in_names_are_shown(run: Run, models: dict[str, Path]) -> None:
    result = run("plan", "--lookup-only", "--gpu", "4090", "--model", str(models["q3_30b_fp8block_tp2_4090"]), "--tp=2")
    assert "block_shape=[128, 128].json" in result.stdout, result.stderr


def test_lookup_only_is_quick(run: Run, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    result = run("plan", "--lookup-only", "--gpu", "RTX 4090", "--model", str(models[BLOG_POST]), "--json")
    took = time.monotonic() - started
    shown = json.loads(result.stdout)
    assert shown["verdict"] == "not_applicable"
    assert shown["rows"][0]["gate_up"] == {
        "config": {
            "BLOCK_SIZE_M": 32,
            "BLOCK_SIZE_N": 64,
            "BLOCK_SIZE_K": 256,
            "GROUP_SIZE_M": 1,
            "num_warps": 4,
            "num_stages": 4,
        },
        "shared_bytes": None,
        "fits": None,
    }
    with capsys.disabled():
        print(f"\n[lookup-only: {took:.2f} s] ", end="")
    assert took < LOOKUP_SECONDS


def test_sglangs_flags_pass_through(run: Run, models: dict[str, Path]) -> None:
    flags = ["--tp", "4", "--chunked-prefill-size", "-1", "--host", "0.0.0.0", "--json-model-override-args"]
    flags += ['{"num_experts": 64}', "--enable-metrics", "--mem-fraction-static=0.8", "--ep", "2"]
    result = run("plan", *flags, "--lookup-only", "--gpu", "H100", "--model", str(models[BLOG_POST]), "--json")
    assert result.returncode == 0, result.stderr
    workload = json.loads(result.stdout)["workload"]
    assert (workload["E"], workload["N"], workload["tp_size"], workload["ep_size"]) == (32, 384, 4, 2)


def test_several_cards_are_an_array(run: Run, models: dict[str, Path]) -> None:
    command = ["plan", "--lookup-only", "--model", str(models[BLOG_POST]), "--gpu", "H100", "--gpu", "4090"]
    result = run(*command, "--gpu", "h100", "--json")
    names = [one["gpu"]["name"] for one in json.loads(result.stdout)]
    assert names == ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"]
    assert run(*command).stdout.count("verdict") == 2


def test_visible_cards_are_planned_by_kind(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], moefix_home: Path, trees: dict[str, Tree]
) -> None:
    cards = (find_card("H100"), find_card("H100"), find_card("RTX 4090"))
    monkeypatch.setattr("fixer.machine.driver.visible_cards", lambda: cards)
    arguments = ["plan", "--lookup-only", "--json", "--home", str(moefix_home), "--model", str(models[BLOG_POST])]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert [one["gpu"]["compute_capability"] for one in json.loads(result.stdout)] == ["9.0", "8.9"]


def test_a_lower_limit(run: Run, models: dict[str, Path]) -> None:
    command = ["plan", "--gpu", "H100", "--model", str(models[BLOG_POST]), "--sglang", "0.5.17", "--json"]
    shown = json.loads(run(*command, "--lookup-only", "--smem-limit", "101376").stdout)
    assert shown["gpu"]["shared_memory_per_block_optin"] == 101376


def test_write(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    command = ["plan", "--gpu", "4090", "--model", str(models[BLOG_POST]), "--write", str(folder)]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 3
    wrote = [line.removeprefix("wrote ") for line in result.stdout.splitlines() if line.startswith("wrote ")]
    assert sorted(wrote) == [str(folder / name) for name in names]
    with_json = run(*command, "--json")
    assert json.loads(with_json.stdout)["verdict"] == "fits"
    assert with_json.stderr.count("wrote ") == 3
    dense = run("plan", "--gpu", "4090", "--model", str(models["qwen3_8b_bf16_4090"]), "--write", str(folder))
    assert dense.returncode == 2
    assert "no file to write" in dense.stderr


def test_a_data_folder_that_cannot_be_written(run: Run, models: dict[str, Path], tmp_path: Path, trees: Any) -> None:
    (tmp_path / "file").write_text("")
    root = str(trees["0.5.17"].package)
    command = ["plan", "--gpu", "4090", "--model", str(models[BLOG_POST]), "--sglang-root", root, "--lookup-only"]
    told(run(*command, "--home", str(tmp_path / "file")), 9)
    passing = run(*command, "--json", MOEFIX_HOME=str(tmp_path / "file" / "inside"))
    assert passing.returncode == 0
    assert json.loads(passing.stdout)["outcome"] == "asks"
    assert "nothing is kept" in passing.stderr


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"architectures": ["Qwen3Moe', "not JSON"), ("[]", "no JSON object"), ("{}", "architecture")],
)
def test_a_bad_config(run: Run, tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert reason in told(run("plan", "--gpu", "4090", "--model", str(tmp_path)), 3)


def test_no_config(run: Run, tmp_path: Path) -> None:
    assert "no config.json" in told(run("plan", "--gpu", "4090", "--model", str(tmp_path)), 3)


def test_a_text_file_as_a_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file" in told(run("plan", "--gpu", "4090", "--model", str(tmp_path / "notes.txt")), 3)


@pytest.mark.parametrize("field", ["num_experts", "moe_intermediate_size", "hidden_size", "num_experts_per_tok"])
def test_negative_sizes(run: Run, cases: Any, tmp_path: Path, field: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**cases[BLOG_POST]["config"], field: -8}))
    assert field in told(run("plan", "--gpu", "4090", "--model", str(tmp_path)), 3)


def test_a_model_that_cannot_be_split(run: Run, models: dict[str, Path]) -> None:
    arguments = ["plan", "--gpu", "4090", "--lookup-only", "--model", str(models[BLOG_POST]), "--tp", "7"]
    assert "cannot be split over 7 ranks" in told(run(*arguments), 2)
    result = run(*arguments, "--json")
    assert result.returncode == 2
    assert json.loads(result.stdout)["outcome"] == "load_error"


FAULTS = [
    (["--gpu", "RTX 9999"], 4, "RTX 9999"),
    (["--gpu", "4090", "--ep", "3", "--tp", "4"], 2, "--ep-size 3"),
    (["--gpu", "4090", "--tp", "-2"], 2, "--tp"),
    (["--gpu", "4090", "--tp"], 2, "--tp-size needs a value"),
    (["--gpu", "4090", "--smem-limit", "ninety"], 2, "ninety"),
    (["--gpu", "4090", "--smem-limit", "-5"], 2, "-5 bytes"),
    (["--gpu", "4090", "--smem-limit", "999999"], 2, "999999"),
    (["--gpu", "4090", "--sglang", "0.1.2"], 5, "0.1.2"),
    (["--gpu", "4090", "--sglang-root", "/nowhere"], 5, "/nowhere"),
    (["--gpu", "4090", "--sglang-root", "/nowhere", "--sglang", "0.5.17"], 2, "exclude"),
    (["--gpu", "4090", "--write", "x", "--lookup-only"], 2, "--write"),
]


@pytest.mark.parametrize(("arguments", "code", "named"), FAULTS)
def test_faults(run: Run, models: dict[str, Path], arguments: list[str], code: int, named: str) -> None:
    assert named in told(run("plan", "--model", str(models[BLOG_POST]), *arguments), code)


@pytest.mark.parametrize(
    ("words", "said", "meant"),
    [
        (["--tpp", "2"], "SGLang has no flag '--tpp'", "--tp-size"),
        (["--gpus", "4090"], "there is no option '--gpus'", "--gpu?"),
        (["--modle", "x"], "SGLang has no flag '--modle'", "--model?"),
        (["--lookup"], "there is no option '--lookup'", "--lookup-only"),
        (["--tp", "2", "Qwen/X"], "'Qwen/X' belongs to no flag", "--model"),
        (["--quantization", "fp88"], "'fp88', which this SGLang does not take", "Did you mean fp8?"),
    ],
)
def test_the_wrong_word_is_named_before_anything_is_fetched(
    run: Run, models: dict[str, Path], words: list[str], said: str, meant: str
) -> None:
    for model in (str(models[BLOG_POST]), "nobody/nothing-of-that-name"):
        result = run("plan", "--model", model, *words)
        assert said in told(result, 2)
        assert meant in result.stderr.splitlines()[1]


def test_a_model_by_position_and_from_the_home_folder(run: Run, models: dict[str, Path]) -> None:
    folder = models[BLOG_POST]
    words = ["--gpu", "4090", "--lookup-only", "--json"]
    home = {"HOME": str(folder.parent)}
    plans = [
        run("plan", f"--model={folder}", *words),
        run("plan", str(folder), *words),
        run("plan", f"--model=~/{folder.name}", *words, **home),
        run("plan", f"~/{folder.name}", *words, **home),
    ]
    assert [plan.returncode for plan in plans] == [0, 0, 0, 0]
    assert {plan.stdout for plan in plans} == {plans[0].stdout}


def test_no_model(run: Run) -> None:
    assert "no model" in told(run("plan", "--gpu", "4090"), 2)


def test_a_hub_that_is_out_of_reach(run: Run) -> None:
    told(run("plan", "--gpu", "4090", "--model", "nobody/nothing-of-that-name"), HubError.exit_code)


@pytest.mark.skipif(bool(load("libcuda.so.1")), reason="there is a driver here")
def test_no_card(run: Run, models: dict[str, Path]) -> None:
    result = run("plan", "--model", str(models[BLOG_POST]))
    assert "no NVIDIA card" in told(result, 4)
    assert "--gpu" in result.stderr


# --- commands --------------------------------------------------------------------------------------------------------


def test_no_arguments_show_three_examples(run: Run) -> None:
    result = run()
    assert (result.returncode, result.stderr) == (0, "")
    assert sum(line.startswith("  moefix ") for line in result.stdout.splitlines()) == 3


def test_help_and_version(run: Run) -> None:
    assert "plan" in run("--help").stdout
    assert "--lookup-only" in run("plan", "--help").stdout
    assert run("--version").stdout == f"moefix {fixer.__version__}\n"


def test_a_word_that_is_no_command(run: Run) -> None:
    result = run("plam", "--gpu", "4090")
    assert "no command 'plam'" in told(result, 2)
    assert "Commands: plan" in result.stderr


class OwnGroup(MoefixGroup):
    """The group with the commands that a test registers, in place of moefix's."""

    list_commands = click.Group.list_commands
    get_command = click.Group.get_command


def routed(*arguments: str) -> tuple[str, list[str]]:
    """Which command gets which words, in a group with a default command of its own."""
    seen: list[tuple[str, list[str]]] = []

    @click.group(cls=OwnGroup)
    def group() -> None:
        pass

    @group.command("serve", context_settings={**fixer.commands.common.PASS_THROUGH, "help_option_names": []})
    @click.argument("argv", nargs=-1, type=click.UNPROCESSED)
    def serve(argv: tuple[str, ...]) -> None:
        seen.append(("serve", list(argv)))

    @group.command("tune", context_settings=fixer.commands.common.PASS_THROUGH)
    @click.argument("argv", nargs=-1, type=click.UNPROCESSED)
    def tune(argv: tuple[str, ...]) -> None:
        seen.append(("tune", list(argv)))

    result = CliRunner().invoke(group, list(arguments))
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--model", "x", "--tp", "2"], "serve"),
        (["--port=1", "tune"], "serve"),
        (["serve", "--model", "x"], "serve"),
        (["tune", "--model", "x"], "tune"),
    ],
)
def test_options_first_mean_the_default_command(arguments: list[str], command: str) -> None:
    words = arguments[1:] if arguments[0] == command else arguments
    assert routed(*arguments) == (command, words)


def failing(fault: BaseException) -> click.Group:
    @click.group(cls=OwnGroup)
    def group() -> None:
        pass

    @group.command()
    def fail() -> None:
        raise fault

    return group


def test_an_interrupt_exits_with_130() -> None:
    assert CliRunner().invoke(failing(KeyboardInterrupt()), ["fail"]).exit_code == INTERRUPTED == 130


def test_a_fault_of_several_lines_is_one_line() -> None:
    result = CliRunner().invoke(failing(HubError("first\nsecond", "do\nthis")), ["fail"])
    assert (result.exit_code, result.stderr) == (6, "moefix: first second\n  do this\n")


def test_a_full_disk_is_no_traceback() -> None:
    result = CliRunner().invoke(failing(OSError(28, "No space left on device", "/x")), ["fail"])
    assert (result.exit_code, result.stderr) == (1, "moefix: /x: No space left on device\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        [],
        ["status"],
        ["status", "--json"],
        ["doctor"],
        ["doctor", "--json"],
        ["plan", "--gpu", "H100", "--lookup-only"],
        ["plan", "--gpu", "H100", "--lookup-only", "--json"],
    ],
    ids=" ".join,
)
def test_closed_output_is_no_traceback(run: Run, models: dict[str, Path], arguments: list[str], tmp_path: Path) -> None:
    if arguments[:1] == ["plan"]:
        arguments = [*arguments, "--sglang", "0.5.17", "--model", str(models[BLOG_POST])]
    home = {"MOEFIX_HOME": str(tmp_path)} if arguments[:1] == ["status"] else {}
    open_, closed = run(*arguments, **home), run(*arguments, closing=">&-", **home)
    assert "Traceback" not in closed.stderr
    assert "Error" not in closed.stderr
    assert closed.stdout == ""
    assert closed.returncode == open_.returncode
    all_closed = run(*arguments, closing="<&- >&- 2>&-", **home)
    assert all_closed.returncode == open_.returncode
    assert all_closed.stdout + all_closed.stderr == ""


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ""])
def test_no_file_lands_on_a_closed_streams_number(tmp_path: Path, closing: str) -> None:
    told_in = tmp_path / "told"
    script = f"""
import os, sys, json
from fixer.cli import main
try:
    main(["--version"])
except SystemExit:
    pass
with open({str(told_in)!r}, "w") as opened:
    print("nowhere", file=sys.stdout, flush=True)
    print("nowhere", file=sys.stderr, flush=True)
    json.dump([opened.fileno(), [os.get_inheritable(n) for n in range(3)], sys.stdin is None], opened)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", script]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)
    number, inheritable, is_none = json.loads(told_in.read_text())
    assert number > 2
    assert inheritable == [True] * 3
    assert not is_none


def test_a_reader_that_goes_away(run: Run, models: dict[str, Path], moefix_home: Path) -> None:
    command = [sys.executable, "entrypoint.py", "plan", "--lookup-only", "--gpu", "4090", "--json"]
    process = subprocess.Popen(
        [*command, "--model", str(models[BLOG_POST]), "--home", str(moefix_home)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 1
    process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_compiling(
    models: dict[str, Path], tmp_path: Path, trees: dict[str, Tree], number: int, code: int
) -> None:
    command = [sys.executable, "entrypoint.py", "plan", "--gpu", "4090", "--home", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--model", str(models[BLOG_POST]), "--sglang-root", str(trees["0.5.17"].package)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    waited = time.monotonic()
    while not (tmp_path / "compiled.sqlite").exists() and time.monotonic() - waited < 20:
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(number)
    stopped = time.monotonic()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert time.monotonic() - stopped < 10
