"""Turn features of a sparse autoencoder around inside the value vectors of one MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Edit, LowRankDelta
from repforget.edit._features import Chosen, Wanted, choose, of_kind
from repforget.errors import NoEffectError, SiteError, UsageError
from repforget.features import TRAIN, importance_ratio
from repforget.features.activity import TOKENS, Ids
from repforget.knowledge import EditData
from repforget.models.capture import stream
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.models.weights import find, get_weight
from repforget.progress import Progress
from repforget.records import Localization, Site
from repforget.scoring.encode import pad_id, token_batches


def pisces(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, sae: str = TRAIN, sites: Literal["auto"] | list[str] = "auto",
    check: bool = True, size: int = 0, active: int = 8, sae_steps: int | Literal["auto"] = "auto",
    features: int = 20, percentile: float = 80.0, threshold: float = 0.3, strength: float = 2.0,
    max_facts: int = 1024,
) -> Edit:  # fmt: skip
    """Make MLP neurons that write a forget feature write its opposite, by their value vectors alone.

    With an autoencoder of mlp_out, z = encoder W_out (no biases: the encoder was made for activations, and what matters
    is how neurons compare) says how much of feature i the value vector of neuron j holds.  Where |z_ij| > ``threshold``
    max_j |z_ij|, z_ij becomes ``-strength`` max_j |z_ij| times the sign that the neuron's activation mostly has on
    forget tokens, so that its part counts against the feature; decoded with the old error added, the value vector moves
    by (z' - z)_ij d_i.  Source: Gur-Arieh et al. 2025, arXiv 2505.22586 (PISCES), where features are found by the
    words they raise; here by the ratio of squared mean values, ``features`` of those above the ``percentile``.

    Args:
        sae: folder or file of an autoencoder of mlp_out, or "train": a small one is trained on the editor's forget and
            retain statements, so that its features describe these texts alone.
        sites: where; "auto" is the file's site, or mlp_out of the best layer of ``where``, else of the middle one.
            Features that ``where`` ranked for the same autoencoder are taken instead of the rule's.
        check: refuse a file that fits a neighbouring site better.
        size: features of a trained one, 0 for four times the width; active: per token; sae_steps: to train it.
        max_facts: facts read per set, chosen by seed.

    Raises SiteError for another kind of site, for batched experts and for a norm behind the MLP (then the value vectors
    are not what the autoencoder reads), NoEffectError where no feature is left.  Cost: two forwards per fact, and
    training; no gradient.

    Weakness: a feature that many neurons write in small parts stays; attention may write it as well.  That the feature
    is turned around does not show that the answer cannot be told from the rest.
    """
    if not 0.0 <= threshold < 1.0 or strength < 0 or not 0.0 <= percentile <= 100.0:
        raise UsageError(f"pisces was given threshold {threshold}, strength {strength} and percentile {percentile}: "
                         "give 0 to 1, at least 0 and a percentage.")  # fmt: skip
    _check(model)
    wanted = Wanted(sae, sites, check, size, active, sae_steps, features, max_facts, "mlp_out",
                    lambda forget, retain: importance_ratio(forget, retain, percentile))  # fmt: skip
    chosen = choose(model, data, wanted, where, seed, progress)
    of_kind(chosen, "mlp_out", "pisces")
    notes = [note for one in chosen for note in one.notes]
    operations = []
    for one in chosen:
        layer = one.sae.site.layer
        ref = find(model.module, "mlp_out", layer)
        sign = majority_sign(model, Site("mlp_post", layer), one.forget_texts).to("cpu")
        held = one.sae.encoder[one.features] @ get_weight(model.module, ref).float().cpu()
        moved = turned(held, sign, threshold, strength) - held
        notes.append(f"{int((moved != 0).any(0).sum())} of {moved.shape[1]} value vectors of layer {layer} changed")
        operations.append(LowRankDelta(ref.name, _directions(one).T.contiguous(), moved))
    settings = {**wanted.settings(chosen), "sites": [str(one.sae.site) for one in chosen], "percentile": percentile,
                "threshold": threshold, "strength": strength}  # fmt: skip
    return Edit.build("pisces", settings, model, data.digest, operations, notes=notes)


def turned(held: Tensor, sign: Tensor, threshold: float, strength: float) -> Tensor:
    """``held`` [n, m] with what each feature's main neurons hold of it replaced by the opposite of their ``sign``."""
    most = held.abs().amax(1, keepdim=True)
    return torch.where(held.abs() > threshold * most, -strength * most * sign, held)


def majority_sign(model: LoadedModel, site: Site, sequences: Sequence[Ids]) -> Tensor:
    """+1 or -1 [m]: the sign that most of a neuron's activations have on the tokens (but first ones)."""
    total: list[Tensor] = []
    batches = [b for _, b in token_batches(sequences, token_budget=TOKENS, pad_id=pad_id(model.tokenizer))]
    stream(model, [site], batches, "tokens", lambda values, _: total.append(values[site].sign().double().sum(0).cpu()))
    return torch.where(torch.stack(total).sum(0) < 0, -1.0, 1.0)


def _directions(one: Chosen) -> Tensor:
    """Decoder rows [n, d] for values of the plain encoder; a scaled autoencoder writes in units of its input."""
    if one.sae.scaling != "none":
        raise NoEffectError(f"The autoencoder at {one.sae.site} scales its inputs ({one.sae.scaling}), so that a value "
                            "vector has no fixed length in it: take one without.")  # fmt: skip
    return one.sae.decoder[one.features]


def _check(model: LoadedModel) -> None:
    for layer, paths in enumerate(site_map(model.module).anatomy.layers):
        what = "batched experts" if paths.down is None else "a norm behind its MLP" if paths.mlp_post_norm else ""
        if what:
            raise SiteError(f"Layer {layer} of '{model.name}' has {what}, so that its value vectors are not what an "
                            "autoencoder of mlp_out reads: clamp features instead (sae_clamp, dsg).")  # fmt: skip
