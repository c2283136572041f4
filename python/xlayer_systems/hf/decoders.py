"""Causal language models by name: the two shipped small ones and everything that ``transformers`` can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xlayer_systems.errors import UserError
from xlayer_systems.hf.encoders import load_quietly
from xlayer_systems.hf.pretrained import weights_hash

SENDER = "decoder-sender"
RECEIVER = "decoder-receiver"
ASSETS = Path(__file__).parent.parent / "assets"


def load_decoder(name: str) -> tuple[Any, Any]:
    """Returns a frozen causal language model in float32 and evaluation mode, and its fast tokenizer.

    Args:
        name: `SENDER`, `RECEIVER`, a folder written by ``save_pretrained`` or a model of the Hugging Face hub.

    The tokenizer always has a padding, a first and an end-of-text token: where the model has no padding or first token
    of its own, the end-of-text token stands in. Raises `UserError` for what cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name)
    model = _load(AutoModelForCausalLM, name).float().eval().requires_grad_(False)
    return model, tokenizer


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer that `load_decoder` returns."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, name)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"decoder {name!r}: expected a fast tokenizer with an end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def fingerprint_decoder(name: str) -> str:
    """Identifies the weights: the name, and for a shipped or local folder the hash of its weight files."""
    folder = _folder(name)
    if not folder.is_dir():
        return name
    return weights_hash(folder)


def _folder(name: str) -> Path:
    return ASSETS / name if name in (SENDER, RECEIVER) else Path(name)


def _load(loader: Any, name: str) -> Any:
    folder = _folder(name)
    if name in (SENDER, RECEIVER) and not folder.is_dir():
        raise UserError(f"the decoder {name!r} needs {folder}; make it with `xlayer pretrain decoder`")
    expected = f"{SENDER}, {RECEIVER}, a local folder or a causal language model of the Hugging Face hub"
    return load_quietly(loader, folder, f"decoder {name!r}", expected)
