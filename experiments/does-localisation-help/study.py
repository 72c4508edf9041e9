"""Does localisation help?  Every locator chooses what every editor may change, at one budget, judged by attacks.

    python experiments/does-localisation-help/study.py [--jobs 2] [--parts organism:0 ...] [--out runs/localisation]

Cells are locator x editor x seed on the organism and on models in which one layer's MLP holds the forget facts (there,
layers stand for seeds).  Locators that rank sites, heads or neurons all fill the same budget of parameters with heads
and neurons, and every edit is scaled down until it loses at most 5 % of what must stay on the dev split; two kinds of
random selections (whole sites; single units) and no selection stand beside them.  Stages are kept by what went in, so
that equal selections are edited and judged once and the same command continues.  It writes result.json, table.md and
effect.svg here.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))  # the planted fixtures lie among the tests

FINE = {"nodes": ["heads", "neurons"]}
LOCATORS: dict[str, dict[str, Any]] = {  # with their defaults, but for what they rank
    "flu": {}, "attribution_patching": {**FINE, "recheck": 0}, "eap_ig": {}, "causal_tracing": {}, "twin_patching": {},
    "probe_sweep": {"nodes": ["attn_out", "mlp_out"]}, "fisher": FINE, "wagle": FINE,
}  # fmt: skip
RANDOM = ("random sites", "random units")
DRAWS = 3  # random selections of each kind, per seed
# Chosen on random sites, where 1e-3 and 3e-3 hardly forget at this budget of parameters; the same for every selection.
TRAINED = {"steps": 100, "lr": 5e-3, "retain": "kl", "retain_on": ["retain", "strangers"], "max_retain_rise": 50.0}
EDITORS: dict[str, dict[str, Any]] = {
    "grad_diff": TRAINED, "npo": TRAINED,
    "rmu": {"steps": 100, "coefficient": 300.0, "max_retain_rise": 50.0},
    "null_space_surgery": {"steps": 150, "strangers": 3000, "keep_weight": 3.0}, "leace": {},
}  # fmt: skip
MASKED = ("grad_diff", "npo", "rmu")
SHARE = 0.25  # of the parameters of all blocks
ATTACKS = {
    "behaviour": ("contrastive", {"samples": 0}), "relearn": ("best_step", {}), "soft_prompt": ("best_step", {}),
    "quantize": ("nf4", {"kinds": ["nf4"]}),
}  # fmt: skip
ITEMS, DEV_ITEMS = 96, 64
LOST = 0.05  # of what must stay, on the dev split: every edit is scaled down until it keeps the rest
STRENGTHS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SEEDS = {"organism": (0, 1, 2), "planted": (0, 1, 2, 3)}


@cache
def world(name: str, seed: int) -> tuple[Any, Any, Any]:
    """The model, the probe and the models that never knew."""
    from repforget.knowledge_files import load_knowledge
    from repforget.models.load import load, wrap
    from repforget.verify.arms import References

    if name == "organism":
        original, *twins = (load(f"organism:bios{suffix}") for suffix in ("", "/twin-0", "/twin-1"))
        return original, load_knowledge("bios-people"), References(original, tuple(twins))
    import planted
    from test_locate_planted import KNOWLEDGE

    original = wrap(*planted.planted(seed), f"planted-{seed}")
    return original, KNOWLEDGE, References(original, (wrap(*planted.planted(None), "planted-base"),))


def view(name: str, seed: int) -> Any:
    from repforget.calibration.pool import asked

    return asked(world(name, seed)[1], ITEMS)


def where(name: str, locator: str, seed: int, draw: int, out: str) -> Any:
    """What a locator ranks, as a stage; random orders are drawn here."""
    from repforget._session import code_digest
    from repforget.locate._dispatch import locate
    from repforget.models.sites import site_map
    from repforget.records import Component, Localization, RandomBand, Site
    from repforget.store import Store, read_json, write_json

    model, knowledge, references = world(name, seed)
    layers, places = range(model.n_layers), site_map(model.module)
    sites = [Component(Site(kind, layer)) for layer in layers for kind in ("attn_out", "mlp_out")]
    units = [Component(Site("attn_z", layer, h)) for layer in layers for h in range(places.n_heads)]
    units += [Component(Site("mlp_post", layer), n) for layer in layers for n in range(places.mlp_width)]
    if locator in (*RANDOM, "all"):
        pool = list(units if locator == "random units" else sites)
        random.Random(f"{locator}-{name}-{seed}-{draw}").shuffle(pool)
        band = RandomBand(1, 1, 0.0, 0.0, 0.0, "no effect measured: a control")
        return Localization(locator, tuple(pool), tuple(float(-k) for k in range(len(pool))), band)

    def build(folder: Path) -> None:
        started = time.process_time()
        settings = LOCATORS[locator]
        found = locate(model, knowledge, locator, twins=references.twins, seed=seed, **settings)
        write_json(folder / "found.json", found.to_json() | {"seconds": time.process_time() - started})

    key = {"world": name, "locator": locator, "settings": LOCATORS[locator], "seed": seed, "code": code_digest()}
    stage = Store(Path(out)).stage("locate", key, build)
    return Localization.from_json(read_json(stage / "found.json"))


def selection(name: str, found: Any, seed: int, budget: int) -> Any:
    """The heads and neurons a localisation fills the budget with, as a localisation that a mask takes whole."""
    from repforget.masks import fill
    from repforget.records import Localization

    units = fill(world(name, seed)[0], found.components, budget, seed=seed)
    band = replace(found.band, k=len(units))
    return Localization(found.method, units, tuple(float(-k) for k in range(len(units))), band)


def budget_of(model: Any, share: float) -> int:
    """Parameters of ``share`` of all heads and neurons."""
    from repforget.masks import masks_of
    from repforget.records import Component, Site

    sites = [Component(Site(kind, k)) for k in range(model.n_layers) for kind in ("attn_out", "mlp_out")]
    return int(share * masks_of(model, sites).parameters)


def best_layer(model: Any, found: Any) -> int:
    """The layer of the best component that lies in one."""
    return next(c.site.layer for c in found.components if 0 <= c.site.layer < model.n_layers)


def plan(name: str, locator: str, editor: str, seed: int, draw: int, out: str) -> tuple[Any, dict[str, Any]]:
    """The localisation an editor is given and its settings: equal plans are equal edits."""
    model = world(name, seed)[0]
    found = where(name, locator, seed, draw, out)
    settings = dict(EDITORS[editor])
    if editor in MASKED:
        chosen = selection(name, found, seed, budget_of(model, 1.0 if locator == "all" else SHARE))
        last = max(c.site.layer for c in chosen.components)
        settings["mask"] = True
        if editor == "rmu":  # read behind what may change
            settings["layers"] = [min(last, model.n_layers - 2)] if last else [0]
        return chosen, settings
    layers = list(range(model.n_layers)) if locator == "all" else [best_layer(model, found)]
    if editor == "leace":
        settings["sites"] = [f"mlp_in.{layer}" for layer in layers]  # before attention of layer 0 nothing is mixed yet
    else:
        settings["layers"] = layers
    return None, settings


def cell(name: str, locator: str, editor: str, seed: int, draw: int, out: str) -> dict[str, Any]:
    """One edit, judged; equal selections share both stages."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from repforget._session import code_digest
    from repforget.artifact import load_edit
    from repforget.edit._dispatch import edit
    from repforget.errors import RepforgetError
    from repforget.store import Store, read_json, write_json

    model, knowledge, references = world(name, seed)
    chosen, settings = plan(name, locator, editor, seed, draw, out)
    units = None if chosen is None else sorted(map(str, chosen.components))
    key = {"world": name, "model": model.name, "editor": editor, "settings": settings, "units": units, "seed": seed,
           "code": code_digest()}  # fmt: skip

    def make(folder: Path) -> None:
        started = time.process_time()
        try:
            made = edit(model, knowledge, editor, where=chosen, seed=seed, **settings)
        except RepforgetError as error:
            write_json(folder / "made.json", {"refused": str(error)})
            return
        made.save(folder / "edit")
        write_json(folder / "made.json", {"seconds": time.process_time() - started})

    store = Store(Path(out))
    stage = store.stage("edit", key, make)
    made = dict(read_json(stage / "made.json"))
    identity = {"world": name, "locator": locator, "editor": editor, "seed": seed, "draw": draw}
    if "refused" in made:
        return identity | made

    def examine(folder: Path) -> None:
        made = load_edit(stage / "edit")
        strength = affordable(made, model, name, seed)
        edited = made.scaled(strength).applied_to(model)
        write_json(folder / "judged.json", judged(edited, name, seed) | {"strength": strength})

    asked = {"items": ITEMS, "dev": DEV_ITEMS, "lost": LOST, "strengths": STRENGTHS, "attacks": ATTACKS}
    found = store.stage("judge", {**key, **asked}, examine)
    return identity | made | {"judged": dict(read_json(found / "judged.json"))}


def affordable(made: Any, model: Any, name: str, seed: int) -> float:
    """The largest strength that loses at most LOST of plain answers on dev, so that damage is no forgetting."""
    from repforget.models.load import copy_of

    base = kept(copy_of(model), name, seed)
    for strength in STRENGTHS:
        found = kept(made.scaled(strength).applied_to(model), name, seed)
        if all(found[k] >= (1 - LOST) * base[k] for k in base):
            return strength
    return 0.0


def kept(model: Any, name: str, seed: int) -> dict[str, float]:
    """Share of plain answers about what must stay, on the dev split."""
    from repforget.verify.battery import measure, tasks

    knowledge, references = world(name, seed)[1:]
    view = knowledge.view("dev")
    view = replace(view, **{k: getattr(view, k)[:DEV_ITEMS] for k in ("forget", "retain", "neighbours", "general")})
    (task,) = tasks([{"collateral": {"budget": "quick"}}])
    found = measure(task, model, view, references).scores
    return {k: found[k].mean for k in ("retain_exact", "neighbours_exact") if k in found}


def judged(model: Any, name: str, seed: int) -> dict[str, Any]:
    """Values per item of every attack, and the mean accuracy on what must stay."""
    from repforget.verify.battery import measure, tasks

    references, asked = world(name, seed)[2], view(name, seed)
    out: dict[str, Any] = {}
    for verifier, (key, settings) in ATTACKS.items():
        (task,) = tasks([{verifier: {"budget": "quick", **settings}}])
        scores = measure(task, model, asked, references).scores[key]
        out[verifier] = {"values": [round(float(v), 6) for v in scores.values], "clusters": list(scores.clusters)}
    (task,) = tasks([{"collateral": {"budget": "quick"}}])
    kept = measure(task, model, asked, references).scores
    out["kept"] = {k: kept[k].mean for k in ("retain_exact", "neighbours_exact") if k in kept}
    return out


def control(name: str, arm: str, seed: int, out: str) -> dict[str, Any]:
    """The original or a model that never knew, judged like an edit."""
    import torch

    torch.set_num_threads(1)
    from repforget._session import code_digest
    from repforget.models.load import copy_of
    from repforget.store import Store, read_json, write_json

    def build(folder: Path) -> None:
        known = world(name, seed)[2]
        model = known.original if arm == "original" else known.twins[int(arm[-1])]
        write_json(folder / "judged.json", judged(copy_of(model), name, seed))

    key = {"world": name, "arm": arm, "seed": seed if name == "planted" else 0, "items": ITEMS, "attacks": ATTACKS,
           "code": code_digest()}  # fmt: skip
    stage = Store(Path(out)).stage("control", key, build)
    return {"world": name, "arm": arm, "seed": seed, "judged": dict(read_json(stage / "judged.json"))}


def parts() -> list[tuple[str, int]]:
    return [(name, seed) for name, seeds in SEEDS.items() for seed in seeds]


def cells(chosen: list[tuple[str, int]]) -> Iterator[tuple[str, str, str, int, int]]:
    """All cells, one whole part after the other, so that an early stop leaves whole comparisons."""
    for name, seed in chosen:
        for editor in EDITORS:
            for locator in (*LOCATORS, "all"):
                yield name, locator, editor, seed, 0
            for kind in RANDOM if editor in MASKED else RANDOM[:1]:
                for draw in range(DRAWS):
                    yield name, kind, editor, seed, draw


def controls(chosen: list[tuple[str, int]]) -> Iterator[tuple[str, str, int]]:
    """The original and its twins, once for the organism and once per planted layer."""
    for name, seed in dict.fromkeys((name, 0 if name == "organism" else seed) for name, seed in chosen):
        yield from ((name, arm, seed) for arm in ("original", "twin-0", *(("twin-1",) * (name == "organism"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    known = [f"{name}:{seed}" for name, seed in parts()]
    parser.add_argument("--parts", nargs="*", default=known, choices=known, help="world:seed (planted: its layer)")
    parser.add_argument("--out", default="runs/localisation")
    chosen = parser.parse_args()
    asked = [part for part in parts() if f"{part[0]}:{part[1]}" in chosen.parts]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as workers:
        arms = [workers.submit(control, *c, chosen.out) for c in controls(asked)]
        todo = [workers.submit(cell, *c, chosen.out) for c in cells(asked)]
        try:
            for number, future in enumerate(as_completed(todo), 1):
                rows.append(future.result())
                label = " ".join(str(rows[-1][k]) for k in ("world", "locator", "editor", "seed", "draw"))
                print(f"{number}/{len(todo)} {label}", flush=True)
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
        judged_arms = [future.result() for future in arms]
    from draw import picture, summary, table

    body = summary(rows, judged_arms)
    (HERE / "result.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    (HERE / "table.md").write_text(table(body))
    (HERE / "effect.svg").write_text(picture(body))


if __name__ == "__main__":
    main()
