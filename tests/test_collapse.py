"""Gradients without their dominant components: the closed form, its limits, and what it does to retention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.edit.train import _collapse
from repforget.edit.train._collapse import collapse, components, principal, without
from repforget.errors import UsageError


def _matrix(seed: int, rows: int = 12, columns: int = 9, lead: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, rows, columns, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9))
def test_soft_on_both_sides_is_the_closed_form(seed: int, k: int) -> None:
    g = _matrix(seed)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    u, s, v = u[:, :k], s[:k], vt[:k].T
    expected = (g - (u * s) @ v.T) + (u * (s[-1] ** 2 / s)) @ v.T
    torch.testing.assert_close(collapse(g, components(g, k)), expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.sampled_from(["inputs", "outputs"]))
def test_soft_on_one_side_levels_the_dominant_components(seed: int, k: int, side: str) -> None:
    g = _matrix(seed)
    before = torch.linalg.svdvals(g)
    after = torch.linalg.svdvals(collapse(g, components(g, k), "soft", side))  # type: ignore[arg-type]
    torch.testing.assert_close(after, before.clamp(max=before[k - 1]), atol=1e-12, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(0, 20), st.sampled_from(["soft", "hard"]),
       st.sampled_from(["both", "inputs", "outputs"]), st.booleans())  # fmt: skip
def test_the_spectral_norm_never_grows(seed: int, k: int, form: str, side: str, foreign: bool) -> None:
    g, basis = _matrix(seed), _matrix(seed + 1000 if foreign else seed)
    after = collapse(g, components(basis, k), form, side)  # type: ignore[arg-type]
    assert float(torch.linalg.matrix_norm(after, 2)) <= float(torch.linalg.matrix_norm(g, 2)) * (1 + 1e-12)


def test_without_components_it_is_the_gradient_and_a_hard_one_of_low_rank_vanishes() -> None:
    g = _matrix(3)
    assert collapse(g, components(g, 0)) is g
    low = _matrix(4, 12, 3) @ _matrix(5, 3, 9)
    assert float(collapse(low, components(low, 3), "hard").abs().max()) < 1e-12
    one = collapse(low, components(low, 2), "hard", "inputs")
    assert int(torch.linalg.matrix_rank(one)) == 1
    assert components(g, 50).sizes.shape == (9,)
    with pytest.raises(UsageError, match="-1 components"):
        components(g, -1)


def test_stacks_of_experts_are_collapsed_one_by_one() -> None:
    g = _matrix(6, lead=(3,))
    each = torch.stack([collapse(part, components(part, 2)) for part in g])
    torch.testing.assert_close(collapse(g, components(g, 2)), each)


def test_large_matrices_by_random_projection_agree_and_leave_the_global_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, right = torch.linalg.qr(_matrix(7, 80, 60)).Q, torch.linalg.qr(_matrix(8, 60, 60)).Q
    g = (left * 0.8 ** torch.arange(60)) @ right.T
    exact = collapse(g, components(g, 6))
    monkeypatch.setattr(_collapse, "EXACT", 8)
    state = torch.random.get_rng_state()
    found = components(g, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(found.sizes, 0.8 ** torch.arange(6).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(collapse(g, found), exact, atol=1e-5, rtol=0)
    assert torch.equal(components(g, 6).left, found.left)


@pytest.mark.parametrize(("form", "k"), [("hard", 3), ("soft", 4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_collapse_disrupts_what_is_shared_less_at_equal_forgetting(seed: int, form: str, k: int) -> None:
    """Planted: forget and retain texts share three strong directions, and each has weak ones of its own."""
    left, right = (torch.linalg.qr(_matrix(n, 40, 40)).Q for n in (seed, seed + 100))

    def gradient(start: int) -> torch.Tensor:
        strong = (left[:, :3] * torch.tensor([10.0, 8.0, 6.0])) @ right[:, :3].T
        return strong + (left[:, start : start + 5] * torch.linspace(1.0, 0.5, 5)) @ right[:, start : start + 5].T

    forget, retain = gradient(3), gradient(8)

    def disruption(way: torch.Tensor) -> float:  # first-order change of the retain loss per change of the forget loss
        return float((way * retain).sum()) / float((way * forget).sum())

    way = collapse(forget, components(forget, k), form)  # type: ignore[arg-type]
    assert float((way * forget).sum()) > 0.0, "still an ascent"
    assert abs(disruption(way)) < 0.55 * disruption(forget)


def test_shared_directions_are_mean_and_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    rows = 5 * basis[:, 0] + 3 * torch.randn(500, 1, generator=generator) * basis[:, 1]
    rows = rows + 0.1 * torch.randn(500, 16, generator=generator)
    found = principal(rows, 2)
    torch.testing.assert_close(found.T @ found, torch.eye(2))
    torch.testing.assert_close((found.T @ basis[:, :2]).norm(dim=0), torch.ones(2), atol=1e-3, rtol=0)
    left = without(rows, found)
    assert float((left @ found).abs().max()) < 1e-4
    assert float(left.norm()) < 0.1 * float(rows.norm())
    assert principal(rows, 99).shape == (16, 4), "a quarter at most"
    assert torch.equal(without(rows, principal(rows, 0)), rows)
