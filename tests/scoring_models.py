"""Tiny tokenizers and random models of several architectures for the scoring tests."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from repforget.models.load import LoadedModel, wrap

TEXT = """
the a was born in city of Ada Berg Cora Dahl Oslo Rome New York Delhi is red blue green : . ? Q A
"""
WORDS = TEXT.split()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LIKE_LLAMA = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES = {
    "llama": LIKE_LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {**LIKE_LLAMA, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "gpt_neox": {**SMALL, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "seq_length": 64},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS, "\n"])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>",
                                   eos_token="<eos>", unk_token="<unk>", model_max_length=64)  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a sentence, so that spaces and words merge as in GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def tiny(kind: str, tokenizer: PreTrainedTokenizerFast | None = None) -> LoadedModel:
    tokenizer = tokenizer or word_tokenizer()
    extra = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None, "attn_implementation": "eager"}
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **ARCHITECTURES[kind], **extra)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config)
        for parameter in module.parameters():  # larger than the initialisation, so that predictions differ
            parameter.data += 0.2 * torch.randn_like(parameter)
    return wrap(module.eval(), tokenizer)
