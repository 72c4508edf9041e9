"""The features that an editor acts on: an autoencoder obtained, its features compared on forget and retained texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.artifact import ClampFeatures
from repforget.edit._collect import subsample
from repforget.errors import NoEffectError, SiteError, UsageError
from repforget.features import TRAIN, Activity, Source, SparseAutoencoder, measure, obtain, told
from repforget.features.activity import Ids
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Localization, Site

Rule = Callable[[Activity, Activity], Tensor]
Steps = int | Literal["auto"]


@dataclass(frozen=True)
class Wanted:
    """Which autoencoder and which of its features: the settings that these editors share.

    ``kind`` of site where none is named; ``rule`` scores features, of which the best ``count`` are taken.
    """

    sae: str
    sites: Literal["auto"] | Sequence[str]
    check: bool
    size: int
    active: int
    sae_steps: Steps
    features: int
    max_facts: int
    kind: str
    rule: Rule

    def settings(self, chosen: Sequence[Chosen]) -> dict[str, Any]:
        """As the manifest has them, with what "auto" came to."""
        names = ("sae", "check", "size", "active", "sae_steps", "features", "max_facts")
        found = {str(one.sae.site): one.features.tolist() for one in chosen}
        return {**{name: getattr(self, name) for name in names}, "chosen_features": found}


@dataclass(frozen=True)
class Chosen:
    """Features of one autoencoder, best first, what all of them do on both kinds of text, and these texts."""

    sae: SparseAutoencoder
    features: Tensor
    forget: Activity
    retain: Activity
    forget_texts: tuple[Ids, ...]
    retain_texts: tuple[Ids, ...]
    notes: tuple[str, ...]

    @property
    def usual(self) -> Tensor:
        """Mean value of each chosen feature on the forget tokens where it is active [n], float32."""
        return self.forget.when_active[self.features].float()

    def clamp(self, factor: float, value: Tensor, **changes: Any) -> ClampFeatures:
        """The operation that takes the chosen features to ``factor`` times themselves plus ``value`` [n]."""
        encoder, bias, threshold = (t[self.features] for t in self.sae.rows())
        return ClampFeatures(self.sae.site, encoder, bias, threshold, self.sae.decoder[self.features],
                             torch.full_like(bias, factor), value, self.sae.scaling, **changes)  # fmt: skip


def choose(
    model: LoadedModel, data: EditData, wanted: Wanted, where: Localization | None, seed: int,
    progress: Progress | None,
) -> tuple[Chosen, ...]:  # fmt: skip
    """The chosen features of every site asked for; NoEffectError where the rule finds none at any of them.

    A localisation that ranked features of the same autoencoder (by its digest) chooses instead of the rule.
    """
    if wanted.features < 1 or wanted.max_facts < 1:
        raise UsageError(f"{wanted.features} features of at most {wanted.max_facts} facts were asked for: give at "
                         "least one of both.")  # fmt: skip
    source = Source(wanted.sae, _sites(model, wanted, where), wanted.check, wanted.size, wanted.active,
                    wanted.sae_steps, seed)  # fmt: skip
    saes, notes, _ = obtain(model, data, source, progress)
    forget = tuple(told(model, subsample(data.forget, wanted.max_facts, seed)))
    retain = tuple(told(model, subsample(data.retain, wanted.max_facts, seed), data.general))
    found: list[Chosen] = []
    for site, sae in saes.items():
        seen = measure(model, sae, forget, progress), measure(model, sae, retain, progress)
        located = _located(where, site, sae)
        ranked = located if located is not None else _best(wanted.rule(*seen))
        own = [] if found else list(notes)
        if located is not None:
            own.append(f"features at {site} are those of the localisation")
        if len(ranked):
            ranked = ranked[: wanted.features]
            on, off = (float(a.frequency[ranked].sum()) for a in seen)
            own.append(f"{len(ranked)} features at {site}: active {on:.3f} times per forget token, {off:.3f} per "
                       "retained one")  # fmt: skip
            found.append(Chosen(sae, ranked, *seen, forget, retain, tuple(own)))
    if not found:
        raise NoEffectError(f"No feature of the autoencoder at {', '.join(map(str, saes))} tells forget facts from "
                            "retained ones by this rule: loosen it, or take a larger autoencoder or another "
                            "site.")  # fmt: skip
    return tuple(found)


def _best(scores: Tensor) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    return order[scores[order] > 0]


def _located(where: Localization | None, site: Site, sae: SparseAutoencoder) -> Tensor | None:
    known = where.settings.get("autoencoders", {}) if where is not None else {}
    if where is None or known.get(str(site)) != sae.digest:
        return None
    ranked = [c.feature for c, score in zip(where.components, where.scores, strict=True)
              if c.site == site and c.feature is not None and score > 0]  # fmt: skip
    return torch.tensor(ranked, dtype=torch.long)


def _sites(model: LoadedModel, wanted: Wanted, where: Localization | None) -> tuple[Site, ...]:
    places = site_map(model.module)
    if wanted.sites != "auto":
        found = tuple(dict.fromkeys(site for text in wanted.sites for site in places.expand(text)))
        if not found:
            raise UsageError("No site was named: give at least one, for example 'resid_post.3', or write 'auto'.")
        return found
    if wanted.sae != TRAIN:
        return ()
    kinds = places.expand(wanted.kind)
    layers = (where.layers(wanted.kind) or where.layers()) if where is not None else ()
    best = next((site for layer in layers for site in kinds if site.layer == layer), None)
    return (best or kinds[len(kinds) // 2],)


def of_kind(chosen: Sequence[Chosen], kind: str, method: str) -> None:
    """SiteError unless every autoencoder describes sites of ``kind``."""
    other = next((one.sae.site for one in chosen if one.sae.site.kind != kind), None)
    if other is not None:
        raise SiteError(f"{method} acts on autoencoders of {kind} and was given one of {other}: take one of "
                        f"{kind}.{other.layer}, or train one.")  # fmt: skip
