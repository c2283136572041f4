"""Encoders by name: the shipped small one, the same from scratch, and everything that ``transformers`` can load."""

from __future__ import annotations

from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch

from xlayer_systems.errors import UserError
from xlayer_systems.hf.pretrained import weights_hash

SMALL = "small"
SMALL_SCRATCH = "small-scratch"
# Standard deviations by part of the parameter's name, 0.02 elsewhere.
INIT_SCALES = {"word_embeddings": 0.09, "attention.self.query": 0.05, "attention.self.key": 0.05}
IDENTITY_GAIN = 0.7
SMALL_FOLDER = Path(__file__).parent.parent / "assets" / "encoder-small"


def is_small(name: str) -> bool:
    """Tells whether ``name`` is one of the two small encoders, which need other learning rates than large ones."""
    return name in (SMALL, SMALL_SCRATCH)


def load_tokenizer(name: str) -> Any:
    """Returns the fast tokenizer of a backbone."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, name)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"backbone {name!r}: expected a fast tokenizer with a padding token")
    return tokenizer


def load_backbone(name: str) -> Any:
    """Loads the encoder in float32; ``small-scratch`` draws its parameters from torch's current random state."""
    from transformers import AutoConfig, AutoModel

    if name == SMALL_SCRATCH:
        return start_as_average(AutoModel.from_config(_load(AutoConfig, name)).float())
    return _load(AutoModel, name).float()


def start_as_average(encoder: Any) -> Any:
    """Initializes a BERT-like encoder so that each token starts as itself plus averages of all tokens.

    Value and output projections start near the identity and the feed-forward layers near zero, so the first token is a
    bag of words from the first step on. With the usual initialization an encoder as narrow as the small one keeps
    predicting the majority class: its first tokens stay nearly equal for all inputs.
    """
    width = encoder.config.hidden_size
    identity = torch.eye(width)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.ndim < 2:
                continue
            scale = next((scale for part, scale in INIT_SCALES.items() if part in name), 0.02)
            weight.normal_(0.0, scale)
            if "attention.self.value" in name or "attention.output.dense" in name:
                weight.add_(IDENTITY_GAIN * identity)
    return encoder


def fingerprint(name: str) -> str:
    """Identifies the weights that a run starts from: the name, and for a local folder the hash of its weight files."""
    folder = _folder(name)
    if name == SMALL_SCRATCH or not folder.is_dir():
        return name
    return weights_hash(folder)


def _folder(name: str) -> Path:
    return SMALL_FOLDER if is_small(name) else Path(name)


def _load(loader: Any, name: str) -> Any:
    folder = _folder(name)
    if is_small(name) and not folder.is_dir():
        raise UserError(f"the backbone {name!r} needs {folder}; make it with `xlayer pretrain encoder`")
    expected = f"{SMALL}, {SMALL_SCRATCH}, a local folder or a model of the Hugging Face hub"
    return load_quietly(loader, folder, f"backbone {name!r}", expected)


def load_quietly(loader: Any, folder: Path, what: str, expected: str) -> Any:
    """Loads a folder or, where there is none, the hub's model of that name by ``loader.from_pretrained``.

    Raises:
        UserError: it cannot be loaded; the line names ``what`` was asked for and what is ``expected``.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # the error below reports the cause in one line
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # "newly initialized pooler": the classifier drops the pooler
    try:
        # Code that comes with a model is not run, and transformers does not prompt for it.
        return loader.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load {what}; expected {expected} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
