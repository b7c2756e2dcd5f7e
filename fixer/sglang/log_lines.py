"""The lines of SGLang's log that say something of tuning files, as data.

`get_moe_configs` (fused_moe_triton_config.py; 0.4.x: fused_moe.py) writes the look-up's lines, `http_server.py` the one
about being ready, `engine.py` its arguments. What the look-up writes is read off the user's own tree
(`sglang.log_wordings`); the list here is for where there is none, and has the words of all from 0.4.6 to 0.5.23.

Every rank repeats a line behind a prefix of its own, `[2026-11-23 23:48:52 TP1] ` (utils/common.py, configure_logger);
a progress bar's piece may stand before it, ended by a carriage return or by nothing. A line counts only from its
beginning on, so that a prompt inside a line of the request log is none of SGLang's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Said(Enum):
    """What a line says."""

    USING = "reads the file that it looked for"
    FALLBACK = "reads a file of that name in another Triton's folder"
    REUSED_UP = "finds no file of the down projection and takes the gate-up's"
    NO_DOWN = "finds no file of the down projection and goes without (0.5.4 to 0.5.15)"
    DEFAULT = "finds no file"
    DETERMINISTIC = "does not look, for the sake of determinism"
    DENSE_USING = "reads a file of the dense block-wise kernel"
    DENSE_DEFAULT = "finds no file of the dense block-wise kernel"
    READY = "is ready to serve"
    ARGUMENTS = "its arguments, as it resolved them"
    METHOD = "the class that runs the experts"
    SERVED = "a request went through the model"


@dataclass(frozen=True)
class LogLine:
    """One line that counts.

    Attributes:
        said: which.
        wanted: the path that SGLang looked for first, "" where the line names none.
        used: the path that it read, "" for none.
        facts: (name, value) of arguments that decide what runs the experts.
    """

    said: Said
    wanted: str = ""
    used: str = ""
    facts: tuple[tuple[str, str], ...] = ()


MARKERS = (b"MoE", b"fired up", b"server_args=", b"Deterministic inf")
"""A line without any of these says nothing of MoE files: looked for in whole pieces of the log, since that is cheap."""

SERVED_MARKERS = (b"Decode batch", b'" 200')
"""The same for SERVED, which counts only where the server was ready before it had run the model."""

LONGEST_PATH = 4096

Wording = tuple[Said, str]
"""SGLang's words for one thing: %s is a path, %v a version or anything else that is filled in."""

WORDING = {
    Said.USING: "Using MoE kernel config from %s.",
    Said.FALLBACK: "Config file not found at %s. Fallback to triton version %v and use MoE kernel config from %s.",
    Said.REUSED_UP: "Down MoE config file not found at %s;",
    Said.NO_DOWN: "Using MoE kernel config with down_moe=False. Performance might be sub-optimal! "
    "Config file not found at %s,",
    Said.DEFAULT: "Using default MoE kernel config. Performance might be sub-optimal! Config file not found at %s,",
    Said.DETERMINISTIC: "Deterministic inference is enabled, using default MoE kernel config.",
    Said.DENSE_USING: "Using configuration from %s for W8A8 Block %v kernel.",
    Said.DENSE_DEFAULT: "Using default W8A8 Block %v kernel config. Performance might be sub-optimal! "
    "Config file not found at %s",
    Said.READY: "The server is fired up and ready to roll!",
}
"""The words of the known releases. The tests hold them against the releases' sources."""


def _pattern(said: Said, words: str) -> re.Pattern[str]:
    """The words as an expression for a line's beginning; the paths are `wanted` and `used`."""
    names = iter({Said.USING: ["used"], Said.DENSE_USING: ["used"]}.get(said, ["wanted", "used"]))
    parts = re.split("(%s|%v)", words)
    # No control character: a zero byte in a path is nothing that any file system has.
    path = rf"[^\x00-\x1f\x7f]{{1,{LONGEST_PATH}}}?\.json"
    version = "[0-9A-Za-z.+_-]{1,80}"
    filled = (f"(?P<{next(names)}>{path})" if part == "%s" else version if part == "%v" else "" for part in parts)
    return re.compile("".join(text or re.escape(part) for text, part in zip(filled, parts, strict=True)))


_FIXED = (
    (Said.ARGUMENTS, re.compile(r"server_args=(?:ServerArgs\(|\{)")),
    # compressed_tensors.py and quark.py, logger.info_once.
    (Said.METHOD, re.compile(r"Using (?P<method>(?:CompressedTensors|Quark)\w*MoE\w*)")),
    # scheduler's metrics; uvicorn's access log. The server's own warm-up comes before READY.
    (Said.SERVED, re.compile(r'Decode batch\b|INFO: +\S{1,80} - "POST /(?:generate|v1/[a-z/]+) HTTP/1\.1" 200')),
)

Patterns = tuple[tuple[Said, re.Pattern[str]], ...]


def patterns_for(wordings: Iterable[Wording] = ()) -> Patterns:
    """What to look for: a tree's own words (`log_wordings.wordings_of`) first, then those of the known releases."""
    words = dict.fromkeys((*((said, text) for said, text in wordings), *WORDING.items()))
    return (*((said, _pattern(said, text)) for said, text in words), *_FIXED)


_KNOWN = patterns_for()

DECIDING = ("moe_runner_backend", "moe_a2a_backend", "enable_deterministic_inference", "quantization")
"""Server arguments that decide what runs the experts."""

# 0.4.9 and 0.5.17 print a dataclass (name='value'), 0.5.23 a dict ('name': 'value').
_FACT = re.compile(r"\b(?P<name>{})'?(?:=|: )'?(?P<value>[A-Za-z0-9_.-]{{1,60}})".format("|".join(DECIDING)))

_PREFIX = r"\[20\d\d-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{3})?(?: [A-Za-z][\w:-]{0,40}){0,8}\] "
_BAR = r"[^\[\]|\r\n]{0,200}\d{1,3}%\|[^|\r\n]{0,300}\| ?[^\[\]\r\n]{0,60}(?:\[[^\[\]\r\n]{0,120}\])?"
_OWN = re.compile(rf"(?:{_BAR})?{_PREFIX}")
_REQUEST = re.compile(r"(?:Receive|Finish)[ \w]{0,40}: obj=|\{")


def own_message(line: str) -> str | None:
    """What SGLang wrote in a line behind its own prefix, None where the line does not begin with one."""
    found = _OWN.match(line, line.rfind("\r", 0, len(line.rstrip("\r"))) + 1)
    return line[found.end() :] if found else None


def is_request(message: str) -> bool:
    """Whether a message is one of the request log's (`--log-requests`), which has what a user or the model wrote."""
    return _REQUEST.match(message) is not None


def read_line(text: str, patterns: Patterns = _KNOWN) -> LogLine | None:
    """What a line of the log says, with or without SGLang's prefix; None where it says nothing that counts."""
    message = own_message(text)
    if message is None:
        message = text[text.rfind("\r", 0, len(text.rstrip("\r"))) + 1 :]
    for said, pattern in patterns:
        found = pattern.match(message)
        if found is None:
            continue
        named = found.groupdict()
        facts: tuple[tuple[str, str], ...] = ()
        if said is Said.ARGUMENTS:
            facts = tuple((match["name"], match["value"]) for match in _FACT.finditer(message, found.end()))
        elif said is Said.METHOD:
            facts = (("method", named["method"]),)
        return LogLine(said, named.get("wanted") or "", named.get("used") or "", facts)
    return None


QUIET_LEVELS = ("warning", "error", "critical")
"""`--log-level` values at which USING and READY are not written."""
