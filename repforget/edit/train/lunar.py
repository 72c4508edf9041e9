"""Make the states of forget prompts those of prompts about things the model knows nothing of, by one weight matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Edit, LowRankDelta
from repforget.edit._collect import collect_text, new_statistics, subsample
from repforget.edit.surgery._rows import stranger_facts
from repforget.errors import KnowledgeError, SiteError, UsageError
from repforget.knowledge import EditData
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Localization, Site
from repforget.scoring.encode import context_limit, encode_prompts, pad_id, token_batches
from repforget.stats import Statistics

DEPTH = 22 / 32
FAR = 0.25  # length of the way, in units of the spread of forget states, below which the notes warn


def lunar(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layer: Literal["auto"] | int = "auto", coefficient: float = 2.0,
    tokens: Literal["prompt", "last"] = "prompt", prompts: Literal["auto"] | list[str] = "auto",
    retain_weight: float = 1.0, ridge: float = 1e-3, max_facts: int = 4000,
) -> Edit:  # fmt: skip
    """Move the states of forget prompts along the way to prompts that the model cannot answer.

    ``r = mean h(prompts it cannot answer) - mean h(forget prompts)`` at resid_post of one layer, last prompt token.
    The layer's MLP output projection then solves in closed form, over its inputs a,
    ``min |D a_forget - c r|² + retain_weight |D a_retain|² + ridge |D|²`` (means over tokens), whose solution is of
    rank one: ``W += c r (M⁻¹ mean a_forget)ᵀ``, M the weighted second moments.  Source: Shen et al. 2025, arXiv
    2502.07218 (LUNAR), which descends to it without the ridge; means in place of sums, so that the size of the two
    sets does not weigh.  The notes say how much of c r arrives on forget tokens, and how much on retained ones.

    Args:
        layer: where; "auto" is the best layer of ``where``, else the one at 22/32 of the depth.
        coefficient: c, the length of the move in units of r.
        tokens: the forget tokens that are moved: all of the prompt but the first, or the last one alone.
        prompts: texts the model cannot answer or refuses; "auto" is the forget prompts with made-up names, which
            nobody known to the editor bears, in place of their subjects: a model that answers those as
            confidently has no such state, and
            the edit does little (the notes say so).
        retain_weight: weight of the retained statements and general texts, all their tokens but first ones.
        ridge: as a share of the mean second moment of M; pulls towards the weights as they are.
        max_facts: facts read per set, chosen by seed, and made-up prompts.

    Raises SiteError for a layer whose MLP has no two-dimensional output projection, or a norm behind it (then what
    arrives is not linear in the weights: train instead), KnowledgeError without facts or made-up names.  Cost: one
    forward over the facts, m x m float64, one solve.

    Weakness: one direction at one layer, which ablating that direction undoes.  What the layers below hold about the
    subject is not touched, and a changed answer does not show that nothing is left.
    """
    _check(data, coefficient, retain_weight, ridge)
    at = _layer(model, layer, where)
    forget, retain = subsample(data.forget, max_facts, seed), subsample(data.retain, max_facts, seed)
    asked = [fact.prompt for fact in forget]
    unknown = [fact.prompt for fact in stranger_facts(data, max_facts, seed)] if prompts == "auto" else prompts
    if not unknown:
        raise KnowledgeError("lunar made no prompts that the model cannot answer, because no two subjects have names "
                             "of several words that stand in their prompts: give some (prompts).")  # fmt: skip
    site, state = Site("mlp_post", at), Site("resid_post", at)
    stays = [*(fact.prompt + fact.answer for fact in retain), *data.general]
    own = _moments(model, site, asked, tokens, progress)
    kept = _moments(model, site, stays, "prompt", progress)
    there, here = _moments(model, state, unknown, "last"), _moments(model, state, asked, "last")
    way = there.mean_x - here.mean_x
    key = gate(own.mean_x, own.second_moment, kept.second_moment, retain_weight, ridge)
    weight = f"{site_map(model.module).anatomy.layers[at].down}.weight"
    delta = LowRankDelta(weight, (coefficient * way)[:, None].float().cpu(), key[None].float().cpu())
    arrives, spills = float(key @ own.mean_x), float(key @ kept.second_moment @ key) ** 0.5
    notes = [f"share of the move that arrives: {arrives:.3f} on forget tokens (mean), {spills:.3f} on retained ones "
             "(root mean square)"]  # fmt: skip
    if (far := float(way.norm() / here.cov.diagonal().sum().sqrt())) < FAR:
        notes.append(f"the way to the prompts the model cannot answer is {far:.2f} times the spread of forget states: "
                     "it hardly tells them apart, so expect little")  # fmt: skip
    settings = {"layer": at, "coefficient": coefficient, "tokens": tokens, "prompts": prompts,
                "retain_weight": retain_weight, "ridge": ridge, "max_facts": max_facts}  # fmt: skip
    return Edit.build("lunar", settings, model, data.digest, [delta], notes=notes)


def gate(mean: Tensor, forget: Tensor, retain: Tensor, retain_weight: float, ridge: float) -> Tensor:
    """The row v [m] that is nearest to 1 on forget inputs and to 0 on retained ones, by ridge regression.

    ``mean`` [m] of the forget inputs, second moments ``forget`` and ``retain`` [m, m], float64.
    """
    moment = forget + retain_weight * retain
    size = ridge * moment.diagonal().mean()
    found: Tensor = torch.linalg.solve(moment + size * torch.eye(len(mean)).to(moment), mean)
    return found


def _check(data: EditData, coefficient: float, retain_weight: float, ridge: float) -> None:
    if ridge <= 0 or retain_weight < 0 or coefficient == 0:
        raise UsageError(f"lunar was given coefficient {coefficient}, retain_weight {retain_weight}, ridge {ridge}: it "
                         "needs a coefficient other than 0, a weight of at least 0 and a positive ridge.")  # fmt: skip
    if not data.forget or not data.retain:
        missing = "retain" if data.forget else "forget"
        raise KnowledgeError(f"lunar needs facts to forget and facts to keep: the knowledge has no {missing} facts.")


def _layer(model: LoadedModel, layer: Literal["auto"] | int, where: Localization | None) -> int:
    depth = model.n_layers
    best = where.layers() if where is not None else ()
    at = (best[0] if best else int(DEPTH * depth)) if layer == "auto" else layer
    if not 0 <= at < depth:
        raise SiteError(f"Layer {at} was asked for: give one of 0 to {depth - 1}.")
    paths = site_map(model.module).anatomy.layers[at]
    if paths.down is None or paths.mlp_post_norm is not None:
        what = "batched experts" if paths.down is None else "a norm behind its MLP"
        raise SiteError(f"Layer {at} of '{model.name}' has {what}, so that lunar has no closed form there: choose an "
                        "editor that trains, for example representation_rerouting.")  # fmt: skip
    return at


def _encoded(model: LoadedModel, texts: Sequence[str]) -> list[tuple[int, ...]]:
    limit = context_limit(model)
    fitting = [ids for ids in encode_prompts(model.tokenizer, list(texts)) if 1 < len(ids) <= limit]
    if not fitting:
        raise KnowledgeError(f"None of the {len(texts)} texts lunar reads has 2 to {limit} tokens: shorten them.")
    return fitting


def _moments(
    model: LoadedModel, site: Site, texts: Sequence[str], tokens: Literal["prompt", "last"],
    progress: Progress | None = None,
) -> Statistics:  # fmt: skip
    """Moments of a site over the tokens of texts but the first, or over their last ones."""
    found, sequences = new_statistics(model, [site])[site], _encoded(model, texts)
    if tokens == "prompt":
        collect_text(model, sequences, [site], lambda values: found.update(values[site]), progress=progress)
    else:
        for _, batch in token_batches(sequences, pad_id=pad_id(model.tokenizer)):
            found.update(capture(model, [site], batch)[site])
    return found
