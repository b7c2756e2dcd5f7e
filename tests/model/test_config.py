"""Reading a model: folders, the hub's client against a local server, the catalogue."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fixer.base.errors import HubError, ModelError, MoefixError, UsageError
from fixer.model.catalogue import catalogue
from fixer.model.config import Source, load_model, model_from_config
from fixer.model.config_file import read_json
from fixer.model.fetch_file import Hub
from fixer.model.rules.families import expert_layer
from fixer.sglang.flags import ServerFlags, parse_flags
from tests.support import fakes
from tests.support.hub import Site, serve

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
TOKEN = "hf_secretsecretsecret"


def folder(path: Path, config: object = None, **files: object) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return str(path)


def test_a_folder(tmp_path: Path) -> None:
    model = load_model(folder(tmp_path), ServerFlags())
    assert (model.architecture, model.source, model.revision) == ("Qwen3MoeForCausalLM", Source.FOLDER, None)
    assert model.text_config is model.config
    assert model.quant_config is None


def test_the_flags_name_the_model(tmp_path: Path) -> None:
    assert load_model("", parse_flags(["--model-path", folder(tmp_path)])).architecture == "Qwen3MoeForCausalLM"
    with pytest.raises(UsageError):
        load_model("", ServerFlags())


def test_the_config_is_read_only(tmp_path: Path) -> None:
    model = load_model(folder(tmp_path), ServerFlags())
    with pytest.raises(TypeError):
        model.config["num_experts"] = 1  # type: ignore[index]


def test_quantisation_in_a_file_of_its_own(tmp_path: Path) -> None:
    quant = {"quantization": {"quant_algo": "FP8"}}
    model = load_model(folder(tmp_path, hf_quant_config=quant), ServerFlags())
    assert model.quant_config is not None
    assert model.quant_config["quantization"]["quant_algo"] == "FP8"
    named = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    both = load_model(folder(tmp_path, named, hf_quant_config=quant), ServerFlags())
    assert both.quant_config == {"quant_method": "fp8"}


def test_compression_config(tmp_path: Path) -> None:
    model = load_model(folder(tmp_path, {**CONFIG, "compression_config": {"quant_method": "x"}}), ServerFlags())
    assert model.quant_config == {"quant_method": "x"}


@pytest.mark.parametrize(
    "path", [["text_config"], ["llm_config"], ["language_config"], ["thinker_config", "text_config"]]
)
def test_nested_configs(path: list[str]) -> None:
    nested: Any = {"num_experts": 7, "quantization_config": {"quant_method": "fp8"}}
    for name in reversed(path):
        nested = {name: nested}
    model = model_from_config("m", {"architectures": ["X"], **nested}, ServerFlags())
    assert model.text_config["num_experts"] == 7
    assert model.quant_config == {"quant_method": "fp8"}


def test_nesting_order() -> None:
    config = {"architectures": ["X"], "text_config": {"a": 1}, "llm_config": {"a": 2}}
    assert model_from_config("m", config, ServerFlags()).text_config["a"] == 2


def test_overrides() -> None:
    flags = parse_flags(["--json-model-override-args", '{"num_experts": 64, "text_config": {"b": 3}}'])
    config = {"architectures": ["X"], "num_experts": 128, "text_config": {"a": 1, "b": 2}}
    model = model_from_config("m", config, flags)
    assert model.config["num_experts"] == 64
    assert dict(model.text_config) == {"a": 1, "b": 3}


def check_clear(error: MoefixError) -> None:
    assert "\n" not in error.message
    assert len(error.message) < 300
    assert "Traceback" not in error.message


@pytest.mark.parametrize(
    "text",
    [
        '{"architectures": ["A"',
        "",
        "[]",
        "3",
        "not json",
        '{"architectures": "A"}',
        '{"architectures": []}',
        '{"architectures": [1]}',
        "{}",
        '{"architectures": ["A"], "text_config": 3}',
        '{"architectures": ["A"], "quantization_config": []}',
        '{"architectures": ["A"], "x": ' + "9" * 5000 + "}",
        '{"a":' * 100 + "1" + "}" * 100,
        "[" * 200000,
        '{"architectures": ["A\\nB"]}',
    ],
)
def test_bad_configs(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path), ServerFlags())
    check_clear(caught.value)


def test_a_binary_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(os.urandom(1000) + b"\xff\xfe")
    with pytest.raises(ModelError):
        load_model(str(tmp_path), ServerFlags())


def test_a_config_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ModelError, match="16 MiB"):
        load_model(str(tmp_path), ServerFlags())


def test_infinity_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["A"], "time_step_limit": [0.0, Infinity]}')
    assert load_model(str(tmp_path), ServerFlags()).architecture == "A"


def test_things_that_are_no_model(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    empty = tmp_path / "empty"
    empty.mkdir()
    fifo = tmp_path / "fifo"
    fifo.mkdir()
    os.mkfifo(fifo / "config.json")
    names = [text, gguf, empty, fifo, tmp_path / "missing", "./nowhere", "a/b/c", "~x", "no-such", "x\0y", "a" * 5000]
    for name in [str(name) for name in names] + ["../up", "owner/..", "owner/a--b", "-x"]:
        with pytest.raises(ModelError) as caught:
            load_model(name, ServerFlags())
        check_clear(caught.value)
    with pytest.raises(ModelError, match="GGUF"):
        load_model(str(gguf), ServerFlags())


# --- the catalogue ----------------------------------------------------------------------------------------------


def test_the_catalogue() -> None:
    entries = catalogue()
    assert len(entries) >= 30
    for entry in entries:
        model = model_from_config(entry.names[0], entry.config, ServerFlags())
        layer = expert_layer(model.architecture, model.text_config)
        assert (layer is None) == entry.names[0].startswith(("Qwen/Qwen3-8B", "Qwen/Qwen3-32B"))
        assert layer is None or layer.certain
        assert entry.source


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B FP8-dynamic", "qwen3-30b-a3b-fp8-DYNAMIC"])
def test_a_short_name(name: str) -> None:
    model = load_model(name, ServerFlags())
    assert model.source is Source.CATALOGUE
    assert "RedHatAI/Qwen3-30B-A3B-FP8-dynamic" in model.note


def test_near_names_are_listed() -> None:
    with pytest.raises(ModelError, match="did you mean"):
        load_model("Qwen3-30B-A3", ServerFlags())


# --- the hub ----------------------------------------------------------------------------------------------------


def site_of(status: int = 200, code: str = "", body: bytes | None = None) -> Site:
    """A hub that has a config.json and nothing else, or answers everything with a status."""
    site = Site({"config.json": json.dumps(CONFIG).encode() if body is None else body})
    if status != 200:
        site.refuse = lambda path: (status, code if path.endswith("/config.json") else "EntryNotFound")
    return site


def hub(endpoint: str, cache: Path, **more: Any) -> Hub:
    return Hub(endpoint=endpoint, token=TOKEN, cache=cache, **more)


def test_the_hub_gives_two_files_at_most(tmp_path: Path) -> None:
    site = site_of()
    with serve(site) as endpoint:
        model = load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path))
        assert (model.source, model.revision) == (Source.HUB, "a" * 40)
        assert model.architecture == "Qwen3MoeForCausalLM"
        assert {path.rpartition("/")[2] for path in site.requests} == {"config.json", "hf_quant_config.json"}
    # The second time the hub is gone, and the client's cache has it.
    again = load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path))
    assert again.architecture == "Qwen3MoeForCausalLM"
    assert "cache" in again.note


def in_a_process(**environment: str) -> "subprocess.CompletedProcess[str]":
    program = (
        "from fixer.model.config import load_model\nfrom fixer.sglang.flags import ServerFlags\n"
        "from fixer.base.errors import MoefixError\n"
        "try: print(load_model('Qwen/Qwen3-30B-A3B', ServerFlags()).source.value)\n"
        "except MoefixError as error: print(error.message)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, **environment},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_the_clients_environment_is_honoured(tmp_path: Path) -> None:
    site = site_of()
    home = str(tmp_path)
    with serve(site) as endpoint:
        online = in_a_process(HF_ENDPOINT=endpoint, HF_HOME=home, HF_TOKEN=TOKEN)
        assert online.stdout == "hub\n"
        assert f"Bearer {TOKEN}" in site.tokens
        asked = len(site.requests)
        assert in_a_process(HF_ENDPOINT=endpoint, HF_HOME=home, HF_HUB_OFFLINE="1").stdout == "hub\n"
        bare = in_a_process(HF_ENDPOINT=endpoint, HF_HOME=home + "/other", HF_HUB_OFFLINE="1")
        assert bare.stdout == "catalogue\n"
        assert len(site.requests) == asked
    assert TOKEN not in online.stdout + online.stderr


def test_the_revision_is_asked_for(tmp_path: Path) -> None:
    site = site_of()
    site.revisions["v2"] = "b" * 40
    with serve(site) as endpoint:
        load_model("owner/name", parse_flags(["--revision", "v2"]), hub=hub(endpoint, tmp_path))
    assert any("/v2/" in path for path in site.requests)


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "RepoNotFound", "token"),
        (403, "GatedRepo", "gated"),
        (403, "", "gated"),
        (404, "RepoNotFound", "not on the hub"),
        (404, "RevisionNotFound", "not on the hub"),
        (404, "EntryNotFound", "no config.json"),
        (429, "", "too many"),
        (500, "", "500"),
        (503, "", "503"),
    ],
)
def test_refusals(tmp_path: Path, status: int, code: str, says: str) -> None:
    site = site_of(status, code)
    start = time.monotonic()
    with serve(site) as endpoint, pytest.raises(HubError) as caught:
        load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path))
    check_clear(caught.value)
    assert says in caught.value.message
    assert caught.value.hint
    assert TOKEN not in caught.value.message + caught.value.hint
    assert f"Bearer {TOKEN}" in site.tokens
    assert len(site.requests) <= 3
    assert time.monotonic() - start < 5


def test_a_dead_port(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="out of reach"):
        load_model("owner/name", ServerFlags(), hub=hub("http://127.0.0.1:9", tmp_path))


def test_a_slow_hub(tmp_path: Path) -> None:
    start = time.monotonic()
    site = site_of()
    site.delay = 2
    with serve(site) as endpoint:
        with pytest.raises(HubError):
            load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path, timeout_s=0.3))
        with pytest.raises(HubError, match=r"within 0\.4 s"):
            load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path, deadline_s=0.4))
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("status", [500, 429])
def test_the_catalogue_stands_in(tmp_path: Path, status: int) -> None:
    with serve(site_of(status)) as endpoint:
        model = load_model("Qwen/Qwen3-30B-A3B", ServerFlags(), hub=hub(endpoint, tmp_path))
    assert model.source is Source.CATALOGUE
    assert "catalogue" in model.note


def test_the_catalogue_does_not_hide_a_refusal(tmp_path: Path) -> None:
    with serve(site_of(403, "GatedRepo")) as endpoint, pytest.raises(HubError):
        load_model("Qwen/Qwen3-30B-A3B", ServerFlags(), hub=hub(endpoint, tmp_path))


def test_a_large_file_is_not_fetched(tmp_path: Path) -> None:
    site = site_of()
    site.lengths["config.json"] = 1 << 30
    with serve(site) as endpoint, pytest.raises(HubError, match="16 MiB"):
        load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path))
    assert all(request.startswith("HEAD") for request in site.requests)


def test_half_a_file_on_the_hub(tmp_path: Path) -> None:
    with serve(site_of(body=b'{"architectures": [')) as endpoint, pytest.raises(ModelError, match="not JSON"):
        load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path))


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelscope"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(HubError, match="no modelscope here"):
        load_model("owner/name", ServerFlags())
    assert "catalogue" in load_model("Qwen/Qwen3-30B-A3B", ServerFlags()).note
    fakes.stub_modelscope(tmp_path, Path(folder(tmp_path / "model")))
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_model("owner/name", parse_flags(["--revision", "v1"]))
    assert (model.architecture, model.revision, model.source) == ("Qwen3MoeForCausalLM", "v1", Source.HUB)
    (tmp_path / "model" / "config.json").rename(tmp_path / "gone")
    with pytest.raises(HubError, match="gave no config") as caught:
        load_model("owner/name", ServerFlags())
    check_clear(caught.value)
    (tmp_path / "modelscope-cache" / "owner" / "name").mkdir(parents=True)
    (tmp_path / "gone").rename(tmp_path / "modelscope-cache" / "owner" / "name" / "config.json")
    assert load_model("owner/name", ServerFlags()).quant_config is None


def test_the_commit_is_known_from_the_cache(tmp_path: Path) -> None:
    with serve(site_of()) as endpoint:
        load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path))
    assert load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path)).revision == "a" * 40


def test_the_token_is_in_no_repr() -> None:
    assert TOKEN not in repr(hub("http://x", Path()))


def test_read_json_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{\n"a": 1,\n}')
    with pytest.raises(ModelError, match="line 3"):
        read_json(file)


def test_a_number_of_too_many_digits_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 10**30}))
    with pytest.raises(ModelError, match="more than 20 digits"):
        load_model(str(tmp_path), ServerFlags())


def test_a_working_folder_that_this_user_may_not_enter_says_nothing_of_a_hubs_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def refuse(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if not Path(path).is_absolute():
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *arguments, **options)

    with serve(site_of()) as endpoint:
        load_model("owner/other", ServerFlags(), hub=hub(endpoint, tmp_path))  # whatever is imported late
        with monkeypatch.context() as locked:
            locked.setattr(os, "stat", refuse)
            locked.setattr(os, "access", lambda path, mode: False)
            assert load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path)).source is Source.HUB


def test_a_folder_of_a_hub_models_name_without_a_config_is_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with serve(site_of()) as endpoint:
        assert load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path)).source is Source.HUB
        folder(tmp_path / "owner" / "name")
        assert load_model("owner/name", ServerFlags(), hub=hub(endpoint, tmp_path)).source is Source.FOLDER
        with pytest.raises(ModelError, match="no folder"):
            load_model("./owner/nothing", ServerFlags(), hub=hub(endpoint, tmp_path))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    folder(tmp_path / "models" / "x")
    assert load_model("~/models/x", ServerFlags()).source is Source.FOLDER
    with pytest.raises(ModelError, match="no folder"):
        load_model("~nobody-has-this-name/x", ServerFlags())
