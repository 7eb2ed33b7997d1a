"""LoRA on one base: reward model, policy, critic and reference share the frozen weights of a single model.

    python examples/lora.py

The same in commands:

    proximo sft --model MODEL --data texts.jsonl --run-dir runs/sft
    proximo reward --lora --model runs/sft --data preferences.jsonl --run-dir runs/reward
    proximo align --sharing lora --model runs/sft --reward runs/reward --prompts prompts.jsonl
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from tiny_model import ANIMALS, THINGS, save_tiny_model, write_rows

import proximo


def sentences(words: list[str], rng: random.Random) -> str:
    """Two short sentences about such words."""
    return f"i see a {rng.choice(words)} and the {rng.choice(words)} ."


def main(n_iterations: int = 15, n_texts: int = 400) -> dict[str, Any]:
    """SFT on texts of both kinds, a reward model that prefers animals, PPO; return the last metrics of all three."""
    rng = random.Random(0)
    quick: dict[str, Any] = dict(threads=1, quiet=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = [("i", sentences(ANIMALS, rng)[2:], sentences(THINGS, rng)[2:]) for _ in range(n_texts)]
        rows = [{"prompt": prompt, "completion": rng.choice(both)} for prompt, *both in pairs]
        texts = write_rows(folder / "texts.jsonl", rows)
        preferences = write_rows(
            folder / "preferences.jsonl", ({"prompt": p, "chosen": one, "rejected": two} for p, one, two in pairs)
        )
        prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "i"}] * 8)
        sft = proximo.sft(
            save_tiny_model(folder / "model"), texts, run_dir=folder / "sft", learning_rate=1e-2, batch_size=16, **quick
        )
        adapters: dict[str, Any] = dict(lora_rank=8, learning_rate=1e-2, **quick)
        reward = proximo.reward(sft.path, preferences, run_dir=folder / "reward", lora=True, batch_size=16, **adapters)
        print(f"reward model: right on {reward.metrics['accuracy']:.0%} of the pairs of its last step")
        ppo = proximo.align(
            sft.path,
            reward.path,
            prompts,
            sharing="lora",
            run_dir=folder / "ppo",
            n_iterations=n_iterations,
            prompts_per_iteration=32,
            batch_size=32,
            max_new_tokens=10,
            **adapters,
        )
    print(f"mean reward: {ppo.metrics['reward_mean']:.2f}, KL {ppo.metrics['kl_to_reference']:.2f} nats per response")
    return {"sft": sft.metrics, "reward": reward.metrics, "ppo": ppo.metrics}


if __name__ == "__main__":
    main()
