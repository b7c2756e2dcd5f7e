"""The tables of a diagnosis: which words mean which fault, and which kernel a file or function name belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What went wrong."""

    SHARED_MEMORY = "it needs more shared memory than the card has"
    FP8 = "this card's architecture has no FP8 in Triton"
    GATE_UP_TMA = "a row of its tuning file has USE_TMA, which this release takes for the down projection only"
    TENSOR_MEMORY = "it needs more tensor memory than the card has"
    THREADS = "it needs more threads a block than the card allows"
    COMPILE = "Triton cannot compile it"
    OLD_COMPILER = "the compiler is older than the card and does not know its architecture"
    INSTRUCTION = "it uses an instruction that this card's architecture lacks"
    DEEP_GEMM = "DeepGEMM has no kernel for this card, or not for these sizes"
    BLOCKS = "the checkpoint's blocks do not go with these parallel sizes"
    ASYNCHRONOUS = "a kernel failed while it ran"
    NO_COMPILER = "Triton lacks a C compiler or Python's headers"
    CUTLASS = "CUTLASS cannot start it: its tile does not fit the card's shared memory"
    GPU_MEMORY = "the GPU's memory is full"
    NO_IMAGE = "it was not built for this card's architecture"


@dataclass(frozen=True)
class Sign:
    """How an error shows in a line.

    Attributes:
        fault, pattern: the error and its words; `needs` and `has` are groups of the pattern.
        waits: a class of errors, whose reason may come some lines below.
    """

    fault: Fault
    pattern: re.Pattern[str]
    waits: bool = False


SIGNS = (
    # sgl-project/sglang#8513, #5995; "Hardware limit(ation)" in older Tritons.
    Sign(
        Fault.SHARED_MEMORY,
        re.compile(r"out of resource: shared memory,? ?Required: (?P<needs>\d+),? ?Hardware limit\w*: (?P<has>\d+)"),
    ),
    # vllm-project/vllm-omni#7176: Blackwell's tensor memory, in columns.
    Sign(
        Fault.TENSOR_MEMORY,
        re.compile(r"out of resource: tensor memory,? ?Required: (?P<needs>\d+),? ?Hardware limit\w*: (?P<has>\d+)"),
    ),
    Sign(
        Fault.THREADS,
        re.compile(r"out of resource: threads,? ?Required: (?P<needs>\d+),? ?Hardware limit\w*: (?P<has>\d+)"),
    ),
    # NVIDIA/cutlass#3144: flashinfer's CUTLASS MoE.
    Sign(
        Fault.CUTLASS,
        re.compile(r"requires (?P<needs>\d+) bytes shared memory but device supports (?P<has>\d+)"),
    ),
    # flashinfer-ai/flashinfer#2077, sgl-project/sglang#17494 and #1788. Its autotuner tries tiles that cannot start and
    # passes over them ("Skipping tactic"): no fault.
    Sign(
        Fault.CUTLASS,
        re.compile(
            r"^(?!.*Skipping tactic).*(?:Failed to initialize cutlass|GEMM initialization failed"
            r"|group_gemm\.initialize failed|Failed to run cutlass FP4 gemm)",
            re.IGNORECASE,
        ),
    ),
    # kvcache-ai/ktransformers#1692; older Tritons assert.
    Sign(
        Fault.FP8,
        re.compile(r"fp8e4nv (?:not supported in this architecture|data type is not supported on CUDA arch)"),
    ),
    Sign(Fault.GATE_UP_TMA, re.compile(r"(?:Keyword|keyword) argument '?USE_TMA'?")),
    Sign(
        Fault.NO_COMPILER,
        re.compile(r"Failed to find C compiler|fatal error: (?:Python|cuda)\.h: No such file"),
    ),
    # triton-lang/triton#8539; nvcc and LLVM say it in their own words.
    Sign(
        Fault.OLD_COMPILER,
        re.compile(
            r"is not defined for option 'gpu-name'|Unsupported \.version \d|Unsupported gpu architecture"
            r"|invalid value for --gpu-architecture|is not a recognized processor for this target"
        ),
    ),
    # vllm-project/vllm#41477.
    Sign(Fault.INSTRUCTION, re.compile(r"(?:Feature|Instruction) '[^']{1,200}' not supported on \.target")),
    # sgl-project/sglang#26107, and "The output_size of gate's and up's weight = 192 is not ..." (fp8.py).
    Sign(
        Fault.BLOCKS,
        re.compile(r"= (?P<needs>\d+) is not divisible by weight quantization block_[nk] = (?P<has>\d+)"),
    ),
    # sgl-project/sglang#25877, deepseek-ai/DeepGEMM#324, #140.
    Sign(
        Fault.DEEP_GEMM,
        re.compile(
            r"Assertion error \(?\S*(?:deep_?gemm|csrc/(?:apis|jit_kernels|jit|utils)/)|Unknown SF transformation",
            re.IGNORECASE,
        ),
    ),
    # sgl-project/sglang#18989.
    Sign(
        Fault.ASYNCHRONOUS,
        re.compile(
            r"an illegal memory access was encountered|unspecified launch failure|misaligned address"
            r"|an illegal instruction was encountered|device-side assert triggered"
            r"|CUDA_ERROR_(?:ILLEGAL_ADDRESS|LAUNCH_FAILED|MISALIGNED_ADDRESS)",
        ),
    ),
    Sign(
        Fault.COMPILE,
        re.compile(r"PassManager::run failed|ptxas fatal"),
    ),
    Sign(
        Fault.COMPILE,
        re.compile(r"triton\.compiler\.errors\.CompilationError|PTXASError|Internal Triton PTX codegen error"),
        waits=True,
    ),
    Sign(
        Fault.GPU_MEMORY,
        re.compile(
            r"(?:CUDA|\[CUDA\]:|CUDA error:) out of memory|torch\.(?:cuda\.)?OutOfMemoryError"
            r"|Not enough memory\. Please try to increase"
        ),
    ),
    Sign(Fault.NO_IMAGE, re.compile(r"no kernel image is available for execution on the device")),
)


MARKERS = (
    b"Error",
    b"ailed",
    b"atal",
    b"out of ",
    b"fp8e4nv",
    b"USE_TMA",
    b"shared mem",
    b"no kernel image",
    b"Not enough",
    b"llegal",
    b"misaligned",
    b"device-side",
    b"Unsupported",
    b"not supported",
    b"gpu-",
    b"not divisible",
    b"not a recognized",
    b"Unknown SF",
    b"CUDA_ERROR_",
)
"""A line without any of these shows no error of the table."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, or several alike.

    Attributes:
        name: for a person.
        marks: what a frame of a traceback above the error holds: the launch, or the file.
        reads_moe_file: a MoE file decides its tile.
        cure: what to do where its tile does not fit the card; what follows "If it does not fit: ".
    """

    name: str
    marks: tuple[str, ...]
    cure: str
    reads_moe_file: bool = False


_ATTENTION = "--attention-backend {} (or another one that this card has)"


KERNELS = (
    Kernel(
        "the fused MoE kernel (fused_moe_kernel)",
        ("fused_moe_kernel[", "fused_moe_kernel_gptq_awq[", "in invoke_fused_moe_kernel", "in outplace_fused_experts"),
        "let moefix tune it (leave out --moefix-skip-tune)",
        reads_moe_file=True,
    ),
    Kernel(
        "the LoRA kernel of the experts", ("_fused_moe_lora_kernel", "fused_moe_lora"), "serve without --enable-lora"
    ),
    # sgl-project/sglang#4797 (A40), #3451.
    Kernel(
        "the prefill attention kernel of the Triton backend (extend_attention.py)",
        ("extend_attention.py", "in extend_attention_fwd", "_fwd_kernel_unified["),
        _ATTENTION.format("flashinfer"),
    ),
    # vllm-project/vllm#46728: MLA's wide heads, 102400 bytes.
    Kernel(
        "the decode attention kernel of the Triton backend (decode_attention.py)",
        ("decode_attention.py", "_fwd_grouped_kernel_stage1[", "_fwd_kernel_stage1[", "in decode_attention_fwd"),
        _ATTENTION.format("flashinfer"),
    ),
    Kernel(
        "the attention kernel of prompts and images (prefill_attention.py)",
        ("prefill_attention.py", "in context_attention_fwd"),
        "--mm-attention-backend sdpa, or " + _ATTENTION.format("flashinfer"),
    ),
    Kernel(
        "the dense block-FP8 kernel (w8a8_block_fp8_matmul)",
        ("_w8a8_block_fp8_matmul", "w8a8_block_fp8_matmul", "w8a8_block_fp8_linear"),
        "--fp8-gemm-backend cutlass (deep_gemm on Hopper); it has tuning files of its own, which moefix does not write",
    ),
    Kernel(
        "the dense block-INT8 kernel (w8a8_block_int8_matmul)",
        ("w8a8_block_int8_matmul",),
        "a checkpoint in another number format; it has tuning files of its own, which moefix does not write",
    ),
    Kernel(
        "the dense scaled product of the Triton backend (scaled_mm_kernel)",
        ("scaled_mm_kernel[", "in triton_scaled_mm"),
        "--fp8-gemm-backend cutlass",
    ),
    # triton-lang/triton#8182: 131072 bytes on 101376.
    Kernel(
        "OpenAI's matmul_ogs (triton_kernels)",
        ("matmul_ogs", "triton_kernels/matmul", "triton_kernel_fused_experts", "triton_kernel_moe_forward"),
        "--moe-runner-backend flashinfer_mxfp4 on a Blackwell card, else the model's bf16 checkpoint, whose experts "
        "run in the kernel that moefix tunes",
    ),
    # NVIDIA/cutlass#3096: three stages are taken where two fit.
    Kernel(
        "a CUTLASS kernel of 4-bit or 8-bit experts (NVFP4 tiles)",
        (
            "cutlass_fused_moe",
            "cutlass_moe",
            "cutlass_w4a8",
            "fp4_gemm",
            "cutlass_fp4",
            "moe_kernels.cu",
            "grouped gemm",
            "MoE grouped GEMM",
            "GroupGemm",
            "group_gemm",
        ),
        "--moe-runner-backend marlin (--fp4-gemm-backend marlin for the dense layers), or newer flashinfer and "
        "sglang-kernel packages, which have smaller NVFP4 tiles for these cards",
    ),
    Kernel(
        "a kernel of deterministic mode (batch_invariant_ops)",
        ("matmul_kernel_persistent[", "batch_invariant_ops"),
        "serve without --enable-deterministic-inference",
    ),
    Kernel(
        "a kernel of linear attention",
        ("/fla/", "chunk_gated_delta_rule", "chunk_kda", "fused_recurrent", "mamba/ops", "chunk_scan", "ssd_"),
        "--linear-attn-backend flashinfer (or cutedsl), where this card has it",
    ),
    Kernel(
        "the LoRA kernel of the dense layers",
        ("_sgemm_lora", "sgemm_lora", "_chunked_lora", "lora/triton_ops"),
        "--lora-backend with another choice, or a smaller --max-lora-rank",
    ),
    Kernel(
        "a kernel that torch.compile made",
        ("torchinductor_", "triton_poi_", "triton_red_", "triton_per_", "triton_tem_"),
        "serve without --enable-torch-compile",
    ),
)


UNKNOWN = Kernel("a kernel that moefix does not know", (), "look for a flag that chooses another backend for it")
