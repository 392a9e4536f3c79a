"""`fixclip data preview`: the page in headless Chromium."""

import json
import os
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("playwright", reason="the browser tests need playwright (extra `dev`)")
from playwright import sync_api as playwright

from fixclip_cli.main import app
from fixclip_core.data.captions import CaptionFilters
from fixclip_core.data.config import DataConfig
from fixclip_core.data.preview import token_counter, write_preview

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium on this machine (Debian: apt-get install chromium)", allow_module_level=True)

WORDS = " ".join(f"Thing {i} stands near the number {i}." for i in range(60))  # far more than 248 tokens
HOSTILE = 'A <b>bold</b> dog says "</script><script>document.title=1</script><!-- ☃" & runs over 🐕 grass near a wall.'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"image": "0.png", "long": WORDS, "short": "Many things.", "model": "m", "prompt": "sober"},
        {"image": "1.png", "long": HOSTILE},
        {"image": "2.png", "long": "Too short."},
        {"image": "absent.png", "long": WORDS},
        *({"image": f"{i % 3}.png", "long": f"Sample {i} is a plain surface of one colour."} for i in range(4, 45)),
    ]
    for i in range(3):
        Image.new("RGB", (600, 300), (90 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    made = folder / "page.html"
    result = CliRunner().invoke(app, ["data", "preview", str(folder / "rows.jsonl"), "-o", str(made)])
    assert result.exit_code == 0, result.output
    assert "45 samples" in result.output
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
        page.goto(made.as_uri())
        yield page
        assert errors == []  # no script failed, and nothing was fetched
        browser.close()


def test_captions_are_cut_where_the_encoders_cut_them(page):
    first = page.locator("article").nth(0)
    read, to248, beyond = (
        first.locator("p").nth(1).evaluate("p => p.firstChild.textContent"),
        first.locator(".to248").text_content(),
        first.locator(".beyond").text_content(),
    )
    assert read + to248 + beyond == WORDS
    ends = token_counter()(WORDS)
    assert sum(end <= len(read) for end in ends) == 75
    assert sum(end <= len(read + to248) for end in ends) == 246
    assert f"{len(ends) + 2} tokens" in first.text_content()
    assert "short, 5 tokens" in first.text_content()
    assert "model: m · prompt: sober" in first.text_content()
    width, height = first.locator("img").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert (width, height) == (256, 128)


def test_captions_are_text_whatever_they_hold(page):
    assert HOSTILE in page.locator("article").nth(1).text_content()
    assert page.title() != "1"
    assert page.locator("article b").count() == 0


def test_verdicts(page):
    assert "left out: too_short" in page.locator("article").nth(2).text_content()
    bad = page.locator("article").nth(3)
    assert "left out: missing_file" in bad.text_content()
    assert bad.locator("img").count() == 0


def test_pages_and_choices(page):
    assert page.locator("article").count() == 20
    page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Next").click()
    assert page.locator("#where").text_content() == "page 3 of 3, 45 samples"
    assert page.locator("article").count() == 5
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_label("Show").select_option("left out")
    assert page.locator("article").count() == 2
    page.get_by_label("Show").select_option("over 248 tokens")
    assert page.locator("article").count() == 1
    page.get_by_label("Show").select_option("all")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_samples_are_spread_evenly_and_errors_are_clear(folder):
    config = DataConfig(source=str(folder / "rows.jsonl"))
    assert write_preview(config, folder / "few.html", CaptionFilters(), limit=10) == 9
    assert "Sample 44" not in (folder / "few.html").read_text()
    assert "Sample 40" in (folder / "few.html").read_text()
    with pytest.raises(ValueError, match="cannot be written"):
        write_preview(config, folder / "0.png" / "page.html", CaptionFilters())
