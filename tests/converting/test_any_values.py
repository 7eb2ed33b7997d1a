"""Whatever stands in a file: settings that the command takes, or one message."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proximo.converting.convert import _SIGNS, Kind, convert
from proximo.errors import UserError
from proximo.language import config_of
from proximo.training.config import ControlConfig, with_settings

MORE = {"learning_rate", "gamma", "batch_size", "n_epochs", "seed", "target_kl", "normalize_kwargs", "env_kwargs"}
MORE |= {
    "vf_coef",
    "max_grad_norm",
    "temperature",
    "delta",
    "eps_clip_low_high",
    "reward_weights",
    "use_peft",
    "lora_r",
}
MORE |= {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "kl_target", "max_samples", "bf16"}

NUMBERS = st.one_of(
    st.integers(-2, 300), st.floats(allow_nan=True), st.sampled_from(["3e-4", "lin_1e-3", "cos_2", "0.2 0.3", "1e6"])
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["dict(net_arch=[1, 2])", "dict(net_arch=dict(pi=[3], vf=[]))", "{'norm_obs': 0}", "k3", "grpo"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", get_args(Kind)[1:])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gives_settings_or_one_message(kind: Kind, data: st.DataObject, tmp_path: Path):
    signs = sorted(_SIGNS.get(kind, _SIGNS.get(kind.partition("-")[0], set())) | MORE)
    names = st.one_of(st.sampled_from(signs), st.sampled_from(signs), st.text(max_size=10))
    theirs: dict[str, Any] = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=6))
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(theirs))
    try:
        found = convert(path, kind=kind)
    except UserError:
        return
    ours = tomllib.loads(found.toml)
    assert ours == found.settings
    if found.command == "train":
        with_settings(ControlConfig(), ours, where="test")
    else:
        config_of("align", ours, where="test")
    told = "".join(found.toml.splitlines()[: found.toml.count("\n#") + 1])
    assert all(name in told or not name.isprintable() or not name.isascii() or " " in name for name in found.unknown)
