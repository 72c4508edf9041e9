"""The vocabulary of module names from which the map of a decoder is read, and how names become paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

ATTENTION = ("self_attn", "attention", "attn", "self_attention")
MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn")
ATTENTION_OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
MLP_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
MLP_UP = ("up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w3")
MLP_GATE = ("gate_proj", "w1")
MLP_FUSED = ("gate_up_proj",)
QKV_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
QKV_SPLIT = (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"))
QK_NORM = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
EXPERTS = ("experts",)
ROUTER = ("gate", "router")
NORM_BEFORE_ATTENTION = ("input_layernorm", "ln_1", "self_attn_layer_norm", "ln_attn")
NORM_AFTER_ATTENTION = ("post_attention_layernorm",)  # only where the block has the next one too
NORM_AFTER_MLP = ("post_feedforward_layernorm",)
NORM_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm", "ln_mlp")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")

# How a fused QKV projection orders its rows: "blocks" = all q, all k, all v; "groups" = for each key/value
# head its query heads, then k, then v. Unlisted model types with a fused projection are refused.
FUSED_LAYOUT = {"gpt2": "blocks", "phi3": "blocks", "gpt_neox": "groups", "falcon": "groups"}


def child(parent: nn.Module | None, names: Sequence[str]) -> str | None:
    """Return the first of ``names`` that is a child module of ``parent``."""
    present = {name for name, _ in parent.named_children()} if parent is not None else set()
    return next((name for name in names if name in present), None)


def join(*parts: str | None) -> str:
    return ".".join(part for part in parts if part)


def path_of(root: nn.Module, target: nn.Module | None) -> str | None:
    """Return the dotted path of ``target`` below ``root``, or None when it is not there."""
    return next((name for name, module in root.named_modules() if module is target), None)


def core(model: Any) -> nn.Module:
    """Return the plain causal language model inside a LoadedModel, a compiled module or a PEFT wrapper."""
    module: Any = model if isinstance(model, nn.Module) else getattr(model, "module", model)
    module = getattr(module, "_orig_mod", module)  # torch.compile(module) wraps it
    plain: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module  # peft.PeftModel
    return plain


def text_config(module: nn.Module) -> Any:
    """Return the configuration of the language stack (multimodal models nest it)."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
