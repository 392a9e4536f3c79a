"""Small folders in the layouts of published benchmarks, with prompts and questions of our own."""

import csv
import json
from pathlib import Path
from typing import Any

LONG = (
    "A cook in a white hat stands in a bright kitchen. Beside the cook there is a wooden table. On the table lies a "
    "red lobster next to three lemons."
)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


DPG_ROWS = [  # id, proposition, dependency, tuple, question
    ("kitchen", 1, "0", "entity - whole (cook)", "Is there a cook?"),
    ("kitchen", 2, "1", "attribute - color (hat, white)", "Does the cook wear a white hat?"),
    ("kitchen", 3, "0", "entity - whole (lobster)", "Is there a lobster?"),
    ("harbour", 1, "0", "entity - whole (boat)", "Is there a boat?"),
    ("harbour", 2, "1", "attribute - color (boat, blue)", "Is the boat blue?"),
    ("harbour", 3, "1, 2", "relation - spatial (boat, pier)", "Is the blue boat at the pier?"),
]
TEXTS = {"kitchen": LONG, "harbour": "A blue boat lies at the pier."}


def dpg(folder: Path) -> Path:
    """Two prompts of three propositions each."""
    (folder / "prompts").mkdir(parents=True)
    for name, text in TEXTS.items():
        (folder / "prompts" / f"{name}.txt").write_text(text)
    names = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "tuple", "question_natural_language"])
        for item, number, parents, what, question in DPG_ROWS:
            writer.writerow([item, TEXTS[item], "", number, parents, "entity", "whole", what, question])
    return folder


def tiif(folder: Path) -> Path:
    """Two dimensions, one prompt in each, with twins."""
    for kind, short, questions, answers in (
        ("color", "A red lobster.", ["Is there a lobster?  ", "Is it red?"], ["yes", "yes"]),
        ("negation", "A table without lemons.", ["Is there a table?", "Are there lemons?"], ["yes", "no"]),
    ):
        row = {"type": kind, "short_description": short, "long_description": LONG}
        lines(folder / "testmini_prompts" / f"{kind}_prompts.jsonl", [row])
        asked = {"type": kind, "yn_question_list": questions, "yn_answer_list": answers}
        lines(folder / "testmini_eval_prompts" / f"{kind}_eval_prompts.jsonl", [asked])
    return folder


def longbench(folder: Path) -> Path:
    label = {"Object": "A cook, a table and a lobster.", "Color and Tone": "White hat, red lobster."}
    lines(folder / "instruction.jsonl", [{"instruction": LONG, "label": [label]} for _ in range(2)])
    return folder


def lgbench(folder: Path) -> Path:
    goals = [{"type": "object", "description": "a cook"}, {"type": "attribute", "description": "the hat is white"}]
    row = {"id": 7, "category": "food", "subcategory": "kitchen", "prompt": LONG, "goals": goals}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t2i_1000.json").write_text(json.dumps([row]))
    return folder


def geneval2(folder: Path) -> Path:
    row = {
        "prompt": "three red lobsters",
        "atom_count": 3,
        "vqa_list": [["How many lobsters are in the image?", "three"], ["Are the lobsters red?", "Yes"]],
        "skills": ["count", "attribute"],
    }
    lines(folder / "geneval2_data.jsonl", [row, {**row, "prompt": "a red lobster", "atom_count": 2}])
    return folder


MAKERS = {"dpg": dpg, "tiif": tiif, "longbench": longbench, "lgbench": lgbench, "geneval2": geneval2}
