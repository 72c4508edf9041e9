"""Second moments of what MLP output projections read, over text that must stay: computed once, kept by content.

A moment belongs to one set of weights, one site and one list of token sequences; the name of its file is the sha256
of exactly these, so that nothing stale can be found and any number of processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from repforget.edit._collect import collect_text, new_statistics, text_sequences
from repforget.edit.surgery._rows import stranger_facts
from repforget.errors import ArtifactError, KnowledgeError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel, fingerprint
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Site
from repforget.stats import Statistics

FOLDER = "REPFORGET_CACHE"  # environment variable: a folder, or "none"
VERSION = "key-moments-1: every token but the first of each sequence, float64"
MEMORY = 4 << 30  # bytes of moments held at once

TokenRows = Sequence[Sequence[int]]


def cache_folder() -> Path | None:
    """Where moments are kept: ``REPFORGET_CACHE``, else the user's cache directory; None where that says "none"."""
    named = os.environ.get(FOLDER, "")
    if named.strip().lower() == "none":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(named).expanduser() if named else Path(base) / "repforget") / "moments"


def protected_texts(model: LoadedModel, data: EditData, strangers: int, seed: int) -> list[tuple[int, ...]]:
    """Token sequences that must stay: retained statements, general text, and statements about made-up people."""
    rows = text_sequences(model, data, data.retain)
    if strangers:
        rows += text_sequences(model, replace(data, general=()), stranger_facts(data, strangers, seed))
    if not rows:
        raise KnowledgeError("There is no retained and no general text to take key moments from: give the knowledge "
                             "probe items to keep.")  # fmt: skip
    return rows


def key_moments(
    model: LoadedModel, rows: TokenRows, layers: Sequence[int], *, progress: Progress | None = None
) -> dict[int, Statistics]:
    """Statistics of the MLP keys (mlp_post) of all tokens of ``rows`` but first ones, per layer, from the cache where
    they are known.

    Cost: one forward pass over the rows for what is not known, m x m float64 per layer; otherwise one read of the
    weights (to know whose moments they are). Parts computed by several processes are joined by
    :meth:`repforget.stats.Statistics.merge`. Under hooks (an edit that is attached) nothing is read or kept, because
    the weights do not say what these do.
    """
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    folder = None if hooked else cache_folder()
    keys = _keys(model, rows, [Site("mlp_post", layer) for layer in layers])
    found = {site: stats for site, key in keys.items() if folder and (stats := _known(folder, site, key))}
    missing = [site for site in keys if site not in found]
    size = max(1, MEMORY // (8 * site_map(model.module).mlp_width ** 2))
    for group in (missing[i : i + size] for i in range(0, len(missing), size)):
        fresh = _computed(model, rows, {site: keys[site] for site in group}, progress)
        for site, stats in fresh.items():
            _keep(stats, folder, keys[site])
        found |= fresh
    return {site.layer: found[site] for site in keys}


def _computed(
    model: LoadedModel, rows: TokenRows, keys: Mapping[Site, str], progress: Progress | None
) -> dict[Site, Statistics]:
    stats = new_statistics(model, list(keys))
    for site, key in keys.items():
        stats[site].meta["key"] = key

    def consume(values: dict[Site, Tensor]) -> None:
        for site, x in values.items():
            stats[site].update(x)

    collect_text(model, rows, list(keys), consume, progress=progress, description="reading keys of text")
    return stats


def _keys(model: LoadedModel, rows: TokenRows, sites: Sequence[Site]) -> dict[Site, str]:
    """Per site a hash of the weights as they are now, their dtype, the site and the token ids."""
    texts = hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()
    whose = [VERSION, fingerprint(model.module), str(model.dtype), texts]
    return {site: hashlib.sha256(json.dumps([*whose, str(site)]).encode()).hexdigest() for site in sites}


def _known(folder: Path, site: Site, key: str) -> Statistics | None:
    place = folder / f"{key}.safetensors"
    if not place.exists():
        return None
    try:
        stats = Statistics.load(place)
        if stats.meta.get("key") != key:
            raise ArtifactError(f"Statistics file '{place}' holds moments of something else.")
    except ArtifactError as error:
        warnings.warn(f"Kept moments of {site} are refused and computed again: {error}", stacklevel=3)
        return None
    return stats


def _keep(stats: Statistics, folder: Path | None, key: str) -> None:
    if folder is None:
        return
    try:
        stats.save(folder / f"{key}.safetensors")
    except OSError as error:
        warnings.warn(f"Moments cannot be kept in '{folder}' ({error}) and will be computed again: set {FOLDER} to a "
                      "folder that can be written, or to 'none'.", stacklevel=3)  # fmt: skip
