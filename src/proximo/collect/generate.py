"""`generate`: let a language model answer prompts, have the answers scored, and hand over a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from proximo.collect.data import PromptRow
from proximo.collect.rewards import Reward, Scores, WeightedReward
from proximo.collect.tokens import Prompt, left_padded
from proximo.core.batch import Batch
from proximo.core.distributions import Categorical
from proximo.core.kl import k1
from proximo.errors import UserError, in_range, one_of
from proximo.models.cache import has_full_attention, new_cache
from proximo.models.language import LanguagePolicy, Scored
from proximo.models.rows import position_ids

TOKENS_AT_ONCE = 32_768
"""Tokens, padding counted, that are scored in one forward pass without gradient."""

STOP_SLACK = 16
"""Tokens looked at for a stop string beyond one for each of its bytes: special ones have no text."""

TOKENS_SIDE_BY_SIDE = 131_072
"""Tokens, of prompts and responses, that a cache has room for where nothing else is said."""

DROP_SHARE = 0.1
"""Rows that have finished leave the batch once they are this share of it: leaving costs a copy of the cache."""


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are sampled, and what their ends mean."""

    max_new_tokens: int = 64
    """Longest response, its end token counted."""
    temperature: float = 1.0
    """Logits are divided by this, in sampling and in every log-probability."""
    stop: tuple[str, ...] = ()
    """A response also ends where one of these appears; it is left out of the text that is scored."""
    stop_at_eos: bool = True
    """False lets responses run to max_new_tokens, the end token being a token like any other."""
    truncation: Literal["terminate", "bootstrap", "mask"] = "terminate"
    """A response cut off by max_new_tokens: `terminate`, nothing comes after it; `bootstrap`, its value goes on by the
    critic's; `mask`, nothing is learned from it."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that was cut off."""
    generation_batch_size: int | None = None
    """Responses sampled side by side; by default as many as have room for 131,072 tokens."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        in_range("max_new_tokens", self.max_new_tokens, at_least=1, whole=True, usual="64")
        in_range("temperature", self.temperature, at_least=1e-6, usual="0.7 to 1.0")
        in_range("missing_eos_penalty", self.missing_eos_penalty, at_least=0.0, usual="1.0")
        in_range("generation_batch_size", self.generation_batch_size, optional=True, at_least=1, whole=True, usual="64")
        one_of("truncation", self.truncation, ("terminate", "bootstrap", "mask"))
        for word in self.stop:
            if not isinstance(word, str) or not word:
                raise UserError(
                    f"stop has {word!r}, but a response ends where a text appears, and each must have at least one "
                    r"letter. A usual value is '\n'."
                )


class Responses(NamedTuple):
    """Sampled rows: left-padded prompts `[B, P]`, then responses, padded on the right `[B, L]` in all."""

    tokens: Tensor
    """[B, L] int64."""
    attention: Tensor
    """[B, L]: True at real tokens."""
    response: Tensor
    """[B, L]: True at the tokens of responses, the end token among them."""
    log_probs: Tensor
    """[B, L]: log-probability of each token of a response when it was sampled; 0 elsewhere."""
    ended: Tensor
    """[B]: True where a response ended by itself, not at the limit."""


class Answers(NamedTuple):
    """What became of the prompts of one rollout, for people to read; one entry per response."""

    prompts: list[Prompt]
    texts: list[str]
    scores: list[float | None]
    kl_to_reference: list[float] | None
    """Sum of log pi - log pi_ref over each response, nats."""
    n_tokens: list[int]
    ended: list[bool]
    problems: list[str]
    """What went wrong with rewards, in words."""


@torch.no_grad()
def sample(
    policy: LanguagePolicy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    generator: torch.Generator,
    *,
    n_per_prompt: int = 1,
) -> Responses:
    """Sample `n_per_prompt` responses to each prompt (token ids), side by side in the order of the prompts.

    Each prompt is read once, whatever the number of responses. Nothing but the temperature is applied to the
    logits, so that the recorded log-probabilities are those of the policy.
    """
    device = next(policy.parameters()).device
    longest = max(len(prompt) for prompt in prompts) + config.max_new_tokens
    size = config.generation_batch_size or max(1, TOKENS_SIDE_BY_SIDE // longest)
    if size < n_per_prompt:  # a group that does not fit side by side is sampled one response after the other
        prompts = [prompt for prompt in prompts for _ in range(n_per_prompt)]
        n_per_prompt = 1
    per_pass = max(1, size // n_per_prompt)
    with policy.precision():  # over all tokens, so that weights that learn are not cast anew for each
        passes = [
            _sample_together(
                policy, tokenizer, prompts[first : first + per_pass], config, generator, n_per_prompt, device
            )
            for first in range(0, len(prompts), per_pass)
        ]
    return passes[0] if len(passes) == 1 else _joined(passes)


def _sample_together(
    policy: LanguagePolicy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    generator: torch.Generator,
    n_per_prompt: int,
    device: torch.device,
) -> Responses:
    logits, cache, tokens, attention, is_padded = _read_prompts(policy, prompts, config, n_per_prompt, device)
    n_rows, width = len(tokens), tokens.shape[1] - config.max_new_tokens
    response = torch.zeros_like(tokens, dtype=torch.bool)
    log_probs = torch.zeros(tokens.shape, device=device)
    lengths = attention[:, :width].sum(1)
    takes_whole_mask = policy.actor.config._attn_implementation == "sdpa" and has_full_attention(policy.actor)
    ends = end_tokens(policy.actor, tokenizer) if config.stop_at_eos else []
    ends_tensor = torch.tensor(ends, dtype=torch.long, device=device)

    rows = torch.arange(n_rows, device=device)  # of those that are still being written
    running = torch.ones(n_rows, dtype=torch.bool, device=device)  # False: over, and still in the cache
    ended = torch.zeros(n_rows, dtype=torch.bool, device=device)
    for step in range(config.max_new_tokens):
        place = width + step
        log_p = logits.log_softmax(-1)
        actions = draw(log_p, generator)
        writing = rows[running]
        tokens[rows, place] = actions
        response[writing, place] = True
        log_probs[rows, place] = log_p.gather(-1, actions[:, None]).squeeze(-1)
        over = torch.isin(actions, ends_tensor)
        if config.stop:
            over |= _has_stop(tokenizer, tokens[rows, width : place + 1], config.stop)
        ended[rows[over & running]] = True
        running &= ~over
        if step + 1 == config.max_new_tokens or not bool(running.any()):
            break
        if (~running).sum() >= DROP_SHARE * len(running):
            cache.batch_select_indices(running.nonzero().squeeze(1))
            rows, actions = rows[running], actions[running]
            running = torch.ones_like(rows, dtype=torch.bool)
        mask = attention[rows, : place + 1] if is_padded else None
        if mask is not None:  # made here, the mask costs one view; transformers makes it anew at every step
            mask = mask[:, None, None] if takes_whole_mask else mask.long()
        logits = policy.next_logits(actions[:, None], mask, (lengths[rows] + step)[:, None], cache)

    used = int(response.any(0).nonzero()[-1]) + 1
    attention[:, width:] = response[:, width:]  # for sampling it was true at all of these
    return Responses(
        tokens[:, :used].masked_fill(~attention[:, :used], 0),
        attention[:, :used],
        response[:, :used],
        log_probs[:, :used].masked_fill(~response[:, :used], 0.0),
        ended,
    )


def _read_prompts(
    policy: LanguagePolicy,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    n_per_prompt: int,
    device: torch.device,
) -> tuple[Tensor, Any, Tensor, Tensor, bool]:
    """Read each prompt once, and make a row for each response to it.

    Returns:
        Logits of the first token `[B, V]`, the cache, the rows with room for responses `[B, P + max_new_tokens]`,
        which places of the cache count (room for responses does), and whether there is padding among the prompts.
    """
    prompt_tokens, prompt_attention = (tensor.to(device) for tensor in left_padded(prompts))
    width = prompt_tokens.shape[1]
    cache = new_cache(policy.actor, width + config.max_new_tokens)
    is_padded = not bool(prompt_attention.all())
    logits = policy.next_logits(
        prompt_tokens, prompt_attention.long() if is_padded else None, position_ids(prompt_attention), cache
    )
    shape = len(prompts) * n_per_prompt, width + config.max_new_tokens
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    attention = torch.ones(shape, dtype=torch.bool, device=device)
    tokens[:, :width] = prompt_tokens.repeat_interleave(n_per_prompt, 0)
    attention[:, :width] = prompt_attention.repeat_interleave(n_per_prompt, 0)
    if n_per_prompt > 1:
        cache.batch_repeat_interleave(n_per_prompt)
        logits = logits.repeat_interleave(n_per_prompt, 0)
    return logits, cache, tokens, attention, is_padded


def draw(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """A token `[B]` for each row of log-probabilities `[B, V]`.

    Raises:
        UserError: if a row is NaN, which a softmax makes of any NaN, or infinity, among its logits.
    """
    if log_p.device.type != "cpu":
        _refuse_nan(log_p[:, 0])
        return Categorical(log_p).sample(generator)
    # Noise for every token of the vocabulary costs a CPU more than all else here: one number per row will do.
    cumulative = log_p.exp().cumsum(-1, dtype=torch.float64)
    _refuse_nan(cumulative[:, -1])
    points = torch.rand(len(log_p), 1, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).squeeze(-1).clamp_(max=log_p.shape[-1] - 1)


def _refuse_nan(numbers: Tensor) -> None:
    if bool(numbers.isnan().any()):
        raise UserError(
            "The model gives NaN for the next token, so that nothing can be sampled from it: its weights hold NaN or "
            "infinity, or grow too large on the way. Take the model of an earlier checkpoint or run, or its weights "
            "from where they came; in training, precision float32 and a lower learning_rate help."
        )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which a response ends: the tokenizer's and those of the model's generation settings."""
    found = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found |= set(configured) if isinstance(configured, list) else {configured}
    return sorted(token for token in found if token is not None)


def check_ends(model: Any, tokenizer: Any, config: GenerationConfig) -> None:
    """Refuse to wait for an end that nothing can write.

    Raises:
        UserError: if responses are to stop at EOS, there is no such token, and no stop string either.
    """
    if config.stop_at_eos and not config.stop and not end_tokens(model, tokenizer):
        raise UserError(
            "Neither the tokenizer nor the model's generation settings have an EOS token, so no response could ever "
            "end. Set tokenizer.eos_token and save it, end responses at strings with stop, or set stop_at_eos to "
            "false for responses that are all max_new_tokens long."
        )


def _has_stop(tokenizer: Any, rows: Tensor, stop: tuple[str, ...]) -> Tensor:
    """Whether the text of each row has come to a stop string with its last token; only its end is looked at."""
    longest = max(len(word.encode()) for word in stop)
    texts = tokenizer.batch_decode(rows[:, -(longest + STOP_SLACK) :].tolist(), skip_special_tokens=True)
    return torch.tensor([any(word in text for word in stop) for text in texts], device=rows.device)


def _joined(passes: list[Responses]) -> Responses:
    """Put passes of different widths under each other: prompts padded further on the left, responses on the right."""
    starts = [int(each.response.any(0).nonzero()[0]) for each in passes]
    left, right = max(starts), max(each.tokens.shape[1] - start for each, start in zip(passes, starts, strict=True))

    def widened(tensor: Tensor, start: int) -> Tensor:
        pad = (left - start, right - (tensor.shape[1] - start))
        return torch.nn.functional.pad(tensor, pad)

    columns = [
        torch.cat([widened(each[index], start) for each, start in zip(passes, starts, strict=True)])
        for index in range(4)
    ]
    tokens, attention, response, log_probs = columns
    return Responses(tokens, attention, response, log_probs, torch.cat([each.ended for each in passes]))


# --- the batch --------------------------------------------------------------------------------------------------


def generate(
    policy: LanguagePolicy,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    reward: Reward,
    config: GenerationConfig,
    generator: torch.Generator,
    *,
    n_per_prompt: int = 1,
    reward_beta: float = 0.0,
    with_reference: bool = True,
) -> tuple[Batch, Answers]:
    """Sample responses, score them, and make the batch that learning takes `[B, T]`; row i answers prompt i // n.

    Step t observes the tokens up to t and acts by the token at t + 1; only the tokens of responses are
    experience. The score stands at the last token of its response, and `reward_beta` times the k1 estimate of
    the KL to the reference is subtracted at every token (Ziegler et al. 2019, eq. 2). A response without a
    score is masked as a whole.

    Args:
        policy: samples; its reference and critic score.
        tokenizer: makes text of token ids for the reward.
        rows: the prompts.
        reward: scores responses.
        config: how to sample.
        generator: draws the tokens.
        n_per_prompt: responses to each prompt; they form a group.
        reward_beta: weight of the KL in the reward.
        with_reference: False asks nothing of the reference (then `reward_beta` must be 0).

    Raises:
        UserError: if responses are to stop at EOS, and there is neither such a token nor a stop string.
    """
    check_ends(policy.actor, tokenizer, config)
    responses = sample(policy, tokenizer, [row.token_ids for row in rows], config, generator, n_per_prompt=n_per_prompt)
    asked = [row for row in rows for _ in range(n_per_prompt)]
    ends = end_tokens(policy.actor, tokenizer)
    texts = response_texts(tokenizer, responses, ends, config.stop)
    scores = _rewarded(reward, tokenizer, asked, texts, responses, ends)
    scored = _score_in_parts(policy, responses, with_reference=with_reference)
    log_probs = responses.log_probs if scored.log_probs is None else scored.log_probs
    batch = _assemble(responses, scored, log_probs, scores.values, config, reward_beta)
    group = torch.arange(len(rows), device=batch.mask.device).repeat_interleave(n_per_prompt)
    kl = None
    if scored.ref_log_probs is not None:
        kl = torch.where(responses.response, k1(log_probs, scored.ref_log_probs), 0.0).sum(1).tolist()
    return (
        Batch(**{**vars(batch), "group": group}),
        Answers(
            [row.prompt for row in asked],
            texts,
            scores.values,
            kl,
            responses.response.sum(1).tolist(),
            responses.ended.tolist(),
            scores.problems,
        ),
    )


def response_texts(tokenizer: Any, responses: Responses, ends: list[int], stop: tuple[str, ...]) -> list[str]:
    """The text of each response, without its end token, cut before a stop string."""
    ids = [
        [token for token, said in zip(tokens, mask, strict=True) if said and token not in ends]
        for tokens, mask in zip(responses.tokens.tolist(), responses.response.tolist(), strict=True)
    ]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for word in stop:
        texts = [text.split(word)[0] for text in texts]
    return texts


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; joined, they are the whole text, end token included.

    A character of several tokens comes with the last of them. A few tokens before each one are decoded with it, for
    spaces belong to what stands in front of them.
    """
    texts, first, told = [], 0, 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[first:told])
        text = tokenizer.decode(ids[first:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        first, told = told, end
    return texts


def scores_of(
    reward: Reward,
    policy: LanguagePolicy,
    tokenizer: Any,
    asked: Sequence[PromptRow],
    responses: Responses,
    config: GenerationConfig,
) -> Scores:
    """What a reward says of sampled responses; `asked` has the prompt of each."""
    ends = end_tokens(policy.actor, tokenizer)
    texts = response_texts(tokenizer, responses, ends, config.stop)
    return _rewarded(reward, tokenizer, asked, texts, responses, ends)


def _rewarded(
    reward: Reward, tokenizer: Any, asked: Sequence[PromptRow], texts: list[str], responses: Responses, ends: list[int]
) -> Scores:
    """Scores by the columns of the data; a reward that has `score_texts`, a model, is told how each response ended.

    It also gets the very token ids where it reads the same ones. A response ended by itself where its last token is
    one of `ends` and nothing was cut off before it.
    """
    if isinstance(reward, WeightedReward):
        return reward.summed([_rewarded(part, tokenizer, asked, texts, responses, ends) for part in reward.rewards])
    prompts = [row.prompt for row in asked]
    score_texts = getattr(reward, "score_texts", None)
    if score_texts is None:
        return reward(prompts, texts, columns_of(asked))
    of_prompts = responses.attention & ~responses.response
    sampled = [
        (tokens[prompt].tolist(), tokens[response].tolist())
        for tokens, prompt, response in zip(responses.tokens, of_prompts, responses.response, strict=True)
    ]
    ended = [
        over and ids[-1] in ends and tokenizer.decode(ids[:-1], skip_special_tokens=True) == text
        for over, (_, ids), text in zip(responses.ended.tolist(), sampled, texts, strict=True)
    ]
    same_tokens = reward.same_tokens(tokenizer)  # type: ignore[attr-defined]
    return score_texts(prompts, texts, ended, sampled if same_tokens else None)


def columns_of(asked: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """The other columns of the data, one value per response; None where a row has none."""
    names = sorted({name for row in asked for name in row.columns})
    return {name: [row.columns.get(name) for row in asked] for name in names}


def _score_in_parts(policy: LanguagePolicy, responses: Responses, *, with_reference: bool) -> Scored:
    """Score responses; their log-probabilities only where bfloat16 makes sampling and learning differ too much."""
    n_rows = max(1, TOKENS_AT_ONCE // responses.tokens.shape[1])
    parts = [
        policy.score(tokens, attention, response, with_reference=with_reference, with_policy=policy.autocast)
        for tokens, attention, response in zip(
            responses.tokens.split(n_rows),
            responses.attention.split(n_rows),
            responses.response.split(n_rows),
            strict=True,
        )
    ]
    joined = [None if parts[0][k] is None else torch.cat([part[k] for part in parts]) for k in range(3)]  # type: ignore[misc]
    return Scored(joined[0], joined[1], joined[2])


def _assemble(
    responses: Responses,
    scored: Scored,
    log_probs: Tensor,
    scores: list[float | None],
    config: GenerationConfig,
    reward_beta: float,
) -> Batch:
    """Shift by one: the action of step t is the token at t + 1, and so are its log-prob and reward."""
    device = responses.tokens.device
    mask = responses.response[:, 1:]
    steps = torch.arange(mask.shape[1], device=device)
    is_last = steps == torch.where(mask, steps, -1).max(1, keepdim=True).values
    kept = torch.tensor([score is not None for score in scores], device=device)
    final = torch.tensor([score or 0.0 for score in scores], device=device)
    final = final - config.missing_eos_penalty * (~responses.ended)
    over = torch.ones_like(kept)
    if config.truncation == "mask":
        kept = kept & responses.ended
    elif config.truncation == "bootstrap":
        over = responses.ended
    rewards = torch.where(is_last, final[:, None], 0.0)
    ref = scored.ref_log_probs
    if reward_beta:
        if ref is None:
            raise ValueError("a KL in the reward needs the reference")
        rewards = rewards - reward_beta * torch.where(mask, k1(log_probs[:, 1:], ref[:, 1:]), 0.0)
    return Batch(
        observations={"tokens": responses.tokens[:, :-1], "attention": responses.attention[:, :-1]},
        actions=responses.tokens[:, 1:],
        mask=mask & kept[:, None],
        rewards=rewards,
        log_probs=log_probs[:, 1:],
        values=None if scored.values is None else scored.values[:, :-1],
        next_values=None if scored.values is None else scored.values[:, 1:],
        terminated=is_last & over[:, None],
        done=is_last,
        ref_log_probs=None if ref is None else ref[:, 1:],
    )
