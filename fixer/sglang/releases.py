"""The SGLang releases that moefix has been checked against, and how versions compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """A release that moefix fetches by itself: any one wheel of it will do, since it is only read.

    `triton` is the version that its torch brings (wheel metadata: sglang → torch → triton).
    """

    version: str
    triton: str
    python: str
    wheel_sha256: str

    def folder(self, cache: Path) -> Path:
        """Where the fetched release is kept."""
        return cache / "sglang" / f"{self.version}-{self.wheel_sha256[:12]}"

    def is_kept(self, cache: Path) -> bool:
        """Whether it was fetched before."""
        return (self.folder(cache) / "complete").exists()


PINNED = "0.5.17"


RELEASES = {
    release.version: release
    for release in (
        Release("0.4.9", "3.3.1", "3.11", "8c2a13c37bc505930675f907fadbd66eef0539c32e31343be1bd2c34a3cd4c80"),
        Release("0.5.17", "3.6.0", "3.11", "575e38f5683624ded3b4bb267f637a098e5ed37d13a1d1ff5ea09bd781a04d16"),
        Release("0.5.23", "3.8.0", "3.11", "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937"),
    )
}


KNOWN_RELEASES = ("0.4.9", "0.5.17", "0.5.23")
"""The releases of SGLang whose rules were read from their source."""


OLD, NEW, NEWEST = KNOWN_RELEASES


def release_key(release: str) -> tuple[int, ...]:
    """A release's numbers ("0.5.17" is (0, 5, 17)); a suffix such as ".post1" or "rc2" is left out."""
    numbers: list[int] = []
    for part in release.strip().lstrip("v").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits or len(digits) > 9:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def rules_for(release: str) -> str:
    """The known release whose rules apply: the newest that is not newer, or the oldest known."""
    key = release_key(release)
    return next((known for known in reversed(KNOWN_RELEASES) if release_key(known) <= key), OLD)


def at_least(release: str, since: str) -> bool:
    """Whether the rules of `release` include what came with `since`."""
    return release_key(rules_for(release)) >= release_key(since)
