"""What version 0.1's code gives for the embedded base, under the names of its modes: numbers that it printed."""

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
    "truncate_77 short None": ((77, 192), -0.001397, 1.119381, (0.76756, -0.25350, -1.47619)),
    "truncate_77 short 1": ((77, 192), -0.001048, 1.114416, (-0.99685, 0.03656, -1.55226)),
    "truncate_77 mid None": ((77, 192), -0.001742, 1.121702, (1.35867, 1.96769, -0.50277)),
    "truncate_77 mid 1": ((77, 192), -0.001278, 1.117510, (-0.67431, 1.04434, -1.18736)),
    "windows_77 short None": ((77, 192), -0.001397, 1.119381, (0.76756, -0.25350, -1.47619)),
    "windows_77 short 1": ((77, 192), -0.001048, 1.114416, (-0.99685, 0.03656, -1.55226)),
    "windows_77 mid None": ((77, 192), -0.001742, 1.121702, (1.35867, 1.96769, -0.50277)),
    "windows_77 mid 1": ((77, 192), -0.001278, 1.117510, (-0.67431, 1.04434, -1.18736)),
    "overlap_77 short None": ((77, 192), -0.001397, 1.119381, (0.76756, -0.25350, -1.47619)),
    "overlap_77 short 1": ((77, 192), -0.001048, 1.114416, (-0.99685, 0.03656, -1.55226)),
    "overlap_77 mid None": ((77, 192), -0.001742, 1.121702, (1.35867, 1.96769, -0.50277)),
    "overlap_77 mid 1": ((77, 192), -0.001278, 1.117510, (-0.67431, 1.04434, -1.18736)),
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
