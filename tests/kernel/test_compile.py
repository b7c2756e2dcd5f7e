from __future__ import annotations

import ast
import hashlib
import shutil
from dataclasses import replace

import pytest

from fixer.base.errors import SGLangError
from fixer.kernel.compile import (
    Candidate,
    CompileOutcome,
    Target,
    compile_candidate,
    planning_driver,
    swaps_operands,
    warm_kernel,
)
from fixer.kernel.source import load_kernels, read_kernel_source
from fixer.kernel.space import always_spills
from fixer.sglang.releases import KNOWN_RELEASES, RELEASES
from fixer.workload import BOTH, NumberFormat, Projection, Tile, Workload

QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
OLD_DEFAULT = Tile(128, 256, 128, 32, 8, 4)
SMALL = Tile(16, 32, 64, 1, 4, 2)
UP = Projection.GATE_UP

HEADER = "import triton; import triton.language as tl"


class Sources(dict):
    """The kernels by release, each read when it is asked for."""

    def __init__(self, trees):
        self._trees = trees

    def __missing__(self, version):
        self[version] = read_kernel_source(self._trees[version].kernel_source)
        return self[version]


@pytest.fixture(scope="session")
def sources(trees):
    return Sources(trees)


@pytest.fixture(scope="module", autouse=True)
def _triton_cache(tmp_path_factory):
    """An empty cache, so that what is tested here is really compiled."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def compiled(target, workload, projection, tile, tokens=None):
    with planning_driver(target.arch):
        return compile_candidate(target, Candidate(workload, projection, tile, tokens))


# --- cutting the kernel out


@pytest.mark.parametrize("version", list(RELEASES))
def test_the_cut_out_lines_are_sglangs_own_at_their_own_place(trees, sources, version):
    whole = trees[version].kernel_source.read_text("utf-8").splitlines()
    cut = sources[version].text.splitlines()
    assert cut[0] == HEADER
    kept = [(mine, theirs) for mine, theirs in zip(cut[1:], whole[1:], strict=False) if mine]
    assert len(kept) > 300
    assert all(mine == theirs for mine, theirs in kept)


@pytest.mark.parametrize("version", list(RELEASES))
def test_only_jitted_functions_are_cut_out_and_all_that_the_kernels_call(trees, sources, version):
    theirs = {
        node.name: node
        for node in ast.parse(trees[version].kernel_source.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    body = ast.parse(sources[version].text).body
    assert [type(node) for node in body[:2]] == [ast.Import, ast.Import]
    functions = {node.name: node for node in body[2:]}
    assert all(isinstance(node, ast.FunctionDef) for node in functions.values())
    assert set(functions) == {"write_zeros_to_output", "fused_moe_kernel", "fused_moe_kernel_gptq_awq"}
    for name, node in functions.items():
        assert [ast.unparse(decorator) for decorator in node.decorator_list] == ["triton.jit"]
        assert node.lineno == theirs[name].lineno


def test_the_hash_is_of_the_kernels_alone(trees, sources, tmp_path):
    path = tmp_path / "fused_moe.py"
    text = trees["0.5.17"].kernel_source.read_text("utf-8")
    path.write_text(text + "\n\ndef something_else():\n    pass\n")
    assert read_kernel_source(path).sha256 == sources["0.5.17"].sha256
    path.write_text(text.replace("accumulator += tl.dot", "accumulator -= tl.dot"))
    assert read_kernel_source(path).sha256 != sources["0.5.17"].sha256
    assert len({sources[version].sha256 for version in KNOWN_RELEASES}) == len(KNOWN_RELEASES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"def fused_moe_kernel(:", "cannot read it"),
        (b"\xff\xfe", "cannot be read"),
        (b"def fused_moe_kernel(a):\n    pass\n", "has no @triton.jit function fused_moe_kernel"),
        (b"import triton\n", "has no @triton.jit function fused_moe_kernel"),
        (b"@triton.jit\ndef fused_moe_kernel(a):\n    pass\n", "no room for the imports"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "fused_moe.py"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SGLangError, match=message) as caught:
        read_kernel_source(path)
    assert "\n" not in caught.value.message


def test_a_tampered_copy_is_written_anew(sources, tmp_path):
    source = sources["0.5.17"]
    load_kernels(source, tmp_path)
    (path,) = tmp_path.glob("*.py")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256
    path.write_text(source.text + "\ntampered = True\n")
    load_kernels.cache_clear()  # as another process would find it
    module = load_kernels(source, tmp_path)
    assert not hasattr(module, "tampered")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]


# --- compiling


@pytest.mark.parametrize("version", KNOWN_RELEASES)
@pytest.mark.parametrize(("arch", "shared"), [(89, 147456), (90, 196608), (120, 147456)])
def test_the_old_fp8_default_needs_the_shared_memory_of_the_error_message(sources, folder, version, arch, shared):
    result = compiled(Target(sources[version], arch, folder), QWEN, UP, OLD_DEFAULT)
    assert (result.outcome, result.shared_bytes, result.message) == (CompileOutcome.OK, shared, "")
    assert result.seconds > 0


@pytest.mark.parametrize("version", [version for version in RELEASES if version not in KNOWN_RELEASES])
def test_a_kernel_of_every_release_compiles(sources, folder, version):
    result = compiled(Target(sources[version], 89, folder), QWEN, UP, OLD_DEFAULT)
    assert (result.outcome, result.shared_bytes, result.message) == (CompileOutcome.OK, 147456, "")


def test_what_is_compiled_comes_from_the_cache_the_second_time(sources, folder):
    target = Target(sources["0.5.17"], 89, folder)
    first = compiled(target, QWEN, Projection.DOWN, SMALL)
    second = compiled(target, QWEN, Projection.DOWN, SMALL)
    assert second.shared_bytes == first.shared_bytes > 0
    assert second.seconds < first.seconds / 4


def test_one_process_compiles_for_several_architectures(sources, folder):
    names = {}
    for arch in (89, 90):
        target = Target(sources["0.5.17"], arch, folder)
        with planning_driver(arch):
            kernel = warm_kernel(target, Candidate(QWEN, UP, replace(SMALL, block_m=32)))
        names[arch] = kernel.metadata.target.arch
    assert names == {89: 89, 90: 90}


@pytest.mark.parametrize("version", KNOWN_RELEASES)
def test_fp8_on_sm_86_is_an_outcome_with_a_reason(sources, folder, version):
    result = compiled(Target(sources[version], 86, folder), QWEN, UP, SMALL)
    assert (result.outcome, result.shared_bytes) == (CompileOutcome.FAILED, 0)
    assert "fp8e4nv" in result.message
    assert "\n" not in result.message


def test_the_same_card_compiles_bf16(sources, folder):
    result = compiled(Target(sources["0.5.17"], 86, folder), Workload(128, 768, 2048, 8), UP, SMALL)
    assert result.outcome is CompileOutcome.OK


@pytest.mark.parametrize("version", ["0.5.17", "0.5.23"])
def test_a_tma_tile_compiles_on_hopper(sources, folder, version):
    target = Target(sources[version], 90, folder)
    plain = Tile(64, 64, 64, 1, 4, 3)
    result = compiled(target, QWEN, Projection.DOWN, replace(plain, use_tma=True))
    assert result.outcome is CompileOutcome.OK
    # both operands go through shared memory, plus an 8-byte barrier for each stage
    assert result.shared_bytes == 3 * (64 + 64) * 64 + 3 * 8


def test_a_gate_up_kernel_describes_its_weights_only_and_can_sort_its_output(sources, folder):
    target, plain = Target(sources["0.5.17"], 90, folder), Tile(64, 64, 64, 1, 4, 3)
    described = compiled(target, QWEN, UP, replace(plain, use_tma=True))
    assert described.outcome is CompileOutcome.OK
    assert described.shared_bytes > compiled(target, QWEN, UP, plain).shared_bytes  # barriers for the one descriptor
    with planning_driver(90):
        keys = {
            warm_kernel(target, Candidate(QWEN, UP, plain, sorted_output=in_order)).hash for in_order in (False, True)
        }
    assert len(keys) == 2


@pytest.mark.parametrize(
    "workload",
    [
        Workload(8, 512, 1024, 2, activation_dtype="float16"),
        Workload(8, 512, 1024, 2, NumberFormat.FP8_W8A8),
        Workload(8, 512, 1024, 2, NumberFormat.FP8_W8A8, block_shape=(128, 128)),
        Workload(8, 512, 1024, 2, NumberFormat.INT8_W8A8, per_channel_quant=True),
        Workload(8, 256, 1024, 2, NumberFormat.INT4_W4A16, group_size=128, has_zero_points=True),
        Workload(8, 512, 1024, 2, NumberFormat.INT8_W8A16, group_size=128),
        Workload(8, 512, 1024, 2, ep_size=2),
    ],
    ids=["fp16", "fp8", "fp8-block", "int8", "int4", "int8-weights", "ep"],
)
def test_every_number_format_compiles(sources, folder, workload):
    target = Target(sources["0.5.23"], 89, folder)
    for projection in BOTH:
        result = compiled(target, workload, projection, SMALL, tokens=16)
        assert (result.outcome, result.message) == (CompileOutcome.OK, "")
        assert 0 < result.shared_bytes < 16384


def test_an_argument_that_moefix_does_not_know_is_named(trees, folder, tmp_path):
    text = trees["0.5.17"].kernel_source.read_text("utf-8")
    start = text.index("def fused_moe_kernel(")
    place = text.index("even_Ks: tl.constexpr", start)
    path = tmp_path / "fused_moe.py"
    path.write_text(text[:place] + "BRAND_NEW_SWITCH: tl.constexpr,\n    " + text[place:])
    target = Target(read_kernel_source(path), 89, folder)
    with pytest.raises(SGLangError, match="BRAND_NEW_SWITCH") as caught, planning_driver(89):
        compile_candidate(target, Candidate(QWEN, UP, SMALL))
    assert "fused_moe_kernel" in caught.value.message
    assert caught.value.hint


def test_the_driver_is_put_back(sources):
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(RuntimeError), planning_driver(89):
        raise RuntimeError
    assert driver._active is before


def test_the_driver_of_a_triton_before_3_5_is_put_back(monkeypatch):
    """There the active driver is a plain attribute, and `_active` is not there."""
    import triton.runtime

    class Old:
        active = default = "begins a real driver"

        def set_active(self, driver):
            self.active = driver

    old = Old()
    monkeypatch.setattr(triton.runtime, "driver", old)
    with planning_driver(89):
        assert old.active.get_current_target().arch == 89
    assert old.active == "begins a real driver"
    assert not hasattr(old, "_active")


# --- swapped operands


@pytest.mark.parametrize(
    ("version", "arch", "card", "block_m", "block_n", "swapped"),
    [
        ("0.4.9", 90, "NVIDIA H20", 32, 64, False),
        ("0.5.8.post1", 90, "NVIDIA H20", 32, 64, True),
        ("0.5.8.post1", 90, "NVIDIA H200", 32, 64, False),
        ("0.5.8.post1", 90, "NVIDIA H100 80GB HBM3", 32, 64, False),
        ("0.5.9", 90, "NVIDIA H100 80GB HBM3", 32, 64, True),
        ("0.5.17", 90, "NVIDIA H100 80GB HBM3", 32, 64, True),
        ("0.5.17", 90, "NVIDIA H100 80GB HBM3", 64, 64, False),
        ("0.5.17", 90, "NVIDIA H100 80GB HBM3", 32, 32, False),
        ("0.5.17", 89, "NVIDIA L40S", 32, 64, False),
        ("0.5.23", 100, "NVIDIA B200", 32, 64, False),
    ],
)
def test_sglangs_own_rule_says_when_operands_are_swapped(
    sources, tmp_path, version, arch, card, block_m, block_n, swapped
):
    target = Target(sources[version], arch, tmp_path, card)
    assert swaps_operands(target, QWEN, replace(SMALL, block_m=block_m, block_n=block_n)) is swapped
    assert not swaps_operands(target, Workload(128, 768, 2048, 8), replace(SMALL, block_m=block_m, block_n=block_n))


def test_a_kernel_that_swaps_by_an_unknown_rule_is_not_known(trees, tmp_path):
    path = tmp_path / "kernels.py"
    path.write_text(trees["0.5.17"].kernel_source.read_text("utf-8").replace("should_enable_swap_ab", "another_rule"))
    with pytest.raises(SGLangError, match=r"not known to moefix: .*kernels.py.* swap_ab"):
        read_kernel_source(path)


def test_the_copy_does_not_need_sglangs_file(sources, folder, tmp_path):
    path = tmp_path / "fused_moe.py"
    shutil.copy(sources["0.5.17"].path, path)
    source = read_kernel_source(path)
    path.unlink()
    result = compiled(Target(source, 89, tmp_path / "kernels"), QWEN, UP, SMALL)
    assert result.outcome is CompileOutcome.OK


@pytest.mark.parametrize(
    ("block_m", "block_n", "warps", "spills"),
    [
        (128, 256, 4, True),  # 256 accumulators a thread
        (128, 256, 8, False),
        (128, 128, 4, False),
        (256, 256, 8, True),
        (256, 256, 16, False),
        (64, 256, 2, True),
    ],
)
def test_an_accumulator_over_the_register_file_always_spills(block_m, block_n, warps, spills):
    assert always_spills(Tile(block_m, block_n, 64, 1, warps, 3)) is spills
