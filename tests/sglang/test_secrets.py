from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixer.sglang.declared import Declared, declared_of
from fixer.sglang.parser import Given
from fixer.sglang.secrets import is_secret, plain_flags, secret_flags
from fixer.sglang.tree import Tree

SECRETS = [
    (["--api-key", "HUSH"], "--api-key"),
    (["--api-key=HUSH"], "--api-key"),
    (["--ap", "HUSH"], "--api-key"),
    (["--ad=HUSH"], "--admin-api-key"),
    (["--ssl-keyfile-p", "HUSH"], "--ssl-keyfile-password"),
    (
        ["--hicache-storage-backend-extra-config", '{"a": [{"secret_access_key": "HUSH"}]}'],
        "--hicache-storage-backend-",
    ),
    (["--model-loader-extra-config", '{"apiKey": "HUSH"}'], "--model-loader-extra-config"),
    (["--sidecar-args", '["--hub-token=HUSH"]'], "--sidecar-args"),
]


@pytest.mark.parametrize(("words", "flag"), SECRETS)
@pytest.mark.parametrize("known", [True, False])
def test_secrets_are_found_and_left_out(words: list[str], flag: str, known: bool, trees: dict[str, Tree]) -> None:
    declared = declared_of(trees["0.5.17"]) if known else None
    line = ["m", *words, "--tp-size", "2"]
    (found,) = secret_flags(line, declared)
    assert found.startswith(flag)
    assert plain_flags(line, declared) == ["--model-path", "m", "--tp-size", "2"]


@pytest.mark.parametrize(
    "words",
    [
        ["--tokenizer-path", "t", "--max-total-tokens", "8192", "--speculative-token-map", "f"],
        ["--json-model-override-args", '{"eos_token": "x", "max_tokens": 5, "num_key_value_heads": 4}'],
        ["--served-model-name", "{not json", "--download-dir", '["a"]', "--enable-metrics"],
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_what_only_sounds_alike_stays_as_it_is(words: list[str], known: bool, trees: dict[str, Tree]) -> None:
    declared = declared_of(trees["0.5.17"]) if known else None
    line = ["--tp=2", *words]
    assert (secret_flags(line, declared), plain_flags(line, declared)) == ((), line)


def test_the_secrets_of_each_release(trees: dict[str, Tree]) -> None:
    def names(declared: Declared) -> list[str]:
        return sorted(flag.spellings[0] for flag in declared.flags if is_secret(Given(flag, flag.spellings[0], ())))

    newer = ["--admin-api-key", "--api-key", "--ssl-keyfile-password"]
    assert [names(declared_of(trees[release])) for release in ("0.4.9", "0.5.17", "0.5.23")] == [
        ["--api-key"],
        newer,
        newer,
    ]


@pytest.mark.parametrize("release", ["0.5.17", "0.5.23"])
def test_a_config_file_is_seen_through(release: str, tmp_path: Path, trees: dict[str, Tree]) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("api-key: HUSH\ntp-size: 2\nssl-keyfile: k.pem\nskip-server-warmup: true\n")
    declared, line = declared_of(trees[release]), ["--host", "::", "--config", str(file)]
    assert secret_flags(line, declared) == ("--api-key",)
    assert plain_flags(line, declared) == ["--tp-size", "2", "--skip-server-warmup", "--host", "::"]
    # Not read without a tree, so not handed on.
    assert plain_flags(line) == ["--host", "::"]


def test_tls_is_left_out(trees: dict[str, Tree]) -> None:
    line = ["--ssl-certfile", "c", "--ssl-keyfile=k", "--ssl-ca-certs", "a", "--cuda-graph-bs", "1", "2", "--host", "-"]
    for declared in (None, declared_of(trees["0.5.17"])):
        assert plain_flags(line, declared) == ["--cuda-graph-bs", "1", "2", "--host=-"]


def test_json_without_end_is_no_secret() -> None:
    assert secret_flags(["--x", "[" * 100000]) == ()
    assert secret_flags(["--x", json.dumps([[[{"b": {"private_key": 1}}]]])]) == ("--x",)
