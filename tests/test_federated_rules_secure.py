"""Secure sums: masks cancel exactly, what a server holds is noise, and errors stay below the stated bound."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import UsageError
from repforget.federated.secure import Agreement, Party, flattened, restored, unmasked

pytest.importorskip("cryptography")
NAMES = ("ann", "bob", "cy", "dee")


def run(vectors: dict[str, np.ndarray], bound: float) -> tuple[Agreement, dict[str, np.ndarray]]:
    agreement = Agreement(tuple(vectors), bound)
    parties = {name: Party(name, agreement) for name in vectors}
    public = {name: party.public for name, party in parties.items()}
    return agreement, {name: parties[name].masked(vectors[name], public) for name in vectors}


@settings(max_examples=40, deadline=None)
@given(count=st.integers(3, 9), size=st.integers(0, 30), power=st.integers(-40, 40), seed=st.integers(0, 99))
def test_the_sum_is_within_its_stated_error_at_every_scale(count: int, size: int, power: int, seed: int) -> None:
    draw, bound = np.random.default_rng(seed), 10.0**power
    vectors = {f"c{i}": draw.uniform(-bound, bound, size) for i in range(count)}
    agreement, sent = run(vectors, bound)
    exact = np.array([float(sum(map(Fraction, column))) for column in
                      zip(*vectors.values(), strict=True)])  # fmt: skip
    assert np.abs(unmasked(sent, agreement) - exact).max(initial=0) <= agreement.error
    assert agreement.error < count * bound * 1e-15


def test_masks_cancel_exactly_and_only_all_together() -> None:
    vectors = {name: np.full(2000, float(i)) for i, name in enumerate(NAMES)}
    agreement, sent = run(vectors, 8.0)
    fixed = sum(np.ldexp(v, agreement.bits).astype(np.int64).astype(np.uint64) for v in vectors.values())
    assert np.array_equal(sum(s[:-1] for s in sent.values()), fixed)  # modulo 2^64, to the last bit
    for left_out in NAMES:
        some = sum(sent[name] for name in NAMES if name != left_out)
        assert (some[:-1] == fixed).sum() == 0


def test_entries_are_rounded_to_the_nearest_unit() -> None:
    unit = 2.0 ** -Agreement(NAMES, 8.0).bits
    agreement, sent = run({name: unit * np.array([0.75, 0.25, -0.75, 5.0]) for name in NAMES}, 8.0)
    assert np.array_equal(unmasked(sent, agreement), unit * np.array([4, 0, -4, 20]))


def test_what_any_coalition_short_of_all_sends_is_uniform_whatever_they_hold() -> None:
    for value in (0.0, 7.9):
        _, sent = run({name: np.full(40_000, value) for name in NAMES}, 8.0)
        for some in (NAMES[:1], NAMES[1:3], NAMES[:3]):
            total = sum(sent[name] for name in some)[:-1]
            for shift in (0, 24, 56):  # low, middle and high bytes
                counts = np.bincount((total >> np.uint64(shift)).astype(np.uint8), minlength=256)
                excess = ((counts - counts.mean()) ** 2 / counts.mean()).sum()  # chi-squared, 255 degrees of freedom
                assert excess < 255 + 8 * np.sqrt(2 * 255)


def test_two_sums_of_the_same_numbers_share_no_mask() -> None:
    vectors = {name: np.zeros(100) for name in NAMES}
    first, second = run(vectors, 1.0)[1], run(vectors, 1.0)[1]
    assert not any((first[name] == second[name]).any() for name in NAMES)
    agreement = Agreement(NAMES, 1.0)
    parties = [Party(name, agreement) for name in NAMES]
    public = {party.name: party.public for party in parties}
    parties[0].masked(np.zeros(3), public)
    with pytest.raises(UsageError, match="'ann' has masked a vector with this key"):
        parties[0].masked(np.zeros(3), public)


def test_clients_that_saw_different_keys_or_purposes_are_found_out() -> None:
    agreement, other = Agreement(NAMES, 1.0, "round 1"), Agreement(NAMES, 1.0, "round 2")
    parties = {name: Party(name, agreement if name != "cy" else other) for name in NAMES}
    public = {name: party.public for name, party in parties.items()}
    sent = {name: party.masked(np.ones(4), public) for name, party in parties.items()}
    with pytest.raises(UsageError, match="masks do not cancel"):
        unmasked(sent, agreement)
    parties = {name: Party(name, agreement) for name in NAMES}
    public = {name: party.public for name, party in parties.items()}
    forged = {**public, "ann": Party("ann", agreement).public}
    sent = {name: p.masked(np.ones(4), public if name == "ann" else {**forged, name: p.public})
            for name, p in parties.items()}  # fmt: skip
    with pytest.raises(UsageError, match="masks do not cancel"):
        unmasked(sent, agreement)


def test_what_cannot_be_summed_is_refused() -> None:
    agreement, sent = run({name: np.ones(3) for name in NAMES}, 1.0)
    with pytest.raises(UsageError, match="'bob' sent nothing"):
        unmasked({name: v for name, v in sent.items() if name != "bob"}, agreement)
    with pytest.raises(UsageError, match="different sizes"):
        unmasked({**sent, "bob": sent["bob"][1:]}, agreement)
    for clients in (("a", "b"), ("a", "b", "b"), ()):
        with pytest.raises(UsageError, match="at least 3 different clients"):
            Agreement(clients, 1.0)
    for bound in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(UsageError, match="bound"):
            Agreement(NAMES, bound)
    with pytest.raises(UsageError, match="'eve' is not among"):
        Party("eve", agreement)
    for bad in ([1.5], [np.nan], [np.inf], [[0.0]]):
        with pytest.raises(UsageError, match="'ann' holds entries beyond"):
            run({"ann": np.array(bad), "bob": np.zeros(1), "cy": np.zeros(1)}, 1.0)
    parties = {name: Party(name, agreement) for name in NAMES}
    public = {name: party.public for name, party in parties.items()}
    for wrong in ({**public, "bob": public["cy"]}, {k: v for k, v in public.items() if k != "dee"},
                  {**public, "ann": public["bob"]}, {**public, "eve": b"x" * 32}):  # fmt: skip
        with pytest.raises(UsageError, match="exchange the keys again"):
            parties["ann"].masked(np.zeros(2), wrong)
    with pytest.raises(UsageError, match="no point to agree on"):
        parties["ann"].masked(np.zeros(2), {**public, "bob": bytes(32)})


def test_tensors_travel_flat_and_come_back() -> None:
    tensors = {"w": np.arange(6.0).reshape(2, 3), "b": np.float32([7, 8]), "s": np.array(9.0)}
    shapes = {name: value.shape for name, value in tensors.items()}
    back = restored(flattened(tensors), shapes)
    assert all(np.array_equal(back[name], tensors[name]) and back[name].shape == shapes[name] for name in tensors)
    with pytest.raises(UsageError, match="numbers were summed"):
        restored(np.zeros(3), shapes)
    agreement, sent = run(dict.fromkeys(NAMES, flattened(tensors)), 10.0)
    total = restored(unmasked(sent, agreement), shapes)
    assert all(np.allclose(total[name], 4 * tensors[name], rtol=0, atol=1e-14) for name in tensors)


def test_why_the_masks_of_flwr_do_not_serve() -> None:
    """They depend on an exclusive or of 32-bit words of the key's base64 text: the order of the words is lost, and so
    are four bits; were this mended, its protocol would deserve another look."""
    pytest.importorskip("flwr")
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives.asymmetric import generate_key_pairs

    def seed(key: bytes) -> Any:
        return np.bitwise_xor.reduce(np.frombuffer(key, "<u4"))

    keys = [generate_shared_key(generate_key_pairs()[0], generate_key_pairs()[1]) for _ in range(40)]
    assert np.bitwise_or.reduce([seed(key) for key in keys]) == 0x7F7F7F7F  # 28 bits
    turned = keys[0][4:8] + keys[0][:4] + keys[0][8:]
    masks = [pseudo_rand_gen(key, 2**32, [(50,)])[0] for key in (keys[0], turned, keys[1])]
    assert turned != keys[0] and np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
