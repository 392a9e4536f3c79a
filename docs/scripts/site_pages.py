"""What the documentation site holds beside docs/*.md, made anew at each build (a hook of mkdocs).

- reference/: the API (mkdocstrings fills it in), the fields of the recipes from their schema, the commands from typer;
- the page of each notebook;
- pages of the navigation that lie outside docs/, at their path in the repository, such as comfyui/README.md, with
  the pictures and workflows that they link to.

Links are written for the repository, so that the pages also work where it is browsed; `on_page_markdown` turns them
into the site's.
"""

import inspect
import json
import posixpath
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import griffe
import nbconvert
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parents[2]

LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
ASSETS = {".gif", ".jpg", ".json", ".png", ".svg", ".webp"}

# page of the reference -> title, and the objects it shows
API: dict[str, tuple[str, list[str]]] = {
    "pipelines": (
        "Pipelines and components",
        [
            "fixclip_diffusion.pipeline.FixClipStableDiffusionPipeline",
            "fixclip_diffusion.pipeline_xl.FixClipStableDiffusionXLPipeline",
            "fixclip_diffusion.long_prompts.LongPromptMixin",
            "fixclip_diffusion.text_encoder.FixClipTextEncoder",
            "fixclip_diffusion.text_encoder.FixClipTextEncoderWithProjection",
            "fixclip_diffusion.tokenizer.FixClipTokenizer",
            "fixclip_diffusion.adapter.TextAdapter",
            "fixclip_diffusion.token_report",
            "fixclip_diffusion.attention_maps",
            "fixclip_diffusion.state_mask",
        ],
    ),
    "conditioning": ("Conditionings", ["fixclip_diffusion.conditioning", "fixclip_diffusion.prompt_encoder"]),
    "model": (
        "The model",
        [
            "fixclip_core.model.fixclip",
            "fixclip_core.model.config",
            "fixclip_core.model.positional",
            "fixclip_core.model.text_tower.TextTower",
            "fixclip_core.model.image_tower.ImageTower",
        ],
    ),
    "training": (
        "Training",
        [
            "fixclip_core.training.encoder.losses.contrastive",
            "fixclip_core.training.encoder.losses.hierarchical",
            "fixclip_core.training.encoder.losses.pca",
            "fixclip_core.training.encoder.losses.state_alignment",
            "fixclip_core.training.encoder.losses.gradcache",
            "fixclip_core.training.encoder.task",
            "fixclip_diffusion.adapter_training.objectives",
            "fixclip_diffusion.adapter_training.objectives.denoising",
            "fixclip_diffusion.adapter_training.objectives.distillation",
            "fixclip_core.training.recipe",
            "fixclip_core.training.trainer.Trainer",
        ],
    ),
    "weights": (
        "Weights and evaluation",
        [
            "fixclip_core.weights.load",
            "fixclip_core.weights.text_encoder",
            "fixclip_core.weights.write",
            "fixclip_core.evaluation.encoders",
            "fixclip_core.evaluation.retrieval",
            "fixclip_core.evaluation.classification",
            "fixclip_core.evaluation.twins",
        ],
    ),
    "scenes": (
        "The scenes world",
        [
            "fixclip_core.scenes.world",
            "fixclip_core.scenes.rendering",
            "fixclip_core.scenes.captions",
            "fixclip_core.scenes.reader",
            "fixclip_core.scenes.checker",
            "fixclip_core.scenes.references",
            "fixclip_core.scenes.twins",
        ],
    ),
}


# -- mkdocs' events -----------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for page, (title, names) in API.items():
        content = "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])
        files.append(File.generated(config, f"reference/{page}.md", content=content))
    files.append(File.generated(config, "reference/recipes.md", content=recipes_page()))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    for path in filter(lies_outside, pages_of(config.nav)):
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=text))
        for asset in assets_of(text, path):
            files.append(File.generated(config, asset, content=(ROOT / asset).read_bytes()))
    for notebook in sorted(Path(config.docs_dir).rglob("*.ipynb")):
        for path, made in notebook_files(notebook, Path(config.docs_dir)):
            files.append(File.generated(config, path, content=made))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Links between files of the repository become links between pages of the site."""
    return site_links(markdown, page.file.src_uri, files.src_uris)


def pages_of(nav: Any) -> Iterator[str]:
    """The pages that a navigation names: `[{"Start": "index.md"}, {"Tutorials": [...]}]`, nested."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_of(entry)


def lies_outside(path: str) -> bool:
    """Whether this path of the site is a file of the repository outside docs/."""
    return (ROOT / path).is_file() and not path.startswith("docs/") and not (ROOT / "docs" / path).is_file()


def assets_of(markdown: str, path: str) -> set[str]:
    """Paths in the repository of the pictures and workflows that a page outside docs/ links to."""
    targets = (_in_repository(link["target"], path) for link in LINK.finditer(markdown))
    return {target for target in targets if Path(target).suffix in ASSETS and lies_outside(target)}


def _in_repository(target: str, path: str) -> str:
    """A link's path in the repository, from the page at `path` of the site."""
    folder = posixpath.dirname(path if lies_outside(path) else f"docs/{path}")
    return posixpath.normpath(posixpath.join(folder, target))


def site_links(markdown: str, path: str, pages: Collection[str]) -> str:
    """The text of a page of the site with each relative link as the site needs it.

    A link to a file of the repository that the site does not have, such as a script, becomes its text. One that leads
    nowhere stays, and ends a strict build.

    Args:
        markdown: e.g. "[nodes](../comfyui/README.md)".
        path: of the page in the site, e.g. "faq.md"; the example becomes "[nodes](comfyui/README.md)".
        pages: paths of everything in the site.
    """

    def replace(link: re.Match[str]) -> str:
        file = _in_repository(link["target"], path)
        target = file.removeprefix("docs/")
        as_page = re.sub(r"\.ipynb$", ".md", target)
        if as_page != path:  # a notebook's own page links to the file, to download it
            target = as_page
        if target not in pages and (ROOT / file).exists():
            return link["text"]
        relative = posixpath.relpath(target, posixpath.dirname(path) or ".")
        return f"[{link['text']}]({relative}{link['anchor'] or ''})"

    return LINK.sub(replace, markdown)


# -- pages made from the code -------------------------------------------------------------------------------


def recipes_page() -> str:
    """Every field of every recipe: its type, default, limits and description."""
    from fixclip_core.synthesis.recipe import CaptionRecipe
    from fixclip_core.training.encoder.recipe import EncoderRecipe
    from fixclip_diffusion.adapter_training.recipe import AdapterRecipe

    parts = [
        "# Fields of the recipes",
        "A recipe is YAML; each field can be overridden on the command line, `train.batch_size=512`. "
        "Fields without a default must be set.",
    ]
    recipes: list[tuple[str, type[BaseModel]]] = [
        ("fixclip train encoder", EncoderRecipe),
        ("fixclip train adapter", AdapterRecipe),
        ("fixclip caption", CaptionRecipe),
    ]
    for command, recipe in recipes:
        parts += [f"## `{command}`", *_section_tables(recipe)]
    return "\n\n".join(parts) + "\n"


def _section_tables(recipe: type[BaseModel]) -> Iterator[str]:
    schema = recipe.model_json_schema()
    sections = {
        name: field.annotation
        for name, field in recipe.model_fields.items()
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)
    }
    yield _field_table(recipe, {name: value for name, value in schema["properties"].items() if name not in sections})
    for name, section in sections.items():
        yield f"### {name}"
        yield _field_table(section, section.model_json_schema()["properties"])


def _field_table(section: type[BaseModel], properties: dict[str, dict[str, Any]]) -> str:
    descriptions = _documented_arguments(section)
    rows = ["| field | | default | type |", "|---|---|---|---|"]
    for name, schema in properties.items():
        field = section.model_fields[name]
        default = "" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"
        text = schema.get("description") or descriptions.get(name, "")
        rows.append(f"| `{name}` | {_cell(text)} | {default} | {_type(schema)} |")
    return "\n".join(rows)


def _documented_arguments(section: type[BaseModel]) -> dict[str, str]:
    """{field: description} from the docstrings of a section and its bases, for fields that pydantic knows none of."""
    from fixclip_core.data.captions import CaptionFilters

    found: dict[str, str] = {}
    for cls in (*section.__mro__, CaptionFilters):
        for part in griffe.Docstring(cls.__doc__ or "").parse("google", warnings=False):
            if part.kind in (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes):
                found = {item.name: item.description for item in part.value} | found
    return found


def _type(schema: dict[str, Any]) -> str:
    """E.g. `integer, at least 1, or null` for {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "multipleOf": "a multiple of",
    }
    words = [f"{word} {schema[key]}" for key, word in limits.items() if key in schema]
    name = schema.get("type", "any")
    if name == "array":
        name = f"list of {_type(schema.get('items', {}))}"
    return ", ".join([name, *words])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands_page() -> str:
    """`fixclip` and all commands below it, as `typer utils docs` words them."""
    from fixclip_cli.main import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="fixclip", title="Commands")


def notebook_files(notebook: Path, docs: Path) -> Iterator[tuple[str, str | bytes]]:
    """The page of a notebook and the pictures of its outputs, as (path in the site, content)."""
    folder = f"{notebook.stem}_files"
    exporter = nbconvert.MarkdownExporter()
    text, resources = exporter.from_filename(str(notebook), {"output_files_dir": folder})
    parent = notebook.parent.relative_to(docs).as_posix()
    yield f"{parent}/{notebook.stem}.md", text
    for name, content in resources["outputs"].items():
        yield f"{parent}/{name}", content
