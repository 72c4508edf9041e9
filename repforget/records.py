"""The frozen records that stages hand to each other.

Arrays are numpy float64. Every knowledge measure is oriented the same way: **higher = more knowledge**.
``collateral`` measures are oriented **higher = better kept**.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from repforget.errors import SiteError, nearest

FORMAT_VERSION = 1

SiteKind = Literal[
    "embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in", "q", "k", "v", "attn_z", "attn_out",
    "mlp_gate", "mlp_up", "mlp_post", "mlp_out", "final_norm", "logits",
]  # fmt: skip
SITE_KINDS: tuple[str, ...] = get_args(SiteKind)
GLOBAL_KINDS = ("embed", "final_norm", "logits")
HEAD_KINDS = ("q", "k", "v", "attn_z")
_SITE = re.compile(r"(?P<kind>[a-z_]+)(?:\.(?P<layer>\d+)(?:\.h(?P<head>\d+))?)?$")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a transformer: ``resid_post.7``, ``attn_z.3.h5`` (head 5), ``embed``.

    ``layer`` counts blocks from 0 and is -1 for the global kinds; ``head`` is only for q, k, v and attn_z
    (for k and v it is the key/value head).
    """

    kind: str
    layer: int = -1
    head: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SITE_KINDS:
            raise SiteError(f"Unknown site kind '{self.kind}': {nearest(self.kind, SITE_KINDS)}")
        if (self.kind in GLOBAL_KINDS) != (self.layer == -1):
            raise SiteError(f"Site kind '{self.kind}' was given layer {self.layer}: only embed, final_norm and "
                            "logits have no layer; write for example 'resid_post.3' or 'embed'.")  # fmt: skip
        if self.head is not None and self.kind not in HEAD_KINDS:
            raise SiteError(f"Site kind '{self.kind}' has no heads: only {', '.join(HEAD_KINDS)} do.")

    def __str__(self) -> str:
        layer = "" if self.layer == -1 else f".{self.layer}"
        return f"{self.kind}{layer}" + ("" if self.head is None else f".h{self.head}")

    @classmethod
    def parse(cls, text: str) -> Site:
        match = _SITE.match(text)
        if match is None:
            raise SiteError(f"'{text}' is not a site: write kind.layer or kind.layer.hN, for example 'resid_post.3'.")
        layer, head = match["layer"], match["head"]
        return cls(match["kind"], -1 if layer is None else int(layer), None if head is None else int(head))


@dataclass(frozen=True, order=True)
class Component:
    """A unit that a Localization ranks: a whole site, a head (``site.head``), one neuron of ``mlp_post``, or one
    ``feature`` of a sparse autoencoder that reads the site (the Localization's settings name its file)."""

    site: Site
    neuron: int | None = None
    feature: int | None = None

    def __str__(self) -> str:
        if self.feature is not None:
            return f"{self.site}.f{self.feature}"
        return str(self.site) if self.neuron is None else f"{self.site}.n{self.neuron}"

    @classmethod
    def parse(cls, text: str) -> Component:
        match = re.fullmatch(r"(.*)\.([nf])(\d+)", text)
        if match is None:
            return cls(Site.parse(text))
        site, index = Site.parse(match[1]), int(match[3])
        return cls(site, neuron=index) if match[2] == "n" else cls(site, feature=index)


@dataclass(frozen=True)
class Edge:
    """An edge of a circuit: what ``source`` writes to the residual stream, as ``target`` reads it, and its score.

    Sources are embed, heads of attn_z and mlp_out (attn_out where heads are not told apart); targets are heads of q, k
    and v, mlp_in and logits.
    """

    source: Component
    target: Component
    score: float

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


Units = Literal["located", "random", "inverted"]  # of a localisation: its best, as many others, its worst


@dataclass(frozen=True)
class RandomBand:
    """What a random selection of equal size reaches: the control without which no localisation is claimed.

    ``top`` is the effect of the method's own top-``k``; ``low``/``high`` bound the central 95 % of ``draws``
    random selections of ``k`` components of the same kinds; ``effect`` says in words what was measured.
    """

    k: int
    draws: int
    top: float
    low: float
    high: float
    effect: str

    @property
    def beats_random(self) -> bool:
        return self.top > self.high


@dataclass(frozen=True)
class Localization:
    """Ranked components (best first) with scores, the method, its cost and the band of random selections."""

    method: str
    components: tuple[Component, ...]
    scores: tuple[float, ...]
    band: RandomBand
    cost: Mapping[str, float] = field(default_factory=dict)  # forwards, backwards, ...: counts, never seconds
    settings: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)  # name -> rows per layer
    notes: tuple[str, ...] = ()
    edges: tuple[Edge, ...] = ()  # of a circuit, strongest first; empty for locators that rank components alone

    def __post_init__(self) -> None:
        if len(self.components) != len(self.scores):
            raise ValueError("a Localization needs one score per component")

    def layers(self, kind: str | None = None) -> tuple[int, ...]:
        """Layers in order of their best component, each once, optionally of one site kind."""
        ranked = (c.site.layer for c in self.components if kind is None or c.site.kind == kind)
        return tuple(dict.fromkeys(layer for layer in ranked if layer >= 0))

    def to_json(self) -> dict[str, Any]:
        band = {**vars(self.band), "beats_random": self.band.beats_random}
        return {
            "method": self.method, "components": [str(c) for c in self.components],
            "scores": [float(s) for s in self.scores], "band": band, "cost": dict(self.cost),
            "settings": dict(self.settings), "tables": {k: [list(r) for r in v] for k, v in self.tables.items()},
            "notes": list(self.notes),
            "edges": [[str(e.source), str(e.target), float(e.score)] for e in self.edges],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Localization:
        band = {k: v for k, v in data["band"].items() if k != "beats_random"}
        return cls(
            data["method"], tuple(Component.parse(c) for c in data["components"]), tuple(data["scores"]),
            RandomBand(**band), data["cost"], data["settings"], data["tables"], tuple(data["notes"]),
            tuple(Edge(Component.parse(a), Component.parse(b), score) for a, b, score in data.get("edges", ())),
        )  # fmt: skip


@dataclass(frozen=True)
class ItemScores:
    """Per-item values of one measure on one model; the product of every verifier, aggregates come later.

    ``valid`` marks items that could be scored; invalid items are counted and shown, never dropped in silence.
    """

    ids: tuple[str, ...]
    clusters: tuple[str, ...]
    values: NDArray[np.float64]
    valid: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.clusters) == len(self.values) == len(self.valid):
            raise ValueError("ids, clusters, values and valid must have one entry per item")

    @classmethod
    def of(cls, ids: Sequence[str], clusters: Sequence[str], values: Sequence[float]) -> ItemScores:
        """Build from plain sequences; NaN means the item could not be scored."""
        array = np.asarray(values, dtype=np.float64)
        return cls(tuple(ids), tuple(clusters), np.nan_to_num(array, nan=0.0), ~np.isnan(array))

    @property
    def mean(self) -> float:
        return float(self.values[self.valid].mean()) if self.valid.any() else math.nan

    def to_json(self) -> dict[str, Any]:
        return {"ids": list(self.ids), "clusters": list(self.clusters),
                "values": [float(v) for v in self.values], "valid": [bool(v) for v in self.valid]}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ItemScores:
        return cls(tuple(data["ids"]), tuple(data["clusters"]),
                   np.asarray(data["values"], np.float64), np.asarray(data["valid"], np.bool_))  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A named series per arm for the report: layers, relearning steps, ..."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: Mapping[str, tuple[float, ...]]  # arm -> values aligned with x

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "x": list(self.x), "y": {k: list(v) for k, v in self.y.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        y = {k: tuple(v) for k, v in data["y"].items()}
        return cls(data["title"], data["x_label"], data["y_label"], tuple(data["x"]), y)


EvidenceKind = Literal["knowledge", "collateral"]
Access = Literal["black-box", "logits", "white-box", "weights"]


@dataclass(frozen=True)
class Measurement:
    """What one verifier measured on one arm: one or more named measures and the series for the report."""

    scores: Mapping[str, ItemScores]  # measure -> values on this arm
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # curve name -> y values on this arm
    facts: Mapping[str, float] = field(default_factory=dict)  # descriptive numbers: code-flip share, ...

    def to_json(self) -> dict[str, Any]:
        return {"scores": {k: v.to_json() for k, v in self.scores.items()},
                "series": {k: list(v) for k, v in self.series.items()}, "facts": dict(self.facts)}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        return cls({k: ItemScores.from_json(v) for k, v in data["scores"].items()},
                   {k: tuple(v) for k, v in data["series"].items()}, data["facts"])  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """One measure by one verifier on every arm: the edit beside its ceiling, its floors and its control.

    Arms are named ``original``, ``edit``, ``placebo`` and ``twin-0``, ``twin-1``, ... ``prior`` holds the value
    of a model that answers by the prior over alternatives (None where the measure has no such floor).
    """

    verifier: str
    measure: str
    kind: EvidenceKind
    access: Access
    votes: bool  # False: descriptive only, never part of a verdict
    arms: Mapping[str, ItemScores]
    prior: ItemScores | None = None
    budget: Mapping[str, float] = field(default_factory=dict)
    teaches: str = "nothing"
    curves: tuple[Curve, ...] = ()
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # arm -> descriptive numbers

    @property
    def name(self) -> str:
        return f"{self.verifier}.{self.measure}"

    def to_json(self) -> dict[str, Any]:
        return {
            "verifier": self.verifier, "measure": self.measure, "kind": self.kind, "access": self.access,
            "votes": self.votes, "arms": {k: v.to_json() for k, v in self.arms.items()},
            "prior": None if self.prior is None else self.prior.to_json(), "budget": dict(self.budget),
            "teaches": self.teaches, "curves": [c.to_json() for c in self.curves],
            "facts": {k: dict(v) for k, v in self.facts.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        return cls(
            data["verifier"], data["measure"], data["kind"], data["access"], data["votes"],
            {k: ItemScores.from_json(v) for k, v in data["arms"].items()},
            None if data["prior"] is None else ItemScores.from_json(data["prior"]), data["budget"],
            data["teaches"], tuple(Curve.from_json(c) for c in data["curves"]), data["facts"],
        )  # fmt: skip


Outcome = Literal["pass", "fail", "inconclusive"]
ClaimStatus = Literal["pass", "fail", "inconclusive", "no power", "descriptive"]


@dataclass(frozen=True)
class Claim:
    """The judgement on one measure: rho is the share of knowledge left, relative to original and floor.

    For collateral measures ``rho`` is the share of quality lost. All limits are one-sided 95 % unless the
    reason says otherwise.
    """

    name: str  # verifier.measure
    kind: EvidenceKind
    access: Access
    status: ClaimStatus
    reason: str
    margin: float
    rho: float = math.nan
    rho_low: float = math.nan
    rho_high: float = math.nan
    levels: Mapping[str, float] = field(default_factory=dict)  # arm (and "prior", "floor") -> mean
    n_items: int = 0
    n_clusters: int = 0
    n_needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """pass, fail or inconclusive, with the worst attack named and the sentence a person reads."""

    outcome: Outcome
    sentence: str
    worst: str | None
    claims: tuple[Claim, ...]
    controls: Mapping[str, str] = field(default_factory=dict)  # control -> "as expected" or what came out wrong
    controls_ok: bool = True
    artifact: str = "weights"  # or "weights+hook"
    split: str = "dev"
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN becomes null so that every parser reads it."""

        def clean(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            if isinstance(value, Mapping):
                return {k: clean(v) for k, v in value.items()}
            return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value

        data = {**vars(self), "claims": [vars(c) for c in self.claims]}
        return {k: clean(v) for k, v in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        def claim(entry: Mapping[str, Any]) -> Claim:
            restored: dict[str, Any] = {
                k: math.nan if v is None and k.startswith("rho") else v for k, v in entry.items()
            }
            return Claim(**restored)

        fields = {**data, "claims": tuple(claim(c) for c in data["claims"])}
        return cls(**fields)
