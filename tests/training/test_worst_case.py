"""The trial of the worst case: that it is the worst, changes nothing, and says what fits where it does not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proximo import cli
from proximo.collect.generate import GenerationConfig
from proximo.core.batch import minibatch_indices
from proximo.errors import UserError
from proximo.language import config_of, run_stage, stage_module
from proximo.models import cache
from proximo.models.language import LanguagePolicy
from proximo.stage_display import StageDisplay
from proximo.training import align, worst_case
from proximo.training.align_config import ALGORITHMS, AlignConfig
from proximo.training.worst_case import largest_that_fits, try_worst_case
from tests.tiny_language import save_tiny
from tests.training.aligning import everything_of, run_in, share_of_wanted, without_clocks

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

SECONDS = worst_case._seconds
QUIET = StageDisplay.choose(quiet=True)
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")


@pytest.fixture(autouse=True)
def a_fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this one is."""
    monkeypatch.setattr(worst_case, "_seconds", lambda probe, most, tokens: 0.0 * SECONDS(probe, most, tokens))


def tried(config: AlignConfig, state: align.AlignState) -> dict[str, str]:
    return try_worst_case("align", align, config, state)


# --- by hand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "size", "smallest", "expected", "attempts"),
    [
        (100, 64, 1, 64, [64]),
        (10, 64, 1, 8, [64, 32, 16, 8]),
        (20, 64, 20, 20, [64, 32, 20]),
        (0, 5, 1, 0, [5, 2, 1]),
        (0, 5, 20, 0, [5]),
    ],
)
def test_halving_by_hand(room: int, size: int, smallest: int, expected: int, attempts: list[int]) -> None:
    seen: list[int] = []

    def attempt(number: int) -> None:
        seen.append(number)
        if number > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert largest_that_fits(attempt, size, smallest) == expected
    assert seen == attempts


@pytest.mark.parametrize("error", [CPU, MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_all_ways_to_run_out_of_memory_count(error: Exception) -> None:
    def attempt(number: int) -> None:
        if number > 1:
            raise error

    assert largest_that_fits(attempt, 4) == 1


def test_another_error_is_not_taken_for_it() -> None:
    def attempt(number: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits(attempt, 4)


@pytest.mark.parametrize(
    ("budget", "most_rows", "expected"),
    [
        (None, None, [(8, 10)]),
        (40, None, [(4, 10)]),
        (39, None, [(3, 10), (4, 9)]),  # 36 tokens in place of 30
        (32, None, [(3, 10)]),  # 4 rows of 8 would be 32 tokens, hardly more than 30
        (19, None, [(1, 10), (2, 9)]),
        (5, None, [(1, 10)]),
        (40, 2, [(2, 10)]),
    ],
)
def test_the_worst_microbatches_by_hand(budget, most_rows, expected) -> None:
    ppo = dataclasses.replace(ALGORITHMS["ppo"], microbatch_tokens=budget, microbatch_size=most_rows)
    config = AlignConfig(algorithm=ppo)
    assert worst_case._shapes(config, 8, 10, budget or 80) == expected


@given(n=st.integers(1, 300), batch_size=st.integers(1, 300))
def test_the_largest_minibatch_is_the_largest(n: int, batch_size: int) -> None:
    sizes = [len(rows) for rows in minibatch_indices(n, batch_size, torch.Generator())]
    assert worst_case._largest_minibatch(n, batch_size) == max(sizes)


# --- it is the worst ----------------------------------------------------------------------------------------------


class Seen:
    """How many tokens pass through the model at a time, in learning, scoring and sampling."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = {"evaluate": 0, "score": 0, "next_logits": 0, "cache": 0}
        for name in ("evaluate", "score", "next_logits"):
            monkeypatch.setattr(LanguagePolicy, name, self._watched(name, getattr(LanguagePolicy, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watching(policy: Any, first: Any, *more: Any, **named: Any) -> Any:
            tokens = first.observations["tokens"] if name == "evaluate" else first
            found = real(policy, first, *more, **named)
            self.most[name] = max(self.most[name], tokens.numel())
            if name == "next_logits":
                self.most["cache"] = max(self.most["cache"], len(tokens) * more[2].get_seq_length())
            return found

        return watching

    def taken(self) -> dict[str, int]:
        taken, self.most = self.most, dict.fromkeys(self.most, 0)
        return taken


@pytest.mark.parametrize(
    "chosen",
    [
        dict(algorithm="ppo"),
        dict(algorithm="ppo", microbatch_tokens=17, sharing="trunk"),
        dict(algorithm="ppo", microbatch_size=3, microbatch_tokens=None, prompts_per_iteration=7),
        dict(algorithm="grpo", sharing="lora", generation_batch_size=5),
        dict(algorithm="grpo", responses_per_prompt=4, generation_batch_size=3, temperature=1.0),
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_no_iteration_is_larger_than_the_trial(config_with, tmp_path, monkeypatch, chosen) -> None:
    own = {name: chosen.pop(name) for name in ("generation_batch_size", "temperature") if name in chosen}
    no_end = GenerationConfig(max_new_tokens=5, stop_at_eos=False, **own)  # so that the worst case comes to be
    config = config_with(generation=no_end, n_iterations=2, debug=False, **chosen)
    state = align.start(config, share_of_wanted)
    seen = Seen(monkeypatch)
    tried(config, state)
    trial = seen.taken()
    list(align.iterate(config, run_in(tmp_path / "run"), state))
    run = seen.taken()
    assert all(0 < run[name] <= trial[name] for name in run), (run, trial)
    assert trial["cache"] <= 1.5 * run["cache"]  # and not much worse
    assert trial["evaluate"] <= 2 * run["evaluate"]


# --- it changes nothing -------------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    dict(algorithm="ppo", value_pretraining_iterations=1),
    dict(algorithm="ppo", sharing="lora", kl_in="loss_k2", gradient_checkpointing=True),
    dict(algorithm="ppo", sharing="trunk", beta=0.0, microbatch_tokens=17),
    dict(algorithm="grpo", kl_in="loss_k3", gradient_checkpointing=True),
]


@pytest.mark.parametrize("chosen", CASES, ids=lambda chosen: "-".join(map(str, chosen.values())))
def test_a_run_with_and_without_it_is_the_same_bit_for_bit(config_with, tmp_path, chosen) -> None:
    config = config_with(n_iterations=2, n_samples=1, samples_every=1, **chosen)
    found = []
    for trial in (False, True):
        state = align.start(config, share_of_wanted)
        before, drawn = {k: v.clone() for k, v in everything_of(state).items()}, torch.get_rng_state()
        if trial:
            assert tried(config, state)["worst case"].startswith("it fits: learning from")
            assert torch.equal(torch.get_rng_state(), drawn)
            after = everything_of(state)
            assert [name for name in before if not torch.equal(before[name], after[name])] == []
            assert not state.optimizer.gradient.any()
        rows = list(align.iterate(config, run_in(tmp_path / f"run{trial}"), state))
        found.append((without_clocks(rows), everything_of(state)))
    (rows, whole), (others, other) = found
    assert rows == others
    assert [name for name in whole if not torch.equal(whole[name], other[name])] == []


TEXTS = [{"prompt": "the cat", "completion": "sleeps . " * k} for k in range(1, 9)]
PAIRS = [
    {"prompt": f"the {w}", "chosen": "sleeps .", "rejected": "eats red . " * 3} for w in ("cat", "dog", "sun", "bird")
]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Data for every stage but align."""
    found = {}
    for stage, rows in (("sft", TEXTS), ("reward", PAIRS), ("dpo", PAIRS)):
        path = tmp_path / f"{stage}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        found[stage] = str(path)
    return found


def stage_config(stage: str, data: dict[str, str], model: Path, **more: Any) -> Any:
    settings = dict(model=str(model), data=data[stage], batch_size=4, hold_out=0.0, threads=1, n_epochs=2) | more
    return config_of(stage, settings, where="test")


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("sft", dict(lora=True)),
        ("sft", dict(packing=True, max_length=24, gradient_checkpointing=True)),
        ("reward", {}),
        ("dpo", dict(microbatch_tokens=30)),
    ],
)
def test_the_other_stages_are_the_same_bit_for_bit_too(data, model, tmp_path, monkeypatch, stage, more) -> None:
    config, module, found = stage_config(stage, data, model, **more), stage_module(stage), []
    for trial in (False, True):
        state = module.start(config)
        if trial:
            drawn = torch.get_rng_state()
            assert "it fits" in try_worst_case(stage, module, config, state)["worst case"]
            assert torch.equal(torch.get_rng_state(), drawn)
        rows = list(module.iterate(config, run_in(tmp_path / f"run{trial}"), state))
        found.append((without_clocks(rows), state.optimizer.weights.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


# --- it does not fit ----------------------------------------------------------------------------------------------


def with_room_for(monkeypatch: pytest.MonkeyPatch, error: Exception = CPU, **room: int) -> None:
    """Let methods of the policy run out of memory above so many tokens at a time."""
    for name, most in room.items():
        real = getattr(LanguagePolicy, name)

        def limited(policy: Any, first: Any, *more: Any, real: Any = real, most: int = most, **named: Any) -> Any:
            tokens = first if isinstance(first, torch.Tensor) else first.observations["tokens"]
            if tokens.numel() > most:
                raise error
            return real(policy, first, *more, **named)

        monkeypatch.setattr(LanguagePolicy, name, limited)


def test_what_does_not_fit_is_told_at_once_with_what_does(config_with, tmp_path, monkeypatch) -> None:
    config = config_with(n_iterations=1, batch_size=8, debug=False)  # 8 rows of 3 + 5 tokens
    with_room_for(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), evaluate=20, next_logits=12)
    with pytest.raises(UserError) as caught:
        run_stage("align", config, QUIET, tmp_path / "run", share_of_wanted)
    said = str(caught.value)
    assert "Nothing was trained" in said
    assert "- learning from 56 tokens at once, in rows of up to 7: set microbatch_tokens to 14" in said
    assert "- sampling 8 responses side by side, 8 tokens each with the prompt: set generation_batch_size to 4" in said
    assert "scoring" not in said
    assert not (tmp_path / "run").exists()
    ppo = dataclasses.replace(config.algorithm, microbatch_tokens=14)
    fits = dataclasses.replace(config, algorithm=ppo)
    fits = dataclasses.replace(fits, generation=dataclasses.replace(config.generation, generation_batch_size=4))
    assert run_stage("align", fits, QUIET, tmp_path / "run", share_of_wanted).metrics["iteration"] == 1


def test_where_not_even_one_row_fits_other_ways_are_told(config_with, tmp_path, monkeypatch) -> None:
    config = config_with(n_iterations=1)
    with_room_for(monkeypatch, MemoryError(), evaluate=5, score=20)
    with pytest.raises(UserError, match=r"rows of up to 7: no setting of it.*\n- scoring 8 resp.*\n.*sharing lora"):
        run_stage("align", config, QUIET, tmp_path / "run", share_of_wanted)


def test_gradients_of_a_trial_that_failed_half_way_are_thrown_away(config_with, monkeypatch) -> None:
    config = config_with(n_iterations=1)
    state = align.start(config, share_of_wanted)
    with_room_for(monkeypatch, score=20)  # after gradients were made
    with pytest.raises(UserError):
        tried(config, state)
    assert not state.optimizer.gradient.any()


def test_other_errors_pass_through_and_rewards_are_closed(config_with, tmp_path, monkeypatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr("proximo.collect.rewards.CallableReward.close", lambda reward: closed.append(1))
    with_room_for(monkeypatch, RuntimeError("a bug"), evaluate=20)
    with pytest.raises(RuntimeError, match="a bug"):
        run_stage("align", config_with(batch_size=8), QUIET, tmp_path / "run", share_of_wanted)
    assert closed == [1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "most"), [("sft", 30), ("reward", 40), ("dpo", 40)])
def test_the_other_stages_tell_it_too(data, model, tmp_path, monkeypatch, stage, most, capsys) -> None:
    from transformers import LlamaModel

    real = LlamaModel.forward

    def limited(trunk: Any, input_ids: Any = None, **named: Any) -> Any:
        if torch.is_grad_enabled() and input_ids.numel() > most:
            raise CPU
        return real(trunk, input_ids=input_ids, **named)

    monkeypatch.setattr(LlamaModel, "forward", limited)
    words = ["--model", str(model), "--data", data[stage], "--batch-size", "4", "--hold-out", "0", "--threads", "1"]
    words += ["--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as caught:
        cli.main([stage, *words])
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    setting = error.partition("set microbatch_tokens to ")[2].split()[0]
    with pytest.raises(SystemExit) as caught:
        cli.main([stage, *words, "--microbatch-tokens", setting])
    assert caught.value.code in (0, None), capsys.readouterr().err


# --- when it is left out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "n_iterations", "is_tried"),
    [(0.9, 1, True), (2.0, 10, False), (2.0, 100, True), (59.0, 9999, True), (61.0, 9999, False)],
)
def test_it_is_left_out_where_it_would_cost_too_much(config_with, monkeypatch, seconds, n_iterations, is_tried) -> None:
    config = config_with(n_iterations=n_iterations)
    state = align.start(config, share_of_wanted)
    monkeypatch.setattr(worst_case, "_seconds", lambda probe, most, tokens: seconds)
    said = tried(config, state)["worst case"]
    assert ("it fits" in said) == is_tried
    assert ("not tried: that would take about" in said) != is_tried


@pytest.mark.parametrize(
    ("fixed", "per_token", "expected", "sizes"),
    [
        (0.2, 0.0, 0.8, [64, 128]),  # all overhead: 1.6 s by the first step
        (0.0, 0.1, 51.2, [64]),
        (0.0, 0.0001, 0.0512, [64]),
        (0.5, 0.01, 9.1, [64]),  # half of it overhead, and more than a second
    ],
)
def test_the_estimate_by_hand(monkeypatch, fixed, per_token, expected, sizes) -> None:
    now, seen = [0.0], []
    monkeypatch.setattr(worst_case.time, "perf_counter", lambda: now[0])

    def probe(size: int) -> int:
        seen.append(size)
        now[0] += fixed + per_token * size
        return size

    assert SECONDS(probe, 512, 512) == pytest.approx(expected, rel=0.01)
    assert seen == sizes
    assert SECONDS(lambda size: torch.empty(2**62).numel(), 512, 512) == 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_as_long_as_the_context_can_be_tried(config_with, tmp_path, kind) -> None:
    model = save_tiny(tmp_path / "model", kind, context=8)
    config = config_with(model=str(model), n_iterations=1)
    assert "it fits" in tried(config, align.start(config, share_of_wanted))["worst case"]


def test_a_model_with_a_cache_of_its_own_kind_can_be_tried(config_with, monkeypatch) -> None:
    monkeypatch.setattr(cache, "has_full_attention", lambda model: False)
    config = config_with("grpo", n_iterations=1)
    assert "it fits" in tried(config, align.start(config, share_of_wanted))["worst case"]
