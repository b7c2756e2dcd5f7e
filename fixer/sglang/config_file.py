"""SGLang's `--config FILE`, merged into the command line by the tree's own code.

srt/server_args_config_parser.py (srt/utils/ from 0.5.22 on) imports the standard library and PyYAML only, so it is run
as it lies. SGLang calls it where a word is exactly `--config` (server_args.py:9359 of 0.5.17); it ignores the file of
`--config=FILE` and of an abbreviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixer.base.errors import UsageError
from fixer.base.text import told

MAX_CONFIG_BYTES = 1 << 20
"""Size limit of the file."""

SOURCES = ("srt/utils/server_args_config_parser.py", "srt/server_args_config_parser.py")

CONFIG = "--config"


def can_merge(package: Path) -> bool:
    """Whether the tree has the code that merges."""
    return any((package / source).is_file() for source in SOURCES)


def merged(package: Path, parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The command line with the file's flags in front of all others, and without `--config FILE`.

    Raises:
        UsageError: SGLang would stop at the file, or it is not there or too large.
    """
    place = argv.index(CONFIG) + 1
    if place < len(argv):
        _check_size(Path(argv[place]))
    path = next(package / source for source in SOURCES if (package / source).is_file())
    try:
        result = _merger(path)(parser).merge_config_with_args(list(argv))
    except Exception as fault:  # whatever SGLang and PyYAML raise; the file's text stays out of the message
        what = str(fault) if type(fault) is ValueError else type(fault).__name__
        raise UsageError(f"{CONFIG}: SGLang stops: {' '.join(what.split())[:200]}") from None
    return [str(word) for word in result]


def _merger(path: Path) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("sglang_config_merger", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.logger.disabled = True  # it would print the lines of a faulty file
    return module.ConfigArgumentMerger


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as fault:
        raise UsageError(f"{CONFIG} {str(path)[:60]!r} cannot be read: {told(fault)[:100]}") from None
    if size > MAX_CONFIG_BYTES:
        raise UsageError(f"{CONFIG} {str(path)[:60]!r} is larger than {MAX_CONFIG_BYTES} bytes")
