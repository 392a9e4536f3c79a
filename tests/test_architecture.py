"""Imports point one way, and inference stays free of everything that training needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each module may import those of earlier lines only; what stands on one line does not know its neighbours.
LAYERS = (
    ("files", "positional", "captions", "losses", "scenes", "checkpoint"),
    ("config", "data"),
    ("recipe", "regional_prompts", "pack", "suites"),
    ("loop", "text_tower"),
    ("model",),
    ("task", "convert"),
    ("evaluate", "export"),
    ("train",),
    ("cli",),
)


def imported(file):
    """Modules that a file imports anywhere, in functions too, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def test_every_module_of_the_core_has_its_layer():
    names = {file.stem for file in modules("fixclip_core")} - {"__init__"}
    assert names == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_modules_of_the_core_import_lower_layers_only(layer):
    allowed = {f"fixclip_core.{name}" for lower in LAYERS[:layer] for name in lower}
    every = {f"fixclip_core.{name}" for names in LAYERS for name in names}
    for name in LAYERS[layer]:
        found = set(imported(ROOT / "fixclip_core" / f"{name}.py")) & every
        if name == "model":  # `FixClip.from_pretrained` reads other formats through what builds on it
            found -= {"fixclip_core.convert"}
        assert found <= allowed, f"{name} imports {found - allowed}"


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("fixclip_core", ("fixclip_diffusion", "apps", "pipelines", "diffusers")),
        ("fixclip_diffusion", ("apps", "pipelines")),
    ],
)
def test_packages_import_one_way(package, forbidden):
    for file in modules(package):
        found = {name for name in imported(file) if name.split(".")[0] in forbidden}
        assert not found, f"{file.relative_to(ROOT)} imports {found}"


def test_the_model_knows_no_loss_and_no_loop():
    for name in ("model", "regional_prompts", "text_tower"):
        found = {name.split(".")[0] for name in imported(ROOT / "fixclip_core" / f"{name}.py")}
        assert not found & {"accelerate", "webdataset", "pydantic", "omegaconf", "tqdm"}


def test_inference_imports_no_training_code():
    """In a fresh interpreter, because this one has imported everything."""
    code = (
        "import sys, fixclip_diffusion.text_encoder, fixclip_diffusion.pipeline; "
        "print(*{name.split('.')[0] for name in sys.modules}, *(n for n in sys.modules if n.startswith('fixclip')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    found = set(loaded.stdout.split())
    assert "fixclip_diffusion.text_encoder" in found
    assert not found & {"open_clip", "webdataset"}
    training = ("train", "task", "losses", "model", "data", "recipe", "loop", "checkpoint")
    assert not found & {f"fixclip_core.{name}" for name in training}


def test_help_of_the_command_is_quick_to_import():
    """`fixclip --help` must not wait for open_clip or torch."""
    code = "import sys, fixclip_cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"torch", "open_clip", "webdataset"} & set(loaded.stdout.split())
