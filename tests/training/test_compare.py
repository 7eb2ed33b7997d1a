"""Two models on the same prompts: win rates and best-of-n by hand, by recorded scores, and by a judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proximo.collect.data import PromptRow
from proximo.collect.generate import GenerationConfig
from proximo.collect.judge import JudgeReward
from proximo.collect.rewards import CallableReward
from proximo.errors import UserError
from proximo.models.folders import load_tokenizer
from proximo.training.compare import NoReward, answers_of, compare, compared_scores, load_for_sampling, win_rate_of
from tests.chat_endpoint import Endpoint, longer_is_better
from tests.tiny_language import SPECIAL, WORDS, save_tiny, tiny_model, tiny_tokenizer

N_PROMPTS = 12
GENERATION = GenerationConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_tiny(folder / "a", seed=0)), str(save_tiny(folder / "b", seed=1))


@pytest.fixture
def rows() -> list[PromptRow]:
    return [PromptRow(f"the {WORDS[k]}", [7, 7 + k], {}) for k in range(N_PROMPTS)]


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], JudgeReward]]:
    """A judge behind an endpoint that replies as it is told."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    endpoint = Endpoint()
    (tmp_path / "rubric.txt").write_text("Length counts.")
    opened = []

    def opening(reply: Any) -> JudgeReward:
        endpoint.reply = reply
        opened.append(JudgeReward(endpoint.url, "judge-1", tmp_path / "rubric.txt", mode="pair", api_key_variable=None))
        return opened[-1]

    yield opening
    for one in opened:
        one.close()
    endpoint.close()


def length(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(text)) for text in responses]


class TestByHand:
    def test_wins_ties_losses_and_what_is_missing(self):
        ours = [1.0, 2.0, 3.0, None, 5.0]
        theirs = [[0.0, 4.0], [2.0, 2.0], [4.0, None], [1.0, 1.0], [None, 7.0]]
        found = compared_scores(ours, theirs, [])
        # A win, a tie and a loss: mean 1/2, variance 1/6 over three. Means over the three pairs; best of all groups.
        assert found == {
            "reward_mean": pytest.approx(2.0),
            "reward_mean_against": pytest.approx(2.0),
            "win_rate": pytest.approx(0.5),
            "win_rate_standard_error": pytest.approx((1 / 18) ** 0.5),
            "missing": 2,
            "best_of_reward_mean": pytest.approx((4 + 2 + 4 + 1 + 7) / 5),
        }

    def test_zero_is_a_score(self):
        found = compared_scores([0.0, 0.0], [[0.0], [-1.0]], [])
        assert (found["win_rate"], found["missing"], found["best_of_reward_mean"]) == (0.75, 0, -0.5)

    def test_shares_of_a_judge(self):
        rate = win_rate_of([1.0, None, 1.0, 0.5, 0.0], [], "verdict")
        # 2.5 of 4; variance (2 * 0.375^2 + 0.125^2 + 0.625^2) / 4 = 0.171875
        assert rate == (0.625, pytest.approx((0.171875 / 4) ** 0.5), 1)

    def test_nothing_known_is_told_with_the_reasons(self):
        with pytest.raises(UserError, match=r"^No prompt got a score for both models\. too late; no idea$"):
            compared_scores([1.0, None], [[None, 3.0], [1.0, 1.0]], ["too late", "no idea"])


class TestModels:
    def test_numbers_are_those_of_the_recorded_scores(self, models, rows):
        asked: list[tuple[list[Any], list[float]]] = []

        def recorded(prompts: list[Any], responses: list[str]) -> list[float]:
            asked.append((list(prompts), length(prompts, responses)))
            return asked[-1][1]

        found = compare(*models, load_tokenizer(models[0]), rows, CallableReward(recorded), GENERATION, best_of=3)
        (_, ours), (prompts, theirs) = asked
        assert prompts == [row.prompt for row in rows for _ in range(3)]
        groups = [theirs[k : k + 3] for k in range(0, len(theirs), 3)]
        wins = sum((a > group[0]) + (a == group[0]) / 2 for a, group in zip(ours, groups, strict=True))
        assert found["win_rate"] == pytest.approx(wins / N_PROMPTS)
        assert found["reward_mean"] == pytest.approx(sum(ours) / N_PROMPTS)
        assert found["reward_mean_against"] == pytest.approx(sum(group[0] for group in groups) / N_PROMPTS)
        assert found["best_of_reward_mean"] == pytest.approx(sum(map(max, groups)) / N_PROMPTS)
        assert found["best_of_reward_mean"] > found["reward_mean_against"]
        assert found["kl_to_against"] > 0.1
        assert found["judge_win_rate"] is found["judge_missing"] is None

    def test_a_model_is_no_distance_from_itself(self, models, rows):
        a = models[0]
        found = compare(a, a, load_tokenizer(a), rows, CallableReward(length), GENERATION, best_of=1)
        assert found["kl_to_against"] == pytest.approx(0.0, abs=1e-4)
        assert found["best_of_reward_mean"] == found["reward_mean_against"]

    def test_the_seed_decides(self, models, rows):
        def once(seed: int) -> dict[str, Any]:
            tokenizer = load_tokenizer(models[0])
            return compare(*models, tokenizer, rows, CallableReward(length), GENERATION, seed=seed) | {"seed": None}

        assert once(3) == once(3) != once(4)

    def test_a_model_that_does_not_know_the_prompts_tokens_is_told(self, models, rows):
        rows[3] = rows[3]._replace(token_ids=[7, len(SPECIAL + WORDS)])
        with pytest.raises(UserError, match="the model knows only"):
            compare(*models, load_tokenizer(models[0]), rows, CallableReward(length), GENERATION)

    def test_a_model_with_another_tokenizer_is_refused(self, tmp_path, models, rows):
        place = save_tiny(tmp_path / "other", seed=1)
        other = tiny_tokenizer()
        vocabulary = other.get_vocab()
        file = place / "tokenizer.json"
        read = json.loads(file.read_text())
        first, second = WORDS[:2]  # as many tokens, two of them exchanged
        read["model"]["vocab"] |= {first: vocabulary[second], second: vocabulary[first]}
        file.write_text(json.dumps(read))
        for pair in ((models[0], str(place)), (str(place), models[0])):
            with pytest.raises(UserError, match="another tokenizer than"):
                compare(*pair, load_tokenizer(pair[0]), rows, CallableReward(length), GENERATION)

    def test_without_an_end_token_answers_are_as_long_as_they_may_be(self, tmp_path, models, rows):
        model = tiny_model()
        model.generation_config.eos_token_id = None
        model.save_pretrained(tmp_path / "endless")
        tokenizer = load_tokenizer(models[0])
        tokenizer.eos_token = None
        policy = load_for_sampling(str(tmp_path / "endless"), temperature=1.0)
        answers = answers_of(policy, tokenizer, rows, NoReward(), GENERATION, n_per_prompt=2, seed=0)
        assert answers.n_tokens == [8] * 2 * N_PROMPTS


class TestJudge:
    def test_which_finds_longer_better_agrees_with_lengths(self, models, rows, judge):
        tokenizer = load_tokenizer(models[0])
        source = CallableReward(length)
        found = compare(*models, tokenizer, rows, source, GENERATION, judge=judge(longer_is_better))
        assert 0 < found["judge_win_rate"] < 1
        assert found["judge_win_rate"] == pytest.approx(found["win_rate"])
        assert found["judge_win_rate_standard_error"] == pytest.approx(found["win_rate_standard_error"])

    def test_which_likes_the_first_place_likes_neither(self, models, rows, judge):
        tokenizer = load_tokenizer(models[0])
        found = compare(*models, tokenizer, rows, None, GENERATION, judge=judge(lambda message: '{"better": "A"}'))
        assert (found["judge_win_rate"], found["judge_win_rate_standard_error"]) == (0.5, 0.0)
        assert found["win_rate"] is found["best_of_reward_mean"] is found["missing"] is None

    def test_missing_verdicts_are_left_out_and_all_of_them_are_told(self, models, rows, judge):
        tokenizer = load_tokenizer(models[0])

        def shy(message: str) -> str:
            return "hm" if f"the {WORDS[2]}\n" in message else json.dumps({"better": "tie"})

        found = compare(*models, tokenizer, rows, None, GENERATION, judge=judge(shy))
        assert (found["judge_win_rate"], found["judge_missing"]) == (0.5, 1)
        with pytest.raises(UserError, match=r"No prompt got a verdict of the judge\. response 0: .* no JSON object"):
            compare(*models, tokenizer, rows, None, GENERATION, judge=judge(lambda message: "hm"))
