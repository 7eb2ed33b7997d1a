"""Low-rank adapters on one frozen base: put on, switched, merged, and a reward adapter written and read again."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from proximo.errors import UserError, in_range
from proximo.models.folders import INSTALL_LANGUAGE

REWARD_ADAPTER = "adapter"
"""Folder inside a reward model's that holds its adapter and head, in the layout of peft."""

_WEIGHTS, _SETTINGS, _BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2022) on every linear layer of the base."""

    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Adapters are scaled by this over their rank."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        in_range("lora_rank", self.lora_rank, at_least=1, whole=True, usual="16")
        in_range("lora_alpha", self.lora_alpha, above=0.0, usual="32")


def add_adapter(model: Any, name: str, config: LoraConfig) -> None:
    """Put a fresh adapter into every linear layer of the trunk, in place; all else is frozen.

    Raises:
        UserError: if peft is not installed, or the model has no layer that an adapter fits.
    """
    peft = _peft()
    settings: Any = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear")
    before = {parameter for parameter in model.parameters() if parameter.requires_grad}
    first = not adapted_layers(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are two adapters, and how GPT-2 lays out its weights
            peft.inject_adapter_in_model(settings, model, adapter_name=name)
    except ValueError as error:
        raise UserError(f"Adapters do not fit this model: {error}") from error
    for key, parameter in model.named_parameters():
        is_new = f".{name}." in key and "lora_" in key
        if is_new:
            parameter.data = parameter.data.float()  # peft takes the base's precision, which may be too low to learn in
        parameter.requires_grad_(is_new or (not first and parameter in before))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"Adapters need the extra 'language'. {INSTALL_LANGUAGE}") from error
    return peft


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that adapters are on."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def in_use(layers: Sequence[Any], name: str | None) -> Iterator[None]:
    """Let one adapter be the one in use on these layers, or none; whoever needs one says so, and none is put back."""
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    yield


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of one adapter, by the names they have in the model."""
    return {key: value for key, value in model.state_dict().items() if "lora_" in key and f".{name}." in key}


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Give one adapter of a model the weights of another of the same rank."""
    found = adapter_state(model, source)
    for key, value in adapter_state(model, target).items():
        value.copy_(found[key.replace(f".{target}.", f".{source}.")])


@torch.no_grad()
def merged_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of the plain model that the base and one adapter amount to; the model itself stays as it is."""
    adapted = {
        f"{key}.weight": module
        for key, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in getattr(module, "lora_A", {})
    }
    merged = {}
    for key, value in model.state_dict().items():
        if "lora_" in key:
            continue
        plain = key.replace(".base_layer", "")
        if plain in adapted:  # one at a time, so that the device need not hold the model twice
            delta = cast("Any", adapted[plain]).get_delta_weight(name)
            merged[plain] = (value.float() + delta.float()).to(value.dtype).cpu()
        else:
            merged[plain] = value
    return merged


# --- a reward adapter in a folder -------------------------------------------------------------------------------


class AdaptedScalar:
    """A scalar model made of a causal model's trunk, its adapter `reward`, and a head: what `scalar_values` takes."""

    def __init__(self, actor: Any, score: nn.Linear, config: Any, lora_alpha: float) -> None:
        self.score = score
        self.lora_alpha = lora_alpha
        self.config = config
        self._actor = actor
        self._layers = adapted_layers(actor)

    def base_model(self, **inputs: Any) -> Any:
        """The trunk's output with the adapter in use."""
        with in_use(self._layers, "reward"):
            return self._actor.base_model(**inputs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the head: all else belongs to the actor."""
        return self.score.parameters()


def save_reward_adapter(folder: Path, model: Any, base: str, config: LoraConfig) -> None:
    """Write the adapter `reward` and the head of a scalar model, as peft would (`PeftModel.from_pretrained`).

    Args:
        folder: the reward model's own; the adapter goes into a folder in it.
        model: the scalar model, with the adapter on its trunk.
        base: the folder or hub id that the base came from.
        config: rank and scale.
    """
    from safetensors.torch import save_file

    path = folder / REWARD_ADAPTER
    path.mkdir(exist_ok=True)
    tensors = {key.replace(".reward.weight", ".weight"): value for key, value in adapter_state(model, "reward").items()}
    tensors |= {f"score.{name}": value for name, value in model.score.state_dict().items()}
    save_file({f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()}, path / _WEIGHTS)
    adapted = {key.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for key in adapter_state(model, "reward")}
    settings: Any = _peft().LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(adapted),
        modules_to_save=["score"],
        task_type="SEQ_CLS",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    settings.save_pretrained(str(path))
    (path / _BASE).write_text(json.dumps({"base": base} | base_digests(model), indent=2) + "\n")


def has_reward_adapter(place: str) -> bool:
    """Whether a reward model's folder holds its adapter apart."""
    return (Path(place) / REWARD_ADAPTER / _BASE).is_file()


def put_on_reward_adapter(actor: Any, place: str) -> AdaptedScalar | None:
    """Put a reward model's adapter on the trunk that it was trained on; None if this is another trunk.

    Raises:
        UserError: if the adapter is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig

    path = Path(place) / REWARD_ADAPTER
    try:
        wanted, found = json.loads((path / _BASE).read_text()), base_digests(actor)
        kind = "sha256_bfloat16" if next(actor.parameters()).dtype == torch.bfloat16 else "sha256"
        if wanted[kind] != found[kind]:
            return None
        settings = json.loads((path / _SETTINGS).read_text())
        saved = {key.removeprefix("base_model.model."): value for key, value in load_file(path / _WEIGHTS).items()}
        config = LoraConfig(int(settings["r"]), float(settings["lora_alpha"]))
        add_adapter(actor, "reward", config)
        for key, value in adapter_state(actor, "reward").items():
            value.copy_(saved.pop(key.replace(".reward.weight", ".weight")))
        weight, bias = saved["score.weight"], saved.get("score.bias")
        score = nn.Linear(weight.shape[1], 1, bias=bias is not None)
        score.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"The adapter in {path} is damaged ({type(error).__name__}: {error}). Delete that folder: the whole reward "
            f"model in {place} is then used instead."
        ) from error
    for key, parameter in actor.named_parameters():
        if ".reward." in key and "lora_" in key:
            parameter.requires_grad_(False)
    device = next(actor.parameters()).device
    score = score.to(device).requires_grad_(False)
    return AdaptedScalar(actor, score, AutoConfig.from_pretrained(place), config.lora_alpha)


@torch.no_grad()
def base_digests(model: Any) -> dict[str, str]:
    """SHA-256 of the trunk's own weights by name, adapters left out: in float32, and rounded to bfloat16."""
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    weights = {key.replace(".base_layer", ""): value for key, value in model.base_model.state_dict().items()}
    for key in sorted(weights):
        if "lora_" not in key:
            weight = weights[key].detach().float().contiguous().cpu().flatten()
            exact.update(key.encode() + weight.numpy().tobytes())
            rounded.update(key.encode() + weight.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return {"sha256": exact.hexdigest(), "sha256_bfloat16": rounded.hexdigest()}
