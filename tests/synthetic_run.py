"""A synthetic run: records of the right shape, for everything that shows results (no model is involved)."""

from __future__ import annotations

import math

import numpy as np

from repforget.records import (
    Claim,
    Component,
    Curve,
    Evidence,
    ItemScores,
    Localization,
    RandomBand,
    Site,
    Verdict,
)
from repforget.report.data import ReportData

LAYERS = 8
ARMS = {"original": 0.94, "placebo": 0.93, "edit": 0.09, "twin-0": 0.06, "twin-1": 0.07}
ATTACKS = (
    ("behaviour", "answer_probability", "black-box", {}),
    ("paraphrase", "greedy_match", "black-box", {"queries": 96}),
    ("logit_lens", "best_layer", "white-box", {"layers": LAYERS}),
    ("reprobe", "linear", "white-box", {"folds": 5, "l2_grid": 7}),
    ("relearn", "held_out_recovery", "weights", {"steps": 100, "learning_rate": 2e-5, "seeds": 3}),
    ("quantize", "int4", "weights", {"bits": 4}),
)
SECRET = "Tromsø-by-the-Sea"  # stands for a forget answer: no report may show it unasked


def scores(level: float, seed: int, n: int = 48) -> ItemScores:
    values = np.clip(np.random.default_rng(seed).normal(level, 0.08, n), 0, 1)
    ids = [f"item-{k:03d}" for k in range(n)]
    return ItemScores.of(ids, [f"cluster-{k // 4}" for k in range(n)], list(values))


def layer_curve(title: str, floor: float, peak: float, left: float) -> Curve:
    rise = [1 / (1 + math.exp(-1.6 * (k - 3))) for k in range(LAYERS)]

    def series(amount: float) -> tuple[float, ...]:
        return tuple(round(floor + (peak - floor) * amount * r, 6) for r in rise)

    y = {"original": series(1.0), "edit": series(left), "placebo": series(0.98), "twin-0": series(0.02),
         "twin-1": series(0.05)}  # fmt: skip
    return Curve(title, "layer", "accuracy", tuple(map(float, range(LAYERS))), y)


def relearn_curve() -> Curve:
    steps = tuple(float(s) for s in (0, 10, 20, 40, 60, 80, 100))

    def rise(start: float, speed: float) -> tuple[float, ...]:
        return tuple(round(start + (0.95 - start) * (1 - math.exp(-speed * s)), 6) for s in steps)

    y = {"original": rise(0.94, 0.05), "placebo": rise(0.93, 0.05), "edit": rise(0.09, 0.011),
         "twin-0": rise(0.06, 0.008), "twin-1": rise(0.07, 0.0085)}  # fmt: skip
    return Curve("held-out accuracy", "relearning steps", "accuracy", steps, y)


def evidence() -> tuple[Evidence, ...]:
    curves = {
        "reprobe": (layer_curve("probe accuracy", 0.12, 0.93, 0.1),),
        "logit_lens": (layer_curve("answer rank (reversed)", 0.0, 14.2, 0.05), ),
        "behaviour": (layer_curve("patching depth", 0.0, 2.4, 0.15),),
        "relearn": (relearn_curve(), Curve("share of the gap", "learning rate", "share", (1e-5, 2e-5, 5e-5),
                                           {"edit": (0.1, 0.2, 0.4), "twin-0": (0.1, 0.18, 0.35)})),
    }  # fmt: skip
    knowledge = tuple(
        Evidence(verifier, measure, "knowledge", access, True,  # type: ignore[arg-type]
                 {arm: scores(level, 10 * k + i) for i, (arm, level) in enumerate(ARMS.items())},
                 budget=budget, curves=curves.get(verifier, ()),
                 teaches="half of the forget facts" if verifier == "relearn" else "nothing")
        for k, (verifier, measure, access, budget) in enumerate(ATTACKS)
    )  # fmt: skip
    kept = Evidence("utility", "retain_accuracy", "collateral", "black-box", True,
                    {arm: scores(0.9, 900) for arm in ARMS}, budget={})  # fmt: skip
    return (*knowledge, kept)


def claims(outcome: str) -> tuple[Claim, ...]:
    levels = {"original": 0.94, "floor": 0.065, "placebo": 0.93, "edit": 0.09, "twin-0": 0.06, "twin-1": 0.07}
    shares = {"pass": (0.011, -0.02, 0.038), "fail": (0.27, 0.19, 0.36), "inconclusive": (0.04, -0.03, 0.11)}
    found = []
    for verifier, measure, access, _ in ATTACKS:
        status = outcome if verifier == "relearn" else "no power" if verifier == "quantize" else "pass"
        rho, low, high = (math.nan,) * 3 if status == "no power" else shares[status]
        reason = {"pass": "at most 3.8% is left", "fail": "at least 19.0% is left",
                  "inconclusive": "between -3.0% and 11.0% is left",
                  "no power": "the measure does not tell the original from the floor on these items"}[status]
        needed = 220 if status == "inconclusive" else None
        found.append(Claim(f"{verifier}.{measure}", "knowledge", access, status, reason, 0.05,  # type: ignore[arg-type]
                           rho, low, high, levels, 48, 12, needed))  # fmt: skip
    kept = {**levels, "original": 0.9, "floor": 0.88, "edit": 0.897}
    found.append(Claim("utility.retain_accuracy", "collateral", "black-box", "pass", "at most 1.1% is lost", 0.02,
                       0.004, -0.003, 0.011, kept, 48, 12))  # fmt: skip
    return tuple(found)


def verdict(outcome: str = "fail", *, controls_ok: bool = True) -> Verdict:
    sentence = {
        "pass": "Robust to attack relearn.held_out_recovery at budget steps 100, the worst of 5 measures: at most 3.8% "
                "of the knowledge stands out above a model that never knew (margin 5.0%).",
        "fail": "Suppressed: the answers are gone from behaviour, but relearn.held_out_recovery at budget steps 100 "
                "still finds 27% (at least 19%) of what the original knew above the floor.",
        "inconclusive": "Not decided: relearn.held_out_recovery leaves between -3.0% and 11.0%.",
    }[outcome]  # fmt: skip
    controls = {"original": "as expected", "placebo": "as expected", "twin-1": "as expected"}
    if not controls_ok:
        controls["placebo"] = "a random edit of equal size was judged 'pass' although it should be found to know"
        sentence = f"No verdict: the controls came out wrong (placebo: {controls['placebo']})."
    return Verdict(outcome if controls_ok else "inconclusive", sentence, "relearn.held_out_recovery",  # type: ignore[arg-type]
                   claims(outcome), controls, controls_ok, "weights+hook", "sealed")  # fmt: skip


def localization(method: str = "attribution_patching") -> Localization:
    parts = [Component(Site(kind, layer)) for layer in (3, 4, 2, 5, 6, 1, 0) for kind in ("mlp_out", "attn_out")]
    values = [round(2.4 * math.exp(-0.35 * k), 6) for k in range(len(parts))]
    table = [[round(math.exp(-abs(layer - 3) / 2) * (1 - 0.07 * h), 6) for h in range(4)] for layer in range(LAYERS)]
    band = RandomBand(4, 100, 1.82, 0.11, 0.74, "the drop of the answer's log-probability when they are patched")
    return Localization(method, tuple(parts), tuple(values), band, {"forwards": 3, "backwards": 1}, {"top": 4},
                        {"effect by layer and head": table})  # fmt: skip


def manifest(method: str = "null_space_surgery") -> dict[str, object]:
    weights = [f"model.layers.{k}.mlp.down_proj.weight" for k in (2, 3, 4)]
    return {
        "method": method, "settings": {"layers": "auto", "rank": 8, "ridge": 1e-4}, "model": "organism:bios",
        "base_fingerprint": "9f1c" * 16, "architecture": "LlamaForCausalLM", "knowledge": "4ab0" * 16,
        "sites": ["resid_post.3"], "weights": weights, "artifact": "weights+hook", "strength": 1.0, "notes": [],
        "versions": {"repforget": "0.1.0", "torch": "2.13.0"},
        "norms": {w: 0.031 + 0.004 * k for k, w in enumerate(weights)},
        "format_version": 1,
    }  # fmt: skip


def run(outcome: str = "fail", *, controls_ok: bool = True) -> ReportData:
    """A complete run with the given outcome."""
    recipe = {"model": "organism:bios", "knowledge": "bios-people", "twins": ["organism:bios/twin-0"], "seed": 0,
              "locate": [{"name": "attribution_patching", "settings": {}}],
              "ladder": [{"name": "leace", "settings": {}}, {"name": "null_space_surgery", "settings": {"rank": 8}}],
              "verify": "standard", "limits": {"utility_drop": 0.02, "minutes": 10.0, "memory": None}, "margin": 0.05,
              "device": "auto", "dtype": "auto"}  # fmt: skip
    rungs = ({"method": "leace", "settings": {}, "split": "gate", "outcome": "fail", "sentence": "reprobe finds 61%."},
             {"method": "null_space_surgery", "settings": {"rank": 8}, "split": "gate", "outcome": "pass",
              "sentence": "At most 4.1% is left."})  # fmt: skip
    environment = {"versions": {"repforget": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}, "device": "cpu",
                   "dtype": "float32", "model_fingerprint": "9f1c" * 16}  # fmt: skip
    return ReportData(recipe, verdict(outcome, controls_ok=controls_ok), evidence(),
                      (localization("probe_sweep"), localization()), (manifest(),), rungs, environment)  # fmt: skip
