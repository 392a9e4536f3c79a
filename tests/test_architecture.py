"""Imports point one way, and inference stays free of everything that training needs.

A room is a folder of a package, or a file directly in it. A room of a later line may import those of earlier lines and
of its own; rooms of one line do not import each other. A new room needs a place here, and nothing else does.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = ("fixclip_core", "fixclip_diffusion", "fixclip_cli", ("apps", "pipelines", "comfyui"))

ROOMS = {
    "fixclip_core": (
        ("builtin", "check", "device", "files", "section", "scenes"),
        ("data", "model"),
        ("synthesis", "weights"),
        ("evaluation",),
        ("training",),
    ),
    "fixclip_diffusion": (
        ("builtin", "conditioning", "lora", "preview", "short_weights", "siblings", "state_mask", "tiny"),
        ("adapter", "prompt_weights", "text_config", "tokenizer"),
        ("prompt_tokens", "text_encoder"),
        ("families", "fingerprint", "inversions", "token_report"),
        ("loading", "prompt_encoder", "prompt_reader"),
        ("long_prompts",),
        ("attention_maps", "pipeline", "pipeline_xl"),
        ("auto", "modular"),
        ("adapter_training",),
        ("evaluation",),
        ("demo",),
    ),
    "fixclip_cli": (
        ("app", "models", "pictures"),
        ("train", "caption", "data", "demo", "doctor", "evaluate", "evaluate_images", "generate", "weights"),
        ("main",),
        ("__main__",),
    ),
}

# What no module of a package imports, not even inside a function.
FORBIDDEN = {
    "fixclip_core": {"diffusers", "peft", "gradio", "typer"},
    "fixclip_core.model": {"accelerate", "pydantic", "omegaconf", "webdataset", "tqdm"},
    "fixclip_core.scenes": {"open_clip", "transformers"},
    "fixclip_diffusion": {"gradio", "typer"},
    "comfyui": {"diffusers", "open_clip", "webdataset"},
}

# What a process that draws never loads, directly or through others.
TRAINING_ONLY = {"open_clip", "webdataset", "ray", "omegaconf", "pydantic", "tensorboard"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> Iterator[Path]:
    for package in ("fixclip_core", "fixclip_diffusion", "fixclip_cli", "apps", "pipelines", "comfyui"):
        yield from sorted((ROOT / package).rglob("*.py"))


MODULES = {module_name(file): file for file in source_files()}


def imported(name: str) -> set[str]:
    """What a module imports anywhere, in functions too: our own modules, and the names of foreign ones."""
    file, found = MODULES[name], set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {other if other in MODULES else base for other in names}
    return found - {name}


def room(module: str) -> tuple[str, str]:
    """`fixclip_core.data.sources.folder` is in the room ("fixclip_core", "data")."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


def rank(package: str) -> int:
    return next(place for place, names in enumerate(PACKAGES) if package == names or package in names)


def places(package: str) -> dict[str, int]:
    return {name: place for place, names in enumerate(ROOMS[package]) for name in names}


def test_no_module_imports_itself_through_others():
    try:
        TopologicalSorter({name: imported(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_its_place(package):
    assert {room(name)[1] for name in MODULES if name.startswith(f"{package}.")} <= set(places(package))


@pytest.mark.parametrize("name", MODULES)
def test_higher_rooms_import_lower_ones(name):
    package, own = room(name)
    for other in imported(name) & MODULES.keys():
        other_package, other_room = room(other)
        assert rank(other_package) <= rank(package), f"{name} imports {other}"
        if package in ROOMS and other_package == package and own and other_room not in ("", own):
            assert places(package)[other_room] < places(package)[own], f"{name} imports {other}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_what_no_module_of_a_package_imports(package):
    for name in MODULES:
        if name == package or name.startswith(f"{package}."):
            found = {other.partition(".")[0] for other in imported(name)} & FORBIDDEN[package]
            assert not found, f"{name} imports {', '.join(found)}"


def loaded_by(statement: str) -> set[str]:
    """All modules that a fresh interpreter holds afterwards, because this one has imported everything."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_inference_loads_no_training_code():
    loaded = loaded_by("import fixclip_diffusion, fixclip_diffusion.attention_maps")
    assert "fixclip_diffusion.pipeline" in loaded
    assert not {name.partition(".")[0] for name in loaded} & TRAINING_ONLY
    rooms = {room(name) for name in loaded if name in MODULES}
    assert not rooms & {("fixclip_core", "training"), ("fixclip_core", "evaluation"), ("fixclip_core", "synthesis")}
    assert not rooms & {("fixclip_diffusion", "adapter_training"), ("fixclip_diffusion", "evaluation")}


def test_help_of_the_command_is_quick_to_import():
    """`fixclip --help` must not wait for torch or what needs it."""
    loaded = {name.partition(".")[0] for name in loaded_by("import fixclip_cli.main")}
    assert not loaded & (TRAINING_ONLY | {"torch", "diffusers", "transformers", "numpy"})
