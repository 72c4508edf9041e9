"""Sums over clients of which the server sees nothing but the total: fixed point, and masks that cancel exactly.

Every pair of clients agrees on a key (X25519) and stretches it to a stream of uniform 64-bit numbers (ChaCha20); one
adds it, the other takes it off, modulo 2^64 (Bonawitz et al. 2017, without its recovery from lost clients).  Any
number of vectors short of all are uniform numbers; their sum is the exact sum of the fixed-point values.

flwr's SecAgg+ (1.41) is not used: it folds each pair's key into at most 28 bits that seed a Mersenne Twister, so that
its masks can be guessed; its 32-bit modulus is too coarse for second moments; and its server runs under the legacy
strategies alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from repforget.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

LEAST = 3  # of two clients each would see the other's vector in the sum
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Agreement:
    """What all know before a sum: the clients, what it is called, and the largest absolute entry anybody may send."""

    clients: tuple[str, ...]
    bound: float
    purpose: str = ""

    def __post_init__(self) -> None:
        if len(set(self.clients)) < max(LEAST, len(self.clients)):
            raise UsageError(f"A secure sum needs at least {LEAST} different clients, not {list(self.clients)}: of "
                             "two, each would see the other's numbers.")  # fmt: skip
        if not (math.isfinite(self.bound) and 2.0**-900 < self.bound < 2.0**900):
            raise UsageError(f"A secure sum was given the bound {self.bound}: give a positive number that no entry "
                             "exceeds.")  # fmt: skip

    @property
    def bits(self) -> int:
        """Binary places: as many as keep the sum of all clients' largest entries below 2^62."""
        return 62 - math.frexp(len(self.clients) * self.bound)[1]

    @property
    def error(self) -> float:
        """Largest absolute error of an entry of the sum: half a unit per client, and rounding the total to float64."""
        return len(self.clients) * (2.0 ** -(self.bits + 1) + self.bound * 2.0**-53)


class Party:
    """One client in one sum: a fresh key pair that masks one vector and is then used up."""

    def __init__(self, name: str, agreement: Agreement) -> None:
        try:
            from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        except ImportError:
            raise MissingExtraError("Secure sums need the package cryptography: install it with "
                                    "'pip install repforget[federated]'.") from None  # fmt: skip
        if name not in agreement.clients:
            raise UsageError(f"'{name}' is not among the clients of the sum, {', '.join(agreement.clients)}.")
        self.name, self.agreement = name, agreement
        self._key: X25519PrivateKey | None = X25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def masked(self, values: np.ndarray, public: Mapping[str, bytes]) -> np.ndarray:
        """``values`` [n] in fixed point plus this client's masks, [n + 1] uint64 (the last entry counts clients).

        ``public`` holds the public keys of all clients, as the server passed them on: one that passes on keys of its
        own reads everything, so compare them by another way where the server is not trusted that far.  Clients that
        act together see the sum of the rest.  Raises UsageError for entries beyond the bound or not finite, for keys
        that are missing or doubled, and for a second vector under one key, whose difference would be open to all.
        """
        if self._key is None:
            raise UsageError(f"Client '{self.name}' has masked a vector with this key already: make a new Party for "
                             "every sum.")  # fmt: skip
        names = sorted(self.agreement.clients)
        if sorted(public) != names or public[self.name] != self.public or len(set(public.values())) < len(names):
            raise UsageError(f"Client '{self.name}' was given keys that are not one of its own and one of every other "
                             f"client ({', '.join(names)}): exchange the keys again.")  # fmt: skip
        if values.ndim != 1 or not np.isfinite(values).all() or np.abs(values).max(initial=0) > self.agreement.bound:
            raise UsageError(f"Client '{self.name}' holds entries beyond the agreed bound of {self.agreement.bound:g}, "
                             "or not finite: agree on a larger one (--bound).")  # fmt: skip
        fixed = np.rint(np.ldexp(values.astype(np.float64), self.agreement.bits)).astype(np.int64)
        total = np.append(fixed, 1).view(np.uint64)
        keys = [f"{name} {public[name].hex()}" for name in names]
        told = "\n".join([self.agreement.purpose, repr(self.agreement.bound), *keys])
        for other in names:
            if other != self.name:
                mask = _stream(self._key, public[other], told, len(total))
                total = total + mask if self.name < other else total - mask
        self._key = None
        return total


def unmasked(sent: Mapping[str, np.ndarray], agreement: Agreement) -> np.ndarray:
    """The sum [n] float64 of what the clients masked, within ``agreement.error`` of the sum of their values.

    UsageError where a client is missing (its masks cannot be taken off: start again without it, with new keys), where
    sizes differ, and where masks do not cancel, because clients saw different keys or agreements.
    """
    if lost := sorted(set(agreement.clients) - sent.keys()):
        raise UsageError(f"Client '{lost[0]}' sent nothing ({len(lost)} of {len(agreement.clients)} are missing), and "
                         "without it the masks stay: start again with the others and new keys.")  # fmt: skip
    if len({sent[name].shape for name in agreement.clients}) > 1:
        raise UsageError("The clients sent vectors of different sizes: let them send the same tensors.")
    total = np.zeros(sent[agreement.clients[0]].shape, np.uint64)
    for name in agreement.clients:
        total = total + sent[name]
    if int(total[-1]) != len(agreement.clients):
        raise UsageError("The masks do not cancel: the clients saw different keys or agreements; exchange the keys "
                         "again.")  # fmt: skip
    return np.ldexp(total[:-1].view(np.int64).astype(np.float64), -agreement.bits)


def flattened(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """All entries in the order of names, [n] float64."""
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def restored(vector: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """The tensors of :func:`flattened`, from their shapes."""
    sizes = [math.prod(shapes[name]) for name in sorted(shapes)]
    if sum(sizes) != len(vector):
        raise UsageError(f"{len(vector)} numbers were summed where the shapes hold {sum(sizes)}: use the same shapes.")
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(sorted(shapes), parts, strict=True)}


def _stream(key: X25519PrivateKey, public: bytes, told: str, count: int) -> np.ndarray:
    """``count`` uniform 64-bit numbers that only the two owners of the keys can make."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    try:
        secret = key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise UsageError(f"A public key is no point to agree on ({error}): exchange the keys again.") from None
    seed = hashlib.blake2b(told.encode(), key=secret, digest_size=32, person=b"repforget-sum").digest()
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), "<u8").astype(np.uint64)
