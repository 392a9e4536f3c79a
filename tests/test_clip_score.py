"""torchmetrics' CLIPScore as a scorer, against the formula written out, on a tiny CLIP of transformers."""

import json

import pytest
import torch
from PIL import Image
from tiny import clip_tokenizer
from tiny_clips import tiny_transformers_clip
from transformers import CLIPImageProcessor, CLIPProcessor
from typer.testing import CliRunner

from fixclip_cli.main import app

pytest.importorskip("torchmetrics", reason="CLIPScore needs torchmetrics (extra `judge`)")
from fixclip_diffusion.evaluation.clip_score import ClipScore

LENGTH = 32
WORDS = "a red horse stands on the green grass beside a blue boat and a small white house under dark clouds "


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of 32 positions with CLIP's vocabulary: its folder, model and processor."""
    folder = tmp_path_factory.mktemp("clip")
    ends = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    model = tiny_transformers_clip(LENGTH, **ends)
    model.text_projection.weight.data.neg_()  # else every cosine of these random weights is negative, and every score 0
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), clip_tokenizer())
    processor.save_pretrained(folder)
    return folder, model, processor


def pictures():
    return [Image.effect_noise((48, 40), 90).convert("RGB"), Image.new("RGB", (40, 40), "teal")]


@torch.no_grad()
def plain_score(model, processor, images, text):
    """max(100 mean cos, 0), with a text that is cut before its end token."""
    ids = processor.tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    assert ids[0, -1] == 49407
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    text_E = model.get_text_features(input_ids=ids).pooler_output[0]
    image_BE = model.get_image_features(pixel_values=pixels).pooler_output
    cosine_B = torch.nn.functional.cosine_similarity(image_BE, text_E[None])
    return max(100 * cosine_B.mean().item(), 0.0)


def test_scores_are_torchmetrics_formula_and_long_texts_keep_their_end(clip):
    folder, model, processor = clip
    scorer = ClipScore(str(folder))
    images = pictures()
    texts = ["a red horse", "a blue boat and a small white house", WORDS * 4]
    found = scorer.scores(images, texts)
    wanted = [plain_score(model, processor, images, text) for text in texts]
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(set(found)) == 3
    assert any(score > 0 for score in found)
    assert scorer.describe() == {
        "source": str(folder), "format": "torchmetrics CLIPScore", "context_length": LENGTH,
    }  # fmt: skip


def test_a_long_clip_whose_configuration_says_77(tmp_path):
    """As some are published: the weights have 248 positions, config.json the 77 of the base."""
    ends = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    model = tiny_transformers_clip(248, **ends)
    model.config.text_config.max_position_embeddings = 77
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), clip_tokenizer())
    processor.save_pretrained(tmp_path)
    scorer = ClipScore(str(tmp_path))
    assert scorer.context_length == 248
    table = model.text_model.embeddings.position_embedding.weight
    assert torch.equal(scorer.metric.model.model.text_model.embeddings.position_embedding.weight, table)


def test_the_command_reports_clip_scores(clip, tmp_path):
    folder, model, processor = clip
    image = pictures()[0]
    image.save(tmp_path / "boat.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "boat", "prompt": "A blue boat. A red horse."}) + "\n")
    arguments = ["evaluate-images", str(tmp_path / "p.jsonl"), "--pictures", f"mine={tmp_path}", "-o"]
    arguments += [str(tmp_path / "out"), "--scorer", f"torchmetrics:{folder}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "CLIPScore of picture and text (torchmetrics), 0 to 100" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["prompts"][0]["systems"]["mine"]
    wanted = [plain_score(model, processor, [image], t) for t in ("A blue boat. A red horse.", "A blue boat.")]
    assert [found["whole"], found["per_sentence"][0]] == pytest.approx(wanted, abs=1e-3)
    assert "CLIPScore" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_no_clip_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"scorer torchmetrics:.*: no CLIP that transformers can load"):
        ClipScore(str(tmp_path))
