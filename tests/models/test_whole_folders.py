"""A folder with weights missing is refused: random ones in their place would change the model at each load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from proximo.errors import UserError
from proximo.models.folders import load_causal_lm, load_scalar_model
from tests.tiny_language import save_tiny, save_tiny_scalar


def without(folder: Path, ending: str) -> Path:
    file = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.endswith(ending)}
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = without(save_tiny_scalar(tmp_path / "rm"), "score.weight")
    with pytest.raises(UserError, match=r"lack score\.weight"):
        load_scalar_model(folder)
    assert load_scalar_model(folder, fresh_head=True) is not None  # which is what a new head is for


@pytest.mark.parametrize("ending", ["lm_head.weight", "layers.0.mlp.up_proj.weight"])
def test_a_language_model_with_weights_missing_is_refused(ending: str, tmp_path: Path) -> None:
    folder = without(save_tiny(tmp_path / "model"), ending)
    with pytest.raises(UserError, match=f"lack .*{ending}"):
        load_causal_lm(folder)


def test_a_language_model_that_does_not_say_what_it_is_is_no_reward_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for architectures in (None, 5, []):
        config["architectures"] = architectures
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"lack score\.weight.*without a head"):
            load_scalar_model(folder)
        assert load_causal_lm(folder) is not None


def test_tied_and_whole_models_are_taken(tmp_path: Path) -> None:
    assert load_causal_lm(save_tiny(tmp_path / "gpt2", "gpt2")) is not None  # its head is its embedding
    assert load_scalar_model(save_tiny_scalar(tmp_path / "rm", "gpt2")) is not None
