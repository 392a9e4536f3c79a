"""The documentation site: it builds strictly, its reference is the code's, its notebooks and drawings are today's."""

import re
from html.parser import HTMLParser
from pathlib import Path

import draw_figures
import nbformat
import pytest
import run_notebooks
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from site_pages import assets_of, recipes_page, site_links

from fixclip_core import builtin
from fixclip_core.synthesis.recipe import CaptionRecipe
from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.recipe import valid_keys
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe
from fixclip_diffusion.conditioning import CONDITIONINGS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site; a broken link or reference, or a page outside the navigation, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


class Page(HTMLParser):
    """Text, links and loaded addresses of a page."""

    def __init__(self, file):
        super().__init__()
        self.text, self.loads = [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_data(self, data):
        self.text.append(data)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loads += [values["src"]] if "src" in values else []
        self.loads += [values["href"]] if tag == "link" and values.get("rel") == "stylesheet" else []


def text_of(site, page):
    return " ".join(Page(site / page).text)


def test_the_reference_has_every_field_command_and_conditioning(site):
    recipes = text_of(site, "reference/recipes.html").split()
    for schema in (EncoderRecipe, AdapterRecipe, CaptionRecipe):
        fields = {key.split(".")[-1] for key in valid_keys(schema)}
        assert fields <= set(recipes), fields - set(recipes)
    undescribed = [line for line in recipes_page().splitlines() if "` |  |" in line]
    assert not undescribed
    commands = text_of(site, "reference/commands.html")
    for name in ("fixclip generate", "fixclip data pack", "fixclip train encoder", "--conditioning"):
        assert name in commands
    classes = text_of(site, "reference/conditioning.html")
    for conditioning in CONDITIONINGS.values():
        assert type(conditioning).__name__ in classes
    assert "negative_prompt" in text_of(site, "reference/pipelines.html")


def test_pages_load_nothing_from_elsewhere_and_name_no_place_of_a_machine(site):
    for file in site.rglob("*.html"):
        page = Page(file)
        assert not [address for address in page.loads if re.match(r"(https?:)?//", address)], file.name
        assert not re.search(r"(?<![\w.])/(home|root|tmp)/|" + re.escape(str(ROOT)), " ".join(page.text)), file.name


@pytest.mark.parametrize(
    "text",
    [
        "[a page](gone.md)",
        "[a place](index.md#gone)",
        "![a picture](gone.png)",
        "::: fixclip_core.gone",
        "[an object][fixclip_core.gone]",
    ],
)
def test_what_leads_nowhere_ends_the_build(text, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# A page\n\n{text}\n")
    options = {"docs_dir": str(docs), "site_dir": str(tmp_path / "site"), "strict": True, "nav": None, "hooks": []}
    with pytest.raises((Abort, SystemExit)):
        build(load_config(str(ROOT / "mkdocs.yml"), **options))


@pytest.mark.parametrize(
    ("path", "link", "expected"),
    [
        ("faq.md", "[it](../comfyui/README.md)", "[it](comfyui/README.md)"),
        ("tutorials/comfyui.md", "[it](../../comfyui/README.md#nodes)", "[it](../comfyui/README.md#nodes)"),
        ("comfyui/README.md", "[it](../docs/faq.md#x)", "[it](../faq.md#x)"),
        ("CHANGELOG.md", "[it](docs/faq.md)", "[it](faq.md)"),
        ("index.md", "[it](notebooks/first_steps.ipynb)", "[it](notebooks/first_steps.md)"),
        ("notebooks/first_steps.md", "[it](first_steps.ipynb)", "[it](first_steps.ipynb)"),
        ("faq.md", "![it](images/method.svg)", "![it](images/method.svg)"),
        ("faq.md", "[it](../pyproject.toml)", "it"),
        ("faq.md", "[it](../tests)", "it"),
        ("faq.md", "[it](gone.md)", "[it](gone.md)"),
        ("index.md", "[it](#start)", "[it](#start)"),
        ("index.md", "[it](https://arxiv.org/abs/2507.10095)", "[it](https://arxiv.org/abs/2507.10095)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(path, link, expected):
    pages = {"index.md", "faq.md", "comfyui/README.md", "images/method.svg"}
    pages |= {"notebooks/first_steps.md", "notebooks/first_steps.ipynb"}
    assert site_links(f"see {link}, and (that)", path, pages) == f"see {expected}, and (that)"


def test_pages_outside_the_docs_bring_what_they_show():
    text = "![a](example_workflows/long_prompt_sd15.json) [b](encode.py) [c](gone.png) [d](../docs/images/method.svg)"
    assert assets_of(text, "comfyui/README.md") == {"comfyui/example_workflows/long_prompt_sd15.json"}


@pytest.mark.skipif(not builtin.is_available(), reason="this copy has no embedded weights")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom_and_prints_what_it_shows(file):
    stored, today = nbformat.read(file, as_version=4), run_notebooks.run(file)
    assert printed(stored) == printed(today), "run docs/scripts/run_notebooks.py"
    assert file.stat().st_size < 100_000


def printed(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    return [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]


def test_the_drawings_are_those_of_their_script(tmp_path):
    draw_figures.main(tmp_path)
    for name in draw_figures.FIGURES:
        drawn, stored = (labels(folder / f"{name}.svg") for folder in (tmp_path, draw_figures.IMAGES))
        assert len(drawn) > 5
        assert drawn == stored, "run docs/scripts/draw_figures.py"


def labels(file):
    """The texts of a drawing, which matplotlib writes beside their outlines."""
    return re.findall(r"<!-- (.+?) -->", file.read_text(encoding="utf-8"))
