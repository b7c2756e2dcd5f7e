from __future__ import annotations

from dataclasses import replace

import pytest

from fixer.artefacts.vllm import approximations, vllm_file_name, vllm_table
from fixer.workload import NumberFormat, Workload
from tests.support.artefacts import LARGE, RTX_4090, SMALL, artefact_of, renamed

BF16 = Workload(128, 768, 2048, 8)


# The names below are of files that vLLM ships, or of its log lines.
@pytest.mark.parametrize(
    ("workload", "card", "name"),
    [
        (Workload(8, 14336, 4096, 2), "NVIDIA A100-SXM4-80GB", "E=8,N=14336,device_name=NVIDIA_A100-SXM4-80GB.json"),
        (
            Workload(256, 128, 7168, 8, NumberFormat.FP8_W8A8, block_shape=(128, 128)),
            "NVIDIA H100 80GB HBM3",
            "E=256,N=128,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
        (
            replace(BF16, number_format=NumberFormat.FP8_W8A8, per_channel_quant=True),
            "NVIDIA GeForce RTX 4090",
            "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8.json",
        ),
        # One file for the family; without the blanks around it H200 is another word.
        (BF16, "NVIDIA H200 NVL", "E=128,N=768,device_name=NVIDIA_H200.json"),
        (BF16, "NVIDIA GH200 480GB", "E=128,N=768,device_name=NVIDIA_GH200_480GB.json"),
        # Packed: N in bytes here, in weights there.
        (
            Workload(256, 256, 7168, 8, NumberFormat.INT4_W4A16, group_size=128),
            "NVIDIA H20",
            "E=256,N=512,device_name=NVIDIA_H20,dtype=int4_w4a16.json",
        ),
        (
            Workload(16, 1792, 4096, 2, NumberFormat.INT8_W8A16),
            "NVIDIA L40S",
            "E=16,N=1792,device_name=NVIDIA_L40S,dtype=int8_w8a16.json",
        ),
        (replace(BF16, number_format=NumberFormat.INT8_W8A8), "NVIDIA L20", "E=128,N=768,device_name=NVIDIA_L20.json"),
    ],
)
def test_the_names_are_vllms(workload, card, name):
    assert str(vllm_file_name(workload, card)) == name


def test_one_tile_for_both_and_what_that_leaves_out(trees, models):
    artefact = artefact_of(trees["0.5.17"], ("--model", str(models["q3_30b_bf16_tp1_h100"])), RTX_4090)
    table = vllm_table(artefact)
    assert list(table) == [row.batch for row in artefact.rows]
    assert (table[1], table[64]) == (SMALL, LARGE)
    said = " ".join(approximations(artefact))
    large = sum(row.batch >= 64 for row in artefact.rows)
    assert f"in {large} of {len(artefact.rows)} rows" in said
    assert "scale per channel" not in said
    scaled = replace(artefact.workload, number_format=NumberFormat.FP8_W8A8, per_channel_quant=True)
    assert "scale per channel" in " ".join(approximations(renamed(artefact, workload=scaled)))


@pytest.mark.parametrize("card", ["x/../../victim/config", "/etc/x", "a\\b", "a\x00b", "a\nb", "x" * 300])
def test_a_card_that_leads_out_of_the_folder_is_in_no_name(card):
    with pytest.raises(ValueError, match="no file name"):
        vllm_file_name(BF16, card)
