"""What an alignment run must find again when it goes on, by SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from proximo.collect.data import PromptRow
from proximo.errors import UserError
from proximo.models.adapters import REWARD_ADAPTER
from proximo.models.language import LanguagePolicy
from proximo.training.align_config import AlignConfig

_DECIDE = (
    "config.json",
    "adapter_config.json",
    "base.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def check_digests(config: AlignConfig, began_with: dict[str, str], found: dict[str, str]) -> None:
    """Refuse to go on with another reference, other prompts, or another reward model than the run began with.

    Raises:
        UserError: with what differs.
    """
    if began_with.get("reference") != found.get("reference"):
        raise UserError(
            f"{config.model} is not the model that this run began with: its weights differ. Bring them back, for they "
            "are the reference, or begin a new run."
        )
    if began_with.get("prompts") != found["prompts"]:
        raise UserError(
            f"{config.prompts} does not hold the prompts that this run began with: their tokens, or their order, "
            "differ. Bring the file (and the tokenizer and chat_template) back, or begin a new run."
        )
    for name in sorted(began_with.keys() | found.keys()):
        if began_with.get(name) != found.get(name):
            raise UserError(
                f"The reward model {name} is not the one that this run began with: its weights, its config or "
                "its tokenizer differ. Bring it back, or begin a new run."
            )


def digests_of(config: AlignConfig, policy: LanguagePolicy, prompts: list[PromptRow]) -> dict[str, str]:
    """SHA-256 of the prompts' tokens, of the reference's weights, and of the files of each reward model."""
    ids = json.dumps([row.token_ids for row in prompts]).encode()
    found = {"prompts": hashlib.sha256(ids).hexdigest()}
    for place in config.reward + config.gold:
        if (Path(place) / "config.json").is_file():
            found[place] = _digest_of_files(Path(place))
    if policy.reference is not None:
        found["reference"] = _digest_of(policy.reference)
    return found


def _digest_of_files(folder: Path) -> str:
    """SHA-256 of all that a reward model's scores depend on: config, tokenizer, weights, and an adapter."""
    digest = hashlib.sha256()
    for path in sorted([*folder.iterdir(), *folder.glob(f"{REWARD_ADAPTER}/*")]):
        if path.name in _DECIDE or path.suffix in (".safetensors", ".bin"):
            with path.open("rb") as file:
                name = str(path.relative_to(folder))
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@torch.no_grad()
def _digest_of(model: nn.Module) -> str:
    """SHA-256 of a model's own weights, adapters left out, tensor by tensor."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if "lora_" not in name:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
