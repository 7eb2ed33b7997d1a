"""`proximo demo align`: SFT, a reward model from noisy preferences, PPO, and a gold judge, from nothing on a CPU.

Every stage is the one that `proximo sft`, `reward` and `align` run; only the world is made up (`stories.py`). The
gold judge is never shown to the policy: it labels preferences, with Bradley-Terry noise, and has the last word.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from proximo.collect.data import read_prompts
from proximo.collect.generate import GenerationConfig
from proximo.collect.reward_model import RewardModel
from proximo.collect.rewards import Scores
from proximo.demo.stories import (
    build_tokenizer,
    generate_pairs,
    gold_score,
    label_preferences,
    noise_ceiling,
    write_corpus,
)
from proximo.language import StageRun, config_of, run_stage
from proximo.models.folders import load_tokenizer, save_model, transformers_module
from proximo.report.report import write_language_report
from proximo.stage_display import StageDisplay
from proximo.training.compare import answers_of, compare, load_for_sampling


@dataclass(frozen=True)
class DemoConfig:
    """How large the demonstration is."""

    n_stories: int = 6400
    """Stories to learn to write from."""
    n_pairs: int = 5000
    """Preference pairs for the reward model."""
    reward_learning_rate: float = 7e-4
    """Of the reward model; the more pairs, the lower."""
    noise: float = 0.5
    """Bradley-Terry temperature of the labels, in standard deviations of the gold score: with 1, the best possible
    reward model is right about 73 % of the time, as often as people agree with each other (Ouyang et al. 2022)."""
    betas: tuple[float, ...] = (0.05,)
    """Weights of the KL to the SFT model: a run of PPO each. The first is the one that is judged and kept as `ppo`;
    several are drawn as a frontier of reward against KL, beside best-of-n."""
    n_iterations: int = 30
    """Rollouts of PPO."""
    n_prompts: int = 1000
    """Prompts for PPO, and as many unseen ones."""
    n_judged: int = 256
    """Unseen prompts that the gold judge compares the models on."""
    seed: int = 0
    """Seeds everything."""
    threads: int = 0
    """CPU threads for torch; 0 is one per core."""


LONG = DemoConfig(
    n_stories=24_000,
    n_pairs=32_000,
    reward_learning_rate=4e-4,
    noise=1.0,
    betas=(0.05, 0.02, 0.15, 0.5),
    n_iterations=60,
    n_judged=512,
)
"""What the numbers of docs/benchmarks.md come from."""

GENERATION = GenerationConfig(max_new_tokens=56)

MOST_SAMPLES = 64
"""Responses per prompt that best-of-n chooses among, at most."""

Label = Callable[[list[tuple[str, str, str]], int, float], list[dict[str, str]]]


class GoldJudge:
    """The programmatic score as a reward."""

    name = "gold"

    def __call__(self, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score each response."""
        del columns
        return Scores([gold_score(prompt, text) for prompt, text in zip(prompts, responses, strict=True)], [])

    def close(self) -> None:
        """Nothing is open."""


def run_demo(folder: Path, config: DemoConfig, display: StageDisplay) -> dict[str, Any]:
    """Go through all stages in `folder`; return what was measured."""
    began = time.monotonic()
    data = write_corpus(folder / "data", n_stories=config.n_stories, n_prompts=config.n_prompts, seed=config.seed)
    display.say(f"1 of 4  {config.n_stories:,} stories learned by a transformer from scratch (proximo sft)")
    sft = _finished(train_sft(folder, data["stories"], config, display))
    display.say(f"2 of 4  a reward model from {config.n_pairs:,} noisy preferences (proximo reward)")
    reward = _finished(train_reward(folder, config, display, sft.path))
    accuracy, ceiling = reward_accuracy(reward.path, config)
    judged = []
    for number, beta in enumerate(config.betas):
        display.say(f"3 of 4  PPO against the reward model, beta {beta:g} (proximo align)")
        path = folder / (f"ppo-beta-{beta:g}" if number else "ppo")
        aligned = _finished(train_ppo(path, data["prompts"], config, display, sft.path, str(reward.path), beta=beta))
        display.say(f"4 of 4  the gold judge reads {config.n_judged} unseen prompts (proximo evaluate)")
        write_language_report(aligned.path)
        judged.append({"beta": beta} | judge(aligned.path, sft.path, data["held_out"], config))
    result = {
        **asdict(config),
        "betas": list(config.betas),
        "reward_accuracy": accuracy,
        "reward_accuracy_ceiling": ceiling,
        **{name: value for name, value in judged[0].items() if name not in ("n_prompts", "seed", "beta")},
    }
    if len(judged) > 1:
        kept = ("beta", "kl_to_against", "reward_mean", "win_rate", "eos_fraction")
        result["frontier"] = [{name: one[name] for name in kept} for one in judged]
        result["best_of_n"] = best_of_n(sft.path, reward.path, data["held_out"], config)
        draw_frontier(folder / "frontier.png", result["frontier"], result["best_of_n"])
    result |= {"seconds": time.monotonic() - began, "folder": str(folder)}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _finished(run: StageRun) -> StageRun:
    """Raise KeyboardInterrupt if a stage was: the next ones have nothing to stand on."""
    if run.interrupted_by is not None:
        raise KeyboardInterrupt(f"the demo stopped in {run.path}; begin it again: proximo demo align")
    return run


def train_sft(folder: Path, stories: Path, config: DemoConfig, display: StageDisplay) -> StageRun:
    """A two-layer Llama of 1.1 M parameters, from scratch."""
    write_untrained(folder / "untrained", config.seed)
    settings = dict(
        model=str(folder / "untrained"),
        data=str(stories),
        batch_size=16,
        learning_rate=3e-3,
        warmup_fraction=0.1,
        seed=config.seed,
        threads=config.threads,
        hold_out=0.02,
        completion_only=True,
    )
    return run_stage("sft", config_of("sft", settings, where="demo"), display, folder / "sft")


def write_untrained(folder: Path, seed: int) -> None:
    """The model before it has read anything. Wide initial weights let copying come early (docs/log.md)."""
    transformers = transformers_module()
    tokenizer = build_tokenizer()
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(shape)
    save_model(folder, model, tokenizer)


def train_reward(
    folder: Path,
    config: DemoConfig,
    display: StageDisplay,
    sft: Path,
    *,
    label: Label = label_preferences,
    name: str = "reward",
) -> StageRun:
    """A reward model from pairs of stories that begin alike."""
    pairs = generate_pairs(config.n_pairs, config.seed)
    path = folder / "data" / f"preferences-{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in label(pairs, config.seed, config.noise)))
    settings = dict(
        model=str(sft),
        data=str(path),
        batch_size=16,
        learning_rate=config.reward_learning_rate,
        hold_out=0.1,
        seed=config.seed,
        threads=config.threads,
    )
    return run_stage("reward", config_of("reward", settings, where="demo"), display, folder / name)


def reward_accuracy(model: Path, config: DemoConfig) -> tuple[float, float]:
    """How often a reward model agrees with a noisy label on pairs it has not seen, and how often it could at best.

    Both are expectations over the label, so that nothing but the pairs themselves is drawn.
    """
    pairs = generate_pairs(4 * config.n_judged, config.seed + 1_000_003)
    source = RewardModel(model)
    prompts = [prompt for prompt, _, _ in pairs]
    first, second = (source(list(prompts), [pair[k] for pair in pairs], {}).values for k in (1, 2))
    gaps = [gold_score(prompt, one) - gold_score(prompt, other) for prompt, one, other in pairs]
    chances = [1 / (1 + math.exp(-gap / config.noise)) for gap in gaps]  # that the first is preferred
    agrees = [
        chance if (a or 0.0) > (b or 0.0) else 1 - chance for a, b, chance in zip(first, second, chances, strict=True)
    ]
    return sum(agrees) / len(agrees), noise_ceiling(pairs, config.noise)


def train_ppo(
    path: Path,
    prompts: Path,
    config: DemoConfig,
    display: StageDisplay,
    sft: Path,
    reward: str,
    **changes: Any,
) -> StageRun:
    """PPO with a value head on the policy's trunk; the gold judge looks on."""
    settings = dict(
        model=str(sft),
        reward=(reward,),
        gold=("proximo.demo.stories:gold_scores",),
        prompts=str(prompts),
        sharing="trunk",
        beta=config.betas[0],
        n_iterations=config.n_iterations,
        prompts_per_iteration=128,
        batch_size=64,
        n_epochs=2,
        learning_rate=3e-4,
        max_new_tokens=GENERATION.max_new_tokens,
        missing_eos_penalty=1.0,
        samples_every=10,
        seed=config.seed,
        threads=config.threads,
    )
    return run_stage("align", config_of("align", settings | changes, where="demo"), display, path)


def judge(model: Path, against: Path, prompts: Path, config: DemoConfig) -> dict[str, Any]:
    """What the gold judge says of two models on unseen prompts."""
    tokenizer = load_tokenizer(model)
    rows = read_prompts(prompts, tokenizer, max_tokens=None, over_long="error")[: config.n_judged]
    return compare(str(model), str(against), tokenizer, rows, GoldJudge(), GENERATION, best_of=4, seed=config.seed)


def best_of_n(model: Path, reward: Path, prompts: Path, config: DemoConfig) -> list[dict[str, float]]:
    """Gold score and KL (nats) of the response that the reward model likes best among n of `model`.

    The KL of best-of-n is at most log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).
    """
    tokenizer = load_tokenizer(model)
    rows = read_prompts(prompts, tokenizer, max_tokens=None, over_long="error")[: config.n_judged // 4]
    policy = load_for_sampling(str(model), temperature=1.0)
    source = RewardModel(reward)
    answers = answers_of(policy, tokenizer, rows, source, GENERATION, n_per_prompt=MOST_SAMPLES, seed=config.seed)
    gold = [gold_score(str(prompt), text) for prompt, text in zip(answers.prompts, answers.texts, strict=True)]
    proxy = [-math.inf if score is None else score for score in answers.scores]
    found = []
    for n in (2**k for k in range(MOST_SAMPLES.bit_length())):
        best = [max(range(first, first + n), key=proxy.__getitem__) for first in range(0, len(gold), n)]
        kl = math.log(n) - (n - 1) / n
        found.append({"n": n, "kl": kl, "reward_mean": sum(gold[row] for row in best) / len(best)})
    return found


def draw_frontier(path: Path, frontier: list[dict[str, Any]], best: list[dict[str, float]]) -> None:
    """Gold score against KL: PPO with several betas, and best-of-n of the SFT model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    points = sorted(frontier, key=lambda one: one["kl_to_against"])
    series = (
        ("PPO", [(p["kl_to_against"], p["reward_mean"], f"beta {p['beta']:g}") for p in points], "o-", "#0072B2"),
        ("best of n by the reward model", [(b["kl"], b["reward_mean"], f"{b['n']}") for b in best], "s--", "#D55E00"),
    )
    for label, places, style, colour in series:
        axes.plot([p[0] for p in places], [p[1] for p in places], style, color=colour, label=label)
        for x, y, words in places:
            below = label == "PPO"
            axes.annotate(
                words,
                (x, y),
                xytext=(6, -12) if below else (-12, 6),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.set_xlabel("KL to the SFT model (nats per response)")
    axes.set_ylabel("gold score (standard deviations of the corpus)")
    axes.set_title("Reward against KL, on unseen prompts")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def smaller(config: DemoConfig) -> DemoConfig:
    """A demonstration that shows nothing but that everything runs: for tests."""
    return replace(config, n_stories=64, n_pairs=40, n_iterations=2, n_prompts=130, n_judged=8)
