"""Tiny random models of every proven architecture, and a tokenizer, built from configurations alone.

Biases and norm weights are perturbed, so that nothing is right only because a term is zero.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

VOCAB = 96
WIDTH = 32
LAYERS = 2
HEADS = 4
TEXT = """the a was born in works as lives Ada Berlin Paris Rome Oslo baker pilot doctor Tom Eva Max Lea Ben Mia
Jon red green blue cat dog bird Q A : . ? who where what is city job name and of to from"""
WORDS = tuple(TEXT.split())

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GQA = {**_COMMON, "num_key_value_heads": 2}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
           "ffn_hidden_size": 48, "bias": True, **_TOKENS}  # fmt: skip

# name -> (configuration class, its arguments)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
                            **_TOKENS}),
    "llama": ("LlamaConfig", {**_GQA, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 12}),
    "gemma2": ("Gemma2Config", {**_GQA, "head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12}),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": None}),
    "phi": ("PhiConfig", _COMMON),
    "phi3": ("Phi3Config", {**_GQA, "sliding_window": None}),
    "opt": ("OPTConfig", {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "ffn_dim": 48,
                          "num_attention_heads": HEADS, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH,
                          **_TOKENS}),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
    "gptj": ("GPTJConfig", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
                            "rotary_dim": 4, **_TOKENS}),
    "olmo2": ("Olmo2Config", _GQA),
    "falcon": ("FalconConfig", {**_FALCON, "multi_query": True, "parallel_attn": True,
                                "new_decoder_architecture": False, "alibi": False}),
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_COMMON, "use_parallel_residual": False}),
    "falcon_new": ("FalconConfig", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}),
    "falcon_sequential": ("FalconConfig", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True,
                                           "new_decoder_architecture": False}),
}  # fmt: skip
ARCHITECTURES = tuple(CONFIGS)  # the fifteen
ALL = (*CONFIGS, *VARIANTS)


@cache
def _template(name: str, seed: int) -> Any:
    import transformers

    kind, arguments = {**CONFIGS, **VARIANTS}[name]
    config = getattr(transformers, kind)(**arguments)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # the only global seeding: transformers initialises from it
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():  # every tied tensor occurs once
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.7 / parameter.shape[-1] ** 0.5))
    return model


def build(name: str, seed: int = 0) -> Any:
    """Return a fresh copy of the tiny model ``name``: float32, evaluation mode."""
    import copy

    return copy.deepcopy(_template(name, seed))


def tiny_tokenizer(words: tuple[str, ...] | list[str] = WORDS) -> Any:
    """Return a fast word-level tokenizer of VOCAB entries that adds <bos> and reports offsets."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<bos>", "<eos>", "<unk>", *dict.fromkeys(words)]
    entries += [f"w{i}" for i in range(VOCAB - len(entries))]
    ids = {entry: i for i, entry in enumerate(entries)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>", padding_side="right")  # fmt: skip


def sample_ids(rows: int = 3, length: int = 7, seed: int = 0) -> list[list[int]]:
    """Token sequences of different lengths, the longest ``length``, none with special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (length - 2 * (r % 3),), generator=generator).tolist() for r in range(rows)]
