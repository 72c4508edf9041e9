"""Autoencoders on disk: ``cfg.json`` beside ``sae_weights.safetensors``, or the ``params.npz`` of Gemma Scope."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repforget.errors import ArtifactError
from repforget.features.autoencoder import SparseAutoencoder
from repforget.records import Site
from repforget.store import json_bytes, refusing, write_atomic

CONFIG, WEIGHTS, ARRAYS = "cfg.json", "sae_weights.safetensors", "params.npz"
_HOOK = re.compile(r"blocks\.(\d+)\.(?:(?:attn|mlp)\.)?hook_(\w+)$")
HOOKS = {"resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": "resid_post", "attn_out": "attn_out",
         "mlp_out": "mlp_out", "z": "attn_z", "post": "mlp_post"}  # fmt: skip
INSIDE = {"attn_z": "attn.hook_z", "mlp_post": "mlp.hook_post"}  # kind -> hook, where the name is not hook_<kind>
SCOPE = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}  # ending of a Gemma Scope repository -> kind


def read(path: str | Path, site: Site | None = None) -> SparseAutoencoder:
    """The autoencoder in a folder or file; nothing in it is executed (no pickle).

    Read are SAELens folders of the architectures standard, jumprelu and topk, and ``params.npz`` (jumprelu).  ``site``
    overrides the declared one; it is needed where the file does not say (for ``params.npz`` the path is asked:
    ``..-res/layer_3/..`` is resid_post.3, which is the *output* of block 3).  Raises ArtifactError, one sentence, for
    a file that is missing, damaged or of another architecture.
    """
    place = _found(Path(path))
    if place.suffix == ".npz":
        return _of_arrays(place, _arrays(place), site)
    config = _config(place.parent / CONFIG)
    return _checked(place, config, _build(place, config, _tensors(place), site))


def save(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Write ``cfg.json`` and ``sae_weights.safetensors`` in the layout of SAELens; returns the folder."""
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    kind, layer = sae.site.kind, sae.site.layer
    architecture = {"relu": "standard"}.get(sae.activation, sae.activation)
    hook = f"blocks.{layer}.{INSIDE.get(kind, f'hook_{kind}')}"
    config = {
        "architecture": architecture, "d_in": sae.width, "d_sae": sae.size, "dtype": "float32",
        "apply_b_dec_to_input": sae.centred, "normalize_activations": sae.scaling, "reshape_activations": "none",
        "metadata": {"hook_name": hook, "site": str(sae.site), "sha256": sae.digest},
        **({"k": sae.top} if sae.activation == "topk" else {}),
    }  # fmt: skip
    held = {"W_enc": sae.encoder.T, "b_enc": sae.encoder_bias, "W_dec": sae.decoder, "b_dec": sae.decoder_bias,
            **({} if sae.threshold is None else {"threshold": sae.threshold})}  # fmt: skip
    with refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS, to_bytes({name: t.cpu().contiguous().clone() for name, t in held.items()}))
        write_atomic(folder / CONFIG, json_bytes(config))
    return folder


def _found(path: Path) -> Path:
    """The file of weights that a path names."""
    inside = [path / WEIGHTS, path / ARRAYS] if path.is_dir() else [path]
    inside = [path.parent / WEIGHTS if p.name == CONFIG else p for p in inside]
    place = next((p for p in inside if p.is_file()), None)
    if place is None or place.suffix not in (".npz", ".safetensors"):
        raise ArtifactError(f"There is no autoencoder at '{path}': give a folder with {CONFIG} and {WEIGHTS}, or a "
                            f"{ARRAYS}.")  # fmt: skip
    return place


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read ({error}): it belongs beside the weights of an autoencoder and "
                            "says what they are.") from None  # fmt: skip
    if not isinstance(found, dict):
        raise ArtifactError(f"'{path}' is not the configuration of an autoencoder: give the folder as it was written.")
    found = {**found, **inner} if isinstance(inner := found.get("metadata"), dict) else found
    told = found.get("activation_fn_kwargs")
    return {**found, "k": told["k"]} if isinstance(told, dict) and "k" in told else found


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held: dict[str, Tensor] = load_file(path)
        return held
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{path}' is no safetensors file ({error}): take it from its source again.") from None


def _arrays(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: torch.from_numpy(held[name]) for name in held.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"'{path}' cannot be read as plain arrays ({error}): take it from its source "
                            "again.") from None  # fmt: skip


def _of_arrays(path: Path, held: Mapping[str, Tensor], site: Site | None) -> SparseAutoencoder:
    layer = re.search(r"layer_(\d+)", str(path))
    kind = next((kind for end, kind in SCOPE.items() if re.search(rf"-{end}(?:\b|_)", str(path))), None)
    if site is None and layer is not None and kind is not None:
        site = Site(kind, int(layer[1]))
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    return _build(path, config, held, site)


def _site(path: Path, config: Mapping[str, Any]) -> Site:
    if isinstance(config.get("site"), str):
        return Site.parse(config["site"])
    hook = _HOOK.match(str(config.get("hook_name", "")))
    if hook is None or hook[2] not in HOOKS:
        said = f"the hook '{config['hook_name']}', which is no site here" if config.get("hook_name") else "no site"
        raise ArtifactError(f"'{path}' names {said}: say where the autoencoder belongs, for example "
                            "site resid_post.3.")  # fmt: skip
    return Site(HOOKS[hook[2]], int(hook[1]))


def _build(path: Path, config: Mapping[str, Any], held: Mapping[str, Tensor], site: Site | None) -> SparseAutoencoder:
    architecture = str(config.get("architecture", "standard"))
    if config.get("activation_fn_str") == "topk" or config.get("activation_fn") == "topk":
        architecture = "topk"
    activation = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}.get(architecture)
    strange = next((name for name in ("hook_name_out", "hook_head_index", "finetuning_scaling_factor")
                    if config.get(name) not in (None, False)), None)  # fmt: skip
    if activation is None or strange:
        what = f"'{strange}'" if strange else f"architecture '{architecture}'"
        raise ArtifactError(f"'{path}' has {what}, which is not read: autoencoders of one whole site are, of "
                            "architecture standard, jumprelu or topk.")  # fmt: skip
    wanted = ("W_enc", "b_enc", "W_dec", "b_dec", *(("threshold",) if activation == "jumprelu" else ()))
    missing = [name for name in wanted if name not in held]
    if missing:
        raise ArtifactError(f"'{path}' holds no array '{missing[0]}': it has {', '.join(sorted(held)) or 'none'}, and "
                            f"an autoencoder needs {', '.join(wanted)}.")  # fmt: skip
    odd = next((name for name in wanted if not held[name].is_floating_point()), None)
    kept = config.get("k", 0)
    if odd or (activation == "topk" and not isinstance(kept, int)):
        what = f"'{odd}' of {held[odd].dtype}" if odd else f"the number of active features '{kept}'"
        raise ArtifactError(f"'{path}' has {what}: an autoencoder has real numbers, and a whole number for topk.")
    sae = SparseAutoencoder(
        site or _site(path, config), held["W_enc"].T.contiguous(), held["W_dec"], held["b_enc"], held["b_dec"],
        activation, held["threshold"] if activation == "jumprelu" else None,  # type: ignore[arg-type]
        kept if activation == "topk" else 0, bool(config.get("apply_b_dec_to_input", True)),
        config.get("normalize_activations") or "none",
    )  # fmt: skip
    if not config.get("rescale_acts_by_decoder_norm", False):
        return sae
    norms = sae.decoder.norm(dim=1)
    return dataclasses.replace(sae, encoder=sae.encoder * norms[:, None], encoder_bias=sae.encoder_bias * norms,
                               decoder=sae.decoder / norms[:, None].clamp(min=1e-30))  # fmt: skip


def _checked(path: Path, config: Mapping[str, Any], sae: SparseAutoencoder) -> SparseAutoencoder:
    """What this package wrote is what it reads; what others wrote has no hash."""
    known = config.get("sha256")
    if known is not None and str(sae.site) == config.get("site") and sae.digest != known:
        raise ArtifactError(f"'{path}' does not match its {CONFIG}: it is truncated or damaged, so train it again or "
                            "take it from a backup.")  # fmt: skip
    return sae
