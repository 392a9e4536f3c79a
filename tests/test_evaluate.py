import json
import shutil
import tarfile
from dataclasses import replace

import open_clip
import pytest
import torch
from command_line import error_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_clips import full_vocabulary_clip, tiny_transformers_clip

from fixclip_core import builtin
from fixclip_core.data.config import DataConfig
from fixclip_core.data.sources import open_source
from fixclip_core.evaluation.benchmarks import Benchmark
from fixclip_core.evaluation.classification import (
    _class_folders,
    _class_names,
    classification_report,
    rank_of_label,
    read_classnames,
)
from fixclip_core.evaluation.encoders import encode_texts, load_encoder
from fixclip_core.evaluation.items import BenchmarkItems, SourceItems
from fixclip_core.evaluation.report import format_table
from fixclip_core.evaluation.retrieval import encode_dataset, retrieval_metrics, retrieval_report
from fixclip_core.model.fixclip import FixClip
from fixclip_core.model.positional import stretch_positions
from fixclip_core.weights.load import load_fixclip
from fixclip_core.weights.read import ClipCheckpoint
from fixclip_core.weights.write import write_open_clip, write_transformers
from fixclip_diffusion.tiny import train_tokenizer


def directions(degrees):
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1).float()


def test_retrieval_by_hand():
    # Angles on a circle: the nearer, the more similar. Image 0 at 0, image 1 at 90, image 2 at 40.
    images = directions([0, 90, 40])
    # Text 0 (image 0) at 10: images rank 0 (10), 2 (30), 1 (80) -> rank 1.
    # Text 1 (image 1) at 45: images rank 2 (5), then 0 and 1 tie at 45 -> the tie counts against it: rank 3.
    # Text 2 (image 2) at 80: images rank 1 (10), 2 (40), 0 (80) -> rank 2.
    texts = directions([10, 45, 80])
    # Image 0: texts 0 (10), 1 (45), 2 (80) -> its own has rank 1.
    # Image 1: texts 2 (10), 1 (45), 0 (80) -> rank 2.
    # Image 2: texts 1 (5), 0 (30), 2 (40) -> rank 3.
    metrics = retrieval_metrics(images, texts, [0, 1, 2], ks=(1, 2, 3))
    assert metrics == pytest.approx(
        {
            "image_to_text_recall_at_1": 1 / 3,
            "image_to_text_recall_at_2": 2 / 3,
            "image_to_text_recall_at_3": 1,
            "text_to_image_recall_at_1": 1 / 3,
            "text_to_image_recall_at_2": 2 / 3,
            "text_to_image_recall_at_3": 1,
        }
    )


def test_any_number_of_texts_per_image():
    images = directions([0, 90])
    # Image 0 has three texts: its best (5) beats the foreign one (30), its worst (85) does not matter.
    metrics = retrieval_metrics(images, directions([5, 60, 85, 30]), [0, 0, 0, 1], ks=(1, 2, 3, 4))
    # Image 1: foreign texts at 85 (5 away) and at 60 (30) lie nearer than its own at 30 (60) -> rank 3.
    assert [metrics[f"image_to_text_recall_at_{k}"] for k in (1, 2, 3)] == [0.5, 0.5, 1]
    # Texts: 5 -> right; 60, 85 -> image 1 is nearer; 30 -> image 0 is nearer.
    assert metrics["text_to_image_recall_at_1"] == 0.25
    assert metrics["text_to_image_recall_at_2"] == 1


def test_a_collapsed_encoder_scores_nothing():
    ones = torch.ones(20, 8)
    metrics = retrieval_metrics(ones, ones, range(20))
    assert set(metrics.values()) == {0.0}


def test_a_tie_between_own_texts_is_no_tie():
    metrics = retrieval_metrics(directions([0, 90]), directions([10, -10, 90]), [0, 0, 1])
    assert metrics["image_to_text_recall_at_1"] == 1


def reference_metrics(images, texts, text_to_image, k):
    normalize = torch.nn.functional.normalize
    scores = (normalize(images.double(), dim=1) @ normalize(texts.double(), dim=1).T).tolist()
    found_images = found_texts = 0
    for i in range(len(images)):
        own = max(scores[i][t] for t, image in enumerate(text_to_image) if image == i)
        found_images += sum(scores[i][t] >= own - 1e-6 for t, image in enumerate(text_to_image) if image != i) < k
    for t, i in enumerate(text_to_image):
        found_texts += sum(scores[j][t] >= scores[i][t] - 1e-6 for j in range(len(images)) if j != i) < k
    return found_images / len(images), found_texts / len(texts)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_agree_with_a_plain_loop(data):
    num_images = data.draw(st.integers(1, 7))
    extra = data.draw(st.lists(st.integers(0, num_images - 1), max_size=8))
    text_to_image = data.draw(st.permutations([*range(num_images), *extra]))
    # Few distinct whole numbers make ties common.
    row = st.lists(st.integers(-1, 1), min_size=3, max_size=3)
    images = torch.tensor(data.draw(st.lists(row, min_size=num_images, max_size=num_images))).float()
    texts = torch.tensor(data.draw(st.lists(row, min_size=len(text_to_image), max_size=len(text_to_image)))).float()
    k = data.draw(st.integers(1, 4))
    expected = reference_metrics(images, texts, text_to_image, k)
    for chunk_size in (1, 3, 4096):
        metrics = retrieval_metrics(images, texts, text_to_image, ks=(k,), chunk_size=chunk_size)
        assert tuple(metrics.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("images", "texts", "text_to_image", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), [0, 1], "one width"),
        (torch.ones(2, 3), torch.ones(2, 3), [0], "one for each text"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 2], "outside the 2 images"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 0], "image 1 has no text"),
        (torch.ones(0, 3), torch.ones(0, 3), torch.zeros(0, dtype=torch.long), "at least one"),
        (torch.full((1, 3), torch.nan), torch.ones(1, 3), [0], "image features hold nan"),
        (torch.ones(1, 3), torch.full((1, 3), torch.inf), [0], "text features hold nan"),
    ],
)
def test_bad_retrieval_input(images, texts, text_to_image, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(images, texts, text_to_image)


# --- any CLIP, any data ----------------------------------------------------------------------------------

WORDS = ["red horse", "green boat", "blue house", "black cat", "white lamp", "pink kite"]


def long_caption(number):
    return f"A {WORDS[number]} stands in a field. " + "There is much grass around it. " * 15


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One CLIP of 77 tokens in several formats, and a FixClip made of it."""
    folder = tmp_path_factory.mktemp("models")
    clip, config, preprocess = full_vocabulary_clip()
    open_clip_folder = folder / "open_clip"
    checkpoint = ClipCheckpoint("", clip.state_dict(), config, {**preprocess, "resize_mode": "shortest"})
    write_open_clip(checkpoint, open_clip_folder)
    write_transformers(checkpoint, folder / "transformers")
    longer = {**config, "text_cfg": {**config["text_cfg"], "context_length": 248}}
    positions = stretch_positions(clip.positional_embedding.detach())
    write_open_clip(
        replace(checkpoint, state_dict={**clip.state_dict(), "positional_embedding": positions}, model_config=longer),
        folder / "long",
    )
    FixClip.from_clip(clip, config, preprocess, num_prompts=0, num_groups=0).save_pretrained(folder / "fixclip")
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A folder of image + txt, and a manifest of the same images with two captions each."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = []
    for number in range(len(WORDS)):
        Image.effect_noise((40, 32), 60 + 20 * number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(long_caption(number))
        for text in (long_caption(number), f"Another view of a {WORDS[number]}."):
            rows.append({"image": f"{number}.png", "long": text, "short": WORDS[number]})
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def by_hand(model, folder, tokenizer, texts, text_to_image):
    """Encode and rank without any of the code under test but the metric."""
    images = [model.preprocess(train=False)(Image.open(folder / f"{n}.png").convert("RGB")) for n in range(len(WORDS))]
    with torch.no_grad():
        image, text = model.encode_image(torch.stack(images)), model.encode_text(tokenizer(texts))
    return retrieval_metrics(image, text, text_to_image)


def test_folder_of_images_and_texts(models, captioned):
    model = FixClip.from_pretrained(models / "fixclip").eval()
    encoder = load_encoder(models / "fixclip")
    items = SourceItems(open_source(DataConfig(source=str(captioned))), encoder.preprocess)
    report = retrieval_report(encoder, items, "mine", "long captions", batch_size=4)
    texts = [long_caption(number) for number in range(len(WORDS))]
    assert report["metrics"] == by_hand(model, captioned, model.tokenizer(), texts, range(len(WORDS)))
    assert report["model"] == {
        "source": str(models / "fixclip"),
        "format": "FixClip",
        "context_length": 248,
        "resolution": 32,
    }
    assert (report["data"]["images"], report["data"]["texts"], report["data"]["captions_per_image"]) == (6, 6, [1])
    assert report["data"]["texts_that_fill_the_context"] == 0
    assert report["tie_rule"].startswith("a tie counts against the match")


def test_rows_with_one_picture_are_one_image(models, captioned):
    model = FixClip.from_pretrained(models / "fixclip").eval()
    encoder = load_encoder(models / "fixclip")
    source = open_source(DataConfig(source=str(captioned / "manifest.jsonl")))
    report = retrieval_report(encoder, SourceItems(source, encoder.preprocess), "mine", "two captions", batch_size=5)
    texts = [text for n in range(6) for text in (long_caption(n), f"Another view of a {WORDS[n]}.")]
    assert report["metrics"] == by_hand(model, captioned, model.tokenizer(), texts, [n // 2 for n in range(12)])
    assert (report["data"]["images"], report["data"]["texts"], report["data"]["captions_per_image"]) == (6, 12, [2])
    short = encode_dataset(encoder, SourceItems(source, encoder.preprocess, "short"), workers=1)
    assert len(short.text) == 12
    with torch.no_grad():
        expected = model.encode_text(model.tokenizer()([WORDS[0]]))
    torch.testing.assert_close(short.text[:1], expected, atol=1e-5, rtol=0)


def test_shards_read_by_several_processes(models, captioned, tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                tar.add(captioned / f"{number}.png", f"{number}.png")
                tar.add(captioned / f"{number}.txt", f"{number}.txt")
    encoder = load_encoder(models / "open_clip")
    folder, shards = (
        encode_dataset(encoder, SourceItems(open_source(DataConfig(source=str(path))), encoder.preprocess), workers=n)
        for path, n in ((captioned, 0), (tmp_path, 2))
    )
    torch.testing.assert_close(shards.image, folder.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(shards.text, folder.text, atol=1e-5, rtol=0)
    assert shards.text_to_image == folder.text_to_image == list(range(6))


def test_formats_of_one_clip_agree(models, captioned):
    source = open_source(DataConfig(source=str(captioned)))
    features = {}
    for name in ("open_clip", "transformers", "long", "fixclip"):
        encoder = load_encoder(models / name)
        assert encoder.context_length == (77 if name in ("open_clip", "transformers") else 248)
        features[name] = encode_dataset(encoder, SourceItems(source, encoder.preprocess))
    for name in ("transformers", "long", "fixclip"):
        torch.testing.assert_close(features[name].image, features["open_clip"].image, atol=1e-5, rtol=0)
    torch.testing.assert_close(features["transformers"].text, features["open_clip"].text, atol=1e-5, rtol=0)
    torch.testing.assert_close(features["fixclip"].text, features["long"].text, atol=1e-5, rtol=0)
    # All captions are longer than 77 tokens and shorter than 248.
    assert (features["open_clip"].cut_texts, features["long"].cut_texts) == (6, 0)
    assert not torch.allclose(features["long"].text, features["open_clip"].text, atol=1e-2)


def test_part_of_the_data(models, captioned):
    encoder = load_encoder(models / "open_clip")
    source = open_source(DataConfig(source=str(captioned)))
    whole = encode_dataset(encoder, SourceItems(source, encoder.preprocess))
    part = encode_dataset(encoder, SourceItems(source, encoder.preprocess, start=2, stop=4))
    torch.testing.assert_close(part.image, whole.image[2:4], atol=1e-5, rtol=0)
    for start, stop in ((0, 7), (6, None), (3, 3)):
        with pytest.raises(
            ValueError, match=f"samples {start} to {'the end' if stop is None else stop}: the data has 6"
        ):
            SourceItems(source, encoder.preprocess, start=start, stop=stop)


def test_scenes_command(models):
    result = run("evaluate", models / "fixclip", "--data", "scenes", "--start", 3, "--stop", 8, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "5 images, 5 texts" in result.output


def test_twins_command(models, tmp_path):
    options = ("--data", "scenes-twins:3", "--workers", 0, "-o", tmp_path / "report.json")
    result = run("evaluate", models / "fixclip", *options)
    assert result.exit_code == 0, result.output
    assert "choices between a scene and its twin" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"]["pairs"] == len(report["pairs"]) >= 12


def test_bfloat16_is_close(models, captioned):
    encoder = load_encoder(models / "open_clip")
    items = SourceItems(open_source(DataConfig(source=str(captioned))), encoder.preprocess)
    exact, rounded = (encode_dataset(encoder, items, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded.image.dtype == torch.float32
    assert 0 < (exact.image - rounded.image).abs().max() < 0.05


def test_damaged_samples_are_skipped_and_reported(models, captioned, tmp_path):
    for path in captioned.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "3.txt").write_text("  ")
    encoder = load_encoder(models / "open_clip")
    (tmp_path / "manifest.jsonl").unlink()
    source = open_source(DataConfig(source=str(tmp_path)))
    report = retrieval_report(encoder, SourceItems(source, encoder.preprocess), "mine", "")
    skipped = report["data"]["skipped"]
    assert report["data"]["images"] == 4
    assert skipped["reasons"] == {"not_an_image": 1, "empty_caption": 1}
    assert "2 samples skipped" in format_table(report)
    with pytest.raises(ValueError, match=r"no sample could be used .*no_short_caption"):
        encode_dataset(encoder, SourceItems(source, encoder.preprocess, "short"))


def test_a_benchmark_is_evaluated_whole(models, captioned, tmp_path):
    encoder = load_encoder(models / "fixclip")
    images = [captioned / f"{number}.png" for number in range(6)]
    captions = [[long_caption(number), WORDS[number], "a"] for number in range(6)]
    benchmark = Benchmark("tiny", "all of it, 3 captions each", images, captions)
    report = retrieval_report(encoder, BenchmarkItems(benchmark, encoder.preprocess), "tiny", benchmark.protocol)
    assert report["data"]["captions_per_image"] == [3]
    # The same picture under two names stays two images, as the benchmark has it.
    shutil.copy(images[0], tmp_path / "copy.png")
    twice = replace(benchmark, images=[*images[:5], tmp_path / "copy.png"])
    assert retrieval_report(encoder, BenchmarkItems(twice, encoder.preprocess), "tiny", "")["data"]["images"] == 6
    damaged = replace(benchmark, images=[*images[:5], captioned / "nowhere.png"])
    with pytest.raises(ValueError, match=r"nowhere.png: unreadable .*1 damaged images in tiny"):
        retrieval_report(encoder, BenchmarkItems(damaged, encoder.preprocess), "tiny", "")


# --- zero-shot classification ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for label, name in enumerate(("grey_cat", "red_dog", "kite")):
        (folder / name).mkdir()
        for number in range(3):
            picture = Image.effect_noise((40, 32), 40 + 70 * label + number).convert("RGB")
            picture.save(folder / name / f"{number}.png")
    return folder


def test_zero_shot_classification(models, classes):
    encoder = load_encoder(models / "open_clip")
    report = classification_report(encoder, classes, batch_size=2)
    clip, tokenizer = encoder.model, encoder.tokenizer
    with torch.no_grad():
        names = ["grey cat", "kite", "red dog"]  # folders in alphabetical order
        sentences = [[template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in names]
        mean_CE = torch.stack([clip.encode_text(tokenizer(texts), normalize=True).mean(0) for texts in sentences])
        paths = [path for name in names for path in sorted((classes / name.replace(" ", "_")).iterdir())]
        image_IE = torch.stack([encoder.preprocess(Image.open(path).convert("RGB")) for path in paths])
        image_IE = clip.encode_image(image_IE, normalize=True)
        guess_I = (image_IE @ torch.nn.functional.normalize(mean_CE, dim=1).T).argmax(1)
    right_I = (guess_I == torch.arange(3).repeat_interleave(3)).double()
    assert report["metrics"]["top_1_accuracy"] == pytest.approx(right_I.mean().item())
    assert report["metrics"]["mean_per_class_accuracy"] == pytest.approx(right_I.view(3, 3).mean(1).mean().item())
    assert report["metrics"]["top_5_accuracy"] == 1
    assert report["data"]["classes"] == 3
    assert "80 templates" in report["data"]["protocol"]
    assert "top_1_accuracy" in format_table(report)


def test_rank_of_label_by_hand():
    scores = torch.tensor([[0.3, 0.1, 0.2], [0.3, 0.1, 0.2], [0.5, 0.5, 0.5], [0.1, 0.9, 0.9]])
    assert rank_of_label(scores, torch.tensor([0, 1, 2, 1])).tolist() == [1, 3, 3, 2]


def test_class_names_of_folders(models, classes, tmp_path):
    encoder = load_encoder(models / "open_clip")
    names = {"grey_cat": "a cat", "red_dog": "a dog", "kite": "a kite"}
    report = classification_report(encoder, classes, classnames=names, templates="simple")
    assert "7 templates" in report["data"]["protocol"]
    with pytest.raises(ValueError, match="folder 'kite' has no name"):
        classification_report(encoder, classes, classnames={"grey_cat": "a", "red_dog": "b"})
    with pytest.raises(ValueError, match="there is no folder 'cow'"):
        classification_report(encoder, classes, classnames={**names, "cow": "a cow"})
    with pytest.raises(ValueError, match="expected one folder of images a class"):
        classification_report(encoder, tmp_path)
    path = tmp_path / "names.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected an object of class folder to class name"):
        read_classnames(path)
    path.write_text(json.dumps(names))
    assert read_classnames(path) == names


def test_imagenet_folders_get_their_names(tmp_path):
    folders = [f"n{number:08}" for number in range(1000)]
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").touch()
    _, labels, found = _class_folders(tmp_path)
    assert (found, labels) == (folders, list(range(1000)))
    assert _class_names(found, None) == list(open_clip.IMAGENET_CLASSNAMES)


def test_classes_leave_out_system_files_and_take_every_picture(tmp_path):
    names = ("cat/a.jfif", "cat/._a.jfif", "dog/b.jp2", "dog/Thumbs.db", "__MACOSX/cat/._a.jpg", ".cache/c.jpg")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, labels, folders = _class_folders(tmp_path)
    assert ([str(path.relative_to(tmp_path)) for path in paths], labels) == (["cat/a.jfif", "dog/b.jp2"], [0, 1])
    assert folders == ["cat", "dog"]


def test_json_of_100_000_brackets_is_an_error_of_its_file(tmp_path):
    path = tmp_path / "names.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"names\.json: no readable JSON: .*nested too deeply"):
        read_classnames(path)


# --- encoders that cannot be had -------------------------------------------------------------------------


def test_encoders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"ViT-B-16 is an open_clip model name: choose its weights .*openai"):
        load_encoder("ViT-B-16")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_encoder(tmp_path / "nothing")
    tiny_transformers_clip().save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small: the text encoder has embeddings for 50 tokens.*ids up to 49407"):
        load_encoder(tmp_path / "small")


def test_built_in_names_are_taken_wherever_a_clip_is(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["a red cat and a blue dog"], vocab_size=560)
    scenes = tmp_path / "scenes"
    for part in ("base", "encoder/text_encoder"):
        (scenes / part).mkdir(parents=True)
    (scenes / "base" / "model_index.json").write_text("{}")
    (scenes / "encoder" / "text_encoder" / "config.json").write_text("{}")
    clip = tiny_transformers_clip(vocab_size=len(tokenizer), eos_token_id=len(tokenizer) - 1)
    clip.save_pretrained(scenes / "clip")
    tokenizer.save_pretrained(scenes / "clip")
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    encoder = load_encoder("builtin:scenes/clip")
    assert (encoder.source, encoder.context_length) == ("builtin:scenes/clip", 77)
    assert load_fixclip("builtin:scenes/clip", num_groups=0).config.context_length == 248
    with pytest.raises(ValueError, match=r"builtin:scenes/encoder holds a text encoder alone.*builtin:scenes/clip has"):
        load_encoder("builtin:scenes/encoder")
    with pytest.raises(ValueError, match=r"'builtin:scenes' is a whole model.*builtin:scenes/clip"):
        load_fixclip("builtin:scenes")
    with pytest.raises(ValueError, match=r"no such built-in model; there are builtin:scenes, .*builtin:scenes/clip"):
        load_encoder("builtin:shapes/clip")


def test_a_models_own_tokenizer_is_used(tmp_path):
    tokenizer = train_tokenizer(["a red cat and a blue dog"], vocab_size=560)
    model = tiny_transformers_clip(vocab_size=len(tokenizer), eos_token_id=len(tokenizer) - 1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    texts = ["a red cat", "a blue dog and a cat"]
    features, cut = encode_texts(encoder, texts)
    with torch.no_grad():
        expected = model.get_text_features(**tokenizer(texts, padding="max_length", return_tensors="pt")).pooler_output
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=0)
    assert cut == 0


# --- commands --------------------------------------------------------------------------------------------


def test_evaluate_command(models, captioned, classes, tmp_path):
    result = run(
        "evaluate", models / "fixclip", "--data", captioned, "--output", tmp_path / "report.json", "--workers", 0
    )
    assert result.exit_code == 0, result.output
    assert f"{models / 'fixclip'} (FixClip, 248 tokens, 32 px)" in result.output
    assert "R@1" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0 <= report["metrics"]["text_to_image_recall_at_1"] <= 1
    result = run("evaluate", models / "open_clip", "--classify", classes, "--templates", "simple", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "top_1_accuracy" in result.output


def test_evaluate_command_on_a_benchmark(models, captioned, tmp_path):
    for number in range(6):
        (tmp_path / "image").mkdir(exist_ok=True)
        (tmp_path / "caption").mkdir(exist_ok=True)
        Image.open(captioned / f"{number}.png").convert("RGB").save(tmp_path / "image" / f"{number}.jpg")
        (tmp_path / "caption" / f"{number}.txt").write_text(long_caption(number) + "\n")
    args = ("evaluate", models / "transformers", "--benchmark", "urban-1k", "--data", tmp_path, "--workers", 0)
    refused = run(*args)
    assert "lists 6 images" in error_of(refused)
    result = run(*args, "--partial")
    assert result.exit_code == 0, result.output
    assert "urban-1k: all images, 1 caption each; PARTIAL: 6 of 1000 images" in result.output
    assert "(transformers, 77 tokens, 32 px)" in result.output
    assert "6 of them fill the context" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give --data"),
        (("--data", "a", "--classify", "b"), "one of the two"),
        (("--classify", "b", "--benchmark", "dci"), "needs its folder"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--data", "nowhere", "--benchmark", "dci"), "no such folder"),
        (("--classify", "b", "--caption", "long"), "--caption acts on --data only"),
        (("--classify", "b", "--stop", 3), "--stop acts on --data only"),
        (("--data", "scenes", "--templates", "simple"), "--templates acts on --classify only"),
        (("--data", "scenes", "--partial"), "--partial acts on a --benchmark only"),
        (("--data", "a", "--benchmark", "dci", "--start", 2), "--start does not act on a benchmark"),
        (("--data", "scenes", "--start", 5, "--stop", 2), "stop=2: it must be larger than start=5"),
        (("--data", "scenes-twins:3", "--stop", 2), "--stop does not act on scenes-twins"),
        (("--data", "scenes-twins:0"), "scenes-twins:5000"),
        (("--data", "nowhere.jsonl", "-o", "/proc/report.json"), "cannot be written"),
    ],
)
def test_evaluate_command_refuses(models, args, message):
    result = run("evaluate", models / "fixclip", *args)
    assert message in error_of(result)


def test_convert_and_export_commands(models, tmp_path):
    result = run(
        "convert", models / "open_clip", tmp_path / "fix", "--set", "num_groups=0", "--set", "prompt_flow=replace"
    )
    assert result.exit_code == 0, result.output
    assert "248 tokens, 4 regional prompts" in result.output
    assert FixClip.from_pretrained(tmp_path / "fix").config.prompt_flow == "replace"
    result = run("export", tmp_path / "fix", tmp_path / "out", "--format", "diffusers", "--format", "clip_l")
    assert result.exit_code == 0, result.output
    assert "text_encoder/, tokenizer/" in result.output
    assert "regional prompts" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "clip_l_long.safetensors",
        "text_encoder",
        "tokenizer",
    }
    FixClip.from_pretrained(tmp_path / "fix").save_pretrained(tmp_path / "run" / "best")
    for args, message in (
        (("convert", models / "open_clip", tmp_path / "fix"), "not empty"),
        (("convert", models / "open_clip", tmp_path / "new", "--set", "prompts=3"), "expected NAME=VALUE"),
        (
            ("convert", models / "open_clip", tmp_path / "new", "--set", "num_groups=5", "--set", "first_group=1"),
            "num_groups=5",
        ),
        (
            ("export", models / "open_clip", tmp_path / "new"),
            "fixclip convert makes one of a CLIP in another format",
        ),
        (("export", tmp_path / "run", tmp_path / "new"), "the best so far is in"),
        (("export", tmp_path / "fix", tmp_path / "new", "--format", "onnx"), "valid are fixclip"),
    ):
        result = run(*args)
        assert message in error_of(result)
    assert not any((tmp_path / "new").glob("*"))
