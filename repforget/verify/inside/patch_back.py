"""Where is the answer cut off? One layer of the original is put back into the edited model at a time."""

from __future__ import annotations

import numpy as np

from repforget.knowledge import View
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.inside.patch_depth import write_at

_Y = "probability of the truth with one write of the original"
MEASURES = {
    "attention": MeasureInfo("knowledge", "white-box", votes=False, teaches="one layer of the original",
                             curve=("attention of the original put back", "layer", _Y)),
    "mlp": MeasureInfo("knowledge", "white-box", votes=False, teaches="one layer of the original",
                       curve=("MLP of the original put back", "layer", _Y)),
}  # fmt: skip
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"max_layers": 2, "max_items": 64},
    "standard": {},
    "thorough": {"max_layers": 32, "max_items": 1000},
}
KINDS = {"attention": "attn_out", "mlp": "mlp_out"}


def patch_back(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    alternatives: int = 31, max_layers: int = 8, max_items: int = 200,
) -> Measurement:  # fmt: skip
    """Replace what one layer writes before the answer by what it writes in the original, and ask again.

    Per layer and kind of write (attention, MLP), at the positions that predict the answer; the values are those of the
    best layer by mean over items, the same maximum on every arm.  Descriptive: the original's write may hold the answer
    itself, so that a high value tells where the edited model waits for it, and not that it still knows.  A twin, which
    starts from another basis, says what such a write does in a stranger.  Models of another shape give NaN.  Cost: two
    captures and 2 x layers passes over the items.

    A low value does not show absence: one layer alone may not be enough.
    """
    items = ask.limited(view.forget, max_items, seed)
    original = references.original
    chosen = path.kept_paths(references, model, items, view.knowledge, forms=1, limit=alternatives)
    before = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
    same = (model.width, model.n_layers, type(model.module)) == (
        original.width, original.n_layers, type(original.module))  # fmt: skip
    nothing = ask.scores(items, np.full(len(items), np.nan))
    if not chosen or not same:
        return Measurement({"attention": nothing, "mlp": nothing, "attention_prior": before, "mlp_prior": before})
    layers = sorted({round(x) for x in np.linspace(0, model.n_layers - 1, min(max_layers, model.n_layers))})
    sites = {name: [Site(kind, layer) for layer in layers] for name, kind in KINDS.items()}
    tables = {name: np.zeros((len(layers), len(chosen))) for name in KINDS}
    for rows in track(progress, list(path.batches(model, chosen)), "putting layers back"):
        values = capture(original, [s for group in sites.values() for s in group], rows.batch, gather=rows.places)
        for name, group in sites.items():
            for k, site in enumerate(group):
                with hooks(model, {site: write_at(values[site], rows.places)}):
                    tables[name][k, rows.which] = path.read(path.logits_at(model, rows), rows)[0]
    scores, facts = {}, {}
    series: dict[str, tuple[float, ...]] = {"x": tuple(map(float, layers))}
    for name, table in tables.items():
        found = path.by_item(len(items), chosen, table)
        means = np.nanmean(found, axis=1)
        best = int(means.argmax())
        scores[name], scores[f"{name}_prior"] = ask.scores(items, found[best]), before
        series[name] = tuple(map(float, means))
        facts[f"layer of {name}"] = float(layers[best])
    return Measurement(scores, series, facts)
