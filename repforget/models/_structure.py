"""Reads the anatomy of a decoder from its module tree: pure structure, no forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from repforget.errors import SiteError
from repforget.models import _names as names
from repforget.models._names import child, join, path_of, text_config

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerPaths:
    """Module paths of one block; None where the architecture has no such part."""

    path: str
    attention: str
    attention_out: str
    qkv: tuple[str, str, str] | str  # three paths, or one fused projection
    mlp: str | None  # None: the block itself holds the projections (OPT)
    up: str | None
    gate: str | None
    gate_up: str | None  # fused gate and up (Phi-3)
    down: str | None
    experts: str | None  # module that holds 3-D expert tensors
    router: str | None
    attention_norm: str | None
    attention_post_norm: str | None
    mlp_norm: str | None
    mlp_post_norm: str | None


@dataclass(frozen=True)
class Anatomy:
    """Where everything is, and the sizes that follow from it."""

    model_type: str
    layers: tuple[LayerPaths, ...]
    stack: str  # module that holds embedding, blocks and final norm
    embed: str
    position_embed: str | None
    final_norm: str
    unembed: str
    parallel: bool
    layout: str  # of a fused QKV: "blocks" or "groups"; "" where q, k and v are separate
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int


@dataclass
class _Coverage:
    """What was found per role, for the sentence of the error."""

    depth: int
    found: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)

    def need(self, role: str, path: str | None) -> str:
        self.found[role] += path is not None
        if path is None and role not in self.missing:
            self.missing.append(role)
        return path or ""

    def table(self) -> str:
        cells = [f"{role} {count}/{self.depth}" for role, count in self.found.items()]
        return ", ".join(cells) + (f"; parameters of unknown meaning: {', '.join(self.unclaimed[:4])}"
                                   + (f" and {len(self.unclaimed) - 4} more" if len(self.unclaimed) > 4 else "")
                                   if self.unclaimed else "")  # fmt: skip


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a Linear, Conv1D or adapter-wrapped projection."""
    base: Any = getattr(module, "base_layer", module)
    if hasattr(base, "out_features"):
        return int(base.out_features), int(base.in_features)
    return int(base.nf), int(base.nx)  # transformers' Conv1D stores [in, out]


def block_list(module: nn.Module, depth: int) -> str:
    """Return the path of the shallowest module list with one entry per layer."""
    lists = [path for path, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise SiteError(f"{type(module).__name__} has no list of {depth} blocks, so that its layers cannot "
                        "be found: only decoder-only transformers are covered.")  # fmt: skip
    found: str = min(lists, key=lambda path: path.count("."))
    return found


def anatomy(module: nn.Module) -> Anatomy:
    """Read the anatomy of ``module``; raises SiteError with the coverage where anything is unknown."""
    config = text_config(module)
    if not hasattr(config, "num_hidden_layers") or not hasattr(module, "get_output_embeddings"):
        raise SiteError(f"{type(module).__name__} is not a transformers causal language model with a configuration, so "
                        "that it has no sites; load it with repforget.load.")  # fmt: skip
    _refuse_known_exceptions(module, config)
    depth = int(config.num_hidden_layers)
    root = block_list(module, depth)
    coverage = _Coverage(depth)
    layers = tuple(_layer(module, f"{root}.{i}", coverage) for i in range(depth))
    stack = root.rpartition(".")[0]
    holder = module.get_submodule(stack)
    embed = coverage.need("embedding", path_of(module, module.get_input_embeddings()))  # type: ignore[operator]
    positions = _position_embedding(module, stack, embed)
    norm = child(holder, names.FINAL_NORM)
    final = coverage.need("final norm", join(stack, norm) if norm else None)
    unembed = coverage.need("unembedding", path_of(module, module.get_output_embeddings()))  # type: ignore[operator]
    claimed = {embed, final, positions} | {path for layer in layers for path in _claimed(layer)}
    coverage.unclaimed.extend(_unclaimed(module, stack, {path for path in claimed if path}))
    layout = _layout(config.model_type, layers, coverage)
    if coverage.missing or coverage.unclaimed:
        raise SiteError(f"{type(module).__name__} is only partly covered, and a site that is guessed would "
                        f"falsify every result: found {coverage.table()}; missing: "
                        f"{', '.join(coverage.missing) or 'nothing'}; use a covered architecture.")  # fmt: skip
    sizes = _sizes(module, config, layers[0], embed)
    return Anatomy(config.model_type, layers, stack, embed, positions, final, unembed, _parallel(config, layers[0]),
                   layout, **sizes)  # fmt: skip


def _refuse_known_exceptions(module: nn.Module, config: Any) -> None:
    reasons = {
        "it is an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "it normalises the residual stream itself": getattr(config, "do_layer_norm_before", True) is False,
        "it has cross-attention": getattr(config, "add_cross_attention", False),
        "it scales what is written to the residual stream": getattr(config, "residual_multiplier", 1.0) != 1.0,
    }
    for reason, applies in reasons.items():
        if applies:
            raise SiteError(f"{type(module).__name__} is not covered because {reason}, so that resid_pre + "
                            "attn_out + mlp_out is not resid_post; use a pre-norm decoder-only model.")  # fmt: skip


def _layer(module: nn.Module, path: str, coverage: _Coverage) -> LayerPaths:
    block = module.get_submodule(path)

    def at(parent: str, candidates: tuple[str, ...]) -> str | None:
        name = child(module.get_submodule(parent), candidates) if parent else None
        return join(parent, name) if name else None

    attention = coverage.need("attention", at(path, names.ATTENTION))
    out = coverage.need("attention output projection", at(attention, names.ATTENTION_OUT))
    mlp = at(path, names.MLP)
    inner = mlp or path
    experts = at(inner, names.EXPERTS)
    down, up, fused = at(inner, names.MLP_DOWN), at(inner, names.MLP_UP), at(inner, names.MLP_FUSED)
    coverage.need("MLP down projection", down or experts)
    coverage.need("MLP up projection", up or fused or experts)
    sandwich = at(path, names.NORM_AFTER_MLP)
    after = [] if sandwich is None else [at(path, names.NORM_AFTER_ATTENTION)]
    before = tuple(n for n in names.NORM_BEFORE_MLP if not (after and n in names.NORM_AFTER_ATTENTION))
    mlp_norm = child(block, before)
    return LayerPaths(
        path=path, attention=attention, attention_out=out, qkv=_qkv(module, attention, coverage), mlp=mlp, up=up,
        gate=None if experts else at(inner, names.MLP_GATE), gate_up=fused, down=down, experts=experts,
        router=at(inner, names.ROUTER) if experts else None, attention_norm=at(path, names.NORM_BEFORE_ATTENTION),
        attention_post_norm=after[0] if after else None, mlp_norm=join(path, mlp_norm) if mlp_norm else None,
        mlp_post_norm=sandwich,
    )  # fmt: skip


def _qkv(module: nn.Module, attention: str, coverage: _Coverage) -> tuple[str, str, str] | str:
    parent = module.get_submodule(attention) if attention else None
    fused = child(parent, names.QKV_FUSED)
    if fused:
        return coverage.need("query, key, value", join(attention, fused))
    for trio in names.QKV_SPLIT:
        if all(child(parent, (name,)) for name in trio):
            coverage.need("query, key, value", attention)
            q, k, v = (join(attention, name) for name in trio)
            return q, k, v
    return coverage.need("query, key, value", None)


def _position_embedding(module: nn.Module, stack: str, embed: str) -> str | None:
    """A second embedding table beside the token table (GPT-2 wpe, OPT embed_positions)."""
    for name, part in module.get_submodule(stack).named_children():
        if isinstance(part, nn.Embedding) and join(stack, name) != embed:
            return join(stack, name)
    return None


def _claimed(layer: LayerPaths) -> Iterator[str | None]:
    yield from (layer.attention_out, layer.up, layer.gate, layer.gate_up, layer.down, layer.experts, layer.router)
    yield from (layer.attention_norm, layer.attention_post_norm, layer.mlp_norm, layer.mlp_post_norm)
    yield from (layer.qkv,) if isinstance(layer.qkv, str) else layer.qkv
    yield from (join(layer.attention, name) for name in names.QK_NORM)


def _unclaimed(module: nn.Module, stack: str, claimed: set[str]) -> list[str]:
    prefix = f"{stack}." if stack else ""
    here = (name for name, _ in module.named_parameters() if name.startswith(prefix))
    return [name for name in here if not any(name == path or name.startswith(f"{path}.") for path in claimed)]


def _layout(model_type: str, layers: tuple[LayerPaths, ...], coverage: _Coverage) -> str:
    if not isinstance(layers[0].qkv, str):
        return ""
    if model_type not in names.FUSED_LAYOUT:
        coverage.need(f"order of the fused query-key-value rows of '{model_type}'", None)
    return names.FUSED_LAYOUT.get(model_type, "")


def _parallel(config: Any, layer: LayerPaths) -> bool:
    """True when attention and MLP both read resid_pre, so that there is no resid_mid."""
    if hasattr(config, "use_parallel_residual"):
        return bool(config.use_parallel_residual)
    if hasattr(config, "parallel_attn"):
        return bool(config.parallel_attn or getattr(config, "new_decoder_architecture", False))
    return layer.mlp_norm is None and layer.mlp_post_norm is None


def _sizes(module: nn.Module, config: Any, layer: LayerPaths, embed: str) -> dict[str, int]:
    heads = int(config.num_attention_heads)
    width, inner = projection_shape(module.get_submodule(layer.attention_out))
    head_dim = inner // heads
    if isinstance(layer.qkv, str):
        kv_heads = (projection_shape(module.get_submodule(layer.qkv))[0] // head_dim - heads) // 2
    else:
        kv_heads = projection_shape(module.get_submodule(layer.qkv[1]))[0] // head_dim
    down = projection_shape(module.get_submodule(layer.down)) if layer.down else None
    mlp_width = down[1] if down else int(config.intermediate_size)
    vocab = int(module.get_submodule(embed).weight.shape[0])  # type: ignore[union-attr, index, arg-type]
    return {"width": width, "n_heads": heads, "n_kv_heads": kv_heads, "head_dim": head_dim,
            "mlp_width": mlp_width, "vocab_size": vocab}  # fmt: skip
