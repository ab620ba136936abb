"""The program behind the figures on style LoRAs, on a network of SDXL's layout made small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.loras import Bench
from benchmarks.shared.unets import Subject
from models.networks import settle
from tests.small_models import make_sdxl_folder

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_it_measures_every_way_and_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    make_sdxl_folder(tmp_path / "sdxl")
    unet = settle(UNet2DConditionModel.from_pretrained(tmp_path / "sdxl" / "unet"), CPU)
    pristine = [parameter.clone() for parameter in unet.parameters()]
    with torch.inference_mode():
        bench = Bench(Subject("small", unet, 8), tmp_path, rank=2)
        switch, step = bench.measure_switches(1), bench.measure_steps(2, 1)
        bench._merge()
    assert min(step.plain_ms, step.merged_ms, step.one_adapter_ms, step.two_adapters_ms) > 0
    assert min(switch.merge_ms, switch.merge_two_ms, switch.restore_ms, switch.adapters_ms, switch.read_ms) > 0
    assert all(torch.equal(one, other) for one, other in zip(pristine, unet.parameters(), strict=True))
