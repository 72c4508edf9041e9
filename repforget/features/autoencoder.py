"""A sparse autoencoder of one site as a frozen value, and its arithmetic in float32."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from repforget.errors import ArtifactError, UsageError
from repforget.records import Site

Activation = Literal["relu", "jumprelu", "topk"]
Scaling = Literal["none", "constant_norm_rescale", "layer_norm"]
TINY = 1e-5  # added to the deviation of a normalised input, as the files' own reader does


def rescaled(x: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` [.., d] as the autoencoder reads it, and the factor and the shift [.., 1] that undo it."""
    one, zero = x.new_ones(()), x.new_zeros(())
    if scaling == "none":
        return x, one, zero
    if scaling == "constant_norm_rescale":
        unit = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
        return x / unit, unit, zero
    mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (spread + TINY), spread, mean


def encoded(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Values [.., n] of features that look at x alone (0 where idle), and the factor that undoes the scaling."""
    inner, unit, _ = rescaled(x, scaling)
    f = inner @ encoder.T + bias
    return torch.where(f > threshold, f, 0.0), unit


def share_open(active: Tensor, tokens: Tensor, share: float, prior: float) -> Tensor:
    """Where a sequence gate is open: from the first token on by which more than ``share`` of the tokens were active.

    ``active`` [b, s] bool (False on tokens that do not count), ``tokens`` [b, s] counted so far; ``prior`` idle tokens
    are counted in front, which keeps short beginnings from deciding.
    """
    return (highest_share(active, tokens, prior) > share).long().cumsum(1) > 0


def highest_share(active: Tensor, tokens: Tensor, prior: float) -> Tensor:
    """Share of active tokens among those so far, at every token [b, s], float32."""
    return active.long().cumsum(1).float() / (tokens.float() + prior).clamp(min=1.0)


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """``x ~ f @ decoder + decoder_bias`` with ``f = activation(encoder (x - centre) + encoder_bias)`` at one site.

    ``centre`` is ``decoder_bias`` where ``centred``, else 0; ``scaling`` is what is done to x before and undone after.
    "relu" and "jumprelu" (values at most ``threshold`` are 0) look at every feature alone; "topk" keeps the ``top``
    largest values of a token, so that a feature depends on all others: :meth:`thresholded` makes it independent.
    Tensors are float32.  Raises ArtifactError for shapes that do not fit and for NaN or infinity.
    """

    site: Site
    encoder: Tensor  # [k, d]
    decoder: Tensor  # [k, d]
    encoder_bias: Tensor  # [k]
    decoder_bias: Tensor  # [d]
    activation: Activation = "relu"
    threshold: Tensor | None = None  # [k]
    top: int = 0
    centred: bool = True
    scaling: Scaling = "none"

    def __post_init__(self) -> None:
        k, d = self.encoder.shape if self.encoder.ndim == 2 else (0, 0)
        wanted = {"encoder": (k, d), "decoder": (k, d), "encoder_bias": (k,), "decoder_bias": (d,)}
        if self.activation == "jumprelu":
            wanted["threshold"] = (k,)
        for name, shape in wanted.items():
            value = getattr(self, name)
            found = None if value is None else tuple(value.shape)
            if found != shape or 0 in shape:
                raise ArtifactError(f"'{name}' of the autoencoder at {self.site} has shape {found}: an encoder [k, d] "
                                    "and a decoder of the same shape are needed, with biases [k] and [d].")  # fmt: skip
            if not bool(torch.isfinite(value).all()):
                raise ArtifactError(f"'{name}' of the autoencoder at {self.site} has NaN or infinite entries: take the "
                                    "file from its source again.")  # fmt: skip
            object.__setattr__(self, name, value.detach().float())
        if self.activation not in get_args(Activation) or self.scaling not in get_args(Scaling):
            raise ArtifactError(f"The autoencoder at {self.site} has activation '{self.activation}' and scaling "
                                f"'{self.scaling}': known are {', '.join(get_args(Activation))}, and "
                                f"{', '.join(get_args(Scaling))}.")  # fmt: skip
        if self.activation == "topk" and not 1 <= self.top <= k:
            raise ArtifactError(f"The autoencoder at {self.site} keeps the {self.top} largest of {k} features: give 1 "
                                f"to {k}.")  # fmt: skip

    @property
    def size(self) -> int:
        """Number of features k."""
        return len(self.encoder)

    @property
    def width(self) -> int:
        """Width d of the site."""
        return self.encoder.shape[1]

    @cached_property
    def digest(self) -> str:
        """sha256 of the site and every number: two autoencoders with one digest compute the same."""
        about = (str(self.site), self.activation, self.top, self.centred, self.scaling)
        body = hashlib.sha256(repr(about).encode())
        for value in (self.encoder, self.decoder, self.encoder_bias, self.decoder_bias, self.threshold):
            body.update(b"none" if value is None else value.cpu().contiguous().numpy().tobytes())
        return body.hexdigest()

    def to(self, device: torch.device | str) -> SparseAutoencoder:
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **moved)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder [k, d], bias [k] and threshold [k] (at least 0) of features that each look at x alone."""
        if self.activation == "topk":
            raise UsageError(f"A feature of the autoencoder at {self.site} depends on all others (topk), so that none "
                             "can be set by itself: give it a threshold first (thresholded).")  # fmt: skip
        bias = self.encoder_bias - self.encoder @ self.decoder_bias if self.centred else self.encoder_bias
        threshold = torch.zeros_like(bias) if self.threshold is None else self.threshold.clamp(min=0.0)
        return self.encoder, bias, threshold

    def encode(self, x: Tensor) -> Tensor:
        """Feature values [.., k] of activations [.., d], float32."""
        x = x.float()
        if self.activation != "topk":
            return encoded(x, *self.rows(), self.scaling)[0]
        f = self._values(x).relu()
        kept = f.topk(self.top, dim=-1)
        return torch.zeros_like(f).scatter(-1, kept.indices, kept.values)

    def decode(self, f: Tensor, like: Tensor | None = None) -> Tensor:
        """Reconstruction [.., d] of feature values; ``like`` are the activations whose scaling is undone."""
        inner = f @ self.decoder + self.decoder_bias
        if self.scaling == "none":
            return inner
        if like is None:
            raise UsageError(f"The autoencoder at {self.site} scales its inputs ({self.scaling}): give the activations "
                             "to decode for (like).")  # fmt: skip
        _, unit, shift = rescaled(like.float(), self.scaling)
        return inner * unit + shift

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the features keep of activations [.., d], float32."""
        return self.decode(self.encode(x), x)

    def thresholded(self, x: Tensor) -> SparseAutoencoder:
        """With a common threshold in place of "topk", above which as many features per token of ``x`` [n, d] are."""
        if self.activation != "topk":
            return self
        f = self._values(x.float()).relu().flatten()
        count = min(int((f > 0).sum()), self.top * (len(f) // self.size))
        level = float(f.topk(count + 1).values[-1]) if count < len(f) else 0.0
        threshold = torch.full_like(self.encoder_bias, level)
        return dataclasses.replace(self, activation="jumprelu", threshold=threshold, top=0)

    def _values(self, x: Tensor) -> Tensor:
        inner = rescaled(x, self.scaling)[0]
        return (inner - self.decoder_bias if self.centred else inner) @ self.encoder.T + self.encoder_bias
