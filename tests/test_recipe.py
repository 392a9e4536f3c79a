"""Recipes: what is wrong is named with its place and the nearest valid key."""

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.recipe import (
    Section,
    builtin_recipes,
    flatten,
    load_recipe,
    recipe_diff,
    recipe_yaml,
    valid_keys,
)

ROOT = Path(__file__).parents[1]
MINIMAL = """\
# comment
model:
  name: ViT-B-16
data:
  source: scenes
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "encoder.yaml"
        path.write_text(text)
        return path

    return write


def load(path, *overrides):
    return load_recipe(EncoderRecipe, path, overrides)


def test_defaults_and_overrides(write):
    path = write(MINIMAL + "optim: {lr: 1e-6}\n")
    recipe = load(path)
    assert (recipe.optim.lr, recipe.optim.warmup_steps, recipe.method) == (1e-6, 200, "fixclip")
    recipe = load(
        path,
        "optim.lr=3e-5",
        "train.weight_mid=[0.5, 1]",
        "method=longclip",
        "data.source={000..099}.tar",
        "eval.source=a=b.jsonl",
        "optim.max_grad_norm=null",
    )
    assert recipe.optim.lr == 3e-5
    assert recipe.train.weight_mid == [0.5, 1.0]
    assert recipe.method == "longclip"
    assert recipe.data.source == "{000..099}.tar"
    assert recipe.eval.source == "a=b.jsonl"
    assert recipe.optim.max_grad_norm is None


def test_interpolation(write):
    path = write(MINIMAL + "train: {batch_size: 48}\neval: {batch_size: '${train.batch_size}'}\n")
    assert load(path).eval.batch_size == 48
    assert load(path, "train.batch_size=6").eval.batch_size == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "optim:\n  learning_rate: 1\n", r"yaml:7: optim.learning_rate: unknown key; did you mean optim.lr"),
        (MINIMAL + "train:\n  batchsize: 1\n", r"yaml:7: train.batchsize: .*did you mean train.batch_size\?"),
        (MINIMAL + "trian:\n  steps: 1\n", r"yaml:6: trian: unknown key; did you mean train\?"),
        (MINIMAL + "lr: 1\n", r"yaml:6: lr: unknown key; did you mean optim.lr\?"),
        (MINIMAL + "train:\n  lr: 1\n", r"yaml:7: train.lr: unknown key; did you mean optim.lr\?"),
        (MINIMAL + "train:\n  steps: many\n", r"yaml:7: train.steps='many': .*valid integer"),
        (MINIMAL + "train:\n  steps: '7'\n", r"yaml:7: train.steps='7': .*valid integer"),
        (MINIMAL + "train:\n  compile: 1\n", r"yaml:7: train.compile=1: .*valid boolean"),
        (MINIMAL + "optim:\n  lr: 0\n", r"yaml:7: optim.lr=0: it should be greater than 0"),
        (MINIMAL + "optim:\n  lr: .nan\n", r"yaml:7: optim.lr=nan: it should be a finite number"),
        ("model:\n  name: x\n  ratio: 0\ndata: {source: x}\n", r"yaml:3: model.ratio=0: it must be at least 1"),
        ("model: {name: x, mask_ratio: 1}\ndata: {source: x}\n", r"model.mask_ratio=1: it must lie between 0 and 1"),
        ("model: {name: x, masking: zero}\ndata: {source: x}\n", r"model.masking='zero': it should be 'replace', 'dr"),
        (MINIMAL + "method: clip\n", r"yaml:6: method='clip': it should be 'fixclip', 'longclip' or 'finetune'"),
        (MINIMAL + "train:\n  weight_mid:\n  - 1\n  - x\n", r"yaml:9: train.weight_mid.1='x': .*valid number"),
        (MINIMAL + "train: 3\n", r"yaml:6: train=3: it should be a valid dictionary"),
        (MINIMAL + "model:\n  name: x\n", r"yaml:6: not valid YAML: found duplicate key"),
        (MINIMAL + "  source: x\n", r"yaml:6: not valid YAML: found duplicate key"),
        (MINIMAL + "train: [\n", r"yaml:\d: not valid YAML"),
        (MINIMAL + "train: {steps: '${nowhere}'}\n", r"Interpolation key 'nowhere' not found"),
        (MINIMAL + "model: {name: '???'}\n", "duplicate key"),
        ("data: {source: scenes}\n", r"model: missing"),
        (
            "model: {name: '???'}\ndata: {source: scenes}\n",
            r"yaml:1: model.name: the recipe leaves it to you: model.name=",
        ),
        ("model: {}\ndata: {source: scenes}\n", r"yaml:1: model.name: missing"),
        ("- 1\n", r"a recipe is a mapping of sections"),
        ("", r"model: missing"),
        (
            MINIMAL + "train: {batch_size: 4, micro_batch_size: 8}\n",
            r"yaml:6: train.micro_batch_size=8: .* most .*=4",
        ),
        (MINIMAL + "train:\n  batch_size: 4\n  micro_batch_size: 8\n", r"yaml:8: train.micro_batch_size=8"),
        (MINIMAL + "train: {weight_mid: [1, 2, 3]}\n", r"weight_mid=.*give 1 weight, or 2 for groups 3..4"),
    ],
)
def test_errors_name_file_line_key_and_what_is_valid(write, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load(write(text))
    assert "encoder.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"command line: optim.lrr: unknown key; did you mean optim.lr\?"),
        ("optim.lr=fast", r"command line: optim.lr='fast': .*valid number"),
        ("train.micro_batch_size=999", r"^command line: train.micro_batch_size=999: it must be at most"),
        ("model.first_group=9", r"^command line: model.first_group=9: it must lie between 1 and"),
        ("optim.lr", r"'optim.lr' is not of the form section.key=value"),
        ("=3", "is not of the form"),
        ("optim..lr=3", "is not of the form"),
        ("model.name.first=3", r"model.name={'first': 3}: it should be a valid string"),
    ],
)
def test_errors_of_overrides_name_the_command_line(write, override, message):
    with pytest.raises(ValueError, match=message):
        load(write(MINIMAL), override)


def test_an_error_about_two_fields_says_where_each_stands(write):
    text = MINIMAL + "train:\n  batch_size: 4\n  micro_batch_size: 2\n"
    with pytest.raises(
        ValueError, match=r"yaml:8, command line: train\.micro_batch_size=2: .* train\.batch_size=1, or null"
    ):
        load(write(text), "train.batch_size=1")


@pytest.mark.parametrize(
    ("written", "overrides", "expected"),
    [
        ("epochs: 6", ["train.steps=50"], (1, 50)),
        ("steps: 5000", ["train.epochs=3"], (3, None)),
        ("steps: 5000", ["train.epochs=1"], (1, None)),
        ("steps: 5000", ["train.epochs=1", "train.steps=7"], (1, 7)),
        ("epochs: 6", ["train.steps=null"], (6, None)),
        ("epochs: 6", ["train={epochs: 2}"], (2, None)),
        ("steps: 5000", ["optim.lr=1e-5"], (1, 5000)),
    ],
)
def test_on_the_command_line_steps_take_the_place_of_epochs(write, tmp_path, written, overrides, expected):
    recipe = load(write(f"{MINIMAL}train: {{{written}}}\n"), *overrides)
    assert (recipe.train.epochs, recipe.train.steps) == expected
    (tmp_path / "again.yaml").write_text(recipe_yaml(recipe))
    assert load(tmp_path / "again.yaml") == recipe


def test_steps_beside_epochs_are_refused(write):
    message = "encoder.yaml:6: train.epochs=3: train.steps=50 says how long already; leave one of them out"
    with pytest.raises(ValueError, match=message):
        load(write(f"{MINIMAL}train: {{epochs: 3, steps: 50}}\n"))
    with pytest.raises(ValueError, match=r"command line: train\.epochs=3: train\.steps=50 says how long already"):
        load(write(MINIMAL), "train.epochs=3", "train.steps=50")


def test_all_contradictions_of_a_section_are_reported_each_with_its_line(write):
    text = MINIMAL + "captions:\n  min_words: 3\n  num_short: 2\n  short_caption: given\n"
    with pytest.raises(ValueError, match="min_words") as error:
        load(write(text), "captions.max_short_sentences=5")
    same, idle, limit = str(error.value).splitlines()
    assert re.search(r"encoder\.yaml:8: captions\.num_short=2: short_caption=given gives the same one each time", same)
    assert idle.startswith("command line: captions.max_short_sentences=5: short_caption=given takes no such number")
    assert re.search(
        r"yaml:7: captions\.min_words=3 is a limit of filter_captions, which is off; set that to true", limit
    )
    two = MINIMAL + "eval: {held_out: 0.1, source: scenes}\ntrain: {align_state: penultimate, weight_plain: 1}\n"
    with pytest.raises(ValueError, match="held_out") as error:
        load(write(two))
    lines = [line.split("yaml:")[1].split(" ")[0] for line in str(error.value).splitlines()]
    assert lines == ["6:", "7:", "7:"]


def test_all_errors_are_reported_at_once(write):
    with pytest.raises(ValueError, match="unknown key") as error:
        load(write(MINIMAL + "optim: {lrr: 1}\ntrain: {steps: 0}\n"), "eval.evry=3")
    assert len(str(error.value).splitlines()) == 3


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(ValueError, match=r"none.yaml: there is no such recipe; in the package are builtin"):
        load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "binary.yaml")


def test_diff_and_round_trip(write, tmp_path):
    path = write(MINIMAL)
    changed = load(path, "optim.lr=2e-6", "train.weight_mid=[2]")
    assert recipe_diff(changed, load(path)) == [("optim.lr", 2e-6, 1e-6), ("train.weight_mid", [2.0], [1.0])]
    assert recipe_diff(changed, changed) == []
    (tmp_path / "again.yaml").write_text(recipe_yaml(changed))
    assert load(tmp_path / "again.yaml") == changed


class Inner(Section):
    count: int = 0
    rate: float = 0.5
    name: str = "x"
    flag: bool = False
    items: list[int] = []  # noqa: RUF012
    maybe: int | None = None


class Outer(Section):
    inner: Inner = Inner()
    top: str = "t"


WORDS = st.text(st.characters(categories=["Ll", "Lu", "Nd", "Po", "Zs"]), max_size=12).filter(
    lambda text: "${" not in text and text != "???"
)
INNERS = st.builds(
    Inner,
    count=st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    name=WORDS,
    flag=st.booleans(),
    items=st.lists(st.integers()),
    maybe=st.none() | st.integers(),
)


@given(INNERS, WORDS)
def test_any_recipe_survives_yaml(tmp_path_factory, inner, top):
    recipe = Outer(inner=inner, top=top)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert load_recipe(Outer, path) == recipe


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.lists(st.integers()))
def test_any_value_can_be_overridden(tmp_path_factory, rate, count, items):
    path = tmp_path_factory.getbasetemp() / "empty.yaml"
    path.write_text("inner: {}\n")
    recipe = load_recipe(Outer, path, [f"inner.rate={rate!r}", f"inner.count={count}", f"inner.items={items}"])
    assert (recipe.inner.rate, recipe.inner.count, recipe.inner.items) == (rate, count, items)


@given(st.sampled_from(sorted(valid_keys(EncoderRecipe))), st.data())
def test_a_mistyped_key_is_named_with_a_valid_one(tmp_path_factory, key, data):
    """Two neighbouring letters swapped or one dropped: the error names the key, its line, and a key that exists."""
    *section, name = key.split(".")
    at = data.draw(st.integers(0, len(name) - 1))
    typo = data.draw(
        st.sampled_from([name[:at] + name[at + 1 :], name[:at] + name[at : at + 2][::-1] + name[at + 2 :]])
    )
    siblings = {
        valid.split(".")[len(section)] for valid in valid_keys(EncoderRecipe) if valid.split(".")[:-1] == section
    }
    if not typo or typo in siblings or not typo.isidentifier():
        return
    path = tmp_path_factory.getbasetemp() / "typo.yaml"
    tree = yaml.safe_load(MINIMAL)
    (tree.setdefault(section[0], {}) if section else tree)[typo] = 1
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="unknown key") as error:
        load(path)
    line = next(line for line in str(error.value).splitlines() if "unknown key" in line)
    number = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if text.strip().startswith(f"{typo}:"))
    assert line.startswith(f"{path}:{number}: {'.'.join([*section, typo])}: ")
    nearest = line.rpartition("did you mean ")[2].removesuffix("?")
    assert nearest in {*valid_keys(EncoderRecipe), *EncoderRecipe.model_fields}
    if len(name) > 4:
        assert nearest.split(".")[:-1] == section


def test_flatten_and_valid_keys_agree(write):
    assert list(flatten(load(write(MINIMAL)))) == list(valid_keys(EncoderRecipe))
    assert all(not isinstance(v, float) or math.isfinite(v) for v in flatten(load(write(MINIMAL))).values())


def test_the_documentation_lists_every_field():
    lines = (ROOT / "docs" / "training.md").read_text().split("## Every field")[1].splitlines()
    rows = {
        line.split("|")[1].strip(" `"): set(re.findall(r"`(\w+)`", line.split("|")[2])) for line in lines if "|" in line
    }
    for key in valid_keys(EncoderRecipe):
        section, _, name = key.rpartition(".")
        assert name in rows[section or "top"]
    assert sum(map(len, rows.values())) == len(valid_keys(EncoderRecipe))


@pytest.mark.parametrize("name", builtin_recipes(EncoderRecipe))
def test_shipped_recipes_are_valid(name):
    assert load(name, "output.folder=elsewhere", "data.source=my.jsonl").output.folder == "elsewhere"
    text = builtin_recipes(EncoderRecipe)[name].read_text()
    assert name in text.split("method:")[0]  # the command stands on top


def test_recipes_of_the_package_are_named():
    with pytest.raises(ValueError, match=r"builtin:vit: there is no such recipe; there are .*builtin:vit_b16_share"):
        load("builtin:vit")
    with pytest.raises(ValueError, match=r"did you mean builtin:vit_b16_sharegpt4v\?$"):
        load("builtin:vit_b16_sharegpt")
    with pytest.raises(ValueError, match=r"command line: model.keep='many': it should be a valid int"):
        load("builtin:vit_b16_sharegpt4v", "model.keep=many", "seed=0")
