"""The autoencoder that a method asked for: read from a file and checked against its site, or trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from repforget.errors import UsageError
from repforget.features.activity import Ids, told
from repforget.features.autoencoder import SparseAutoencoder
from repforget.features.files import read
from repforget.features.fit import check_site, spread
from repforget.features.train import train_features
from repforget.knowledge import EditData
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Site
from repforget.scoring.encode import pad_id

TRAIN = "train"
SAMPLE = 64  # texts on which the threshold of a top-k autoencoder is set


@dataclass(frozen=True)
class Source:
    """What was asked for: ``sae`` a path or "train", at ``sites`` (none: the file's own), and how one is trained."""

    sae: str
    sites: tuple[Site, ...] = ()
    check: bool = True
    size: int = 0
    active: int = 8
    steps: int | Literal["auto"] = "auto"
    seed: int = 0


def obtain(
    model: LoadedModel, data: EditData, source: Source, progress: Progress | None = None
) -> tuple[dict[Site, SparseAutoencoder], tuple[str, ...], int]:
    """Autoencoders by site whose features look at their own row alone; notes; and how many texts were run for it.

    "train" trains small ones on the editor's own statements and general texts: their features describe those texts and
    no others, and what they leave unexplained is in the notes.  A file is checked against its site unless ``check`` is
    off.  Raises what reading, checking and training raise.
    """
    texts = told(model, [*data.forget, *data.retain], data.general)
    if source.sae == TRAIN:
        if not source.sites:
            raise UsageError("An autoencoder is to be trained and no site was named: name one, such as resid_post.3.")
        for site in source.sites:
            site_map(model.module).locate(site)
        found = train_features(model, source.sites, texts, size=source.size, active=source.active, steps=source.steps,
                               seed=source.seed, progress=progress)  # fmt: skip
        runs = max(one.texts for one in found.values())
        return {site: one.sae for site, one in found.items()}, tuple(one.note for one in found.values()), runs
    if len(source.sites) > 1:
        raise UsageError(f"'{source.sae}' is the autoencoder of one site and {len(source.sites)} were asked for: name "
                         "one of them.")  # fmt: skip
    sae = read(source.sae, source.sites[0] if source.sites else None)
    notes: list[str] = []
    if source.check:
        left = check_site(model, sae, texts, progress)
        notes.append(f"autoencoder at {sae.site}: {left[sae.site]:.3f} of the variance unexplained there")
    if sae.activation == "topk":
        sae = _independent(model, sae, texts)
        notes.append("its top-k rule became a common threshold, so that a feature depends on its own row alone")
    return {sae.site: sae}, tuple(notes), 0


def _independent(model: LoadedModel, sae: SparseAutoencoder, texts: Sequence[Ids]) -> SparseAutoencoder:
    batch = Batch.pad(spread(texts, SAMPLE), pad_id(model.tokenizer))
    with torch.no_grad():
        return sae.thresholded(capture(model, [sae.site], batch, "tokens")[sae.site].cpu())
