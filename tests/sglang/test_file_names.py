"""The names that follow from a layer are those that each release asks for."""

from typing import Any

from fixer.machine.cards import find_card
from fixer.model.config import load_model
from fixer.model.rules.decide import decide
from fixer.sglang.file_names import pairs_of_names
from fixer.sglang.flags import parse_flags


def test_each_release_asks_for_one_of_the_pairs(trees: Any, cases: Any, models: Any) -> None:
    asked = 0
    for name, case in cases.items():
        flags = parse_flags(case["flags"])
        model, card = load_model(str(models[name]), flags), find_card(case["gpu"]["name"])
        for tree in trees.values():
            workload = decide(model, flags, card, tree.version).workload
            if workload is None:
                continue
            lookup, pairs = tree.lookup(workload, card), pairs_of_names(workload, card.name)
            assert lookup.gate_up in {up for up, _ in pairs}
            assert not lookup.down or (lookup.gate_up, lookup.down) in pairs
            asked += 1
    assert asked >= 40
