"""`fixclip caption` against `transformers serve` with a tiny random vision-language model, as a user would start it."""

import json
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image
from test_caption_server import job
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from fixclip_core.synthesis.drivers.server import ServerError, ServerOptions, caption
from fixclip_core.weights.write import clip_tokenizer

pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn (extra `app`)")
pytestmark = pytest.mark.slow
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def write_model(folder):
    """LLaVA with two layers each, random weights, CLIP's own vocabulary and 28x28 images of 4 patches."""
    clip = clip_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=clip.backend_tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_token_id=image_token
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(url, model) of a server that runs."""
    model = write_model(tmp_path_factory.mktemp("model"))
    port = "18931"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--port", port]
    command += ["--host", "127.0.0.1", "--device", "cpu"]
    log = (model / "server.log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(6000):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            break
        except OSError:
            assert process.poll() is None, (model / "server.log").read_text()[-2000:]
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}", str(model)
    process.kill()
    process.wait()
    log.close()


def test_a_real_server_is_asked_and_its_answers_are_judged(served, tmp_path):
    url, model = served
    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 0, 60)).save(tmp_path / f"{number}.png")
    filters = {"cut_off": False, "language": None, "min_sentences": None, "max_repeated_share": None}
    filters |= {"min_letter_share": None, "min_words_per_clause": None, "min_words": 1}
    here = job(tmp_path, tmp_path / "out", model=model, max_tokens=12, temperature=0.0, filters=filters)
    made = caption(here, ServerOptions(url, concurrency=2))
    journal = (tmp_path / "out" / ".caption" / "shard-000000.jsonl").read_text().splitlines()[1:]
    answers = [json.loads(line)["answer"] for line in journal]
    assert {answer["finish_reason"] for answer in answers} == {"length"}
    assert {answer["tokens"] for answer in answers} == {12}
    assert made["samples"] == 2
    assert made["answers"]["accepted"] >= 1  # random words pass once the filters are off
    strict = job(tmp_path, tmp_path / "out", model=model, max_tokens=12, temperature=0.0)
    made = caption(strict, ServerOptions(url, concurrency=2))
    assert made["counts"] == {"cut_off": 2}


def test_a_wrong_model_is_named(served, tmp_path):
    url, _ = served
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    with pytest.raises(ServerError, match="other"):
        caption(job(tmp_path, tmp_path / "out", model="other/model"), ServerOptions(url, retries=0, max_failures=1))
