"""FAKE_ANSWER: the names to ask for, "" for another kernel, "refuses: WORDS", "dies" or "hangs"."""

import json
import os
import sys
import time


def main(questions: int, answers: int) -> None:
    with os.fdopen(questions) as file:
        asked = json.load(file)
    with open(os.environ["RECORD"] + ".asked", "a") as record:
        record.write(json.dumps({"argv": asked["questions"][0]["argv"], "pid": os.getpid()}) + "\n")
    said = os.environ.get("FAKE_ANSWER", "dies")
    if said == "hangs":
        time.sleep(600)
    if said == "dies":
        sys.exit("RuntimeError: no such card")
    row = {"outcome": "looked", "release": "0.5.17"}
    if said.startswith("refuses: "):
        row = {"outcome": "load_error", "reason": said.removeprefix("refuses: "), "release": "0.5.17"}
    else:
        names = [
            {"E": 8, "N": 64, "dtype": None, "block_shape": None, "per_channel_quant": False, "name": name}
            for name in said.split("|")
            if name
        ]
        layer = {"layers": 48, "names": [], "hidden": 128, "top_k": 2, "activation": "bfloat16"}
        layer |= {"layer_class": "FusedMoE", "method": "Fp8MoEMethod", "scheme": ""}
        layer |= {
            "runner": "" if names else "marlin",
            "looked_up": False,
            "ended": [],
            "fault": "",
            "weights_fault": "",
        }
        row["experts"] = [layer | {"asked": [name | {"down": "_down" in name["name"]} for name in names]}]
    os.write(answers, json.dumps(row).encode() + b"\n")
