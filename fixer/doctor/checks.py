"""What on this machine keeps SGLang or moefix from working, each point with its cure. Looks only: nothing is changed.

Every check runs in a thread of its own with a deadline, so that a driver or a hub that hangs costs one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixer
from fixer.doctor.card import look_at_driver, look_at_shared_memory, look_at_use
from fixer.doctor.compiling import look_at_compiler, look_at_kernels, look_at_triton
from fixer.doctor.examine import Check, Finding, Patient, State, run_program
from fixer.doctor.folders import SHM, look_at_caches, look_at_disk, look_at_home, look_at_shm
from fixer.doctor.hub import look_at_hub, look_at_token
from fixer.doctor.sglang import look_at_model, look_at_pin, look_at_sglang

NOBODY = 54321
"""A user without a name, for the proof that any user can start the image."""


# --- an image at build time ------------------------------------------------------------------------------------------


def look_at_entry_point(patient: Patient) -> Iterator[Finding]:
    """moefix starts, as a user without a name where this one may change to it."""
    as_root = os.geteuid() == 0
    options: dict[str, Any] = {"user": NOBODY, "group": 0, "extra_groups": []} if as_root else {}
    beside = Path(fixer.__file__).resolve().parents[1] / "entrypoint.py"
    program = [str(beside)] if beside.is_file() else ["-c", "from fixer.cli import main; main()"]
    who = f"user {NOBODY}" if as_root else f"user {os.geteuid()} (only root can try others)"
    try:
        result = run_program([sys.executable, *program, "--version"], 50.0, cwd="/", **options)
        said = (result.stderr or result.stdout).strip().splitlines()
        is_good = result.returncode == 0 and result.stdout.strip() == f"moefix {fixer.__version__}"
    except OSError as fault:
        said, is_good = [f"{fault.filename or sys.executable}: {fault.strerror}"], False
    if is_good:
        yield Finding("entry point", State.OK, f"it starts as {who}")
    else:
        last = said[-1][:200] if said else "no reason given"
        yield Finding(
            "entry point",
            State.FAILURE,
            f"it does not start as {who}: {last}",
            "Make Python and moefix readable to all.",
        )


CHECKS = (
    Check("driver", look_at_driver),
    Check("shared memory", look_at_shared_memory),
    Check("use of the card", look_at_use),
    Check("C compiler", look_at_compiler, 60.0),
    Check("Triton", look_at_triton, 120.0),
    Check("SGLang", look_at_sglang),
    Check("model", look_at_model, 60.0),
    Check("data folder", look_at_home),
    Check("caches", look_at_caches, 30.0),
    Check(SHM, look_at_shm),
    Check("disk", look_at_disk),
    Check("hub", look_at_hub, 15.0, State.WARNING),
    Check("token", look_at_token, 15.0, State.WARNING),
)
"""What `moefix doctor` looks at."""

BUILD_CHECKS = (
    Check("SGLang", look_at_pin),
    Check("SGLang's kernel", look_at_sglang),
    Check("C compiler", look_at_compiler, 60.0),
    Check("Triton", look_at_triton, 300.0),
    Check("kernel", look_at_kernels, 600.0),
    Check("entry point", look_at_entry_point, 60.0),
)
"""What `moefix doctor --build` looks at: without a card, a network or a hub, while an image is built."""
