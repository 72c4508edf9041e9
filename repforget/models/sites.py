"""Site names <-> modules of this architecture: full coverage, or an error that says what is missing.

A site resolves to one module, one side of it (its first input or its first output) and, for heads and fused
projections, some columns of the last axis. The map is read from structure alone; architectures that the test
suite does not prove are checked once by a forward pass (resid_pre + attn_out + mlp_out must be resid_post,
and the readout of the last state must be the model's logits) before the map is handed out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from repforget.errors import SiteError, nearest
from repforget.models._names import core
from repforget.models._structure import Anatomy, LayerPaths, Spans, anatomy
from repforget.records import GLOBAL_KINDS, HEAD_KINDS, SITE_KINDS, Site

PROVEN = frozenset({
    "gpt2", "llama", "gpt_neox", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi", "phi3", "opt",
    "mixtral", "gptj", "olmo2", "falcon",
})  # fmt: skip


@dataclass(frozen=True)
class Location:
    """Where a site's value passes: the first input ("in") or first output ("out") of the module at ``path``.

    ``spans`` are (start, stop) ranges of the last axis (None = all of it), in the order of the site's own
    columns. ``flat`` marks modules that see batch and position merged into one axis.
    """

    path: str
    side: Literal["in", "out"]
    spans: Spans | None = None
    flat: bool = False

    @property
    def columns(self) -> slice | list[int] | None:
        """The columns as an index of the last axis: a slice where they are contiguous."""
        if self.spans is None:
            return None
        if len(self.spans) == 1:
            return slice(*self.spans[0])
        return [i for start, stop in self.spans for i in range(start, stop)]

    def read(self, value: Tensor) -> Tensor:
        """Return the site's part of the module's tensor (a view where the columns are contiguous)."""
        return value if self.spans is None else value[..., self.columns]

    def write(self, value: Tensor, part: Tensor) -> Tensor:
        """Return the module's tensor with the site's part replaced; ``value`` itself is left alone."""
        if self.spans is None:
            return part
        changed = value.clone()
        changed[..., self.columns] = part
        return changed


@dataclass(frozen=True)
class SiteMap:
    """All sites of one model, in the order in which a forward pass reaches them, and its sizes."""

    anatomy: Anatomy

    @property
    def n_layers(self) -> int:
        return len(self.anatomy.layers)

    @property
    def n_heads(self) -> int:
        return self.anatomy.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.anatomy.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.anatomy.head_dim

    @property
    def width(self) -> int:
        return self.anatomy.width

    @property
    def mlp_width(self) -> int:
        return self.anatomy.mlp_width

    @property
    def parallel(self) -> bool:
        """True when attention and MLP read the same residual state, so that there is no resid_mid."""
        return self.anatomy.parallel

    @cached_property
    def locations(self) -> Mapping[Site, Location]:
        """Every site without its heads -> its location, in forward order."""
        return dict(_locations(self.anatomy))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.locations)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Site kinds this architecture has, in forward order within a block."""
        return tuple(dict.fromkeys(site.kind for site in self.locations))

    @cached_property
    def order(self) -> Mapping[Site, int]:
        """Position of every site (without heads) in a forward pass."""
        return {site: i for i, site in enumerate(self.locations)}

    def rank(self, site: Site) -> int:
        """Position of ``site`` in a forward pass: a larger number is reached later."""
        self.locate(site)
        return self.order[Site(site.kind, site.layer)]

    def locate(self, site: Site) -> Location:
        """Return the location of ``site``; a site this model lacks is a SiteError that names the nearest ones."""
        whole = self.locations.get(Site(site.kind, site.layer))
        if whole is None:
            raise SiteError(self._absent(site))
        if site.head is None:
            return whole
        count = self.heads_of(site.kind)
        if site.head >= count:
            raise SiteError(f"Site '{site}' does not exist: {site.kind} has {count} heads, numbered 0 to {count - 1}.")
        return Location(whole.path, whole.side, head_spans(self.anatomy, site.kind, site.head), whole.flat)

    def heads_of(self, kind: str) -> int:
        """Number of heads of a head kind (key/value heads for k and v)."""
        if kind not in HEAD_KINDS:
            raise SiteError(f"Site kind '{kind}' has no heads: only {', '.join(HEAD_KINDS)} do.")
        return self.n_kv_heads if kind in ("k", "v") else self.n_heads

    def size(self, site: Site) -> int:
        """Number of columns of a site's value."""
        if site.kind in HEAD_KINDS:
            return self.head_dim * (1 if site.head is not None else self.heads_of(site.kind))
        if site.kind in ("mlp_gate", "mlp_up", "mlp_post"):
            return self.mlp_width
        return self.anatomy.vocab_size if site.kind == "logits" else self.width

    def expand(self, text: str) -> tuple[Site, ...]:
        """Return the sites a text stands for: ``resid_post`` = every layer, ``resid_post.3``, ``attn_z.3.h1``."""
        if text in SITE_KINDS and text not in GLOBAL_KINDS:
            found = tuple(site for site in self.locations if site.kind == text)
            if not found:
                raise SiteError(self._absent(Site(text, 0)))
            return found
        site = Site.parse(text)
        self.locate(site)
        return (site,)

    def heads(self, kind: str) -> tuple[Site, ...]:
        """Return every head of every layer of a head kind as its own site."""
        count = self.heads_of(kind)
        return tuple(Site(kind, site.layer, h) for site in self.expand(kind) for h in range(count))

    def _absent(self, site: Site) -> str:
        if site.kind in self.kinds:
            return f"Site '{site}' does not exist: this model has {self.n_layers} layers, 0 to {self.n_layers - 1}."
        why = {
            "resid_mid": "its attention and MLP both read resid_pre",
            "mlp_gate": "its MLP has no gate, or its experts are one batched tensor",
            "mlp_post": "its experts are one batched tensor", "mlp_up": "its experts are one batched tensor",
        }  # fmt: skip
        return (f"Site '{site}' does not exist in a '{self.anatomy.model_type}' model"
                + (f" because {why[site.kind]}" if site.kind in why else "")
                + f": {nearest(site.kind, self.kinds)}")  # fmt: skip


def head_spans(anatomy: Anatomy, kind: str, head: int) -> Spans:
    """Return the columns of one head in the tensor that holds ``kind`` (fused or not)."""
    size, start = anatomy.head_dim, head * anatomy.head_dim
    if kind == "attn_z" or not anatomy.layout:
        return ((start, start + size),)
    kv, group = anatomy.n_kv_heads, anatomy.n_heads // anatomy.n_kv_heads
    if anatomy.layout == "blocks":
        start += size * {"q": 0, "k": anatomy.n_heads, "v": anatomy.n_heads + kv}[kind]
    elif kind == "q":
        start = size * (head // group * (group + 2) + head % group)
    else:
        start = size * (head * (group + 2) + group + (kind == "v"))
    return ((start, start + size),)


def merged(spans: Iterator[tuple[int, int]] | Spans) -> Spans:
    """Join ranges that touch, keeping their order."""
    out: list[tuple[int, int]] = []
    for start, stop in spans:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def kind_spans(anatomy: Anatomy, kind: str) -> Spans | None:
    """Return the columns of a whole kind inside a fused projection, or None where it has its own module."""
    if kind in ("q", "k", "v") and anatomy.layout:
        count = anatomy.n_heads if kind == "q" else anatomy.n_kv_heads
        return merged(span for head in range(count) for span in head_spans(anatomy, kind, head))
    if kind in ("mlp_gate", "mlp_up") and anatomy.layers[0].gate_up:
        start = 0 if kind == "mlp_gate" else anatomy.mlp_width
        return ((start, start + anatomy.mlp_width),)
    return None


def _locations(anatomy: Anatomy) -> Iterator[tuple[Site, Location]]:
    yield Site("embed"), Location(anatomy.embed, "out")
    for index, layer in enumerate(anatomy.layers):
        for kind, place in _layer_locations(anatomy, layer):
            yield Site(kind, index), place
    yield Site("final_norm"), Location(anatomy.final_norm, "out")
    yield Site("logits"), Location("", "out")


def _layer_locations(anatomy: Anatomy, layer: LayerPaths) -> Iterator[tuple[str, Location]]:
    yield "resid_pre", Location(layer.path, "in")
    yield "attn_in", Location(layer.attention, "in")
    for i, kind in enumerate(("q", "k", "v")):
        path = layer.qkv if isinstance(layer.qkv, str) else layer.qkv[i]
        yield kind, Location(path, "out", kind_spans(anatomy, kind))
    yield "attn_z", Location(layer.attention_out, "in")
    yield "attn_out", Location(layer.attention_post_norm or layer.attention, "out")
    flat = layer.mlp is None  # the block flattens batch and position around its own projections
    reads = layer.mlp or layer.up or layer.path
    if not anatomy.parallel:
        yield "resid_mid", Location(layer.mlp_norm or reads, "in", flat=flat)
    yield "mlp_in", Location(reads, "in", flat=flat)
    if layer.gate or layer.gate_up:
        yield "mlp_gate", Location(layer.gate or layer.gate_up or "", "out", kind_spans(anatomy, "mlp_gate"), flat)
    if layer.up or layer.gate_up:
        yield "mlp_up", Location(layer.up or layer.gate_up or "", "out", kind_spans(anatomy, "mlp_up"), flat)
    if layer.down:
        yield "mlp_post", Location(layer.down, "in", flat=flat)
    yield "mlp_out", Location(layer.mlp_post_norm or layer.mlp or layer.down or "", "out", flat=flat)
    yield "resid_post", Location(layer.path, "out")


def _still_holds(module: nn.Module, known: SiteMap) -> bool:
    """False once blocks were added or removed since the map was read."""
    root = known.anatomy.layers[0].path.rpartition(".")[0]
    return len(module.get_submodule(root)) == known.n_layers  # type: ignore[arg-type]


_CACHE: weakref.WeakKeyDictionary[nn.Module, SiteMap] = weakref.WeakKeyDictionary()


def site_map(model: Any) -> SiteMap:
    """Return the site map of a LoadedModel or module, read once per module.

    Raises SiteError with the coverage when anything is unknown. Costs no forward pass for the proven
    architectures and one short one (by :func:`repforget.models.check.check_sites`) for any other.
    """
    module = core(model)
    known = _CACHE.get(module)
    if known is not None and _still_holds(module, known):
        return known
    found = SiteMap(anatomy(module))
    _CACHE[module] = found
    if found.anatomy.model_type not in PROVEN:
        from repforget.models.check import check_sites, probe_batch

        try:
            check_sites(module, probe_batch(module))
        except BaseException:
            _CACHE.pop(module, None)
            raise
    return found
