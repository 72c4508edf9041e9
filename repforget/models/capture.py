"""Plain hooks on the user's own module: read, write, stop early. The default source of activations.

Reading adds some tens of microseconds per site to the forward pass (experiments/speed), ends right after the
deepest requested site and skips the vocabulary projection. Nothing stays behind: every hook is removed on the way
out, whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repforget.errors import NumericalError, SiteError, UsageError
from repforget.models._hooking import attach, eager, input_device, run_forward
from repforget.models._names import core
from repforget.models.gather import Batch, Gather, select
from repforget.models.sites import Location, SiteMap, site_map
from repforget.records import Site

__all__ = ["Batch", "Gather", "capture", "forward", "hooks", "select", "stream"]

EditSite = Callable[[Tensor], Tensor | None]
BLOCK_KINDS = frozenset({"embed", "resid_pre", "resid_post", "final_norm", "logits"})  # outside any checkpointing


class _Reached(Exception):
    """Not an error: the forward pass may end, because everything is read."""


def capture(
    model: Any, sites: Sequence[Site], batch: Batch, gather: Gather = "last", grad: bool = False
) -> dict[Site, Tensor]:
    """Return the activations of ``batch`` at ``sites``, selected by ``gather`` and copied.

    Args:
        model: a LoadedModel, or a transformers causal language model (compiled or with adapters as well).
        sites: where to read; head sites give that head's slice. Duplicates are read once.
        batch: token ids [b, s] with their mask, padded on either side.
        gather: "last" -> [b, d], the last real token; "mean" -> [b, d], real tokens without each row's first;
            "all" -> [b, s, d]; "tokens" -> [n, d], the tokens of "mean"; or positions [b] or [b, k] -> [b, d]
            or [b, k, d], as indices into the padded row.
        grad: keep the graph, so that gradients flow from the result to the parameters.

    Raises:
        SiteError: a site this model does not have, or that did not run. NumericalError: a selected activation
            is NaN or infinite; names the first such site. UsageError: positions or ids out of range.

    Cost: one forward pass up to the deepest site; memory of the selected positions only. The values say what
    the model computed on these tokens, not what it would compute had the same tokens come with other
    neighbours.
    """
    with _reader(model, sites, grad) as read:
        return read(batch, gather)


def stream(
    model: Any, sites: Sequence[Site], batches: Iterable[Batch], gather: Gather | Callable[[int], Gather],
    consume: Callable[[dict[Site, Tensor], int], None],
) -> None:  # fmt: skip
    """Call ``consume(values, i)`` for the ``i``-th batch and keep nothing: memory does not grow with their
    number.

    ``gather`` is the same for all batches, or a function of the batch's number (for positions). Hooks are
    attached once. Costs one forward pass per batch, up to the deepest site.
    """
    with _reader(model, sites, grad=False) as read:
        for index, batch in enumerate(batches):
            consume(read(batch, gather(index) if callable(gather) else gather), index)


@contextmanager
def hooks(model: Any, edits: Mapping[Site, EditSite]) -> Iterator[None]:
    """Change activations while inside: each function gets a site's value and returns a new one, or None.

    The value is [b, s, d] (one head's slice for a head site; s = 1 per step when decoding with a cache). A
    function must return a new tensor of that shape instead of writing in place. Several edits of one tensor
    act in the order given. ``resid_mid`` is written by adding the change to what attention writes, so that
    the MLP and the skip path both see it. Afterwards the model computes bit for bit what it did before.
    """
    module = core(model)
    places = site_map(module)
    located = {site: places.locate(site) for site in edits}  # unknown sites fail before anything is attached
    ordered = sorted(edits, key=lambda site: site.kind == "resid_mid")  # after other edits of attn_out
    with ExitStack() as stack:
        stack.enter_context(eager())
        shapes: dict[int, torch.Size] = {}
        for layer in {site.layer for site in edits if located[site].flat}:
            place = places.locate(Site("resid_pre", layer))
            stack.callback(attach(module, place, _remember(shapes, layer)).remove)
        for site in ordered:
            if site.kind == "resid_mid":
                _attach_mid(stack, module, places, site, edits[site])
                continue
            visit = _edit(site, located[site], edits[site], shapes)
            stack.callback(attach(module, located[site], visit).remove)
        yield


def forward(model: Any, batch: Batch, grad: bool = False) -> Tensor:
    """Return the logits [b, s, V] of a batch, with position ids that make either padding side exact."""
    module = core(model)
    with torch.inference_mode(False), torch.set_grad_enabled(grad), eager():
        return run_forward(module, _sent(module, batch), vocabulary=True).logits  # type: ignore[no-any-return]


def _sent(module: nn.Module, batch: Batch) -> Batch:
    vocabulary = len(module.get_input_embeddings().weight)  # type: ignore[operator]
    if batch.ids.device.type == "cpu" and not 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < vocabulary:
        raise UsageError(f"Token ids lie outside the model's vocabulary of {vocabulary}: were they made by "
                         "another model's tokenizer?")  # fmt: skip
    return batch.to(input_device(module))


@contextmanager
def _reader(model: Any, sites: Sequence[Site], grad: bool) -> Iterator[Callable[[Batch, Gather], dict[Site, Tensor]]]:
    """Attach reading hooks once and yield ``read(batch, gather)``."""
    module = core(model)
    places = site_map(module)
    wanted = sorted(dict.fromkeys(sites), key=places.rank)
    if not wanted:
        raise UsageError("Capture needs at least one site, for example resid_post.3.")
    vocabulary = any(site.kind == "logits" for site in wanted)
    values: dict[Site, Tensor] = {}
    now: list[tuple[Batch, Gather]] = []

    def visitor(site: Site, place: Location) -> Callable[[Tensor], None]:
        def visit(full: Tensor) -> None:
            values[site] = select(place.read(full), *now[-1])
            if len(values) == len(wanted):
                raise _Reached

        return visit

    def read(batch: Batch, gather: Gather) -> dict[Site, Tensor]:
        values.clear()
        now[:] = [(_sent(module, batch), gather)]
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                run_forward(module, now[0][0], vocabulary=vocabulary)
        except _Reached:
            pass
        finally:
            now.clear()
        found = {site: values[site] for site in sites if site in values}
        values.clear()
        if len(found) < len(wanted):
            missed = next(site for site in wanted if site not in found)
            raise SiteError(f"Site '{missed}' was not reached by the forward pass; is its layer skipped or replaced?")
        _check_finite(found, wanted, batch, gather)
        return found

    with ExitStack() as stack:
        stack.enter_context(eager())
        if grad and any(site.kind not in BLOCK_KINDS for site in wanted):
            stack.enter_context(_without_checkpointing(module))
        for site in wanted:
            place = places.locate(site)
            stack.callback(attach(module, place, visitor(site, place)).remove)
        yield read


@contextmanager
def _without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Inside a checkpointed block nothing keeps its graph, so such a capture runs with checkpointing off."""
    parts: list[Any] = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False) is True]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


def _check_finite(found: Mapping[Site, Tensor], wanted: Iterable[Site], batch: Batch, gather: Gather) -> None:
    sums = [found[site].detach().sum(dtype=torch.promote_types(found[site].dtype, torch.float32)) for site in wanted]
    if bool(torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all()):  # one look, one synchronisation
        return
    for site in wanted:
        value = found[site].detach()
        if isinstance(gather, str) and gather == "all":  # padding may hold anything
            value = value[batch.mask.bool().to(value.device)]
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(f"Activations at '{site}' are NaN or infinite on this batch, and no "
                                 "statistic of them means anything; use a wider dtype (float32, bfloat16) or "
                                 "check the weights.")  # fmt: skip


def _edit(site: Site, place: Location, function: EditSite, shapes: Mapping[int, torch.Size]) -> EditSite:
    def visit(full: Tensor) -> Tensor | None:
        x = full.view(*shapes[site.layer], -1) if place.flat and full.ndim == 2 else full
        part = place.read(x)
        new = function(part)
        if new is None:
            return None
        return place.write(x, _checked(site, part, new)).reshape(full.shape)

    return visit


def _checked(site: Site, old: Tensor, new: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise UsageError(f"The edit at '{site}' returned shape {tuple(new.shape)} where {tuple(old.shape)} "
                         "is needed; return a tensor of the same shape, or None.")  # fmt: skip
    return new.to(old.device, old.dtype)


def _remember(shapes: dict[int, torch.Size], layer: int) -> Callable[[Tensor], None]:
    def visit(full: Tensor) -> None:
        shapes[layer] = full.shape[:2]

    return visit


def _attach_mid(stack: ExitStack, module: nn.Module, places: SiteMap, site: Site, function: EditSite) -> None:
    """Write resid_mid: the block's input is remembered, and attention's write is changed by the difference."""
    entering: list[Tensor] = []

    def enter(full: Tensor) -> None:
        entering[:] = [full]

    def visit(written: Tensor) -> Tensor | None:
        middle = entering[0] + written
        new = function(middle)
        return None if new is None else written + (_checked(site, middle, new) - middle)

    stack.callback(entering.clear)
    for kind, hook in (("resid_pre", enter), ("attn_out", visit)):
        stack.callback(attach(module, places.locate(Site(kind, site.layer)), hook).remove)
