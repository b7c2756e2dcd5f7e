"""The releases of SGLang that moefix knows. A new release is one line of `RELEASES`.

What a release does with tuning files is not written here: its own functions say it (`fixer.sglang.lookup`).
"""

# ruff: noqa: E501 (a table: one release, one line)

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """A release of SGLang. Any one wheel of it will do, since it is only read.

    Attributes:
        version: as on PyPI.
        torch, triton: what it pins, and the Triton that this torch brings (metadata of the two wheels).
        came_with: a file or folder of the package that no earlier release has and every later one keeps. It places a
            tree whose version says nothing, such as 0.0.0.dev11416.
        wheel_sha256: of the wheel for CPython 3.11, or of the one wheel there is.
        tested: the whole path, from a model to a tuned file, was followed in its source or run.
    """

    version: str
    torch: str
    triton: str
    came_with: str
    wheel_sha256: str
    tested: bool = False

    def folder(self, cache: Path) -> Path:
        """Where the fetched release is kept."""
        return cache / "trees" / f"{self.version}-{self.wheel_sha256[:12]}"

    def is_kept(self, cache: Path) -> bool:
        """Whether it was fetched before."""
        return (self.folder(cache) / "complete").exists()


PINNED = "0.5.17"

# fmt: off
RELEASES = {
    release.version: release
    for release in (
        Release("0.4.6.post5", "2.6.0", "3.2.0", "srt", "2a48053bd975e09ff10eabf1ef8bab4c913f3c3e16a3e45c13be1b4543cfeaed"),
        Release("0.4.8.post1", "2.7.1", "3.3.1", "srt/models/glm4.py", "0c68bd3b461a910f1b135d64df7eb967ab8be73a7f17c9859c957d11c140d0e1"),
        Release("0.4.9", "2.7.1", "3.3.1", "srt/models/qwen2_audio.py", "8c2a13c37bc505930675f907fadbd66eef0539c32e31343be1bd2c34a3cd4c80", tested=True),
        Release("0.4.9.post6", "2.7.1", "3.3.1", "srt/models/glm4_moe.py", "8ad7d0f552aa8549ef8eca2404d8c51e967891c4f2062bfe7c1362c904502607"),
        Release("0.4.10.post2", "2.7.1", "3.3.1", "srt/models/step3_vl.py", "ca31b6d33d8b770b1e6d0271be855002c5333304fb440c412b43dbdc56be0a22"),
        Release("0.5.1.post3", "2.8.0", "3.4.0", "srt/models/ernie4.py", "f92f56f6fa6320012872da1fe37317e665df556af0272eff67af8afb3993ec0c"),
        Release("0.5.2", "2.8.0", "3.4.0", "srt/models/qwen3_next.py", "83aae146f3913ed0802bb1ea356facff47efe0e7d18041a3f143de9ef6e44b2c"),
        Release("0.5.3.post3", "2.8.0", "3.4.0", "srt/models/dots_vlm.py", "809fd0c8c0847cd95cf28364ff50475a4d5015c8857b22736c69f3eb12810f0e"),
        Release("0.5.4.post1", "2.8.0", "3.4.0", "srt/models/minimax_m2.py", "ed919059d777f4c3a1e029239c16969188623e847ec0b9c23e2d4856e07f70f4"),
        Release("0.5.4.post3", "2.8.0", "3.4.0", "srt/models/kimi_linear.py", "054f96cd9f80acc98de740cd6f79330d2e9b61c2efd0692da96f995a9f796821"),
        Release("0.5.5.post3", "2.8.0", "3.4.0", "srt/layers/moe/kt_ep_wrapper.py", "0283d290a480e56201cab6e42bc5cf5f505f600a9508d004c06283b052f60203"),
        Release("0.5.6.post2", "2.9.1", "3.5.1", "srt/models/llada2.py", "cb542f7adeec56bbb5598443c52d0f347fab74dbb5df09d37cad69eaec780c54"),
        Release("0.5.8.post1", "2.9.1", "3.5.1", "srt/models/afmoe.py", "3fe5ddf6d8b47b234bb192737eb52c94e76282bf910b1185e020f88ec7367e6e"),
        Release("0.5.9", "2.9.1", "3.5.1", "srt/models/exaone4.py", "8a936c4d25fea605f44254e533cff2144c73ceffbc1f8738aba393461bbb64d1"),
        Release("0.5.10.post1", "2.9.1", "3.5.1", "srt/layers/moe/token_dispatcher/nixl.py", "a854a68b11caf6b4b55c241a44378a7cdede7ede325db85c955f131506703bc6"),
        Release("0.5.11", "2.11.0", "3.6.0", "srt/models/gemma4_mm.py", "fe0748beaff218d3e16c9018a5e19f018db06fc3c7ac4f90d2f93da1cf074b6f"),
        Release("0.5.12.post1", "2.11.0", "3.6.0", "srt/models/deepseek_v4.py", "94b3f3cc6b97f1364f247b8d9c1d106ec63cf22c55d6b65bc40ff29b0206ef5f"),
        Release("0.5.13.post1", "2.11.0", "3.6.0", "srt/models/cohere2_moe.py", "1c1653ecf2893c7d7b1cf0c3e1cc9b7550ebad95c809de2f44bcc91b7a1e1fe3"),
        Release("0.5.14", "2.11.0", "3.6.0", "srt/models/zaya.py", "4fe16056b45c8aca00f5f90ceb174dc3a62a3f5dccf159c791370795cd00fc99"),
        Release("0.5.15.post1", "2.11.0", "3.6.0", "srt/models/hrm_text.py", "8e182e1c449197cb6f98716a7cf432a3ea7af78c172f9b840ab28ad9e6cda9b4"),
        Release("0.5.16", "2.11.0", "3.6.0", "srt/models/inkling.py", "d5f345a18953dd35df568ac56bdcb7f5ee910ab39efea4469b714556d1070713"),
        Release("0.5.17", "2.11.0", "3.6.0", "srt/models/kimi_k3.py", "575e38f5683624ded3b4bb267f637a098e5ed37d13a1d1ff5ea09bd781a04d16", tested=True),
        Release("0.5.18", "2.13.0", "3.7.1", "srt/models/interns2_mobius.py", "e97b585dd2d5db2802599feba47c84cce972f5e1231a6816fef996200207b5cf"),
        Release("0.5.20", "2.13.0", "3.7.1", "srt/models/bailing_moe_v3.py", "1573527042f4f6b4ead838302818595fc77fdc611dbcc2e40cd150fbc8f8513c"),
        Release("0.5.22", "2.14.1", "3.8.0", "srt/models/bailing_mm_v3.py", "cc9a0f15bd8f877a0584fdb7a1702240177a1f1cc8d17c978715161717b9037b"),
        Release("0.5.23", "2.14.1", "3.8.0", "srt/models/beam.py", "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937", tested=True),
    )
}
# fmt: on
"""By version, oldest first."""

KNOWN_RELEASES = tuple(release.version for release in RELEASES.values() if release.tested)
"""The releases whose rules for models and number formats were read from their source."""

OLD, NEW, NEWEST = KNOWN_RELEASES

TRITON_OF_TORCH = {release.torch: release.triton for release in RELEASES.values()}
"""The Triton that a torch brings."""


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


def nearest(version: str) -> Release:
    """The newest release of the table that is not newer than `version`, or the oldest there is."""
    key = release_key(version)
    return next(
        (release for release in reversed(RELEASES.values()) if release_key(release.version) <= key),
        next(iter(RELEASES.values())),
    )


def is_placeholder(version: str) -> bool:
    """Whether a version says nothing: a build from a clone without tags calls itself 0.0.0.dev..."""
    return not any(release_key(version))


def placed(package: Path, version: str) -> str:
    """The release whose rules hold for a tree: its version, or for a placeholder the newest whose files it has."""
    if not is_placeholder(version):
        return version
    has = (release.version for release in reversed(RELEASES.values()) if (package / release.came_with).exists())
    return next(has, PINNED)
