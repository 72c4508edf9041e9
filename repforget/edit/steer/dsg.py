"""Clamp features of a sparse autoencoder in sequences of which enough tokens have one active (dynamic guardrail)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit._features import Chosen, Wanted, choose
from repforget.errors import NoEffectError, UsageError
from repforget.features import TRAIN, feature_values, highest_share, importance_ratio
from repforget.features.activity import Ids
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def dsg(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, sae: str = TRAIN, sites: Literal["auto"] | list[str] = "auto",
    check: bool = True, size: int = 0, active: int = 8, sae_steps: int | Literal["auto"] = "auto",
    features: int = 20, percentile: float = 80.0, clamp: float = 20.0, false_open: float = 0.05, prior: float = 4.0,
    max_facts: int = 1024,
) -> Edit:  # fmt: skip
    """Clamp features that tell forget facts from retained ones, in sequences that use them on enough of their tokens.

    Of the features whose squared mean value on forget tokens over that on retained ones reaches the ``percentile``, the
    ``features`` with the largest value on forget tokens.  The share of tokens so far with one of them active opens the
    gate of a sequence where it exceeds what a share ``false_open`` of retained texts exceed at some token; from there
    on they are set to ``-clamp`` times their usual value where active, the autoencoder's error added back (Muhamed et
    al. 2025, arXiv 2504.08192).  There the share is that of the whole text and the constant absolute; here each token
    decides from those before it, so that decoding with a cache and reading at once agree, and ``prior`` idle tokens
    are counted in front, because short beginnings say little.

    Args:
        sae: folder or file of an autoencoder, or "train": a small one is trained on the editor's forget and retain
            statements, so that its features describe these texts alone.
        sites: where; "auto" is the file's site, or resid_post of the best layer of ``where``, else of the middle one.
            Features that ``where`` ranked for the same autoencoder are taken instead of the rule's.
        check: refuse a file that fits a neighbouring site better.
        size: features of a trained one, 0 for four times the width; active: per token; sae_steps: to train it.
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where no feature is left or no forget fact would open the gate, SiteError for an autoencoder
    that does not fit its site.  Cost: two forwards per fact and site, and training; one encoding of the chosen
    features per token served.

    Weakness: it depends on the input and has no form in weights; text around a question dilutes the share.  A
    suppressed answer does not show that the knowledge is gone.
    """
    if clamp < 0 or prior < 0 or not 0.0 <= false_open < 1.0 or not 0.0 <= percentile <= 100.0:
        raise UsageError(f"dsg was given clamp {clamp}, prior {prior}, false_open {false_open} and percentile "
                         f"{percentile}: give at least 0 twice, a share and a percentage.")  # fmt: skip
    wanted = Wanted(sae, sites, check, size, active, sae_steps, features, max_facts, "resid_post",
                    lambda forget, retain: importance_ratio(forget, retain, percentile))  # fmt: skip
    chosen = choose(model, data, wanted, where, seed, progress)
    notes = [note for one in chosen for note in one.notes]
    operations = []
    for one in chosen:
        kept = highest(model, one, one.retain_texts, prior, progress)
        share = float(torch.quantile(kept, 1.0 - false_open, interpolation="higher"))
        opened = float((highest(model, one, one.forget_texts, prior, progress) > share).double().mean())
        if opened == 0.0:
            raise NoEffectError(f"No forget fact has the chosen features at {one.sae.site} active on more than the "
                                f"share {share:.3f} of its tokens that {1 - false_open:.0%} of the retained texts stay "
                                "below: raise false_open, or take a larger autoencoder.")  # fmt: skip
        notes.append(f"gate at {one.sae.site}: above a share of {share:.3f} it opens on {opened:.1%} of the forget "
                     f"facts and {float((kept > share).double().mean()):.1%} of the retained texts")  # fmt: skip
        operations.append(one.clamp(0.0, -clamp * one.usual, share=share, prior=prior))
    settings = {**wanted.settings(chosen), "sites": [str(one.sae.site) for one in chosen], "percentile": percentile,
                "clamp": clamp, "false_open": false_open, "prior": prior}  # fmt: skip
    return Edit.build("dsg", settings, model, data.digest, operations, notes=notes)


def highest(
    model: LoadedModel, chosen: Chosen, sequences: Sequence[Ids], prior: float, progress: Progress | None = None
) -> Tensor:
    """The highest share of active tokens that each sequence reaches at some token [n]."""
    out = torch.zeros(len(sequences))
    for rows, values, counted in feature_values(model, chosen.sae, sequences, progress):
        on = (values[..., chosen.features.to(values.device)] > 0).any(-1)
        out[rows] = highest_share(on, counted.long().cumsum(1), prior).amax(1).cpu()
    return out
