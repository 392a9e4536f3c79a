"""What version 0.1 gave for the embedded base, under the names of its modes: numbers that its code printed."""

import pytest
import torch

from fixclip_core import builtin, scenes
from fixclip_diffusion import FixClipStableDiffusionPipeline
from fixclip_diffusion.conditioning import ALIASES

TEXTS = {
    name: scenes.long_caption(scenes.sample_scene(f"s{number}", num_objects=objects), 0).text
    for name, number, objects in (("short", 0, 2), ("mid", 1, 4))
}
# mode, text and clip_skip: shape, mean and standard deviation of the embeds, and three of their entries.
EMBEDS = {
    "truncate_77 short None": ((77, 192), -0.000559, 1.122823, (-0.0623, 0.0423, -0.96383)),
    "truncate_77 short 1": ((77, 192), -0.001143, 1.120507, (0.68652, -0.24942, -0.56006)),
    "truncate_77 mid None": ((77, 192), 0.00028, 1.122189, (0.05639, 0.30875, 1.8688)),
    "truncate_77 mid 1": ((77, 192), -0.000929, 1.118205, (0.53136, 0.45878, 1.1251)),
    "windows_77 short None": ((77, 192), -0.000559, 1.122823, (-0.0623, 0.0423, -0.96383)),
    "windows_77 short 1": ((77, 192), -0.001143, 1.120507, (0.68652, -0.24942, -0.56006)),
    "windows_77 mid None": ((77, 192), 0.00028, 1.122189, (0.05639, 0.30875, 1.8688)),
    "windows_77 mid 1": ((77, 192), -0.000929, 1.118205, (0.53136, 0.45878, 1.1251)),
    "overlap_77 short None": ((77, 192), -0.000559, 1.122823, (-0.0623, 0.0423, -0.96383)),
    "overlap_77 short 1": ((77, 192), -0.001143, 1.120507, (0.68652, -0.24942, -0.56006)),
    "overlap_77 mid None": ((77, 192), 0.00028, 1.122189, (0.05639, 0.30875, 1.8688)),
    "overlap_77 mid 1": ((77, 192), -0.000929, 1.118205, (0.53136, 0.45878, 1.1251)),
}


@pytest.fixture(scope="module")
def pipe():
    if not builtin.is_available():
        pytest.skip("this copy has no embedded weights")
    return FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes/base")


@torch.no_grad()
@pytest.mark.parametrize("case", EMBEDS)
def test_embeds_are_those_of_version_0_1(pipe, case):
    mode, text, skip = case.split()
    shape, mean, std, entries = EMBEDS[case]
    pipe.conditioning = ALIASES[mode]
    clip_skip = None if skip == "None" else int(skip)
    embeds = pipe.encode_prompt(TEXTS[text], "cpu", 1, False, clip_skip=clip_skip)[0][0]
    assert tuple(embeds.shape) == shape
    found = (embeds.mean(), embeds.std(), embeds[1, 3], embeds[20, 100], embeds[-1, -1])
    assert [float(value) for value in found] == pytest.approx([mean, std, *entries], abs=1e-4)
