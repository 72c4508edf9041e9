"""What one request costs in a sharded training, counted and measured, against training all of it again.

    OMP_NUM_THREADS=1 python experiments/speed/shards.py       # about two minutes of one core

The embedded model that never saw the 64 forget people is trained on their question forms (4 shards, 3 slices, LoRA of
rank 8 on all matrices).  Counted for all 64 people: steps and record passes of the stages that a request changes, over
those of the whole training, against (2/3 + 1/(3R))/K.  Measured in CPU seconds for one person per slice, of different
shards: taking that person out (encoding, training, writing, erasing), against the training from nothing; and that the
folder then holds the bytes of a training that never had that person.  How well the shards serve: share of greedy
answers that are right, by the base, all shards as one edit, each record's own shard, and the shard that a prompt is
routed to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

BASE, PROBE = "organism:bios/twin-0", "bios-people"
SHARDS, SLICES, EPOCHS, RATE = 4, 3, 4, 5e-3
FORMS = 2  # question forms per fact, of those that the probe has


def counted(training: Any) -> dict[str, float]:
    """Mean share over all people, in passes and in steps, and the formula."""
    from repforget.shards import expected_share, planned, share, without

    steps, passes = [], []
    settings = training.settings
    known = {training.path(stage).name for stage in training.stages}
    for person in sorted({r.cluster for r in training.records}):
        left = without(training, [r for r in training.records if r.cluster == person])
        after = replace(training, records=left)
        stages = planned(settings, training.base["fingerprint"], left)
        changed = [s.steps(settings) for s in stages if after.path(s).name not in known]
        steps.append(sum(changed) / sum(s.steps(settings) for s in stages))
        passes.append(share(training, after))
    return {"people": len(passes), "passes": sum(passes) / len(passes), "steps": sum(steps) / len(steps),
            "formula": float(expected_share(settings))}  # fmt: skip


def right(model: Any, pairs: Sequence[tuple[str, str]]) -> float:
    from repforget.scoring import answer_logprobs

    return float(answer_logprobs(model, pairs).greedy_match.mean())


def serving(training: Any, model: Any) -> dict[str, float]:
    """Shares of right answers to the records, by who answers, and of prompts that go to their own shard."""
    from repforget.shards import best_shard, combined, place

    pairs = [(r.prompt, r.answer) for r in training.records]
    home = [place(training.settings, r)[0] for r in training.records]
    found = {"base": right(model, pairs)}
    for how in ("sum", "mean"):
        with combined(replace(training, settings=replace(training.settings, combine=how)), model).attach(model):
            found[how] = right(model, pairs)
    for by in ("confidence", "loss"):
        chosen = best_shard(training, model, [p for p, _ in pairs], by=by)
        found[f"routed by {by}"] = _each(training, model, pairs, chosen)
        found[f"own shard by {by}"] = sum(a == b for a, b in zip(chosen, home, strict=True)) / len(home)
    return {**found, "own shard": _each(training, model, pairs, home)}


def _each(training: Any, model: Any, pairs: Sequence[tuple[str, str]], shards: Sequence[int]) -> float:
    from repforget.shards import shard_edit

    hits = 0.0
    for shard in sorted(set(shards)):
        own = [pair for pair, k in zip(pairs, shards, strict=True) if k == shard]
        with shard_edit(training, model, shard).attach(model):
            hits += right(model, own) * len(own)
    return hits / len(pairs)


def timed(work: Any) -> tuple[Any, float]:
    started = time.process_time()
    return work(), time.process_time() - started


def requests(training: Any, model: Any, whole: float, place_of: Path) -> list[dict[str, Any]]:
    """One person per slice taken out of a copy of the folder; of the first, the bytes against a new training."""
    from repforget.shards import begin, complete, opened, place, take_out
    from repforget.store import result_files

    found: list[dict[str, Any]] = []
    people = sorted({r.cluster for r in training.records})
    for slice_ in range(SLICES):
        wanted = (slice_ % SHARDS, slice_)
        person = next(p for p in people if place(training.settings, next(r for r in training.records if r.cluster == p))
                      == wanted)  # fmt: skip
        shutil.copytree(training.root, place_of / f"t{slice_}")
        (left, outcome), seconds = timed(lambda n=slice_, p=person: take_out(opened(place_of / f"t{n}"), [p],
                                                                            lambda: model))  # fmt: skip
        row = {"shard": wanted[0], "slice": slice_, "cpu_seconds": seconds, "share_of_seconds": seconds / whole,
               "share_of_passes": outcome.share, "steps": outcome.steps}  # fmt: skip
        if not found:
            again = begin(place_of / "again", model, training.settings, left.records)
            complete(again, model)
            row["same_bytes"] = _slices(result_files(left.root)) == _slices(result_files(again.root))
        found.append(row)
    return found


def _slices(files: dict[str, str]) -> dict[str, str]:
    return {name: sha for name, sha in files.items() if name.startswith("slice-")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    import torch

    import repforget as rf
    from repforget.shards import Settings, begin, block_groups, complete
    from repforget.training import records_of

    torch.set_num_threads(1)
    model = rf.load(BASE)
    asked = records_of(rf.knowledge(PROBE), ("forget",), "questions")
    records = [r for r in asked if int(r.id.rpartition("q")[2]) < FORMS]
    settings = Settings(block_groups(model.module, (), "sisa", SLICES), shards=SHARDS, slices=SLICES, epochs=EPOCHS,
                        lr=RATE)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = begin(folder / "t", model, settings, records)
        _, whole = timed(lambda: complete(training, model))
        body = {"setting": {"base": BASE, "records": len(records), "shards": SHARDS, "slices": SLICES,
                            "epochs": EPOCHS, "lr": RATE},
                "training": {"cpu_seconds": whole, "steps": sum(s.steps(settings) for s in training.stages)},
                "counted": counted(training), "requests": requests(training, model, whole, folder),
                "serving": serving(training, model)}  # fmt: skip
    out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
