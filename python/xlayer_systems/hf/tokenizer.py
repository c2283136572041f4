"""A byte-level BPE tokenizer with RoBERTa's special tokens, trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_length: int, *, keep_text: bool = False) -> Any:
    """Trains on ``texts`` and returns a `PreTrainedTokenizerFast` that wraps pairs as RoBERTa does.

    ``<s> a </s>`` and ``<s> a </s></s> b </s>``; ids 0 to 4 are `SPECIAL_TOKENS` in RoBERTa's order. For an encoder the
    text is lower-cased: a small vocabulary then covers more, and case matters little for the topic of a docstring.
    With ``keep_text``, for language models, it stays what it is, byte for byte: decoding the tokens gives it back.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Byte-level BPE never fails on a character.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not keep_text:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        # Underscores separate words, as in most identifiers.
        words = [pre_tokenizers.Split("_", "isolated"), pre_tokenizers.Digits()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
