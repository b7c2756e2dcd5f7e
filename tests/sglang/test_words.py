from __future__ import annotations

import os

import pytest

from fixer.base.errors import UsageError
from fixer.sglang.words import server_words, starts_sglang

HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
    "words",
    [
        ["sglang", "serve", "a/b", "--tp", "2"],
        ["/opt/bin/sglang", "serve", "--model-path", "a/b", "--tp", "2"],
        ["python", "-m", "sglang.launch_server", "--model-path", "a/b", "--tp", "2"],
        ["/usr/bin/python3.11", "-u", "-m", "sglang.launch_server", "a/b", "--tp", "2"],
        ["a/b", "--tp", "2"],
        ["--model-path", "a/b", "--tp", "2"],
        ["sglang", "serve", "a/b", "--model-type", "llm", "--tp", "2"],
        ["a/b", "--model-type=auto", "--tp", "2"],
    ],
)
def test_every_form_means_the_same(words: list[str]) -> None:
    assert server_words(words) == ("--model-path", "a/b", "--tp", "2")
    assert server_words(server_words(words)) == server_words(words)


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["--model=~/m"], (f"--model={HOME}/m",)),
        (["--model-path=~/m"], (f"--model-path={HOME}/m",)),
        (["--model", "~/m"], ("--model", f"{HOME}/m")),
        (["~/m", "--tp", "2"], ("--model-path", f"{HOME}/m", "--tp", "2")),
        (["--download-dir=~/m"], ("--download-dir=~/m",)),
        (["--model=a~b"], ("--model=a~b",)),
    ],
)
def test_a_home_folder_in_the_model(words: list[str], expanded: tuple[str, ...]) -> None:
    assert server_words(words) == expanded


@pytest.mark.parametrize("words", [[], ["--tp", "2"], ["", "--tp"], ["--tp", "2", "a/b"], ["--", "a"]])
def test_all_else_stays(words: list[str]) -> None:
    assert server_words(words) == tuple(words)


@pytest.mark.parametrize(
    "words",
    [
        ["python", "train.py"],
        ["python", "-m"],
        ["python3", "-m", "sglang.bench_serving"],
        ["sglang", "generate"],
        ["sglang"],
        ["m", "--model-type", "diffusion"],
        ["m", "--model-type"],
    ],
)
def test_another_program_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        server_words(words)
    assert caught.value.hint


def test_what_begins_a_command_line_of_sglang() -> None:
    words = ["python", "python3", "/venv/bin/python3.12", "sglang", "/bin/sglang", "pythonic", "serve", "a/b", ""]
    assert list(filter(starts_sglang, words)) == words[:5]
