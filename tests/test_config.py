"""FixClipConfig: JSON round trip, and errors that name the value."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixclip_core.model.config import FINE_TUNE, LONG_CLIP, FixClipConfig

CLIP = {"embed_dim": 8, "vision_cfg": {"layers": 4}, "text_cfg": {"context_length": 77}}


@given(
    keep=st.integers(0, 75),
    ratio=st.integers(1, 5),
    positions=st.sampled_from(["stretched", "kept"]),
    lora_rank=st.integers(0, 64),
    num_prompts=st.integers(0, 9),
    prompt_flow=st.sampled_from(["carry", "replace"]),
    short_branch=st.sampled_from(["masked", "pca", "off"]),
    masking=st.sampled_from(["replace", "drop", "none"]),
    mask_ratio=st.floats(0.01, 0.99),
    groups=st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
)
def test_json_round_trip(
    keep, ratio, positions, lora_rank, num_prompts, prompt_flow, short_branch, masking, mask_ratio, groups
):
    config = FixClipConfig(
        clip=CLIP,
        preprocess={"size": (224, 224), "mean": (0.5, 0.5, 0.5)},
        keep=keep,
        ratio=ratio,
        positions=positions,
        lora_rank=lora_rank,
        num_prompts=num_prompts,
        prompt_flow=prompt_flow,
        short_branch=short_branch,
        masking=masking,
        mask_ratio=mask_ratio,
        num_groups=groups[0],
        first_group=groups[1],
    )
    assert FixClipConfig.from_json(config.to_json()) == config
    assert FixClipConfig.from_dict(config.to_dict()) == config
    assert config.context_length == keep + (77 - keep) * ratio


def test_configurations_from_before_an_option_load():
    before = FixClipConfig(clip=CLIP).to_dict()
    del before["positions"], before["lora_rank"]
    assert FixClipConfig.from_dict(before) == FixClipConfig(clip=CLIP, positions="stretched")


def test_defaults_read_248_tokens():
    assert FixClipConfig(clip=CLIP).context_length == 248
    assert FixClipConfig(clip=CLIP, context_length=248).context_length == 248
    without = {key: value for key, value in CLIP.items() if key != "text_cfg"} | {"text_cfg": {}}
    assert FixClipConfig(clip=without).base_context_length == 77, "open_clip's own default"


def test_configuration_does_not_share_the_callers_dict():
    clip = json.loads(json.dumps(CLIP))
    config = FixClipConfig(clip=clip)
    clip["vision_cfg"]["layers"] = 99
    assert config.clip["vision_cfg"]["layers"] == 4


def test_baselines_are_configurations():
    assert not FixClipConfig(clip=CLIP, **LONG_CLIP).short_is_encoded
    assert not FixClipConfig(clip=CLIP, **FINE_TUNE).short_is_encoded
    assert FixClipConfig(clip=CLIP).short_is_encoded
    assert not FixClipConfig(clip=CLIP, masking="none").short_is_encoded


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_length": 77}, "context_length=77.*make 248"),
        ({"keep": 78}, "keep=78"),
        ({"ratio": 0}, "ratio=0"),
        ({"positions": "keep"}, "positions=keep.*stretched, kept"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"num_prompts": -1}, "num_prompts=-1"),
        ({"prompt_flow": "cary"}, "prompt_flow=cary.*carry, replace"),
        ({"short_branch": "on"}, "short_branch=on.*masked, pca, off"),
        ({"masking": "zero"}, "masking=zero.*replace, drop, none"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1\.0"),
        ({"pca_rank": 0}, "pca_rank=0"),
        ({"num_groups": -2}, "num_groups=-2"),
        ({"num_groups": 2, "first_group": 3}, "first_group=3.*between 1 and 2"),
        ({"hierarchy_branch": "both"}, "hierarchy_branch=both"),
        ({"hierarchy_branch": "short", "short_branch": "pca"}, "hierarchy_branch=short.*short_branch=pca"),
        ({"clip": {"embed_dim": 8}}, "lacks.*vision_cfg.*text_cfg"),
        ({"keep": "abc"}, "keep='abc': it must be a whole number"),
        ({"ratio": None}, "ratio=None: it must be a whole number"),
        ({"num_groups": 2.5}, r"num_groups=2\.5: it must be a whole number"),
        ({"num_prompts": True}, "num_prompts=True: it must be a whole number"),
        ({"mask_ratio": "x"}, "mask_ratio='x': it must be a number"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        FixClipConfig(**{"clip": CLIP} | fields)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(ValueError, match=r"'num_prompt'.*'num_prompts'"):
        FixClipConfig.from_dict({"clip": CLIP, "num_prompt": 2})
    with pytest.raises(ValueError, match=r"'xyz'.*valid are .*clip, preprocess"):
        FixClipConfig.from_dict({"clip": CLIP, "xyz": 2})
    with pytest.raises(ValueError, match="needs the key 'clip'"):
        FixClipConfig.from_dict({"keep": 2})
