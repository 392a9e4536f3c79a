"""The page's API through gradio_client, on tiny real models; the page itself is in test_app_page.py."""

import asyncio
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import types
from concurrent.futures import CancelledError
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny
import torch
import yaml

pytest.importorskip("gradio", reason="the page needs the extra `app`")
import httpx
from app_server import make_model, serve
from command_line import error_of
from command_line import run as run_command
from fixclip_app import command as demo
from fixclip_app.jobs import (
    Limits,
    Picture,
    Progress,
    Settings,
    check_settings,
    compare,
    generate,
    readable,
    run,
    settings_from_link,
    steps_with_previews,
)
from fixclip_app.listeners import ARRIVED
from fixclip_app.model import DemoModel, DevicePool, ModelChoice, default_choice, draws_scenes
from fixclip_app.page import LISTENERS
from fixclip_app.views import heat_map_view, judge, token_view, verdict_view
from gradio_client import Client
from gradio_client.exceptions import AppError
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image
from tiny_scenes import write_model
from typer.testing import CliRunner

from fixclip_cli.pictures import save_png
from fixclip_core import builtin
from fixclip_core.scenes import long_caption, render, sample_scene
from fixclip_diffusion import FixClipStableDiffusionPipeline, token_report

ROOT = Path(__file__).parents[1]
LONG = tiny.sentences(14)
FAST = {"steps": 2, "width": 32, "height": 32}
FULL = {"negative_prompt": "", "guidance_scale": 7.5, "seed": 0, "num_images": 1, "heat_maps": False, **FAST}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), scenes=True)


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("cache")) as url_and_pool:
        yield url_and_pool


@pytest.fixture(scope="module")
def client(served):
    client = Client(served[0], verbose=False)
    yield client
    client.close()


@pytest.fixture
def unet_calls(model):
    """Names of the threads in which the UNet ran, as long as the test lasts."""
    calls = []
    hook = model.pipe.unet.register_forward_hook(lambda *_: calls.append(threading.current_thread()))
    yield calls
    hook.remove()


def pixels(item):
    return np.asarray(Image.open(item["image"]))


def python_picture(pipe, prompt, seed, **kwargs):
    """With the guidance that the page has for a model of the scenes world."""
    kwargs = {"num_inference_steps": 2, "width": 32, "height": 32, "guidance_scale": 2.0, **kwargs}
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **kwargs).images[0])


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# Generate ---------------------------------------------------------------------------------------------------


def test_generate_draws_what_python_draws(client, model):
    gallery, info, maps = client.predict(
        prompt=LONG, negative_prompt="grün ✓", seed=5, num_images=2, **FAST, api_name="/generate"
    )
    assert len(gallery) == 2
    assert maps == ""
    for index, item in enumerate(gallery):
        expected = python_picture(model.pipe, LONG, 5 + index, negative_prompt="grün ✓")
        assert np.array_equal(pixels(item), expected)
        assert f"seed {5 + index}" in item["caption"]
        text = Image.open(item["image"]).text
        saved = json.loads(text["fixclip"])
        assert text["prompt"] == LONG
        assert (saved["seed"], saved["steps"], saved["negative_prompt"]) == (5 + index, 2, "grün ✓")
        assert "Steps: 2, CFG scale: 2.0" in text["parameters"]
        assert item["image"].endswith(f"seed{5 + index}.png")
    assert info["tokens"] == model.pipe.token_report(LONG).num_tokens
    assert [picture["seed"] for picture in info["pictures"]] == [5, 6]


def test_heat_maps_show_every_sentence_and_leave_the_picture_alone(client):
    plain, _, _ = client.predict(prompt=LONG, **FAST, api_name="/generate")
    gallery, _, maps = client.predict(prompt=LONG, heat_maps=True, **FAST, api_name="/generate")
    assert np.array_equal(pixels(plain[0]), pixels(gallery[0]))
    assert maps.count('class="fc-map fc-m') == LONG.count(".")
    for sentence in LONG.split(". "):
        assert sentence.rstrip(".") in maps


def test_progress_and_previews_come_while_it_draws(model):
    """Previews are the model's pictures, the steps of all pictures count up to the end."""
    values = check_settings({**FULL, "prompt": LONG, "num_images": 2, "steps": 40}, model, Limits())
    events = []
    generate(values, model, events.append)
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == list(range(1, 81))
    assert sum(isinstance(event, Picture) for event in events) == 2
    previews = [event.preview for event in events if isinstance(event, Progress) and event.preview]
    assert all(preview.size == (32, 32) for preview in previews)


def test_every_system_has_previews_of_its_own(model):
    """Each system's pipeline knows its own guidance: the first comparison after the start has none of the others'."""
    fresh = DemoModel(model.choice, "cpu")
    for system in fresh.systems.values():
        events = []
        with steps_with_previews(system, 0, 2, events.append, pause=0) as on_step:
            fresh.draw(
                system,
                seed=0,
                on_step=on_step,
                prompt="A cat.",
                num_inference_steps=2,
                guidance_scale=3.0,
                width=32,
                height=32,
            )
        assert events[0].preview is not None


def test_tokens_are_those_of_the_pipeline(client, model):
    result = client.predict(LONG, api_name="/tokens")
    report = model.pipe.token_report(LONG)
    assert (result["num_tokens"], result["stock_cut"], result["text"]) == (report.num_tokens, report.stock_cut, LONG)
    assert [window["text"] for window in result["passes"]] == [item.text for item in report.passes]


def test_the_api_is_named_and_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/generate", "/compare", "/tokens"}, "nothing else is public"
    names = [parameter["parameter_name"] for parameter in endpoints["/generate"]["parameters"]]
    assert names[:4] == ["prompt", "negative_prompt", "steps", "guidance_scale"]
    documented = httpx.get(f"{client.src}gradio_api/openapi.json").text
    assert "Picture i starts from seed + i" in documented


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": " \n\t"}, "The prompt is empty"),
        ({"prompt": None}, "The prompt must be text"),
        ({"prompt": {"path": "/etc/hostname"}}, "The prompt must be text"),
        ({"prompt": "a " * 1200}, "tokens; this page takes at most 992"),
        ({"prompt": "a" * 20_001}, "has 20,001 characters; this page takes at most 20,000"),
        ({"negative_prompt": "a " * 1200}, "The negative prompt has 1,2"),
        ({"width": 100_000}, "width is 100000: it must be a whole number from 16 to 1024"),
        ({"height": 33}, "height is 33: it must be a multiple of 8, like 32"),
        ({"height": -8}, "height is -8"),
        ({"width": None}, "width is empty: it must be a whole number"),
        ({"heat_maps": "yes"}, "heat maps is 'yes': it must be true or false"),
        ({"steps": 0}, "steps is 0: it must be a whole number from 1 to 100"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": "__import__('os').getcwd()"}, "steps is \"__import__('os').getcwd()\""),
        ({"steps": True}, "steps is 'True'"),
        ({"guidance_scale": 1e9}, "guidance scale is 1000000000.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**40}, "seed is 1099511627776"),
        ({"num_images": 1000}, "num images is 1000: it must be a whole number from 1 to 4"),
    ],
)
def test_bad_input_is_told_what_is_valid(client, unet_calls, changes, message):
    with pytest.raises(AppError, match=re.escape(message)):
        client.predict(**{"prompt": "A cat.", **FAST, **changes}, api_name="/generate")
    assert not unet_calls


def test_compare_and_tokens_refuse_bad_input_too(client):
    with pytest.raises(AppError, match="The prompt is empty"):
        client.predict(prompt="", **FAST, api_name="/compare")
    with pytest.raises(AppError, match="must be text of at most"):
        client.predict("a" * 20_001, api_name="/tokens")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_know(model, value):
    with pytest.raises(ValueError, match=r"guidance scale is '(nan|inf)'"):
        check_settings({**FULL, "prompt": "A cat.", "guidance_scale": value}, model, Limits())


def test_running_out_of_memory_says_what_to_do():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert "Out of memory: try a smaller size" in str(readable(raised.value))
    error = RuntimeError("shapes do not match")
    assert readable(error) is error


# Nothing of a visitor is read, executed or shown to others -----------------------------------------------------


def test_a_path_is_a_prompt_like_any_other(client):
    gallery, info, _ = client.predict(prompt="/etc/hostname", **FAST, api_name="/generate")
    assert info["prompt"] == Image.open(gallery[0]["image"]).text["prompt"] == "/etc/hostname"


@pytest.mark.parametrize("path", ["/etc/hostname", f"{ROOT}/pyproject.toml", f"{ROOT}/apps/demo.py"])
def test_files_of_the_machine_are_not_served(served, path):
    assert Path(path).is_file()
    assert httpx.get(f"{served[0]}gradio_api/file={path}").status_code in (403, 404)


def test_uploads_are_refused(served):
    answer = httpx.post(f"{served[0]}gradio_api/upload", files={"files": ("a.txt", b"hello" * 100)})
    assert answer.status_code == 413


def test_no_history_of_prompts_is_kept(served):
    assert httpx.get(f"{served[0]}gradio_api/runs").status_code == 404
    assert httpx.get(f"{served[0]}config").json()["run_history"] is False


def test_what_visitors_write_is_escaped(model):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)> is red. " * 30
    values = replace(check_settings({**FULL, "prompt": "A cat.", "heat_maps": True}, model, Limits()), prompt=evil)
    events = []
    generate(values, model, events.append)
    pictures = [event for event in events if isinstance(event, Picture)]
    caption = long_caption(sample_scene(1, num_objects=5), 1).text
    for view in (
        token_view(model.pipe.token_report(evil)),
        heat_map_view(pictures, "name"),
        verdict_view(evil, pictures, None),
        verdict_view(caption, [replace(pictures[0], system=evil)], None),
    ):
        assert "<script" not in view
        assert "<img src=x" not in view


def test_temporary_files_of_a_job_are_gone(client, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gallery, _, _ = client.predict(prompt="A cat.", **FAST, api_name="/generate")
    assert Path(gallery[0]["image"]).is_file()
    assert not list(tmp_path.glob("fixclip-*"))


# Compare ------------------------------------------------------------------------------------------------------


def test_compare_runs_each_system(client, model):
    caption = long_caption(sample_scene(3, num_objects=9), 3).text
    gallery, info, table = client.predict(prompt=caption, seed=2, **FAST, api_name="/compare")
    labels = ["Stock, cut at 77 tokens", "Base encoder in windows of 77", "Base encoder in overlapping windows"]
    labels += ["Chosen encoder", "Chosen encoder + adapter"]
    assert [picture["system"] for picture in info["pictures"]] == labels
    assert [item["caption"].split(",")[0] for item in gallery] == [label.split(",")[0] for label in labels]
    assert len({pixels(item).tobytes() for item in gallery}) == 5
    assert np.array_equal(pixels(gallery[4]), python_picture(model.pipe, caption, 2))
    assert len(info["verdicts"]) == 9
    assert table.count("<tr>") == 1 + 9 + 2
    assert "beyond 77 tokens" in table


def test_only_stock_is_blind_to_the_end(client):
    base = tiny.sentences(9)
    one, _, _ = client.predict(prompt=f"{base} A red kite flies.", **FAST, api_name="/compare")
    two, _, _ = client.predict(prompt=f"{base} Snow lies on a roof.", **FAST, api_name="/compare")
    same = [np.array_equal(pixels(a), pixels(b)) for a, b in zip(one, two, strict=True)]
    assert same == [True, False, False, False, False]


def test_stock_is_the_base_with_its_own_encoder(client, model):
    from diffusers import StableDiffusionPipeline

    gallery, _, _ = client.predict(prompt=LONG, seed=1, **FAST, api_name="/compare")
    folder = model.pipe.config._name_or_path
    stock = StableDiffusionPipeline.from_pretrained(folder)
    assert np.array_equal(pixels(gallery[0]), python_picture(stock, LONG, 1))


def test_the_adapter_is_back_after_a_comparison(client, model):
    adapter = model.pipe.text_encoder.adapter
    client.predict(prompt=LONG, **FAST, api_name="/compare")
    assert adapter is not None
    assert model.pipe.text_encoder.adapter is adapter


def test_reading_a_prompt_knows_nothing_of_a_comparison_that_runs(model):
    """Another visitor's comparison takes the adapter off while it draws."""
    before = model.token_report(LONG)
    assert before == model.pipe.token_report(LONG)
    seen = []
    system = model.systems["stock"]
    assert system.pipe.text_encoder is not model.pipe.text_encoder
    alone = model.systems["encoder"]
    settings = {"num_inference_steps": 1, "width": 16, "height": 16}
    model.draw(alone, seed=0, on_step=lambda _: seen.append(model.token_report(LONG)), prompt=LONG, **settings)
    assert seen == [before]


def test_pictures_of_a_base_that_was_saved_with_its_adapter_are_drawn_again(model, tmp_path):
    """The settings of each system's picture say whether the base's own adapter acted."""
    model.pipe.save_pretrained(tmp_path / "whole")
    whole = DemoModel(ModelChoice(str(tmp_path / "whole")), "cpu")
    chosen = Settings(LONG, "", steps=2, guidance_scale=2.0, width=32, height=32, seed=1)
    events = []
    compare(chosen, whole, events.append)
    pictures = [event for event in events if isinstance(event, Picture)]
    assert len(pictures) == len(whole.systems) > 1
    assert len({picture.image.tobytes() for picture in pictures}) == len(pictures)
    for number, picture in enumerate(pictures):
        file = tmp_path / f"{number}.png"
        save_png(picture.image, file, picture.settings)
        again = run_command("generate", "--config", file, "-o", tmp_path / "again.png")
        assert again.exit_code == 0, again.output
        assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(picture.image)), picture.label


def picture_of(scene):
    image = Image.fromarray(render(scene).permute(1, 2, 0).numpy())
    return Picture(image, "label", "system", {})


def test_the_checkers_verdicts_are_told_sentence_by_sentence():
    scene = sample_scene(7, num_objects=9)
    caption = long_caption(scene, 7)
    first, second, *rest = scene.objects
    other = "ring" if first.shape != "ring" else "star"
    changed = replace(scene, objects=(replace(first, shape=other), *rest))
    rows, _ = judge(caption.text, [picture_of(scene)])
    assert [sentence for _, sentence in rows] == [
        caption.text[span.start : span.end] for span in caption.spans if span.place
    ]
    assert verdict_view(caption.text, [picture_of(scene)], None).count("✓ drawn as asked") == 10
    table = verdict_view(caption.text, [picture_of(scene), picture_of(changed)], None)
    assert f"✗ wrong shape: {first.colour} {other}" in table
    assert table.count("– missing") == 1
    assert second.place in {place for place, _ in rows}
    assert "<b>9 of 9</b></td><td><b>7 of 9</b>" in table


def test_a_prompt_of_another_world_has_no_verdict(client):
    _, info, table = client.predict(prompt="A cat on a mat.", **FAST, api_name="/compare")
    assert info["verdicts"] == []
    assert "cannot judge this" in table


def test_verdicts_are_for_scenes_models_only(model, tmp_path):
    base = model.pipe.config._name_or_path
    assert draws_scenes(base)
    assert not DemoModel(ModelChoice(base, scenes=False), "cpu").scenes
    model.pipe.save_pretrained(tmp_path)
    plain = DemoModel(ModelChoice(str(tmp_path)), "cpu")
    assert not plain.scenes
    assert "adapter" in plain.systems
    with serve(plain, tmp_path / "cache") as (url, _):
        client = Client(url, verbose=False)
        caption = long_caption(sample_scene(3), 3).text
        _, info, table = client.predict(prompt=caption, **FAST, api_name="/compare")
        client.close()
    assert "verdicts" not in info
    assert table == ""


def test_an_encoder_without_its_old_positions_has_no_stock_rows(model, tmp_path):
    model.pipe.save_pretrained(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "short_position_embeddings": 0}))
    trained = DemoModel(ModelChoice(str(tmp_path)), "cpu")
    assert list(trained.systems) == ["encoder", "adapter"]


# The line, stopping, many visitors --------------------------------------------------------------------------


def test_cancel_stops_the_work(client, served, unet_calls):
    job = client.submit(prompt=LONG, **{**FAST, "steps": 100}, num_images=4, api_name="/generate")
    wait_until(lambda: len(unet_calls) > 3)
    job.cancel()
    with pytest.raises((CancelledError, Exception)):
        job.result()
    wait_until(lambda: not any(thread.name == "fixclip-job" for thread in threading.enumerate()))
    stopped_at = len(unet_calls)
    assert stopped_at < 400
    gallery, _, _ = client.predict(prompt="A cat.", **FAST, api_name="/generate")
    assert len(gallery) == 1, "the device is free again"
    assert len(unet_calls) == stopped_at + 2


def test_closing_the_iteration_stops_the_work(model, unet_calls):
    values = check_settings({**FULL, "prompt": LONG, "steps": 100}, model, Limits())
    pool = DevicePool([model])

    async def leave_after_three_steps():
        async with aclosing(run(pool, lambda model, emit: generate(values, model, emit))) as events:
            async for event in events:
                assert isinstance(event, Progress)
                if event.step == 3:
                    break

    asyncio.run(leave_after_three_steps())
    with pool.borrow(lambda: None):
        assert len(unet_calls) < 100


def test_errors_of_the_work_arrive_and_free_the_device(model):
    pool = DevicePool([model])

    def fail(model, emit):
        raise KeyError("a bug")

    async def ask():
        async for _ in run(pool, fail):
            pass

    for _ in range(2):
        with pytest.raises(KeyError, match="a bug"):
            asyncio.run(ask())


def test_the_line_is_bounded_and_loses_nobody(model, tmp_path):
    with serve(model, tmp_path, max_waiting=2) as (url, pool):
        client = Client(url, verbose=False)
        with pool.borrow(lambda: None):
            jobs = [client.submit(prompt="A cat.", seed=0, **FAST, api_name="/generate")]
            wait_until(lambda: jobs[0].status().code.value == "PROCESSING" or jobs[0].status().rank is None)
            time.sleep(0.5)
            jobs += [client.submit(prompt="A cat.", seed=i, **FAST, api_name="/generate") for i in (1, 2)]
            time.sleep(0.5)
            with pytest.raises(Exception, match=r"[Qq]ueue is full"):
                client.predict(prompt="A cat.", **FAST, api_name="/generate")
            counted = httpx.post(f"{url}gradio_api/run/tokens", json={"data": ["A cat."]}).json()["data"][0]
            assert counted["text"] == "A cat.", "counting, as the page asks for it, never waits"
            assert not any(job.done() for job in jobs)
        assert [job.result(timeout=30)[1]["seed"] for job in jobs] == [0, 1, 2]
        client.close()


def test_jobs_whose_sender_is_gone_are_not_drawn(model, unet_calls, tmp_path, monkeypatch):
    """Five POSTs that nobody reads the answer of, one that a visitor waits for: the visitor's alone is drawn."""
    monkeypatch.setattr(LISTENERS, "patience", 1000)
    data = ["A cat.", "", 2, 7.5, 32, 32, 0, 1, False]
    with serve(model, tmp_path) as (url, pool):
        client = Client(url, verbose=False)
        with pool.borrow(lambda: None):
            for _ in range(5):
                assert httpx.post(f"{url}gradio_api/call/generate", json={"data": data}).status_code == 200
            job = client.submit(prompt="A cat.", **FAST, api_name="/generate")
            wait_until(lambda: LISTENERS._open)
            monkeypatch.setattr(LISTENERS, "patience", 0)
        gallery, info, _ = job.result(timeout=60)
        assert len(gallery) == 1
        assert len(unet_calls) == info["steps"] == 2
        client.close()


def test_a_page_that_closes_ends_its_running_job(model, unet_calls, tmp_path, monkeypatch):
    monkeypatch.setattr(LISTENERS, "patience", 0)
    pool = DevicePool([model])
    request = types.SimpleNamespace(headers={ARRIVED: "0"}, session_hash="a visitor")
    LISTENERS.opened("a visitor")
    values = check_settings({**FULL, "prompt": LONG, "steps": 100}, model, Limits())

    async def close_after_three_steps():
        jobs = run(pool, lambda model, emit: generate(values, model, emit), lambda: LISTENERS.waits(request))
        async with aclosing(jobs) as events:
            async for event in events:
                if event.step == 3:
                    LISTENERS.closed("a visitor")

    with pytest.raises(ValueError, match="Nobody waited"):
        asyncio.run(close_after_three_steps())
    assert len(unet_calls) < 100
    assert not LISTENERS._open


def test_reading_a_prompt_leaves_the_event_loop_free(client, model, monkeypatch):
    """Every count of tokens runs in a thread without an event loop, so no visitor waits for another's text."""
    loops, count = [], model.token_report

    def spy(prompt):
        loops.append(asyncio._get_running_loop())
        return count(prompt)

    monkeypatch.setattr(model, "token_report", spy)
    with pytest.raises(AppError, match="this page takes"):
        client.predict(prompt=". " * 4500, **FAST, api_name="/generate")
    client.predict(prompt="A cat.", **FAST, api_name="/generate")
    client.predict(prompt="A cat.", **FAST, api_name="/compare")
    client.predict("A cat.", api_name="/tokens")
    assert len(loops) >= 4
    assert set(loops) == {None}


def test_twenty_clients_lose_no_job_and_mix_up_no_result(served, unet_calls):
    result = subprocess.run(
        [
            sys.executable,
            "benchmarks/app_soak.py",
            "--url",
            served[0],
            "--seconds",
            "8",
            "--steps",
            "2",
            "--size",
            "32",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert (counts["clients"], counts["lost"], counts["mixed_up"]) == (20, 0, 0)
    assert counts["fewest_per_client"] >= 1
    assert len(unet_calls) == 2 * counts["pictures"]
    changes = sum(a is not b for a, b in pairwise(unet_calls))
    assert changes == counts["pictures"] - 1, "a job had the device to itself until it was done"


# Links, the default model, the command --------------------------------------------------------------------------


DEFAULTS = {"prompt": "A dog.", **{name: FULL[name] for name in FULL}}


def test_a_link_gives_its_settings_back(model):
    fragment = "#prompt=A+caf%C3%A9+%26+a+cat&seed=42&guidance_scale=3.5&heat_maps=true&unknown=1&width=48"
    values = settings_from_link(fragment, DEFAULTS, model, Limits())
    expected = {"prompt": "A café & a cat", "seed": 42, "guidance_scale": 3.5, "heat_maps": True, "width": 48}
    assert values == {**DEFAULTS, **expected}


def test_a_link_of_too_many_fields_changes_nothing(model):
    fragment = "#seed=42&" + "&".join(f"a{number}=1" for number in range(60))
    assert settings_from_link(fragment, DEFAULTS, model, Limits()) == DEFAULTS


def test_a_page_for_small_pictures_opens_with_a_size_that_it_takes(model, tmp_path):
    """Where --max-side is below the model's own size, which is a multiple of 8."""
    side = model.default_size[0] - 12
    with serve(model, tmp_path, limits=Limits(side=side)) as (url, _):
        small = Client(url, verbose=False)
        gallery, info, _ = small.predict(prompt="a cat", steps=1, api_name="/generate")
        small.close()
    assert info["width"] == info["height"] == side // 8 * 8
    assert Image.open(gallery[0]["image"]).size == (side // 8 * 8, side // 8 * 8)


@given(
    st.dictionaries(
        st.sampled_from([*DEFAULTS, "other"]), st.text(max_size=30) | st.integers().map(str) | st.floats().map(str)
    )
)
@settings(max_examples=25)
def test_any_link_gives_valid_settings(model, sent):
    from urllib.parse import urlencode

    values = settings_from_link("#" + urlencode(sent), DEFAULTS, model, Limits())
    assert list(values) == list(DEFAULTS)
    check_settings({**values, "prompt": "a"}, model, Limits())


@pytest.mark.parametrize("conditioning", ["overlap", "chunks", "one_pass"])
@pytest.mark.parametrize(("count", "parts"), [(3, []), (14, ["fc-long"]), (60, ["fc-long", "fc-even", "fc-odd"])])
def test_the_token_view_gives_the_text_back(model, count, parts, conditioning):
    import html

    text = tiny.sentences(count) + " Fish & chips."
    report = token_report(model.pipe.tokenizer, text, conditioning)
    view = token_view(report)
    body = re.sub(
        r'<span class="fc-cut">.*?</span> ', "", view[view.index('<div class="fc-text"') : view.index("</div>")]
    )
    assert html.unescape(re.sub(r"<[^>]+>", "", body)) == report.text
    assert ("a stock encoder stops here" in view) == bool(parts)
    assert f">{report.num_tokens}</b>" in view
    for part in ("fc-long", "fc-even", "fc-odd"):
        if conditioning == "one_pass":  # the others take more passes
            assert (f'<span class="{part}">' in body) == (part in parts)
    if parts:
        before = body[: body.index('<span class="fc-long">')]
        assert html.unescape(re.sub(r"<[^>]+>", "", before)) == report.text[: report.stock_cut]


def test_a_prompt_beyond_the_page_s_limit_is_told_while_it_is_written(model):
    report = model.token_report(LONG)
    assert f"draws from {report.num_tokens - 1} tokens at most" in token_view(report, report.num_tokens - 1)
    assert "at most" not in token_view(report, report.num_tokens)


def test_without_embedded_weights_the_page_says_that_it_draws_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    with default_choice() as choice:
        model = DemoModel(choice, "cpu")
    assert "pictures are noise" in model.notice
    for example in model.examples():
        assert 77 < model.pipe.token_report(example).num_tokens <= 248


def test_the_embedded_model_opens_with_its_checker(tmp_path, monkeypatch):
    """Stock and windows of the base, with their adapter; a trained encoder that is named comes behind them."""
    write_model(tmp_path / "scenes")
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    with default_choice() as choice:
        model = DemoModel(choice, "cpu")
    assert (model.notice, model.name, model.scenes, model.default_guidance) == ("", "builtin:scenes", True, 2.0)
    assert [system.label for system in model.systems.values()] == [
        "Stock, cut at 77 tokens",
        "Base encoder in windows of 77",
        "Base encoder in overlapping windows",
        "Base encoder in overlapping windows + adapter",
    ]
    model = DemoModel(ModelChoice("builtin:scenes", "builtin:scenes/encoder"), "cpu")
    assert [system.label for system in model.systems.values()] == [
        "Stock, cut at 77 tokens",
        "Base encoder in windows of 77",
        "Base encoder in overlapping windows",
        "Overlapping windows + adapter",
        "Trained encoder + adapter + LoRA",
    ]
    base = "builtin:scenes/base"
    load = FixClipStableDiffusionPipeline.from_pretrained
    wanted = [
        load(base, conditioning="stock"),
        load(base, conditioning="chunks"),
        load(base, conditioning="overlap"),
        load(base, adapter="builtin:scenes/overlap_adapter", conditioning="overlap"),
        load("builtin:scenes", encoder="builtin:scenes/encoder"),
    ]
    prompt, settings = model.examples()[0], {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 72, "height": 72}
    for _ in range(2):  # what one system switches off is on again for the next one
        for system, pipe in zip(model.systems.values(), wanted, strict=True):
            image, _ = model.draw(system, seed=4, on_step=lambda step: None, prompt=prompt, **settings)
            assert np.array_equal(np.asarray(image), python_picture(pipe, prompt, 4, width=72, height=72))


def test_examples_of_a_scenes_model_are_scenes(model):
    for example in model.examples():
        assert model.pipe.token_report(example).stock_cut is not None
        assert len(judge(example, [])[0]) == 9


def test_the_command_explains_wrong_models(tmp_path):
    assert "needs the --base" in error_of(CliRunner().invoke(demo.app, ["--encoder", "somewhere"]))
    assert "without model_index.json" in error_of(CliRunner().invoke(demo.app, ["--base", str(tmp_path)]))


def test_only_this_machine_and_no_public_link_unless_asked():
    defaults = {name: parameter.default for name, parameter in inspect.signature(demo.main).parameters.items()}
    assert defaults["host"] == "127.0.0.1"
    assert defaults["share"] is False


def test_the_folder_alone_is_a_space(model, tmp_path):
    """A copy of apps/space/ elsewhere, started as a Space starts it, on the model that the environment names."""
    space = shutil.copytree(ROOT / "apps" / "space", tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    front_matter = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (space / front_matter["app_file"]).is_file()
    assert front_matter["sdk"] == "gradio"
    assert (space / "requirements.txt").read_text() == "fixclip[app]\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    gradio = Requirement(next(line for line in project["optional-dependencies"]["app"] if line.startswith("gradio")))
    assert gradio.specifier.contains(front_matter["sdk_version"])
    assert SpecifierSet(project["requires-python"]).contains(f"{front_matter['python_version']}.0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "FIXCLIP_BASE": model.pipe.config._name_or_path,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path / "cache"),
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "apps")])  # where the package is not installed
    with subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: server.poll() is not None or answers(port), seconds=90)
            assert server.poll() is None
            listening = {
                item.laddr.ip for item in psutil.Process(server.pid).net_connections() if item.status == "LISTEN"
            }
            assert listening == {"127.0.0.1"}
            client = Client(f"http://127.0.0.1:{port}", verbose=False)
            assert client.predict("A cat.", api_name="/tokens")["text"] == "A cat."
            client.close()
        finally:
            server.terminate()


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/config").status_code == 200
    except httpx.TransportError:
        return False
