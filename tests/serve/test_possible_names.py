"""Names that another kernel looked for, or nobody, told from those of this model."""

import pytest

from fixer.serve.possible_names import Limits, why_not

LIMITS = Limits(experts=192, width=2048)


@pytest.mark.parametrize(
    ("name", "kernel", "why"),
    [
        ("E=128,N=768,device_name=X.json", "", ""),
        ("E=192,N=2048,device_name=X,dtype=fp8_w8a8,block_shape=[128, 128].json", "", ""),
        ("E=128,N=768,device_name=X,dtype=int8_w8a8,per_channel_quant=True.json", "marlin", ""),
        ("E=128,N=768,device_name=X.json", "Marlin", "Marlin kernel"),
        ("E=193,N=768,device_name=X.json", "", "at most 192 experts"),
        ("E=128,N=4096,device_name=X.json", "", "at most 2048 wide"),
        ("N=128,K=4096,device_name=X.json", "", "no name"),
        ("E=1,N=1,device_name=X.json/../y.json", "", "no name"),
        ("", "", "no name"),
    ],
)
def test_names(name, kernel, why):
    said = why_not(name, LIMITS, kernel)
    assert why in said
    assert bool(said) is bool(why)


def test_without_limits_any_name_of_that_form_can_be():
    assert why_not("E=99999,N=99999,device_name=X.json", Limits()) == ""


def test_folders(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "configs")
    limits, name = Limits((str(tmp_path / "configs"),)), "E=8,N=64,device_name=X.json"
    assert why_not(f"{tmp_path}/configs/triton_3_6_0/{name}", limits) == ""
    assert why_not(f"{tmp_path}/link/{name}", limits) == ""
    for place in ("configs2", "configs/../else", "."):
        assert "no folder where this SGLang looks" in why_not(f"{tmp_path}/{place}/{name}", limits)
