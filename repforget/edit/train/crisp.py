"""Train features of a sparse autoencoder down on forget facts and keep the states of everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit._collect import subsample
from repforget.edit._features import Chosen, Wanted, choose, of_kind
from repforget.edit.train._data import Rows, fact_rows, text_rows
from repforget.edit.train._objective import Objective, shared_signature
from repforget.edit.train._pass import Term
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import train
from repforget.errors import NoEffectError, UsageError
from repforget.features import TRAIN, encoded, frequency_difference
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

LEFT_OUT = ("answers", "retain", "retain_on", "retain_weight", "forget_weight")
DEFAULTS = {"adapter": "lora", "rank": 4, "lr": 1e-3}


@shared_signature(left_out=LEFT_OUT, defaults=DEFAULTS)
def crisp(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, checkpoint: Path | None = None, sae: str = TRAIN,
    sites: Literal["auto"] | list[str] = "auto", check: bool = True, size: int = 0, active: int = 8,
    sae_steps: int | Literal["auto"] = "auto", features: int = 10, relative: float = 3.0, boost: float = 5.0,
    beta: float = 0.99, gamma: float = 0.01, **shared: Any,
) -> Edit:  # fmt: skip
    """Train features that forget facts use more than retained ones towards silence, permanently.

    Minimised is ``(1 - beta)(1 + boost) A + beta R + beta gamma C``: A the mean over forget tokens of the values of the
    ``features`` with the largest difference of frequencies (mean value at least ``relative`` times that on retained
    tokens), each in units of its mean there before; R the squared change of the states of retained statements at the
    autoencoder's layer, C that of general texts (of those statements where there are too few) behind the last one, both
    in units of the states' variance.  Source: Ashuach et al. 2025, arXiv 2508.13650 (CRISP); the units are this
    project's, so that one ``beta`` serves models of any scale.  By default LoRA of rank 4.

    Args:
        sae: folder or file of an autoencoder of resid_post, or "train": a small one is trained on the editor's forget
            and retain statements, so that its features describe these texts alone.
        sites: where; "auto" is the file's site, or resid_post of the best layer of ``where``, else of the middle one;
            several are trained against at once. Features that ``where`` ranked for the same autoencoder are taken.
        check: refuse a file that fits a neighbouring site better.
        size: features of a trained one, 0 for four times the width; active: per token; sae_steps: to train it.

    Raises SiteError for another kind of site, NoEffectError where no feature is left or beta is 1 (then everything
    stays), UsageError for weights out of range.  Cost: one forward per fact and site, and training the autoencoder;
    then a forward and a backward over three sets per step.

    Weakness: the model can learn to say the same in what the autoencoder does not read, so that a silent feature does
    not show that nothing is left: ask a fresh probe, not this autoencoder.
    """
    if not 0.0 <= beta <= 1.0 or gamma < 0 or boost < 0:
        raise UsageError(f"crisp was given beta {beta}, gamma {gamma} and boost {boost}: give 0 to 1, and at least 0.")
    if beta == 1.0:
        raise NoEffectError("With beta 1 crisp has nothing to forget, since all that is left of its loss keeps: "
                            "give less, for example 0.99.")  # fmt: skip
    common = Settings(**{**DEFAULTS, **shared})
    wanted = Wanted(sae, sites, check, size, active, sae_steps, features, common.max_facts, "resid_post",
                    lambda forget, retain: frequency_difference(forget, retain, relative))  # fmt: skip
    chosen = choose(model, data, wanted, where, seed, progress)
    of_kind(chosen, "resid_post", "crisp")
    layers = tuple(one.sae.site.layer for one in chosen)
    forget, _ = fact_rows(model, subsample(data.forget, common.max_facts, seed), "forget")
    retain, _ = fact_rows(model, subsample(data.retain, common.max_facts, seed), "retain")
    general = text_rows(model, data.general, "general") if data.general else ()
    enough = len(general) >= (common.retain_batch or min(common.batch_size, len(forget)))
    quiet = Objective("crisp", silence(chosen, model.device), "token_mean")
    stay = Objective("crisp_states", states_stay, "token_mean", role="retain")
    ready = [
        Term(quiet, {}, "forget", (1 - beta) * (1 + boost), Rows("forget", forget), layers),
        Term(stay, {}, "retain", beta, Rows("retain", retain), layers),
        Term(stay, {}, "retain", beta * gamma, Rows("general", general if enough else retain),
             (model.n_layers - 1,)),
    ]
    own = {**wanted.settings(chosen), "sites": [str(one.sae.site) for one in chosen], "relative": relative,
           "boost": boost, "beta": beta, "gamma": gamma}  # fmt: skip
    own = {name: value for name, value in own.items() if name != "max_facts"}
    return train(model, data, "crisp", [], common, where=where, seed=seed, progress=progress, checkpoint=checkpoint,
                 settings=own, ready=ready, left_out=LEFT_OUT)  # fmt: skip


def silence(chosen: tuple[Chosen, ...], device: torch.device) -> Callable[..., Tensor]:
    """The loss on states [m, l, d]: per token the mean of the chosen features in units of their mean, over sites."""
    parts = []
    for one in chosen:
        rows = (*one.sae.rows(), one.forget.mean.float().clamp(min=1e-12))
        parts.append((tuple(t[one.features].to(device) for t in rows), one.sae.scaling))

    def loss(hidden: Tensor) -> Tensor:
        found = []
        for place, ((encoder, bias, threshold, usual), scaling) in enumerate(parts):
            f, _ = encoded(hidden[:, place].float(), encoder, bias, threshold, scaling)
            found.append((f / usual).mean(1))
        return torch.stack(found).mean(0)

    return loss


def states_stay(hidden: Tensor, original: Tensor) -> Tensor:
    """``|h - h0|²`` over the variance of h0 around its mean over these tokens [m], mean over layers."""
    before = original.float()
    spread = (before - before.mean(0)).square().sum(-1).mean(0).clamp(min=1e-12)
    return ((hidden.float() - before).square().sum(-1) / spread).mean(1)
