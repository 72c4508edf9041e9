"""Affine translators: from the basis a layer uses to that of the last residual state, one per layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from repforget.models.load import LoadedModel
from repforget.models.readout import lens

BATCH = 256  # states per training step


class Translator:
    """h -> h + W h + b in float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.weight = torch.zeros(width, width, device=device, requires_grad=True)
        self.bias = torch.zeros(width, device=device, requires_grad=True)

    def __call__(self, h: Tensor) -> Tensor:
        wide = h.float()
        return wide + wide @ self.weight.T + self.bias


def fit_translator(model: LoadedModel, h: Tensor, last: Tensor, steps: int, lr: float, seed: int) -> Translator:
    """Fit the translator of one layer so that states h [n, d] read out like ``last`` [n, d], the last states.

    It starts at the identity and takes ``steps`` Adam steps on KL(readout of ``last`` || readout of the translated
    state), 256 states drawn by ``seed`` each; the model's own final norm and unembedding decode.  Cost: as many
    unembeddings forward and backward; d^2 numbers.  Source: Belrose et al. 2023, arXiv 2303.08112.
    """
    translator = Translator(h.shape[-1], h.device)
    optimizer = torch.optim.Adam([translator.weight, translator.bias], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    wanted = [p for p in model.module.parameters() if p.requires_grad]
    try:
        for p in wanted:  # gradients are the translator's alone
            p.requires_grad_(False)
        with torch.enable_grad():
            for _ in range(steps):
                chosen = torch.randint(len(h), (BATCH,), generator=generator).to(h.device)
                with torch.no_grad():
                    target = lens(model, last[chosen]).float().log_softmax(-1)
                found = lens(model, translator(h[chosen])).float().log_softmax(-1)
                loss = functional.kl_div(found, target, reduction="batchmean", log_target=True)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        for p in wanted:
            p.requires_grad_(True)
    return translator
