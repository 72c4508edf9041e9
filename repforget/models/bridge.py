"""The same sites through TransformerLens: for head, neuron and circuit work on a parameter-sharing shadow.

Covers embed, resid_pre, resid_mid, resid_post, attn_in, mlp_in, q, k, v, attn_z (and heads of these four),
attn_out, mlp_gate, mlp_up, mlp_post, mlp_out, final_norm and logits, wherever the architecture itself has
them; any other request is a SiteError. ``logits`` can be read but not written.

The user's module is never touched: TransformerLens rewrites the tree it is given, so it gets a shadow. This
is the only module of the project that imports TransformerLens, and it undoes what importing it does to
logging.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repforget.errors import SiteError, UsageError
from repforget.models._hooking import input_device
from repforget.models._names import core
from repforget.models._shadow import shadow, state_key
from repforget.models.capture import Batch, EditSite, Gather, forward, select
from repforget.models.check import TOLERANCE, probe_batch
from repforget.models.sites import SiteMap, site_map
from repforget.records import GLOBAL_KINDS, HEAD_KINDS, Site

__all__ = ["LensSource", "capture", "lens_source"]

_GLOBAL = {"embed": "hook_embed", "final_norm": "ln_final.hook_out"}
_BLOCK = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_in": "attn.hook_in", "mlp_in": "mlp.hook_in", "q": "attn.hook_q", "k": "attn.hook_k",
    "v": "attn.hook_v", "attn_z": "attn.hook_z", "attn_out": "hook_attn_out", "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}  # fmt: skip


@dataclass(frozen=True)
class LensSource:
    """A TransformerBridge over a shadow of one model, proven to give its logits; build with
    :func:`lens_source`.

    ``bridge`` is TransformerLens' own object, for its analysis tools. Edits made by in-place writes to the
    model's weights are seen, except where TransformerLens holds copies (fused query-key-value); any change
    that is noticed makes the source refuse to run until it is built again.
    """

    bridge: Any
    module: nn.Module
    parity: float
    copied: frozenset[int]
    key: Hashable

    @property
    def stale(self) -> bool:
        """True when weights, modules or hooks of the model changed since the source was built."""
        return state_key(self.module, self.copied) != self.key

    def capture(
        self, sites: Sequence[Site], batch: Batch, gather: Gather = "last", grad: bool = False
    ) -> dict[Site, Tensor]:
        """Return activations as :func:`repforget.models.capture.capture` does, through TransformerLens.

        Agrees with plain hooks to rounding (1e-5 in float32). Cost: one forward pass up to the deepest block,
        with about 0.7 ms of overhead per layer. What it shows is the model's own computation with eager
        attention.
        """
        if not sites:
            raise UsageError("Capture needs at least one site, for example resid_post.3.")
        places = self._checked(sites)
        values: dict[Site, Tensor] = {}
        sent = batch.to(input_device(self.module))
        named: dict[str, list[Site]] = {}
        for site in dict.fromkeys(s for s in sites if s.kind != "logits"):
            named.setdefault(tl_name(places, site), []).append(site)

        def visitor(wanted: Sequence[Site]) -> Callable[[Tensor, Any], None]:
            def visit(x: Tensor, hook: Any) -> None:
                for site in wanted:
                    values[site] = select(_part(places, site, x), sent, gather)

            return visit

        hooked = [(name, visitor(wanted)) for name, wanted in named.items()]
        deep = any(site.kind in ("logits", "final_norm") for site in sites)
        last = None if deep else 1 + max(site.layer for site in sites)
        stop = {} if last is None or last >= places.n_layers else {"stop_at_layer": max(last, 1)}
        with torch.set_grad_enabled(grad), self.bridge.hooks(fwd_hooks=hooked):
            out = self.bridge(sent.ids, attention_mask=sent.mask.long(), **stop)
        if any(site.kind == "logits" for site in sites):
            values[Site("logits")] = select(out, sent, gather)
        missed = [str(site) for site in sites if site not in values]
        if missed:
            raise SiteError(f"TransformerLens did not reach site '{missed[0]}' in this model: read it with "
                            "the plain hooks of repforget.models.capture instead.")  # fmt: skip
        return {site: values[site] for site in sites}

    @contextmanager
    def hooks(self, edits: Mapping[Site, EditSite]) -> Iterator[None]:
        """Change activations of the *bridge* (not of the user's model) while inside; see :meth:`forward`.

        Functions get [b, s, d] (a head's slice for head sites) and return a new value of that shape, or None.
        """
        if any(site.kind == "logits" for site in edits):
            raise SiteError("Site 'logits' cannot be written through TransformerLens: use "
                            "repforget.models.capture.hooks.")  # fmt: skip
        places = self._checked(list(edits))

        def visitor(site: Site, function: EditSite) -> Callable[[Tensor, Any], Tensor | None]:
            def visit(x: Tensor, hook: Any) -> Tensor | None:
                new = function(_part(places, site, x))
                return None if new is None else _put(places, site, x, new)

            return visit

        hooked = [(tl_name(places, site), visitor(site, function)) for site, function in edits.items()]
        with self.bridge.hooks(fwd_hooks=hooked):
            yield

    def forward(self, batch: Batch, grad: bool = False) -> Tensor:
        """Return the bridge's logits [b, s, V] with whatever hooks are on it."""
        self._checked([])
        sent = batch.to(input_device(self.module))
        with torch.set_grad_enabled(grad):
            return self.bridge(sent.ids, attention_mask=sent.mask.long())  # type: ignore[no-any-return]

    def _checked(self, sites: Sequence[Site]) -> SiteMap:
        if self.stale:
            raise UsageError("The model changed (weights, modules or hooks) after its TransformerLens source "
                             "was built, so that the two may differ: build it again with "
                             "lens_source(model).")  # fmt: skip
        places = site_map(self.module)
        for site in sites:
            places.locate(site)
            if site.kind != "logits" and tl_name(places, site) not in self.bridge.hook_dict:
                raise SiteError(f"TransformerLens has no hook '{tl_name(places, site)}' for site '{site}' in "
                                "this model: read it with the plain hooks of repforget.models.capture.")  # fmt: skip
        return places


def tl_name(places: SiteMap, site: Site) -> str:
    """The TransformerLens hook of a site (of the whole site, for a head)."""
    if site.kind in GLOBAL_KINDS:
        return _GLOBAL[site.kind]
    gated = "mlp_gate" in places.kinds
    name = {"mlp_gate": "mlp.hook_pre", "mlp_up": "mlp.hook_pre_linear" if gated else "mlp.hook_pre"}
    return f"blocks.{site.layer}.{_BLOCK.get(site.kind) or name[site.kind]}"


def _part(places: SiteMap, site: Site, x: Tensor) -> Tensor:
    """A hook's value as [b, s, d]; heads lie on an axis of their own in TransformerLens."""
    if site.kind not in HEAD_KINDS or x.ndim == 3:
        return x
    return x.flatten(-2) if site.head is None else x[..., site.head, :]


def _put(places: SiteMap, site: Site, x: Tensor, new: Tensor) -> Tensor:
    if site.kind not in HEAD_KINDS or x.ndim == 3:
        return new.to(x.dtype)
    if site.head is None:
        return new.to(x.dtype).view(x.shape)
    out = x.clone()
    out[..., site.head, :] = new
    return out


def lens_source(model: Any) -> LensSource:
    """Build a TransformerLens bridge over a shadow of ``model`` and prove that it gives the model's logits.

    Raises SiteError when it does not (adapters on fused projections, 8-bit weights, architectures that
    TransformerLens does not know), because everything read from it would describe another model. Cost: two
    short forward passes and the module tree; weights are shared, except fused query-key-value projections.
    """
    module = core(model)
    site_map(module)  # an architecture that is not covered is refused before anything is built
    with _logging_kept():
        bridge = _build(module)
    copied = _copied(module, bridge)
    gap = _parity(module, bridge)
    return LensSource(bridge, module, gap, copied, state_key(module, copied))


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Importing and building TransformerLens silences the transformers logger for the process; put it
    back."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        yield
    finally:
        logger.setLevel(level)


def _build(module: nn.Module) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.utilities.attn_implementation import force_eager_attention

    copied: Any = shadow(module)
    name = type(module).__name__
    if copied.config.architectures is None:
        copied.config.architectures = [name]
    try:
        if copied.config.model_type != "falcon":  # boots without, and fails with it
            force_eager_attention(copied)
        return build_bridge_from_module(copied, name, hf_config=copied.config).eval()
    except (ValueError, KeyError, NotImplementedError, AttributeError, TypeError, RuntimeError) as reason:
        raise SiteError(f"TransformerLens cannot bridge a {name} ({type(reason).__name__}: "
                        f"{str(reason)[:120]}): use the plain hooks of "
                        "repforget.models.capture.") from reason  # fmt: skip


def _copied(module: nn.Module, bridge: Any) -> frozenset[int]:
    """Ids of the fused query-key-value parameters of which the bridge holds copies instead of views."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    if all(p.untyped_storage().data_ptr() in own for p in bridge.parameters()):
        return frozenset()
    places = site_map(module)
    paths = {places.locate(Site(kind, layer)).path for layer in range(places.n_layers) for kind in ("q", "k", "v")}
    return frozenset(id(p) for path in paths for p in module.get_submodule(path).parameters())


def _parity(module: nn.Module, bridge: Any) -> float:
    """Largest logit difference relative to the largest logit on a fixed batch; raises above rounding."""
    batch = probe_batch(module, length=8)
    expected = forward(module, batch).float()
    with torch.no_grad():
        sent = batch.to(expected.device)
        found = bridge(sent.ids, attention_mask=sent.mask).float().to(expected.device)
    gap = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not gap <= TOLERANCE.get(next(module.parameters()).dtype, 5e-2):  # also when it is not a number
        raise SiteError(f"TransformerLens does not reproduce this model (logits differ by {gap:.1e} of their "
                        "size): merge adapters or dequantise first, or use the plain hooks of "
                        "repforget.models.capture.")  # fmt: skip
    return gap


_SOURCES: weakref.WeakKeyDictionary[nn.Module, LensSource] = weakref.WeakKeyDictionary()


def capture(
    model: Any, sites: Sequence[Site], batch: Batch, gather: Gather = "last", grad: bool = False
) -> dict[Site, Tensor]:
    """As :func:`repforget.models.capture.capture`, through TransformerLens; builds or rebuilds its source as
    needed."""
    module = core(model)
    source = _SOURCES.get(module)
    if source is None or source.stale:
        source = _SOURCES[module] = lens_source(module)
    return source.capture(sites, batch, gather, grad)
