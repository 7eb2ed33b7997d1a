"""Language models from folders and hub ids, and back into folders that every other tool reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proximo.errors import UserError, nearest

INSTALL_LANGUAGE = 'pip install -c constraints.txt -e ".[language]"'

REWARD_SCALE = "proximo_reward_scale"
"""Entry of a reward model's config.json: `{"mean", "std"}` of its raw scores on responses of the reference policy."""


def transformers_module() -> Any:
    """Import transformers, without its progress bars and advice.

    Raises:
        UserError: if the extra `language` is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"Language models need the extra 'language' ({error}). {INSTALL_LANGUAGE}") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_tokenizer(place: str | Path, chat_template: str | Path = "") -> Any:
    """Load the tokenizer of a folder or hub id, padding on the left, nothing cut off.

    Args:
        place: the folder or hub id.
        chat_template: a Jinja file that takes the place of the tokenizer's own chat template, and is saved with it.

    Raises:
        UserError: if there is none, its EOS token is none of the model's, or the chat template does not work.
    """
    transformers = transformers_module()
    tokenizer = _explained(
        "tokenizer", place, lambda: transformers.AutoTokenizer.from_pretrained(str(place), **_where(place))
    )
    tokenizer.padding_side = "left"
    _check_eos(tokenizer, place)
    if str(chat_template):
        _set_chat_template(tokenizer, Path(chat_template).expanduser())
    return tokenizer


def _check_eos(tokenizer: Any, place: str | Path) -> None:
    """Refuse a tokenizer whose EOS token the model beside it does not know: no response could ever end."""
    try:
        config = transformers_module().AutoConfig.from_pretrained(str(place), **_where(place))
        known = int(config.get_text_config().vocab_size)
    except Exception:  # loading the model will say what is wrong with its config
        return
    eos = tokenizer.eos_token_id
    if eos is not None and eos >= known:
        raise UserError(
            f"The tokenizer of {place} has the EOS token {tokenizer.eos_token!r} with the id {eos}, but the model "
            f"knows only the ids below {known}: the two do not belong together. Use the tokenizer that the model was "
            "made with, or resize the model's embeddings (resize_token_embeddings) and save it."
        )


def check_token_ids(highest: int, model_config: Any, whose: str) -> None:
    """Refuse texts with a token that the model has no embedding for.

    Args:
        highest: the highest token id in the texts.
        model_config: of the model that will read them.
        whose: what the tokenizer is called, for the message.

    Raises:
        UserError: if the model does not know that id.
    """
    known = int(model_config.get_text_config().vocab_size)
    if highest >= known:
        raise UserError(
            f"{whose} gives the token id {highest}, but the model knows only {known}: the two do not belong together. "
            "Use the tokenizer that the model was made with, or resize its embeddings."
        )


def tokenizer_in_words(tokenizer: Any, model_config: Any) -> str:
    """What is unusual about a tokenizer beside its model, and does no harm; nothing if nothing is."""
    known, pad, eos = int(model_config.get_text_config().vocab_size), tokenizer.pad_token_id, tokenizer.eos_token_id
    notes = []
    if eos is None:
        notes.append("no EOS token, so nothing but stop strings and max_new_tokens ends a response")
    elif pad == eos:
        notes.append("PAD is the EOS token, which is harmless: padding is told apart by its mask, never by its id")
    if len(tokenizer) > known:
        notes.append(f"{len(tokenizer):,} tokens, of which the model knows {known:,}; the data uses none of the others")
    return "; ".join(notes)


def _set_chat_template(tokenizer: Any, file: Path) -> None:
    """Give a tokenizer the chat template of a file; transformers renders it in a sandbox."""
    from jinja2 import TemplateError

    where = f"The chat template {file} (setting chat_template)"
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = "no UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or error
        raise UserError(f"{where} cannot be read: {said}. It must be a text file in Jinja.") from error
    if not tokenizer.chat_template.strip():
        raise UserError(f"{where} is empty. Write into it how messages become text, in Jinja.")
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # the template may be anyone's, and raises what it likes
        if type(error) is TemplateError:
            return  # it refuses this conversation in words of its own, and may take those of the data
        line = getattr(error, "lineno", None)
        place = f" in line {line}" if line else ""
        raise UserError(f"{where} does not work{place}: {type(error).__name__}: {error}. Mend the file.") from error
    if "Hello" not in text:
        raise UserError(f"{where} leaves out what the user says. Mend the file: it must write message['content'].")


def load_causal_lm(place: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Load a causal language model, with dropout off for good.

    Raises:
        UserError: if there is none, or it is a model of another kind.
    """
    transformers = transformers_module()
    _check_head(place, "ForCausalLM", "a causal language model")
    model, found = _explained(
        "model",
        place,
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            str(place), dtype=dtype, output_loading_info=True, **_where(place)
        ),
    )
    _check_whole(place, found)
    return without_dropout(model).to(device)


def load_scalar_model(
    place: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", fresh_head: bool = False
) -> nn.Module:
    """Load a model with one number per position: a reward model, or a value network to be.

    `fresh_head` takes the trunk of any causal language model and gives it a head of its own, normal with
    standard deviation 1 / sqrt(width + 1) (Stiennon et al. 2020; Huang et al. 2024).

    Raises:
        UserError: if there is none, or it has no head with one output and a fresh one was not asked for.
    """
    if not fresh_head:
        _check_head(place, "ForSequenceClassification", "a reward model")
    model, found = _explained(
        "model",
        place,
        lambda: _scalar_class(place).from_pretrained(
            str(place), num_labels=1, dtype=dtype, output_loading_info=True, **_where(place)
        ),
    )
    _check_whole(place, found, but_for="score." if fresh_head else None)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(
            f"{place} has no linear head `score` with one output, which a reward model of a decoder has. "
            "Make one with: proximo reward --model MODEL --data PREFERENCES"
        )
    if fresh_head:
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return without_dropout(model).to(device)


def _scalar_class(place: str | Path) -> Any:
    """The class for sequence classification of a model's kind; where transformers has none, one is put together.

    Granite, Cohere, OLMo, Mamba and many more have a causal language model alone.
    """
    transformers = transformers_module()
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto import modeling_auto

    kind = type(transformers.AutoConfig.from_pretrained(str(place), **_where(place)))
    if kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForSequenceClassification
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{place} is of the kind {kind.__name__.removesuffix('Config')}, which has no causal model.")
    causal: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    family = next(each for each in causal.__mro__ if each.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, family), {"base_model_prefix": causal.base_model_prefix})


def _check_whole(place: str | Path, found: dict[str, Any], but_for: str | None = None) -> None:
    """Refuse a model of which weights are missing: transformers would draw them at random, anew at each load."""
    missing = sorted(key for key in found["missing_keys"] if but_for is None or not key.startswith(but_for))
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        kind = " It is a language model without a head for scores, then." if missing == ["score.weight"] else ""
        raise UserError(
            f"The weights of {place} lack {listed}.{kind} Random ones in their place would be worth nothing. Bring the "
            "missing files back, or name the model that was meant."
        )


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout of a model to 0, so that scoring and learning see the same network in any mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "activation_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.eval()


def save_model(folder: Path, model: Any, tokenizer: Any, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a `save_pretrained` folder: weights as safetensors, config, tokenizer.

    Raises:
        UserError: if the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(
            f"The model could not be written to {folder}: {error.strerror or error}. Free some space there, or let "
            "this user write there."
        ) from error


def context_length(model: Any) -> int | None:
    """Most tokens that a model can take, where it has a limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _where(place: str | Path) -> dict[str, Any]:
    """Nothing is downloaded for a folder, and no code of a model's own is ever run."""
    return {"local_files_only": Path(place).is_dir(), "trust_remote_code": False}


def refuse_kernels(config: Any, place: str | Path) -> None:
    """Refuse a model's config that names compiled code on the hub, which transformers would fetch and run.

    Raises:
        UserError: with what it names.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, name, None)
            if isinstance(value, str) and "/" in value:
                raise UserError(
                    f"The config.json of {place} names {value!r} for {name.removeprefix('_')}: code from the hub, "
                    "which Proximo never runs. Take that entry out."
                )


def _explained(what: str, place: str | Path, load: Any) -> Any:
    """Load; say in words what went wrong."""
    folder = Path(place)
    if not folder.is_dir() and (folder.exists() or str(place).startswith((".", "/", "~")) or str(place).count("/") > 1):
        raise UserError(f"There is no model folder {place}." + _siblings(folder))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no model folder: it has no config.json. A model folder is what save_pretrained writes, or "
            "a run of proximo sft, reward, align or dpo that has come to its end (proximo resume takes it there)."
        )
    try:
        if what == "model":
            refuse_kernels(transformers_module().AutoConfig.from_pretrained(str(place), **_where(place)), place)
        return load()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"The {what} of {place} needs a package that is not installed: {error}") from error
    except Exception as error:
        raise UserError(_words(what, place, error)) from error


def _words(what: str, place: str | Path, error: Exception) -> str:
    said = str(error).strip().split("\n")[0][:300]
    if Path(place).is_dir():
        if "trust_remote_code" in str(error):
            return f"The {what} of {place} runs code of its own, which Proximo never does. Convert it to a known kind."
        return f"The {what} in {place} could not be loaded: {type(error).__name__}: {said}"
    offline = any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    reason = "the hub is switched off by HF_HUB_OFFLINE" if offline else "or the hub cannot be reached from here"
    return (
        f"There is no folder {place}, and as a hub id it could not be loaded ({reason}): {said}."
        + _siblings(Path(place))
        + "\nDownload the model where there is a network (huggingface-cli download), and give its folder."
    )


def _siblings(folder: Path) -> str:
    parent = folder.parent
    names = [each.name for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []
    close = nearest(folder.name, names)
    return f" Did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""


def _check_head(place: str | Path, ending: str, kind: str) -> None:
    """Refuse a folder whose config names a model with another head, which would be loaded with a random one."""
    try:
        config = json.loads((Path(place) / "config.json").read_text())
        names = config.get("architectures")
        names = [str(name) for name in names] if isinstance(names, list) else []
    except (OSError, ValueError, AttributeError):
        return
    if names and not any(
        name.endswith((ending, "LMHeadModel" if ending == "ForCausalLM" else ending)) for name in names
    ):
        raise UserError(f"{place} holds {names[0]}, which is not {kind}.")
