"""Clamp features of a sparse autoencoder that forget facts use and retained texts hardly do."""

from __future__ import annotations

from typing import Literal

import torch

from repforget.artifact import Edit
from repforget.edit._collect import subsample
from repforget.edit._features import Wanted, choose
from repforget.edit.steer._gates import fit_gate
from repforget.errors import UsageError
from repforget.features import TRAIN, rare_elsewhere
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def sae_clamp(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, sae: str = TRAIN, sites: Literal["auto"] | list[str] = "auto",
    check: bool = True, size: int = 0, active: int = 8, sae_steps: int | Literal["auto"] = "auto",
    features: int = 20, most_retain: float = 0.01, clamp: float = 5.0, condition: Literal["none", "prefix"] = "none",
    false_open: float = 0.01, max_facts: int = 1024,
) -> Edit:  # fmt: skip
    """Set features that are active on forget facts to a negative value, wherever they are active.

    Features active on at least a share ``most_retain`` of retained tokens are dropped; the ``features`` most frequent
    on forget tokens among the rest go to ``-clamp`` times their usual value when active, so that x' = x + sum (f' - f)
    d and the autoencoder's error stays (Farrell et al. 2024, arXiv 2410.19278; their constant is absolute, this one is
    in units of each feature).  With ``condition`` "prefix" only from the first token on at which a linear detector sees
    a forget subject (after arXiv 2503.11127; the detector is the gate of steering).

    Args:
        sae: folder or file of an autoencoder, or "train": a small one is trained on the editor's forget and retain
            statements, so that its features describe these texts alone.
        sites: where; "auto" is the file's site, or resid_post of the best layer of ``where``, else of the middle one.
            Features that ``where`` ranked for the same autoencoder are taken instead of the rule's.
        check: refuse a file that fits a neighbouring site better.
        size: features of a trained one, 0 for four times the width; active: per token; sae_steps: to train it.
        features: how many are clamped. clamp: 0 removes their contribution.
        false_open: share of retained texts that may open the detector. max_facts: facts read per set, by seed.

    Raises NoEffectError where no feature is left, SiteError for an autoencoder that does not fit its site.  Cost: one
    forward per fact and site, and training; one encoding of the chosen features per token served.

    Weakness: it depends on the input and has no form in weights, so that whoever holds them drops it; a clamped feature
    does not show that nothing is left in what the autoencoder leaves unexplained.
    """
    if clamp < 0 or not 0.0 <= false_open < 1.0:
        raise UsageError(f"sae_clamp was given clamp {clamp} and false_open {false_open}: give at least 0, and 0 to 1.")
    wanted = Wanted(sae, sites, check, size, active, sae_steps, features, max_facts, "resid_post",
                    lambda forget, retain: rare_elsewhere(forget, retain, most_retain))  # fmt: skip
    chosen = choose(model, data, wanted, where, seed, progress)
    notes = [note for one in chosen for note in one.notes]
    operations = []
    for one in chosen:
        gate = None
        if condition == "prefix":
            gate, share = fit_gate(model, one.sae.site, subsample(data.forget, max_facts, seed),
                                   subsample(data.retain, max_facts, seed), one.retain_texts, "prefix", "subject",
                                   false_open)  # fmt: skip
            notes.append(f"detector at {one.sae.site}: opens on {share:.1%} of the forget facts and at most "
                         f"{false_open:.1%} of the retained texts it was fitted on")  # fmt: skip
        operations.append(one.clamp(0.0, torch.clamp(-clamp * one.usual, max=0.0), gate=gate))
    settings = {**wanted.settings(chosen), "sites": [str(one.sae.site) for one in chosen], "most_retain": most_retain,
                "clamp": clamp, "condition": condition, "false_open": false_open}  # fmt: skip
    return Edit.build("sae_clamp", settings, model, data.digest, operations, notes=notes)
