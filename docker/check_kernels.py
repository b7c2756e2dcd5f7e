"""Part of the image's build: one kernel for each architecture.

Compiles SGLang's kernel with bfloat16 inputs, which all of them have. Needs no GPU and no network, and leaves nothing
behind.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Ampere, Ada, Hopper, Blackwell, with GB300 (103) and GB10 (121). Thor (110) is not one: the assembler that comes with
# Triton 3.6.0 does not know it.
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, 121)

with tempfile.TemporaryDirectory() as scratch:
    os.environ["TRITON_CACHE_DIR"] = f"{scratch}/triton"

    from fixer.kernel import Candidate, CompileOutcome, Target, compile_candidate, planning_driver, read_kernel_source
    from fixer.sglang_tree import installed_tree
    from fixer.workload import Projection, Tile, Workload

    tree = installed_tree()
    if tree is None:
        sys.exit("check_kernels: SGLang is not installed")
    source = read_kernel_source(tree.kernel_source)
    candidate = Candidate(Workload(8, 64, 128, 2), Projection.GATE_UP, Tile(16, 32, 64, 1))
    for arch in ARCHITECTURES:
        with planning_driver(arch):
            compiled = compile_candidate(Target(source, arch, Path(scratch)), candidate)
        if compiled.outcome is not CompileOutcome.OK:
            sys.exit(f"check_kernels: nothing compiles for sm_{arch}: {compiled.message}")
        print(f"sm_{arch}: {compiled.shared_bytes} bytes of shared memory, compiled in {compiled.seconds:.1f} s")
