"""Run moefix's search against a recorded landscape and say how far its choices are from the best there is.

The recording does not name its model, so the layer comes from the options. Without --experts, --intermediate and
--top-k nothing is assumed of how many tokens an expert gets: every kernel is timed for every row, until its
BLOCK_SIZE_M has proven hopeless there. The shared example's shape then only orders the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clean checkout needs no installation

from fixer.base.data_folder import data_home
from fixer.base.errors import MoefixError, UsageError
from fixer.machine.cards import Card, find_card
from fixer.sglang.find_tree import find_tree
from fixer.sglang.releases import PINNED
from fixer.sglang.tree import Tree
from fixer.tuning.search.replay import Recording, Regret, ReplayRunner
from fixer.tuning.search.runner import run_search
from fixer.tuning.search.search import Limits, Search
from fixer.tuning.search.seeds import seeds
from fixer.workload import NumberFormat, Workload


@dataclass(frozen=True)
class Result:
    """What a replay came to.

    Attributes:
        kernels: compiled, those that did not fit included.
        space: kernels in the recording, what an exhaustive search compiles.
        trials: (kernel, row) timed.
        compile_cpu_s: one core's seconds to compile `kernels`.
    """

    kernels: int
    space: int
    trials: int
    compile_cpu_s: float
    regret: Regret

    def to_json(self) -> dict[str, object]:
        rows = {str(tokens): round(value, 5) for tokens, value in self.regret.rows.items()}
        return {
            "kernels": self.kernels,
            "space": self.space,
            "trials": self.trials,
            "compile_cpu_s": round(self.compile_cpu_s, 1),
            "regret": {"geomean": round(self.regret.geomean, 5), "max": round(self.regret.worst, 5), "rows": rows},
        }


def replay(
    recording: Recording, workload: Workload, card: Card, tree: Tree, *, shape_known: bool, limits: Limits | None = None
) -> Result:
    """Run the search to its end."""
    # Shipped files hold a few values (GROUP_SIZE_M 8) that SGLang's own tuning space, and so a recording, lacks.
    candidates = [tile for tile in seeds(tree.shipped_files(), workload, card) if recording.covers(tile)]
    search = Search(
        workload,
        recording.rows,
        candidates,
        limits=limits or Limits(),
        projections=recording.projections,
        shape_known=shape_known,
    )
    runner = ReplayRunner(recording)
    run_search(search, runner)
    regret = Regret.of(search, recording)
    if not regret.rows:
        raise UsageError("No row of the recording has a pair of kernels that fits.", "Raise --limit.")
    return Result(search.asked, len(recording.kernels), runner.trials, runner.compile_seconds, regret)


def _block_shape(text: str) -> tuple[int, int]:
    block_n, _, block_k = text.partition(",")
    if not (block_n.isdecimal() and block_k.isdecimal() and int(block_n) and int(block_k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers such as 128,128")
    return int(block_n), int(block_k)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("recording", type=Path, help="a CSV file as shared/landscapes/README.md describes it")
    options.add_argument("--json", action="store_true", help="print JSON instead of a line for people")
    options.add_argument("--limit", type=_positive, metavar="BYTES", help="shared memory that a kernel may need")
    options.add_argument("--limit-column", default="shared_bytes", metavar="COLUMN", help="what --limit applies to")
    formats = [number_format.value for number_format in NumberFormat]
    options.add_argument("--dtype", choices=formats, default=NumberFormat.FP8_W8A8.value)
    options.add_argument("--block-shape", type=_block_shape, metavar="N,K", help="of block-wise scales")
    options.add_argument("--experts", type=_positive, help="E")
    options.add_argument("--intermediate", type=_positive, help="N, on one shard")
    options.add_argument("--hidden", type=_positive, help="hidden size")
    options.add_argument("--top-k", type=_positive, help="experts a token")
    options.add_argument("--card", default="H100", help="whose seeds come first (default: H100)")
    options.add_argument("--sglang", default=PINNED, metavar="VERSION", help=f"whose files are seeds ({PINNED})")
    options.add_argument("--sglang-root", metavar="PATH", help="an SGLang tree to read instead of fetching one")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    workload = Workload(
        experts=options.experts or 128,
        intermediate=options.intermediate or 768,
        hidden_size=options.hidden or 2048,
        top_k=options.top_k or 8,
        number_format=NumberFormat(options.dtype),
        block_shape=options.block_shape,
    )
    try:
        recording = Recording.read(options.recording, options.limit, options.limit_column)
        tree = find_tree(options.sglang_root, options.sglang, data_home() / "cache")
        shape_known = options.experts is not None and options.top_k is not None
        result = replay(recording, workload, find_card(options.card), tree, shape_known=shape_known)
    except MoefixError as error:
        print(f"{error.message} {error.hint}".strip(), file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        print(
            f"{result.kernels} of {result.space} kernels, {result.trials} trials, {result.compile_cpu_s:.0f} CPU "
            f"seconds to compile; regret {result.regret.geomean:.4f} on average, {result.regret.worst:.4f} at worst"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
