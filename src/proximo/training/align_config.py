"""The settings of an alignment run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from proximo.algorithms.grpo import GRPO, PAPERS
from proximo.algorithms.ppo import PPO
from proximo.collect.data import OVER_LONG
from proximo.collect.generate import GenerationConfig
from proximo.errors import HIGHEST_SEED, UserError, in_range, one_of
from proximo.models.adapters import LoraConfig
from proximo.models.language import Sharing

Algorithm = PPO | GRPO

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": PPO(
        learning_rate=1e-5,
        learning_rate_schedule="linear",
        n_epochs=4,
        batch_size=64,
        gamma=1.0,
        value_coef=0.1,
        value_clip_epsilon=0.2,
        max_grad_norm=1.0,
        update_path="eager",
        microbatch_tokens=16_384,
    ),
    **PAPERS,
}
"""Settings to begin with, by the names that `--algorithm` takes. PPO's are those of Huang et al. 2024 (gamma 1, lambda
0.95, 4 epochs, value coefficient 0.1, value clipping 0.2)."""


@dataclass(frozen=True)
class JudgeConfig:
    """An AI judge behind an OpenAI-compatible endpoint, for --reward judge."""

    judge_url: str = "http://127.0.0.1:8000/v1"
    """Address of the endpoint."""
    judge_api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key; a server on this machine needs none."""
    judge_model: str = ""
    """Name of the model to ask."""
    judge_rubric: str = ""
    """A text file that says what counts."""
    judge_mode: Literal["score", "pair"] = "score"
    """`score`: each response by itself; `pair`: against another response to the same prompt."""
    judge_timeout: float = 60.0
    """Seconds that one request to the judge may take."""
    judge_parallel: int = 8
    """Requests to the judge under way at the same time."""
    judge_retries: int = 2
    """How often a request is repeated when the endpoint is overloaded, fails, or does not answer."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        one_of("judge_mode", self.judge_mode, ("score", "pair"))
        in_range("judge_timeout", self.judge_timeout, above=0.0, at_most=86_400.0, usual="60 (seconds)")
        in_range("judge_parallel", self.judge_parallel, at_least=1, whole=True, usual="8")
        in_range("judge_retries", self.judge_retries, at_least=0, whole=True, usual="2")


@dataclass(frozen=True)
class AlignConfig:
    """Everything that an alignment run needs to be run again."""

    model: str = ""
    """The model to begin with, a folder or hub id: usually what proximo sft made. It is the reference, too."""
    reward: tuple[str, ...] = ()
    """Where scores come from: a reward model's folder, my_file.py:function, package.module:function, judge, or
    code:COLUMN (programs, with tests in that column of the prompts); several are added up."""
    reward_weights: tuple[float, ...] = ()
    """A weight for each reward; by default 1."""
    normalize_rewards_on: int = 256
    """Responses of the model as it begins on which the scores of each reward model are brought to mean 0 and standard
    deviation 1 before training, at least 16; 0 leaves them as the reward model's folder has them."""
    gold: tuple[str, ...] = ()
    """A second opinion that is only looked at, never learned from: sources as for reward. Its mean is `gold_mean` in
    the metrics, and the report says where the reward goes on rising while it falls."""
    prompts: str = ""
    """Prompts to answer: a .jsonl or .parquet file, or a folder that datasets saved, with a column `prompt`."""
    chat_template: str = ""
    """A Jinja file that says how messages are written; it takes the place of the tokenizer's own template, if any, and
    is saved with the result."""
    algorithm: Annotated[Algorithm, tyro.conf.Suppress] = field(default_factory=lambda: ALGORITHMS["ppo"])
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sharing: Sharing = "separate"
    """How the roles share weights: `separate`, a model each; `trunk`, a value head on the policy; `lora`, adapters for
    the policy and the critic on one frozen base, which is the reference."""
    critic_from: Literal["auto", "reward", "model"] = "auto"
    """What the critic begins as: the reward model, or the model with a new head; `auto` is the reward model where
    there is one that reads the policy's tokens (with sharing lora: one that is an adapter for the same base)."""
    beta: float = 0.05
    """Weight of the KL to the reference; 0 keeps no reference in memory."""
    beta_control: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` moves beta so that the KL per response comes to beta_target (Ziegler et al. 2019)."""
    beta_target: float = 6.0
    """The KL per response (nats) that adaptive beta is steered to."""
    beta_horizon: float = 10_000.0
    """Responses over which adaptive beta may grow by a fifth."""
    kl_in: Literal["reward", "loss_k2", "loss_k3"] = "reward"
    """Where the KL counts: `reward`, per token, by log pi - log pi_ref; or in the loss, by the estimate named."""
    n_iterations: int = 100
    """Rollouts, each followed by an update."""
    prompts_per_iteration: int = 64
    """Prompts answered in each rollout."""
    responses_per_prompt: int | None = None
    """Responses to each prompt; by default 1 with a critic and 8 without one."""
    value_pretraining_iterations: int = 0
    """Rollouts at the beginning after which the critic alone learns (VC-PPO, Yuan et al. 2025)."""
    max_prompt_tokens: int | None = None
    """Longest prompt; by default what the model's context leaves beside max_new_tokens."""
    over_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of longer prompts: refused before training, left out, or cut on the left."""
    max_missing_rewards: float = 0.2
    """The run stops where more than this share of an iteration's responses got no score."""
    reward_timeout: float = 60.0
    """Seconds after which a reward function that has not answered is stopped."""
    sandbox: str = ""
    """The command in which --reward code:COLUMN runs the programs that the model writes, without which none is run:
    {file} stands for the program, {folder} for the folder where it is. docs/language.md has examples."""
    sandbox_timeout: float = 10.0
    """Seconds after which such a program is stopped."""
    n_samples: int = 4
    """Prompts whose responses are shown and kept in samples.jsonl, the same ones throughout."""
    samples_every: int = 10
    """Iterations between two looks at them."""
    seed: int = 0
    """Seeds the order of prompts, the sampling, the minibatches and new heads and adapters."""
    checkpoint_every: int | None = None
    """Iterations between checkpoints; by default a tenth of n_iterations, more where saving would take too long."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    keep_every: int | None = None
    """Also keep the first checkpoint at or after each multiple of this many iterations, for good."""
    max_skipped_updates: int = 3
    """Updates in a row that may be left out because their loss or gradient is not finite; one more ends the run."""
    device: str = "cpu"
    """Where the models are: cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads for torch; 0 is one per core."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`bfloat16` computes in it over float32 weights; `auto` is float32 on the CPU and bfloat16 on a GPU."""
    frozen_precision: Literal["float32", "bfloat16"] = "float32"
    """How weights that never learn are held: the reference, reward and gold models, and with sharing lora the base.
    `bfloat16` takes half the memory, and needs precision bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    debug: bool = False
    """Check at each iteration that every probability ratio is 1 before the first update."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        in_range("beta", self.beta, at_least=0.0, usual="0.05")
        in_range("beta_target", self.beta_target, above=0.0, usual="6.0")
        in_range("beta_horizon", self.beta_horizon, above=0.0, usual="10000")
        for name in ("n_iterations", "prompts_per_iteration", "keep_checkpoints", "samples_every"):
            in_range(name, getattr(self, name), at_least=1, whole=True, usual=str(getattr(AlignConfig, name)))
        for name in ("responses_per_prompt", "max_prompt_tokens", "checkpoint_every", "keep_every"):
            in_range(name, getattr(self, name), optional=True, at_least=1, whole=True, usual="left out")
        in_range("seed", self.seed, at_least=0, at_most=HIGHEST_SEED, whole=True, usual="0")
        counts = ("threads", "n_samples", "value_pretraining_iterations", "normalize_rewards_on", "max_skipped_updates")
        for name in counts:
            in_range(name, getattr(self, name), at_least=0, whole=True, usual=str(getattr(AlignConfig, name)))
        if 0 < self.normalize_rewards_on < 16:
            raise UserError(
                f"normalize_rewards_on is {self.normalize_rewards_on}: so few responses have no scale. Set 256, or 0 "
                "for the scale that the reward model's folder has."
            )
        in_range("max_missing_rewards", self.max_missing_rewards, at_least=0.0, at_most=1.0, usual="0.2")
        in_range("reward_timeout", self.reward_timeout, above=0.0, at_most=86_400.0, usual="60")
        in_range("sandbox_timeout", self.sandbox_timeout, above=0.0, at_most=86_400.0, usual="10")
        one_of("sharing", self.sharing, ("separate", "trunk", "lora"))
        one_of("kl_in", self.kl_in, ("reward", "loss_k2", "loss_k3"))
        one_of("beta_control", self.beta_control, ("fixed", "adaptive"))
        one_of("critic_from", self.critic_from, ("auto", "reward", "model"))
        one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
        one_of("frozen_precision", self.frozen_precision, ("float32", "bfloat16"))
        one_of("over_long", self.over_long, OVER_LONG)
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise UserError(
                f"There are {len(self.reward)} rewards and {len(self.reward_weights)} reward_weights. Give one each."
            )

    @property
    def n_per_prompt(self) -> int:
        """Responses to each prompt."""
        return self.responses_per_prompt or (8 if isinstance(self.algorithm, GRPO) else 1)

    @property
    def responses_per_iteration(self) -> int:
        """Rows of one rollout."""
        return self.prompts_per_iteration * self.n_per_prompt

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and self.device.startswith("cuda"))


def check_together(config: AlignConfig) -> None:
    """Refuse settings that are possible each by itself.

    Raises:
        UserError: with the setting to change.
    """
    if config.n_per_prompt < 2 and isinstance(config.algorithm, GRPO):
        raise UserError("responses_per_prompt is 1, but without a critic responses are compared: set 8, say.")

    if config.algorithm.batch_size > config.responses_per_iteration:
        raise UserError(
            f"batch_size is {config.algorithm.batch_size}, but an iteration has only {config.responses_per_iteration} "
            f"responses ({config.prompts_per_iteration} prompts x {config.n_per_prompt}). Set batch_size to at most "
            f"{config.responses_per_iteration}, or prompts_per_iteration higher."
        )
    if config.frozen_precision == "bfloat16" and not config.autocast:
        raise UserError(
            f"frozen_precision is 'bfloat16', but precision is {config.precision!r} on {config.device}, which computes "
            "in float32. Set precision bfloat16, too, or leave frozen_precision out."
        )
    if config.value_pretraining_iterations and (config.sharing == "trunk" or isinstance(config.algorithm, GRPO)):
        raise UserError("value_pretraining_iterations needs a critic that shares no weights that learn: not trunk.")
    if config.critic_from == "reward" and (config.sharing == "trunk" or isinstance(config.algorithm, GRPO)):
        has_none = isinstance(config.algorithm, GRPO)
        why = "there is no critic" if has_none else "the critic is a head on the policy (sharing trunk)"
        raise UserError(f"critic_from is 'reward', but {why}, so that it can do nothing. Leave it out.")
    judges = "judge" in config.reward + config.gold
    if judges and config.judge.judge_mode == "pair" and config.n_per_prompt < 2:
        raise UserError(
            "judge_mode is 'pair', which compares responses to the same prompt, but responses_per_prompt is 1. Set "
            "responses_per_prompt to 2 or more, or judge_mode to score."
        )
    if config.sandbox and not any(place.startswith("code:") for place in config.reward + config.gold):
        raise UserError(
            "sandbox is given, but no reward runs programs. Set reward to code:tests, where tests is the column of the "
            "prompts with the tests, or leave sandbox out."
        )
    generation = config.generation
    if generation.truncation == "mask" and not generation.stop_at_eos and not generation.stop:
        raise UserError(
            "truncation is 'mask', but with stop_at_eos false and no stop string every response is cut off, so that "
            "nothing could ever be learned. Use truncation terminate or bootstrap, or let responses end."
        )
    if generation.truncation == "bootstrap" and isinstance(config.algorithm, GRPO):
        raise UserError(
            "truncation is 'bootstrap', which goes on by the critic's value, but there is no critic. Use truncation "
            "terminate or mask, or algorithm ppo."
        )
    if config.beta_control == "adaptive" and config.beta == 0:
        raise UserError(
            "beta_control is 'adaptive', but beta is 0, which keeps no reference to measure a KL to. Set beta to 0.05, "
            "say, to begin with."
        )
    if isinstance(config.algorithm, PPO):
        _check_ppo(config.algorithm)


def _check_ppo(ppo: PPO) -> None:
    """Refuse settings of PPO that do nothing for language models."""
    for name, meant in (("kl_coef", "beta"), ("kl_target", "beta_target, with beta_control adaptive")):
        value = getattr(ppo, name)
        if value != getattr(PPO, name):
            raise UserError(f"{name} is {value:g}, but it is PPO-Penalty's and does nothing here. Use {meant}.")
    if ppo.objective != "clip":
        raise UserError(
            f"objective is {ppo.objective!r}, whose KL to the policy before the update is no use for language models. "
            "Use objective clip, with beta as the weight of the KL to the reference."
        )
    if ppo.update_path == "fused":
        raise UserError("update_path is 'fused', which is for plain perceptrons alone. Leave it out.")
