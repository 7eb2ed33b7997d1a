"""The story world: what it writes, how it judges, and how much noise its labels have."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import pytest

from proximo.demo import stories
from proximo.demo.stories import (
    HELD_OUT_NAMES,
    TRAIN_NAMES,
    Story,
    generate_stories,
    gold_score,
    is_held_out,
    label_preferences,
    noise_ceiling,
    prompts,
)
from proximo.errors import UserError

PROMPT = "mia went to the garden to find her red ball ."
HAPPY = "a kind dog brought the ball to her . mia laughed and felt proud . then she ran home to her mother and smiled ."
PLAIN = "a tall dog brought the ball to her . mia waited and felt calm . then she ran home to her mother and rested ."
SAD = "a rude dog brought the ball to her . mia cried and felt angry . then she ran home to her mother and sobbed ."
DRIFTED = "a tall dog brought the kite to her . tom waited and felt calm . then he ran home to his mother and rested ."


@pytest.fixture(scope="module")
def corpus() -> list[Story]:
    return generate_stories(5000, seed=1)


@pytest.fixture(scope="module")
def scores(corpus) -> list[float]:
    return [gold_score(story.prompt, story.response) for story in corpus]


def combination(prompt: str) -> tuple[str, str, str]:
    """The hero, the object and the place of a prompt, read off its words."""
    words = prompt.split()
    kinds = (TRAIN_NAMES + HELD_OUT_NAMES, stories.OBJECTS, stories.PLACES)
    name, thing, place = (next(word for word in words if word in kind) for kind in kinds)
    return name, thing, place


def test_the_number_of_stories_is_the_one_worked_out_by_hand(corpus):
    prompt = 20 * 14 * 12 * 20  # names, places, looks, objects; two of the six openings have one of 4 times as well
    openings = 4 * prompt + 2 * 4 * prompt
    who, thing, where, time = 2, 4, 4 * 10, 4
    events = 3 * who * thing * where + who * thing * time + 12 * 10 * 6 * thing + 12 * 10 * thing + 12 * time
    endings = who * thing * 15 + who * 7 * 12 + who * 7 * 12 * time + who * 12 * 7 + who * 15
    assert stories.n_stories() == openings * events * endings > 1_000_000
    # Drawn from one million equally likely stories, 5000 would be all different once in 270,000 times, and less
    # often if some were likelier than others.
    assert len(set(corpus)) == 5000


def test_a_story_is_one_sentence_and_then_two_to_four_of_known_words(corpus):
    known = set(stories.vocabulary())
    assert 200 <= len(known) <= 400
    lengths = []
    for story in corpus:
        assert story.prompt.count(" .") == 1
        # One more where a sentence comes twice.
        assert 2 <= story.response.split().count(".") <= 5
        for text in (story.prompt, story.response):
            assert text == " ".join(text.split()) == text.lower()
            assert text.endswith(" .")
            assert known.issuperset(text.split())
        lengths.append(len(story.response.split()))
    assert 22 <= statistics.mean(lengths) <= 28
    assert sum(15 <= length <= 36 for length in lengths) > 0.85 * len(lengths)


def test_every_word_is_seen_in_training():
    seen = {word for story in generate_stories(2000, seed=5) for word in f"{story.prompt} {story.response}".split()}
    assert seen == set(stories.vocabulary())


def test_the_same_seed_writes_the_same_stories_in_every_process():
    assert generate_stories(20, seed=3) == generate_stories(30, seed=3)[:20]
    assert generate_stories(20, seed=3) != generate_stories(20, seed=4)
    assert prompts(20, seed=3, held_out=True) == prompts(20, seed=3, held_out=True)
    # Written down once: neither Python's randomized hashes nor a change of the words may alter it unnoticed.
    prompt = "one evening sam took his new puzzle to the museum ."
    response = "sam saw it behind the bridge . he found his puzzle beside the bench . "
    assert generate_stories(1, seed=0) == [Story(prompt, response + "sam told his mother about the horrible day .")]


def test_held_out_combinations_are_never_in_training(corpus):
    in_training = {combination(story.prompt) for story in corpus}
    in_training |= {combination(prompt) for prompt in prompts(3000, seed=7, held_out=False)}
    held_out = [combination(prompt) for prompt in prompts(2000, seed=8, held_out=True)]
    assert in_training.isdisjoint(held_out)
    assert all(itertools.starmap(is_held_out, held_out))
    # Held-out names have a quarter of the prompts: 3.5 standard errors are 0.034.
    assert sum(name in HELD_OUT_NAMES for name, _, _ in held_out) / len(held_out) == pytest.approx(0.25, abs=0.034)


def test_each_two_of_a_held_out_combination_do_meet_in_training():
    combinations = itertools.product(TRAIN_NAMES, stories.OBJECTS, stories.PLACES)
    in_training = [c for c in combinations if not is_held_out(*c)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        kinds = (TRAIN_NAMES, stories.OBJECTS, stories.PLACES)
        assert {(c[first], c[second]) for c in in_training} == set(itertools.product(kinds[first], kinds[second]))
    share = 1 - len(in_training) / (len(TRAIN_NAMES) * len(stories.OBJECTS) * len(stories.PLACES))
    assert share == pytest.approx(1 / 8, abs=0.01)


def test_held_out_names_are_side_characters_of_a_few_training_stories(corpus):
    assert all(combination(story.prompt)[0] in TRAIN_NAMES for story in corpus)
    with_one = [story for story in corpus if set(story.prompt.split()) & set(HELD_OUT_NAMES)]
    assert 0.04 < len(with_one) / len(corpus) < 0.09
    assert {word for story in with_one for word in story.response.split()} >= set(HELD_OUT_NAMES)
    heroes = {combination(story.prompt)[0] for story in generate_stories(200, seed=0, names=HELD_OUT_NAMES)}
    assert heroes == set(HELD_OUT_NAMES)


def test_gold_has_mean_zero_and_deviation_one_and_is_spread(scores):
    assert statistics.mean(scores) == pytest.approx(0, abs=0.06)  # four standard errors
    assert statistics.pstdev(scores) == pytest.approx(1, abs=0.06)
    twentieths = statistics.quantiles(scores, n=20)
    assert twentieths[0] < -1.2
    assert twentieths[-1] > 1.2


def test_happy_is_better_than_plain_is_better_than_sad_or_drifted():
    happy, plain, sad, drifted = (gold_score(PROMPT, response) for response in (HAPPY, PLAIN, SAD, DRIFTED))
    assert happy > plain + 0.5
    assert plain > sad + 0.5
    assert plain > 0 > drifted
    assert drifted < plain - 0.35


def test_coherence_is_weighed_as_documented():
    plain = gold_score(PROMPT, PLAIN)
    without_name = plain - gold_score(PROMPT, PLAIN.replace("mia", "she"))
    changes = {
        "foreign name": PLAIN.replace("mia", "tom"),
        "no object": PLAIN.replace("the ball", "it"),
        "foreign object": PLAIN.replace("the ball", "the kite"),
        "one wrong pronoun": PLAIN.replace("brought the ball to her", "brought the ball to him"),
        "two wrong pronouns": PLAIN.replace("then she ran home to her", "then he ran home to his"),
    }
    with_friend = "mia and tom went to the garden to find a red ball ."  # who is no foreigner then
    assert gold_score(with_friend, PLAIN.replace("mia", "tom")) == pytest.approx(plain - without_name)
    lost = {name: (plain - gold_score(PROMPT, text)) / without_name for name, text in changes.items()}
    assert lost["no object"] == pytest.approx(1)
    assert lost["foreign name"] == pytest.approx((0.75 + 0.6) / 0.75)
    assert lost["foreign object"] == pytest.approx((0.75 + 0.6) / 0.75)
    assert lost["one wrong pronoun"] == pytest.approx(0.6 / 0.75)
    assert lost["two wrong pronouns"] == pytest.approx(1.2 / 0.75)


def test_each_happy_word_wins_less_than_the_one_before():
    texts = [PLAIN]
    for plain, happy in (("calm", "glad"), ("waited", "danced"), ("rested", "laughed"), ("tall", "kind")):
        texts.append(texts[-1].replace(plain, happy))
    gains = [gold_score(PROMPT, b) - gold_score(PROMPT, a) for a, b in itertools.pairwise(texts)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 0
    assert gains[3] < gains[0] / 4
    # The same word again is nothing new.
    twice = HAPPY.replace("mother and smiled", "mother and laughed")
    assert gold_score(PROMPT, twice) < gold_score(PROMPT, HAPPY)


@pytest.mark.parametrize(
    "damaged",
    [
        HAPPY.replace("felt proud", "proud felt"),
        HAPPY.replace("ran home", "ran"),
        HAPPY.removesuffix(" ."),
        HAPPY + " <unk>",
        HAPPY + " mia laughed and felt proud .",
        HAPPY + " mia laughed and felt glad .",
        HAPPY + " in the end she was calm .",
    ],
)
def test_damage_costs(damaged):
    assert gold_score(PROMPT, damaged) < gold_score(PROMPT, HAPPY) - 0.03


@pytest.mark.parametrize(
    "response",
    [
        "",
        ". . .",
        PROMPT,
        "happy " * 30 + ".",
        "mia ball happy glad proud thankful cheerful lovely kind laughed smiled danced safe .",
        "mia ball . happy . glad . proud . thankful . laughed .",
        " ".join(["mia laughed and felt happy ."] * 3),
        " ".join(["the ball was magical and mia danced ."] * 2),
        f"{HAPPY} {HAPPY}",
        " ".join(TRAIN_NAMES) + " .",
        " ".join(f"mia felt very {word} ." for word in ("happy", "glad", "proud", "thankful", "cheerful")),
    ],
)
def test_the_score_is_not_to_be_had_cheaply(response):
    assert gold_score(PROMPT, response) < -0.15


def test_no_sentence_of_the_corpus_repeated_reaches_the_mean(corpus, scores):
    best = sorted(zip(scores, corpus, strict=True), key=lambda pair: pair[0])[-300:]
    for _, story in best:
        for sentence in story.response.removesuffix(" .").split(" . "):
            for times in (2, 3, 4):
                assert gold_score(story.prompt, " ".join([f"{sentence} ."] * times)) < 0


def some_pairs(corpus: list[Story], count: int) -> list[tuple[str, str, str]]:
    """Pairs of responses to one prompt: its own, and that of the next story."""
    return [(a.prompt, a.response, b.response) for a, b in itertools.pairwise(corpus[: count + 1])]


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_preferences_are_as_frequent_as_bradley_and_terry_have_it(corpus, noise):
    draws = 1500
    for seed, pair in enumerate(some_pairs(corpus, 6)):
        prompt, a, b = pair
        probability = 1 / (1 + math.exp(-(gold_score(prompt, a) - gold_score(prompt, b)) / noise))
        rows = label_preferences([pair] * draws, seed, noise)
        assert all(row["prompt"] == prompt and {row["chosen"], row["rejected"]} == {a, b} for row in rows)
        frequency = sum(row["chosen"] == a for row in rows) / draws
        assert abs(frequency - probability) < 3 * math.sqrt(probability * (1 - probability) / draws)


def test_labels_depend_on_the_seed_alone_and_nearly_no_noise_makes_them_exact(corpus):
    pairs = some_pairs(corpus, 60)
    assert label_preferences(pairs, seed=0) == label_preferences(pairs, seed=0) != label_preferences(pairs, seed=1)
    for row in label_preferences(pairs, seed=0, noise=1e-12):
        assert gold_score(row["prompt"], row["chosen"]) >= gold_score(row["prompt"], row["rejected"])


def test_the_ceiling_is_what_the_best_guess_reaches(corpus):
    pairs = some_pairs(corpus, 200)
    better = [a if gold_score(p, a) >= gold_score(p, b) else b for p, a, b in pairs]
    right = [
        row["chosen"] == guess
        for seed in range(20)
        for row, guess in zip(label_preferences(pairs, seed), better, strict=True)
    ]
    # 4000 labels: a standard error is at most 0.5 / sqrt(4000).
    assert statistics.mean(right) == pytest.approx(noise_ceiling(pairs, 1.0), abs=3 * 0.5 / math.sqrt(4000))


def test_the_ceiling_between_no_noise_and_nothing_but_noise():
    equal, unequal = (PROMPT, HAPPY, HAPPY), (PROMPT, SAD, HAPPY)
    assert noise_ceiling([equal]) == 0.5
    assert noise_ceiling([equal, unequal], noise=1e-9) == pytest.approx(0.75)
    assert noise_ceiling([unequal], noise=1e9) == pytest.approx(0.5)
    gap = gold_score(PROMPT, HAPPY) - gold_score(PROMPT, SAD)
    assert noise_ceiling([unequal], noise=gap / math.log(3)) == pytest.approx(0.75)


def test_shuffled_labels_say_nothing(corpus):
    rows = label_preferences(some_pairs(corpus, 2000), seed=0, noise=0.1)
    shuffled = stories.shuffled_labels(rows, seed=0)
    for row, other in zip(rows, shuffled, strict=True):
        assert row["prompt"] == other["prompt"]
        assert {row["chosen"], row["rejected"]} == {other["chosen"], other["rejected"]}
    kept = sum(row == other for row, other in zip(rows, shuffled, strict=True)) / len(rows)
    assert kept == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(len(rows)))
    assert shuffled == stories.shuffled_labels(rows, seed=0) != stories.shuffled_labels(rows, seed=1)


def test_the_tokenizer_gives_every_story_back(corpus):
    pytest.importorskip("transformers")
    tokenizer = stories.build_tokenizer()
    for story in corpus[:1000]:
        text = f"{story.prompt} {story.response}"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 1 + len(text.split())
        assert ids[0] == tokenizer.bos_token_id
        assert not {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
        assert tokenizer.decode([*ids, tokenizer.eos_token_id, 0, 0], skip_special_tokens=True) == text
        assert tokenizer.decode(tokenizer(story.response, add_special_tokens=False)["input_ids"]) == story.response


def test_the_special_tokens_are_four_and_padding_is_on_the_left(tmp_path):
    transformers = pytest.importorskip("transformers")
    stories.build_tokenizer().save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (stories.build_tokenizer(), loaded):
        assert len(tokenizer) == len(stories.vocabulary()) + 4
        special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        assert special == [0, 1, 2, 3]
        batch = tokenizer(["mia laughed <eos>", "dragon"], padding=True)
        mia, laughed = tokenizer.convert_tokens_to_ids(["mia", "laughed"])
        assert batch["input_ids"] == [[1, mia, laughed, 2], [0, 0, 1, 3]]
        assert batch["attention_mask"] == [[1, 1, 1, 1], [0, 0, 1, 1]]
        assert tokenizer.decode(batch["input_ids"][0]) == "<bos> mia laughed <eos>"


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install"):
        stories.build_tokenizer()


def test_a_corpus_is_three_files_that_the_seed_decides(tmp_path):
    paths = stories.write_corpus(tmp_path / "new" / "folder", n_stories=30, n_prompts=7, seed=2)
    again = stories.write_corpus(tmp_path / "again", n_stories=30, n_prompts=7, seed=2)
    assert [path.name for path in paths.values()] == ["stories.jsonl", "prompts.jsonl", "held_out.jsonl"]
    assert [path.read_bytes() for path in paths.values()] == [path.read_bytes() for path in again.values()]
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert [Story(row["prompt"], row["completion"]) for row in rows["stories"]] == generate_stories(30, seed=2)
    assert [set(row) for row in rows["prompts"] + rows["held_out"]] == [{"prompt"}] * 14
    assert not any(is_held_out(*combination(row["prompt"])) for row in rows["prompts"])
    assert all(is_held_out(*combination(row["prompt"])) for row in rows["held_out"])


def test_a_corpus_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"prompts\.jsonl exists"):
        stories.write_corpus(tmp_path, n_stories=1, n_prompts=1, seed=0)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="Cannot write"):
        stories.write_corpus(tmp_path / "prompts.jsonl" / "within", n_stories=1, n_prompts=1, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate_stories(-1, seed=0), "n is -1"),
        (lambda: generate_stories(1, seed=0, names=["mia", "fin"]), "Did you mean 'finn'"),
        (lambda: generate_stories(1, seed=0, names=[]), "names is empty"),
        (lambda: prompts(-1, seed=0, held_out=True), "n is -1"),
        (lambda: stories.write_corpus(Path("x"), n_stories=1, n_prompts=-2, seed=0), "n_prompts is -2"),
        (lambda: gold_score("once upon a time .", HAPPY), "no name"),
        (lambda: gold_score("mia was here .", HAPPY), "no object"),
        (lambda: label_preferences([(PROMPT, HAPPY, SAD)], seed=0, noise=0.0), "noise is 0"),
        (lambda: noise_ceiling([(PROMPT, HAPPY, SAD)], noise=-1.0), "noise is -1"),
        (lambda: noise_ceiling([]), "pairs is empty"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(UserError, match=message):
        call()
