"""The chain behind the embedded miniature, at a size that trains in seconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerator import reset_accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scenes import evaluate as evaluation
from scenes import package, pretrain, report, run
from typer.testing import CliRunner

from fixclip_core import scenes
from fixclip_core.training import trainer
from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.recipe import load_recipe
from fixclip_core.weights.load import load_fixclip
from fixclip_diffusion import FixClipStableDiffusionPipeline
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe
from fixclip_diffusion.evaluation.generate import System
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.tokenizer import FixClipTokenizer

HERE = run.ROOT / run.HERE
SMALL = {
    "clip": ["width=32", "layers=2", "heads=2", "train.batch_size=8", "eval_scenes=8"],
    "vae": ["channels=[8,8,8,8]", "latent_channels=4", "train.batch_size=2", "eval_scenes=2"],
    "robust": ["train.batch_size=2", "eval_scenes=2"],
    "unet": ["channels=[16,32]", "heads=2", "latents=8", "train.batch_size=4", "noise_draws=2", "eval_scenes=2"],
}


def recipe(name, folder, *overrides, steps=4):
    schema, _ = pretrain.STAGES[name]
    shared = [f"train.steps={steps}", "train.precision=fp32", "optim.warmup_steps=1", "output.log_every=1"]
    shared += ["output.save_every=2", f"output.folder={folder}"]
    return load_recipe(schema, HERE / f"{name}.yaml", [*SMALL[name], *shared, *overrides])


def train(name, *arguments, **options):
    reset_accelerator()
    return pretrain.StageTrainer(recipe(name, *arguments, **options)).train()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """CLIP, VAE and UNet folders of two steps each."""
    folder = tmp_path_factory.mktemp("parts")
    clip, vae = train("clip", folder / "clip", steps=2), train("vae", folder / "vae", steps=2)
    unet = train("unet", folder / "unet", f"clip={clip}", f"vae={vae}", steps=2)
    return {"clip": clip, "vae": vae, "unet": unet}


# -- the tokenizer -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), number=st.integers(1, 9), split=st.sampled_from(["train", "heldout"]))
def test_captions_get_the_pieces_of_clips_own_tokenizer(seed, number, split):
    small, clip = tokenizers()
    text = scenes.long_caption(scenes.sample_scene(seed, num_objects=number), seed, split=split).text
    pieces = [clip.decoder[index] for index in clip.encode(text)]
    assert small.convert_ids_to_tokens(small(text).input_ids)[1:-1] == pieces


def tokenizers(found=[]):  # noqa: B006 -- made once
    if not found:
        found.extend([pretrain.scenes_tokenizer(), open_clip.SimpleTokenizer()])
    return found


def test_any_other_text_is_still_read():
    small, _ = tokenizers()
    ids = small("Zwölf Boxkämpfer jagen Viktor! 123 \U0001f600").input_ids
    assert small.unk_token_id not in ids[1:-1]
    assert small.decode(ids[1:-1]).replace(" ", "") == "zwölfboxkämpferjagenviktor!123\U0001f600"
    assert len(small) < 1100


# -- pre-training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "vae"])
def test_an_interrupted_stage_ends_with_the_same_weights(name, tmp_path):
    whole = train(name, tmp_path / "whole")
    chosen = recipe(name, tmp_path / "cut")
    reset_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "seed_step", _stop_at(2))
        with pytest.raises(KeyboardInterrupt):
            pretrain.StageTrainer(chosen).train()
    assert not (tmp_path / "cut" / "model").exists()
    resumed = train(name, tmp_path / "cut")
    files = [file.relative_to(whole) for file in whole.rglob("*.safetensors")]
    assert files
    for file in files:
        one, other = load_file(whole / file), load_file(resumed / file)
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["clip", "vae"])
def test_an_evaluation_of_a_stage_that_was_cut_off_is_made_up_for(name, tmp_path):
    class CutOff(pretrain.StageTrainer):
        def evaluate(self, log):
            raise KeyboardInterrupt

    train(name, tmp_path / "whole")
    reset_accelerator()
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 4"):
        CutOff(recipe(name, tmp_path / "cut")).train()
    train(name, tmp_path / "cut")
    train(name, tmp_path / "cut")
    rows = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("whole", "cut")]
    found = [[row for row in map(json.loads, part) if "lr" not in row] for part in rows]
    assert found[0] == found[1]
    assert [row["step"] for row in found[1]] == [4]


def _stop_at(step):
    seed_step = trainer.seed_step

    def seed_or_stop(seed, at, rank):
        if at == step:
            raise KeyboardInterrupt
        seed_step(seed, at, rank)

    return seed_or_stop


def test_sentence_ends_and_labels_are_those_of_the_scene():
    """The binding loss reads the last token of each described object, with that object's properties."""
    stage = pretrain.Clip(recipe("clip", "unused"))
    drawn = [scenes.sample_scene(seed, num_objects=9) for seed in range(4)]
    captions = [scenes.long_caption(scene, seed) for seed, scene in enumerate(drawn)]
    batch = stage.described(drawn, captions)
    assert batch.ids_BT.shape == (4, 77)
    assert len(batch.sample_O) >= 8
    for row in range(len(batch.sample_O)):
        scene, caption = drawn[batch.sample_O[row]], captions[batch.sample_O[row]]
        place = scenes.PLACES[batch.labels["place"][row]]
        item = next(item for item in scene.objects if item.place == place)
        for kind, names in pretrain.KINDS.items():
            assert names[batch.labels[kind][row]] == getattr(item, kind)
        read = stage.tokenizer.decode(batch.ids_BT[batch.sample_O[row], 1 : batch.token_O[row] + 1])
        span = next(span for span in caption.spans if span.place == place)
        said = caption.text[: span.end].lower()
        assert read.replace(" ", "") == said.replace(" ", "")


def test_a_share_of_the_base_s_captions_refer(parts):
    plain = pretrain.Clip(recipe("clip", "unused")).batch(0, 3, 0, 16)
    stage = pretrain.Clip(recipe("clip", "unused", "reference_share=1"))
    batch = stage.batch(0, 3, 0, 16)
    assert torch.equal(batch.image_BCHW[::2], plain.image_BCHW[::2]), "short captions are those of before"
    for i in range(1, 16, 2):
        key = f"0/3/0/{i}"
        scene = pretrain.referring_scene(key)
        caption = pretrain.referring_caption(scene, key)
        ids = stage.tokenizer(caption.text).input_ids
        assert len(ids) <= 77
        assert batch.ids_BT[i, : len(ids)].tolist() == ids
        assert torch.equal(batch.image_BCHW[i], pretrain.pictures([scene])[0])
        labelled = {scenes.PLACES[batch.labels["place"][row]] for row in (batch.sample_O == i).nonzero()[:, 0]}
        later = {reference.place for reference in caption.references if reference.kind == "remainder"}
        assert labelled == {item.place for item in scene.objects} - later
    unet = pretrain.Unet(recipe("unet", "unused", f"clip={parts['clip']}", f"vae={parts['vae']}", "reference_share=1"))
    for index in (1, 3, 5, 7):
        scene = unet.scene(index)
        assert scenes.read_caption(pretrain.referring_caption(scene, "key").text) == scene.described()
    assert len({len(unet.scene(index).objects) for index in range(1, 41, 2)} - {2, 3}) == 0


def test_the_parts_are_standard_folders(parts):
    clip = load_fixclip(parts["clip"], num_groups=2, first_group=2)
    assert clip.config.context_length == 248
    ids = clip.tokenizer()(["a red star in the very centre."])
    assert clip.encode_text(ids).shape == (1, 32)
    pipe = StableDiffusionPipeline.from_pretrained(parts["unet"])
    assert pipe("a red star", num_inference_steps=2).images[0].size == (72, 72)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_no_encoder_evades_the_noise_by_the_scale_of_its_latents(parts):
    torch.manual_seed(0)
    stage = pretrain.Robust(recipe("robust", "unused", f"vae={parts['vae']}"))
    image = pretrain.pictures(pretrain.sample_scenes(0, 0, 0, 8, (1, 9)))

    def decoded(std):
        torch.manual_seed(1)
        return stage.decode_noisy(image, torch.full((len(image),), std))

    with torch.no_grad():
        plain = stage.vae.decode(stage.vae.encode(image).latent_dist.mode()).sample
        assert torch.equal(decoded(0.0), plain)
        noisy = decoded(1.0)
        assert (noisy - plain).square().mean() > 1e-4
        scale = torch.tensor([100.0, 1.0, 5.0, 20.0])
        stage.vae.quant_conv.weight[:4] *= scale[:, None, None, None]
        stage.vae.quant_conv.bias[:4] *= scale
        stage.vae.post_quant_conv.weight /= scale[:, None, None]
        torch.testing.assert_close(decoded(1.0), noisy, rtol=1e-2, atol=1e-3)


def test_the_robust_stage_trains_all_of_the_vae(parts, tmp_path):
    trained = train("robust", tmp_path / "robust", f"vae={parts['vae']}", steps=2)
    before, after = AutoencoderKL.from_pretrained(parts["vae"]), AutoencoderKL.from_pretrained(trained)
    same = {name for name, w in before.state_dict().items() if torch.equal(w, after.state_dict()[name])}
    assert not same
    log = (tmp_path / "robust" / "metrics.jsonl").read_text()
    assert "objects_right_at_1.0" in log


def test_whitening_latents_changes_no_picture():
    torch.manual_seed(0)
    stage = pretrain.Vae(recipe("vae", "unused"))
    image = pretrain.pictures(pretrain.sample_scenes(0, 0, 0, 32, (1, 9)))
    with torch.no_grad():
        stage.vae.encoder.conv_out.weight[0] *= 30  # one channel drowns the others
        before = stage.vae.decode(stage.vae.encode(image).latent_dist.mode()).sample
        pretrain.whiten(stage.vae, [stage.vae.encode(image).latent_dist], floor=1e-6)
        posterior = stage.vae.encode(image).latent_dist
        torch.testing.assert_close(stage.vae.decode(posterior.mode()).sample, before, rtol=1e-3, atol=1e-4)
    latents = (posterior.mode() * stage.vae.config.scaling_factor).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(latents), torch.eye(len(latents)), rtol=0, atol=0.1)
    assert posterior.std.flatten(2).std(-1).max() < 1e-6


def test_wrong_stages_and_recipes_are_named(tmp_path):
    vae = str(HERE / "vae.yaml")
    for arguments, code, message in (
        (["gan", vae], 2, "No such command 'gan'"),
        (["vae", vae, "channels=12"], 2, "command line: channels=12: it should be a valid list"),
        (["vae", vae, "train.steps=null", f"output.folder={tmp_path}"], 2, "train.steps: missing"),
    ):
        result = CliRunner().invoke(pretrain.app, arguments)
        assert result.exit_code == code
        assert message in result.output
        assert len(result.output.splitlines()) == 1


def test_a_stage_has_a_plan_and_a_smoke_test(tmp_path):
    """The same options as the trainings of the package, on the same trainer."""
    options = [*SMALL["clip"], f"output.folder={tmp_path / 'clip'}"]
    for flag, expected in (("--dry-run", "new scenes at every step"), ("--smoke", "Smoke test passed")):
        reset_accelerator()
        result = CliRunner().invoke(pretrain.app, ["clip", str(HERE / "clip.yaml"), *options, flag])
        assert result.exit_code == 0, result.output
        assert expected in result.output
        assert not (tmp_path / "clip" / "checkpoints").exists()


# -- the chain -----------------------------------------------------------------------------------------------


def test_every_stage_has_a_valid_recipe_and_known_needs():
    single = [run.retrieval_run(m, 1e-4, 0) for m in run.METHODS] + [run.rival_run(m, 1e-4, 0) for m in run.RIVALS]
    found = {stage.name: stage for stage in [*run.stages(), *single]}
    for stage in found.values():
        assert set(stage.needs) <= found.keys(), stage
        script = next((part for part in stage.command if part.startswith("train_")), None)
        if script is None:
            continue
        at = stage.command.index(script) + 1
        schema = {"train_encoder.py": EncoderRecipe, "train_adapter.py": AdapterRecipe}[script]
        chosen = load_recipe(schema, run.ROOT / stage.command[at], stage.command[at + 1 :])
        assert stage.result.is_relative_to(chosen.output.folder)


def test_a_system_draws_with_what_its_stage_trained_and_reads_as_it_was_trained():
    found = {stage.name: stage for stage in run.stages()}
    systems = [stage.command[2] for stage in found.values() if stage.name.startswith("images-")]
    assert set(systems) <= set(evaluation.SYSTEMS)
    assert {f"{name}_seed{seed}" for name in run.DECIDING for seed in run.SEEDS[1:]} <= set(systems)
    assert set(report.SEEDED) == set(run.DECIDING)
    for name in systems:
        system = evaluation.SYSTEMS[name]
        if system.adapter is None or system.lora is not None:  # beside a LoRA it is that of the system without one
            continue
        stage = found[Path(system.adapter).parent.name]
        assert stage.name in found[f"images-{name}"].needs
        at = stage.command.index("train_adapter.py") + 1
        model = load_recipe(AdapterRecipe, run.ROOT / stage.command[at], stage.command[at + 1 :]).model
        assert (model.encoder, model.conditioning) == (system.encoder, system.conditioning)


def test_a_misspelt_stage_is_told():
    with pytest.raises(SystemExit, match="no stage 'rivls'; did you mean 'rivals'"):
        run.select(["rivls"])
    with pytest.raises(SystemExit, match=r"run 'fixclp': there is no .*fixclp; "):
        evaluation.twins(["base", "fixclp"], folder=Path("nowhere"))


def test_what_is_published_can_start_later_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"and others: first run clip.*package.py restore"):
        run.run(run.rivals(), 1)


def test_stages_run_in_order_once_and_resume_after_a_failure(tmp_path, monkeypatch, capsys):
    def stage(name, needs=(), code="open(sys.argv[1], 'a').write('x')"):
        return run.Stage(name, ("-c", f"import sys; {code}", str(tmp_path / name)), needs, tmp_path / name)

    good = [stage("third", ("second",)), stage("first"), stage("second", ("first",))]
    bad = [*good[:2], stage("second", ("first",), "sys.exit(1)")]
    monkeypatch.setattr(run, "OUT", tmp_path / "out")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for stages in (bad, good, good):
        monkeypatch.setattr(run, "stages", lambda found=tuple(stages): list(found))
        if stages is bad:
            with pytest.raises(SystemExit, match="failed: second"):
                run.run(stages, 2)
            assert not (tmp_path / "third").exists()
        else:
            run.run(stages, 2)
    assert [(tmp_path / name).read_text() for name in ("first", "second", "third")] == ["x", "x", "x"]
    tries = {s.name: json.loads(run.log_of(s).with_suffix(".times.json").read_text())["times"] for s in good}
    assert {name: len(times) for name, times in tries.items()} == {"first": 1, "second": 2, "third": 1}
    assert all(start <= end for times in tries.values() for start, end in times)
    assert tries["first"][0][1] <= tries["second"][0][0]
    (tmp_path / "first").unlink()
    (tmp_path / "second").unlink()
    with pytest.raises(SystemExit, match="second: first run first"):
        run.run([good[2]], 1)


# -- evaluation and report -----------------------------------------------------------------------------------


def test_what_is_published_stands_in_for_the_chain(tmp_path, monkeypatch, capsys):
    mine = tmp_path / run.OUT / "clip" / "model"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("mine")
    package.restore(tmp_path / run.OUT)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    done = {stage.name for stage in run.chain() if (tmp_path / stage.result).exists()}
    assert done == {"clip", "base", "encoder_diffusers", "adapter", "adapter_overlap_text"}
    assert (mine / "config.json").read_text() == "mine"
    assert f"{mine}: there already" in capsys.readouterr().out
    published = package.BUILTIN / "adapter" / "adapter.safetensors"
    assert (tmp_path / run.OUT / "adapter/adapter/adapter.safetensors").read_bytes() == published.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_verdicts_are_written_object_by_object(parts):
    tokenizer = FixClipTokenizer.from_pretrained(parts["unet"], subfolder="tokenizer")
    scene = scenes.sample_scene(3, num_objects=9)
    prompt = Prompt(scenes.long_caption(scene, 3).text, scene)
    perfect = evaluation.to_pil(scenes.render(scene))
    empty = evaluation.to_pil(torch.zeros(3, 72, 72, dtype=torch.uint8))
    row = evaluation.judged(prompt, [perfect, empty], tokenizer)
    assert row["right"] == ["1" * 9, "0" * 9]
    assert row["zones"].count("e") in range(2, 6)
    for zone, end in zip(row["zones"], row["ends"], strict=True):
        assert (zone == "e") == (end <= 75)
    assert max(row["ends"]) < row["tokens"] <= 248


def test_paddings_are_drawn_from_the_same_noise(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "BASE", str(parts["unet"]))
    trained = System("trained", str(parts["unet"]), conditioning="one_pass")
    monkeypatch.setitem(evaluation.SYSTEMS, "trained", trained)
    monkeypatch.setattr(evaluation, "DRAWING", replace(evaluation.DRAWING, steps=1, batch_size=2))
    drawn = {}

    def remembered(pipe, embeds, negative, draw=evaluation._draw_embeds):
        drawn[len(drawn)] = draw(pipe, embeds, negative)
        return drawn[len(drawn) - 1]

    monkeypatch.setattr(evaluation, "_draw_embeds", remembered)
    evaluation.paddings(number=3, output=tmp_path)
    found = json.loads((tmp_path / "paddings.json").read_text())
    assert {name: list(kinds) for name, kinds in found.items()} == {
        "trained": ["mask", "zeros", "keep"],
        "overlap": ["mask", "zeros"],
    }
    pipe = FixClipStableDiffusionPipeline.from_pretrained(parts["unet"], conditioning="overlap")
    noises = [torch.Generator().manual_seed(1000 + i) for i in range(3)]
    prompts = [prompt.text for prompt in evaluation.nine(3)]
    embeds, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    steps = {"num_inference_steps": 1, "guidance_scale": 2.0, "generator": noises}
    with torch.autocast("cpu", torch.bfloat16):
        wanted = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **steps)
    as_arrays = [np.stack([np.asarray(p, dtype=float) for p in own]) for own in [*drawn.values(), wanted.images]]
    masked, zeros, kept, windows, windows_zeros, stock = as_arrays
    assert np.abs(windows - stock).mean() < 1  # of 255; batches round
    for one, other in ((masked, zeros), (zeros, kept), (windows, windows_zeros)):
        assert np.abs(one - other).mean() > 1


def test_the_nearest_wording_is_the_one_that_is_said(parts, tmp_path, monkeypatch):
    base = FixClipStableDiffusionPipeline.from_pretrained(parts["unet"], conditioning="overlap")
    far = []
    for index in (0, 1, 4, 5, 8, 9, 12, 13):  # same and again, at all distances
        scene, caption = scenes.reference_at(4, index)
        candidates = scenes.plain_wordings(scene, caption, caption.references[-1])
        if index >= 12:
            far.append((scene, caption, candidates))
        for values, wording in candidates.items():
            assert evaluation.nearest_wording(base, base, wording, candidates) == values
    monkeypatch.setattr(evaluation, "BASE", str(parts["unet"]))
    output = CliRunner().invoke(evaluation.app, ["wordings", "overlap", "--number", "16", "--output", str(tmp_path)])
    assert "overlap: right 0." in output.output, output.output
    rows = json.loads((tmp_path / "wordings-overlap.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == {"same", "again"}
    assert all(row["pointer"] and row["right"] in (0, 1) and 0 < row["named"] < 1 for row in rows)
    cut = FixClipStableDiffusionPipeline.from_pretrained(parts["unet"], conditioning="stock")
    chunks = FixClipStableDiffusionPipeline.from_pretrained(parts["unet"], conditioning="chunks")
    unread = [evaluation.nearest_wording(cut, base, caption.text, candidates) for _, caption, candidates in far]
    assert unread == [None] * len(far)  # what points stands behind token 77
    assert None not in [evaluation.nearest_wording(chunks, base, caption.text, found) for _, caption, found in far]
    refused = CliRunner().invoke(evaluation.app, ["wordings", "nothing"])
    assert "system 'nothing': valid are" in str(refused.exception)


def test_references_are_judged_at_the_object_that_refers(parts):
    tokenizer = FixClipTokenizer.from_pretrained(parts["unet"], subfolder="tokenizer")
    prompts = evaluation.references(16)
    kinds, pointers = {}, set()
    for prompt in prompts:
        (first, *_) = scenes.annotate_caption(prompt.text).references
        objects = tuple(
            replace(o, colour="red" if o.colour != "red" else "blue") if o.place == first.place else o
            for o in prompt.scene.objects
        )
        pictures = [evaluation.to_pil(scenes.render(s)) for s in (prompt.scene, replace(prompt.scene, objects=objects))]
        judged, *others = evaluation.judged_references(prompt, pictures, tokenizer)
        assert judged["right"] == ("10" if "colour" in first.properties else "11")
        assert {other["right"] for other in others} <= {"11"}
        assert judged["chance"] in (0.125, 0.0208, 0.0833)
        found = [scenes.distance_bucket(row["distance"]) for row in (judged, *others)]
        kinds.setdefault(judged["kind"], []).extend(found)
        pointers |= {row["pointer"] for row in (judged, *others)}
    assert set(kinds) == set(scenes.KINDS)
    assert pointers >= {"place", "order", None}
    assert len(set(kinds["same"])) == 4


def test_wordings_are_reported_by_pointer_and_distance(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.wordings_table() == report.NOT_YET
    near = {"kind": "same", "pointer": "place", "distance": 76, "named": 0.25, "first": 1.0, "right": 1}
    rows = [near, near | {"pointer": "order", "distance": 77, "right": 0}, near | {"pointer": "name", "named": 0.5}]
    (tmp_path / "wordings-adapter.json").write_text(json.dumps({"rows": rows}))
    header, _, own, guess, first = (line.strip("| ").split(" | ") for line in report.wordings_table().splitlines())
    assert first[1:] == ["100.0"] * 6
    assert header[1:] == [
        f"{n} ({m})"
        for n, m in zip(
            ("by place", "by order", "by name", "under 77 tokens", "from 77 on", "all"), (1, 1, 1, 2, 1, 3), strict=True
        )
    ]
    assert own[1:] == ["100.0", "0.0", "100.0", "100.0", "0.0", "66.7"]
    assert guess[1:] == ["25.0", "25.0", "50.0", "37.5", "25.0", "33.3"]


def test_references_are_reported_by_distance_and_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.references_table() == "Not measured yet."
    one = {"kind": "same", "distance": 39, "chance": 0.125, "named": 0.25, "first": 1.0, "right": "11"}
    rows = [
        {"references": [one, one | {"distance": 150, "right": "10"}]},
        {"references": [one | {"kind": "default", "distance": 150, "chance": 0.025, "right": "00"}]},
    ]
    (tmp_path / "references-adapter.json").write_text(json.dumps({"prompts": rows}))
    header, _, lora, chance, named, first = (
        line.strip("| ").split(" | ") for line in report.references_table().splitlines()
    )
    assert header[1:5] == ["under 40 (1)", "40 to 77 (0)", "77 to 150 (0)", "over 150 (2)"]
    assert dict(zip(header[1:], lora[1:], strict=True)) == {
        "under 40 (1)": "100.0", "40 to 77 (0)": "-", "77 to 150 (0)": "-", "over 150 (2)": "25.0",
        "same (2)": "75.0", "again (0)": "-", "default (1)": "0.0", "remainder (0)": "-",
    }  # fmt: skip
    assert chance[4] == "7.5"
    assert named[1] == "25.0"
    assert first[1] == "100.0"
    report.plot_references(tmp_path / "references.png")
    assert (tmp_path / "references.png").stat().st_size > 5000


def test_the_report_tells_references_from_the_habit_of_the_first_object(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.pointing_table() == report.NOT_YET
    one = {"kind": "same", "distance": 77, "chance": 0.1, "named": 0.2, "first": 1.0, "right": "1"}
    other = one | {"kind": "again", "first": 0.0, "right": "0"}
    rule, near = one | {"kind": "default", "first": 0.0, "right": "0"}, other | {"distance": 76, "right": "1"}
    rows = [{"references": [one, other]}, {"references": [near]}, {"references": [rule, rule | {"right": "1"}]}]
    for name in ("references", "references_heldout"):
        (tmp_path / f"{name}-adapter.json").write_text(json.dumps({"prompts": rows}))
    header, _, cells = (line.strip("| ").split(" | ") for line in report.pointing_table().splitlines())
    assert cells[1:] == ["50.0", "100.0", "0.0"] * 2
    assert header[2] == "a sentence of the first object, train forms (1)"


def test_the_report_counts_what_the_json_says(tmp_path, monkeypatch):
    rows = [
        {"tokens": 150, "ends": [40, 120], "zones": "ef", "right": ["10", "11"], "shape": ["10", "11"],
         "colour": ["11", "11"], "background": "11"},
        {"tokens": 150, "ends": [70, 100], "zones": "ec", "right": ["10", "01"], "shape": ["11", "01"],
         "colour": ["10", "11"], "background": "10"},
    ]  # fmt: skip
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "nine-adapter.json").write_text(json.dumps({"prompts": rows}))
    cells = report.systems_table().splitlines()[2].split(" | ")
    # before: seed 0 both right, seed 1 one of two; after: seed 0 none, seed 1 both
    assert cells[1] == "75.0 ± 35.4"
    assert cells[2] == "50.0 ± 70.7"
    assert len(report.systems_table().splitlines()) == 3
    report.plot_zones(tmp_path / "zones.png")
    assert (tmp_path / "zones.png").stat().st_size > 5000
    runs = {f"fixclip-lr0.0001-seed{s}": {"step": 9, **dict.fromkeys(report.RECALLS, 0.5 + s / 10)} for s in range(3)}
    runs["longclip-lr1e-05-seed0"] = {"step": 9, **dict.fromkeys(report.RECALLS, 0.25)}
    (tmp_path / "ablations.json").write_text(json.dumps(runs))
    assert "| FIX-CLIP, an eighth of the patches masked | 0.0001 | 3 | 0.600 ± 0.100 |" in report.ablations_table()
    assert "| Long-CLIP recipe | 1e-05 | 1 | 0.250 |" in report.ablations_table()
    assert "| Long-CLIP recipe | 0.250 | - |" in report.tuning_table()


def test_the_report_puts_training_seeds_together(tmp_path, monkeypatch):
    """Two training seeds of two systems, one of a third: spread over the seeds, differences over those of both."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    marks = {"overlap_text_adapter": "11", "overlap_text_adapter_seed1": "10", "adapter": "01"}
    marks |= {"adapter_seed1": "11", "stretched_adapter": "11"}
    for system, right in marks.items():
        row = {"tokens": 150, "ends": [40, 120], "zones": "ef", "background": "1"}
        row |= {"right": [right], "shape": [right], "colour": [right]}
        distances = (76, 77) if system.startswith("adapter") else (77, 120)
        row["references"] = [
            {"kind": "same", "first": float(d == 120), "distance": d, "right": right[-1]} for d in distances
        ]
        for name in ("nine", "short", "references"):
            (tmp_path / f"{name}-{system}.json").write_text(json.dumps({"prompts": [row]}))
    _, _, text_adapter, adapter = [line.strip("| ").split(" | ") for line in report.seeds_table().splitlines()]
    assert text_adapter[1:] == ["2", "100.0 ± 0.0", "50.0 ± 70.7", "50.0 ± 70.7", "50.0 ± 70.7", "75.0 ± 35.4"]
    assert adapter[1:] == ["2", "50.0 ± 70.7", "100.0 ± 0.0", "100.0 ± 0.0", "100.0 ± 0.0", "75.0 ± 35.4"]
    header, _, *each = [line.strip("| ").split(" | ") for line in report.seeds_references_table().splitlines()]
    assert header[1:] == ["training seed", "a rule (`default`, `remainder`) (0)", *header[3:]]
    assert [cells[1:] for cells in each] == [
        ["0", "-", "100.0", "100.0", "100.0"], ["1", "-", "0.0", "0.0", "0.0"],  # joined windows: of 77 and 120 tokens
        ["0", "-", "-", "100.0", "100.0"], ["1", "-", "-", "100.0", "100.0"],  # FIX-CLIP: of 77 alone
    ]  # fmt: skip
    (difference,) = report.seeds_differences_table().splitlines()[2:]
    # Differences of 100 and 0, all in one prompt: 12.706 s / sqrt(2), s = 100 / sqrt(2).
    cells = ["2", "+50.0 (+50.0 to +50.0)", "-50.0 (-50.0 to -50.0)", "-50.0 (-50.0 to -50.0)"]
    cells[1:] = [f"{cell}; ± 635.3" for cell in cells[1:]]
    assert difference.strip("| ").split(" | ")[1:] == cells
    (tmp_path / "nine-adapter_seed1.json").unlink()
    (tmp_path / "nine-overlap_text_adapter_seed1.json").unlink()
    for table in (report.seeds_table, report.seeds_references_table, report.seeds_differences_table):
        assert table() == "Not measured yet."


def test_the_report_sets_low_rank_changes_beside_the_whole_tower(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "OUT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    sizes = {"encoder_diffusers/text_encoder/model": 4_000_000, "delta_rank64/text_delta": 800_000}
    sizes["delta_rank16/text_delta"] = 200_000
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True)
        tensors = {"x": torch.zeros(size // 2).half(), "short_text_model.x": torch.zeros(9).half()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for name, recall in (("encoder", 0.9), ("encoder_rank16", 0.5)):  # that of rank 64 is still being trained
        (tmp_path / name).mkdir()
        row = {"step": 9, **dict.fromkeys(report.RECALLS, recall)}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    row = {"tokens": 150, "ends": [40, 120], "zones": "ef", "background": "1"}
    row |= {"right": ["10", "11"], "shape": ["10", "11"], "colour": ["10", "11"]}
    for system in ("trained", "trained_rank16"):
        (tmp_path / f"nine-{system}.json").write_text(json.dumps({"prompts": [row]}))
    (tmp_path / "deltas.json").write_text(json.dumps(report.collect_deltas()))
    small, whole = (line.strip("| ").split(" | ") for line in report.deltas_table().splitlines()[2:])
    assert small == ["a change of rank 16", "0.2 MB", *["0.500"] * 4, "100.0 ± 0.0", "50.0 ± 70.7"]
    assert whole[:3] == ["the whole tower", "4.0 MB", "0.900"]


def test_the_report_says_how_long_stages_took(tmp_path, monkeypatch):
    """Over all starts; a group once all of it is done, where two at a time count once; older times stay."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "OUT", tmp_path / "outputs")
    first, second = (
        run.Stage("a/b", (), (), Path("one")),
        run.Stage("unet", (), (), Path("two"), processes=2),
    )
    monkeypatch.setattr(run, "GROUPS", {name: lambda: [first, second] for name in report.TIMED})
    monkeypatch.setattr(run, "chain", lambda: [first, second])
    assert report.collect_times() == {}
    assert report.times_table() == report.NOT_YET
    for stage, times in ((first, [[0, 600], [1000, 1300]]), (second, [[300, 1200]])):
        stopwatch = run.log_of(stage).with_suffix(".times.json")
        stopwatch.parent.mkdir(parents=True, exist_ok=True)
        stopwatch.write_text(json.dumps({"processes": stage.processes, "times": times}))
    (tmp_path / "one").touch()
    assert report.collect_times()["groups"] == {}  # the other is being trained
    (tmp_path / "two").touch()
    training = tmp_path / run.OUT / "unet"
    training.mkdir(parents=True)
    speeds = [32.0, 32.0, 0.5]  # the last holds a pause
    lines = [json.dumps({"step": 20 * i, "samples_per_second": speed}) for i, speed in enumerate(speeds)]
    (training / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 60, "recall": 0.5})]))
    (training / "recipe.yaml").write_text("train: {steps: 960, batch_size: 16}\n")
    (tmp_path / "times.json").write_text(json.dumps({"stages": {"old": {"minutes": 1, "processes": 1}}, "groups": {}}))
    report.collect()
    assert set(json.loads((tmp_path / "times.json").read_text())["stages"]) == {"old", "a/b", "unet"}
    rows = [line.strip("| ").split(" | ") for line in report.times_table().splitlines()[2:]]
    assert rows[:2] == [["`a/b`", "15", "-", "1"], ["`unet`", "15", "8", "2"]]
    assert rows[2] == ["all of `chain`, two processes at a time", "22", "-", "-"]  # 0 to 1300 seconds, without a gap


def test_the_report_compares_depths(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "OUT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.depths_table() == report.NOT_YET
    for layers, last in ((6, 0.25), (10, 0.125)):
        folder = tmp_path / "depths" / f"adapter-{layers}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter.safetensors").touch()
        rows = [{"step": s, "loss_windows": 9.0 if s < 420 else last, "loss_plain": last} for s in range(20, 520, 20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "depths" / "adapter-4").mkdir()  # not done
    report.collect()
    rows = [line.strip("| ").split(" | ")[1:] for line in report.depths_table().splitlines()[2:]]
    assert rows == [["6", "0.250", "0.250"], ["10", "0.125", "0.125"]]


@pytest.mark.parametrize("name", ["deltas", "depths", "ablations", "training"])
def test_collecting_keeps_results_of_runs_that_are_elsewhere(tmp_path, monkeypatch, name):
    """After `package.py restore` the runs of what is published are not there; others add to their figures."""
    monkeypatch.setattr(report, "OUT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "collect_deltas", lambda: {"16": {"bytes": 1}})
    monkeypatch.setattr(report, "collect_depths", lambda: {"adapter-2": {"loss_windows": 0.5}})
    for folder in ("ablations/longclip-lr0.0001-seed0", "unet"):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / "config.json").touch()
        row = {"step": 9, "objects_right": 0.5, **dict.fromkeys(report.RECALLS, 0.5)}
        (tmp_path / folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    new = {"deltas": "16", "depths": "adapter-2", "ablations": "longclip-lr0.0001-seed0", "training": "unet"}[name]
    (tmp_path / f"{name}.json").write_text(json.dumps({"elsewhere": {"bytes": 2}, new: {"bytes": 3}}))
    report.collect()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert list(found) == ["elsewhere", new]
    assert found["elsewhere"] == {"bytes": 2}
    assert found[new] != {"bytes": 3}


def test_the_page_keeps_its_prose():
    text = "Before.\n<!-- a -->\nold\n<!-- /a -->\nAfter."
    assert report.page(text, {"a": "new"}) == "Before.\n<!-- a -->\nnew\n<!-- /a -->\nAfter."
    with pytest.raises(ValueError, match="<!-- b -->"):
        report.page(text, {"b": "new"})


def test_the_page_in_the_repository_is_what_its_json_says():
    text = report.PAGE.read_text()
    assert report.page(text, {name: make() for name, make in report.TABLES.items()}) == text


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """The scripts' paths are relative to the repository, as their commands are given."""
    monkeypatch.chdir(run.ROOT)


def test_install_leaves_the_package_alone_where_a_part_is_missing(tmp_path, monkeypatch):
    save = {"base": tmp_path / "base", "clip": tmp_path / "clip"}
    monkeypatch.setattr(package, "PARTS", save)
    old = tmp_path / "package" / "base" / "model.safetensors"
    old.parent.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, old)
    save["base"].mkdir()
    save_file({"weight": torch.ones(2)}, save["base"] / "model.safetensors")
    with pytest.raises(SystemExit, match=r"there is no \S*clip: run the stages that write them first"):
        package.install(tmp_path / "package")
    assert not load_file(old)["weight"].any()
    save["clip"].mkdir()
    (save["clip"] / "config.json").write_text("{}")
    package.install(tmp_path / "package")
    assert load_file(old)["weight"].dtype == torch.float16
    assert load_file(old)["weight"].all()
    assert {folder.name for folder in (tmp_path / "package").iterdir()} == {"base", "clip"}
