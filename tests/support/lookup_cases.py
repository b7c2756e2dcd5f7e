"""Models, cards and flags with the file that SGLang asks for: data/lookup-cases.json."""

import json
from pathlib import Path
from typing import Any

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "lookup-cases.json").read_text()
)
