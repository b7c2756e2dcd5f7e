"""Baking, less the engine: what is asked of it, what is refused. With a real engine: tests/docker/test_bake.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from fixer.base.errors import DockerError, HubError, ModelError, SGLangError, UsageError
from fixer.base.progress import Silent
from fixer.image import bake as baking
from fixer.image.bake import bake, check_order, container_command, how_to_start
from fixer.image.docker_engine import Finished, Gpus, Image
from fixer.image.order import Order, parse_gpus
from fixer.image.recipe import Weights
from tests.support.artefacts import H100, RTX_4090, artefact_of
from tests.support.hub import COMMIT, Site, serve

TOKEN = "hf_ThisIsNoTokenButMustGoNowhere"
LABELS = {"moefix.sglang.version": "0.5.17", "moefix.triton.version": "3.6.0"}
BASE = Image("sha256:base", LABELS, {"MOEFIX_IMAGE": "1"}, ("python3", "/opt/moefix/entrypoint.py"), 1 << 30)


class FakeEngine:
    """An engine that has some images, whose containers print what they are told to."""

    def __init__(self, finished: Finished, images: dict[str, Image], free: int | None = None) -> None:
        self.finished, self.images, self.free = finished, images, free
        self.ran, self.pulled, self.built = [], [], []

    def image(self, name):
        return self.images.get(name)

    def pull(self, name, progress):
        self.pulled.append(name)
        self.images[name] = BASE

    def run(self, wanted, on_line):
        self.ran.append(wanted)
        for line in self.finished.tail:
            on_line(line)
        return self.finished

    def build(self, context, tag, on_line):
        self.built.append((tag, b"".join(context)))
        for line in ("Step 1/2 : FROM x", "---> 123", "moefix: installed y"):
            on_line(line)
        return "sha256:new"

    def free_bytes(self):
        return self.free


class Notes(Silent):
    """Remembers what stays."""

    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


@pytest.fixture
def model(models):
    return str(models["q3_30b_bf16_tp1_h100"])


@pytest.fixture
def artefact(trees, model):
    return artefact_of(trees["0.5.17"], ("--model", model), RTX_4090)


@pytest.fixture
def engine(artefact, monkeypatch):
    fake = FakeEngine(Finished(0, artefact.to_json().encode(), ("moefix: tuned 18 batch sizes",)), {"moefix": BASE})
    monkeypatch.setattr(baking.Engine, "connect", lambda: fake)
    return fake


# --- what the container is asked -------------------------------------------------------------------------------------


def test_tuned_in_a_container_then_built(engine, artefact, model):
    progress = Notes()
    order = Order(model, "me/x:4090", ("--tp", "1", "--moefix-strict"), revision="v2")
    baked = bake(order, progress, {"HF_TOKEN": TOKEN, "PATH": "/bin", "AWS_SECRET": "no"})
    (run,) = engine.ran
    assert run.image == "sha256:base"
    assert run.command == ("tune", "--json", f"--model={model}", "--revision=v2", "--tp", "1")
    assert run.environ == {"HF_TOKEN": TOKEN}
    assert run.gpus == Gpus()
    assert run.mounts == {model: model}
    ((tag, context),) = engine.built
    assert tag == "me/x:4090"
    assert TOKEN.encode() not in context
    assert baked.image == "sha256:new"
    assert baked.recipe.artefacts == (artefact,)
    assert baked.recipe.command == (
        *("--model", model, "--revision", "v2", "--host", "0.0.0.0"),
        *("--tp", "1", "--moefix-strict"),
    )
    assert progress.lines == ["tuned 18 batch sizes", "Step 1/2 : FROM x", "installed y"]


def test_for_a_card_no_gpu_is_asked_for(engine, model):
    bake(Order(model, "me/x", planned_for="RTX 4090"), Silent(), {})
    (run,) = engine.ran
    assert run.command[:3] == ("export", "--out=-", "--for=RTX 4090")
    assert run.gpus is None


def test_a_lower_limit_and_a_volume_reach_the_container(model):
    order = Order("me/x", "me/x", ("--moefix-smem-limit", "90000", "--moefix-home=/x", "--tp=2"))
    assert container_command(order, None) == ("tune", "--json", "--smem-limit=90000", "--model=me/x", "--tp=2")
    assert order.folder is None
    assert Order(model, "me/x").folder == Path(model)


def test_an_image_with_an_owner_is_pulled(engine, model):
    bake(Order(model, "me/x", image="ghcr.io/me/moefix:1"), Silent(), {})
    assert engine.pulled == ["ghcr.io/me/moefix:1"]


# --- what a container can come to ------------------------------------------------------------------------------------


def test_a_failed_tuning_says_how_it_ended(engine, model):
    engine.finished = Finished(8, b"", ("moefix: Not one configuration could be timed for M=1.", "  The data folder's"))
    with pytest.raises(DockerError, match=r"tuning in moefix ended with exit code 8: moefix: Not one .* The data"):
        bake(Order(model, "me/x"), Silent(), {})
    assert engine.built == []


def test_nothing_to_tune_is_nothing_to_bake(engine, model):
    engine.finished = Finished(0, b"[]", ("moefix: nothing to tune",))
    with pytest.raises(UsageError, match=r"nothing to bake for .*: moefix: nothing to tune"):
        bake(Order(model, "me/x"), Silent(), {})


@pytest.mark.parametrize("output", [b"", b"hello", b"{}"])
def test_what_is_no_artefact_is_not_baked(engine, model, output):
    engine.finished = Finished(0, output, ())
    with pytest.raises(DockerError, match="gave no artefact"):
        bake(Order(model, "me/x"), Silent(), {})
    assert engine.built == []


def test_two_kinds_of_cards_are_both_baked(engine, artefact, trees, model):
    other = artefact_of(trees["0.5.17"], ("--model", model), H100)
    engine.finished = Finished(0, f"[{artefact.to_json()},\n{other.to_json()}]".encode(), ())
    assert bake(Order(model, "me/x"), Silent(), {}).recipe.artefacts == (artefact, other)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (Order("m", "me/x", planned_for="4090", artefact=Path("a")), "exclude each other"),
        (Order("m", "Me/X"), "no name for an image"),
        (Order("m", "me/x@sha256:" + "a" * 64), "no name for an image"),
        (Order("m", "-x"), "no name for an image"),
        (Order("m", ""), "no name for an image"),
        (Order("m", "me/x", ("--api-key", "secret")), "--api-key would be readable"),
        (Order("m", "me/x", ("--api-k=secret",)), "--api-key would be readable"),
        (Order("m", "me/x", ("--ap", "secret")), "--api-key would be readable"),
        (Order("m", "me/x", ("--ad=secret",)), "--admin-api-key would be readable"),
        (Order("m", "me/x", ("--some-new-token=secret",)), "--some-new-token would be readable"),
        (
            Order("m", "me/x", ("--hicache-storage-backend-extra-config", '{"secret_access_key": "s"}')),
            "--hicache-storage-backend-extra-config would be readable",
        ),
        (Order("m", "me/x", ("Qwen/other",)), "belongs to no flag"),
        (Order("m", "me/x", ("--admin-api-key=secret",)), "--admin-api-key would be readable"),
        (Order("m", "me/x", ("--ssl-keyfile-password", "secret")), "--ssl-keyfile-password would be readable"),
        (Order("m", "me/x", ("--x", f"a{TOKEN}")), "hub token"),
        (Order("m", "me/x", revision=TOKEN), "hub token"),
        (Order("m", "me/x", ("--config", "file.yaml")), "--config"),
        (Order("m", "me/x", ("--tp", "none")), "--tp"),
        (Order("m", "me/x", ("--moefix-nonsense",)), "moefix-nonsense"),
    ],
)
def test_orders_that_cannot_be_meant(order, said):
    with pytest.raises(UsageError) as caught:
        check_order(order, {"HF_TOKEN": TOKEN})
    assert said in caught.value.message
    assert TOKEN not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("tag", ["x", "me/qwen3:rtx4090", "ghcr.io/me/a-b_c/d:V1.2-x", "localhost:5000/x:latest"])
def test_names_that_images_have(tag):
    check_order(Order("m", tag, ("--ssl-keyfile", "/k", "--max-running-requests", "4")), {})


def test_a_taken_tag_needs_force(engine, model):
    engine.images["me/x"] = replace(BASE, id="sha256:other")
    with pytest.raises(DockerError, match="already"):
        bake(Order(model, "me/x"), Silent(), {})
    assert engine.ran == []
    assert bake(Order(model, "me/x", force=True), Silent(), {}).image == "sha256:new"


def test_the_base_is_not_replaced_even_by_force(engine, model):
    with pytest.raises(UsageError, match="built on"):
        bake(Order(model, "moefix", force=True), Silent(), {})


def test_no_such_image_and_no_image_of_moefix(engine, model):
    with pytest.raises(DockerError, match="no image other"):
        bake(Order(model, "me/x", image="other"), Silent(), {})
    assert engine.pulled == []  # a name without an owner is a local one
    engine.images["other"] = replace(BASE, environ={})
    with pytest.raises(DockerError, match="no image of moefix"):
        bake(Order(model, "me/x", image="other"), Silent(), {})


# --- from a file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(artefact, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(artefact.to_json())
    return path


def test_an_exported_artefact_needs_no_container(engine, artefact, exported, model):
    baked = bake(Order(model, "me/x", artefact=exported), Silent(), {})
    assert engine.ran == []
    assert baked.recipe.artefacts == (artefact,)


def test_rows_that_a_server_would_still_tune_are_told(engine, exported, model):
    told = Notes()
    bake(Order(model, "me/x", artefact=exported), told, {})
    assert not any("no rows" in line for line in told.lines)
    bake(Order(model, "me/x", ("--cuda-graph-max-bs", "777"), artefact=exported, force=True), told, {})
    (line,) = [line for line in told.lines if "no rows" in line]
    assert "777" in line


def test_an_artefact_that_the_image_would_not_use_is_refused(engine, artefact, exported, model):
    with pytest.raises(UsageError, match="does not ask for this artefact's E=128"):
        bake(Order(model, "me/x", ("--tp", "2"), artefact=exported), Silent(), {})
    engine.images["moefix"] = replace(BASE, labels=LABELS | {"moefix.triton.version": "3.7.0"})
    with pytest.raises(SGLangError, match=r"Triton 3\.6\.0, and here is SGLang 0\.5\.17 with Triton 3\.7\.0"):
        bake(Order(model, "me/x", artefact=exported), Silent(), {})
    exported.write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        bake(Order(model, "me/x", artefact=exported), Silent(), {})
    assert engine.built == []


# --- weights ---------------------------------------------------------------------------------------------------------


def test_the_weights_of_a_folder(engine, model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    with pytest.raises(ModelError, match="no weights"):
        bake(Order(str(folder), "me/x", with_weights=True), Silent(), {})
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    recipe = bake(Order(str(folder), "me/x", with_weights=True), Silent(), {}).recipe
    assert recipe.weights == Weights(folder, ("config.json", "model.safetensors"))
    assert recipe.command[:4] == ("--model", "/opt/moefix-baked/model", "--served-model-name", str(folder))
    assert b"w" * 1000 in engine.built[0][1]
    engine.free = 1500
    with pytest.raises(DockerError, match="GiB"):
        bake(Order(str(folder), "me/x", with_weights=True, force=True), Silent(), {})


SHARD = "model-00001-of-00001.safetensors"
BESIDE = ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "original/consolidated.00.pth", "flax.msgpack")
"""Second copies of the weights, none of which a server with the default load format reads."""


def test_second_copies_of_the_weights_of_a_folder_stay_out(engine, model, tmp_path):
    folder = tmp_path / "model"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    for name in (SHARD, *BESIDE, ".env", "modeling_x.py"):
        (folder / name).write_bytes(b"w")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.json").symlink_to("nowhere")
    wanted = ("config.json", SHARD)
    assert bake(Order(str(folder), "me/x", with_weights=True), Silent(), {}).recipe.weights.names == wanted
    order = Order(str(folder), "me/x", ("--trust-remote-code",), with_weights=True, force=True)
    assert set(bake(order, Silent(), {}).recipe.weights.names) == {*wanted, "modeling_x.py"}


@pytest.fixture
def site(model, tmp_path, monkeypatch):
    """A hub that has the model, with second copies of its weights."""
    files = {"config.json": (Path(model) / "config.json").read_bytes(), SHARD: b"w" * 999}
    site = Site(files | dict.fromkeys(BESIDE, b"x" * 999))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with serve(site) as endpoint:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            value = getattr(constants, name)
            monkeypatch.setattr(constants, name, value.replace(constants._HF_DEFAULT_ENDPOINT, endpoint))
        yield site


def test_the_weights_of_a_hub_model_are_those_that_serve_fetches_and_pin_the_tuning(engine, site):
    told = Notes()
    recipe = bake(Order("me/x", "me/x", with_weights=True, revision="main"), told, {}).recipe
    assert set(recipe.weights.names) == {"config.json", SHARD}
    assert site.sent.keys() == {"config.json", SHARD}
    assert f"--revision={COMMIT}" in engine.ran[0].command
    assert recipe.revision == COMMIT
    assert recipe.command == (
        *("--model", "/opt/moefix-baked/model", "--served-model-name", "me/x", "--host", "0.0.0.0"),
    )
    assert f"2 files of me/x, 0.000 GB, at {COMMIT}" in told.lines


def test_a_hub_that_refuses_is_told(engine, site):
    site.refuse = lambda path: (403, "GatedRepo") if path.endswith(".safetensors") else None
    with pytest.raises(HubError, match="is gated"):
        bake(Order("me/x", "me/x", with_weights=True), Silent(), {})
    assert engine.ran == []


def test_a_load_format_whose_files_only_sglang_knows(engine, model):
    with pytest.raises(UsageError, match="load format gguf"):
        bake(Order(model, "me/x", ("--load-format", "gguf"), with_weights=True), Silent(), {})


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("all", Gpus()),
        ("2", Gpus(2)),
        ("device=0", Gpus(devices=("0",))),
        ('"device=0,2"', Gpus(devices=("0", "2"))),
        ("device=GPU-3a23c669-1f69", Gpus(devices=("GPU-3a23c669-1f69",))),
        ("none", None),
    ],
)
def test_gpus_as_docker_run_takes_them(text, gpus):
    assert parse_gpus(text) == gpus


@pytest.mark.parametrize("text", ["", "0", "-1", "some", "device=", "device=0,", "²"])
def test_gpus_that_are_none(text):
    with pytest.raises(UsageError):
        parse_gpus(text)


def test_how_to_start(model):
    assert how_to_start(Order("me/x", "me/x:1")).endswith("-v moefix:/data me/x:1")
    assert f" -v {model}:{model}:ro me/x" in how_to_start(Order(model, "me/x"))
    assert json.dumps(model) not in how_to_start(Order(model, "me/x", with_weights=True))
