"""Pictures of several systems against their prompts, on tiny real models."""

import inspect
import json
import re
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_adapter
import tiny_clips
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny_adapter import without_onednn  # noqa: F401
from typer.testing import CliRunner

from fixclip_cli.evaluate_images import _systems
from fixclip_cli.main import app
from fixclip_core import scenes
from fixclip_core.evaluation.encoders import load_encoder
from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTokenizer,
    TextAdapter,
)
from fixclip_diffusion.adapter_training import trainer as train
from fixclip_diffusion.evaluation import generate, judges, report, run, scores
from fixclip_diffusion.evaluation.benchmarks import Benchmark
from fixclip_diffusion.evaluation.generate import Drawing, System
from fixclip_diffusion.evaluation.prompts import Prompt, number_prompts, read_prompts, sentences

LONG, SHORT = tiny_adapter.caption(3), "A red horse stands. A blue boat."


def benchmark(*prompts):
    return Benchmark("prompts", tuple(number_prompts(prompts)), "here")


@pytest.fixture(scope="module")
def tokenizer(sd1):
    return FixClipTokenizer.from_pretrained(sd1, subfolder="tokenizer")


@pytest.fixture(scope="module")
def parts(sd1, tmp_path_factory):
    """An adapter and a LoRA that change pictures."""
    folder = tmp_path_factory.mktemp("parts")
    models = train.load_frozen(train.BaseSection(base=str(sd1)))
    tiny_adapter.randomize(TextAdapter(32, hidden_width=16), std=0.5).save_pretrained(folder / "adapter")
    lora = train.add_lora(models.unet, 2)
    state = {name: torch.randn_like(p) for name, p in lora.items()}
    train.save_lora(models.unet, state, folder / "lora")
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A CLIP of 248 tokens as a folder."""
    folder = tmp_path_factory.mktemp("scorer")
    clip, config, preprocess = tiny_clips.full_vocabulary_clip()
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {**preprocess, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


# -- prompts and systems -------------------------------------------------------------------------------------


def test_sentences_are_placed_by_what_a_stock_encoder_reads(tokenizer):
    text = tiny.sentences(28)
    found = sentences(text, tokenizer)
    assert " ".join(s.text for s in found) == text
    assert [s.zone for s in found] == sorted((s.zone for s in found), key=["before", "across", "after", "past"].index)
    end = 1
    for sentence in found:
        first, end = end + 1, end + len(tokenizer(sentence.text).input_ids) - 2
        zone = "before" if end <= 76 else "across" if first <= 76 else "after" if end <= 247 else "past"
        assert sentence.zone == zone, (sentence, first, end)
    assert {s.zone for s in found} >= {"before", "after", "past"}


def test_prompt_files(tmp_path):
    (tmp_path / "plain.txt").write_text("A horse.\n\n  A boat. \n")
    assert [p.text for p in read_prompts(str(tmp_path / "plain.txt"))] == ["A horse.", "A boat."]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "A horse.\\nA boat."}\n')
    assert read_prompts(str(tmp_path / "rows.jsonl")) == [Prompt("A horse.\nA boat.", id="00000")]
    drawn = read_prompts("scenes:3")
    assert len({p.text for p in drawn}) == 3
    assert all(len(p.scene.objects) == 9 for p in drawn)
    (tmp_path / "scenes.txt").write_text("\n".join(p.text for p in drawn))
    again = read_prompts(str(tmp_path / "scenes.txt"))
    assert [[q.text for q in p.questions] for p in again] == [[q.text for q in p.questions] for p in drawn]
    assert [{(o.place, o.shape, o.colour) for o in p.scene.objects} for p in again] == [
        {(o.place, o.shape, o.colour) for o in p.scene.objects} for p in drawn
    ]
    assert read_prompts(str(tmp_path / "scenes.txt"), check_scenes=False)[0].scene is None


@pytest.mark.parametrize(
    ("name", "content", "check", "message"),
    [
        ("none.txt", None, None, "not a readable text file"),
        ("empty.txt", "\n \n", None, "it holds no prompt"),
        (
            "rows.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            None,
            r"rows\.jsonl:2: expected a JSON object with `prompt`",
        ),
        ("rows.jsonl", '{"prompt": 3}\n', None, r"rows\.jsonl:1: prompt is 3"),
        ("plain.txt", "\nA horse.\n", True, r"plain\.txt:2: no scene's caption"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, name, content, check, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name), check)


def test_systems_of_the_command_line():
    assert generate.parse_system("a+b:adapter=X/y,long_prompt=windows_77") == System(
        "a+b", adapter="X/y", conditioning="chunks"
    )
    assert generate.parse_system("x:encoder_2=G") == System("x", encoder_2="G")
    systems = generate.default_systems("B", None, None, None)
    assert _systems("B", None, None, "none", None, [], [], []) == systems
    for name in ("builtin:scenes", "builtin:scenes/base"):  # a whole model's adapter is left out, too
        whole = _systems(name, None, None, "none", None, [], [], [])
        assert whole == generate.default_systems("builtin:scenes/base", None, None, None)
    assert [s.name for s in systems] == ["stock", "chunks", "overlap", "one_pass"]
    assert systems[0] == System("stock", conditioning="stock")
    for text, message in (
        ("a:adaptor=b", "'adaptor=b' is not KEY=VALUE with one of encoder, encoder_2, adapter, lora, conditioning"),
        ("a:pipeline=b,encoder=c", "pipeline and encoder exclude each other"),
        ("a:pictures=b,lora=c", "pictures and lora exclude each other"),
        ("a/b", "a name has letters"),
        ("a:long_prompt=cut", "conditioning='cut': valid are stock, chunks"),
    ):
        with pytest.raises(ValueError, match=message):
            generate.parse_system(text)


# -- pictures and scores -------------------------------------------------------------------------------------


def test_every_system_draws_what_its_pipeline_draws(sd1, parts, tmp_path):
    systems = generate.default_systems(str(sd1), None, str(parts / "adapter"), str(parts / "lora"))
    drawing = Drawing(steps=2, guidance_scale=5.0, size=16, seed=3, num_seeds=2)
    result = run.evaluate_images(str(sd1), benchmark(Prompt(LONG)), systems, drawing, tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    ours = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    adapted = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=parts / "adapter")
    both = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=parts / "adapter")
    both.load_lora_weights(parts / "lora")
    pictures = []
    for name, pipe, options in (
        ("stock", stock, {}),
        ("chunks", ours, {"conditioning": "chunks"}),
        ("one_pass", ours, {"conditioning": "one_pass"}),
        ("overlap+adapter", adapted, {}),
        ("overlap+adapter+lora", both, {}),
    ):
        for seed in (3, 4):
            options |= {"num_inference_steps": 2, "guidance_scale": 5.0, "width": 16, "height": 16}
            wanted = np.asarray(pipe(LONG, generator=torch.Generator().manual_seed(seed), **options).images[0])
            found = np.asarray(Image.open(tmp_path / "images" / name / f"00000-seed{seed}.png"))
            assert np.abs(found.astype(int) - wanted).max() <= 1, name
            pictures.append(found.tobytes())
    assert len(set(pictures)) == len(pictures)
    assert Image.open(tmp_path / "sheet.png").width > 5 * 192
    assert json.loads((tmp_path / "report.json").read_text()) == result
    assert "nothing was scored" in report.markdown(result)


def test_a_lora_acts_with_its_weight(sd1, parts):
    """At 0 it changes nothing, at 0.5 it draws what `set_adapters` draws, also beside a saved pipeline's own."""
    painter, prompts, drawing = generate.Painter(str(sd1)), [Prompt(SHORT)], Drawing(steps=1, size=16)
    own = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    own.load_lora_weights(parts / "lora", adapter_name="mine")
    own.set_adapters(["mine"], [0.5])
    wanted = own(SHORT, num_inference_steps=1, width=16, height=16, generator=torch.Generator().manual_seed(0))
    lora = parts / "lora"
    systems = [System("none"), System("off", lora=f"{lora}:0"), System("half", lora=f"{lora}:0.5")]
    systems += [System("whole", lora=str(lora)), System("again")]
    none, off, half, whole, again = (np.asarray(painter.draw(s, prompts, drawing)[0][0]) for s in systems)
    np.testing.assert_array_equal(off, none)
    np.testing.assert_array_equal(again, none)
    assert np.abs(half.astype(int) - np.asarray(wanted.images[0])).max() <= 1
    assert np.abs(half.astype(int) - none).max() > 2
    assert np.abs(half.astype(int) - whole).max() > 2
    with pytest.raises(ValueError, match=r"LoRA '.*:inf': its weight must be a finite number"):
        System("b", lora=f"{lora}:inf").check_names()


def test_batches_draw_what_single_pictures_are(sd1):
    """Of prompts of several lengths, whose states cannot be stacked, in an order that mixes them."""
    prompts = [Prompt(text) for text in ("A cat.", LONG, "A dog.", LONG[::-1][:300], LONG + LONG, "A hat.")]
    system = System("windows", conditioning="chunks")
    one, several = (
        generate.Painter(str(sd1)).draw(
            system, prompts, Drawing(steps=2, guidance_scale=3.0, size=16, num_seeds=2, batch_size=batch_size)
        )
        for batch_size in (1, 4)
    )
    for alone, together in zip(one, several, strict=True):
        for a, b in zip(alone, together, strict=True):
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert len({picture.tobytes() for own in one for picture in own}) == 12


def test_scores_are_cosines_by_sentence_and_zone(sd1, scorer, tokenizer, tmp_path):
    encoder = load_encoder(scorer)
    prompts = [Prompt(LONG), Prompt(SHORT)]
    drawing = Drawing(steps=1, size=16, num_seeds=2)
    systems = [System("stock", conditioning="stock"), System("plain")]
    result = run.evaluate_images(str(sd1), benchmark(*prompts), systems, drawing, tmp_path, scorer=encoder)
    pictures = generate.Painter(str(sd1)).draw(System("plain"), prompts, drawing)
    images = torch.stack([encoder.preprocess(picture) for picture in pictures[0]])
    with torch.no_grad():
        image = encoder.model.encode_image(images, normalize=True)

        def score(text):
            return (image @ encoder.model.encode_text(encoder.tokenizer([text]), normalize=True)[0]).mean().item()

        own = sentences(LONG, tokenizer)
        row = result["prompts"][0]["systems"]["plain"]
        assert row["whole"] == pytest.approx(score(LONG), abs=1e-5)
        assert row["per_sentence"] == pytest.approx([score(s.text) for s in own], abs=1e-5)
    metrics = result["cosines"]["plain"]
    after = [v for s, v in zip(own, row["per_sentence"], strict=True) if s.zone == "after"]
    assert metrics["sentence_after"] == {
        "mean": pytest.approx(sum(after) / len(after)),
        "standard_error": None,
        "count": 1,
    }
    assert metrics["whole"]["count"] == metrics["sentence_before"]["count"] == 2
    assert result["cosines"]["stock"] != metrics
    table = report.markdown(result)
    assert "sentence_after" in table
    assert f"{metrics['whole']['mean']:.4f}" in table
    drawn, made = table.split("## How it was made")[1].strip().split("\n\n")
    assert drawn == f"Drawing: base {sd1}; 1 steps, guidance 7.5, seeds from 0."
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines()]
    assert header == ["system", "conditioning"]
    assert rows == [["stock", "stock"], ["plain", "–"]]
    assert "<td>plain</td>" in (tmp_path / "report.html").read_text()


def test_a_background_alone_makes_no_scene(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("A red bicycle leaning against a white wall.\nA cat sits in front of a black wall.\n")
    assert [prompt.scene for prompt in read_prompts(str(file))] == [None, None]
    with pytest.raises(ValueError, match=r"prompts\.txt:1: no scene's caption: it names no object"):
        read_prompts(str(file), check_scenes=True)


def test_the_exact_checker_judges_scenes_by_zone(tokenizer):
    """Right pictures are right everywhere; where one object is painted over, only its zone suffers."""
    prompt = read_prompts("scenes:1")[0]
    right = scenes.render(prompt.scene)
    zones = scenes.object_zones(
        scenes.annotate_caption(prompt.text),
        tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"],
    )
    spoilt = next(item for item in prompt.scene.objects if zones[item.place] == "after")
    wrong = scenes.render(
        scenes.Scene(prompt.scene.background, tuple(o for o in prompt.scene.objects if o is not spoilt))
    )
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in (right, wrong)]
    found = judges.scene_verdicts(pictures, prompt, tokenizer)["objects"]
    assert [item["right"] for item in found].count(False) == 1
    assert {item["zone"] for item in found if not item["right"]} == {"after"}
    checker = judges.SceneChecker()
    replies = [list(checker.answers(picture, prompt, prompt.questions)) for picture in pictures]
    assert {reply.answer for reply in replies[0]} == {"yes"}
    lost = [q.id for q, reply in zip(prompt.questions, replies[1], strict=True) if reply.answer == "no"]
    assert lost == [f"{spoilt.place}/shape", f"{spoilt.place}/colour"]


def test_references_are_asked_for_by_distance():
    """What only another sentence says is a question of its own, and wrong where the picture does not follow it."""
    prompts = read_prompts("scenes-references:16")
    assert all(scenes.read_caption(p.text) == p.scene.described() for p in prompts)
    asked = [q for p in prompts for q in p.questions if q.id.endswith("/reference")]
    assert {q.category for q in asked} == {f"reference {bucket}" for bucket in scenes.DISTANCES}
    checker = judges.SceneChecker()
    for prompt in prompts:
        (question, *_) = [q for q in prompt.questions if q.id.endswith("/reference")]
        place, what = question.fact
        (item,) = [item for item in prompt.scene.objects if item.place == place]
        assert question.about in prompt.text
        assert all(getattr(item, kind) in question.text for kind in what.split())
        other = replace(item, colour="red" if item.colour == "blue" else "blue", size="large")
        other = replace(other, shape="star" if item.shape == "ring" else "ring")
        changed = replace(prompt.scene, objects=tuple(other if o is item else o for o in prompt.scene.objects))
        for scene, answer in ((prompt.scene, "yes"), (changed, "no")):
            picture = Image.fromarray(scenes.render(scene).permute(1, 2, 0).numpy())
            (reply,) = checker.answers(picture, prompt, [question])
            assert reply.answer == answer
    guesses = scores.reference_guesses(prompts)
    assert list(guesses) == [f"reference {bucket}" for bucket in scenes.DISTANCES]
    assert all(1 / 48 <= guess["uniform"] <= 1 / 8 and 0 <= guess["named"] <= 1 for guess in guesses.values())
    assert scores.reference_guesses(read_prompts("scenes:2")) == {}
    found = {"a": {"question": {name: {"mean": 0.5, "standard_error": 0.1} for name in guesses}}}
    (_, text) = report._references(found, guesses)
    assert text.count("50.0 ± 10.0") == 4
    assert "guess: any value" in text
    assert report.percent({"mean": 0.5, "standard_error": None}) == "50.0"


def test_what_cannot_be_drawn_is_named_first(sd1, parts, tmp_path):
    drawing, prompts = Drawing(steps=1, size=16), [Prompt(SHORT)]
    other = tmp_path / "other"
    TextAdapter(32).save_pretrained(other)
    (other / "made_for.json").write_text('{"text encoder": "of somebody else", "tokenizer": "another"}')
    for systems, message in (
        ([System("a"), System("a")], r"systems \['a', 'a'\]: at least one system, every name once"),
        ([], "at least one system"),
        ([System("a"), System("b", adapter=str(other))], "made with another text encoder and another tokenizer"),
        ([System("a"), System("b", lora=str(tmp_path))], "LoRA .* cannot be loaded"),
        ([System("a"), System("b", encoder=str(tmp_path))], "no readable config.json"),
        ([System("a"), System("b", lora="no-such.safetensors")], "system 'b': lora 'no-such.safetensors' is neither a"),
        ([System("a"), System("b", pipeline="/no/such")], "system 'b': pipeline '/no/such' is neither a fold"),
    ):
        with pytest.raises(ValueError, match=message):
            run.evaluate_images(str(sd1), benchmark(*prompts), systems, drawing, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="/proc/out cannot be written to"):
        run.evaluate_images(str(sd1), benchmark(*prompts), [System("a")], drawing, Path("/proc/out"))


# -- the command ---------------------------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(app, ["evaluate-images", *map(str, arguments)])
    return types.SimpleNamespace(code=result.exit_code, text=" ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split()))


def test_command(sd1, parts, scorer, tmp_path):
    found = invoke(
        "scenes:1", "--base", sd1, "--adapter", parts / "adapter", "--scorer", scorer, "--steps", 1, "--size", 32,
        "--guidance", 3, "-o", tmp_path / "out",
    )  # fmt: skip
    assert found.code == 0, found.text
    assert "Judged by checker" in found.text
    result = json.loads((tmp_path / "out" / "report.json").read_text())
    own = result["judges"]["checker"]["systems"]
    assert list(own) == ["stock", "chunks", "overlap", "one_pass", "overlap+adapter"]
    assert {"before", "after"} <= own["overlap+adapter"]["zone"].keys()
    assert {"whole", "sentence_after"} <= result["cosines"]["overlap+adapter"].keys()
    assert result["settings"]["drawing"] == {
        "steps": 1, "guidance_scale": 3.0, "size": 32, "seed": 0, "num_seeds": 1, "negative_prompt": "",
        "batch_size": 1,
    }  # fmt: skip


def test_a_saved_pipeline_of_ours_is_drawn_with_as_it_is(sd1, tmp_path):
    ours = FixClipStableDiffusionPipeline.from_pretrained(sd1, conditioning="chunks")
    ours.save_pretrained(tmp_path / "saved")
    one, other = System("one", pipeline=str(tmp_path / "saved")), System("other", conditioning="chunks")
    painter = generate.Painter(str(sd1))
    pictures = [painter.draw(system, [Prompt(LONG)], Drawing(steps=1, size=16))[0][0] for system in (one, other)]
    painter.check(one)
    np.testing.assert_allclose(*(np.asarray(picture, dtype=float) for picture in pictures), atol=1)  # of 255

    class Personal(FixClipStableDiffusionPipeline):
        pass

    for kind in (FixClipStableDiffusionPipeline, FixClipStableDiffusionXLPipeline, Personal):
        known = inspect.signature(kind.__call__).parameters
        assert {"prompt", "num_inference_steps", "height", "conditioning", "weights"} <= known.keys()


def test_command_names_what_is_wrong(sd1, tmp_path):
    small = invoke("scenes:1", "--base", sd1, "--size", "16", "-o", tmp_path / "small").text
    assert "--size 16: the checker of scenes reads pictures of 24 pixels and more" in small
    assert not (tmp_path / "small").exists()
    assert "not a readable text file" in invoke(tmp_path / "none.txt", "--base", sd1).text
    assert invoke(tmp_path / "none.txt", "--base", sd1).code == 2
    assert "give one number" in invoke("scenes:1", "--size", "16x24").text
    assert "device 'nonsense' cannot be used" in invoke("scenes:1", "--base", sd1, "--device", "nonsense").text
    assert "is not KEY=VALUE" in invoke("scenes:1", "--base", sd1, "--system", "a:b").text
