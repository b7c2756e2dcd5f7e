"""The fused MoE kernel's space, by axis."""

from __future__ import annotations

from fixer.workload import MOE_AXES

AXES = {axis.name: axis.values for axis in MOE_AXES}
FAR_STEPS = tuple(axis.name for axis in MOE_AXES if axis.far)
