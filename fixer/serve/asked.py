"""The file names that SGLang itself asked for, kept so that the next start tunes exactly those.

A record holds for one model, card, SGLang and the flags that decide a file's name. It comes from the server's log,
where SGLang asked for another file than the rules had worked out, or from asking SGLang beforehand (`fixer.serve.asking.ask`). One
that SGLang contradicts again is replaced. Reading and writing need the standard library only, for the log's relay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixer.artefacts.shelf import Damaged, check_file_name, parse_json, read_or_set_aside, safe_name, utc_now, write_atomically

if TYPE_CHECKING:
    from fixer.model.rules.decide import Decision
    from fixer.serve.situation import Situation

SCHEMA = 1

COUNTING_FLAGS = (
    "tp_size",
    "ep_size",
    "dp_size",
    "pp_size",
    "moe_dp_size",
    "enable_dp_attention",
    "quantization",
    "dtype",
    "disable_shared_experts_fusion",
    "enforce_shared_experts_fusion",
    "moe_runner_backend",
    "moe_a2a_backend",
    "ep_num_redundant_experts",
    "speculative_algorithm",
    "enable_deterministic_inference",
    "enable_lora",
    "enable_two_batch_overlap",
    "enable_single_batch_overlap",
    "enable_ep_moe",
    "enable_deepep_moe",
    "kt_num_gpu_experts",
    "revision",
)
"""Fields of `ServerFlags` that may change which file is asked for; the rest changes rows only, or nothing."""


@dataclass(frozen=True)
class Question:
    """For what a record holds.

    Attributes:
        model: the name, as the user gave it.
        config: a hash of config.json with the user's overrides, so that another model under the same name is another.
        card: as the driver writes it.
        sglang: SGLang's version.
        flags: the flags that count and are not SGLang's defaults, as "name=value", in order.
    """

    model: str
    config: str
    card: str
    sglang: str
    flags: str


@dataclass(frozen=True)
class Asked:
    """What SGLang asked for.

    Attributes:
        question: for what this holds.
        gate_up, down: the names; both "" where SGLang looks for none, `down` "" where the release has one joint file.
        source: "log" or "asking".
        created: UTC.
        ran: where SGLang looks for none: what runs the experts.
    """

    question: Question
    gate_up: str
    down: str
    source: str
    created: str
    ran: str = ""

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> Asked:
        """The record in a file that may be damaged.

        Raises:
            ValueError: it is none.
        """
        row = parse_json(content)
        if not isinstance(row, dict) or row.pop("schema", None) != SCHEMA:
            raise ValueError("it is no record of an asked-for file")
        question = row.pop("question", None)
        if not isinstance(question, dict) or set(question) != {field.name for field in fields(Question)}:
            raise ValueError("it does not say for what it holds")
        names = {field.name for field in fields(cls)} - {"question"}
        if set(row) != names or not all(_is_text(text) for text in (*row.values(), *question.values())):
            raise ValueError("its parts are not those of a record")
        for name in filter(None, (row["gate_up"], row["down"])):
            check_file_name(name)
        if row["down"] and not row["gate_up"]:
            raise ValueError("it has a down file without a gate-up file")
        return cls(question=Question(**question), **row)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and (value.isprintable() or not value)


def question_of(situation: Situation, kind: int) -> Question:
    """The question that a start on that kind of card puts."""
    flags, model = situation.flags, situation.model
    defaults = type(flags)()
    counting = [(name, getattr(flags, name)) for name in COUNTING_FLAGS]
    config = json.dumps(_plain(model.config), sort_keys=True, separators=(",", ":"))
    quant = json.dumps(_plain(model.quant_config), sort_keys=True, separators=(",", ":"))
    return Question(
        model=model.name,
        config=hashlib.sha256(f"{config}\n{quant}".encode()).hexdigest()[:16],
        card=situation.cards[kind][0].name,
        sglang=situation.tree.version,
        flags=" ".join(f"{name}={value}" for name, value in counting if value != getattr(defaults, name))[:4000],
    )


def _plain(value: Any) -> Any:
    """A frozen JSON value as the json module takes it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def record_path(home: Path, question: Question) -> Path:
    """Where the record of that question is: asked/<model>-<hash>.json."""
    digest = hashlib.sha256(json.dumps(asdict(question), sort_keys=True).encode()).hexdigest()[:16]
    return home / "asked" / f"{safe_name(question.model.rstrip('/').rpartition('/')[2])[:60]}-{digest}.json"


def keep(home: Path, asked: Asked) -> Path:
    """Keep a record, in place of an older one of the same question.

    Raises:
        StoreError: it cannot be written.
    """
    path = record_path(home, asked.question)
    write_atomically(path, asked.to_json().encode())
    return path


def keep_name(path: Path, question: Mapping[str, Any], gate_up: str, down: str) -> None:
    """Keep names that the log spoke of, at a path worked out before.

    Raises:
        StoreError: it cannot be written.
        ValueError: a name is no plain file name.
    """
    asked = Asked(Question(**question), check_file_name(gate_up), down and check_file_name(down), "log", utc_now())
    write_atomically(path, asked.to_json().encode())


def find(home: Path, question: Question) -> tuple[Asked | None, Damaged | None]:
    """The kept record of a question; a damaged one is set aside and reported."""
    asked, damaged = read_or_set_aside(record_path(home, question), Asked.from_json)
    return (asked if asked is not None and asked.question == question else None), damaged


# --- from a name to what is tuned ------------------------------------------------------------------------------------


def decision_for(situation: Situation, kind: int, asked: Asked) -> Decision:
    """The decision of that kind of card, with what SGLang asked for in place of what the rules worked out.

    The name speaks of the first kind of card, whichever kind is meant: SGLang goes by its first card.

    Raises:
        ValueError: the name speaks of a layer that moefix cannot tune; the text says why.
    """
    from fixer.model.rules.decide import Outcome, TRITON, layer_workload
    from fixer.sglang.tree import workload_of_name
    from fixer.workload import Projection

    decision, card, tree = situation.decisions[kind], situation.cards[kind][0], situation.tree
    named = situation.cards[0][0]
    how = "at an earlier start" if asked.source == "log" else "when asked"
    if not asked.gate_up:
        reason = f"SGLang, when asked, looked for no MoE file{': ' + asked.ran if asked.ran else ''}"
        return replace(
            decision, outcome=Outcome.NO_LOOKUP, kernel=asked.ran or decision.kernel, reason=reason, workload=None
        )
    if decision.workload is not None and tree.file_name(decision.workload, named, Projection.GATE_UP) == asked.gate_up:
        reason = f"SGLang looked for {asked.gate_up} {how}, as worked out"
        return replace(decision, outcome=Outcome.ASKS, reason=reason)
    base = decision.workload or layer_workload(situation.model, situation.flags, card, tree.version)
    if base is None:
        raise ValueError(f"the model is dense by its config.json, and yet SGLang asked for {asked.gate_up}")
    workload = workload_of_name(asked.gate_up, base)
    if tree.file_name(workload, named, Projection.GATE_UP) != asked.gate_up:
        raise ValueError(f"SGLang asked for {asked.gate_up}, which is no file for {named.name}")
    reason = f"SGLang looked for {asked.gate_up} {how}; tuning exactly that"
    return replace(decision, outcome=Outcome.ASKS, kernel=TRITON, reason=reason, workload=workload)
