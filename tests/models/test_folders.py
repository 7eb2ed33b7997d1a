"""Models and tokenizers from folders: what does not fit is told by name; chat templates from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from proximo.collect.tokens import encode_prompt
from proximo.errors import UserError
from proximo.models.folders import (
    check_token_ids,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    tokenizer_in_words,
)
from tests.tiny_language import (
    CHAT_TEMPLATE,
    SPECIAL,
    WORDS,
    save_tiny,
    save_tiny_scalar,
    tiny_model,
    tiny_tokenizer,
)

N_TOKENS = len(SPECIAL + WORDS)


def test_a_folder_with_another_head_is_refused(tmp_path: Path):
    causal, scalar = save_tiny(tmp_path / "causal"), save_tiny_scalar(tmp_path / "scalar")
    with pytest.raises(UserError, match="not a causal language model"):
        load_causal_lm(scalar)
    with pytest.raises(UserError, match="not a reward model"):
        load_scalar_model(causal)
    fresh: Any = load_scalar_model(causal, fresh_head=True)
    assert fresh.score.out_features == 1
    torch.testing.assert_close(fresh.model.embed_tokens.weight, tiny_model().model.embed_tokens.weight)


def test_a_folder_that_is_not_there_or_no_model_is_told_by_name(tmp_path: Path):
    save_tiny(tmp_path / "first-model")
    with pytest.raises(UserError, match=r"no model folder .*frist-model.* Did you mean .*first-model"):
        load_causal_lm(tmp_path / "frist-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no model folder: it has no config\.json"):
        load_causal_lm(tmp_path / "empty")


# --- chat templates from files --------------------------------------------------------------------------------------


def template_in(folder: Path, text: str) -> Path:
    file = folder / "template.jinja"
    file.write_text(text)
    return file


ASKED = [{"role": "user", "content": "the cat"}]


@pytest.mark.parametrize("has_one", [False, True])
def test_a_template_from_a_file_is_used_and_saved_in_place_of_any_other(tmp_path: Path, has_one: bool):
    model = save_tiny(tmp_path / "model", chat=has_one)
    file = template_in(tmp_path, "{% for m in messages %}{{ m['content'] + ' ?' }}{% endfor %}")
    tokenizer = load_tokenizer(model, file)
    words = [tokenizer.get_vocab()[word] for word in ("the", "cat", "?")]
    assert encode_prompt(tokenizer, ASKED) == words
    tokenizer.save_pretrained(model)
    file.unlink()
    assert encode_prompt(load_tokenizer(model), ASKED) == words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" \n", "is empty"),
        ("{% for m in messages %}\n{{ m.content }", "does not work in line 2: TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "does not work: TypeError"),
        ("{{ messages[0].words[3].colour }}", "does not work: UndefinedError"),
        ("{{ messages.clear() }}", "does not work: SecurityError"),
        ("{% for m in messages %}{{ m['text'] }}{% endfor %}", "leaves out what the user says"),
    ],
)
def test_a_template_that_does_not_work_is_told_by_file_and_setting(tmp_path: Path, text: str, said: str):
    model, file = save_tiny(tmp_path / "model"), template_in(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_tokenizer(model, file)
    assert str(caught.value).startswith(f"The chat template {file} (setting chat_template) {said}")


def test_so_is_one_that_cannot_be_read(tmp_path: Path):
    model = save_tiny(tmp_path / "model")
    with pytest.raises(UserError, match=r"none\.jinja \(setting chat_template\) cannot be read: No such file"):
        load_tokenizer(model, tmp_path / "none.jinja")
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9 {{ messages[0].content }}")
    with pytest.raises(UserError, match=r"latin\.jinja .* cannot be read: no UTF-8"):
        load_tokenizer(model, tmp_path / "latin.jinja")


def test_a_template_may_refuse_some_conversations_in_its_own_words(tmp_path: Path):
    text = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = load_tokenizer(save_tiny(tmp_path / "model"), template_in(tmp_path, text))
    assert encode_prompt(tokenizer, [{"role": "system", "content": "the"}, *ASKED])
    with pytest.raises(UserError, match="system first"):
        encode_prompt(tokenizer, ASKED)


# --- a tokenizer beside its model -----------------------------------------------------------------------------------


def beside(folder: Path, tokenizer: Any) -> Path:
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_eos_token_that_the_model_does_not_know_is_refused(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(UserError, match=f"EOS token '<end>' with the id {N_TOKENS}.*ids below {N_TOKENS}.*resize"):
        load_tokenizer(beside(tmp_path / "beyond", tokenizer))
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = WORDS[-1]  # the last that it knows
    assert load_tokenizer(beside(tmp_path / "last", tokenizer)).eos_token_id == N_TOKENS - 1


def test_a_token_that_the_model_does_not_know_is_refused():
    config = tiny_model().config
    check_token_ids(N_TOKENS - 1, config, "It")
    with pytest.raises(UserError, match=f"^It gives the token id {N_TOKENS}, but the model knows only {N_TOKENS}"):
        check_token_ids(N_TOKENS, config, "It")


def test_what_is_unusual_and_harmless_is_said():
    config, tokenizer = tiny_model().config, tiny_tokenizer()
    assert tokenizer_in_words(tokenizer, config) == ""
    tokenizer.pad_token = tokenizer.eos_token
    assert "PAD is the EOS token, which is harmless" in tokenizer_in_words(tokenizer, config)
    tokenizer.add_tokens(["zebra", "gnu"])
    assert f"{N_TOKENS + 2} tokens, of which the model knows {N_TOKENS}" in tokenizer_in_words(tokenizer, config)
    tokenizer.eos_token = tokenizer.pad_token = None
    words = tokenizer_in_words(tokenizer, config)
    assert "no EOS token" in words
    assert "PAD" not in words


@pytest.mark.parametrize("kind", ["Granite", "Cohere", "Olmo2"])
def test_kinds_without_a_class_for_classification_have_scalar_models_all_the_same(kind: str, tmp_path: Path) -> None:
    import transformers

    shape: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, vocab_size=N_TOKENS, pad_token_id=0, bos_token_id=1)
    config = getattr(transformers, f"{kind}Config")(**shape, eos_token_id=2, max_position_embeddings=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    critic: Any = load_scalar_model(tmp_path / "lm", fresh_head=True)
    trunk: Any = load_causal_lm(tmp_path / "lm")
    ids = torch.arange(7, 15).unsqueeze(0)
    with torch.no_grad():
        expected = trunk.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(critic.base_model(input_ids=ids).last_hidden_state, expected)
    save_model(tmp_path / "rm", critic, tiny_tokenizer())
    again: Any = load_scalar_model(tmp_path / "rm")
    torch.testing.assert_close(again.score.weight, critic.score.weight)
    with pytest.raises(UserError, match="not a reward model"):
        load_scalar_model(tmp_path / "lm")
