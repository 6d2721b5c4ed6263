"""Text from a trained model of a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

import hetero
import lm
from experiments import arms, config_file, planning, training
from experiments.errors import RunFolderError
from lm import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


def sample(
    folder: Path,
    prompt: str,
    *,
    arm: str | None = None,
    seed: int | None = None,
    n_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    sample_seed: int = 0,
) -> str:
    """Continue a prompt with the newest checkpoint of an arm and seed, on the devices of its plan.

    Args:
        folder: of a run.
        prompt: text; characters that the training text lacks become unknown tokens.
        arm: None: the run's first.
        seed: None: the run's first.
        n_tokens: to add.
        temperature: 0: always the likeliest token.
        top_k: draw among so many likeliest tokens; None: all.
        sample_seed: of the draws.

    Raises:
        RunFolderError: no run, no such arm or seed, or no checkpoint there.
        LMError: the prompt is empty, a figure is out of range, or the checkpoint is damaged.
    """
    if not (folder / "config.yaml").exists():
        raise RunFolderError(f"{folder} holds no run", remedy="start one with: heteroq run CONFIG")
    setting = planning.prepare(config_file.load(folder / "config.yaml"))
    config = setting.config
    arm = _choice("arm", arm, config.arms)
    seed = _choice("seed", seed, config.seeds)
    model = arms.build(config, arm, seed, setting.corpus.tokenizer.vocab_size)
    checkpoints = training.seed_folder(folder, arm, seed) / "checkpoints"
    if checkpoint.load(checkpoints, model, config=training.checkpoint_config(setting, arm, seed)) is None:
        raise RunFolderError(f"no checkpoint in {checkpoints}", remedy=f"heteroq run --resume {folder}")
    plan = planning.read_plan(setting, folder / "arms" / arm / "plan.json")
    tokenizer = setting.corpus.tokenizer
    tokens = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
    with hetero.place(model, plan, topology=setting.topology, loss=lm.loss) as placed:
        out = lm.generate(
            placed,
            tokens,
            n_tokens,
            generator=torch.Generator().manual_seed(sample_seed),
            temperature=temperature,
            top_k=top_k,
        )
    return prompt + tokenizer.decode(out[0, tokens.shape[1] :].numpy())


def _choice(what: str, wanted: T | None, choices: tuple[T, ...]) -> T:
    if wanted is None:
        return choices[0]
    if wanted not in choices:
        raise RunFolderError(f"the run has no {what} {wanted!r}", found=", ".join(map(str, choices)))
    return wanted
