"""Checks of the C compiler, of Triton and of SGLang's kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fixer.base.errors import SGLangError
from fixer.doctor.examine import Finding, Patient, State, run_program
from fixer.sglang.releases import RELEASES

BUILD_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""What an image's kernels are compiled for as a proof."""


FP8_SINCE = 89
"""The first architecture for which Triton compiles FP8 (fp8e4nv)."""


def look_at_compiler(patient: Patient) -> Iterator[Finding]:
    """A C compiler that finds Python's headers, where Triton looks for it (runtime/build.py: CC, gcc, clang)."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        yield Finding(
            "C compiler", State.FAILURE, "there is neither gcc nor clang", "apt-get install gcc libc6-dev, or set CC."
        )
        return
    include = sysconfig.get_paths()["include"]
    python = f"python3.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix="moefix-") as scratch:
        source = Path(scratch, "launcher.c")
        source.write_text("#include <Python.h>\nPyObject *moefix(void) { return PyLong_FromLong(1); }\n")
        command = [
            compiler,
            str(source),
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{include}",
            "-o",
            str(source.with_suffix(".so")),
        ]
        try:
            result = run_program(command, 50.0)
        except OSError as fault:
            yield Finding(
                "C compiler", State.FAILURE, f"{compiler} does not start: {fault.strerror}", "Set CC to a C compiler."
            )
            return
    if result.returncode == 0:
        yield Finding("C compiler", State.OK, f"{compiler} builds what Triton launches kernels with")
    elif not Path(include, "Python.h").is_file():
        yield Finding(
            "C compiler", State.FAILURE, f"Python.h is not in {include}", f"apt-get install {python}-dev (python3-dev)."
        )
    else:
        first = next((line for line in result.stderr.splitlines() if "error" in line), "it gave no reason")
        yield Finding(
            "C compiler", State.FAILURE, f"{compiler} cannot build: {first[:200]}", "apt-get install gcc libc6-dev."
        )


IMPORT_TRITON = "import triton, triton.language; print(triton.__version__)"


def look_at_triton(patient: Patient) -> Iterator[Finding]:
    """Triton can be imported, and is the one that the SGLang runs with."""
    result = run_program([sys.executable, "-c", IMPORT_TRITON], 110.0)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding(
            "Triton", State.FAILURE, f"it cannot be imported: {last[:200]}", "Install SGLang anew: it brings Triton."
        )
        return
    version = result.stdout.strip()[:40]
    with contextlib.suppress(SGLangError):
        release = RELEASES.get(patient.tree.version)
        if release is not None and release.triton != version:
            yield Finding(
                "Triton",
                State.WARNING,
                f"{version}, and SGLang {release.version} was released with {release.triton}",
                f"pip install triton=={release.triton}, unless you chose this one: tunings are kept apart by version.",
            )
            return
    yield Finding("Triton", State.OK, version)


def look_at_kernels(patient: Patient) -> Iterator[Finding]:
    """SGLang's kernel compiles for every supported architecture."""
    from fixer.kernel.compile import Candidate, CompileOutcome, Target
    from fixer.kernel.pool import CompilePool, FixedDeadline, compile_all
    from fixer.kernel.source import read_kernel_source
    from fixer.workload import NumberFormat, Projection, Tile, Workload

    source = read_kernel_source(patient.tree.kernel_source)
    with tempfile.TemporaryDirectory(prefix="moefix-") as scratch:
        for arch in BUILD_ARCHITECTURES:
            number_format = NumberFormat.FP8_W8A8 if arch >= FP8_SINCE else NumberFormat.NONE
            candidate = Candidate(
                Workload(8, 128, 256, 2, number_format), Projection.GATE_UP, Tile(16, 64, 128, 1, 4, 3)
            )
            target = Target(source, arch, Path(scratch, "kernels"))
            with CompilePool(target, Path(scratch, "triton"), 1, FixedDeadline(120.0)) as pool:
                compiled = compile_all(pool, [candidate])[candidate]
            what = f"sm_{arch}, {'FP8' if number_format is NumberFormat.FP8_W8A8 else 'bf16'}"
            if compiled.outcome is CompileOutcome.OK:
                yield Finding("kernel", State.OK, f"{what}: {compiled.shared_bytes} bytes of shared memory")
            else:
                fault = compiled.message or compiled.outcome.value
                yield Finding("kernel", State.FAILURE, f"{what}: {fault[:200]}", "Triton and SGLang do not match.")
