"""A verifiable reward: a small transformer learns to add, first from bad examples, then from being right or wrong.

    python examples/addition.py --algorithm ppo --sharing trunk --seed 0

The numbers have two or three digits, and a quarter of all pairs of numbers is never trained on. Supervised
fine-tuning imitates traces of which only 30 % are right, so the model is right in about 40 % of its samples. PPO (or
GRPO, or PPO on LoRA adapters) then sees only whether a sum is right. The last line is one JSON object:

    {"algorithm", "sharing", "seed", "sft_accuracy", "accuracy", "sft_greedy", "greedy", ...}

Accuracies are on unseen pairs, of sampled answers; `greedy` takes the most likely token. Numbers are written with
their last digit first (124 + 19 is asked as 421+910= and answered 341), as carries go that way.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import GenerationConfig
from proximo.collect.rewards import Scores
from proximo.collect.tokens import encode_prompt
from proximo.language import config_of, run_stage
from proximo.models.folders import load_tokenizer, save_model, transformers_module
from proximo.stage_display import StageDisplay
from proximo.training.compare import answers_of, load_for_sampling

GENERATION = GenerationConfig(max_new_tokens=6)
RIGHT_SHARE = 0.3


def is_held_out(a: int, b: int) -> bool:
    """Whether a pair is for testing alone, in either order."""
    low, high = min(a, b), max(a, b)
    return random.Random(1000 * low + high).random() < 0.25


def draw_pair(rng: random.Random, *, held_out: bool) -> tuple[int, int]:
    """Two numbers of two or three digits each."""
    while True:
        a, b = (rng.randrange(10, 100) if rng.random() < 0.3 else rng.randrange(100, 1000) for _ in range(2))
        if is_held_out(a, b) == held_out:
            return a, b


def question(a: int, b: int) -> str:
    """Both numbers with three digits, the last one first."""
    return f"{a:03d}"[::-1] + "+" + f"{b:03d}"[::-1] + "="


def answer(a: int, b: int) -> str:
    """The sum, its last digit first."""
    return str(a + b)[::-1]


def spoiled(text: str, rng: random.Random) -> str:
    """The answer with one digit exchanged for another one."""
    place = rng.randrange(len(text))
    other = rng.choice([digit for digit in "0123456789" if digit != text[place]])
    return text[:place] + other + text[place + 1 :]


def write_data(folder: Path, seed: int, n_traces: int) -> None:
    """traces.jsonl for fine-tuning, prompts.jsonl for PPO, held_out.jsonl for testing."""
    rng = random.Random(seed)
    traces = []
    for _ in range(n_traces):
        a, b = draw_pair(rng, held_out=False)
        text = answer(a, b) if rng.random() < RIGHT_SHARE else spoiled(answer(a, b), rng)
        traces.append({"prompt": question(a, b), "completion": text})
    rows = {"traces": traces}
    for name, held_out, count in (("prompts", False, 8192), ("held_out", True, 1000)):
        pairs = [draw_pair(rng, held_out=held_out) for _ in range(count)]
        rows[name] = [{"prompt": question(*pair), "answer": answer(*pair)} for pair in pairs]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def score(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 for the right sum, 0 for any other: a reward function as `proximo align --reward` takes it."""
    del prompts
    return [float(text == right) for text, right in zip(responses, answer, strict=True)]


class Checker:
    """The same as a reward object."""

    name = "right sums"

    def __call__(self, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score each response."""
        return Scores(list(score(prompts, responses, **columns)), [])

    def close(self) -> None:
        """Nothing is open."""


def write_untrained(folder: Path, seed: int) -> None:
    """A two-layer Llama over the ten digits, + and =, with a tokenizer that takes characters."""
    import tokenizers

    transformers = transformers_module()
    words = ["<pad>", "<bos>", "<eos>", *"0123456789+="]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    shape = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():  # states have a fixed norm, so the head, which LoRA freezes, bounds how sure one can be
        model.lm_head.weight *= 3.0
    save_model(folder, model, tokenizer)


def accuracy(model: Path, prompts: Path, *, temperature: float = 1.0) -> float:
    """The share of right sums on unseen pairs."""
    tokenizer = load_tokenizer(model)
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows = [PromptRow(r["prompt"], encode_prompt(tokenizer, r["prompt"]), {"answer": r["answer"]}) for r in lines]
    policy = load_for_sampling(str(model), temperature=temperature)
    answers = answers_of(policy, tokenizer, rows, Checker(), GENERATION, n_per_prompt=1, seed=0)
    return sum(value or 0.0 for value in answers.scores) / len(rows)


def fine_tune(folder: Path, seed: int, n_traces: int, threads: int, *, quiet: bool) -> None:
    """From random weights to a model that is right as often as its examples were."""
    write_data(folder, seed, n_traces)
    write_untrained(folder / "untrained", seed)
    settings = dict(
        model=str(folder / "untrained"),
        data=str(folder / "traces.jsonl"),
        batch_size=64,
        learning_rate=3e-3,
        warmup_fraction=0.05,
        hold_out=0.005,
        checkpoint_every=10_000,
        seed=seed,
        threads=threads,
    )
    config = config_of("sft", settings, where="addition")
    run_stage("sft", config, StageDisplay.choose(quiet=quiet), folder / "sft")


def align(
    folder: Path, algorithm: str, sharing: str, seed: int, n_iterations: int, threads: int, *, quiet: bool
) -> Path:
    """Learn from being right or wrong."""
    settings: dict[str, Any] = dict(
        algorithm=algorithm,
        model=str(folder / "sft"),
        prompts=str(folder / "prompts.jsonl"),
        beta=0.0,
        n_iterations=n_iterations,
        prompts_per_iteration=256 if algorithm == "ppo" else 64,
        responses_per_prompt=1 if algorithm == "ppo" else 8,
        batch_size=128,
        n_epochs=4 if algorithm == "ppo" else 2,
        learning_rate=1e-3 if sharing == "lora" else 2e-4,
        learning_rate_schedule="linear",
        max_new_tokens=GENERATION.max_new_tokens,
        sharing=sharing,
        n_samples=0,
        seed=seed,
        threads=threads,
    )
    config = config_of("align", settings, where="addition")
    name = folder / f"{algorithm}-{sharing}"
    return run_stage("align", config, StageDisplay.choose(quiet=quiet), name, score).path


def main() -> None:
    """Parse the arguments, run, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="ppo", choices=["ppo", "grpo", "rloo", "dr_grpo", "dapo"])
    parser.add_argument("--sharing", default="trunk", choices=["separate", "trunk", "lora"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", type=int, default=200_000)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything here; an SFT model that is there is taken")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "sft" / "model.safetensors").exists():
            fine_tune(folder, given.seed, given.traces, given.threads, quiet=given.quiet)
        held_out = folder / "held_out.jsonl"
        before = accuracy(folder / "sft", held_out), accuracy(folder / "sft", held_out, temperature=1e-3)
        path = align(
            folder, given.algorithm, given.sharing, given.seed, given.iterations, given.threads, quiet=given.quiet
        )
        after = accuracy(path, held_out), accuracy(path, held_out, temperature=1e-3)
    named = {"algorithm": given.algorithm, "sharing": given.sharing, "seed": given.seed, "iterations": given.iterations}
    names = ("sft_accuracy", "sft_greedy", "accuracy", "greedy")
    print(json.dumps(named | dict(zip(names, (*before, *after), strict=True))))


if __name__ == "__main__":
    main()
