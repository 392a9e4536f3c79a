"""Recipes: YAML files that validate strictly, with a command-line override of every field.

The loader takes any pydantic model; the sections at the end are those that every training shares. A recipe's name is
its file, or `builtin:NAME` for recipes/NAME.yaml beside the module of its schema.
"""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fixclip_core.check import one_line
from fixclip_core.device import AnyPrecision
from fixclip_core.section import Section

RecipeT = TypeVar("RecipeT", bound=BaseModel)
Location = tuple[str | int, ...]
BUILTIN = "builtin:"
COMMAND_LINE = "command line"  # where a value comes from, as errors name it; else FILE:LINE
KEYS = re.compile(r"\b[a-z]\w*(?:\.[a-z]\w*)+")  # dotted ones in an error's message, `train.steps`


class RecipeError(ValueError):
    """A recipe with one or several problems.

    Args:
        problems: one line each.
    """

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# -- the loader: any pydantic model -------------------------------------------------------------------------


def load_recipe(
    schema: type[RecipeT],
    path: str | Path,
    overrides: Sequence[str] = (),
    blanks: Mapping[str, Any] | None = None,
) -> RecipeT:
    """Read a YAML recipe, apply `section.key=value` overrides and validate the result.

    Args:
        schema: the pydantic model that says what is valid; derive its parts from `Section`.
        path: the YAML file, or `builtin:NAME`; OmegaConf interpolations such as `${train.batch_size}` are resolved.
        overrides: e.g. `["optim.lr=1e-5", "data.train=my.jsonl"]`; a value is read as YAML, and taken
            literally where it is none, so brace patterns need no quotes.
        blanks: {key: value} for keys that the recipe leaves to whoever uses it (`???`) and that `overrides` leave out.

    Raises:
        ValueError: the file cannot be read or is no YAML mapping.
        RecipeError: keys or values are wrong. Every wrong one is named in one line each: file and line, key, value,
            and what is valid.
    """
    name, path = str(path), find_recipe(schema, path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = OmegaConf.create(text)
    except FileNotFoundError:
        there = ", ".join(builtin_recipes(schema))
        raise ValueError(f"{name}: there is no such recipe; in the package are {there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: the recipe cannot be read: {one_line(error)}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{name}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{name}: not a valid recipe: {error}") from None
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{name}:1: a recipe is a mapping of sections, e.g. `model:` and `train:`")
    for override in overrides:
        _apply_override(tree, override)
    _leave_out_alternatives(schema, tree, [override.partition("=")[0] for override in overrides])
    sources = _sources(name, text, overrides)
    for key, value in (blanks or {}).items():
        if key in OmegaConf.missing_keys(tree):
            OmegaConf.update(tree, key, value)
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        reason = str(error).splitlines()[0]
        raise ValueError(f"{sources.get(_location(key), name)}: {key}: {reason}") from None
    left = [_location(key) for key in sorted(OmegaConf.missing_keys(tree))]
    found: list[str] = []
    try:
        recipe = schema.model_validate(values)
    except ValidationError as error:
        found += [
            _explain(schema, details, sources, name)
            for details in error.errors()
            if not any(location[: len(details["loc"])] == details["loc"] for location in left)
        ]
    for location in left:
        key = ".".join(location)
        found.append(f"{sources.get(location, name)}: {key}: the recipe leaves it to you: {key}=...")
    if found:
        raise RecipeError("\n".join(found).splitlines())
    return recipe


@contextmanager
def naming_places(recipe: BaseModel, path: str | Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Errors of the block that name a key of a recipe, or a string that it sets, say where: `my.yaml:7: data.stop=...`.

    Args:
        recipe: what `load_recipe` has read.
        path, overrides: what it was read from.
    """
    try:
        yield
    except ValueError as error:
        message, text = str(error), find_recipe(type(recipe), path).read_text(encoding="utf-8")
        sources = _sources(str(path), text, overrides)
        given = [
            key for key, value in flatten(recipe).items() if _location(key) in sources and _speaks_of(message, value)
        ]
        if places := _places_of(message, sources):
            error.args = (f"{places}: {message}",)
        elif given:
            error.args = (f"{sources[_location(given[0])]}: {given[0]}: {message}",)
        raise


def _speaks_of(message: str, value: Any) -> bool:
    """Whether a message begins with a string, a file's name above all, or quotes it."""
    return isinstance(value, str) and bool(value) and (message.startswith(f"{value}:") or repr(value) in message)


def sections_of(schema: type[BaseModel], name: str | Path) -> set[str]:
    """The top-level keys of a recipe, whatever else is wrong with it; none of one that cannot be read."""
    try:
        found = yaml.safe_load(find_recipe(schema, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return {str(key) for key in found} if isinstance(found, dict) else set()


def find_recipe(schema: type[BaseModel], name: str | Path) -> Path:
    """The file of a recipe's name.

    Raises:
        ValueError: there is no built-in recipe of this name.
    """
    if not str(name).startswith(BUILTIN):
        return Path(name)
    found = builtin_recipes(schema)
    if str(name) not in found:
        close = difflib.get_close_matches(str(name), found, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name}: there is no such recipe; there are {', '.join(found)}{meant}")
    return found[str(name)]


def builtin_recipes(schema: type[BaseModel]) -> dict[str, Path]:
    """The recipes of the package for this schema: {`builtin:NAME`: file}."""
    folder = Path(inspect.getfile(schema)).parent / "recipes"
    return {BUILTIN + path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _location(key: str) -> tuple[str, ...]:
    return tuple(key.split("."))


def _apply_override(tree: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    location = _location(key)
    if not equals or not all(location):
        raise ValueError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        value = text
    try:
        OmegaConf.update(tree, key, value, merge=False, force_add=True)
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{COMMAND_LINE}: {override!r} cannot be applied: {error}") from None


def _leave_out_alternatives(schema: type[BaseModel], tree: Any, overridden: Sequence[str]) -> None:
    """Of two fields that stand for each other, one on the command line takes the place of the other in the file.

    So `train.epochs=3` acts on a recipe that says `steps: 5000`, see `Section.alternatives`.
    """
    sections = {name: _section_of(field) for name, field in schema.model_fields.items()}
    for key in overridden:
        section, _, name = key.partition(".")
        owner: Any = sections.get(section)
        other = getattr(owner, "alternatives", {}).get(name)
        given = other is not None and OmegaConf.select(tree, key) is not None
        if given and f"{section}.{other}" not in overridden:
            OmegaConf.update(tree, f"{section}.{other}", owner.model_fields[other].default)


def _sources(name: str, text: str, overrides: Sequence[str]) -> dict[Location, str]:
    """Where a recipe's keys are set: `FILE:LINE`, or on the command line."""
    lines = {location: f"{name}:{line}" for location, line in _key_lines(yaml.compose(text))}
    return lines | {_location(override.partition("=")[0]): COMMAND_LINE for override in overrides}


def _places_of(message: str, sources: Mapping[Location, str]) -> str:
    """Where the first key that a message names is set, and the command line where that sets another; else ""."""
    named = [sources[found] for found in map(_location, KEYS.findall(message)) if found in sources]
    return ", ".join(named[:1] if COMMAND_LINE not in named[1:] else dict.fromkeys([named[0], COMMAND_LINE]))


def _key_lines(node: yaml.Node | None, prefix: Location = ()) -> Iterator[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            location = (*prefix, str(key.value))
            yield location, key.start_mark.line + 1
            yield from _key_lines(value, location)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, str(index)), value.start_mark.line + 1
            yield from _key_lines(value, (*prefix, str(index)))


def _explain(schema: type[BaseModel], details: ErrorDetails, sources: dict[Location, str], default_source: str) -> str:
    """One line for one of pydantic's errors, or for each contradiction in it: source, key, value and what is valid."""
    location = tuple(str(part) for part in details["loc"])
    known = [location[:end] for end in range(len(location), 0, -1) if location[:end] in sources]
    source = sources[known[0]] if known else default_source
    key = ".".join(location)
    if details["type"] == "extra_forbidden":
        return f"{source}: {key}: unknown key; did you mean {_nearest_key(schema, location)}?"
    if details["type"] == "missing":
        return f"{source}: {key}: missing; the recipe must set it"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if details["type"] == "value_error":  # of a section as a whole, whose messages name the keys
        return "\n".join(_located(line, key, sources, source) for line in message.splitlines())
    return f"{source}: {key}={details['input']!r}: {message}"


def _located(message: str, section: str, sources: Mapping[Location, str], default_source: str) -> str:
    """A section's message about its fields, which it may name without the section: `data.stop=5` or `stop=5`."""
    parent = section.rpartition(".")[0]
    for named in (message, f"{section}.{message}", f"{parent}.{message}"):
        if places := _places_of(named, sources):
            return f"{places}: {named}"
    return f"{default_source}: {section}: {message}" if section else f"{default_source}: {message}"


def _nearest_key(schema: type[BaseModel], location: Sequence[str]) -> str:
    """The valid key meant by `location`: one of its section spelt alike or so described, else of any section."""
    *section, name = location
    prefix = "".join(f"{part}." for part in section)
    keys = valid_keys(schema)
    own = {
        key[len(prefix) :].split(".")[0]: prefix + key[len(prefix) :].split(".")[0]
        for key in keys
        if key.startswith(prefix)
    }
    anywhere = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    for candidates in (own, anywhere):
        if close := difflib.get_close_matches(name, candidates, n=1):
            return candidates[close[0]]
        if described := [key for key in candidates.values() if name.replace("_", " ") in keys.get(key, "")]:
            return described[0]
    return max(anywhere.values(), key=lambda key: difflib.SequenceMatcher(None, name, key).ratio())


def valid_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every dotted key that a recipe of this schema may set, e.g. `optim.lr`, with its description."""
    keys = {}
    for name, field in schema.model_fields.items():
        section = _section_of(field)
        if section is None:
            keys[prefix + name] = field.description or ""
        else:
            keys |= valid_keys(section, f"{prefix}{name}.")
    return keys


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, or may be one; None of any other field."""
    candidates = (field.annotation, *get_args(field.annotation))
    return next((t for t in candidates if isinstance(t, type) and issubclass(t, BaseModel)), None)


def flatten(recipe: BaseModel) -> dict[str, Any]:
    """A recipe as {dotted key: value}, in the order of its fields."""

    def walk(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(recipe, ""))


def recipe_diff(recipe: BaseModel, reference: BaseModel) -> list[tuple[str, Any, Any]]:
    """What differs: (dotted key, value in `recipe`, value in `reference`)."""
    mine, theirs = flatten(recipe), flatten(reference)
    return [(key, mine[key], theirs.get(key)) for key in mine if mine[key] != theirs.get(key)]


def recipe_yaml(recipe: BaseModel) -> str:
    """The recipe with every default filled in, as YAML that `load_recipe` reads back to an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


# -- sections that every training shares --------------------------------------------------------------------


class OptimSection(Section):
    """The optimiser, warm-up and decay. No weight decay on biases, norms, positions and the logit scale."""

    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: matrices, but for embeddings, move by their orthogonalised momentum, the rest by AdamW",
    )
    lr: float = Field(default=1e-6, gt=0, description="peak learning rate of the pre-trained weights")
    lr_new: float = Field(default=1e-4, gt=0, description="peak learning rate of the new parameters")
    weight_decay: float = Field(default=1e-2, ge=0, description="of matrices alone")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's")
    warmup_steps: int = Field(default=200, ge=0, description="steps in which the learning rate rises to its peak")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="of the learning rate after warm-up; cosine falls to 0 at the last step"
    )
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="clip the gradient's norm; null: never")


class RunSection(Section):
    """How long and how fast to train; the parts that do not depend on what is trained."""

    alternatives: ClassVar = {"epochs": "steps", "steps": "epochs"}

    epochs: int = Field(default=1, ge=1, description="passes over the data")
    steps: int | None = Field(default=None, ge=1, description="optimiser steps of the whole run, in place of epochs")
    batch_size: int = Field(default=256, ge=1, description="samples a step over all processes")
    precision: AnyPrecision = Field(
        default="auto",
        description="of the computation, weights are fp32; auto: bf16 where the device has instructions for it",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass: less memory, one more forward pass"
    )
    compile: bool = Field(default=False, description="torch.compile the transformer blocks")
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="average the weights; null: do not")
    max_skipped_steps: int = Field(
        default=20, ge=1, description="stop after so many steps in a row without finite gradient"
    )

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.steps is not None and self.is_changed("epochs"):
            yield f"train.epochs={self.epochs}: train.steps={self.steps} says how long already; leave one of them out"


class OutputSection(Section):
    """Where the run writes, and how often."""

    folder: str = Field(default="runs/encoder", min_length=1, description="where the run writes, and resumes from")
    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics.jsonl and the trackers")
    save_every: int = Field(default=500, ge=1, description="steps between two checkpoints")
    keep_last: int = Field(default=2, ge=1, description="checkpoints to keep")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="who else gets what metrics.jsonl gets"
    )
    project: str = Field(default="fixclip", min_length=1, description="the trackers' project name")
