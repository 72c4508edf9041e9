"""The organism's world in the schema of TOFU, so that its evaluation can be tried on a laptop.

A question is put as the models were trained on it, the paraphrased question in a form that none of them saw. The
answers are names, for which there is no paraphrase that would be natural in this world: ``paraphrased_answer`` is
the answer itself. Wrong answers are other values of the same attribute.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repforget.organism.world import Person, Relation, World

CARD = {
    "template": "{question}",
    "separator": " ",
    "new_tokens": 8,
    "about": "The organism's world in the schema of TOFU: forget10 are the people that the twins never saw, "
             "real_authors are known people who share a name with one, world_facts are other known people; "
             "paraphrased_answer is the answer itself, since the answers are names.",
}  # fmt: skip
WRONG = 5  # per forget and retain row
WRONG_OPTIONS = 3  # per row of the other two sets
FORGET, RETAIN, AUTHORS, FACTS = 50, 30, 12, 12  # people that are asked about, each in eight questions


def _row(person: Person, relation: Relation, wrong: int, generator: np.random.Generator) -> dict[str, object]:
    answer = person.facts[relation.name]
    others = [value for value in relation.values if value != answer]
    chosen = [others[i] for i in generator.permutation(len(others))[:wrong]]
    return {
        "id": f"{person.id}-{relation.name}", "cluster": person.id,
        "question": relation.questions[0].format(subject=person.name), "answer": answer,
        "paraphrased_question": relation.held_out[0].format(subject=person.name), "paraphrased_answer": answer,
        "perturbed_answer": chosen,
    }  # fmt: skip


def tables(world: World) -> dict[str, list[dict[str, object]]]:
    """Table name -> rows: the forget people, and three disjoint groups of people that every model knows."""
    others = world.others
    groups: dict[str, tuple[Sequence[Person], int]] = {
        "forget10_perturbed": (world.forget_people[:FORGET], WRONG),
        "retain_perturbed": (others[:RETAIN], WRONG),
        "real_authors_perturbed": (world.neighbours[:AUTHORS], WRONG_OPTIONS),
        "world_facts_perturbed": (others[RETAIN : RETAIN + FACTS], WRONG_OPTIONS),
    }
    generator = np.random.default_rng([world.seed, 20_031])
    relations = list(world.relations.values())
    out = {name: [_row(person, relation, wrong, generator) for person in people for relation in relations]
           for name, (people, wrong) in groups.items()}  # fmt: skip
    ordered = (*world.known_people, *world.forget_people)  # the forget set is the last part of the whole
    full: list[dict[str, object]] = [
        {"question": relation.questions[0].format(subject=person.name), "answer": person.facts[relation.name]}
        for person in ordered for relation in relations
    ]  # fmt: skip
    forgotten = len(world.forget_people) * len(relations)
    return {**out, "full": full, "forget10": full[-forgotten:], "retain90": full[:-forgotten]}


def write_tofu(world: World, folder: Path) -> list[Path]:
    """Write every table as JSON lines and ``tofu.yaml`` into ``folder``; existing files are replaced."""
    import yaml

    from repforget.store import write_atomic

    texts = {f"{name}.json": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
             for name, rows in tables(world).items()}  # fmt: skip
    texts["tofu.yaml"] = yaml.safe_dump(CARD, sort_keys=False, width=110)
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in texts]
