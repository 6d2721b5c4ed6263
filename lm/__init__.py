"""Language models: the transformer, its data, training and generation. Knows neither devices nor qubits."""

from __future__ import annotations

from lm import checkpoint
from lm.config import FAMILIES, ModelConfig
from lm.data import Batch, Corpus, load_corpus
from lm.draws import Context
from lm.errors import CheckpointError, DataError, LMError, NonFiniteError, SettingError
from lm.generate import generate
from lm.masking import mask_batch, mask_tokens
from lm.model import Residual, Transformer, loss
from lm.ngram import ngram_floor
from lm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_from_json
from lm.train import Step, TrainConfig, TrainState, autograd_step, evaluate, learning_rate, start_training, train

__all__ = [
    "FAMILIES",
    "Batch",
    "ByteTokenizer",
    "CharTokenizer",
    "CheckpointError",
    "Context",
    "Corpus",
    "DataError",
    "LMError",
    "ModelConfig",
    "NonFiniteError",
    "Residual",
    "SettingError",
    "Step",
    "Tokenizer",
    "TrainConfig",
    "TrainState",
    "Transformer",
    "autograd_step",
    "checkpoint",
    "evaluate",
    "generate",
    "learning_rate",
    "load_corpus",
    "loss",
    "mask_batch",
    "mask_tokens",
    "ngram_floor",
    "start_training",
    "tokenizer_from_json",
    "train",
]
