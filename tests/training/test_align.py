"""The alignment loop: it learns, resumes bit for bit, and keeps its reference."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proximo.collect.generate import GenerationConfig
from proximo.errors import UserError
from proximo.models.adapters import LoraConfig
from proximo.models.folders import load_causal_lm
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training.align import (
    AlignState,
    _keep_samples,
    finish,
    iterate,
    next_prompts,
    restore,
    start,
)
from tests.tiny_language import save_tiny, tiny_model, tiny_tokenizer
from tests.training.aligning import (
    GENERATION,
    everything_of,
    lengths,
    off_the_reference,
    run_in,
    share_of_wanted,
    trained,
    without_clocks,
)

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- resuming -----------------------------------------------------------------------------------------------------

RESUMED: list[dict[str, Any]] = [
    dict(algorithm="ppo", value_pretraining_iterations=1),
    dict(algorithm="ppo", sharing="lora", n_samples=2, samples_every=1),
    dict(algorithm="ppo", sharing="trunk", beta_control="adaptive", beta_target=0.01, beta_horizon=50.0),
    dict(algorithm="grpo", kl_in="loss_k3", learning_rate_schedule="linear"),
    dict(algorithm="rloo", sharing="lora", beta_control="adaptive", beta_horizon=50.0, kl_in="loss_k2"),
]


@pytest.mark.parametrize("chosen", RESUMED, ids=lambda chosen: f"{chosen['algorithm']}-{chosen.get('sharing')}")
def test_two_and_two_iterations_are_four_bit_for_bit(config_with, tmp_path, chosen):
    config = config_with(checkpoint_every=2, **chosen)
    whole, rows = trained(config, tmp_path / "whole")
    run = run_in(tmp_path / "broken")
    first = list(itertools.islice(iterate(config, run, start(config, share_of_wanted)), 3))  # the third is lost
    state = restore(config, newest_checkpoint(run.checkpoints), share_of_wanted)
    assert state.iteration == 2
    resumed = list(iterate(config, run, state))
    assert without_clocks([*first[:2], *resumed]) == without_clocks(rows)
    assert state.beta == whole.beta
    one, other = everything_of(whole), everything_of(state)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    if config.n_samples:
        lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "broken")]
        assert lines[0] == lines[1]


def test_a_resumed_run_insists_on_its_model_and_its_shapes(config_with, tmp_path, model):
    config = config_with(sharing="lora", n_iterations=1)
    _, _ = trained(config, tmp_path / "run")
    checkpoint = newest_checkpoint(RunDirectory(tmp_path / "run").checkpoints)
    with pytest.raises(UserError, match="not the model that this run began with"):
        restore(
            dataclasses.replace(config, model=str(save_tiny(tmp_path / "other", seed=9))), checkpoint, share_of_wanted
        )
    with pytest.raises(UserError, match="lora_rank"):
        restore(dataclasses.replace(config, lora=LoraConfig(lora_rank=3)), checkpoint, share_of_wanted)
    assert restore(config, checkpoint, share_of_wanted).iteration == 1


def test_a_resumed_run_insists_on_its_prompts(config_with, tmp_path, prompts):
    config = config_with(n_iterations=1)
    trained(config, tmp_path / "run")
    checkpoint = newest_checkpoint(RunDirectory(tmp_path / "run").checkpoints)
    lines = prompts.read_text().splitlines()
    other = tmp_path / "prompts.jsonl"
    for changed in ([*lines[1:], lines[0]], lines[:-1], [*lines[:-1], '{"prompt": "bird"}']):
        other.write_text("\n".join(changed))
        with pytest.raises(UserError, match="does not hold the prompts that this run began with"):
            restore(dataclasses.replace(config, prompts=str(other)), checkpoint, share_of_wanted)
    other.write_text("\n".join(lines))  # the same ones in another place
    assert restore(dataclasses.replace(config, prompts=str(other)), checkpoint, share_of_wanted).iteration == 1


def test_a_reference_with_two_weights_exchanged_is_another(config_with, tmp_path, model):
    config = config_with(n_iterations=1)
    trained(config, tmp_path / "run")
    checkpoint = newest_checkpoint(RunDirectory(tmp_path / "run").checkpoints)
    other = tiny_model()
    with torch.no_grad():  # far below what a sum in float64 would notice
        other.model.layers[0].input_layernorm.weight[3] += torch.finfo(torch.float32).eps
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="its weights differ"):
        restore(dataclasses.replace(config, model=str(tmp_path / "other")), checkpoint, share_of_wanted)


def test_samples_are_replaced_whole_and_broken_lines_left_out(config_with, tmp_path, monkeypatch, capfd):
    config = config_with(n_samples=2, samples_every=1, n_iterations=2)
    state, run = start(config, share_of_wanted), run_in(tmp_path / "run")
    rows = iterate(config, run, state)
    next(rows)
    file = run.path / "samples.jsonl"
    known = file.read_bytes()
    file.write_bytes(known + b'{"iteration": 1, "prompt": "\xff\n{"iteration"')
    next(rows)
    assert file.read_bytes().startswith(known)
    assert [json.loads(line)["iteration"] for line in file.read_text().splitlines()] == [1, 1, 2, 2]
    whole = file.read_bytes()

    def crash(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("proximo.runs.files.write_synced", crash)
    _keep_samples(file, state)
    assert file.read_bytes() == whole
    assert "samples of iteration 2 could not be written: no space" in capfd.readouterr().err


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 7), counts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 5))
def test_every_pass_has_every_prompt_however_many_an_iteration_takes(n, counts, seed):
    used, taken = 0, []
    for count in counts:
        taken += next_prompts(n, used, count, seed)
        used += count
    assert taken == next_prompts(n, 0, used, seed)
    passes = [taken[first : first + n] for first in range(0, used - n + 1, n)]
    assert all(sorted(one) == list(range(n)) for one in passes)


def test_passes_and_seeds_differ_in_their_order():
    orders = [tuple(next_prompts(8, first, 8, seed)) for first in (0, 8, 16) for seed in (0, 1)]
    assert len(set(orders)) == 6


# --- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["separate", "trunk", "lora"])
def test_the_reference_never_moves_and_all_else_does(config_with, tmp_path, sharing):
    config = config_with(sharing=sharing, n_iterations=2)
    state = start(config, share_of_wanted)

    def frozen() -> dict[str, torch.Tensor]:
        return {k: p.detach().clone() for k, p in state.policy.reference.named_parameters() if "lora_" not in k}

    before = frozen()
    plain = dict(tiny_model().named_parameters())
    assert all(torch.equal(before[name], plain[name.replace(".base_layer", "")]) for name in before)
    learning = {name: p.detach().clone() for name, p in state.policy.named_parameters() if p.requires_grad}
    list(iterate(config, run_in(tmp_path / "run"), state))
    after = frozen()
    assert all(torch.equal(after[name], before[name]) for name in before)
    now = dict(state.policy.named_parameters())
    stuck = [name for name, value in learning.items() if torch.equal(now[name], value)]
    assert stuck == []
    assert all(p.grad is None for name, p in state.policy.reference.named_parameters() if "lora_" not in name)


def test_beta_zero_holds_no_reference(config_with, tmp_path):
    state, rows = trained(config_with(beta=0.0, n_iterations=1), tmp_path / "run")
    assert state.policy.reference is None
    assert rows[0]["kl_to_reference"] is None


def test_at_the_beginning_the_policy_is_the_reference(config_with, tmp_path):
    for sharing in ("separate", "lora"):
        _, rows = trained(config_with(sharing=sharing, n_iterations=1), tmp_path / sharing)
        assert rows[0]["kl_to_reference"] == pytest.approx(0.0, abs=1e-4)


def distance(state: AlignState) -> float:
    """The exact KL to the reference of the first word of an answer, mean over the prompts."""
    found = []
    for row in state.prompts:
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            own, ref = (model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in both(state))
        found.append(float((own.exp() * (own - ref)).sum()))
    return sum(found) / len(found)


def both(state: AlignState) -> tuple[Any, Any]:
    return state.policy.actor, state.policy.reference


KL_RUNS = [
    *itertools.product(["ppo", "grpo"], ["reward", "loss_k2", "loss_k3"]),
    ("dr_grpo", "reward"),
]


@pytest.mark.parametrize(("algorithm", "kl_in"), KL_RUNS)
def test_without_a_reward_the_policy_comes_back_to_the_reference(config_with, tmp_path, algorithm, kl_in):
    rollout = dict(prompts_per_iteration=64) if algorithm == "ppo" else dict(prompts_per_iteration=16)
    rollout |= dict(responses_per_prompt=64 // rollout["prompts_per_iteration"], batch_size=16)
    two = GenerationConfig(max_new_tokens=2)
    config = config_with(
        algorithm, kl_in=kl_in, beta=1.0, n_iterations=5, learning_rate=5e-3, generation=two, **rollout
    )
    state = start(config, lambda prompts, responses: [0.0] * len(responses))
    off_the_reference(state)
    before = distance(state)
    list(iterate(config, run_in(tmp_path / "run"), state))
    assert before > 0.3
    assert distance(state) < 0.65 * before


@pytest.mark.parametrize(("target", "factor"), [(1e-6, 1.2), (1e6, 0.8)])
def test_adaptive_beta_moves_towards_its_target(config_with, tmp_path, target, factor):
    control = dict(beta_control="adaptive", beta_target=target, beta_horizon=8.0)
    config = config_with(n_iterations=3, **control)
    state = start(config, lengths)
    off_the_reference(state)
    rows = list(iterate(config, run_in(tmp_path / "run"), state))
    # as many responses as the horizon: by the whole fifth each iteration, from the one after
    assert [row["beta"] for row in rows] == pytest.approx([0.05, 0.05 * factor])
    assert state.beta == pytest.approx(0.05 * factor**2)


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen",
    [
        dict(algorithm="ppo", prompts_per_iteration=32, n_epochs=4),
        dict(
            algorithm="ppo", prompts_per_iteration=32, n_epochs=4, sharing="lora", learning_rate=3e-2, n_iterations=14
        ),
        dict(algorithm="grpo", prompts_per_iteration=8, responses_per_prompt=4, n_iterations=12),
    ],
    ids=["ppo", "ppo lora", "grpo"],
)
def test_wanted_words_become_common(config_with, tmp_path, chosen):
    settings = dict(n_iterations=9, batch_size=8, beta=0.01, generation=GenerationConfig(max_new_tokens=3))
    _, rows = trained(config_with(**(settings | chosen)), tmp_path / "run", share_of_wanted)
    assert rows[0]["reward_mean"] < 0.25
    assert sum(row["reward_mean"] for row in rows[-2:]) / 2 > max(0.35, 2 * rows[0]["reward_mean"])


@pytest.mark.parametrize(("algorithm", "n_prompts", "n_each"), [("ppo", 32, 1), ("grpo", 12, 4)])
def test_minus_length_makes_answers_short(config_with, tmp_path, algorithm, n_prompts, n_each):
    rollout = dict(prompts_per_iteration=n_prompts, responses_per_prompt=n_each, batch_size=8)
    config = config_with(algorithm, n_iterations=13, beta=0.01, **rollout)
    _, rows = trained(config, tmp_path / "run", lambda prompts, responses: [-len(text.split()) for text in responses])
    assert rows[0]["response_length_mean"] > 4
    assert rows[-1]["response_length_mean"] < 2
    assert rows[-1]["eos_fraction"] > 0.9


@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_the_critic_learns_alone_at_first(config_with, tmp_path, sharing):
    config = config_with(sharing=sharing, value_pretraining_iterations=2, n_iterations=3, beta=0.1, kl_in="loss_k3")
    state = start(config, share_of_wanted)

    def actor() -> list[torch.Tensor]:
        return [p.detach().clone() for name, p in state.policy.actor.named_parameters() if ".value." not in name]

    seen = [actor()]
    for _ in iterate(config, run_in(tmp_path / "run"), state):
        seen.append(actor())
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(seen)]
    assert moved == [False, False, True]


@pytest.mark.parametrize("settings", [{}, dict(algorithm="grpo"), dict(sharing="lora")], ids=str)
def test_samples_say_of_each_token_how_far_it_is_from_the_reference(config_with, tmp_path, settings):
    config = config_with(n_samples=2, samples_every=1, n_iterations=2, **settings)
    trained(config, tmp_path / "run")
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert len(sample["tokens"]) == len(sample["log_ratios"]) > 0
        assert sum(sample["log_ratios"]) == pytest.approx(sample["kl"], abs=1e-3)
        said = "".join(sample["tokens"]).replace("<eos>", "").split()
        assert [word for word in said if not word.startswith("<")] == sample["response"].split()
    assert any(ratio != 0 for ratio in sample["log_ratios"])  # the last look is of a policy that has moved


def test_samples_without_a_score_or_a_reference(config_with, tmp_path):
    def silent_now_and_then(prompts, responses):
        return [None if k % 2 else float(len(text)) for k, text in enumerate(responses)]

    config = config_with(n_samples=2, samples_every=1, n_iterations=1, max_missing_rewards=1.0)
    trained(config, tmp_path / "silent", silent_now_and_then)
    samples = [json.loads(line) for line in (tmp_path / "silent" / "samples.jsonl").read_text().splitlines()]
    assert [sample["score"] is None for sample in samples] == [False, True]
    assert all(len(sample["tokens"]) == len(sample["log_ratios"]) > 0 for sample in samples)
    trained(config_with(n_samples=2, samples_every=1, n_iterations=1, beta=0.0), tmp_path / "free")
    assert "tokens" not in (tmp_path / "free" / "samples.jsonl").read_text()


def test_looking_at_samples_changes_nothing(config_with, tmp_path):
    one, rows = trained(config_with(n_iterations=2), tmp_path / "one")
    other, seen = trained(config_with(n_iterations=2, n_samples=3, samples_every=1), tmp_path / "other")
    assert without_clocks(rows) == without_clocks(seen)
    assert torch.equal(one.optimizer.weights, other.optimizer.weights)
    lines = [json.loads(line) for line in (tmp_path / "other" / "samples.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert lines[0]["score"] == share_of_wanted([], [lines[0]["response"]])[0]
    assert [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_the_result_is_a_plain_model_folder_with_the_policys_logits(config_with, tmp_path, sharing):
    config = config_with(sharing=sharing, n_iterations=2, learning_rate=5e-2)
    state, _ = trained(config, tmp_path / "run")
    finish(config, RunDirectory(tmp_path / "run"), state)
    tokens = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        logits = load_causal_lm(tmp_path / "run")(input_ids=tokens).logits[:, -1] / GENERATION.temperature
        expected = state.policy.next_logits(tokens, None, torch.arange(4)[None], None)
        before = tiny_model()(input_ids=tokens).logits[:, -1] / GENERATION.temperature
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5)
    assert (logits - before).abs().max() > 1e-2


def test_the_share_of_groups_whose_responses_score_alike_is_told(config_with, tmp_path):
    def score(prompts, responses):
        first = prompts[0]
        return [0.5 if prompt == first else float(number) for number, prompt in enumerate(prompts)]

    config = config_with("grpo", prompts_per_iteration=4, responses_per_prompt=2, n_iterations=1)
    _, rows = trained(config, tmp_path / "grpo", score)
    assert rows[0]["groups_alike"] == 0.25
    _, rows = trained(config_with(n_iterations=1), tmp_path / "ppo", lengths)
    assert "groups_alike" not in rows[0]


def test_the_policy_begins_with_fresh_moments_after_the_critic_has_learned_alone(config_with, tmp_path):
    config = config_with(value_pretraining_iterations=2, n_iterations=3, batch_size=8, n_epochs=1)
    state = start(config, share_of_wanted)
    steps = []
    for _ in iterate(config, run_in(tmp_path / "run"), state):
        steps.append(state.optimizer.n_steps)
    assert steps == [1, 2, 1]
