"""Adapters of Stable Diffusion XL's two text encoders: their losses by hand, a run, and what comes out of it."""

import dataclasses
import io
import json

import command_line
import pytest
import tiny
import tiny_adapter
import torch
from accelerator import reset_accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tiny_adapter import randomize, without_onednn  # noqa: F401
from torchvision.transforms.v2 import functional

from fixclip_core.data.loader import Batch
from fixclip_core.data.samples import Sample, decode_image
from fixclip_core.training.recipe import load_recipe
from fixclip_core.training.trainer import smoke
from fixclip_diffusion import FixClipStableDiffusionXLPipeline, FixClipTextEncoderWithProjection, TextAdapter
from fixclip_diffusion.adapter_training import trainer as train
from fixclip_diffusion.adapter_training.features import encode_batch, encode_captions, picture_transform
from fixclip_diffusion.adapter_training.joined import JoinedAdapter
from fixclip_diffusion.adapter_training.objectives import adapter_losses
from fixclip_diffusion.adapter_training.objectives.step import adapted_embeds
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe, ObjectivesSection
from fixclip_diffusion.adapter_training.trainer import AdapterTrainer

LONGS = [tiny_adapter.caption(number) for number in range(3)]
SHORTS = ["A red horse.", "Two boats near a house.", tiny.sentences(12)]  # the last does not fit into 77 tokens
SIZES = torch.tensor([[1080.0, 1920, 0, 398, 16, 16], [16, 16, 0, 0, 16, 16], [300, 100, 5, 0, 16, 16]])


@pytest.fixture
def recipe_file(sdxl, tmp_path):
    data = tiny_adapter.write_data(tmp_path / "data")
    return lambda name="run": tiny_adapter.write_recipe(tmp_path / f"{name}.yaml", sdxl, data)


@pytest.fixture
def recipe(recipe_file):
    return lambda name="run", *overrides: tiny_adapter.read(recipe_file(name), *overrides)


@pytest.fixture(scope="module")
def frozen(sdxl):
    found = train.load_frozen(train.BaseSection(base=str(sdxl)))
    train.place(found, torch.device("cpu"), torch.float32)
    return found


@pytest.fixture(scope="module")
def pipe(sdxl):
    return FixClipStableDiffusionXLPipeline.from_pretrained(sdxl)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in rows]


def make_batch(frozen):
    torch.manual_seed(5)
    return Batch(
        image=torch.rand(3, 3, 16, 16) * 2 - 1,
        long_ids=frozen.caption_ids(LONGS),
        short_ids=frozen.caption_ids(SHORTS),
        seeds=torch.tensor([11, 12, 13]),
        keys=["a", "b", "c"],
        sizes=SIZES,
    )


def joined_adapter(kind):
    sizes = {"hidden_width": 8, "num_layers": 1, "num_heads": 4, "mask_padding": True}
    parts = {
        name: randomize(TextAdapter(width, kind, **sizes), seed=width)
        for name, width in (("text_encoder", 32), ("text_encoder_2", 48))
    }
    return JoinedAdapter(parts)


def set_adapters(pipe, adapter):
    for encoder, part in zip((pipe.text_encoder, pipe.text_encoder_2), adapter.adapters, strict=True):
        encoder.set_adapter_module(part)
    pipe.conditioning = None


# -- values --------------------------------------------------------------------------------------------------


def plain_losses(pipe, stock, batch, objectives):
    """One draw at a time; embeds, pooled vectors and time ids as the pipelines give them to the UNet."""
    sums = dict.fromkeys(("long", "short", "prediction"), torch.zeros(()))
    total, scheduler = 0, train.DDPMScheduler.from_config(pipe.scheduler.config)
    latents_of = pipe.vae.encode(batch.image).latent_dist

    def predict(noisy, t, embeds, pooled, row):
        added = {"text_embeds": pooled, "time_ids": batch.sizes[row][None]}
        return pipe.unet(noisy[None], t, embeds, added_cond_kwargs=added).sample[0]

    for i, seed in enumerate(batch.seeds.tolist()):
        generator = torch.Generator().manual_seed(seed)
        spread, noise = (torch.randn(objectives.noise_draws, 4, 8, 8, generator=generator) for _ in range(2))
        uniform = torch.rand(4, objectives.noise_draws, generator=generator, dtype=torch.float64)
        for r in range(objectives.noise_draws):
            total += 1
            t = int(1000 * uniform[0, r])
            latents = pipe.vae.config.scaling_factor * (latents_of.mean[i] + latents_of.std[i] * spread[r])
            alpha = scheduler.alphas_cumprod[t]
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise[r]
            short, dropped = bool(uniform[2, r] < 0.5), bool(uniform[3, r] < 0.4)
            text = SHORTS[i] if short else LONGS[i]
            embeds, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
            if dropped:
                embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
            predicted = predict(noisy, t, embeds, pooled, i)
            name = "short" if short else "long"
            sums[name] = sums[name] + (predicted - noise[r]).pow(2).mean()
            if short and (dropped or text is not SHORTS[2]):
                teacher, _, teacher_pooled, _ = stock.encode_prompt(text, do_classifier_free_guidance=False)
                if dropped:
                    teacher, teacher_pooled = torch.zeros_like(teacher), torch.zeros_like(teacher_pooled)
                wanted = predict(noisy, t, teacher, teacher_pooled, i).detach()
                sums["prediction"] = sums["prediction"] + (predicted - wanted).pow(2).mean()
    return {name: value / (total * 0.5) for name, value in sums.items()}


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_losses_and_gradients_are_those_of_the_pipelines_embeds(sdxl, pipe, frozen, kind):
    objectives = ObjectivesSection(
        weight_long=1.3, weight_short=0.7, weight_prediction=0.9, short_share=0.5, caption_dropout=0.4, noise_draws=4
    )
    adapter, batch = joined_adapter(kind), make_batch(frozen)
    denoiser = train.make_denoiser(frozen, has_lora=False)
    losses = adapter_losses(adapter, encode_batch(frozen, batch, objectives), denoiser, objectives)
    losses["loss"].backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()

    set_adapters(pipe, adapter)
    pipe.unet.requires_grad_(False)
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl)
    expected = plain_losses(pipe, stock, batch, objectives)
    for name, value in expected.items():
        torch.testing.assert_close(losses[f"loss_{name}"], value, rtol=1e-4, atol=1e-6)
        assert value > 0
    sum(getattr(objectives, f"weight_{name}") * value for name, value in expected.items()).backward()
    for ours, parameter in zip(gradients, adapter.parameters(), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["overlap", "one_pass", "chunks"])
def test_captions_are_read_as_the_pipeline_reads_prompts(pipe, frozen, conditioning):
    frozen = dataclasses.replace(frozen, conditioning=conditioning)
    adapter = joined_adapter("attention")
    set_adapters(pipe, adapter)
    pipe.conditioning = conditioning
    texts = [*LONGS, *SHORTS]
    captions = encode_captions(frozen, frozen.caption_ids(texts))
    embeds, length = adapted_embeds(adapter, captions, masks=True)
    for row, text in enumerate(texts):
        expected, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        torch.testing.assert_close(embeds[row, : int(length[row])], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(captions.pooled[row], pooled[0], rtol=1e-4, atol=1e-5)


# -- sizes of pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(300, 200), (64, 64), (90, 250)])
def test_time_ids_say_size_and_crop(width, height):
    """Crops of the mirrored picture too: the same place of the resized picture, cut out by hand."""
    picture = Image.effect_noise((width, height), 80).convert("RGB")
    plain, sized = picture_transform(32, True, True), picture_transform(32, True, True, sizes=True)
    resized = functional.resize(picture, 32, functional.InterpolationMode.BICUBIC)
    places = set()
    for seed in range(6):
        torch.manual_seed(seed)
        expected = plain(picture)
        torch.manual_seed(seed)
        image, time_ids = sized(picture)
        assert torch.equal(image, expected)
        top, left = (int(value) for value in time_ids[2:4])
        assert time_ids.tolist() == [height, width, top, left, 32, 32]
        pieces = [functional.crop(part, top, left, 32, 32) for part in (resized, functional.horizontal_flip(resized))]
        as_tensors = [functional.to_dtype(functional.pil_to_tensor(piece), scale=True) * 2 - 1 for piece in pieces]
        assert any(torch.allclose(image, tensor, atol=1e-6) for tensor in as_tensors)
        places.add((top, left))
    assert len(places) > 1 or width == height
    center = picture_transform(32, sizes=True)(picture)[1]
    assert center[2:4].tolist() == [round((resized.height - 32) / 2), round((resized.width - 32) / 2)]


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_is_that_of_the_file(orientation):
    """Whatever a quick decoding makes of it: a JPEG comes back at a fraction of its size, upright."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (640, 320)).save(file, "JPEG", exif=exif)
    picture = decode_image(Sample("key", "file", file.getvalue(), "long", None), draft_size=64)
    assert picture.size == ((160, 80) if orientation == 1 else (80, 160))
    wanted = [320, 640] if orientation == 1 else [640, 320]
    assert picture_transform(32, sizes=True)(picture)[1][:2].tolist() == wanted


# -- a run ---------------------------------------------------------------------------------------------------


def test_a_run_lowers_the_loss_and_the_pipeline_loads_what_it_saves(recipe, sdxl, tmp_path):
    """The adapters change the embeds of prompts; pooled vectors and the empty negative prompt stay the base's."""
    options = ["model.conditioning=one_pass", "objectives.weight_windows=1", "adapter.kind=attention", "train.steps=12"]
    options += ["optim.lr=0.1", "output.save_every=12", f"samples.prompts=['{LONGS[1]}']", "samples.every=12"]
    run = AdapterTrainer(recipe("run", *options)).prepare()
    batch = next(run.loader.epoch(0))
    objectives = run.recipe.objectives.model_copy(update={"noise_draws": 4})
    features = encode_batch(run.frozen, batch, objectives)
    with torch.no_grad():
        before = adapter_losses(run.module.adapter, features, run.denoiser, objectives)
    run.start()
    run.fit()
    folder = run.save()
    with torch.no_grad():
        after = adapter_losses(run.module.adapter, features, run.denoiser, objectives)
    assert after["loss"] < before["loss"]
    assert after["loss_windows"] < 0.9 * before["loss_windows"]
    assert run.references.keys() == {"stock", "untuned"}
    assert (tmp_path / "run" / "samples" / "step-00000012.png").is_file()

    for name, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        assert (folder / name / "made_for.json").is_file()
        assert TextAdapter.from_pretrained(folder / name).config["width"] == width
    plain = FixClipStableDiffusionXLPipeline.from_pretrained(sdxl, conditioning="one_pass")
    pipe = FixClipStableDiffusionXLPipeline.from_pretrained(sdxl, adapter=folder)
    assert pipe.conditioning == "one_pass"
    with torch.no_grad():
        first, second = (each.encode_prompt(LONGS[0]) for each in (plain, pipe))
        captions = encode_captions(run.frozen, run.frozen.caption_ids([LONGS[0]]))
        expected, _ = adapted_embeds(run.module.adapter, captions, masks=True)
    torch.testing.assert_close(second[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first[0], second[0], atol=1e-2)
    assert not second[1].any()
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[3], second[3])

    reset_accelerator()
    again = AdapterTrainer(recipe("again", *options, f"adapter.start_from={folder}")).prepare()
    for one, other in zip(again.module.parameters(), run.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_with_a_cache_is_training_without(recipe, tmp_path):
    """Of both encoders; with a LoRA, which learns from dropped captions too."""
    options = ["lora.rank=2", "train.steps=2", "objectives.weight_windows=0.5", "objectives.caption_dropout=0.3"]
    AdapterTrainer(recipe("plain", *options)).train()
    for name, text in (("latents", "false"), ("cached", "true")):
        cache = [f"features.folder={tmp_path / name}-cache", "features.dtype=fp32", f"features.text={text}"]
        reset_accelerator()
        AdapterTrainer(recipe(name, *options, *cache, "train.micro_batch_size=3")).train()
        for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / name), strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    lora = tmp_path / "plain" / "lora"
    pipe = StableDiffusionXLPipeline.from_pretrained(recipe().model.base)
    pipe.load_lora_weights(lora)
    assert pipe.get_active_adapters() == ["default_0"]


def test_plan_and_smoke(recipe_file, recipe):
    planned = command_line.run("train", "adapter", recipe_file(), "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "memory  about" in planned.output
    assert "frozen models" in planned.output
    assert "the base's text_encoder and the base's text_encoder_2, long captions" in planned.output
    assert "mlp adapter of each encoder" in planned.output
    assert "should be kept in float32" not in planned.output
    smoke(AdapterTrainer, recipe("run"))


def test_the_recipe_is_a_built_in_one():
    found = load_recipe(AdapterRecipe, "builtin:stable_diffusion_xl", ["data.source=my.jsonl"])
    assert "xl" in found.model.base
    assert found == load_recipe(AdapterRecipe, "pipelines/sdxl/adapter.yaml", ["data.source=my.jsonl"])
    own = load_recipe(AdapterRecipe, "builtin:own_data_xl", ["data.source=my.jsonl"])
    assert (own.model, own.adapter, own.data.start) == (found.model, found.adapter, 0)


# -- bad input -----------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_one_clear_error(recipe, sdxl, sd1, frozen, tmp_path):
    with pytest.raises(ValueError, match=r"train\.precision=fp16: the VAE of base .* overflows"):
        train.check_frozen(frozen, recipe("run", "train.precision=fp16"))
    trained = FixClipTextEncoderWithProjection.from_pretrained(
        sdxl, subfolder="text_encoder_2", hidden_state="penultimate"
    )
    trained.text_model.embeddings.short_position_embedding = None
    trained.config.short_position_embeddings = 0
    trained.save_pretrained(tmp_path / "long")
    with pytest.raises(ValueError, match=r"encoder_2 read texts differently: 248 and 248 positions, of which 77 and 0"):
        train.load_frozen(train.BaseSection(base=str(sdxl), encoder_2=str(tmp_path / "long")))
    with pytest.raises(ValueError, match=r"encoder_2='x': base .* has one text encoder"):
        train.load_frozen(train.BaseSection(base=str(sd1), encoder_2="x"))
    parts = [encoding for encoding in frozen.encodings if encoding.tower.pooled]
    with pytest.raises(ValueError, match="has the second text encoder only: adapters are trained on the base"):
        train.check_encodings(tuple(parts), train.BaseSection(base="refiner"))
    wide = UNet2DConditionModel(**{**dict(frozen.unet.config), "in_channels": 9})
    with pytest.raises(ValueError, match="its UNet takes 9 channels, its VAE makes 4: not a text-to-image model"):
        train.check_frozen(dataclasses.replace(frozen, unet=wide), recipe())
    TextAdapter(48).save_pretrained(tmp_path / "adapter" / "text_encoder")
    reset_accelerator()
    with pytest.raises(ValueError, match="an adapter of width 48 on a text encoder of width 32"):
        AdapterTrainer(recipe("run", f"adapter.start_from={tmp_path / 'adapter'}")).prepare()
