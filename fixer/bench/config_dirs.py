"""The two sides' folders for SGLANG_MOE_CONFIG_DIR, which replaces SGLang's own tree of tuning files.

Each mirrors that tree as it was before moefix wrote into it, and differs in the compared pair only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fixer.artefacts.install import TunedFiles
from fixer.base.errors import StoreError
from fixer.base.files import make_folder, write_together
from fixer.sglang.lookup import BEFORE_MOEFIX
from fixer.sglang.tree import Tree


def make_config_dir(root: Path, tree: Tree, files: TunedFiles | None) -> Path:
    """A folder for SGLANG_MOE_CONFIG_DIR, made anew.

    Args:
        root: the folder.
        tree: SGLang's.
        files: put into the running Triton's folder, in place of what the tree has under these names; None: nothing.

    Returns:
        The running Triton's folder in it, which holds the files.

    Raises:
        StoreError: it cannot be written.
    """
    own = root / "configs" / tree.triton_folder.name
    try:
        if root.is_symlink() or root.exists():
            shutil.rmtree(root)
        make_folder(own)
        for source, relative in before_moefix(tree.configs):
            target = root / "configs" / relative
            make_folder(target.parent)
            target.symlink_to(source.absolute())
    except OSError as fault:
        raise StoreError(
            f"the folder {root} cannot be made: {fault.strerror or fault}", "Free some space in the data folder."
        ) from fault
    if files is not None:
        write_together(files.files(own))
    return own


def before_moefix(configs: Path) -> Iterator[tuple[Path, Path]]:
    """Each tuning file of a tree as if moefix had never run: where its content is, and its place below `configs`."""
    for folder in sorted(configs.glob("triton_*")):
        names = set(os.listdir(folder)) if folder.is_dir() else set()
        for name in sorted(name for name in names if name.endswith(".json")):
            backup = folder / (name + BEFORE_MOEFIX)
            if backup.name not in names:
                yield folder / name, Path(folder.name, name)
            elif backup.stat().st_size > 0:  # an empty one says that there was no such file
                yield backup, Path(folder.name, name)
