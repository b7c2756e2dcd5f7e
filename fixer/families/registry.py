"""The list of kernel families: the only place that has them all."""

from __future__ import annotations

from fixer.families.family import Family
from fixer.families.fused_moe.family import FUSED_MOE
from fixer.workload import AnyWorkload

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Have a family found by its name and by the type of its workloads.

    In a child process too: reading a pickled workload imports the module of its type, which registers the family.
    """
    _FAMILIES[family.name] = family
    return family


def family_of(workload: AnyWorkload) -> Family:
    """The family that a workload belongs to.

    Raises:
        TypeError: none is registered for its type.
    """
    for family in _FAMILIES.values():
        if type(workload) is family.workload_type:
            return family
    raise TypeError(f"{type(workload).__name__} is no workload of a kernel family")


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none, as in an artefact of a newer moefix.
    """
    if name not in _FAMILIES:
        raise ValueError(f"this moefix has no kernel family {name[:40]!r}; it has {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


UNNAMED = register(FUSED_MOE)
"""The family of artefacts and recordings that name none: earlier versions of moefix had this one only."""
