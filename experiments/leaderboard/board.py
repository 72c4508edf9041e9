"""The leaderboard: every editor on the organism, tuned alike, attacked alike, one table and one picture.

    python experiments/leaderboard/board.py [--only NAME ...] [--seeds 0 1 2] [--jobs 2] [--out runs/leaderboard]

Each row gets at most three tries on the dev split (seed 0); the one that forgets most among those that lose at most 2 %
is made again with every seed and attacked on the sealed split.  Stages are kept: the same command continues.  It writes
result.json, table.md and pareto.svg here.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

HERE = Path(__file__).parent
KNOWLEDGE, MODEL = "bios-people", "organism:bios"
ATTACKS = {  # verifier -> the measures whose worst is taken
    "behaviour": ("contrastive",), "logit_lens": ("best_layer",), "reprobe": ("linear",), "patch_depth": ("carried",),
    "quantize": ("nf4", "int8"), "relearn": ("best_step",),
}  # fmt: skip
KEPT = ("retain_exact", "neighbours_exact")  # accuracy of plain answers on what must stay
SCREEN = ("behaviour", "logit_lens", "collateral")  # what a try is chosen by
SETTINGS = {"behaviour": {"samples": 0}, "quantize": {"kinds": ["nf4", "int8"]}}
ITEMS = {"dev": 64, "sealed": 96}
DROP = 0.02


def rows() -> list[dict[str, Any]]:
    """The rows of methods.yaml with their tries spelled out."""
    from repforget import discover

    book = yaml.safe_load((HERE / "methods.yaml").read_text())
    found = []
    for row in book["rows"]:
        known = discover.method("edit", row["editor"]).hyperparameters
        shared = {"steps": book["steps"], "max_retain_rise": 50.0}
        fits = "adapter" in known and not row.get("own_steps")
        base = {k: v for k, v in shared.items() if k in known} if fits else {}
        tries = [{**base, **row.get("settings", {}), **own} for own in row.get("tries", [{}])]
        found.append({"name": row["name"], "editor": row["editor"], "locate": row.get("locate"), "tries": tries})
    return found


def measured(model: Any, split: str, verifiers: Any, references: Any) -> dict[str, float]:
    """Mean of every measure of the verifiers on a model."""
    import numpy as np

    from repforget.calibration.pool import asked
    from repforget.knowledge_files import load_knowledge
    from repforget.verify.battery import measure, tasks

    knowledge = load_knowledge(KNOWLEDGE)
    view = asked(knowledge, ITEMS[split]) if split == "sealed" else knowledge.view("dev")
    view = replace(view, forget=view.forget[: ITEMS[split]])
    out = {}
    for name in verifiers:
        (task,) = tasks([{name: {"budget": "quick", **SETTINGS.get(name, {})}}])
        for key, scores in measure(task, model, view, references).scores.items():
            if not key.endswith("_prior"):
                out[f"{name}.{key}"] = float(np.nanmean(scores.values))
    return out


def references() -> Any:
    from repforget.models.load import load
    from repforget.verify.arms import References

    original, *twins = (load(f"{MODEL}{suffix}") for suffix in ("", "/twin-0", "/twin-1"))
    return References(original, tuple(twins))


def control(name: str, out: str) -> dict[str, Any]:
    """The original or a twin, measured like an edit."""
    import torch

    torch.set_num_threads(1)
    from repforget._session import code_digest
    from repforget.models.load import copy_of
    from repforget.store import Store, read_json, write_json

    def build(folder: Path) -> None:
        known = references()
        model = known.original if name == "original" else known.twins[int(name[-1])]
        found = {split: measured(copy_of(model), split, SCREEN if split == "dev" else (*ATTACKS, "collateral"), known)
                 for split in ITEMS}  # fmt: skip
        write_json(folder / "measured.json", found)

    stage = Store(Path(out)).stage("control", {"name": name, "code": code_digest(), "items": ITEMS}, build)
    return dict(read_json(stage / "measured.json"))


def attempt(row: dict[str, Any], settings: dict[str, Any], seed: int, split: str, out: str) -> dict[str, Any]:
    """One edit with one seed, measured on one split; both are stages."""
    from repforget._session import code_digest
    from repforget.artifact import load_edit
    from repforget.edit._dispatch import edit
    from repforget.errors import RepforgetError
    from repforget.knowledge_files import load_knowledge
    from repforget.locate._dispatch import locate
    from repforget.store import Store, read_json, write_json

    store = Store(Path(out))
    key = {"editor": row["editor"], "locate": row["locate"], "settings": settings, "seed": seed, "code": code_digest()}
    known = references()

    def make(folder: Path) -> None:
        knowledge = load_knowledge(KNOWLEDGE)
        started = time.process_time()
        try:
            where = locate(known.original, knowledge, row["locate"], seed=seed) if row["locate"] else None
            made = edit(known.original, knowledge, row["editor"], where=where, seed=seed, **settings)
        except RepforgetError as error:
            write_json(folder / "made.json", {"refused": str(error)})
            return
        made.save(folder / "edit")
        size = sum(p.stat().st_size for p in (folder / "edit").iterdir())
        write_json(folder / "made.json", {"seconds": time.process_time() - started, "bytes": size,
                                          "notes": list(made.manifest.notes), "artifact": made.artifact})  # fmt: skip

    stage = store.stage("edit", key, make)
    made = dict(read_json(stage / "made.json"))
    if "refused" in made:
        return made

    def examine(folder: Path) -> None:
        model = load_edit(stage / "edit").applied_to(known.original)
        verifiers = SCREEN if split == "dev" else (*ATTACKS, "collateral")
        write_json(folder / "measured.json", measured(model, split, verifiers, known))

    found = store.stage("measure", {**key, "split": split, "items": ITEMS[split]}, examine)
    return {**made, "measured": dict(read_json(found / "measured.json"))}


def shares(measured: dict[str, float], original: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    """What each attack still finds: 0 as in the models that never knew, 1 as in the original."""
    out = {}
    for name, measures in ATTACKS.items():
        for key in (f"{name}.{m}" for m in measures):
            if key in measured:
                out[key] = (measured[key] - floor[key]) / (original[key] - floor[key])
    return out


def lost(measured: dict[str, float], original: dict[str, float]) -> float:
    """The largest share lost of what must stay: retained facts, neighbours (mean over items, relative)."""
    return max(1 - measured[f"collateral.{k}"] / original[f"collateral.{k}"] for k in KEPT)


def run_row(row: dict[str, Any], seeds: list[int], out: str, base: dict[str, Any]) -> dict[str, Any]:
    """Choose among the tries of a row on dev, then attack the chosen one on the sealed split with every seed."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tried = []
    for settings in row["tries"] if len(row["tries"]) > 1 else []:
        found = attempt(row, settings, seeds[0], "dev", out)
        if "refused" in found:
            tried.append((True, math.inf, settings, found["refused"]))
            continue
        left = max(shares(found["measured"], base["original"]["dev"], base["floor"]["dev"]).values())
        drop = lost(found["measured"], base["original"]["dev"])
        tried.append((drop > DROP, drop if drop > DROP else left, settings, ""))
    best = min(tried, key=lambda t: t[:2])[2] if tried else row["tries"][0]
    runs = [attempt(row, best, seed, "sealed", out) for seed in seeds]
    good = [r for r in runs if "measured" in r]
    result: dict[str, Any] = {
        "name": row["name"], "editor": row["editor"], "settings": best, "tries": len(row["tries"]),
        "refused": [r["refused"] for r in runs if "refused" in r],
    }  # fmt: skip
    if not good:
        return result
    left = [shares(r["measured"], base["original"]["sealed"], base["floor"]["sealed"]) for r in good]
    worst = [max(s, key=lambda k: s[k]) for s in left]
    return result | {
        "left": {k: [s[k] for s in left] for k in left[0]}, "worst": [s[w] for s, w in zip(left, worst, strict=True)],
        "worst attack": worst, "lost": [lost(r["measured"], base["original"]["sealed"]) for r in good],
        "seconds": [r["seconds"] for r in good], "bytes": good[0]["bytes"], "artifact": good[0]["artifact"],
        "measured": [r["measured"] for r in good], "notes": [r["notes"] for r in good],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of rows; result.json keeps the others of earlier runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="runs/leaderboard")
    chosen = parser.parse_args()
    known = rows()
    unknown = sorted(set(chosen.only or ()) - {row["name"] for row in known})
    if unknown:
        raise SystemExit(f"There is no row '{unknown[0]}': the rows are {', '.join(row['name'] for row in known)}.")
    controls = {name: control(name, chosen.out) for name in ("original", "twin-0", "twin-1")}
    floor = {s: {k: fmean(controls[f"twin-{i}"][s][k] for i in (0, 1)) for k in controls["original"][s]} for s in ITEMS}
    base = {"original": controls["original"], "floor": floor}
    todo = [row for row in known if chosen.only is None or row["name"] in chosen.only]
    path = HERE / "result.json"
    done = {r["name"]: r for r in json.loads(path.read_text())["rows"]} if chosen.only and path.exists() else {}
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as workers:
        running = {workers.submit(run_row, row, chosen.seeds, chosen.out, base): row["name"] for row in todo}
        for number, future in enumerate(as_completed(running), 1):
            done[running[future]] = future.result()
            print(f"{number}/{len(todo)} {running[future]}", flush=True)
    order = [row["name"] for row in known]
    found = sorted(done.values(), key=lambda r: order.index(r["name"]))
    twins = [shares(controls[f"twin-{i}"]["sealed"], controls["original"]["sealed"], floor["sealed"]) for i in (0, 1)]
    body = {"seeds": chosen.seeds, "items": ITEMS, "controls": controls, "twins": twins, "rows": found}
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    from draw import picture, table

    (HERE / "table.md").write_text(table(body))
    (HERE / "pareto.svg").write_text(picture(body))


if __name__ == "__main__":
    main()
