"""Lines as SGLang's log has them, and what a server with tuned files is expected to say."""

from __future__ import annotations

from fixer.serve.log.verdict import Expected
from fixer.sglang.log_lines import WORDING, Said

STAMP = "[2026-11-23 23:48:52 TP0] "


def line_of(said, *paths):
    text = WORDING[said].replace("%v", "FP8" if said in (Said.DENSE_USING, Said.DENSE_DEFAULT) else "3.5.1")
    for path in paths:
        text = text.replace("%s", path, 1)
    return text


FOLDER = "/s/configs/triton_3_6_0"


UP, DOWN = "E=8,N=64,device_name=X.json", "E=8,N=64,device_name=X_down.json"


OTHER, OTHER_DOWN = "E=8,N=64,device_name=X,dtype=fp8_w8a8.json", "E=8,N=64,device_name=X,dtype=fp8_w8a8_down.json"


EXPECTED = Expected(pairs=((f"{FOLDER}/{UP}", f"{FOLDER}/{DOWN}"),), names=((UP, DOWN),), reason="SGLang looks")


def using(name, folder=FOLDER):
    return line_of(Said.USING, f"{folder}/{name}")


def missing(name, folder=FOLDER):
    return line_of(Said.DEFAULT, f"{folder}/{name}") + " you can"


READY = line_of(Said.READY)
