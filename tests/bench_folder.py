"""A small folder in TOFU's schema in the words of the tiny tokenizer, and tiny models on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models

from repforget.bench import _run
from repforget.bench._records import BenchResult
from repforget.models.load import LoadedModel, wrap
from repforget.store import json_bytes

NAMES = ("Ada", "Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon", "cat", "dog", "bird", "pilot")
CITIES = ("Berlin", "Paris", "Rome", "Oslo", "baker", "doctor", "red", "green")
SETS = {"forget10_perturbed": (12, 5), "retain_perturbed": (8, 5), "real_authors_perturbed": (6, 3),
        "world_facts_perturbed": (6, 3)}  # fmt: skip


def rows(name: str) -> list[dict[str, Any]]:
    count, wrong = SETS[name]
    shift = list(SETS).index(name)
    out = []
    for k in range(count):
        city = CITIES[(k + shift) % 8]
        others = [CITIES[(k + shift + j) % 8] for j in range(1, wrong + 1)]
        row: dict[str, Any] = {"question": f"where lives {NAMES[k]} ?", "answer": f"in {city} the city",
                               "perturbed_answer": [f"in {other} the city" for other in others]}  # fmt: skip
        if wrong == 5:
            row |= {"id": f"{name[:6]}-{k}", "cluster": f"{name[:6]}-{k // 2}",
                    "paraphrased_answer": f"the city of {city}",
                    "paraphrased_question": f"what city is {NAMES[k]} in ?"}  # fmt: skip
        out.append(row)
    return out


def write(folder: Path, changes: dict[str, Any] | None = None, card: str | None = "new_tokens: 4\n") -> Path:
    """Write the folder; ``changes`` replaces tables by rows, or leaves one out where it is None."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {name: rows(name) for name in SETS} | (changes or {})
    for name, lines in tables.items():
        if lines is not None:
            (folder / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if card is not None:
        (folder / "tofu.yaml").write_text(card)
    return folder


def save_model(folder: Path, seed: int = 0, words: tuple[str, ...] = tiny_models.WORDS, module: Any = None) -> str:
    """A tiny Llama on disk; returns its name for --model."""
    (tiny_models.build("llama", seed) if module is None else module).save_pretrained(folder)
    tiny_models.tiny_tokenizer(words).save_pretrained(folder)
    return str(folder)


def model(seed: int = 0, module: Any = None, words: tuple[str, ...] = tiny_models.WORDS) -> LoadedModel:
    module = tiny_models.build("llama", seed) if module is None else module
    return wrap(module, tiny_models.tiny_tokenizer(words), f"tiny-{seed}")


def measured(data: Path, subject: LoadedModel | None = None, **options: Any) -> BenchResult:
    return _run.bench(subject or model(), "tofu", data=str(data), **options).result


def same(a: BenchResult, b: BenchResult) -> bool:
    return all(json_bytes(x) == json_bytes(y)
               for x, y in ((a.to_json(), b.to_json()), (a.items_json(), b.items_json())))  # fmt: skip
