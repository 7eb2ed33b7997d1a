"""What TRL's PPO computes on a small fixed batch, for tests/algorithms/test_parity.py to compare Proximo with.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.8.0     # never into Proximo's own environment
    trl/bin/python benchmarks/parity_trl.py

Writes tests/algorithms/parity_trl.json: inputs, settings, TRL's numbers, versions. The numbers come twice: once by
the arithmetic of `PPOTrainer.train` taken line by line (for what it keeps to itself), and once out of
`PPOTrainer.train` itself, which runs one update with the batch and the scores put in its way. The two must agree.
Line numbers below are those of trl/experimental/ppo/ppo_trainer.py in TRL 1.8.0.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor

OUTPUT = Path(__file__).parents[1] / "tests" / "algorithms" / "parity_trl.json"

PAD, BOS, EOS = 0, 1, 2
MODEL = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
SEEDS = dict(old_policy=1, reference=2, old_critic=3, policy_step=4, critic_step=5)
WEIGHT_SCALE, POLICY_STEP, CRITIC_STEP = 0.15, 0.006, 0.02
SETTINGS = dict(
    temperature=0.7,
    kl_coef=0.2,
    gamma=0.97,
    lam=0.9,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.3,
    missing_eos_penalty=1.5,
)
PROMPT_LENGTHS = (2, 7, 4, 3, 6, 5)
# (tokens, whether the last is EOS): cut off at 8; ended early; one short of the width; ended at the width; EOS alone
RESPONSES = ((8, False), (3, True), (7, True), (8, True), (1, True), (8, False))
SCORES = (0.5, 2.0, -1.25, 1.0, -0.5, 3.0)
MICRO_BATCHES = ((0, 1), (2, 3), (4, 5))


# --- inputs -----------------------------------------------------------------------------------------------------


def draw(model: Any, seed: int, scale: float) -> dict[str, Tensor]:
    """Numbers for every weight, from NumPy's frozen generator, in the order of their names."""
    stream = np.random.RandomState(seed)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return {name: torch.from_numpy(stream.standard_normal(shapes[name]) * scale).float() for name in sorted(shapes)}


def make_model(kind: str, seed: int, *steps: tuple[int, float]) -> Any:
    """A tiny Llama: drawn weights (norms around 1), and small steps away from them."""
    config: Any = transformers.LlamaConfig.from_dict({**MODEL, "num_labels": 1})
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for step, (draw_seed, scale) in enumerate([(seed, WEIGHT_SCALE), *steps]):
            drawn = draw(model, draw_seed, scale)
            for name, weight in model.named_parameters():
                start = (1.0 if "norm" in name else 0.0) if step == 0 else weight
                weight.copy_(start + drawn[name])
    return model


def make_models() -> dict[str, Any]:
    lm, scalar = "LlamaForCausalLM", "LlamaForSequenceClassification"
    return {
        "old_policy": make_model(lm, SEEDS["old_policy"]),
        "reference": make_model(lm, SEEDS["reference"]),
        "old_critic": make_model(scalar, SEEDS["old_critic"]),
        "policy": make_model(lm, SEEDS["old_policy"], (SEEDS["policy_step"], POLICY_STEP)),
        "critic": make_model(scalar, SEEDS["old_critic"], (SEEDS["critic_step"], CRITIC_STEP)),
    }


def make_tokens() -> tuple[Tensor, int]:
    """Prompts padded on the left, responses on the right `[6, P + R]`; and P."""
    stream = np.random.RandomState(0)
    prompt_width, response_width = max(PROMPT_LENGTHS), max(n for n, _ in RESPONSES)
    rows = []
    for n_prompt, (n_response, ended) in zip(PROMPT_LENGTHS, RESPONSES, strict=True):
        words = stream.randint(3, MODEL["vocab_size"], n_prompt + n_response).tolist()
        words[0] = BOS
        if ended:
            words[-1] = EOS
        rows.append([PAD] * (prompt_width - n_prompt) + words + [PAD] * (response_width - n_response))
    return torch.tensor(rows), prompt_width


# --- the arithmetic of PPOTrainer.train, taken out --------------------------------------------------------------


def collected(trl: Any, models: dict[str, Any], tokens: Tensor, prompt_width: int) -> dict[str, Tensor]:
    """From tokens to advantages: lines 697 to 798."""
    s = SETTINGS
    answers = tokens[:, prompt_width:]
    n_rows, width = answers.shape

    def scores_of(model: Any) -> Tensor:  # 709 to 714; 703 for the policy, whose logits come from generation
        logits = trl.forward(model, tokens, PAD).logits[:, prompt_width - 1 : -1] / (s["temperature"] + 1e-7)
        return trl.selective_log_softmax(logits, answers)

    cut = trl.truncate_response(EOS, PAD, answers)  # 722
    last = trl.first_true_indices(cut == PAD) - 1  # 727: the place of the last token
    every_value, _, _ = trl.get_reward(models["old_critic"], tokens, PAD, prompt_width)  # 729
    values = every_value[:, prompt_width - 1 : -1].squeeze(-1)  # 732
    scores = torch.tensor(SCORES) - s["missing_eos_penalty"] * ~(cut == EOS).any(-1)  # 757 to 759

    place = torch.arange(width).expand(n_rows, width)
    padding = place > last[:, None]  # 764
    padding_p1 = place > last[:, None] + 1  # 768: one place longer, the text with its last token
    log_probs = scores_of(models["old_policy"]).masked_fill(padding, trl.INVALID_LOGPROB)  # 765
    ref_log_probs = scores_of(models["reference"]).masked_fill(padding, trl.INVALID_LOGPROB)  # 766
    values = values.masked_fill(padding_p1, 0)  # 769

    rewards = -s["kl_coef"] * (log_probs - ref_log_probs)  # 773 to 776: k1
    score_place = torch.where(last + 1 < width, last + 1, last)  # 778: after the last token, where there is room
    rewards[torch.arange(n_rows), score_place] += scores  # 779

    advantages = torch.zeros_like(rewards)  # 787 to 796
    for b in range(n_rows):
        running = 0.0
        for t in reversed(range(width)):
            following = values[b, t + 1] if t + 1 < width else 0.0
            running = rewards[b, t] + s["gamma"] * following - values[b, t] + s["gamma"] * s["lam"] * running
            advantages[b, t] = running
    whitened = trl.masked_whiten(advantages, ~padding).masked_fill(padding, 0)  # 797, 798
    return {
        "padding": padding,
        "padding_p1": padding_p1,
        "log_probs": log_probs,
        "ref_log_probs": ref_log_probs,
        "values": values,
        "rewards": rewards,
        "advantages": advantages,
        "returns": advantages + values,
        "whitened": whitened,
    }


def losses(
    trl: Any, models: dict[str, Any], tokens: Tensor, prompt_width: int, found: dict[str, Tensor], rows: list[int]
) -> dict[str, Tensor]:
    """The loss of one micro-batch, with gradient: lines 820 to 847."""
    s = SETTINGS
    old = {name: tensor[rows] for name, tensor in found.items()}
    both = trl.PolicyAndValueWrapper(models["policy"], models["critic"])
    output, values = trl.forward(both, tokens[rows], PAD)
    logits = output.logits[:, prompt_width - 1 : -1] / (s["temperature"] + 1e-7)
    log_probs = trl.selective_log_softmax(logits, tokens[rows][:, prompt_width:])
    log_probs = log_probs.masked_fill(old["padding"], trl.INVALID_LOGPROB)
    values = values[:, prompt_width - 1 : -1].squeeze(-1).masked_fill(old["padding_p1"], 0)
    near = values.clamp(old["values"] - s["cliprange_value"], old["values"] + s["cliprange_value"])
    errors = torch.max((values - old["returns"]).square(), (near - old["returns"]).square())
    value_loss = 0.5 * trl.masked_mean(errors, ~old["padding_p1"])
    ratio = (log_probs - old["log_probs"]).exp()
    band = ratio.clamp(1 - s["cliprange"], 1 + s["cliprange"])
    policy_loss = trl.masked_mean(torch.max(-old["whitened"] * ratio, -old["whitened"] * band), ~old["padding"])
    return {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "total": policy_loss + s["vf_coef"] * value_loss,
        "ratio": ratio.detach(),
        "new_values": values.detach(),
    }


def gradients(models: dict[str, Any]) -> dict[str, Any]:
    """Norm of the whole gradient; sum and norm of each weight's."""
    named = {f"{role}.{k}": p.grad for role in ("policy", "critic") for k, p in models[role].named_parameters()}
    known = {name: gradient for name, gradient in named.items() if gradient is not None}
    return {
        "norm": float(torch.cat([gradient.flatten() for gradient in known.values()]).norm()),
        "weights": {name: [float(gradient.sum()), float(gradient.norm())] for name, gradient in known.items()},
    }


# --- PPOTrainer.train itself ------------------------------------------------------------------------------------


class Listening(torch.optim.SGD):
    """Takes no step; keeps the gradients at every step it should have taken."""

    def __init__(self, models: dict[str, Any]) -> None:
        super().__init__([*models["policy"].parameters(), *models["critic"].parameters()], lr=1.0)
        self.models, self.heard = models, []

    def step(self, closure: Any = None) -> None:
        self.heard.append(gradients(self.models))


def own_loop(
    trl: Any, tokens: Tensor, prompt_width: int, n_pieces: int, *, n_data: int = 12
) -> tuple[list[dict[str, Any]], list[Tensor], list[float]]:
    """One update of TRL's trainer, `n_pieces` micro-batches: gradients at its steps, advantages, masked means.

    Generation and scores are ours; the policy that learns is a step away from the one that wrote the batch.
    """
    from datasets import Dataset

    models = make_models()
    reward_model = make_model("LlamaForSequenceClassification", 9)
    listening = Listening(models)
    real_reward, real_whiten, real_mean = trl.get_reward, trl.masked_whiten, trl.masked_mean
    whitened: list[Tensor] = []
    means: list[float] = []

    def batch_generation(*_: Any) -> tuple[Tensor, Tensor]:
        logits = trl.forward(models["old_policy"], tokens, PAD).logits[:, prompt_width - 1 : -1]
        return tokens, logits / (SETTINGS["temperature"] + 1e-7)

    def get_reward(model: Any, *rest: Any) -> Any:
        if model is reward_model:
            return None, torch.tensor(SCORES), None
        return real_reward(models["old_critic"], *rest)

    def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
        whitened.extend([values, real_whiten(values, mask)])
        return whitened[-1]

    def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
        means.append(float(real_mean(values.detach(), mask)))
        return real_mean(values, mask)

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.PPOConfig(
            output_dir=folder,
            total_episodes=len(tokens),
            per_device_train_batch_size=len(tokens) // n_pieces,
            gradient_accumulation_steps=n_pieces,
            num_ppo_epochs=1,
            response_length=tokens.shape[1] - prompt_width,
            stop_token="eos",
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_grad_norm=0.01,
            **SETTINGS,
        )
        trainer = trl.PPOTrainer(
            arguments,
            make_tokenizer(),
            models["policy"],
            models["reference"],
            reward_model,
            Dataset.from_dict({"input_ids": [[BOS] * prompt_width] * n_data}),
            models["critic"],
            optimizers=(listening, torch.optim.lr_scheduler.ConstantLR(listening, 1.0)),
        )
        with (
            mock.patch.multiple(
                trl,
                batch_generation=batch_generation,
                get_reward=get_reward,
                masked_whiten=masked_whiten,
                masked_mean=masked_mean,
            ),
            mock.patch("numpy.random.permutation", np.arange),
        ):
            trainer.train()
    return listening.heard, whitened, means


def make_tokenizer() -> Any:
    import tokenizers

    words = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS} | {f"w{i}": i for i in range(3, MODEL["vocab_size"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


# --- all of it --------------------------------------------------------------------------------------------------


def assert_far_from_kinks(found: dict[str, Tensor], loss: dict[str, Tensor]) -> None:
    """The clips must be in use, and no number so near an edge that rounding could take it across."""
    ratio, moved = loss["ratio"][~found["padding"]], (loss["new_values"] - found["values"])[~found["padding_p1"]].abs()
    outside = (ratio - 1).abs() > SETTINGS["cliprange"]
    assert 0.1 < outside.float().mean() < 0.9, outside.float().mean()
    assert 0.1 < (moved > SETTINGS["cliprange_value"]).float().mean() < 0.9, moved
    assert ((ratio - 1).abs() - SETTINGS["cliprange"]).abs().min() > 1e-4
    assert (moved - SETTINGS["cliprange_value"]).abs().min() > 1e-4


def main() -> None:
    from trl.experimental.ppo import (  # pyright: ignore[reportMissingImports]
        ppo_trainer as trl,
    )

    torch.set_num_threads(1)
    models = make_models()
    tokens, prompt_width = make_tokens()
    with torch.no_grad():
        found = collected(trl, models, tokens, prompt_width)
    everyone = list(range(len(tokens)))

    whole = losses(trl, models, tokens, prompt_width, found, everyone)
    assert_far_from_kinks(found, whole)
    whole["total"].backward()
    whole_gradients = gradients(models)

    for role in ("policy", "critic"):
        models[role].zero_grad()
    pieces = [losses(trl, models, tokens, prompt_width, found, list(rows)) for rows in MICRO_BATCHES]
    torch.stack([piece["total"] for piece in pieces]).mean().backward()  # as accelerate divides them
    piece_gradients = gradients(models)

    for n_pieces, expected in ((1, whole_gradients), (len(MICRO_BATCHES), piece_gradients)):
        heard, (advantages, whitened), means = own_loop(trl, tokens, prompt_width, n_pieces)
        assert len(heard) == 1, len(heard)
        assert torch.allclose(advantages, found["advantages"], atol=1e-6)
        assert torch.allclose(whitened.masked_fill(found["padding"], 0), found["whitened"], atol=1e-6)
        assert heard[0]["weights"].keys() == expected["weights"].keys()
        for name, numbers in expected["weights"].items():
            assert np.allclose(heard[0]["weights"][name], numbers, rtol=1e-5, atol=1e-6), (n_pieces, name)
        if n_pieces == 1:  # three of whitening; then value loss, its clip fraction, policy loss
            assert np.allclose([0.5 * means[3], means[5]], [float(whole["value_loss"]), float(whole["policy_loss"])])

    # accelerate ends an accumulation at the end of its loader (GradientState), where TRL's micro-batches only begin
    steps_at_end = len(own_loop(trl, tokens, prompt_width, len(MICRO_BATCHES), n_data=len(tokens))[0])

    content = {
        "about": "TRL's numbers, written by benchmarks/parity_trl.py",
        "versions": {name: version(name) for name in ("trl", "transformers", "accelerate", "torch", "numpy")},
        "model": MODEL,
        "seeds": SEEDS,
        "scales": {"weights": WEIGHT_SCALE, "policy_step": POLICY_STEP, "critic_step": CRITIC_STEP},
        "weight_sums": {role: float(sum(p.double().sum() for p in m.parameters())) for role, m in models.items()},
        "settings": SETTINGS,
        "prompt_width": prompt_width,
        "tokens": tokens.tolist(),
        "scores": SCORES,
        "micro_batches": MICRO_BATCHES,
        "collected": {name: tensor.tolist() for name, tensor in found.items()},
        "policy_loss": float(whole["policy_loss"]),
        "value_loss": float(whole["value_loss"]),
        "total_loss": float(whole["total"]),
        "ratio": whole["ratio"].tolist(),
        "gradients": whole_gradients,
        "micro_batch_gradients": piece_gradients,
        "optimizer_steps_with_last_batch_of_data": steps_at_end,
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes, {steps_at_end} steps with the last batch of the data")


if __name__ == "__main__":
    main()
