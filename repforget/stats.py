"""Mergeable, streaming moments of activations: one pass serves LEACE, mean differences, PCA and ROME.

:class:`Statistics` keeps n, means, the covariance and the cross-covariance with a concept, all accumulated in
float64 from centred blocks and merged with the pairwise update of Chan, Golub and LeVeque (1983):
``S += x̃ᵀx̃ + (n·b/(n+b))·δδᵀ``. Only the upper triangle of the covariance is ever computed.
Memory O(d² + dk) and one block of rows, whatever the number of rows.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from repforget._moments import add_upper_gram, bodnar, digest, one_hot, upper_square_norm
from repforget.errors import ArtifactError, NumericalError, UsageError

Precision = Literal["double", "single"]
Shrinkage = Literal["none", "identity", "diagonal"]

FORMAT = "repforget-statistics-1"
BLOCK_ROWS = 1024  # rows per matrix product: large enough to be compute-bound, small enough for memory
CONSTANT = 1e-13  # a standard deviation below this share of |mean| is rounding of a constant


class Statistics:
    """Running moments of ``x`` [n, d] and optionally of a concept ``z`` [n, k] and their cross-covariance.

    ``precision`` is that of the d×d products alone: "double" multiplies in float64, so that shards merge to
    the one-batch result within 1e-12; "single" multiplies centred float32 blocks and adds them in float64
    (errors below about 1e-6 of σ_i·σ_j whatever the mean or the other features, and nearly twice as fast).
    Means and cross-covariances are float64 in both, hence what LEACE guards is too.

    ``covariance=False`` keeps no d×d matrix (mean differences need none). Position 0 and padding must already
    be excluded by the caller. Mutable by :meth:`update` alone; :meth:`merge` returns a new object.
    """

    __slots__ = (
        "_cross", "_held", "_mean_x", "_mean_z", "_n", "_pending", "_sxx", "d", "k", "meta", "precision",
    )  # fmt: skip

    def __init__(
        self, d: int, k: int = 0, *, precision: Precision = "double", covariance: bool = True,
        device: torch.device | str = "cpu", meta: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        if d < 1 or k < 0:
            raise UsageError(f"Statistics need d >= 1 features and k >= 0, but d={d} and k={k} were given.")
        if precision not in ("double", "single"):
            raise UsageError(f"Statistics precision is 'double' or 'single', not '{precision}'.")
        place: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.d, self.k, self.precision = d, k, precision
        self.meta: dict[str, str] = dict(meta or {})  # model, site, tokenizer, data: whose numbers these are
        self._n = 0
        self._mean_x, self._mean_z = torch.zeros(d, **place), torch.zeros(k, **place)
        self._cross = torch.zeros(k, d, **place)
        self._sxx: Tensor | None = torch.zeros(d, d, **place) if covariance else None  # upper triangle
        self._pending: list[tuple[Tensor, Tensor]] = []  # rows that do not fill a block yet
        self._held = 0

    @classmethod
    def empty(
        cls, d: int, k: int = 0, *, precision: Precision = "double", covariance: bool = True,
        device: torch.device | str = "cpu", meta: Mapping[str, str] | None = None,
    ) -> Statistics:  # fmt: skip
        """Statistics of nothing: the neutral element of :meth:`merge`."""
        return cls(d, k, precision=precision, covariance=covariance, device=device, meta=meta)

    @property
    def device(self) -> torch.device:
        return self._mean_x.device

    # ---------------------------------------------------------------- accumulate

    @torch.no_grad()
    def update(self, x: Tensor, z: Tensor | None = None) -> None:
        """Add rows ``x`` [n, d] (any float dtype) with their concept ``z``.

        ``z`` is [n, k] numbers, or [n] integer classes 0..k-1, which are one-hot encoded (for k = 1: 0 or 1).
        Rows are gathered into blocks of fixed size, so the result does not depend on how they were batched.
        Raises NumericalError for NaN or infinite rows and UsageError for shapes and labels that do not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.d:
            raise UsageError(f"Statistics of {self.d} features were given x of shape {tuple(x.shape)}, "
                             f"expected [n, {self.d}].")  # fmt: skip
        rows = x.detach()
        concept = self._concept(z, len(rows))
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + BLOCK_ROWS - self._held)
            part = rows[start:stop].to(self.device), concept[start:stop]
            if stop - start == BLOCK_ROWS:
                self._absorb(*part)
            else:
                # a copy: the caller may reuse its buffer before the block is full
                self._pending.append((part[0].clone(), part[1].clone()))
                self._held += stop - start
                if self._held == BLOCK_ROWS:
                    self._flush()
            start = stop

    def _concept(self, z: Tensor | None, n: int) -> Tensor:
        if (z is None) != (self.k == 0):
            expected = "no concept" if self.k == 0 else f"a concept of {self.k} dimensions"
            found = "without z" if z is None else "with z"
            raise UsageError(f"These statistics track {expected}, but update() was called {found}.")
        if z is None:
            return torch.zeros(n, 0, dtype=torch.float64, device=self.device)
        z = z.detach().to(self.device)
        if z.ndim == 1 and not z.is_floating_point() and z.dtype != torch.bool:
            z = one_hot(z, self.k)
        elif z.ndim == 1 and self.k == 1:
            z = z[:, None]
        if z.shape != (n, self.k):
            raise UsageError(f"The concept has shape {tuple(z.shape)}: expected [{n}, {self.k}] numbers or "
                             f"[{n}] integer classes.")  # fmt: skip
        if not bool(torch.isfinite(z).all()):
            raise UsageError("The concept z holds NaN or infinite values: give finite numbers or classes.")
        return z.to(torch.float64)

    def _flush(self) -> None:
        if self._pending:
            dtype = max((x.dtype for x, _ in self._pending), key=lambda t: torch.finfo(t).bits)
            x = torch.cat([x.to(dtype) for x, _ in self._pending])
            z = torch.cat([z for _, z in self._pending])
            self._pending, self._held = [], 0
            self._absorb(x, z)

    def _absorb(self, x: Tensor, z: Tensor) -> None:
        """Merge one block: its centred rows and, as one more row, the step between block and running mean."""
        b, n = len(x), self._n
        rows = torch.empty(b + 1, self.d, dtype=torch.float64, device=self.device)
        concept = torch.empty(b + 1, self.k, dtype=torch.float64, device=self.device)
        step, share = math.sqrt(n * b / (n + b)), b / (n + b)
        for centred, values, mean in ((rows, x, self._mean_x), (concept, z, self._mean_z)):
            block = centred[:b].copy_(values)
            change = block.mean(0)
            if not bool(torch.isfinite(change).all()):
                where = f" at {self.meta['site']}" if "site" in self.meta else ""
                raise NumericalError(f"NaN or infinite activations{where} among {b} rows: statistics need "
                                     "finite rows; load the model in float32 or bfloat16.")  # fmt: skip
            block -= change
            change -= mean
            torch.mul(change, step, out=centred[b])
            mean.add_(change, alpha=share)
        self._n = n + b
        if self.k:
            self._cross += concept.mT @ rows
        if self._sxx is not None:
            add_upper_gram(self._sxx, rows if self.precision == "double" else rows.float())

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows; neither operand changes, and the order does not matter."""
        same = (self.d, self.k, self._sxx is None) == (other.d, other.k, other._sxx is None)
        if not same:
            raise UsageError(f"Statistics of d={self.d}, k={self.k} cannot be merged with d={other.d}, "
                             f"k={other.k}: both must track the same quantities.")  # fmt: skip
        differing = [key for key in self.meta.keys() & other.meta.keys() if self.meta[key] != other.meta[key]]
        if {"model", "site"} & set(differing):
            raise UsageError(f"Statistics of different {' and '.join(sorted(differing))} cannot be merged.")
        self._flush()
        other._flush()
        precision: Precision = "double" if {self.precision, other.precision} == {"double"} else "single"
        meta = {key: value for key, value in {**other.meta, **self.meta}.items() if key not in differing}
        out = Statistics(self.d, self.k, precision=precision, covariance=self._sxx is not None,
                         device=self.device, meta=meta)  # fmt: skip
        a, b = self._n, other._n
        out._n = a + b
        share = b / (a + b) if a + b else 0.0
        dx, dz = other._mean_x.to(self.device) - self._mean_x, other._mean_z.to(self.device) - self._mean_z
        out._mean_x, out._mean_z = self._mean_x + dx * share, self._mean_z + dz * share
        out._cross = self._cross + other._cross.to(self.device) + a * share * torch.outer(dz, dx)
        if self._sxx is not None and other._sxx is not None:
            out._sxx = (self._sxx + other._sxx.to(self.device)).addr_(dx, dx, alpha=a * share)
        return out

    @classmethod
    def from_sums(cls, sums: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> Statistics:
        """Statistics from plain sums over rows, as :meth:`sums` gives them, added up anywhere and in any order.

        Digits cancel where means are large against deviations: prefer :meth:`merge` where the parts may be seen.
        """
        d, k, n = len(sums["x"]), len(sums["z"]), round(float(sums["n"]))
        out = cls(d, k, covariance="xx" in sums, device=sums["x"].device, meta=meta)
        if n:
            out._n, out._mean_x, out._mean_z = n, sums["x"] / n, sums["z"] / n
            out._cross = sums["zx"] - n * torch.outer(out._mean_z, out._mean_x)
        if n and "xx" in sums:
            out._sxx = torch.triu(sums["xx"] - n * torch.outer(out._mean_x, out._mean_x))
        return out

    # ---------------------------------------------------------------- read

    def sums(self) -> dict[str, Tensor]:
        """Plain sums over the rows, float64: n [1], x [d], z [k], z xᵀ [k, d] and, where kept, x xᵀ [d, d]."""
        self._flush()
        n, x, z = self._n, self._mean_x, self._mean_z
        found = {"n": torch.tensor([n], dtype=torch.float64, device=self.device), "x": n * x, "z": n * z,
                 "zx": self._cross + n * torch.outer(z, x)}  # fmt: skip
        if self._sxx is not None:
            found["xx"] = torch.triu(self._sxx) + torch.triu(self._sxx, 1).mT + n * torch.outer(x, x)
        return found

    @property
    def n(self) -> int:
        """Number of rows seen."""
        return self._n + self._held

    @property
    def mean_x(self) -> Tensor:
        """Mean of the features, [d] float64."""
        self._need(1)
        return self._mean_x.clone()

    @property
    def mean_z(self) -> Tensor:
        """Mean of the concept, [k] float64 (for one-hot labels the class frequencies)."""
        self._need(1)
        return self._mean_z.clone()

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance of the features, [d, d] float64."""
        return self._scatter(2) / (self._n - 1)

    @property
    def cross(self) -> Tensor:
        """Unbiased cross-covariance of features and concept, [d, k] float64."""
        self._need(2)
        return (self._cross / (self._n - 1)).mT

    @property
    def variances(self) -> Tensor:
        """Unbiased variance of each feature, [d] float64; exactly 0 for constant features."""
        self._scatter_upper(2)
        return self._variances() * (self._n / (self._n - 1))

    @property
    def second_moment(self) -> Tensor:
        """Uncentred second moment E[x xᵀ], [d, d] float64 (the C of ROME and MEMIT)."""
        return (self._scatter(1) / self._n).addr_(self._mean_x, self._mean_x)

    def principal(self, r: int, *, centred: bool = False) -> tuple[Tensor, Tensor]:
        """The ``r`` leading principal directions [r, d] and their second moments [r], largest first.

        Uncentred by default: for paired differences the mean *is* the signal, and centring removes it.
        """
        if not 1 <= r <= self.d:
            raise UsageError(f"There are no {r} principal directions of {self.d} features: ask for fewer.")
        values, vectors = torch.linalg.eigh(self.cov if centred else self.second_moment)
        return vectors[:, -r:].flip(1).mT.contiguous(), values[-r:].flip(0).clamp_min(0.0)

    def shrunk(self, shrinkage: Shrinkage = "identity") -> Tensor:
        """Shrunk covariance, [d, d] float64.

        "identity": optimal linear shrinkage towards (tr S/d)·I (Bodnar et al. 2013, arXiv 1308.2608).
        "diagonal": the same formula on the correlation matrix, that is towards diag(S): unlike "identity" it
        does not let one massive feature set the scale of all others. "none": S = Sxx/(n-1).
        """
        keep, floor, divisor = self._shrinkage(shrinkage)
        full = self._scatter(2) / divisor
        diagonal = self._variances() * (self._n / divisor)
        full.mul_(keep).diagonal().copy_(keep * diagonal + floor)
        return full

    def correlation(self, shrinkage: Shrinkage = "none") -> tuple[Tensor, Tensor]:
        """The (shrunk) covariance Σ scaled to unit diagonal, and the scale: ``corr = scale ⊙ Σ ⊙ scale``.

        Returns corr [d, d] float64, *of which only the upper triangle is valid*, and scale [d]. Constant
        features get scale 0, an empty row and a unit diagonal, so that corr stays factorable.
        """
        keep, floor, divisor = self._shrinkage(shrinkage)
        upper, variance = self._scatter_upper(2), self._variances() * (self._n / divisor)
        total = keep * variance + floor
        scale = torch.where(variance > 0, total.rsqrt(), torch.zeros_like(total))
        corr = upper * (scale * (keep / divisor))[:, None]
        corr *= scale
        corr.diagonal().fill_(1.0)
        return corr, scale

    def _shrinkage(self, kind: Shrinkage) -> tuple[float, Tensor, int]:
        """(keep, floor [d], divisor) such that Σ = keep·S + diag(floor) with S = scatter/divisor."""
        upper, variance, n = self._scatter_upper(2), self._variances(), self._n
        if kind == "none":
            return 1.0, torch.zeros_like(variance), n - 1
        if kind == "identity":
            trace = float(variance.sum())
            keep = bodnar(trace, upper_square_norm(upper) / n**2, n, self.d)
            return keep, torch.full_like(variance, (1 - keep) * trace / self.d), n
        if kind == "diagonal":
            live = variance > 0
            inverse = torch.where(live, 1 / (variance * n), torch.zeros_like(variance))
            d = int(live.sum())
            keep = bodnar(float(d), upper_square_norm(upper, inverse), n, d) if d else 0.0
            return keep, (1 - keep) * variance, n
        raise UsageError(f"Shrinkage is 'none', 'identity' or 'diagonal', not '{kind}'.")

    @property
    def resolution(self) -> float:
        """Eigenvalues of the correlation matrix below this are rounding, not variance."""
        if self.precision == "double":
            return 1e3 * self.d * torch.finfo(torch.float64).eps
        return 8 * math.sqrt(self.d) * torch.finfo(torch.float32).eps

    def _variances(self) -> Tensor:
        """Biased variances with the rounding noise of constant features set to exactly 0."""
        assert self._sxx is not None
        variance = self._sxx.diagonal() / self._n
        live = variance > (CONSTANT * self._mean_x).square()
        return torch.where(live, variance, torch.zeros_like(variance))

    def _need(self, rows: int) -> None:
        self._flush()
        if self._n < rows:
            raise UsageError(f"Statistics of {self._n} rows were read where at least {rows} are needed: "
                             "call update() first.")  # fmt: skip

    def _scatter_upper(self, rows: int) -> Tensor:
        self._need(rows)
        if self._sxx is None:
            raise UsageError("These statistics track no covariance: create them with covariance=True.")
        return self._sxx

    def _scatter(self, rows: int) -> Tensor:
        upper = self._scatter_upper(rows)
        return torch.triu(upper) + torch.triu(upper, 1).mT

    # ---------------------------------------------------------------- keep

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a JSON header, atomically; loading it gives back the same bits."""
        from safetensors.torch import save

        self._flush()
        header = {"format": FORMAT, "d": self.d, "k": self.k, "n": self._n, "precision": self.precision,
                  "meta": self.meta, "sha256": digest(self._tensors())}  # fmt: skip
        data = save(self._tensors(), {"repforget": json.dumps(header, sort_keys=True)})
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file written by :meth:`save`; ArtifactError if missing, damaged or of another format."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("repforget", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, ValueError) as error:
            raise ArtifactError(f"Statistics file '{path}' is unreadable ({error}): recompute it.") from None
        if header.get("format") != FORMAT:
            raise ArtifactError(f"'{path}' is no statistics file of format '{FORMAT}': compute it again.")
        if header["sha256"] != digest(tensors):
            raise ArtifactError(f"Statistics file '{path}' is damaged (checksum differs): compute it again.")
        parts = {**tensors, "n": torch.tensor([header["n"]], dtype=torch.float64)}
        return cls.from_parts(parts, header["meta"], header["precision"])

    def parts(self) -> dict[str, Tensor]:
        """What :meth:`from_parts` makes the same statistics of, bit for bit: float64 tensors on the CPU."""
        self._flush()
        return {**self._tensors(), "n": torch.tensor([self._n], dtype=torch.float64)}

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], meta: Mapping[str, str] | None = None, precision: Precision = "double"
    ) -> Statistics:
        """Statistics from their :meth:`parts`, on the device of these."""
        d, k = len(parts["mean_x"]), len(parts["mean_z"])
        out = cls(d, k, precision=precision, covariance=False, device=parts["mean_x"].device, meta=meta)
        out._n = round(float(parts["n"]))
        out._mean_x, out._mean_z, out._cross = parts["mean_x"], parts["mean_z"], parts["cross"]
        out._sxx = parts.get("scatter_upper")
        return out

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"mean_x": self._mean_x, "mean_z": self._mean_z, "cross": self._cross}
        if self._sxx is not None:
            tensors["scatter_upper"] = torch.triu(self._sxx)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
