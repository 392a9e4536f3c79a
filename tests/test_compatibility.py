"""Everything that stock diffusers can do still works with the two components swapped, on tiny real models."""

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTextEncoder,
    FixClipTokenizer,
)
from fixclip_diffusion.prompt_encoder import pad_states
from fixclip_diffusion.state_mask import mask_empty_states

LONG = tiny.sentences(14)
OTHER_END = LONG.replace("number 13", "number 12")


@pytest.fixture(scope="module")
def components(sd1):
    """The two components, swapped in as a user would."""
    return {
        "text_encoder": FixClipTextEncoder.from_pretrained(sd1, subfolder="text_encoder"),
        "tokenizer": FixClipTokenizer.from_pretrained(sd1, subfolder="tokenizer"),
    }


@pytest.fixture
def ours(sd1):
    return quiet(FixClipStableDiffusionPipeline.from_pretrained(sd1))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed():
    return torch.Generator().manual_seed(1)


def picture(pipe, prompt, **kwargs):
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "generator": seed()}
    return pipe(prompt, **{**settings, **kwargs}).images[0]


def random_image(channels=3):
    array = np.random.default_rng(0).integers(0, 255, (16, 16, channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze())


def assert_the_end_counts(call):
    """The words behind token 77 change the result, in the prompt and in the negative prompt."""
    first = np.asarray(call(prompt=LONG, negative_prompt="bad"))
    assert np.isfinite(first).all()
    assert not np.array_equal(first, call(prompt=OTHER_END, negative_prompt="bad"))
    assert not np.array_equal(call(prompt="a", negative_prompt=LONG), call(prompt="a", negative_prompt=OTHER_END))


# Other pipelines, by swapping the two components.


def test_text_to_image(sd1, components):
    pipe = quiet(StableDiffusionPipeline.from_pretrained(sd1, **components))
    assert_the_end_counts(lambda **kwargs: picture(pipe, **kwargs))


def test_image_to_image(sd1, components):
    pipe = quiet(StableDiffusionImg2ImgPipeline.from_pretrained(sd1, **components))
    common = {"image": random_image(), "strength": 0.9, "num_inference_steps": 3, "output_type": "np"}
    assert_the_end_counts(lambda **kwargs: pipe(**common, **kwargs, generator=seed()).images[0])


def test_inpainting(sd1, components):
    pipe = quiet(StableDiffusionInpaintPipeline.from_pretrained(sd1, **components))
    common = {"image": random_image(), "mask_image": random_image(1), "height": 16, "width": 16}
    common |= {"num_inference_steps": 2, "output_type": "np"}
    assert_the_end_counts(lambda **kwargs: pipe(**common, **kwargs, generator=seed()).images[0])


def test_controlnet(sd1, components):
    stock = StableDiffusionPipeline.from_pretrained(sd1, **components)
    controlnet = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(8, 16))
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.5)  # zeros in a new one, which does nothing then
    pipe = quiet(
        StableDiffusionControlNetPipeline(**stock.components, controlnet=controlnet, requires_safety_checker=False)
    )
    common = {"image": random_image(), "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    assert_the_end_counts(lambda **kwargs: pipe(**common, **kwargs, generator=seed()).images[0])


def test_animatediff(sd1, components):
    motion = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    pipe = quiet(AnimateDiffPipeline.from_pretrained(sd1, motion_adapter=motion, **components))
    common = {"num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    assert_the_end_counts(lambda **kwargs: pipe(**common, **kwargs, generator=seed()).frames[0])
    embeds_BLD, negative_BLD = (torch.randn(1, 160, 32) for _ in range(2))
    mask_empty_states(pipe.unet)
    wide = {"prompt_embeds": pad_states(embeds_BLD, 200), "negative_prompt_embeds": pad_states(negative_BLD, 200)}
    narrow = {"prompt_embeds": embeds_BLD, "negative_prompt_embeds": negative_BLD}
    frames = [pipe(**common, **embeds, generator=seed()).frames[0] for embeds in (narrow, wide)]
    np.testing.assert_allclose(*frames, atol=1e-5)


def test_a_model_without_text_to_pass_over_is_refused():
    with pytest.raises(ValueError, match="mask_empty_states: a Linear cannot pass over hidden states; it takes the UN"):
        mask_empty_states(torch.nn.Linear(2, 2))


def test_our_pipeline_becomes_another_one(ours):
    pipe = quiet(StableDiffusionImg2ImgPipeline.from_pipe(ours))
    assert pipe.text_encoder is ours.text_encoder
    auto = AutoPipelineForImage2Image.from_pipe(StableDiffusionPipeline.from_pipe(ours))
    assert auto.tokenizer is ours.tokenizer


@pytest.mark.parametrize("xl", [False, True])
def test_auto_pipelines_find_those_of_controlnets_and_pag(sd1, sdxl, tmp_path, xl):
    kind = FixClipStableDiffusionXLPipeline if xl else FixClipStableDiffusionPipeline
    name = "StableDiffusionXL" if xl else "StableDiffusion"
    ours = kind.from_pretrained(sdxl if xl else sd1)
    ours.save_pretrained(tmp_path)
    controlnet = ControlNetModel.from_unet(ours.unet)
    for options, part in (
        ({"controlnet": controlnet}, "ControlNet"),
        ({"enable_pag": True}, "PAG"),
        ({"controlnet": controlnet, "enable_pag": True}, "ControlNetPAG"),
    ):
        stock = getattr(diffusers, f"{name}{part}Pipeline")
        made = AutoPipelineForText2Image.from_pipe(ours, **options)
        assert type(made) is stock
        assert made.text_encoder is ours.text_encoder
        assert type(AutoPipelineForText2Image.from_pretrained(tmp_path, **options)) is stock
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        loaded = auto.from_pretrained(tmp_path, controlnet=controlnet)
        assert type(loaded) is type(auto.from_pipe(ours, controlnet=controlnet))
        assert type(loaded).__module__.startswith("diffusers.")


def test_states_of_our_pipeline_serve_another_one(ours, sd1):
    """Prompts beyond 248 tokens in any pipeline: encode with ours, pass the states."""
    very_long = tiny.sentences(40)
    positive, negative = ours.encode_prompt(very_long, "cpu", 1, True, "bad")
    pipe = quiet(StableDiffusionPipeline.from_pretrained(sd1))
    mask_empty_states(pipe.unet)  # the negative prompt is shorter
    actual = picture(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert np.array_equal(actual, picture(ours, very_long, negative_prompt="bad"))


def test_clip_skip_in_a_stock_pipeline(sd1, components):
    """Stock diffusers' clip_skip fails with the stock flat CLIPTextModel; with ours it works."""
    pipe = quiet(StableDiffusionPipeline.from_pretrained(sd1, **components))
    assert not np.array_equal(picture(pipe, LONG), picture(pipe, LONG, clip_skip=1))


# LoRA: PEFT, diffusers and kohya layouts, on UNet and text encoder.

RANK = 2


def lora_layers(pipe, of_unet):
    """(name in the module tree, up weight, down weight) of a few attention projections."""
    module = pipe.unet if of_unet else pipe.text_encoder.text_model
    ends = ("attn2.to_q", "attn2.to_v") if of_unet else ("self_attn.q_proj", "self_attn.out_proj")
    generator = torch.Generator().manual_seed(3)
    for name, layer in module.named_modules():
        if name.endswith(ends):
            yield (
                name,
                torch.randn(layer.out_features, RANK, generator=generator),
                torch.randn(RANK, layer.in_features, generator=generator),
            )


def lora_state(pipe, layout):
    state = {}
    for of_unet in (True, False):
        for name, up, down in lora_layers(pipe, of_unet):
            if layout.startswith("peft"):
                child = "" if layout == "peft_flat" else "text_model."
                prefix = f"unet.{name}" if of_unet else f"text_encoder.{child}{name}"
                state |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
            elif layout == "diffusers":
                prefix = f"unet.{name}" if of_unet else f"text_encoder.text_model.{name}"
                if of_unet:
                    parent, projection = name.rsplit(".", 1)
                    prefix = f"unet.{parent}.processor.{projection}_lora"
                else:
                    prefix = prefix.replace("q_proj", "q_proj.lora_linear_layer").replace(
                        "out_proj", "out_proj.lora_linear_layer"
                    )
                state |= {f"{prefix}.down.weight": down, f"{prefix}.up.weight": up}
            else:
                prefix = f"lora_unet_{name}" if of_unet else f"lora_te_text_model_{name}"
                prefix = prefix.replace(".", "_")
                state |= {
                    f"{prefix}.lora_down.weight": down,
                    f"{prefix}.lora_up.weight": up,
                    f"{prefix}.alpha": torch.tensor(float(RANK)),
                }
    return state


def merged(pipe, sd1):
    """The same LoRA added to the weights by hand."""
    reference = quiet(FixClipStableDiffusionPipeline.from_pretrained(sd1))
    for of_unet in (True, False):
        module = reference.unet if of_unet else reference.text_encoder.text_model
        layers = dict(module.named_modules())
        for name, up, down in lora_layers(pipe, of_unet):
            layers[name].weight.data += up @ down
    return reference


@pytest.mark.parametrize("layout", ["peft", "peft_flat", "diffusers", "kohya"])
def test_lora(ours, sd1, tmp_path, layout):
    save_file(lora_state(ours, layout), tmp_path / "lora.safetensors")
    expected = picture(merged(ours, sd1), LONG)
    plain = picture(ours, LONG)
    ours.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    np.testing.assert_allclose(picture(ours, LONG), expected, atol=2e-4)
    assert not np.allclose(expected, plain, atol=2e-3)
    no_lora = picture(ours, LONG, cross_attention_kwargs={"scale": 0.0})
    np.testing.assert_allclose(no_lora, plain, atol=1e-6)
    ours.unload_lora_weights()
    np.testing.assert_allclose(picture(ours, LONG), plain, atol=1e-6)


def test_lora_scale_reaches_every_window(ours, tmp_path):
    save_file(lora_state(ours, "kohya"), tmp_path / "lora.safetensors")
    ours.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    very_long = tiny.sentences(40)
    full, half, none = (ours.encode_prompt(very_long, "cpu", 1, False, lora_scale=s)[0] for s in (1.0, 0.5, 0.0))
    for window in (slice(0, 77), slice(77, 154), slice(200, full.shape[1])):
        assert not torch.allclose(full[:, window], half[:, window])
        assert not torch.allclose(half[:, window], none[:, window])


# Textual inversion.


@pytest.mark.parametrize("token", ["<cat-toy>", "<MyToken>"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion(ours, token, vectors):
    embeddings = torch.randn(vectors, 32)
    ours.load_textual_inversion({token: embeddings})
    tail = f" Behind it a {token} lies."
    for prompt in (f"A {token} on a table.", LONG + tail, tiny.sentences(40) + tail):
        report = ours.token_report(prompt)
        plain_report = ours.token_report(prompt.replace(token, "word"))
        assert report.num_tokens == plain_report.num_tokens + vectors - 1
        for conditioning in ("chunks", "overlap", "one_pass"):
            ours.conditioning = conditioning
            layout = ours.prompt_encoder.lay_out(prompt)
            read = layout.ids_NP.flatten()[layout.source_L]
            assert read[read >= 49408].tolist() == list(range(49408, 49408 + vectors)), "each vector once"
            states = ours.encode_prompt(prompt, "cpu", 1, False)[0]
            assert states.shape[1] == len(layout)
        ours.conditioning = None
    assert picture(ours, LONG + tail).shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["x’s", "“q”", "my  cat", "a&amp;b", "ＡＢ"])
def test_an_inversion_that_cleaning_would_hide_acts_as_in_stock(sd1, tmp_path, name):
    stock = StableDiffusionPipeline.from_pretrained(sd1)
    ours, vectors, prompt = FixClipStableDiffusionPipeline.from_pipe(stock), torch.randn(3, 32), f"a {name} boat"
    plain = states_of(ours, prompt)
    for pipe in (stock, ours):
        pipe.load_textual_inversion({name: vectors})
    read = ours.prompt_encoder.lay_out(prompt).ids_NP
    assert read[read >= 49408].tolist() == [49408, 49409, 49410]
    assert torch.equal(ours.text_encoder.get_input_embeddings().weight[49408:], vectors)
    stock_prompt = " ".join(["a", name, f"{name}_1", f"{name}_2", "boat"])  # which stock does for some names alone
    ids = stock.tokenizer(stock_prompt, padding="max_length", return_tensors="pt").input_ids
    expected = stock.text_encoder(ids)[0]
    torch.testing.assert_close(states_of(ours, prompt), expected, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path)
    for other in (FixClipStableDiffusionPipeline.from_pretrained(tmp_path), ours.from_pipe(stock)):
        torch.testing.assert_close(states_of(other, prompt), expected, rtol=0, atol=1e-5)
    ours.unload_textual_inversion(name)
    torch.testing.assert_close(states_of(ours, prompt), plain, rtol=0, atol=1e-5)


def states_of(pipe, prompt):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


@pytest.mark.parametrize(
    ("loaded", "new", "message"),
    [
        ("<A>", "<a>", "prompts are read without regard to case, so '<a>' cannot be told from '<A>', .*'<a-2>'"),
        ("my cat", "my  cat", "'my  cat' cannot be told from 'my cat'"),
        ("<a>", "<a>", "the tokenizer has a token '<a>' already: give another token=, such as '<a-2>', or call unload"),
        ("<a>", "<a>_2", "'<a>_2' would be read as one of the vectors of '<a>'"),
        ("<a>_1", "<A>", "'<A>_1' cannot be told from '<a>_1'"),
        ("<a>", "horse</w>", "the tokenizer has a token 'horse</w>' already"),
        ("<a>", " ", "' ' is no name that a prompt can say: give token="),
    ],
)
def test_a_name_that_could_not_be_told_from_another_is_refused(ours, loaded, new, message):
    vectors = torch.randn(2, 32)
    ours.load_textual_inversion({loaded: vectors})
    with pytest.raises(ValueError, match=message):
        ours.load_textual_inversion([{"<other>": vectors}, {new: vectors}])
    assert len(ours.tokenizer) == ours.text_encoder.get_input_embeddings().num_embeddings == 49410
    with pytest.raises(ValueError, match="cannot be told"):
        ours.load_textual_inversion([vectors, vectors], token=["<b>", "<B>"])
    ours.load_textual_inversion({"<a-2>": vectors})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"<a>": torch.ones(2, 48)}, "the width 48, and 32 is needed here .768 Stable Diffusion 1, 1024 Stable"),
        ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}, "the width 32 . 48, and 32 is needed here .768"),
        ({"name": "a", "string_to_param": {"*": torch.ones(2, 64)}}, "made for another base: .* 64, and 32 is needed"),
        ({"<a>": torch.full((2, 32), torch.nan)}, "<a> holds NaN or infinite values"),
        ({"<a>": torch.tensor([1e6, torch.inf]).repeat(16)}, "<a> holds NaN or infinite values"),
        ({"<a>": torch.ones(1, 2, 32)}, r"vectors are \(1, 2, 32\), where \(V, D\) is needed"),
        ({"<a>": torch.ones(0, 32)}, r"vectors are \(0, 32\)"),
        ({"<a>": torch.tensor(1.0)}, r"vectors are \(\)"),
        ({"unet.down_blocks.0.lora_A": torch.ones(2, 32), "b": torch.ones(2)}, "it holds 2 tensors .a LoRA., and a"),
        ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(3, 48)}, "2 vectors clip_l and 3 vectors clip_g: both"),
    ],
)
@pytest.mark.parametrize("form", ["memory", "file"])
def test_what_is_no_inversion_of_this_base_is_one_line_and_changes_nothing(ours, tmp_path, state, message, form):
    source, what = state, "textual inversion in memory: "
    if form == "file":
        source, what = tmp_path / "style.pt", f"textual inversion '{tmp_path}/style.pt': "
        torch.save(state, source)
    before = states_of(ours, LONG)
    with pytest.raises(ValueError, match=message) as refused:
        ours.load_textual_inversion([{"<good>": torch.ones(1, 32)}, source], token=["<good>", "<a>"])
    assert str(refused.value).startswith(what)
    assert len(str(refused.value).splitlines()) == 1
    assert len(ours.tokenizer) == ours.text_encoder.get_input_embeddings().num_embeddings == 49408
    assert torch.equal(states_of(ours, LONG), before)


def test_vectors_that_are_infinite_in_the_encoders_dtype_are_refused(sd1):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, dtype=torch.float16)
    with pytest.raises(ValueError, match="<a> holds NaN or infinite values"):
        pipe.load_textual_inversion({"<a>": torch.full((2, 32), 1e6)})


def test_files_that_are_no_inversions_and_numbers_of_names(ours, tmp_path):
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "damaged.pt").write_bytes(b"\x80nothing")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "lfs.safetensors": f"^{tmp_path}/lfs.safetensors is a pointer of Git LFS",
        "damaged.pt": f"^textual inversion '{tmp_path}/damaged.pt': .*weights",
        "empty": f"^textual inversion '{tmp_path}/empty': .*no file named learned_embeds.bin",
    }.items():
        with pytest.raises(ValueError, match=message):
            ours.load_textual_inversion(tmp_path / name, token="<a>")
    with pytest.raises(ValueError, match=r"^textual inversion 'no/such': .*hub"):
        ours.load_textual_inversion("no/such", token="<a>")
    with pytest.raises(ValueError, match="give token="):
        ours.load_textual_inversion(torch.ones(2, 32))
    with pytest.raises(ValueError, match="one name for each"):
        ours.load_textual_inversion([{"x": torch.ones(2, 32)}] * 3, token=["<a>", "<b>"])
    ours.load_textual_inversion(torch.eye(2, 32), token=["<a>", "<b>"])  # a name for each vector
    ids = ours.tokenizer("<a> <b>").input_ids
    assert torch.equal(ours.text_encoder.get_input_embeddings().weight[ids[1:-1]], torch.eye(2, 32))


def test_one_of_several_inversions_is_unloaded_whole(ours, tmp_path):
    vectors = {name: torch.randn(3, 32) for name in ("<a>", "<b>")}
    plain = states_of(ours, "a <a> boat")
    ours.load_textual_inversion([{name: part} for name, part in vectors.items()])
    both = states_of(ours, "a <b> boat")
    with pytest.raises(ValueError, match=r"no textual inversion '<c>' to unload; loaded: \['<a>', '<b>'\]"):
        ours.unload_textual_inversion(["<a>", "<c>"])
    ours.unload_textual_inversion("<a>")
    torch.testing.assert_close(states_of(ours, "a <a> boat"), plain)
    ours.save_pretrained(tmp_path)
    for pipe in (ours, FixClipStableDiffusionPipeline.from_pretrained(tmp_path)):
        torch.testing.assert_close(states_of(pipe, "a <b> boat"), both)
        pipe.load_textual_inversion({"<a>": vectors["<a>"]})
        assert pipe.text_encoder.get_input_embeddings().num_embeddings == len(pipe.tokenizer) == 49414
        torch.testing.assert_close(states_of(pipe, "a <b> boat"), both)


# Devices, dtypes, schedulers, callbacks.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(sd1, dtype):
    pipe = quiet(FixClipStableDiffusionPipeline.from_pretrained(sd1, dtype=dtype))
    assert pipe.text_encoder.dtype == pipe.unet.dtype == dtype
    exact = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    for prompt in ("a red horse", LONG):
        states, reference = (p.encode_prompt(prompt, "cpu", 1, False)[0] for p in (pipe, exact))
        assert states.dtype == dtype
        assert torch.nn.functional.cosine_similarity(states.float(), reference, dim=-1).min() > 0.99
    # bfloat16 numpy arrays do not exist; diffusers converts.
    assert np.isfinite(picture(pipe, LONG)).all()


def test_dtype_by_component(sd1):
    dtypes = {"text_encoder": torch.bfloat16, "default": torch.float32}
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, dtype=dtypes)
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.unet.dtype == torch.float32


def test_schedulers_of_the_base_pipeline(ours):
    failed, own = {}, ours.scheduler
    for scheduler in own.compatibles:
        try:
            ours.scheduler = scheduler.from_config(own.config)
        except ImportError:
            continue  # needs torchsde, scipy or another extra that is not ours
        try:
            image = picture(ours, LONG, negative_prompt="bad", num_inference_steps=3)
        except Exception as error:
            failed[scheduler.__name__] = error
            continue
        assert np.isfinite(image).all(), scheduler.__name__
    stock = StableDiffusionPipeline(**ours.components, requires_safety_checker=False)
    for name in list(failed):  # what stock cannot run either is not ours to run
        stock.scheduler = next(s for s in own.compatibles if s.__name__ == name).from_config(own.config)
        with pytest.raises(type(failed[name])):
            picture(quiet(stock), "a", num_inference_steps=3)
    ours.scheduler = own
    assert len(failed) < 3, failed


def test_callback_sees_every_step_and_can_stop(ours):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["prompt_embeds"].shape[1]))
        pipe._interrupt = step == 1
        return tensors

    picture(
        ours,
        LONG,
        num_inference_steps=4,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    num_states = ours.token_report(LONG).num_states
    assert seen == [(0, num_states), (1, num_states)]


def test_model_cpu_offload(ours, monkeypatch):
    """accelerate's hooks around every component, with the CPU as the device that work moves to."""
    expected = {prompt: picture(ours, prompt, clip_skip=skip) for prompt, skip in (("a horse", None), (LONG, 1))}
    from accelerate import cpu_offload_with_hook

    hook = None
    for name in ("text_encoder", "unet", "vae"):
        _, hook = cpu_offload_with_hook(getattr(ours, name), "cpu", prev_module_hook=hook)
    for prompt, skip in (("a horse", None), (LONG, 1)):
        assert np.array_equal(picture(ours, prompt, clip_skip=skip), expected[prompt])


def test_sequential_cpu_offload_on_a_meta_device(ours):
    """Weights live outside the modules between calls: adapter and original positions must be fetched too."""
    from accelerate import cpu_offload

    from fixclip_diffusion import TextAdapter

    adapter = TextAdapter(32)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.text_encoder.set_adapter_module(adapter)
    ids = ours.tokenizer([LONG, "a"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = [ours.text_encoder(part)[0] for part in (ids, ids[:, :77])]
    cpu_offload(ours.text_encoder, "cpu")
    assert next(ours.text_encoder.parameters()).device.type == "meta"
    for part, states in zip((ids, ids[:, :77]), expected, strict=True):
        assert torch.equal(ours.text_encoder(part)[0], states)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_to_a_gpu(ours):
    ours.enable_model_cpu_offload()
    assert np.isfinite(picture(ours, LONG)).all()


# compel: prompt weights, beyond token 77 too.


@pytest.fixture(scope="module")
def compel_class():
    return pytest.importorskip("compel").Compel


def test_compel_weights_beyond_token_77(ours, compel_class):
    compel = compel_class(tokenizer=ours.tokenizer, text_encoder=ours.text_encoder, truncate_long_prompts=False)
    plain = compel(LONG)
    ids = ours.tokenizer([LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert plain.shape == (1, 248, 32)
    torch.testing.assert_close(plain, ours.text_encoder(ids)[0], atol=1e-5, rtol=1e-4)
    weighted = compel(LONG.replace("boat stands near the number 13", "(boat)1.8 stands near the number 13"))
    assert not torch.allclose(weighted, plain)
    changed = (weighted - plain).abs().amax(-1)[0]
    position = ours.tokenizer(LONG[: LONG.rindex("boat")]).input_ids
    assert changed.argmax() >= len(position) - 1 > 77
    negative = compel("bad")
    positive, negative = compel.pad_conditioning_tensors_to_same_length([weighted, negative])
    assert picture(ours, None, prompt_embeds=positive, negative_prompt_embeds=negative).shape == (16, 16, 3)
