from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.base.errors import CardError, UsageError
from fixer.machine import cards, driver
from fixer.machine.cards import Card, find_card, kinds, known_cards, with_shared_memory_limit
from fixer.machine.driver import visible_cards
from fixer.machine.nvml import Occupancy
from tests.support.fake_driver import build_driver

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import dataclasses, json, sys, time
from fixer.base.errors import CardError
from fixer.machine.driver import visible_cards
from fixer.machine.nvml import Occupancy
began = time.monotonic()
try:
    cards = [dataclasses.asdict(card) for card in visible_cards()]
except CardError as fault:
    cards = fault.message
print(json.dumps({"cards": cards, "torch": "torch" in sys.modules, "seconds": time.monotonic() - began}))
"""


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


def seen(folder, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "FAKE_"))}
    env = {**clean, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), **environ}
    child = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True)
    return json.loads(child.stdout)


def test_two_kinds_of_cards_are_read_from_the_driver(driver_folder):
    answer = seen(driver_folder)
    assert answer["cards"] == [
        {
            "name": "NVIDIA GeForce RTX 4090",
            "capability": [8, 9],
            "shared_memory": 101376,
            "memory_mib": 24564,
            "index": 0,
            "driver": "580.159.03",
        },
        {
            "name": "NVIDIA H100 80GB HBM3",
            "capability": [9, 0],
            "shared_memory": 232448,
            "memory_mib": 81559,
            "index": 1,
            "driver": "580.159.03",
        },
    ]
    assert not answer["torch"]
    assert answer["seconds"] < 1


def test_visible_devices_choose_and_keep_their_own_memory(driver_folder):
    cards = seen(driver_folder, CUDA_VISIBLE_DEVICES="1,0")["cards"]
    assert [(card["name"], card["memory_mib"], card["index"]) for card in cards] == [
        ("NVIDIA H100 80GB HBM3", 81559, 0),
        ("NVIDIA GeForce RTX 4090", 24564, 1),
    ]
    assert seen(driver_folder, CUDA_VISIBLE_DEVICES="")["cards"] == []


def test_a_mig_slice_has_its_own_memory_not_the_whole_cards(driver_folder):
    (card,) = seen(driver_folder, CUDA_VISIBLE_DEVICES="2")["cards"]
    assert (card["name"], card["memory_mib"]) == ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10468982784 >> 20)


def test_without_nvml_memory_comes_from_cuda(driver_folder):
    cards = seen(driver_folder, FAKE_NVML="1")["cards"]
    assert [card["memory_mib"] for card in cards] == [25386352640 >> 20, 84929347584 >> 20]


def test_a_driver_error_is_named(driver_folder):
    message = seen(driver_folder, FAKE_CUINIT="803")["cards"]
    assert "803" in message
    assert "unsupported display driver / cuda driver combination" in message
    assert "cuInit" in message
    assert "999" in seen(driver_folder, FAKE_CUINIT="999")["cards"]
    assert "cuDeviceGetAttribute" in seen(driver_folder, FAKE_ATTRIBUTE="1")["cards"]


@pytest.mark.parametrize("code", ["100", "34"])
def test_no_device_and_stub_library_are_no_card(driver_folder, code):
    assert seen(driver_folder, FAKE_CUINIT=code)["cards"] == []


def test_no_driver_is_no_card(monkeypatch):
    monkeypatch.setattr(driver, "_CUDA_LIBRARY", "libcuda-that-is-not-there.so.1")
    assert visible_cards() == ()


def test_a_library_that_is_no_driver_is_an_error(monkeypatch):
    monkeypatch.setattr(driver, "_CUDA_LIBRARY", "libc.so.6")
    with pytest.raises(CardError, match="cuInit"):
        visible_cards()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("geforce-rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA_GeForce_RTX_4090", "NVIDIA GeForce RTX 4090"),
        ("4090 D", "NVIDIA GeForce RTX 4090 D"),
        ("RTX4090D", "NVIDIA GeForce RTX 4090 D"),
        ("4090 laptop", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("3080Ti", "NVIDIA GeForce RTX 3080 Ti"),
        ("3080", "NVIDIA GeForce RTX 3080"),
        ("4070 ti super", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("H100", "NVIDIA H100 80GB HBM3"),
        ("h100-pcie", "NVIDIA H100 PCIe"),
        ("H100 NVL", "NVIDIA H100 NVL"),
        ("H200", "NVIDIA H200"),
        ("A100", "NVIDIA A100-SXM4-80GB"),
        ("A100 40GB", "NVIDIA A100-SXM4-40GB"),
        ("a100 pcie", "NVIDIA A100 80GB PCIe"),
        ("A10", "NVIDIA A10"),
        ("l40s", "NVIDIA L40S"),
        ("T4", "Tesla T4"),
        ("RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("rtx pro 6000 max-q", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
        ("RTX PRO 6000 Blackwell Server Edition", "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("A6000", "NVIDIA RTX A6000"),
        ("spark", "NVIDIA GB10"),
        ("DGX Spark", "NVIDIA GB10"),
        ("gb10", "NVIDIA GB10"),
        ("Jetson Thor", "NVIDIA Thor"),
        ("b300", "NVIDIA B300 SXM6 AC"),
    ],
)
def test_names_as_people_write_them(text, name):
    assert find_card(text).name == name


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("RTX 6000", "NVIDIA RTX 6000 Ada Generation"),
        ("4091", "NVIDIA GeForce RTX 4090"),
        ("Blackwell", "NVIDIA RTX PRO 5000 Blackwell"),
        ("RTX PRO 6001", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
    ],
)
def test_unknown_and_ambiguous_names_list_near_ones(text, near):
    with pytest.raises(CardError) as caught:
        find_card(text)
    assert near in caught.value.message
    assert "--smem-limit" in caught.value.hint
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "text", ["", "RTX", "  ", "GTX 1080 something", "\x00\x1b[31m", "Radeon RX 7900 XTX", "é" * 5000]
)
def test_nonsense_is_one_short_line(text):
    with pytest.raises(CardError) as caught:
        find_card(text)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_finds_a_card_or_says_so(text):
    try:
        found = find_card(text)
    except CardError as fault:
        message = fault.message
    else:
        message = ""
        assert found in known_cards()
    assert message == "" or message.isprintable()


def test_every_name_of_the_table_finds_its_own_card():
    for card in known_cards():
        assert find_card(card.name).name == card.name
        assert find_card(card.sglang_name).name == card.name


def test_no_key_stands_for_two_names():
    owners: dict[str, str] = {}
    for entry in cards._table():
        for key in entry.keys:
            assert owners.setdefault(key, entry.card.name) == entry.card.name


def test_same_name_with_two_memory_sizes():
    assert (find_card("4060 Ti").memory_mib, find_card("4060 Ti 16GB").memory_mib) == (8188, 16380)


def test_numbers_that_sglang_decides_by():
    wanted = {
        "4090": ((8, 9), 101376, 24564),
        "H100": ((9, 0), 232448, 81559),
        "H200": ((9, 0), 232448, 143771),
        "L40S": ((8, 9), 101376, 46068),
        "RTX PRO 6000": ((12, 0), 101376, 97887),
        "A100": ((8, 0), 166912, 81920),
        "T4": ((7, 5), 65536, 15360),
        "B200": ((10, 0), 232448, 183359),
    }
    for text, (capability, shared, memory) in wanted.items():
        card = find_card(text)
        assert (card.capability, card.shared_memory, card.memory_mib) == (capability, shared, memory)
    assert find_card("4090").sglang_name == "NVIDIA_GeForce_RTX_4090"
    assert find_card("B300").arch == 103


def test_the_names_that_sglang_ships_files_for_are_known():
    shipped = """NVIDIA_H100_80GB_HBM3 NVIDIA_H200 NVIDIA_B200 NVIDIA_A100-SXM4-80GB NVIDIA_H20 NVIDIA_A800-SXM4-80GB
        NVIDIA_H20-3e NVIDIA_L40S NVIDIA_A100-SXM4-40GB NVIDIA_GeForce_RTX_4090 NVIDIA_H800 NVIDIA_L20
        NVIDIA_RTX_PRO_6000_Blackwell_Max-Q_Workstation_Edition NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition
        NVIDIA_RTX_6000_Ada_Generation NVIDIA_RTX_5880_Ada_Generation NVIDIA_GB300 NVIDIA_GB10 NVIDIA_B300_SXM6_AC
        NVIDIA_H200_NVL"""
    assert set(shipped.split()) <= {card.sglang_name for card in known_cards()}


def test_a_limit_only_lowers():
    card = find_card("H100")
    assert with_shared_memory_limit(card, 101376).shared_memory == 101376
    assert with_shared_memory_limit(card, card.shared_memory) == card
    for limit in (card.shared_memory + 1, 0, -1, 99):
        with pytest.raises(UsageError) as caught:
            with_shared_memory_limit(card, limit)
        assert str(card.shared_memory) in caught.value.hint


def test_kinds_group_by_what_a_tuning_depends_on():
    first, second = Card("A", (8, 9), 101376, 1, index=0), Card("B", (9, 0), 232448, 1, index=1)
    third = Card("A", (8, 9), 101376, 2, index=2)
    limited = with_shared_memory_limit(third, 50000)
    assert kinds((first, second, third)) == ((first, third), (second,))
    assert kinds((first, limited)) == ((first,), (limited,))
    assert kinds(()) == ()


@pytest.mark.parametrize(
    ("text", "name", "memory_mib"),
    [
        ("RTX 4090 24GB", "NVIDIA GeForce RTX 4090", 24564),
        ("5090 (32 GB)", "NVIDIA GeForce RTX 5090", 32607),
        ("L40S-48G", "NVIDIA L40S", 46068),
        ("RTX A6000 48 GiB", "NVIDIA RTX A6000", 49140),
        ("RTX 5060 Ti 16GB", "NVIDIA GeForce RTX 5060 Ti", 16311),
        ("B200 180GB", "NVIDIA B200", 183359),
    ],
)
def test_a_name_with_its_memory(text, name, memory_mib):
    card = find_card(text)
    assert (card.name, card.memory_mib) == (name, memory_mib)


@pytest.mark.parametrize("text", ["RTX 4090 48GB", "RTX 3080 12GB", "H100 96GB", "24GB"])
def test_a_name_with_another_memory_is_another_card(text):
    with pytest.raises(CardError):
        find_card(text)


# --- what uses a card ------------------------------------------------------------------------------------------------

OCCUPANCY = """
import dataclasses, json
from fixer.machine.driver import occupancy, visible_cards
for card in visible_cards():
    found = occupancy(card)
    print(json.dumps({**dataclasses.asdict(found), "busy": found.is_busy, "by": found.held_by()}))
"""


def occupied(folder, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "FAKE_"))}
    env = {**clean, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), **environ}
    child = subprocess.run([sys.executable, "-c", OCCUPANCY], env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in child.stdout.splitlines()]


def test_an_idle_card_is_free(driver_folder):
    first, second = occupied(driver_folder)
    assert (first["free_mib"], second["free_mib"]) == (24564, 81559)
    assert (first["busy"], first["busy_percent"], first["holders"]) == (False, 0, [])


def test_who_holds_a_card_is_told_without_its_arguments(driver_folder):
    me = os.getpid()
    (found,) = occupied(
        driver_folder,
        CUDA_VISIBLE_DEVICES="1",
        FAKE_USED_MIB="70000",
        FAKE_BUSY="97",
        FAKE_HOLDERS=f"4242:65000 {me}:300 999999:-1",
    )
    assert found["free_mib"] == 81559 - 70000
    assert (found["busy"], found["busy_percent"]) == (True, 97)
    assert [holder["pid"] for holder in found["holders"]] == [4242, me, 999999]
    assert found["holders"][0] == {"pid": 4242, "name": "python3", "mib": 65000}
    assert found["holders"][1]["name"] == Path("/proc/self/comm").read_text().strip()
    assert found["holders"][2] == {"pid": 999999, "name": "", "mib": None}
    assert "process 4242 (python3) with 65000 MiB" in found["by"]
    assert "secret" not in json.dumps(found)


def test_more_holders_than_can_be_listed_are_counted(driver_folder):
    many = " ".join(f"{pid}:{pid - 100000}" for pid in range(100001, 100011))
    (found,) = occupied(driver_folder, CUDA_VISIBLE_DEVICES="1", FAKE_HOLDERS=many)
    assert found["by"].startswith("by process 100010 with 10 MiB, ")
    assert found["by"].endswith(" and 6 more")


def test_without_nvml_or_on_a_slice_nothing_is_known(driver_folder):
    for environ in ({"FAKE_NVML": "1", "CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "2"}):
        (found,) = occupied(driver_folder, **environ)
        assert (found["free_mib"], found["busy"], found["holders"]) == (None, False, [])
    assert driver.occupancy(find_card("4090")) == Occupancy()
