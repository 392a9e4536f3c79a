"""Captions by a multimodal model: the pure functions. What is asked, and which answers are captions."""

import base64
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydantic import ValidationError

import fixclip_core.synthesis
from fixclip_core.data.samples import BadSampleError, Sample
from fixclip_core.scenes import long_caption, sample_scene, short_caption
from fixclip_core.synthesis.accept import Answer, MalformedResponseError, accept, clean_answer, read_answer
from fixclip_core.synthesis.language import language_probability
from fixclip_core.synthesis.prompts import LONG_PROMPTS, SHORT_PROMPTS, choose_prompt
from fixclip_core.synthesis.recipe import CaptionRecipe
from fixclip_core.synthesis.request import data_url, request
from fixclip_core.training.recipe import load_recipe, valid_keys

RECIPE = CaptionRecipe()
GOOD = (
    "A brown dog with a red collar runs over wet grass towards a yellow ball. Behind it stands a low stone wall, and "
    "two bare trees rise into a grey sky. The photograph is taken from the height of the dog's eyes."
)


def encoded(size, kind="PNG", exif=None):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def sample(image, key="a.png"):
    return Sample("images.jsonl:1", key, image, None, None)


def sent(url):
    """(kind, bytes, image) of a data URL."""
    head, _, data = url.partition(";base64,")
    data = base64.b64decode(data)
    return head, data, Image.open(io.BytesIO(data))


def verdict(content, finish_reason="stop", kind="long", recipe=RECIPE, prompt=LONG_PROMPTS[0]):
    return accept(Answer(content, finish_reason, "m", 0), prompt, recipe, kind)


# -- prompts


def test_twenty_prompts_that_differ_and_ask_for_what_the_paper_needs():
    assert len({prompt.id for prompt in LONG_PROMPTS}) == len({prompt.text for prompt in LONG_PROMPTS}) == 20
    for prompt in LONG_PROMPTS:
        assert "Describe only what can be seen" in prompt.text
        assert any(
            word in prompt.text for word in ("background", "behind", "setting", "surroundings", "backdrop", "the place")
        )
        assert any(word in prompt.text for word in ("style", "technique", "manner", "kind of image", "sort of picture"))


@given(key=st.text(max_size=40), seed=st.integers(0, 2**40), attempts=st.integers(1, 20))
def test_every_attempt_gets_another_prompt(key, seed, attempts):
    chosen = [choose_prompt(LONG_PROMPTS, key, seed, attempt).id for attempt in range(attempts)]
    assert len(set(chosen)) == attempts


def test_prompts_are_dealt_evenly_and_alike_in_every_process():
    chosen = [choose_prompt(LONG_PROMPTS, f"{i}.jpg", 0, 0).id for i in range(4000)]
    assert min(Counter(chosen).values()) > 140  # 200 each on average
    assert chosen != [choose_prompt(LONG_PROMPTS, f"{i}.jpg", 1, 0).id for i in range(4000)]
    code = (
        "from fixclip_core.synthesis.prompts import *; print([choose_prompt(LONG_PROMPTS, f'{i}.jpg', 0, 0).id "
        "for i in range(9)])"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert other.strip() == str(chosen[:9])


# -- request


def test_a_request_is_an_openai_chat_completion():
    body = request(sample(encoded((20, 10))), LONG_PROMPTS[3], RECIPE, "my/model")
    assert json.loads(json.dumps(body)) == body
    (message,) = body["messages"]
    image, text = message["content"]
    assert (message["role"], text) == ("user", {"type": "text", "text": LONG_PROMPTS[3].text})
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("my/model", 256, 0.7)
    assert sent(image["image_url"]["url"])[1] == encoded((20, 10))
    again = request(sample(encoded((20, 10))), LONG_PROMPTS[3], RECIPE, "my/model", attempt=1)
    assert again["seed"] != body["seed"]


def test_extra_fields_are_added_and_null_takes_one_away():
    recipe = CaptionRecipe(extra={"top_p": 0.9, "seed": None, "max_tokens": None, "max_completion_tokens": 99})
    body = request(sample(encoded((4, 4))), LONG_PROMPTS[0], recipe, "m")
    assert (body["top_p"], body["max_completion_tokens"]) == (0.9, 99)
    assert not {"seed", "max_tokens"} & set(body)


@given(width=st.integers(1, 300), height=st.integers(1, 300), longest=st.integers(16, 200))
def test_images_are_reduced_by_one_factor_and_never_enlarged(width, height, longest):
    if max(width, height) > 100 * min(width, height):
        return
    _, _, image = sent(data_url(sample(encoded((width, height))), longest))
    assert max(image.size) == min(longest, max(width, height))
    scale = max(image.size) / max(width, height)
    assert image.size == tuple(max(1, round(side * scale)) for side in (width, height))


@pytest.mark.parametrize(
    ("kind", "size", "head"),
    [
        ("JPEG", (64, 48), "data:image/jpeg"),
        ("JPEG", (900, 300), "data:image/jpeg"),
        ("WEBP", (64, 48), "data:image/webp"),
        ("WEBP", (900, 300), "data:image/png"),
        ("BMP", (64, 48), "data:image/png"),
    ],
)
def test_small_files_are_sent_as_they_are_and_others_in_a_format_that_servers_read(kind, size, head):
    data = encoded(size, kind)
    found, out, image = sent(data_url(sample(data), 512))
    assert found == head
    assert (out == data) == (max(size) <= 512 and kind != "BMP")
    assert image.size == ((512, 171) if max(size) > 512 else size)


def test_an_image_on_its_side_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    _, _, image = sent(data_url(sample(encoded((40, 20), "JPEG", exif)), 512))
    assert image.size == (20, 40)
    assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("kind", "what"), [("PNG", "text"), ("PNG", "exif"), ("JPEG", "exif"), ("JPEG", "comment"), ("WEBP", "xmp")]
)
@pytest.mark.parametrize("size", [(40, 20), (900, 300)])
def test_metadata_stays_here(kind, what, size):
    """Where a photo was taken, or what a picture was drawn of, is no server's business."""
    secret, exif, text = "a secret place", Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x010E] = secret  # the description
    text.add_itxt("prompt", secret)
    fields = {"text": {"pnginfo": text}, "exif": {"exif": exif}, "comment": {"comment": secret}}
    buffer = io.BytesIO()
    picture = Image.effect_noise(size, 80).convert("RGB")
    picture.save(buffer, kind, **fields.get(what, {"xmp": f"<x>{secret}</x>".encode(), "lossless": True}))
    assert secret.encode() in buffer.getvalue()
    _, out, image = sent(data_url(sample(buffer.getvalue()), 512))
    assert secret.encode() not in out
    assert max(image.size) == min(512, size[0])
    if kind != "JPEG" and size[0] < 512:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(picture))


def test_a_tensor_is_sent_without_loss():
    pixels = torch.randint(0, 255, (3, 9, 7), dtype=torch.uint8)
    _, _, image = sent(data_url(sample(pixels), 512))
    assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("data", "reason"), [(b"<html>", "not_an_image"), (encoded((300, 300), "JPEG")[:2000], "truncated_image")]
)
def test_damage_is_found_before_anything_is_paid(data, reason):
    with pytest.raises(BadSampleError) as caught:
        request(sample(data), LONG_PROMPTS[0], RECIPE, "m")
    assert caught.value.skipped.reason == reason


# -- accept


def test_a_good_answer_is_a_caption():
    assert verdict(GOOD).caption == GOOD


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        ("cut_off", GOOD[:100]),
        ("refusal", "I'm sorry, but I can't help with describing people in this image, as that is against my rules."),
        (
            "refusal",
            "As an AI language model I see a dog on the grass, which is brown and runs after a ball.",
        ),
        ("refusal", "Please upload an image, and then I will describe it for you in as many words as you may like."),
        ("empty_caption", " \n "),
        ("echo", LONG_PROMPTS[0].text),
        ("too_short", "A brown dog."),
        ("repetition", f"{GOOD} " + "The dog runs over the grass. " * 12),
        ("repetition", "It is very very very very very very nice to look at, this brown dog on the wet grass."),
        ("not_sentences", "dog, grass, ball, wall, tree, sky, collar, stone, photo, brown, red, yellow, grey"),
        ("not_sentences", "IMG_2033.JPG 2023-11-04 12:33 f/2.8 1/400s ISO200 24mm 6000x4000 sRGB 8bit 300dpi 12.4MB"),
        ("too_long", " ".join(f"Thing {i} of kind {i * 7} lies near spot {i * 3}." for i in range(80))),
        ("no_sentence", "a brown dog with a red collar that runs over wet grass towards a yellow ball near a wall"),
        ("wrong_language", "Ein brauner Hund mit rotem Halsband läuft über nasses Gras auf einen gelben Ball zu."),
        ("wrong_language", "一只棕色的狗戴着红色项圈，在湿漉漉的草地上奔向一个黄色的球。后面有一堵低矮的石墙。"),
    ],
)
def test_each_filter_by_its_name(reason, content):
    found = verdict(content, "length" if reason == "cut_off" else "stop")
    assert (found.caption, found.reason) == (None, reason)
    assert verdict("", "content_filter").reason == "refusal"


OFF = {
    "cut_off": {"cut_off": False},
    "refusal": {"refusal": False},
    "echo": {"max_prompt_share": None},
    "too_short": {"min_words": None},
    "repetition": {"max_word_run": None, "max_repeated_share": None},
    "not_sentences": {"min_letter_share": None, "min_words_per_clause": None},
    "too_long": {"max_words": None},
    "no_sentence": {"min_sentences": None},
    "wrong_language": {"language": None},
}


@pytest.mark.parametrize("reason", OFF)
def test_each_filter_can_be_switched_off(reason):
    cases = {
        "cut_off": (f"{GOOD[:-1]}", "length"),
        "refusal": (f"I am sorry to say it: {GOOD}", "stop"),
        "echo": (LONG_PROMPTS[0].text, "stop"),
        "too_short": ("A brown dog runs.", "stop"),
        "repetition": ("The dog is very very very very happy with the yellow ball on the wet grass today.", "stop"),
        "not_sentences": ("A dog, grass, a ball, a wall, trees, a grey sky, a red collar, wet stones.", "stop"),
        "too_long": (" ".join(f"Thing {i} of kind {i * 7} lies near the spot {i * 3}." for i in range(60)), "stop"),
        "no_sentence": (GOOD.replace(".", ",").rstrip(","), "stop"),
        "wrong_language": ("Ein brauner Hund mit rotem Halsband läuft über nasses Gras auf einen Ball zu.", "stop"),
    }
    content, finish_reason = cases[reason]
    assert verdict(content, finish_reason).reason == reason
    assert verdict(content, finish_reason, recipe=CaptionRecipe(filters=OFF[reason])).caption


def test_a_short_caption_is_one_sentence():
    assert verdict("A brown dog runs after a ball", kind="short", prompt=SHORT_PROMPTS[0]).caption
    assert verdict(f"{GOOD} It is wet.", kind="short", prompt=SHORT_PROMPTS[0]).reason == "too_long"
    assert verdict("A brown dog", kind="short").caption
    assert verdict("Dog", kind="short").reason == "too_short"


@pytest.mark.parametrize(
    "wrapped",
    [
        f"Here is a detailed description of the image: {GOOD}",
        f"Sure! Here's the caption:\n\n{GOOD}",
        f"**Caption:** {GOOD}",
        f"<think>What do I see?\nA dog.</think>\n{GOOD}",
        f'"{GOOD}"',
        f"# Description: {GOOD}",
        GOOD.replace("brown dog", "**brown dog**"),
    ],
)
def test_what_models_put_around_a_caption_is_taken_off(wrapped):
    assert clean_answer(wrapped) == GOOD


def test_captions_of_the_scenes_world_pass():
    for number in range(200):
        scene = sample_scene(number)
        assert verdict(long_caption(scene, number).text).reason is None
        assert verdict(short_caption(scene, number).text, kind="short").reason is None


@given(st.text(max_size=300), st.sampled_from(["stop", "length", ""]), st.sampled_from(["long", "short"]))
def test_any_text_gets_a_caption_or_a_reason(content, finish_reason, kind):
    found = verdict(content, finish_reason, kind)
    assert (found.caption is None) != (found.reason is None)
    if found.caption is not None:
        assert verdict(found.caption, kind=kind).caption == found.caption  # cleaning once is enough


def test_read_answer():
    response = {
        "model": "served",
        "choices": [{"message": {"content": "A dog."}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 3},
    }
    assert read_answer(response) == Answer("A dog.", "stop", "served", 3)
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "dog."}]}}]}
    assert read_answer(parts, "asked") == Answer("A dog.", "", "asked", 0)
    refused = read_answer({"choices": [{"message": {"content": None, "refusal": "No."}}]})
    assert accept(refused, LONG_PROMPTS[0], RECIPE).reason == "refusal"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "model", "x"]), inner, max_size=3)
    ),
)


@given(JSON)
def test_any_json_is_an_answer_or_malformed(response):
    try:
        answer = read_answer(response)
    except MalformedResponseError:
        return
    assert isinstance(answer.content, str)
    assert verdict(answer.content)


# -- recipe


def test_a_wrong_recipe_names_what_is_valid():
    with pytest.raises(ValidationError, match=r"no language 'xx': one of .*en"):
        CaptionRecipe(filters={"language": "xx"})
    for wrong in ({"attempts": 0}, {"filters": {"max_same": 0}}, {"short": "given"}, {"promts": ["x"]}):
        with pytest.raises(ValidationError):
            CaptionRecipe(**wrong)
    own = CaptionRecipe(prompts=["Describe.", "Write."])
    assert [prompt.id for prompt in own.prompts_of("long")] == ["own_1", "own_2"]


def test_the_built_in_recipe_shows_every_field_with_its_default():
    assert load_recipe(CaptionRecipe, "builtin:captions") == CaptionRecipe()
    text = (Path(fixclip_core.synthesis.__file__).parent / "recipes" / "captions.yaml").read_text()
    assert all(f"{name.rpartition('.')[2]}:" in text for name in valid_keys(CaptionRecipe))


def test_languages_are_told_apart():
    assert language_probability("Un chien brun court sur l'herbe mouillée vers une balle jaune.", "fr") > 0.9
    assert language_probability(GOOD, "en") > 0.9
