"""The table of releases, and placing a tree whose version says nothing."""

from __future__ import annotations

import pytest

from fixer.sglang.releases import (
    KNOWN_RELEASES,
    PINNED,
    RELEASES,
    TRITON_OF_TORCH,
    is_placeholder,
    nearest,
    placed,
    release_key,
)

DEVELOPMENT = "0.0.0.dev11416+g92e8bb79e"


def test_the_table_is_in_order_and_whole():
    keys = [release_key(version) for version in RELEASES]
    assert keys == sorted(keys)
    assert len({release.came_with for release in RELEASES.values()}) == len(RELEASES) == 26
    assert len({release.wheel_sha256 for release in RELEASES.values()}) == len(RELEASES)
    assert all(len(release.wheel_sha256) == 64 for release in RELEASES.values())
    assert set(KNOWN_RELEASES) <= set(RELEASES)
    assert PINNED in KNOWN_RELEASES


def test_a_torch_brings_one_triton():
    assert {release.torch: release.triton for release in RELEASES.values()} == TRITON_OF_TORCH
    assert {(release.torch, release.triton) for release in RELEASES.values()} == set(TRITON_OF_TORCH.items())


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.5.17", "0.5.17"),
        ("0.5.19", "0.5.18"),
        ("0.5.99", "0.5.23"),
        ("1.0", "0.5.23"),
        ("0.4.7", "0.4.6.post5"),
        ("0.1", "0.4.6.post5"),
        ("0.5.10rc1", "0.5.10.post1"),
    ],
)
def test_the_nearest_release_is_not_newer(version, expected):
    assert nearest(version).version == expected


@pytest.mark.parametrize(
    ("version", "says_nothing"),
    [(DEVELOPMENT, True), ("0.0.0", True), ("0", True), ("0.5.17", False), ("0.5.10.dev3+gabc", False)],
)
def test_a_placeholder_says_nothing(version, says_nothing):
    assert is_placeholder(version) is says_nothing


@pytest.mark.parametrize("version", RELEASES)
def test_a_build_from_a_clone_without_tags_is_placed_by_its_files(tmp_path, version):
    for release in RELEASES.values():
        path = tmp_path / release.came_with
        if release.came_with.endswith(".py"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if release.version == version:
            break
    (tmp_path / "srt").mkdir(exist_ok=True)
    assert placed(tmp_path, DEVELOPMENT) == version
    assert placed(tmp_path, "0.5.19") == "0.5.19"  # a version that says something is taken at its word


def test_a_folder_with_nothing_is_taken_for_the_pinned_release(tmp_path):
    assert placed(tmp_path, DEVELOPMENT) == PINNED
