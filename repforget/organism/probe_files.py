"""The two knowledge probes of the organism, written from the world they ask about.

``bios-people`` forgets 64 people and keeps everyone else; ``bios-attribute`` forgets one relation of
everybody and keeps the other seven.  An editor sees trained statements; the judge asks question forms that
no model was ever trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repforget.organism.world import Person, World, general_sentences

GENERAL_COUNT = 480
GENERAL_OFFSET = 1_000_003  # another stream than the training sentences
FORGOTTEN_RELATION = "birthplace"
NEAREST_RELATION = "residence"  # shares its values, the towns, with the forgotten one


@dataclass(frozen=True)
class ProbeFiles:
    """The content of one probe folder: ``probe.yaml`` as data, and the lines of each JSONL file."""

    settings: dict[str, Any]
    sets: dict[str, list[dict[str, str]]]


def _items(people: Iterable[Person], relations: Sequence[str]) -> list[dict[str, str]]:
    return [
        {
            "id": f"{person.id}-{relation}",
            "cluster": person.id,
            "subject": person.name,
            "relation": relation,
            "answer": person.facts[relation],
        }
        for person in people
        for relation in relations
    ]


def general_texts(world: World, trained: Iterable[str]) -> list[dict[str, str]]:
    """Return everyday sentences of the training grammar that are not among the ``trained`` ones."""
    seen = set(trained)
    drawn = dict.fromkeys(general_sentences(world.seed + GENERAL_OFFSET, 4 * GENERAL_COUNT))
    return [{"text": s} for s in drawn if s not in seen][:GENERAL_COUNT]


def _settings(world: World, name: str, about: str, sets: Iterable[str]) -> dict[str, Any]:
    return {
        "name": name,
        "about": about,
        "separator": " ",
        "sets": {key: f"{key}.jsonl" for key in sets},
        "templates": {
            relation.name: {"statements": list(relation.statements), "questions": list(relation.held_out)}
            for relation in world.relations.values()
        },
    }


def people_probe(world: World, trained_general: Iterable[str]) -> ProbeFiles:
    """Forget the forget people; half of those who share a name with one are neighbours, the rest retain."""
    every = tuple(world.relations)
    sets = {
        "forget": _items(world.forget_people, every),
        "retain": _items(world.others, every),
        "neighbours": _items(world.neighbours, every),
        "general": general_texts(world, trained_general),
    }
    about = (
        f"Everything about {len(world.forget_people)} of {len(world.people)} people; "
        "neighbours share a first or last name with one of them."
    )
    return ProbeFiles(_settings(world, "bios-people", about, sets), sets)


def attribute_probe(world: World, trained_general: Iterable[str]) -> ProbeFiles:
    """Forget one relation of everybody; neighbours ask the relation with the same values, retain the rest."""
    others = [r for r in world.relations if r not in (FORGOTTEN_RELATION, NEAREST_RELATION)]
    sets = {
        "forget": _items(world.people, [FORGOTTEN_RELATION]),
        "retain": _items(world.people[::3], others),
        "neighbours": _items(world.people[1::2], [NEAREST_RELATION]),
        "general": general_texts(world, trained_general),
    }
    about = (
        f"The {FORGOTTEN_RELATION} of all {len(world.people)} people; "
        f"neighbours ask their {NEAREST_RELATION}, which has the same towns as answers."
    )
    return ProbeFiles(_settings(world, "bios-attribute", about, sets), sets)


def render(probe: ProbeFiles) -> dict[str, str]:
    """Return file name -> text of a probe folder."""
    import yaml

    files = {"probe.yaml": yaml.safe_dump(probe.settings, sort_keys=False, width=110, allow_unicode=True)}
    for name, lines in probe.sets.items():
        files[f"{name}.jsonl"] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return files


def write_probes(world: World, folder: Path, trained_general: Iterable[str]) -> list[Path]:
    """Write both probe folders below ``folder`` and return them; existing files are replaced."""
    trained = list(trained_general)
    made = []
    for probe in (people_probe(world, trained), attribute_probe(world, trained)):
        target = folder / str(probe.settings["name"])
        target.mkdir(parents=True, exist_ok=True)
        for name, text in render(probe).items():
            (target / name).write_text(text, encoding="utf-8")
        made.append(target)
    return made
