"""Alignment with a known optimum: how far of the way from the reference to the best possible policy?

    python examples/known_optimum.py --algorithm ppo --beta 0.1 --seed 0

A tiny transformer writes 5 tokens out of 8: 32,768 responses, all of which can be enumerated. So the policy that
maximizes J(pi) = E[r] - beta KL(pi || pi_ref) is known exactly, pi* = pi_ref exp(r / beta) / Z, and so is its
J* = beta log Z. The last line of the output is one JSON object:

    {"algorithm", "beta", "seed", "J_ref", "J_star", "J", "fraction", "kl", "kl_sampled"}

`fraction` is (J - J_ref) / (J* - J_ref) of the trained policy, by enumeration; `kl` is its exact KL to the reference
(nats per response), `kl_sampled` the same from fresh samples, with `kl_standard_error` beside it.
Training goes through `proximo.training.align`, as `proximo align` does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proximo.algorithms.ppo import PPO
from proximo.collect.generate import GenerationConfig, sample
from proximo.models.folders import transformers_module
from proximo.models.language import LanguagePolicy
from proximo.runs.directory import new_run
from proximo.training import align
from proximo.training.align_config import ALGORITHMS, AlignConfig

N_TOKENS, LENGTH = 8, 5
WORDS = "abcdefgh"
PROMPT = "a b"
"""Two words: after "a", "a a" and "a a a" attention sees nothing but copies of one token, whatever their number, so
that the policy would have to treat positions alike that the optimum does not."""


@dataclass(frozen=True)
class Potentials:
    """A reward per position and per pair of neighbours, drawn from a seed and scaled to [0, 1] over all responses."""

    by_position: Tensor
    """[5, 8]"""
    by_pair: Tensor
    """[4, 8, 8]"""
    lowest: float
    highest: float

    @staticmethod
    def draw(seed: int) -> Potentials:
        """Standard normal potentials."""
        generator = torch.Generator().manual_seed(seed)
        by_position = torch.randn(LENGTH, N_TOKENS, generator=generator, dtype=torch.float64)
        by_pair = torch.randn(LENGTH - 1, N_TOKENS, N_TOKENS, generator=generator, dtype=torch.float64)
        raw = Potentials(by_position, by_pair, 0.0, 1.0).of(all_responses())
        return Potentials(by_position, by_pair, float(raw.min()), float(raw.max()))

    def of(self, responses: Tensor) -> Tensor:
        """Rewards `[N]` of responses `[N, 5]`."""
        total = sum(self.by_position[k, responses[:, k]] for k in range(LENGTH))
        total = total + sum(self.by_pair[k, responses[:, k], responses[:, k + 1]] for k in range(LENGTH - 1))
        assert isinstance(total, Tensor)
        return (total - self.lowest) / (self.highest - self.lowest)


def distinct(responses: Tensor) -> Tensor:
    """The share of distinct tokens: `distinct / 5`."""
    return torch.tensor([len(set(row)) / LENGTH for row in responses.tolist()], dtype=torch.float64)


def all_responses() -> Tensor:
    """All 32,768 of them `[32768, 5]`."""
    return torch.tensor(list(itertools.product(range(N_TOKENS), repeat=LENGTH)))


def prompt_tokens() -> list[int]:
    """The prompt's tokens."""
    return [WORDS.index(word) for word in PROMPT.split()]


def write_task(folder: Path, seed: int) -> None:
    """A two-layer Llama with random weights over exactly 8 tokens, its tokenizer, and one prompt."""
    import tokenizers

    transformers = transformers_module()
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=WORDS[0]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=N_TOKENS,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")


@torch.no_grad()
def exact_log_probs(model: Any) -> Tensor:
    """Log-probability `[32768]` of every response under a model."""
    responses = all_responses()
    rows = torch.cat([torch.tensor(prompt_tokens()).expand(len(responses), -1), responses], 1)
    parts = []
    for piece in rows.split(4096):
        log_p = model(input_ids=piece[:, :-1]).logits[:, -LENGTH:].double().log_softmax(-1)
        parts.append(log_p.gather(-1, piece[:, -LENGTH:, None]).squeeze(-1).sum(1))
    return torch.cat(parts)


def settings(folder: Path, algorithm: str, beta: float, seed: int, n_iterations: int) -> AlignConfig:
    """What reaches the optimum in about a minute."""
    chosen = ALGORITHMS[algorithm]
    shared = dict(learning_rate=1e-3, learning_rate_schedule="linear", batch_size=64, max_grad_norm=1.0, n_epochs=4)
    chosen = replace(chosen, **shared)
    if isinstance(chosen, PPO):
        # Near the optimum advantages are noise: scaled up to 1 they would keep the policy from settling.
        chosen = replace(chosen, value_coef=0.5, value_clip_epsilon=None, normalize_advantages=False)
    return AlignConfig(
        model=str(folder / "model"),
        prompts=str(folder / "prompts.jsonl"),
        algorithm=chosen,
        generation=GenerationConfig(max_new_tokens=LENGTH, stop_at_eos=False),
        sharing="trunk",
        beta=beta,
        n_iterations=n_iterations,
        prompts_per_iteration=1,
        responses_per_prompt=512,
        n_samples=0,
        checkpoint_every=n_iterations,
        seed=seed,
        threads=1,
    )


def sampled_kl(policy: LanguagePolicy, tokenizer: Any, n: int = 4096) -> tuple[float, float]:
    """Mean log pi - log pi_ref of fresh samples, and its standard error."""
    config = GenerationConfig(max_new_tokens=LENGTH, stop_at_eos=False)
    generator = torch.Generator().manual_seed(123)
    responses = sample(policy, tokenizer, [prompt_tokens()], config, generator, n_per_prompt=n)
    scored = policy.score(responses.tokens, responses.attention, responses.response, with_reference=True)
    assert scored.ref_log_probs is not None
    ratios = (scored.log_probs - scored.ref_log_probs).double().sum(1)
    return float(ratios.mean()), float(ratios.std() / n**0.5)


def run(
    algorithm: str,
    beta: float,
    seed: int,
    *,
    reward: str = "potentials",
    n_iterations: int = 70,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, enumerate, and say how far it went."""
    rewards = Potentials.draw(seed).of(all_responses()) if reward == "potentials" else distinct(all_responses())
    table = rewards.view([N_TOKENS] * LENGTH)

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        del prompts
        indices = torch.tensor([[WORDS.index(word) for word in text.split()] for text in responses])
        return table[tuple(indices.T)].tolist()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, seed)
        config = settings(folder, algorithm, beta, seed, n_iterations)
        torch.set_num_threads(config.threads)
        state = align.start(config, reward=score)
        log_ref = exact_log_probs(state.policy.actor)
        for row in align.iterate(config, new_run("known-optimum", seed, folder / "run"), state):
            if progress and (row["iteration"] % 20 == 0 or row["iteration"] == n_iterations):
                print(f"iteration {row['iteration']}: reward {row['reward_mean']:.4f}  KL {row['kl_to_reference']:.3f}")
        log_pi = exact_log_probs(state.policy.actor)
        kl_sampled, standard_error = sampled_kl(state.policy, state.tokenizer)
    kl = float((log_pi.exp() * (log_pi - log_ref)).sum())
    j_ref = float((log_ref.exp() * rewards).sum())
    j_star = float(beta * torch.logsumexp(log_ref + rewards / beta, 0))
    j = float((log_pi.exp() * rewards).sum()) - beta * kl
    return {
        "algorithm": algorithm,
        "beta": beta,
        "seed": seed,
        "J_ref": j_ref,
        "J_star": j_star,
        "J": j,
        "fraction": (j - j_ref) / (j_star - j_ref),
        "kl": kl,
        "kl_sampled": kl_sampled,
        "kl_standard_error": standard_error,
    }


def main() -> None:
    """Parse the arguments, run, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="ppo", choices=sorted(ALGORITHMS))
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", default="potentials", choices=["potentials", "distinct"])
    parser.add_argument("--iterations", type=int, default=70)
    arguments = parser.parse_args()
    result = run(
        arguments.algorithm,
        arguments.beta,
        arguments.seed,
        reward=arguments.reward,
        n_iterations=arguments.iterations,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
