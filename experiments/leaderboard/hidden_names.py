"""What retention owes to made-up names that are real ones: editors with and without the names they are not shown.

    python experiments/leaderboard/hidden_names.py [--editor stranger_distillation] [--out hidden_names.json]

Names put together from parts of real ones are, on the embedded model, mostly those of people whom the editor is not
shown and the judge asks about.  Here they are taken out of the made-up names, which no editor could do by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SETTINGS: dict[str, dict[str, Any]] = {
    "stranger_distillation": {}, "null_space_surgery": {"steps": 300, "strangers": 6000},
    "npo": {"steps": 150, "lr": 1e-3, "retain": "kl", "retain_on": ["retain", "strangers"], "retain_weight": 5.0,
            "max_retain_rise": 50.0},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editor", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE))
    import board

    import repforget.edit.surgery._rows as rows
    import repforget.edit.train.stranger_distillation as distillation
    from repforget.edit._dispatch import edit
    from repforget.knowledge_files import load_knowledge

    known, knowledge = board.references(), load_knowledge(board.KNOWLEDGE)
    bearers = {item.subject for group in (knowledge.forget, knowledge.retain, knowledge.neighbours) for item in group}
    whole = rows.strangers

    def unborne(subjects: Any) -> tuple[str, ...]:
        return tuple(name for name in whole(subjects) if name not in bearers)

    path = HERE / "hidden_names.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen.editor:
        for without in (False, True):
            rows.strangers = distillation.strangers = unborne if without else whole
            started = time.process_time()
            made = edit(known.original, knowledge, name, seed=chosen.seed, **SETTINGS[name])
            seconds = time.process_time() - started
            measured = board.measured(made.applied_to(known.original), "sealed",
                                      ("behaviour", "logit_lens", "relearn", "collateral"), known)  # fmt: skip
            key = f"{name}, {'without' if without else 'with'} the names of people it is not shown"
            found[key] = {"seed": chosen.seed, "seconds": seconds, "measured": measured}
            path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            print(key, {k: round(v, 3) for k, v in measured.items() if "collateral" in k or k.endswith(
                ("contrastive", "best_layer", "best_step"))}, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
