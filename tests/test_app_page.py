"""The page in headless Chromium, on tiny real models: what a visitor does, sees and keeps."""

import json
import os
import re
import shutil
import threading
import time
from urllib.parse import parse_qs, urlparse

import pytest
import tiny

pytest.importorskip("gradio", reason="the page needs the extra `app`")
pytest.importorskip("playwright", reason="the browser tests need playwright (extra `dev`)")
from app_server import make_model, serve
from PIL import Image
from playwright import sync_api as playwright

from fixclip_core.scenes import long_caption, sample_scene

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium on this machine (Debian: apt-get install chromium)", allow_module_level=True)

LONG = tiny.sentences(14)
VERY_LONG = tiny.sentences(40)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), scenes=True)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("cache")) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "chromium is missing: .ci/run installs it where it can"
    with playwright.sync_playwright() as driver:
        # Each launch has a profile folder of its own, which goes with it.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the page; at the end no script has failed and nothing but the server was asked for anything."""
    contexts, problems = [], []

    def open_(fragment="", **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith((url, "data:", "blob:")) else problems.append(request.url),
        )
        page.goto(url + fragment)
        page.wait_for_function("window.fixclipReady === true")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def unet_calls(model):
    calls = []

    def called(*_):
        calls.append(1)
        time.sleep(0.02)  # as no real UNet is so quick that a job ends before a click stops it

    hook = model.pipe.unet.register_forward_hook(called)
    yield calls
    hook.remove()


def expect(locator):
    return playwright.expect(locator)


def prompt_box(page):
    return page.locator("#prompt").get_by_role("textbox")


def seed_box(page):
    return page.locator("#seed").get_by_role("spinbutton")


def type_prompt(page, text):
    prompt_box(page).fill(text)


def type_very_long(page, model):
    """Types a prompt of several passes, and waits until the page shows that one and not the example it opened with."""
    type_prompt(page, VERY_LONG)
    report = model.token_report(VERY_LONG)
    expect(tokens(page)).to_have_text(f"{report.num_tokens:,}")
    expect(page.locator("#tokens")).to_contain_text(f"in {len(report.passes)} passes")
    assert page.locator(".fc-text .fc-even").count() > 1


def tokens(page):
    return page.locator("#fc-tokens")


def set_number(page, label, value):
    field = page.get_by_role("spinbutton", name=re.compile(label)).first
    field.fill(str(value))
    field.press("Tab")


def quick(page, steps=2, size=32):
    set_number(page, "Steps", steps)
    set_number(page, "Width", size)
    set_number(page, "Height", size)


def done(page, tab="generate"):
    expect(page.locator(f"#{tab}-status")).to_contain_text("Done.", timeout=30_000)


def settings_in(link):
    return {name: values[0] for name, values in parse_qs(urlparse(link).fragment).items()}


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def no_job_runs():
    return not any(thread.name == "fixclip-job" for thread in threading.enumerate())


def test_the_count_follows_typing_and_the_cut_is_marked(open_page, model):
    page = open_page()
    type_prompt(page, "A cat.")
    expect(tokens(page)).to_have_text(str(model.pipe.token_report("A cat.").num_tokens))
    expect(page.locator(".fc-cut")).to_have_count(0)
    prompt_box(page).press_sequentially(" It sleeps.", delay=5)
    expect(tokens(page)).to_have_text(str(model.pipe.token_report("A cat. It sleeps.").num_tokens))
    type_prompt(page, LONG)
    report = model.pipe.token_report(LONG)
    expect(tokens(page)).to_have_text(str(report.num_tokens))
    expect(page.locator(".fc-cut")).to_be_visible()
    assert page.locator(".fc-text .fc-stock").inner_text() == LONG[: report.stock_cut]
    behind = page.locator(".fc-text .fc-long, .fc-text .fc-odd, .fc-text .fc-even").all_text_contents()
    assert "".join(behind) == LONG[report.stock_cut :]
    type_very_long(page, model)


def test_a_long_example_is_a_click_away(open_page, model):
    page = open_page()
    page.get_by_role("button", name=re.compile(re.escape(model.examples()[1][:30]))).click()
    expect(prompt_box(page)).to_have_value(model.examples()[1])
    expect(page.locator(".fc-cut")).to_be_visible()


def test_generate_and_download(open_page, tmp_path):
    page = open_page()
    type_prompt(page, LONG)
    quick(page)
    set_number(page, "Seed", 11)
    set_number(page, "Number of images", 2)
    page.get_by_role("button", name="Generate", exact=True).click()
    done(page)
    pictures = page.locator("#gallery .thumbnail-item img")
    expect(pictures).to_have_count(2)
    assert "seed 11" in pictures.first.get_attribute("alt")
    pictures.nth(1).click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_role("button", name=re.compile("download", re.IGNORECASE)).or_(
            page.locator("#gallery a[download]")
        ).first.click()
    download.value.save_as(tmp_path / "picture.png")
    assert download.value.suggested_filename.endswith("seed12.png")
    image = Image.open(tmp_path / "picture.png")
    assert image.format == "PNG"
    assert image.text["prompt"] == LONG
    saved = json.loads(image.text["fixclip"])
    assert (saved["seed"], saved["steps"], saved["size"]) == (12, 2, [32, 32])


def test_the_picture_is_seen_forming_and_the_bar_moves(open_page):
    page = open_page()
    type_prompt(page, LONG)
    quick(page, steps=300, size=64)
    set_number(page, "Number of images", 4)
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#generate-status .progress-bar")).to_be_visible()
    expect(page.locator('#gallery img[alt="forming"]')).to_be_visible()
    page.locator("#stop-generate").click()
    expect(page.locator("#generate-status")).to_contain_text("Stopped.")


def test_stop_really_stops_and_the_next_job_runs(open_page, unet_calls):
    page = open_page()
    type_prompt(page, LONG)
    quick(page, steps=100)
    set_number(page, "Number of images", 4)
    page.get_by_role("button", name="Generate", exact=True).click()
    wait_until(lambda: len(unet_calls) > 5)
    page.locator("#stop-generate").click()
    wait_until(no_job_runs)
    stopped_at = len(unet_calls)
    assert stopped_at < 400
    expect(page.locator("#generate-status")).to_contain_text("Stopped.")
    quick(page)
    set_number(page, "Number of images", 1)
    page.get_by_role("button", name="Generate", exact=True).click()
    done(page)
    assert len(unet_calls) == stopped_at + 2


def test_leaving_the_page_stops_the_work(open_page, unet_calls):
    page = open_page()
    type_prompt(page, LONG)
    quick(page, steps=100)
    set_number(page, "Number of images", 4)
    page.get_by_role("button", name="Generate", exact=True).click()
    wait_until(lambda: len(unet_calls) > 5)
    page.close()
    wait_until(no_job_runs)
    assert len(unet_calls) < 400


def test_compare_shows_the_systems_and_the_verdicts(open_page):
    page = open_page()
    caption = long_caption(sample_scene(3, num_objects=9), 3).text
    type_prompt(page, caption)
    quick(page)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    done(page, "compare")
    pictures = page.locator("#sheet .thumbnail-item img")
    expect(pictures).to_have_count(5)
    alts = [pictures.nth(i).get_attribute("alt") for i in range(5)]
    assert [alt.split(", seed")[0] for alt in alts] == [
        "Stock, cut at 77 tokens",
        "Base encoder in windows of 77",
        "Base encoder in overlapping windows",
        "Chosen encoder",
        "Chosen encoder + adapter",
    ]
    rows = page.locator("#verdicts tbody tr")
    expect(rows).to_have_count(9 + 2)
    for words in page.locator("#verdicts tbody tr:nth-child(-n+9) td").all_inner_texts():
        assert re.match(r"✓ drawn as asked|✗ wrong (shape|colour|shape and colour): \w+ \w+|– missing", words)


def test_settings_survive_a_reload_and_travel_as_a_link(open_page):
    page = open_page()
    type_prompt(page, "Ein Café & 100 % <b>Regen</b> #1 + ü.")
    quick(page, steps=7, size=40)
    page.locator("#negative-prompt").get_by_role("textbox").fill("blurry, grey")
    page.get_by_role("button", name="Random seed").click()
    page.locator("#heat-maps").get_by_role("checkbox").check()
    page.wait_for_function("location.hash.includes('heat_maps=true')")
    link = page.url
    seed = seed_box(page).input_value()
    sent = settings_in(link)
    assert (sent["steps"], sent["width"], sent["negative_prompt"], sent["seed"]) == ("7", "40", "blurry, grey", seed)
    page.reload()
    page.wait_for_function("window.fixclipReady === true")
    other = open_page(urlparse(link)._replace(scheme="", netloc="", path="").geturl())
    for shown in (page, other):
        expect(prompt_box(shown)).to_have_value("Ein Café & 100 % <b>Regen</b> #1 + ü.")
        expect(shown.locator("#negative-prompt").get_by_role("textbox")).to_have_value("blurry, grey")
        expect(seed_box(shown)).to_have_value(seed)
        expect(shown.get_by_role("spinbutton", name=re.compile("Steps")).first).to_have_value("7")
        expect(shown.locator("#heat-maps").get_by_role("checkbox")).to_be_checked()
        assert shown.locator("#tokens b").count() == 1, "what was written is text, not HTML"


def test_a_damaged_link_opens_the_page_with_defaults(open_page):
    page = open_page("#steps=0&seed=abc&width=%00&guidance_scale=nan&prompt=A+cat.")
    expect(prompt_box(page)).to_have_value("A cat.")
    expect(page.get_by_role("spinbutton", name=re.compile("Steps")).first).to_have_value("20")


def test_an_empty_prompt_survives_a_reload(open_page):
    page = open_page()
    type_prompt(page, "")
    page.wait_for_function("location.hash.includes('prompt=&')")
    page.reload()
    page.wait_for_function("window.fixclipReady === true")
    expect(prompt_box(page)).to_have_value("")


def test_errors_are_told_on_the_page(open_page):
    page = open_page()
    type_prompt(page, "   ")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.get_by_text("The prompt is empty")).to_be_visible()
    expect(page.locator("#generate-status")).to_contain_text("Not done")
    type_prompt(page, LONG)
    quick(page, steps=300, size=64)
    page.get_by_role("button", name="Generate", exact=True).click()
    running = """() => document.querySelector('#generate-status .generating')
        && getComputedStyle(document.querySelector('#generate-status .prose')).visibility"""
    assert page.wait_for_function(running).json_value() == "hidden", "the last job's words beside the running one"
    page.locator("#stop-generate").click()


def test_a_sentence_shows_its_heat_map_by_pointer_and_by_keyboard(open_page):
    page = open_page()
    type_prompt(page, LONG)
    quick(page)
    page.locator("#heat-maps").get_by_role("checkbox").check()
    page.get_by_role("button", name="Generate", exact=True).click()
    done(page)
    expect(page.locator("#maps label")).to_have_count(1 + LONG.count("."))
    shown = "[...document.querySelectorAll('#maps .fc-map')].map(e => Number(getComputedStyle(e).opacity) > 0.5)"

    def visible():
        page.wait_for_timeout(400)  # the transition
        return [index for index, seen in enumerate(page.evaluate(shown)) if seen]

    assert visible() == []
    page.locator("#maps .fc-s3").hover()
    assert visible() == [3]
    page.mouse.move(0, 0)
    assert visible() == []
    page.locator("#maps .fc-s12 input").check()
    page.mouse.move(0, 0)
    assert visible() == [12]
    page.keyboard.press("ArrowDown")
    assert visible() == [13]


def test_by_keyboard_alone(open_page):
    page = open_page()
    prompt = prompt_box(page)
    prompt.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("A cat.")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    expect(page.locator("#generate")).to_be_focused()
    page.keyboard.press("Enter")
    done(page)
    expect(page.locator("#gallery .thumbnail-item img")).to_have_count(1)


def test_labels_and_alt_texts(open_page):
    page = open_page()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input:not([type=hidden]), textarea, button, img')].filter(e => {
            if (!e.checkVisibility()) return false;
            if (e.tagName === 'IMG') return !e.hasAttribute('alt');
            const label = e.labels && [...e.labels].some(l => l.innerText.trim());
            return !(label || e.innerText.trim() || e.getAttribute('aria-label') || e.title);
        }).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []


def test_a_phone_is_wide_enough(open_page, model):
    page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
    type_very_long(page, model)
    quick(page)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    done(page, "compare")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    last, text = page.locator(".fc-key span").last.bounding_box(), page.locator(".fc-text").bounding_box()
    assert last["x"] + last["width"] <= text["x"] + text["width"]
    boxes = [page.locator(selector).bounding_box() for selector in ("#prompt textarea", "#compare", "#steps")]
    for box in boxes:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"], "the buttons come before the many settings"


def luminance(page, selector, what):
    red, green, blue = page.evaluate(
        f"getComputedStyle(document.querySelector('{selector}')).{what}.match(/[\\d.]+/g).slice(0, 3).map(Number)"
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(open_page, model, scheme):
    page = open_page(color_scheme=scheme)
    type_very_long(page, model)
    background = luminance(page, "body", "backgroundColor")
    assert (background < 80) == (scheme == "dark")
    for selector in (".fc-text .fc-stock", ".fc-text .fc-long", ".fc-text .fc-even", "#tokens p", "#prompt textarea"):
        assert abs(luminance(page, selector, "color") - background) > 120, selector
