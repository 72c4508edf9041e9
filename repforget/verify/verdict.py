"""Evidence -> Verdict: controls first, then claims, then one sentence in fixed words.

``pass`` needs every voting knowledge measure below its margin and every collateral measure within its limit
(intersection-union: no correction needed); one sure "retained" or one sure loss is a ``fail``; all else is
``inconclusive``.  A pass says what was tried and at which budget; it does not show that no other attack works.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from repforget.errors import ControlError
from repforget.records import Claim, Evidence, Outcome, Verdict
from repforget.verify import statistics as st
from repforget.verify._claims import VOTING, Rule, claims, twin_names

AS_EXPECTED = "as expected"


def _voting(found: Sequence[Claim], kind: str) -> list[Claim]:
    return [c for c in found if c.kind == kind and c.status in VOTING]


def outcome(found: Sequence[Claim], *, collateral: bool = True) -> Outcome:
    """Combine claims; without ``collateral`` only the knowledge measures count (used for the controls)."""
    kinds = ("knowledge", "collateral") if collateral else ("knowledge",)
    voting = {kind: _voting(found, kind) for kind in kinds}
    everything = [c for group in voting.values() for c in group]
    if any(c.status == "fail" for c in everything):
        return "fail"
    if all(voting.values()) and all(c.status == "pass" for c in everything):
        return "pass"
    return "inconclusive"


def worst_claim(found: Sequence[Claim]) -> Claim | None:
    """The measure that speaks most against the edit: the most surely failing one, else the highest upper limit."""
    failing = [c for c in found if c.status == "fail"]
    known = [c for c in failing if c.kind == "knowledge"]
    if failing:
        return max(known or failing, key=lambda c: c.rho_low - c.margin)  # of equals the first, which is the cheapest
    open_claims = [c for c in found if c.status == "inconclusive"]
    pool = open_claims or _voting(found, "knowledge")
    return max(pool, key=lambda c: c.rho_high - c.margin, default=None)


def controls(evidence: Sequence[Evidence], rule: Rule) -> tuple[dict[str, str], bool]:
    """Judge the arms whose outcome is known beforehand; returns what came out, and whether all may be trusted.

    The original and the placebo edit must fail, a second twin (with the first as its floor) must not.  A second twin
    that cannot be told either way is a lack of items, which is said, and not a fault of the judge.
    """
    found: dict[str, str] = {}
    trusted = True
    arms = set(evidence[0].arms)
    for name in ("original", "placebo"):
        if name not in arms:
            continue
        result = claims(evidence, rule, target=name)
        got = outcome(result)
        found[name] = AS_EXPECTED if got == "fail" else _control_fault(name, got, result)
        trusted = trusted and got == "fail"
    twins = twin_names(evidence[0])
    for name in twins[1:]:
        result = claims(evidence, rule, target=name, twins=twins[:1])
        got = outcome(result, collateral=False)
        worst = worst_claim([c for c in result if c.kind == "knowledge"])
        if got == "pass":
            found[name] = AS_EXPECTED
        elif got == "inconclusive":
            found[name] = "not told either way: " + (f"{worst.name}: {worst.reason}" if worst else "no measure voted")
        else:
            found[name] = f"judged to know what it never saw ({worst.name}: {worst.reason})" if worst else "failed"
            trusted = False
    return found, trusted


def _control_fault(name: str, got: Outcome, result: Sequence[Claim]) -> str:
    if not _voting(result, "knowledge"):
        return "no measure tells the original from a model that never knew, on these items"
    subject = "the untouched original" if name == "original" else "a random edit of equal size"
    return f"{subject} was judged '{got}' although it should be found to know"


def judge(
    evidence: Sequence[Evidence], *, margin: float = 0.05, utility_margin: float = 0.02, seed: int = 0,
    draws: int = st.DRAWS, alpha: float = st.ALPHA, split: str = "dev", artifact: str = "weights",
    sites: Sequence[str] = (),
) -> Verdict:  # fmt: skip
    """Turn evidence into a verdict: per claim and overall, with the worst attack named.

    ``margin`` is the share of the original's knowledge that may be left (never below the difference between twins),
    ``utility_margin`` the share of quality that may be lost; limits are one-sided ``1 - alpha`` from resampled
    clusters. ``sites`` names where an erasing edit acted, for the sentence.  Deterministic for a seed; needs no model.
    """
    if not evidence:
        raise ControlError("There is no evidence to judge: run at least one verifier.")
    if not 0.0 < margin < 1.0 or not 0.0 < utility_margin < 1.0:
        raise ControlError(f"Margins must lie between 0 and 1 and are {margin} and {utility_margin}: "
                           "give shares such as 0.05.")  # fmt: skip
    rule = Rule(margin, utility_margin, seed, draws, alpha)
    found = claims(evidence, rule)
    checked, trusted = controls(evidence, rule)
    worst = worst_claim(found)
    result: Outcome = outcome(found) if trusted else "inconclusive"
    twins = bool(twin_names(evidence[0]))
    if trusted:
        budget = next((e.budget for e in evidence if worst is not None and e.name == worst.name), {})
        sentence = _sentence(result, found, worst, budget, twins, sites)
    else:
        wrong = "; ".join(f"{k}: {v}" for k, v in checked.items() if v != AS_EXPECTED)
        sentence = f"No verdict: the controls came out wrong ({wrong})."
    return Verdict(result, sentence, worst.name if worst else None, found, checked, trusted, artifact, split)


def _at_budget(claim: Claim, budget: Mapping[str, float]) -> str:
    limits = ("max_", "alternatives")  # of what is asked, not of the attack
    spent = ", ".join(f"{key} {value:g}" for key, value in budget.items() if not key.startswith(limits))
    return f"{claim.name} at budget {spent or 'one pass'}"


def _sentence(
    result: Outcome, found: Sequence[Claim], worst: Claim | None, budget: Mapping[str, float], twins: bool,
    sites: Sequence[str],
) -> str:  # fmt: skip
    if worst is None:
        return "Inconclusive: no measure tells the original from a model that never knew, so nothing can be shown."
    if result == "fail":
        return _failure(found, worst, budget)
    if result == "inconclusive":
        return _open_question(found, worst)
    knowledge = _voting(found, "knowledge")
    loss = max(c.rho_high for c in _voting(found, "collateral"))
    linear = [c for c in knowledge if c.name == "reprobe.linear"]
    where = f", linearly erased at sites {', '.join(sites)}" if linear and sites else ""
    opening = "Robust to attack" if twins else "Consistent with chance, and robust to attack"
    against = "a model that never knew" if twins else "chance"
    return (f"{opening} {_at_budget(worst, budget)}, the worst of {len(knowledge)} measures: at most "
            f"{worst.rho_high:.1%} of the knowledge stands out above {against} (margin {worst.margin:.1%}){where}; "
            f"the quality lost is at most {loss:.1%}.")  # fmt: skip


def _failure(found: Sequence[Claim], worst: Claim, budget: Mapping[str, float]) -> str:
    if worst.kind == "collateral":
        return (f"The edit does damage: {worst.name} lost {worst.rho:.1%} (at least {worst.rho_low:.1%}), and the "
                f"limit is {worst.margin:.1%}.")  # fmt: skip
    # Descriptive or not, these are what a person who asks the model gets to see.
    seen = [c for c in found if c.kind == "knowledge" and c.access == "black-box" and math.isfinite(c.rho_low)]
    left = f"{worst.rho:.0%} (at least {worst.rho_low:.0%}) of what the original knew above the floor"
    if seen and all(c.rho_low <= c.margin for c in seen):
        return f"Suppressed: the answers are gone from behaviour, but {_at_budget(worst, budget)} still finds {left}."
    return f"The knowledge is still there: {_at_budget(worst, budget)} finds {left}."


def _open_question(found: Sequence[Claim], worst: Claim) -> str:
    if not _voting(found, "knowledge"):
        return "Inconclusive: no measure tells the original from a model that never knew, so nothing can be shown."
    if not _voting(found, "collateral"):
        return ("Inconclusive: what the edit costs was not measured with power; add the verifier 'collateral' and "
                "retain items that the original knows.")  # fmt: skip
    return f"Inconclusive: {worst.name}: {worst.reason}."
