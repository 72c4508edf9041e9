"""The organism's tokenizer: whole words and punctuation marks, made of `tokenizers` parts only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repforget.organism.world import word_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def build_tokenizer(vocabulary: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a word-level fast tokenizer that adds ``<bos>`` by itself and reports character offsets.

    ``vocabulary`` defaults to every word of the world; unknown words become ``<unk>``.  Ids follow the
    order given, after the four special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate([*SPECIAL, *(vocabulary or word_list())])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        add_prefix_space=False,
    )
