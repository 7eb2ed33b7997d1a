"""A world of mini-stories: a grammar that writes them, a gold score that judges them, labels with known noise.

A prompt is one sentence with a name, an object and a place; a response is two to four sentences. The stories
are of mixed quality on purpose, so that there is something to improve:

    prompt     mia went to the garden to find her red ball .
    response   a kind dog brought the ball to her . then mia ran home to her mother and smiled .

Words are lower-case and separated by single spaces, and a full stop is a word of its own. A response has no
`<eos>` in its text; whoever trains on it adds the token.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from proximo.errors import UserError, in_range, one_of
from proximo.runs.files import make_folders, reason, replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# --------------------------------------------------------------------------------------------- the words


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_GIRLS = _words("mia anna lily emma zoe nora clara lucy ruby maya")
_BOYS = _words("tom ben sam max leo noah jack finn hugo theo")

TRAIN_NAMES: tuple[str, ...] = _GIRLS[:8] + _BOYS[:8]
"""The heroes of the stories to learn from."""

HELD_OUT_NAMES: tuple[str, ...] = _GIRLS[8:] + _BOYS[8:]
"""Never a hero in training; these names occur there as side characters of about one story in sixteen."""

OBJECTS: tuple[str, ...] = _words(
    "ball kite doll book hat drum boat cup coat lamp spoon ring basket puzzle teddy train whistle scarf balloon robot"
)
PLACES: tuple[str, ...] = _words(
    "garden park forest farm market school beach lake barn meadow library castle zoo museum"
)

_NAMES = TRAIN_NAMES + HELD_OUT_NAMES
_HELD_OUT_MODULUS = 8  # one combination in eight is held out
_HELD_OUT_NAME_SHARE = 0.25  # of the held-out prompts
_HELD_OUT_SIDE_SHARE = 0.25  # of the side characters, which a quarter of the stories have
_SIDE_SHARE = 0.25

_MOODS = ("happy", "sad", "plain")

# One class of words to a line, by mood. No word is in two of the lists: a word has one sentiment.
_MOOD_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "FEELING": {
        "happy": _words("happy glad proud thankful cheerful"),
        "sad": _words("sad angry scared lonely worried"),
        "plain": _words("calm sleepy hungry busy surprised"),
    },
    "ACTED": {
        "happy": _words("laughed smiled cheered danced"),
        "sad": _words("cried frowned screamed sobbed"),
        "plain": _words("waited listened yawned rested"),
    },
    "STATE": {
        "happy": _words("beautiful safe precious magical"),
        "sad": _words("broken dirty ugly ruined"),
        "plain": _words("heavy light warm small"),
    },
    "MANNER": {
        "happy": _words("kind friendly gentle funny"),
        "sad": _words("mean nasty rude cruel"),
        "plain": _words("tall young quiet slow"),
    },
    "DAY": {
        "happy": _words("lovely wonderful perfect sunny"),
        "sad": _words("terrible gloomy horrible rotten"),
        "plain": _words("long short cloudy normal"),
    },
}

_PLAIN_WORDS: dict[str, tuple[str, ...]] = {
    "DEED": _words("carried watched moved washed lifted pulled"),
    "LOOK": _words("red blue green yellow purple little big round soft shiny wooden new"),
    "TIME": _words("day morning afternoon evening"),
    "PREPOSITION": _words("near behind beside under"),
    "SCENERY": _words("tree table bench rock bush bridge fence log cart tent"),
    "HELPER": _words("dog cat bird rabbit duck fox pony goat farmer teacher"),
    "FAMILY": _words("mother father sister brother grandmother aunt uncle"),
}

_PRONOUNS = {"girl": {"SHE": "she", "HER": "her", "HIS": "her"}, "boy": {"SHE": "he", "HER": "him", "HIS": "his"}}

# ------------------------------------------------------------------------------------------- the grammar

# Words in capitals are slots. SHE, HER and HIS are the hero's pronouns: subject, object and possessive.
_OPENINGS: tuple[str, ...] = (
    "NAME went to the PLACE to find HIS LOOK OBJECT .",
    "NAME came to the PLACE to look for a LOOK OBJECT .",
    "one TIME NAME wanted a LOOK OBJECT from the PLACE .",
    "at the PLACE , NAME lost HIS LOOK OBJECT .",
    "one TIME NAME took HIS LOOK OBJECT to the PLACE .",
    "NAME wanted to play with a LOOK OBJECT at the PLACE .",
)
_OPENINGS_WITH_SIDE: tuple[str, ...] = (
    "NAME and SIDE went to the PLACE to find a LOOK OBJECT .",
    "NAME met SIDE at the PLACE and asked for the LOOK OBJECT .",
    "one TIME NAME and SIDE played with a LOOK OBJECT at the PLACE .",
)
_EVENTS: tuple[str, ...] = (
    "WHO found THING PREPOSITION the SCENERY .",
    "WHO saw THING PREPOSITION the SCENERY .",
    "soon WHO looked for THING PREPOSITION the SCENERY .",
    "WHO played with THING all TIME .",
    "a MANNER HELPER DEED THING .",
    "a MANNER HELPER brought THING to HER .",
    "it was a DAY TIME at the PLACE .",
)
_REACTIONS: tuple[str, ...] = (
    "WHO felt very FEELING .",
    "WHO ACTED and felt FEELING .",
    "WHO said that THING was STATE .",
    "THING was STATE and WHO ACTED .",
)
_ENDINGS: tuple[str, ...] = (
    "WHO took THING home and was FEELING .",
    "then WHO ran home to HIS FAMILY and ACTED .",
    "WHO told HIS FAMILY about the DAY TIME .",
    "at last WHO ACTED with HIS FAMILY .",
    "in the end WHO was FEELING .",
)
_SIDE_SENTENCES: tuple[str, ...] = (
    "WHO and SIDE ACTED together .",
    "SIDE was FEELING too .",
    "SIDE gave THING to HER and ACTED .",
)


@dataclass(frozen=True)
class Story:
    """A prompt and one way to go on."""

    prompt: str
    response: str


@dataclass(frozen=True)
class _Cast:
    """What a story is about. A story that drifts goes on with another cast."""

    name: str
    side: str | None
    thing: str
    look: str
    place: str
    gender: str


def _slots(cast: _Cast | None = None, mood: str | None = None, *, first: bool = False) -> dict[str, tuple[str, ...]]:
    """Return what may stand in every slot: for this cast and mood, or, where that is None, anything."""
    moods = _MOODS if mood is None else (mood,)
    genders = tuple(_PRONOUNS) if cast is None else (cast.gender,)
    return {
        "NAME": _NAMES if cast is None else (cast.name,),
        "SIDE": _NAMES if cast is None else (cast.side or "",),
        "OBJECT": OBJECTS if cast is None else (cast.thing,),
        "PLACE": PLACES if cast is None else (cast.place,),
        **_PLAIN_WORDS,
        **({} if cast is None else {"LOOK": (cast.look,)}),
        **{slot: tuple(word for m in moods for word in words[m]) for slot, words in _MOOD_WORDS.items()},
        **{slot: tuple(_PRONOUNS[gender][slot] for gender in genders) for slot in ("SHE", "HER", "HIS")},
        # The first sentence names the hero more often, the later ones have more pronouns.
        "WHO": ("NAME", "NAME", "SHE") if first else ("NAME", "SHE", "SHE"),
        "THING": ("the OBJECT", "the LOOK OBJECT", "HIS OBJECT", "it"),
    }


def _fill(template: str, slots: Mapping[str, tuple[str, ...]], rng: random.Random) -> str:
    """Replace every slot of a template, and those within, by words drawn at random."""
    return " ".join(_fill(rng.choice(slots[word]), slots, rng) if word in slots else word for word in template.split())


def _pattern(template: str, slots: Mapping[str, tuple[str, ...]]) -> str:
    """Return the regular expression of all sentences that a template stands for."""
    return " ".join(
        f"(?:{'|'.join(_pattern(choice, slots) for choice in slots[word])})" if word in slots else re.escape(word)
        for word in template.split()
    )


def _count(template: str, slots: Mapping[str, tuple[str, ...]]) -> int:
    """Return how many sentences a template stands for."""
    return math.prod(
        sum(_count(choice, slots) for choice in set(slots[word])) for word in template.split() if word in slots
    )


_RESPONSE_SENTENCES = _EVENTS + _REACTIONS + _ENDINGS + _SIDE_SENTENCES
_SENTENCE = re.compile("|".join(_pattern(template, _slots()) for template in _RESPONSE_SENTENCES))


def n_stories() -> int:
    """Return how many distinct stories there are at least, each true to its prompt.

    Only stories of one hero with two sentences, an event and an ending, are counted: (openings over all names,
    places, objects and so on) x (events x endings about one cast). No two templates give the same sentence.
    """
    anything, one_cast = _slots(), _slots(_Cast("mia", None, "ball", "red", "park", "girl"))
    one_gender = {**anything, "SHE": ("she",), "HER": ("her",), "HIS": ("her",)}  # a name has one gender
    openings = sum(_count(template, one_gender) for template in _OPENINGS)
    events, endings = (sum(_count(template, one_cast) for template in pool) for pool in (_EVENTS, _ENDINGS))
    return openings * events * endings


# ------------------------------------------------------------------------------------------- the stories


def is_held_out(name: str, thing: str, place: str) -> bool:
    """Say whether a hero, an object and a place are kept out of the training prompts in this combination.

    One in eight of the training names' combinations is held out, and always. Each two of the three words
    do meet in training.

    Raises:
        ValueError: if a word is not of this world.
    """
    indices = _NAMES.index(name) + OBJECTS.index(thing) + PLACES.index(place)
    return name in HELD_OUT_NAMES or indices % _HELD_OUT_MODULUS == 0


def _gender(name: str) -> str:
    return "girl" if name in _GIRLS else "boy"


def _other(words: Sequence[str], taken: Iterable[str | None], rng: random.Random) -> str:
    taken = set(taken)
    return rng.choice([word for word in words if word not in taken])


def _draw_cast(rng: random.Random, names: Sequence[str], *, held_out: bool) -> _Cast:
    name, thing = rng.choice(names), rng.choice(OBJECTS)
    place = rng.choice([place for place in PLACES if is_held_out(name, thing, place) == held_out])
    side = None
    if rng.random() < _SIDE_SHARE:
        pool = HELD_OUT_NAMES if rng.random() < _HELD_OUT_SIDE_SHARE else TRAIN_NAMES
        side = _other(pool, [name], rng)
    return _Cast(name, side, thing, rng.choice(_PLAIN_WORDS["LOOK"]), place, _gender(name))


def _opening(cast: _Cast, rng: random.Random) -> str:
    openings = _OPENINGS if cast.side is None else _OPENINGS_WITH_SIDE
    return _fill(rng.choice(openings), _slots(cast), rng)


def _drift(cast: _Cast, rng: random.Random) -> _Cast:
    """Return the cast with which the story goes on: now and then another name, pronoun, object or place."""
    if rng.random() < 0.15:
        name = _other(TRAIN_NAMES, [cast.name, cast.side], rng)
        cast = replace(cast, name=name, gender=_gender(name))
    if rng.random() < 0.06:
        cast = replace(cast, gender="boy" if cast.gender == "girl" else "girl")
    if rng.random() < 0.2:
        cast = replace(cast, thing=_other(OBJECTS, [cast.thing], rng))
    if rng.random() < 0.1:
        cast = replace(cast, place=_other(PLACES, [cast.place], rng))
    return cast


def _spoil(sentences: list[str], rng: random.Random) -> list[str]:
    """Return the sentences, in some stories with one that lost a word, is out of order, or comes twice."""
    fault, at = rng.random(), rng.randrange(len(sentences))
    words = sentences[at].split()
    spot = rng.randrange(len(words) - 2)  # the full stop stays where it is
    if fault < 0.05:
        del words[spot]
    elif fault < 0.10:
        words[spot : spot + 2] = words[spot + 1], words[spot]
    elif fault < 0.105:
        return [*sentences[: at + 1], *sentences[at:]]
    return [*sentences[:at], " ".join(words), *sentences[at + 1 :]]


def _response(cast: _Cast, rng: random.Random) -> str:
    """Write two to four sentences: an event, what followed, and an ending."""
    count = rng.choices((2, 3, 4), (0.3, 0.45, 0.25))[0]
    side = () if cast.side is None else _SIDE_SENTENCES
    middle = rng.sample(_EVENTS + _REACTIONS + side, count - 1)
    if middle[0] in _REACTIONS + side:
        middle[0] = _other(_EVENTS, middle, rng)
    templates = [*middle, _other(_ENDINGS + side, middle, rng)]
    story_mood = rng.choice(_MOODS)
    drifted, drifts_at = _drift(cast, rng), rng.randrange(count)
    sentences = []
    for index, template in enumerate(templates):
        mood = story_mood if rng.random() < 0.75 else rng.choice(_MOODS)
        slots = _slots(cast if index < drifts_at else drifted, mood, first=index == 0)
        sentences.append(_fill(template, slots, rng))
    return " ".join(_spoil(sentences, rng))


def generate_stories(n: int, seed: int, names: Sequence[str] = TRAIN_NAMES) -> list[Story]:
    """Write `n` stories, the same ones for the same arguments.

    A hero of `TRAIN_NAMES` is never in a held-out combination (see `is_held_out`).

    Args:
        n: how many.
        seed: of the random generator.
        names: whom the stories are about, of `TRAIN_NAMES` and `HELD_OUT_NAMES`.

    Raises:
        UserError: if `n` is negative, or a name is not of this world.
    """
    in_range("n", n, at_least=0, whole=True, usual="8000")
    for name in names:
        one_of("names", name, _NAMES)
    if not names:
        raise UserError("names is empty; a story needs a hero. Leave names out to use TRAIN_NAMES.")
    rng = random.Random(f"stories {seed}")
    stories = []
    for _ in range(n):
        hero = rng.choice(names)
        cast = _draw_cast(rng, [hero], held_out=hero in HELD_OUT_NAMES)
        stories.append(Story(_opening(cast, rng), _response(cast, rng)))
    return stories


def generate_pairs(n: int, seed: int) -> list[tuple[str, str, str]]:
    """Write `n` openings with two independent ways to go on, of the quality that the stories have.

    Raises:
        UserError: if `n` is negative.
    """
    in_range("n", n, at_least=0, whole=True, usual="5000")
    rng = random.Random(f"pairs {seed}")
    pairs = []
    for _ in range(n):
        cast = _draw_cast(rng, [rng.choice(TRAIN_NAMES)], held_out=False)
        pairs.append((_opening(cast, rng), _response(cast, rng), _response(cast, rng)))
    return pairs


def prompts(n: int, seed: int, *, held_out: bool) -> list[str]:
    """Write `n` openings: in combinations that occur in training, or in held-out ones only.

    A quarter of the held-out openings have a hero of `HELD_OUT_NAMES`.

    Raises:
        UserError: if `n` is negative.
    """
    in_range("n", n, at_least=0, whole=True, usual="1000")
    rng = random.Random(f"{'held-out' if held_out else 'training'} prompts {seed}")
    openings = []
    for _ in range(n):
        names = HELD_OUT_NAMES if held_out and rng.random() < _HELD_OUT_NAME_SHARE else TRAIN_NAMES
        openings.append(_opening(_draw_cast(rng, names, held_out=held_out), rng))
    return openings


def write_corpus(folder: Path, *, n_stories: int, n_prompts: int, seed: int) -> dict[str, Path]:
    """Write stories.jsonl (prompt, completion), prompts.jsonl and held_out.jsonl (prompt) into `folder`.

    Returns:
        The three paths by "stories", "prompts" and "held_out".

    Raises:
        UserError: if a number is negative, or one of the files exists or cannot be written.
    """
    in_range("n_stories", n_stories, at_least=0, whole=True, usual="8000")
    in_range("n_prompts", n_prompts, at_least=0, whole=True, usual="1000")
    rows = {
        "stories": [{"prompt": s.prompt, "completion": s.response} for s in generate_stories(n_stories, seed)],
        "prompts": [{"prompt": prompt} for prompt in prompts(n_prompts, seed, held_out=False)],
        "held_out": [{"prompt": prompt} for prompt in prompts(n_prompts, seed, held_out=True)],
    }
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for path in paths.values():
        if path.exists():
            raise UserError(f"{path} exists already and is not overwritten. Choose another folder, or delete the file.")
    try:
        make_folders(folder)
        for name, path in paths.items():
            replace_file(path, "".join(f"{json.dumps(row)}\n" for row in rows[name]).encode())
    except OSError as error:
        raise UserError(f"Cannot write the stories into {folder}: {reason(error)}. Choose another folder.") from error
    return paths


# ------------------------------------------------------------------------------------------ the gold score

_HAPPY_WORDS = frozenset(word for words in _MOOD_WORDS.values() for word in words["happy"])
_SAD_WORDS = frozenset(word for words in _MOOD_WORDS.values() for word in words["sad"])

# What `_raw_gold` gives on average and by how much it varies (50,000 stories of seed 0).
_RAW_MEAN, _RAW_STD = 1.157, 2.314


def gold_score(prompt: str, response: str) -> float:
    """Judge a response: 0 is the mean of the generated stories, 1 their standard deviation.

    The sum of, before scaling:

    - sentiment, 4 tanh((happy - sad) / 2): the number of different happy words, of sound sentences only, less
      that of different sad words. A third happy word adds little.
    - coherence: 0.25 each for the hero's name and for the object. Less 0.2 for every other name, object or place
      that the prompt does not have, and for every pronoun of the wrong gender; three of them at most.
    - grammar, 1.25 x the share of sound sentences among all, or among three if there are fewer. A sentence is sound if
      the grammar can make it and it is not much like an earlier one. Less 3.5 for each such repetition, two at most.
    - length: less 0.06 for every word, counting full stops, beyond 25.

    Args:
        prompt: an opening of this world; its first name is the hero.
        response: any text, without special tokens. A last sentence without its full stop is not sound.

    Raises:
        UserError: if the prompt names no character or no object.
    """
    return (_raw_gold(prompt, response) - _RAW_MEAN) / _RAW_STD


def gold_scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The gold scores of a batch, as a reward function of `proximo align`: `proximo.demo.stories:gold_scores`."""
    return [gold_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _raw_gold(prompt: str, response: str) -> float:
    words = response.split()
    sound, total, repeated = _sound_sentences(words)
    happy = len(_HAPPY_WORDS.intersection(word for sentence in sound for word in sentence))
    sad = len(_SAD_WORDS.intersection(words))
    return (
        4.0 * math.tanh((happy - sad) / 2)
        + 0.25 * _coherence(prompt.split(), words)
        + 1.25 * len(sound) / max(total, 3)
        - 3.5 * min(repeated, 2)
        - 0.06 * max(len(words) - 25, 0)
    )


def _coherence(prompt: list[str], words: list[str]) -> float:
    names = [word for word in prompt if word in _NAMES]
    things = [word for word in prompt if word in OBJECTS]
    if not names or not things:
        missing = "name" if not names else "object"
        raise UserError(
            f"The prompt {' '.join(prompt)!r} has no {missing} of the story world, so there is nothing to hold the "
            "response against. Use prompts from proximo.demo.stories.prompts."
        )
    foreign = (set(words) - set(prompt)).intersection(_NAMES + OBJECTS + PLACES)
    wrong = set(_PRONOUNS["boy" if _gender(names[0]) == "girl" else "girl"].values())
    faults = len(foreign) + sum(word in wrong for word in words)
    return float(names[0] in words) + float(things[0] in words) - 0.8 * min(faults, 3)


def _sound_sentences(words: list[str]) -> tuple[list[list[str]], int, int]:
    """Return the sound sentences, the number of all sentences, and how many of these repeat an earlier one."""
    sentences: list[list[str]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if word == ".":
            sentences.append([])
    if not sentences[-1]:
        sentences.pop()
    sound, repeated = [], 0
    for index, sentence in enumerate(sentences):
        if any(_alike(sentence, earlier) for earlier in sentences[:index]):
            repeated += 1
        elif _SENTENCE.fullmatch(" ".join(sentence)):
            sound.append(sentence)
    return sound, len(sentences), repeated


def _alike(one: list[str], other: list[str]) -> bool:
    """Say whether two sentences have three in five of their words in common."""
    one_words, other_words = set(one) - {"."}, set(other) - {"."}
    return len(one_words & other_words) >= 0.6 * len(one_words | other_words)


# --------------------------------------------------------------------------------------------- preferences


def _chance(gap: float, noise: float) -> float:
    """Bradley-Terry: the logistic function of gap / noise, written so that no exponential overflows."""
    return 0.5 + 0.5 * math.tanh(gap / noise / 2)


def _chances(pairs: Sequence[tuple[str, str, str]], noise: float) -> list[float]:
    in_range("noise", noise, above=0, usual="1.0")
    return [_chance(gold_score(prompt, a) - gold_score(prompt, b), noise) for prompt, a, b in pairs]


def label_preferences(pairs: Sequence[tuple[str, str, str]], seed: int, noise: float = 1.0) -> list[dict[str, str]]:
    """Draw which of two responses is preferred: a with probability sigmoid((gold(a) - gold(b)) / noise).

    Args:
        pairs: (prompt, a, b).
        seed: of the random generator.
        noise: in units of the gold score; the larger, the more often the worse response is preferred.

    Returns:
        Rows of "prompt", "chosen" and "rejected", in the order of the pairs.

    Raises:
        UserError: if the noise is not above 0, or a prompt is not of this world.
    """
    rng = random.Random(f"preferences {seed}")
    rows = []
    for (prompt, a, b), chance in zip(pairs, _chances(pairs, noise), strict=True):
        chosen, rejected = (a, b) if rng.random() < chance else (b, a)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def noise_ceiling(pairs: Sequence[tuple[str, str, str]], noise: float = 1.0) -> float:
    """Return the highest accuracy that any model can expect on labels drawn by `label_preferences`.

    With p the probability that a is preferred, the best guess is right with probability max(p, 1 - p); this
    is its exact mean over the pairs.

    Raises:
        UserError: if there are no pairs, the noise is not above 0, or a prompt is not of this world.
    """
    if not pairs:
        raise UserError("pairs is empty; the mean over no pairs is not a number. Give at least one pair.")
    return math.fsum(max(chance, 1 - chance) for chance in _chances(pairs, noise)) / len(pairs)


def shuffled_labels(rows: Sequence[Mapping[str, str]], seed: int) -> list[dict[str, str]]:
    """Return the rows with chosen and rejected exchanged by the toss of a fair coin: nothing is left to learn.

    A negative control: a reward model that does better than one half on such labels sees them elsewhere.
    """
    rng = random.Random(f"shuffled {seed}")
    shuffled = []
    for row in rows:
        pair = (row["chosen"], row["rejected"])
        chosen, rejected = pair if rng.random() < 0.5 else pair[::-1]
        shuffled.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return shuffled


# ----------------------------------------------------------------------------------------------- tokenizer


def vocabulary() -> list[str]:
    """Return every word of this world in alphabetical order, with the full stop and the comma."""
    slots = _slots()
    templates = _OPENINGS + _OPENINGS_WITH_SIDE + _RESPONSE_SENTENCES
    texts = [*templates, *(choice for choices in slots.values() for choice in choices)]
    return sorted({word for text in texts for word in text.split()} - set(slots))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word, and `<pad>`, `<bos>`, `<eos>`, `<unk>` as tokens 0 to 3.

    Encoding puts `<bos>` in front and no `<eos>` at the end; a batch is padded on the left, for generating.

    Raises:
        UserError: if transformers is not installed.
    """
    try:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(
            f"The story tokenizer needs the package {error.name}, which is not installed. "
            'Install it with: pip install -c constraints.txt -e ".[language]"'
        ) from error
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *vocabulary()]
    words = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokens.index("<bos>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,  # it would pull the full stop to the word before it
    )
