"""The lines of SGLang's log that say something of MoE files, as data; read off 0.4.9, 0.5.17 and 0.5.23.

`fused_moe_triton_config.py` (0.4.9: `fused_moe.py`), `get_moe_configs`, writes the look-up's lines; `http_server.py`
the one about being ready; `engine.py` its arguments. A line may follow a progress bar's piece (with a carriage return,
or with nothing at all), and every rank repeats it behind a prefix of its own: `[2026-11-23 23:48:52 TP1] `.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Said(Enum):
    """What a line says."""

    USING = "reads the file that it looked for"
    FALLBACK = "reads a file of that name in another Triton's folder"
    REUSED_UP = "finds no file of the down projection and takes the gate-up's"
    DEFAULT = "finds no file"
    DETERMINISTIC = "does not look, for the sake of determinism"
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
"""A line without any of these says nothing that counts: looked for in whole pieces of the log, since that is cheap."""

SERVED_MARKERS = (b"Decode batch", b'" 200')
"""The same for SERVED, which counts only where the server was ready before it had run the model."""

LONGEST_PATH = 4096


def _pattern(text: str, *names: str) -> re.Pattern[str]:
    """The words as an expression, each %s a path kept under the next of the names, %v a version."""
    path = rf"[^\r\n]{{1,{LONGEST_PATH}}}?\.json"
    words = re.escape(text).replace("%v", "[0-9A-Za-z.+_]+")
    for name in names:
        words = words.replace("%s", f"(?P<{name}>{path})", 1)
    return re.compile(words)


WORDING = {
    Said.USING: "Using MoE kernel config from %s.",
    Said.FALLBACK: "Config file not found at %s. Fallback to triton version %v and use MoE kernel config from %s.",
    Said.REUSED_UP: "Down MoE config file not found at %s; reusing the tuned up-projection config",
    Said.DEFAULT: "Using default MoE kernel config. Performance might be sub-optimal! Config file not found at %s,",
    Said.DETERMINISTIC: "Deterministic inference is enabled, using default MoE kernel config.",
    Said.READY: "The server is fired up and ready to roll!",
}
"""SGLang's words: %s is a path, %v a version. The tests hold them against the three releases' sources."""

_PATTERNS = (
    (Said.USING, _pattern(WORDING[Said.USING], "used")),
    (Said.FALLBACK, _pattern(WORDING[Said.FALLBACK], "wanted", "used")),
    (Said.REUSED_UP, _pattern(WORDING[Said.REUSED_UP], "wanted")),
    (Said.DEFAULT, _pattern(WORDING[Said.DEFAULT], "wanted")),
    (Said.DETERMINISTIC, _pattern(WORDING[Said.DETERMINISTIC])),
    (Said.READY, _pattern(WORDING[Said.READY])),
    (Said.ARGUMENTS, re.compile(r"\bserver_args=(?:ServerArgs\(|\{)")),
    # compressed_tensors.py and quark.py, logger.info_once.
    (Said.METHOD, re.compile(r"\] Using (?P<method>(?:CompressedTensors|Quark)\w*MoE\w*)")),
    # scheduler's metrics; uvicorn's access log. The server's own warm-up comes before READY.
    (Said.SERVED, re.compile(r'\] Decode batch\b|"POST /(?:generate|v1/[a-z/]+) HTTP/1\.1" 200')),
)

DECIDING = ("moe_runner_backend", "moe_a2a_backend", "enable_deterministic_inference", "quantization")
"""Server arguments that decide what runs the experts."""

# 0.4.9 and 0.5.17 print a dataclass (name='value'), 0.5.23 a dict ('name': 'value').
_FACT = re.compile(r"\b(?P<name>{})'?(?:=|: )'?(?P<value>[A-Za-z0-9_.-]{{1,60}})".format("|".join(DECIDING)))


def read_line(text: str) -> LogLine | None:
    """What a line of the log says, None where it says nothing that counts."""
    for said, pattern in _PATTERNS:
        found = pattern.search(text)
        if found is None:
            continue
        named = found.groupdict()
        facts: tuple[tuple[str, str], ...] = ()
        if said is Said.ARGUMENTS:
            facts = tuple((match["name"], match["value"]) for match in _FACT.finditer(text, found.end()))
        elif said is Said.METHOD:
            facts = (("method", named["method"]),)
        return LogLine(said, named.get("wanted") or "", named.get("used") or "", facts)
    return None


QUIET_LEVELS = ("warning", "error", "critical")
"""`--log-level` values at which USING and READY are not written."""
