"""GPU errors in SGLang's log: excerpts as people reported them (the issues named in fixer/diagnose.py)."""

import itertools

import pytest

from fixer.serve.log.diagnose import FRAMES, MOST, PATIENCE, Diagnosis, find
from fixer.serve.log.signs import KERNELS, MARKERS, SIGNS, Fault

RUNTIME = """
  File "/usr/local/lib/python3.12/dist-packages/triton/runtime/jit.py", line 419, in <lambda>
    return lambda *args, **kwargs: self.run(grid=grid, warmup=False, *args, **kwargs)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/usr/local/lib/python3.12/dist-packages/triton/runtime/jit.py", line 756, in run
    launch_metadata = kernel.launch_metadata(grid, stream, *bound_args.values())
  File "/usr/local/lib/python3.12/dist-packages/triton/compiler/compiler.py", line 490, in launch_metadata
    self._init_handles()
  File "/usr/local/lib/python3.12/dist-packages/triton/compiler/compiler.py", line 464, in _init_handles
    raise_(OutOfResources(self.metadata.shared, max_shared, "shared memory"))
"""
HEAD = """[2026-08-20 16:14:12 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/sgl-workspace/sglang/python/sglang/srt/managers/scheduler.py", line 2555, in run_scheduler_process
    scheduler = Scheduler(
                ^^^^^^^^^^
"""
SRT = "/sgl-workspace/sglang/python/sglang/srt"


def overflow(needs=147456, has=101376):
    return (
        f"triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: {needs}, "
        f"Hardware limit: {has}. Reducing block sizes or `num_stages` may help."
    )


def frame(file, function, code):
    return f'  File "{file}", line 110, in {function}\n    {code}\n    ^^^^^^^^^\n'


MOE = frame(
    f"{SRT}/layers/moe/fused_moe_triton/fused_moe.py", "fused_experts_impl", "invoke_fused_moe_kernel("
) + frame(
    f"{SRT}/layers/moe/fused_moe_triton/fused_moe_triton_kernels.py",
    "invoke_fused_moe_kernel",
    "fused_moe_kernel[grid](",
)
EXTEND = frame(f"{SRT}/layers/attention/triton_backend.py", "forward_extend", "self.extend_attention_fwd(") + frame(
    f"{SRT}/layers/attention/triton_ops/extend_attention.py", "extend_attention_fwd", "_fwd_kernel[grid]("
)
DECODE = frame(
    f"{SRT}/layers/attention/triton_ops/decode_attention.py",
    "_decode_grouped_att_m_fwd",
    "_fwd_grouped_kernel_stage1[grid](",
)
BLOCK_FP8 = frame(f"{SRT}/layers/quantization/fp8_kernel.py", "w8a8_block_fp8_matmul_triton", "kernel[grid](")
MATMUL_OGS = frame(f"{SRT}/layers/moe/moe_runner/triton_kernels.py", "run", "matmul_ogs(") + frame(
    "/usr/lib/python3/triton_kernels/matmul_ogs.py",
    "matmul_ogs",
    "(kernels._p_matmul_ogs if opt_flags.is_persistent else kernels._matmul_ogs)[(grid,)](",
)
DETERMINISTIC = frame(
    f"{SRT}/batch_invariant_ops/batch_invariant_ops.py", "matmul_persistent", "matmul_kernel_persistent[grid]("
)
INDUCTOR = frame("/tmp/torchinductor_root/ab/cab.py", "call", "triton_red_fused_3.run(arg0)")
ODD = frame("/opt/plugin/odd.py", "forward", "odd_new_kernel[(blocks,)](x)")


def explained(text, diagnosis=None):
    """What a log's lines lead to, in order."""
    diagnosis, above, found = diagnosis or Diagnosis(), [], []
    for line in text.splitlines():
        if any(marker in line.encode() for marker in MARKERS):
            finding = diagnosis.see(line, reversed(above[-FRAMES:]))
            found += [finding] if finding else []
        above.append(line)
    last = diagnosis.news()
    return [*found, last] if last else found


def only(text):
    (finding,) = explained(text)
    return finding


@pytest.mark.parametrize(
    ("frames", "kernel", "cure"),
    [
        (MOE, "fused MoE kernel", "A MoE file cures that"),
        (EXTEND, "extend_attention.py", "--attention-backend flashinfer"),
        (DECODE, "decode_attention.py", "--attention-backend"),
        (BLOCK_FP8, "block-FP8", "--fp8-gemm-backend cutlass"),
        (MATMUL_OGS, "matmul_ogs", "--moe-runner-backend flashinfer_mxfp4"),
        (DETERMINISTIC, "deterministic mode", "without --enable-deterministic-inference"),
        (INDUCTOR, "torch.compile", "without --enable-torch-compile"),
        (ODD, "odd_new_kernel", "another backend"),
    ],
)
def test_an_overflow_names_kernel_need_limit_and_cure(frames, kernel, cure):
    finding = only(HEAD + frames + RUNTIME + overflow())
    assert finding.fault is Fault.SHARED_MEMORY
    text = "\n".join(finding.explain("NVIDIA GeForce RTX 4090", installed=False))
    assert kernel in text
    assert "needs 147456 bytes" in text
    assert "NVIDIA GeForce RTX 4090 has 101376: 46080 too many" in text
    assert cure in text
    assert ("cannot cure" in text) == (frames is not MOE)


def test_with_files_installed_the_advice_is_another():
    finding = only(HEAD + MOE + RUNTIME + overflow())
    assert "moefix had installed one" in finding.explain("", installed=True)[1]
    assert "the card has" in finding.explain("", installed=True)[0]


def test_several_ranks_one_explanation():
    """Four ranks' tracebacks, line by line in turns."""
    one = (HEAD + MOE + RUNTIME + overflow()).splitlines()
    text = "\n".join(itertools.chain.from_iterable([line] * 4 for line in one))
    assert only(text).kernel.reads_moe_file


def test_two_kernels_two_explanations():
    text = HEAD + EXTEND + RUNTIME + overflow(106496) + "\n" + HEAD + MOE + RUNTIME + overflow()
    assert [finding.needs for finding in explained(text)] == [106496, 147456]


def test_frames_too_far_above_do_not_count():
    text = HEAD + MOE + "x\n" * (FRAMES + 10) + overflow()
    assert only(text).kernel.name == "a kernel that moefix does not know"


@pytest.mark.parametrize(
    ("text", "fault", "words"),
    [
        (
            HEAD + MOE + 'ValueError("type fp8e4nv not supported in this architecture. The supported fp8 dtypes are '
            "('fp8e4b15', 'fp8e5')\")",
            Fault.FP8,
            "compute capability 8.9",
        ),
        ("AssertionError: fp8e4nv data type is not supported on CUDA arch < 89", Fault.FP8, "AWQ or GPTQ"),
        (
            HEAD + MOE + "KeyError: 'Keyword argument USE_TMA was specified but unrecognised'",
            Fault.GATE_UP_TMA,
            "--moefix-fresh",
        ),
        (HEAD + MOE + "RuntimeError: PassManager::run failed", Fault.COMPILE, "other tiles may cure"),
        (HEAD + EXTEND + "triton.compiler.errors.CompilationError: at 1:0:", Fault.COMPILE, "cannot cure"),
        (
            "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
            Fault.NO_COMPILER,
            "gcc",
        ),
        ("main.c:1:10: fatal error: Python.h: No such file or directory", Fault.NO_COMPILER, "python3-dev"),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of",
            Fault.GPU_MEMORY,
            "--mem-fraction-static",
        ),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", Fault.GPU_MEMORY, "--tp"),
        ("CUDA error: no kernel image is available for execution on the device", Fault.NO_IMAGE, "sglang-kernel"),
        (
            "RuntimeError: [TensorRT-LLM][ERROR] Assertion failed: Failed to initialize cutlass TMA WS grouped gemm. "
            "Error: Error Internal (cutlass_kernel_file_gemm_grouped_sm120_M256_BS_group0.generated.cu:60)",
            Fault.CUTLASS,
            "--moe-runner-backend marlin",
        ),
        ("RuntimeError: cutlass_w4a8_moe_mm GEMM initialization failed", Fault.CUTLASS, "NVFP4 tiles"),
        ("RuntimeError: Triton Error [CUDA]: out of memory", Fault.GPU_MEMORY, "GPU's memory"),
        (
            HEAD
            + MOE
            + "triton.runtime.errors.OutOfResources: out of resource: tensor memory, Required: 528, Hardware "
            "limit: 512. Reducing block sizes or `num_stages` may help.",
            Fault.TENSOR_MEMORY,
            "528 columns of tensor memory, and the card has 512: 16 too many",
        ),
        (
            HEAD + MOE + "out of resource: tensor memory, Required: 528, Hardware limit: 512.",
            Fault.TENSOR_MEMORY,
            "(a smaller BLOCK_SIZE_M or BLOCK_SIZE_N; fewer stages do not): let moefix tune it",
        ),
        (
            HEAD + EXTEND + "out of resource: threads, Required: 2048, Hardware limit: 1024.",
            Fault.THREADS,
            "2048 threads a block",
        ),
        (
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
            Fault.ASYNCHRONOUS,
            "innocent",
        ),
        ("RuntimeError: CUDA error: unspecified launch failure", Fault.ASYNCHRONOUS, "CUDA_LAUNCH_BLOCKING=1"),
        (
            "ValueError: Weight output_partition_size = 320 is not divisible by weight quantization block_n = 128.",
            Fault.BLOCKS,
            "a shard of 320 is no multiple of 128",
        ),
        (
            "ValueError: The output_size of gate's and up's weight = 192 is not divisible by weight quantization "
            "block_n = 128.",
            Fault.BLOCKS,
            "a smaller --tp-size",
        ),
        (
            "tvm.error.InternalError: Assertion error (/deepgemm/csrc/apis/hyperconnection.hpp:56): Unsupported "
            "architecture",
            Fault.DEEP_GEMM,
            "SGLANG_ENABLE_JIT_DEEPGEMM=0",
        ),
        (
            "RuntimeError: Assertion error (/x/csrc/apis/../jit_kernels/impls/../../utils/layout.hpp:76): Unknown",
            Fault.DEEP_GEMM,
            "--fp8-gemm-backend triton",
        ),
        (
            "MoE grouped GEMM requires 102400 bytes shared memory but device supports 101376",
            Fault.CUTLASS,
            "1024 too many",
        ),
    ],
)
def test_other_errors(text, fault, words):
    finding = only(text)
    assert finding.fault is fault
    assert words in "\n".join(finding.explain("", installed=False))


@pytest.mark.parametrize(
    "text",
    [
        "WARNING - autotuner.py:485 - flashinfer.jit: [Autotuner]: Skipping tactic <MoERunner> 15, due to failure "
        "while profiling: [TensorRT-LLM][ERROR] Assertion failed: Failed to initialize cutlass TMA WS grouped gemm.",
        "[2026-11-24 07:00:00] Ignore import error when loading sglang.srt.models.x: No module named 'helion'",
        "a user asks: what does out of resource mean?",
        "",
    ],
)
def test_no_fault(text):
    assert explained(text) == []


def test_there_is_an_end_to_explanations():
    diagnosis = Diagnosis()
    texts = (f"    kernel_number_{number}[grid](\n{overflow()}" for number in range(40))
    found = [finding for text in texts for finding in explained(text, diagnosis)]
    assert len(found) == MOST


CLASS = "triton.compiler.errors.CompilationError: at 1:0:\ndef fused_moe_kernel(\n^\n"
PTXAS = "triton.runtime.errors.PTXASError: PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"
FP8_REASON = (
    """ValueError("type fp8e4nv not supported in this architecture. The supported fp8 dtypes are ('fp8e4b15',)")\n"""
)


@pytest.mark.parametrize(
    ("text", "fault", "words", "not_words"),
    [
        (CLASS + FP8_REASON, Fault.FP8, "compute capability 8.9", "other tiles"),
        (CLASS * 4 + FP8_REASON * 4, Fault.FP8, "AWQ or GPTQ", "--moefix-fresh"),
        ((CLASS + FP8_REASON) * 4, Fault.FP8, "AWQ or GPTQ", "--moefix-fresh"),
        (
            PTXAS + "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'\n",
            Fault.OLD_COMPILER,
            "TRITON_PTXAS_PATH",
            "other tiles",
        ),
        (
            PTXAS + "ptxas fatal   : Unsupported .version 8.8; current version is '8.5'\n",
            Fault.OLD_COMPILER,
            "TRITON_PTXAS_PATH",
            "other tiles",
        ),
        (
            PTXAS
            + "ptxas /tmp/x.ptx, line 3; error   : Feature '.tile::scatter4' not supported on .target 'sm_121a'\n",
            Fault.INSTRUCTION,
            "USE_TMA",
            "other tiles",
        ),
        (PTXAS + "ptxas fatal   : (C7600) Register allocation failed\n", Fault.COMPILE, "other tiles", "cannot cure"),
        (CLASS, Fault.COMPILE, "other tiles may cure", "cannot cure"),
    ],
)
def test_an_error_whose_reason_comes_below_has_one_explanation(text, fault, words, not_words):
    finding = only(HEAD + MOE + text)
    assert finding.fault is fault
    said = "\n".join(finding.explain("X", installed=False))
    assert words in said
    assert not_words not in said


def test_a_class_without_a_reason_waits_its_time():
    diagnosis = Diagnosis()
    assert diagnosis.see("triton.compiler.errors.CompilationError: at 1:0:", [], 5.0) is None
    assert diagnosis.wakes_at == 5.0 + PATIENCE
    assert diagnosis.news(5.5) is None
    assert diagnosis.news(5.0 + PATIENCE).fault is Fault.COMPILE
    assert diagnosis.wakes_at is None
    assert diagnosis.news() is None


def test_every_kernel_of_the_table_can_be_met():
    for kernel in KERNELS:
        for mark in kernel.marks:
            finding = find(overflow(), [f"    {mark}"])
            assert finding.kernel is kernel, (mark, finding.kernel.name)
    assert len({sign.fault for sign in SIGNS}) == len(Fault)
