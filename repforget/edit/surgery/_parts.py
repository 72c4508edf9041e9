"""Key moments computed in parts, by several processes or machines, and put together where no text counts twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repforget.edit.surgery._moments import MEMORY, TokenRows, _computed, _keys, cache_folder
from repforget.errors import ArtifactError, UsageError
from repforget.models.load import LoadedModel, fingerprint
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Site
from repforget.stats import Statistics


@dataclass(frozen=True)
class Merged:
    """One site's moments: of ``texts`` out of ``total`` sequences; ``kept``: where editors find them."""

    site: str
    tokens: int
    texts: int
    total: int
    kept: bool


def row_names(rows: TokenRows) -> list[str]:
    """What tells token sequences apart: the first 16 hex digits of their sha256."""
    return [hashlib.sha256(json.dumps(list(row)).encode()).hexdigest()[:16] for row in rows]


def write_part(
    model: LoadedModel, rows: TokenRows, layers: Sequence[int], part: int, parts: int, folder: Path,
    progress: Progress | None = None,
) -> int:  # fmt: skip
    """Write the moments of part ``part`` (1 to ``parts``) of ``rows``, one file per layer; returns its sequences.

    Equal sequences fall into one part. Cost: one forward pass over them; m x m float64 per layer, 4 GiB at once.
    """
    if not 1 <= part <= parts:
        raise UsageError(f"There is no part {part} of {parts}: the parts are 1 to {parts}.")
    if folder.exists():
        raise UsageError(f"'{folder}' exists already: name a new folder for the part.")
    own = [row for row, name in zip(rows, row_names(rows), strict=True) if int(name, 16) % parts == part - 1]
    if not own:
        raise UsageError(f"Part {part} of {parts} holds none of the {len(rows)} texts: use fewer parts.")
    sites = [Site("mlp_post", layer) for layer in layers]
    keys = _keys(model, rows, sites)
    whose = hashlib.sha256(json.dumps([fingerprint(model.module), str(model.dtype)]).encode()).hexdigest()
    size = max(1, MEMORY // (8 * site_map(model.module).mlp_width ** 2))
    for group in (sites[i : i + size] for i in range(0, len(sites), size)):
        for site, stats in _computed(model, own, {site: keys[site] for site in group}, progress).items():
            stats.meta.pop("key")
            stats.meta.update({"model": whose, "site": str(site), "whole": keys[site], "total": str(len(rows)),
                               "texts": json.dumps(row_names(own))})  # fmt: skip
            stats.save(folder / f"{site}.safetensors")
    return len(own)


def merge_parts(folders: Sequence[Path], out: Path) -> list[Merged]:
    """Add up the moments in ``folders``, site by site, into the new folder ``out``.

    Those of all texts are also kept where editors look for them. Raises UsageError for parts of other models, sites or
    texts, and where a text is in two of them; ArtifactError for damaged files.
    """
    if len(folders) < 2:
        raise UsageError("One part has nothing to be merged with: name two folders or more.")
    if out.exists():
        raise UsageError(f"'{out}' exists already: name a new folder for the merged moments.")
    files = [{path.name: path for path in sorted(folder.glob("*.safetensors"))} for folder in folders]
    for folder, found in zip(folders, files, strict=True):
        if not found:
            raise UsageError(f"'{folder}' holds no moments: give folders that 'repforget moments compute' wrote.")
        if found.keys() != files[0].keys():
            raise UsageError(f"'{folder}' holds moments of {', '.join(found)} and '{folders[0]}' of "
                             f"{', '.join(files[0])}: merge parts of the same sites.")  # fmt: skip
    for name in files[0]:  # all is read and refused before anything is written
        _together([found[name] for found in files])
    return [_keep(_together([found[name] for found in files]), out / name) for name in files[0]]


def _together(paths: Sequence[Path]) -> Statistics:
    first = _part(paths[0])
    total = first
    seen = dict.fromkeys(json.loads(first.meta["texts"]), paths[0])
    for path in paths[1:]:
        stats = _part(path)
        for field, what in (("model", "another model (or other weights, or another precision)"),
                            ("site", "another site"), ("whole", "other texts")):  # fmt: skip
            if stats.meta[field] != first.meta[field]:
                raise UsageError(f"'{path}' holds moments of {what} than '{paths[0]}': merge parts of one computation.")
        names = json.loads(stats.meta["texts"])
        twice = [name for name in names if name in seen]
        if twice:
            raise UsageError(f"'{path}' and '{seen[twice[0]]}' share {len(set(twice))} texts, which would count twice: "
                             "every part may be merged once.")  # fmt: skip
        seen |= dict.fromkeys(names, path)
        known = [*json.loads(total.meta["texts"]), *names]
        total = total.merge(stats)
        total.meta["texts"] = json.dumps(known)
    return total


def _part(path: Path) -> Statistics:
    stats = Statistics.load(path)
    if not {"model", "site", "whole", "total", "texts"} <= stats.meta.keys():
        raise ArtifactError(f"'{path}' does not say of which texts its moments are: give folders that 'repforget "
                            "moments compute' wrote.")  # fmt: skip
    return stats


def _keep(stats: Statistics, path: Path) -> Merged:
    stats.save(path)
    texts, total, folder = len(json.loads(stats.meta["texts"])), int(stats.meta["total"]), cache_folder()
    if texts == total and folder is not None:
        whole = Statistics.load(path)
        whole.meta = {"key": stats.meta["whole"]}
        whole.save(folder / f"{stats.meta['whole']}.safetensors")
    return Merged(stats.meta["site"], stats.n, texts, total, texts == total and folder is not None)
