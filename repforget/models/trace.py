"""The same sites through nnsight: for models that run elsewhere, and as a third opinion.

Reads embed, resid_pre, resid_mid, resid_post, attn_in, mlp_in, q, k, v, attn_z (and heads of these four),
attn_out, mlp_gate, mlp_up, mlp_post, mlp_out, final_norm and logits, wherever the architecture itself has
them; any other request is a SiteError. On Falcon ``mlp_out`` is refused: the block adds to that tensor in
place before nnsight's cache is read. Nothing can be written: use the plain hooks of
:mod:`repforget.models.capture`.

One fixed ``tracer.cache`` block does all reading, so that no user code is ever traced. nnsight replaces
``forward`` on the modules it is given, so a local model is handed over as a shadow that shares its weights.
This is the only module of the project that imports nnsight. It is not safe to use from several threads at
once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repforget.errors import SiteError, UsageError
from repforget.models._hooking import _output, input_device
from repforget.models._names import core, text_config
from repforget.models._shadow import shadow
from repforget.models.capture import Batch, Gather, select
from repforget.models.sites import PROVEN, Location, SiteMap, site_map
from repforget.records import Site

__all__ = ["TraceSource", "capture", "trace_source"]

Remote = bool | Literal["local"]


@dataclass(frozen=True)
class TraceSource:
    """nnsight around one model; build with :func:`trace_source`."""

    net: Any
    module: nn.Module
    remote: Remote
    prefix: str

    def capture(
        self, sites: Sequence[Site], batch: Batch, gather: Gather = "last", grad: bool = False
    ) -> dict[Site, Tensor]:
        """Return activations as :func:`repforget.models.capture.capture` does, through nnsight.

        Equal to plain hooks bit for bit on a local model. Cost: one full forward pass, and the memory of
        whole activations at the requested sites. ``grad`` is a UsageError: the cache is detached.
        """
        if grad:
            raise UsageError("nnsight's cache is detached, so that gradients cannot flow: capture with the "
                             "plain hooks of repforget.models.capture.")  # fmt: skip
        if not sites:
            raise UsageError("Capture needs at least one site, for example resid_post.3.")
        places = site_map(self.module)
        wanted = {site: _located(places, site) for site in dict.fromkeys(sites)}
        device = input_device(self.module)
        sent = batch.to(device) if device.type != "meta" else batch
        arguments: dict[str, Any] = {"attention_mask": sent.mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(type(self.module).forward).parameters:
            arguments["position_ids"] = sent.position_ids
        names = sorted({f"{self.prefix}{place.path}".rstrip(".") for place in wanted.values()})
        with torch.no_grad():
            cache = _cached(self.net, names, sent.ids, arguments, self.remote)
        return {site: self._read(cache, site, place, sent, gather) for site, place in wanted.items()}

    def _read(self, cache: Any, site: Site, place: Location, batch: Batch, gather: Gather) -> Tensor:
        name = f"{self.prefix}{place.path}".rstrip(".")
        try:
            entry = cache[name]
            value: Tensor = entry.input if place.side == "in" else _output(entry.output)
        except (KeyError, AttributeError) as reason:
            raise SiteError(f"nnsight did not reach site '{site}' (module '{name}'): read it with the plain "
                            "hooks of repforget.models.capture.") from reason  # fmt: skip
        if value.ndim == 2 and len(value) == batch.mask.numel():
            value = value.view(*batch.mask.shape, -1)
        return select(place.read(value), batch, gather)


def _located(places: SiteMap, site: Site) -> Location:
    if site.kind == "mlp_out" and places.anatomy.model_type == "falcon":
        raise SiteError(f"Site '{site}' cannot be read through nnsight in a Falcon model, whose block "
                        "overwrites it in place: use the plain hooks of repforget.models.capture.")  # fmt: skip
    return places.locate(site)


def _cached(net: Any, names: list[str], ids: Tensor, arguments: dict[str, Any], remote: Remote) -> Any:
    """The one traced block of the project: cache whole modules, run no code of ours inside."""
    where = {"remote": remote} if remote else {}
    with net.trace(ids, **arguments, **where) as tracer:
        cache = tracer.cache(modules=names, device=None, include_inputs=True).save()
    return cache


def trace_source(model: Any, *, remote: Remote = False) -> TraceSource:
    """Put nnsight around ``model``: a LoadedModel, a module, or (for ``remote=True``) a hub id.

    ``remote=True`` runs on NDIF and needs a hub id, a key in ``NDIF_API_KEY`` and the network; weights are
    never sent, so an edited model cannot be read there. ``remote="local"`` serialises the request and runs it
    here.
    """
    if remote is True:
        if not isinstance(model, str):
            raise UsageError("remote=True needs a hub id such as 'owner/model': weights are never sent, so a "
                             "model in memory (an edited one, say) cannot be read remotely; use "
                             "remote=False.")  # fmt: skip
        return _remote_source(model)
    if isinstance(model, str):
        raise UsageError(f"trace_source('{model}') without remote=True needs a loaded model: load it with "
                         "repforget.load first.")  # fmt: skip
    module = core(model)
    site_map(module)
    with _arguments_hidden():
        from nnsight import NNsight

        return TraceSource(NNsight(shadow(module)), module, remote, "model.")


def _remote_source(name: str) -> TraceSource:
    from transformers import AutoTokenizer

    with _arguments_hidden():
        from nnsight import TransformersModel

        # Without weights: the module tree is built on the meta device, and the tokenizer must be given.
        net = TransformersModel(name, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(name))
    module = core(net._module)
    kind = str(text_config(module).model_type)
    if kind not in PROVEN:
        raise SiteError(f"The sites of '{name}' cannot be proven without its weights: its model type "
                        f"'{kind}' is none of {', '.join(sorted(PROVEN))}; load it locally instead.")  # fmt: skip
    return TraceSource(net, module, True, "model.")


@contextmanager
def _arguments_hidden() -> Iterator[None]:
    """nnsight turns on its debug mode when *our* program was called with -v; show it no arguments."""
    kept = sys.argv
    sys.argv = kept[:1]
    try:
        yield
    finally:
        sys.argv = kept


def capture(
    model: Any, sites: Sequence[Site], batch: Batch, gather: Gather = "last", grad: bool = False
) -> dict[Site, Tensor]:
    """As :func:`repforget.models.capture.capture`, through nnsight on a local model."""
    return trace_source(model).capture(sites, batch, gather, grad)
