"""The report's page in headless Chromium, at the width of a desktop and of a phone."""

import os
import re
import shutil

import pytest

pytest.importorskip("playwright", reason="the browser tests need playwright (extra `dev`)")
from PIL import Image
from playwright import sync_api as playwright

from fixclip_core import scenes
from fixclip_diffusion.evaluation import run
from fixclip_diffusion.evaluation.benchmarks import Benchmark
from fixclip_diffusion.evaluation.generate import Drawing, System
from fixclip_diffusion.evaluation.judges import Reply, SceneChecker
from fixclip_diffusion.evaluation.prompts import read_prompts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium on this machine (Debian: apt-get install chromium)", allow_module_level=True)

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
SCRIPT = "<b onmouseover=alert(1)>bold</b>"  # a reply that must stay text


class Silent(SceneChecker):
    """Answers nothing but the first question of each picture."""

    name = "silent"

    def answers(self, image, prompt, questions):
        for number, reply in enumerate(super().answers(image, prompt, questions)):
            yield reply if number == 0 else Reply(SCRIPT, problem="no answer")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two systems, one of which lacks what stands behind token 77, judged twice."""
    folder = tmp_path_factory.mktemp("report")
    prompts = read_prompts("scenes:2")
    for name, most in (("all", 9), ("few", 3)):
        (folder / name).mkdir()
        for prompt in prompts:
            order = sorted(prompt.scene.objects, key=lambda item: prompt.text.find(item.place))
            scene = scenes.Scene(prompt.scene.background, tuple(order[:most]))
            image = Image.fromarray(scenes.render(scene).permute(1, 2, 0).numpy())
            image.save(folder / name / f"{prompt.id}.png")
    systems = [System("few", pictures=str(folder / "few")), System("all", pictures=str(folder / "all"))]
    benchmark = Benchmark("scenes <i>of ours</i>", tuple(prompts), "scenes:2")
    found = run.evaluate_images(
        "not used", benchmark, systems, Drawing(), folder / "out", judges=[SceneChecker(), Silent()]
    )
    return folder / "out" / "report.html", found


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "chromium is missing: .ci/run installs it where it can"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole_and_fits(report, browser, width):
    path, _ = report
    page = browser.new_page(viewport=dict(zip(("width", "height"), WIDTHS[width], strict=True)))
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert not problems
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]  # one file
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("figure img").count() == 4
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator("section.judge").count() == 2
    assert page.locator("section.judge svg rect").count() > 8
    assert page.get_by_text("scenes <i>of ours</i>").count() == 1
    assert page.locator("figure b").first.inner_text() in ("few", "all")
    assert page.locator("li b").count() == 0  # what a judge says is text
    silent = page.locator("details.unanswered")
    assert silent.locator("summary").inner_text() == "72 questions without an answer, counted 0"
    page.close()


def test_tables_are_sorted_by_a_click_and_by_the_keyboard(report, browser):
    path, found = report
    page = browser.new_page()
    page.goto(path.as_uri())
    table = page.locator("section.judge table.sortable").first
    names = lambda: table.locator("tbody tr td:first-child").all_inner_texts()  # noqa: E731
    head = table.locator("th").nth(1)
    assert names() == ["few", "all"]
    head.click()
    assert names() == ["all", "few"]
    assert head.get_attribute("aria-sort") == "descending"
    head.press("Enter")
    assert names() == ["few", "all"]
    assert head.get_attribute("aria-sort") == "ascending"
    value = found["judges"]["checker"]["systems"]["all"]["all"]
    assert f"{100 * value['mean']:.1f} ± {100 * value['standard_error']:.1f}" in table.inner_text()
    page.close()


def test_each_question_shows_its_verdict(report, browser):
    path, found = report
    page = browser.new_page()
    page.goto(path.as_uri())
    for row in found["prompts"]:
        article = page.locator("article", has=page.get_by_text(row["id"], exact=True))
        for name, system in row["systems"].items():
            figure = article.locator("figure", has=page.get_by_text(name, exact=True))
            marks = figure.locator("li .marks span:first-child").all_inner_texts()
            wanted = ["✓" if a["counted"] else "✗" for a in system["judges"]["checker"][0]]
            assert [mark.replace("↳", "✗") for mark in marks] == wanted
            assert re.fullmatch(r"\d+, \d+ of 19", figure.locator("summary").inner_text())
    page.close()
