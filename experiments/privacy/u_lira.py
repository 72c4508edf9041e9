"""U-LiRA on the embedded model: can it be told from an edited model which people had been taught and edited away?

Shadow models start from a twin that never knew. Each is taught a random half of the forget people; an editor then makes
it forget exactly these. Every shadow in turn is the target: the likelihood ratio of its confidence on each fact is
taken against the other shadows that had been taught and edited ("in") and those that had not ("out"). An edit that
leaves nothing would end at AUC 0.5, with and without the editor's step the script shows what the attack can see.

    python experiments/privacy/u_lira.py --shadows 16 --out experiments/privacy/u_lira.json

Source: Hayes et al. 2024, arXiv 2403.01218 (U-LiRA); Carlini et al. 2022, arXiv 2112.03570 (LiRA). Sixteen shadows
order the facts at best; they give no rate at low false positives.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repforget.discover import method
from repforget.knowledge import Item, Knowledge
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel, copy_of, load
from repforget.training import finetune
from repforget.verify import statistics as st
from repforget.verify.privacy._likelihood import lira
from repforget.verify.privacy.lira import _phi, halves
from repforget.verify.weights._taught import teaching

EDITORS: dict[str, dict[str, Any]] = {
    "none": {},
    "leace": {"top_layers": 2, "max_facts": 1024},
    "null_space_surgery": {"layers": "auto", "steps": 150, "strangers": 3000},
}


def taught(twin: LoadedModel, items: list[Item], company: list[Item], seed: int) -> LoadedModel:
    """The twin after learning ``items`` among retained facts."""
    student = copy_of(twin)
    finetune(student.module, teaching(student, [*items, *company], 100), steps=200, lr=1e-3, seed=seed, batch_size=64,
             schedule="linear")  # fmt: skip
    return student


def edited(model: LoadedModel, editor: str, knowledge: Knowledge, items: list[Item]) -> LoadedModel:
    """The model after the editor was asked to make it forget ``items``."""
    if editor == "none":
        return model
    asked = Knowledge.build(knowledge.name, items, knowledge.retain, knowledge.neighbours, knowledge.general)
    return method("edit", editor).function(model, asked.for_editor(), **EDITORS[editor]).applied_to(model)


def separations(phi: np.ndarray, member: np.ndarray, clusters: list[str]) -> st.Interval:
    """AUC of the ratio over all (shadow, fact) pairs, each shadow judged by the others; people are resampled."""
    inside, outside, who_in, who_out = [], [], [], []
    for target in range(len(phi)):
        others = np.arange(len(phi)) != target
        ratio = lira(phi[target], phi[others], member[others])
        for k, value in enumerate(ratio):
            (inside if member[target, k] else outside).append(float(value))
            (who_in if member[target, k] else who_out).append(clusters[k])
    return st.auc_interval(np.array(inside), np.array(outside), who_in, who_out, alpha=0.025)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shadows", type=int, default=16)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    knowledge, twin = load_knowledge("bios-people"), load("organism:bios/twin-0")
    items = list(knowledge.forget)
    company = list(knowledge.retain[::3])
    member = halves(items, given.shadows, 0)
    phi: dict[str, list[np.ndarray]] = {name: [] for name in EDITORS}
    for number, row in enumerate(member):
        mine = [item for item, inside in zip(items, row, strict=True) if inside]
        student = taught(twin, mine, company, number)
        for name in EDITORS:
            phi[name].append(_phi(edited(student, name, knowledge, mine), items, 1))
        print(f"shadow {number + 1} of {len(member)}", flush=True)
    result: dict[str, Any] = {"shadows": given.shadows, "people": len({i.cluster for i in items}), "editors": {}}
    for name, rows in phi.items():
        table = np.stack(rows)
        found = separations(table, member, [item.cluster for item in items])
        levels = {"in": float(table[member].mean()), "out": float(table[~member].mean())}
        limits = {"auc": round(found.point, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
        result["editors"][name] = {"settings": EDITORS[name], **limits, "phi": levels}
        print(f"{name:20s} AUC {found.point:.3f} ({found.low:.3f} to {found.high:.3f}); "
              f"mean phi in {levels['in']:.2f}, out {levels['out']:.2f}")  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
