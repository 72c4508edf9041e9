"""Does an autoencoder describe the site it is said to belong to?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from repforget.errors import ArtifactError, KnowledgeError, SiteError
from repforget.features.activity import TOKENS, Ids
from repforget.features.autoencoder import SparseAutoencoder
from repforget.models.capture import stream
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Site
from repforget.scoring.encode import pad_id, token_batches

CHECKED = 256  # texts that a check reads


def neighbours(model: LoadedModel, site: Site) -> tuple[Site, ...]:
    """The site itself and those of the same kind one layer before and after it."""
    places = site_map(model.module)
    size = places.size(site)
    near = [Site(site.kind, site.layer + k, site.head) for k in (-1, 0, 1) if 0 <= site.layer + k < places.n_layers]
    return tuple(other for other in near if other in places.sites and places.size(other) == size) or (site,)


def spread(sequences: Sequence[Ids], most: int) -> Sequence[Ids]:
    """At most ``most`` sequences, taken evenly."""
    return sequences[:: max(1, len(sequences) // most)][:most]


def unexplained(
    model: LoadedModel, sae: SparseAutoencoder, sequences: Sequence[Ids], sites: Sequence[Site] = (),
    progress: Progress | None = None,
) -> dict[Site, float]:  # fmt: skip
    """Fraction of variance unexplained at each site: sum |x - x'|² / sum |x - mean|², over all tokens but first ones.

    0 is a perfect reconstruction, 1 as good as the mean.  A low value does not show that the features mean anything.
    Cost: one forward per text, up to the deepest site.
    """
    asked = tuple(sites) or (sae.site,)
    batches = [b for _, b in token_batches(sequences, token_budget=TOKENS, pad_id=pad_id(model.tokenizer))]
    if not batches:
        raise KnowledgeError(f"There is no text on which the autoencoder at {sae.site} could be checked: give some.")
    missed, squares = dict.fromkeys(asked, 0.0), dict.fromkeys(asked, 0.0)
    sums = {site: torch.zeros(sae.width, dtype=torch.float64) for site in asked}
    tokens = 0
    local = sae.to(model.device)

    def note(values: dict[Site, Tensor], _: int) -> None:
        nonlocal tokens
        tokens += len(next(iter(values.values())))
        for site, x in values.items():
            sums[site] += x.double().sum(0).cpu()
            squares[site] += float(x.double().square().sum())
            missed[site] += float((x.float() - local.to(x.device).reconstruct(x)).double().square().sum())

    with torch.no_grad():
        stream(model, asked, track(progress, batches, "checking the site", len(batches)), "tokens", note)
    around = {site: squares[site] - float(sums[site].square().sum()) / max(1, tokens) for site in asked}
    return {site: missed[site] / max(around[site], 1e-300) for site in asked}


def check_site(
    model: LoadedModel, sae: SparseAutoencoder, sequences: Sequence[Ids], progress: Progress | None = None
) -> Mapping[Site, float]:
    """:func:`unexplained` at the site and its neighbours; SiteError names the one that fits where that is another, and
    where none is described better than by its mean.

    Files often count layers from the other side of a block: ``resid_pre.k`` is ``resid_post.(k-1)``.
    """
    places = site_map(model.module)
    if places.size(sae.site) != sae.width:
        raise ArtifactError(f"The autoencoder is {sae.width} wide and {sae.site} of '{model.name}' is "
                            f"{places.size(sae.site)}: it was made for another model or kind of site.")  # fmt: skip
    found = unexplained(model, sae, spread(sequences, CHECKED), neighbours(model, sae.site), progress)
    best = min(found, key=lambda site: found[site])
    table = ", ".join(f"{site} {value:.3f}" for site, value in found.items())
    if not found[best] < 1:
        raise SiteError(f"The autoencoder does not fit {sae.site}, where it is said to belong, nor the sites beside "
                        f"it: their mean would leave less variance unexplained ({table}); it was made for another "
                        "layer, kind of site or model.")  # fmt: skip
    if best != sae.site:
        raise SiteError(f"The autoencoder does not fit {sae.site}, where it is said to belong: it leaves the least "
                        f"variance unexplained at {best} ({table}); name that site, or turn the check "
                        "off.")  # fmt: skip
    return found
