"""The rows of the report, shared by HTML, Markdown and the terminal: plain text, never a forget text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repforget.guarantee import Guarantee
from repforget.records import Claim, Evidence, Localization, Verdict
from repforget.report.series import SHOWN_COMPONENTS, STATUS_SIGNS, arm_order, finite, sorted_claims, total_cost

MISSING = "–"
HEADINGS = ("measure", "access", "original", "floor", "placebo", "edit", "share", "95 % limits", "margin", "status")


@dataclass(frozen=True)
class Row:
    """One measure: its level on every arm, the share with limits, and the outcome with its reason."""

    claim: Claim
    cells: tuple[str, ...]  # aligned with HEADINGS
    budget: str
    teaches: str
    reason: str

    @property
    def sign(self) -> str:
        return STATUS_SIGNS.get(self.claim.status, "")


def level(value: object) -> str:
    """A level with three decimals, or a dash."""
    number = finite(value)
    text = MISSING if number is None else f"{number:.3f}" if abs(number) < 100 else f"{number:.4g}"
    return text.replace("-", "−")


def share(value: object) -> str:
    """A share in per cent with one decimal, or a dash; a true minus sign, so that columns align."""
    number = finite(value)
    return MISSING if number is None else f"{number * 100:.1f} %".replace("-", "−")


def limits(claim: Claim) -> str:
    if finite(claim.rho_low) is None and finite(claim.rho_high) is None:
        return MISSING
    return f"{share(claim.rho_low)} … {share(claim.rho_high)}"


def standing_out(evidence: Sequence[Evidence], most: int = 10) -> list[tuple[str, str, str, str]]:
    """Items that stand out most above the floor of a model that never knew: id, cluster, share left, attack."""
    from repforget.verify._claims import worst_items

    if not evidence or any("edit" not in entry.arms for entry in evidence):
        return []
    return [(item.id, item.cluster, share(item.left), item.attack) for item in worst_items(evidence, most)]


def counts(values: Mapping[str, Any]) -> str:
    """``steps 100, lr 0.0001``, or a dash."""
    listed = ", ".join(f"{k.replace('_', ' ')} {short(v)}" for k, v in sorted(values.items()))
    return listed or MISSING


def short(value: Any) -> str:
    """Any setting on one line."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {short(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(short(entry) for entry in value) or "none"
    return str(value)


def claim_rows(verdict: Verdict, evidence: Sequence[Evidence] = ()) -> list[Row]:
    """One row per claim, the worst first; budgets and what an attack teaches come from the evidence."""
    by_name = {e.name: e for e in evidence}
    return [_row(claim, by_name.get(claim.name)) for claim in sorted_claims(verdict.claims)]


def _row(claim: Claim, evidence: Evidence | None) -> Row:
    levels = claim.levels
    floor = levels.get("floor", levels.get("prior"))
    cells = (
        claim.name, claim.access, level(levels.get("original")), level(floor), level(levels.get("placebo")),
        level(levels.get("edit")), share(claim.rho), limits(claim), share(claim.margin), claim.status,
    )  # fmt: skip
    budget = counts(evidence.budget) if evidence and evidence.budget else "one pass"
    counted = f"{claim.n_items} items in {claim.n_clusters} clusters" if claim.n_items else ""
    reason = "; ".join(part for part in (claim.reason, counted) if part)
    return Row(claim, cells, budget, evidence.teaches if evidence else MISSING, reason)


def control_rows(verdict: Verdict) -> list[tuple[str, str]]:
    return [(name, verdict.controls[name]) for name in arm_order(verdict.controls)]


def unscored(evidence: Sequence[Evidence]) -> list[str]:
    """One sentence per measure and arm on which items could not be scored: counted, not dropped in silence."""
    return [
        f"{e.name} on {arm}: {int((~scores.valid).sum())} of {len(scores.ids)} items could not be scored"
        for e in evidence
        for arm, scores in e.arms.items()
        if not scores.valid.all()
    ]


def location_rows(localization: Localization) -> list[tuple[str, str, float]]:
    """(component, score, width of its bar between 0 and 1) of the best components."""
    pairs = list(zip(localization.components, localization.scores, strict=True))[:SHOWN_COMPONENTS]
    largest = max((abs(s) for _, s in pairs), default=0.0) or 1.0
    return [(str(component), f"{score:.4g}", abs(score) / largest) for component, score in pairs]


def location_sentence(localization: Localization) -> str:
    """Whether the ranking beats a random selection of equal size, in one sentence."""
    band = localization.band
    found = "beats" if band.beats_random else "does NOT beat"
    return (f"The top {band.k} {found} a random selection of equal size: {band.effect} is {band.top:.4g}, and "
            f"{band.draws} random selections reach {band.low:.4g} to {band.high:.4g} (central 95 %).")  # fmt: skip


def names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What the run was about, for titles."""
    return {key: str(recipe.get(key, MISSING)) for key in ("knowledge", "model")}


def manifest_of(edit: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest of an edit, given as itself or as the content of ``edit.json``."""
    inner = edit.get("manifest", edit)
    return inner if isinstance(inner, Mapping) else edit


def fact_rows(evidence: Sequence[Evidence], arms: Sequence[str]) -> list[tuple[str, ...]]:
    """(verifier: fact, value per arm) of every descriptive number, each once."""
    found: dict[str, dict[str, float]] = {}
    for entry in evidence:
        for arm, facts in entry.facts.items():
            for name, value in facts.items():
                found.setdefault(f"{entry.verifier}: {name}", {})[arm] = value
    return [(name, *(level(values.get(arm)) for arm in arms)) for name, values in sorted(found.items())]


def arms_of(evidence: Sequence[Evidence]) -> list[str]:
    return arm_order(dict.fromkeys(arm for entry in evidence for arm in entry.arms))


def touched_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(kind, name, relative size of the change) of everything an edit touched; no size where none is known."""
    norms = manifest.get("norms", {})
    named = [("site", name) for name in manifest.get("sites", ())]
    named += [("weight", name) for name in manifest.get("weights", ())]
    return [(kind, name, f"{norms[name]:.3g}" if finite(norms.get(name)) is not None else "")
            for kind, name in named]  # fmt: skip


def manifest_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The remaining facts of a manifest, key and value."""
    hidden = ("sites", "weights", "norms", "format_version", "notes", "guarantee", "rounding")
    rows = [(key.replace("_", " "), short(value)) for key, value in manifest.items() if key not in hidden]
    return [*rows, *rounding_rows(manifest)]


def rounding_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What storing the changed weights in fewer bits leaves of the change: mean cosine with it, and the least."""
    kept: Mapping[str, Mapping[str, float]] = manifest.get("rounding", {})
    rows = []
    for form in ("bfloat16", "float16", "int8", "nf4"):
        found = {name: left[form] for name, left in kept.items() if form in left}
        if found:
            least = min(found, key=lambda name: found[name])
            rows.append((f"left in {form}", f"{sum(found.values()) / len(found):.3f} of the change (cosine, mean of "
                                            f"{len(found)} weights; least {found[least]:.3f} in {least})"))  # fmt: skip
    return rows


def guarantee_rows(manifest: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a theorem says about the edit, in rows; none where there is no theorem."""
    held = manifest.get("guarantee")
    return () if held is None else Guarantee.from_json(held).lines()


def cost_rows(localizations: Sequence[Localization], evidence: Sequence[Evidence]) -> list[tuple[str, str]]:
    return [(stage, counts(values)) for stage, values in total_cost(localizations, evidence)]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested data as (dotted key, text) rows; empty values are left out."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            yield name, "; ".join(_named(v) for v in value)
        elif value is not None and value != {} and value != []:
            yield name, short(value)


def _named(entry: Any) -> str:
    """A method choice as a recipe writes it."""
    if isinstance(entry, Mapping) and set(entry) == {"name", "settings"}:
        return f"{entry['name']} ({short(entry['settings'])})" if entry["settings"] else str(entry["name"])
    return short(entry)
