"""Null-space surgery on the organism: what is forgotten, what stays, and what each part of the method is worth.

    python experiments/surgery/people.py

Shares of exact greedy answers over the whole probe; the editor sees statements of the forget people and of half the
retain people. ``one-step`` is the naive form: the values of MEMIT's normal equation towards what the layer writes for
strangers on average.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from repforget.artifact import Edit, LowRankDelta
from repforget.edit._dispatch import edit as run_editor
from repforget.edit.surgery import null_space_surgery as surgery
from repforget.knowledge_files import load_knowledge
from repforget.models.load import load
from repforget.scoring import answer_logprobs

torch.set_num_threads(1)
MODEL, KNOWLEDGE = load("organism:bios"), load_knowledge("bios-people")
DATA = KNOWLEDGE.for_editor()
SHOWN = {fact.subject for fact in DATA.retain}
SETS = {
    "forget": KNOWLEDGE.forget, "neighbours": KNOWLEDGE.neighbours,
    "others unseen": [item for item in KNOWLEDGE.retain if item.subject not in SHOWN],
    "others shown": [item for item in KNOWLEDGE.retain if item.subject in SHOWN],
}  # fmt: skip


def shares(model: Any) -> str:
    """Exact answers to statements (an editor's form) and to questions (never shown), per set."""
    cells = []
    for name, items in SETS.items():
        forms = [[(item.statements[0], item.continuation()) for item in items],
                 [(item.prompt, item.continuation()) for item in items]]  # fmt: skip
        cells.append(f"{name} " + "/".join(f"{np.mean(answer_logprobs(model, f).greedy_match):.3f}" for f in forms))
    return ", ".join(cells)


def one_step(layers: list[int], weight: float) -> Edit:
    """The normal equation with one shared neutral value per layer; ``weight`` of the protected metric."""
    rows = surgery._rows(MODEL, DATA, 6000, 4096, 0)
    keys, _ = surgery._read(MODEL, rows, layers, None)
    operations = []
    for layer in layers:
        forget, check = torch.cat(keys[layer].forget).double(), torch.cat(keys[layer].check).double()
        name = surgery._weight(MODEL, layer)
        weights = MODEL.module.get_parameter(name).detach().double()
        residual = (check @ weights.T).mean(0) - forget @ weights.T
        metric = weight * keys[layer].metric(1e-3, check=True) + forget.T @ forget / len(forget)
        delta = torch.linalg.solve(metric, forget.T @ residual / len(forget)).T
        operations.append(LowRankDelta(name, delta, torch.eye(delta.shape[1])))
    return Edit.build("one_step", {}, MODEL, DATA.digest, operations)


def main() -> None:
    print("untouched:", shares(MODEL), flush=True)
    for layers in ([0], [0, 1, 2, 3]):
        for weight in (0.1, 1.0, 3.0, 10.0):
            with one_step(layers, weight).attach(MODEL):
                print(f"one-step layers {layers} weight {weight}:", shares(MODEL), flush=True)
    cases: list[dict[str, Any]] = [{"steps": n} for n in (150, 300, 600, 1200)]
    cases += [{"seed": 1}, {"layers": [0]}, {"strangers": 1}, {"keep_weight": 3.0}]
    for case in cases:
        before = time.process_time()
        edit = run_editor(MODEL, DATA, "null_space_surgery", **case)
        spent = time.process_time() - before
        with edit.attach(MODEL):
            print(f"{case}: {shares(MODEL)} ({spent:.0f} s CPU); {edit.manifest.notes[0]}", flush=True)


if __name__ == "__main__":
    main()
