"""Any space as one array, so that rollouts, workers, minibatches and checkpoints know arrays alone.

A Box is as it is. Observations of every other space become one row each (`PackedObservations`): a vector of floats, in
which a choice among n is n numbers of which one is 1, and the action mask at the end; or, where there are images, the
bytes of that vector, the mask and the images one after the other. Actions that are a Dict or a Tuple become one row of
numbers (`PackedActions`). Keys are gone through in sorted order, so nothing hangs on the order in which they come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from proximo.errors import UserError, in_words

Path = tuple[str | int, ...]
"""Keys and numbers that lead from a space to one within it."""

SMALLEST_IMAGE = 36
"""Pixels of height and of width below which the Nature CNN has nothing left after its three convolutions."""

MOST_OPTIONS = 10**6
"""Options of one part of an observation or action."""

MASK_KEY = "action_mask"
"""Of a Dict of observations, or of `info`: which actions are possible."""


class PackingError(ValueError):
    """An observation that does not fit its space, or a mask that forbids everything, in words."""


class Leaf(NamedTuple):
    """A space that holds no other one, and where it is."""

    path: Path
    space: spaces.Space

    def of(self, value: Any, what: str) -> Any:
        """What is at this place in a value of the whole space.

        Raises:
            PackingError: if there is nothing.
        """
        for depth, key in enumerate(self.path):
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError) as error:
                place = named(what, self.path[:depth])
                raise PackingError(f"{place} is a {type(value).__name__} without {key!r}") from error
        return value


def named(what: str, path: Path) -> str:
    """`observation['arm'][0]`."""
    return what + "".join(f"[{key!r}]" for key in path)


def leaves(space: spaces.Space, what: str, path: Path = ()) -> Iterator[Leaf]:
    """The simple spaces within a space, keys in sorted order.

    Raises:
        UserError: if one is of a kind that cannot be learned from.
    """
    if isinstance(space, spaces.Dict):
        for key in sorted(space.spaces, key=str):
            if not isinstance(key, str):
                raise UserError(f"The key {key!r} of {named(f'{what}_space', path)} is no string. Use strings.")
            yield from leaves(space.spaces[key], what, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, inner in enumerate(space.spaces):
            yield from leaves(inner, what, (*path, index))
    elif isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        if math.prod(space.shape or ()) == 0:
            raise UserError(f"{named(f'{what}_space', path)} is {space}: it holds no numbers. Leave it out.")
        if not isinstance(space, spaces.Box) and _n_numbers(space) > MOST_OPTIONS:
            raise UserError(
                f"{named(f'{what}_space', path)} is {space}: each option is a number of its own for the network, and "
                f"there may be {MOST_OPTIONS:,} at most. Describe it by fewer numbers, in a Box or a MultiDiscrete."
            )
        yield Leaf(path, space)
    else:
        raise UserError(
            f"{named(f'{what}_space', path)} is {space}; Box, Discrete, MultiDiscrete, MultiBinary, and Dicts and "
            "Tuples of these can be learned from. Wrap the environment so that it gives one of them."
        )


def options_of(space: spaces.Space) -> tuple[int, ...]:
    """How many options each choice in an action has: 2 for a bit, nothing for continuous parts; in order."""
    sizes: list[int] = []
    for leaf in leaves(space, "action"):
        if isinstance(leaf.space, spaces.Discrete):
            sizes.append(int(leaf.space.n))
        elif isinstance(leaf.space, spaces.MultiDiscrete):
            sizes += leaf.space.nvec.ravel().tolist()
        elif isinstance(leaf.space, spaces.MultiBinary):
            sizes += [2] * math.prod(leaf.space.shape)
    return tuple(int(size) for size in sizes)


# --- observations ---------------------------------------------------------------------------------------------------


def is_image(space: spaces.Space) -> bool:
    """Whether an observation is bytes in three dimensions, and large enough for convolutions; else it is numbers."""
    if not (isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8):
        return False
    _, _, height, width = image_layout(space)
    return min(height, width) >= SMALLEST_IMAGE


def image_layout(space: spaces.Box) -> tuple[bool, int, int, int]:
    """Whether the channels come last, and the number of channels, height and width.

    They come first, as in a stack of frames (4, 84, 84), unless the last dimension alone is 1, 3 or 4.

    Raises:
        UserError: if these are no images that the Nature CNN can see.
    """
    shape = space.shape
    problem = None
    if len(shape) != 3:
        problem = "an image has three dimensions, such as (4, 84, 84)"
    elif space.dtype != np.uint8 and not (space.low.min() >= 0 and space.high.max() <= 255):
        problem = "the pixels of an image are from 0 to 255"
    if problem is not None:
        raise UserError(f"the observations {space} are no images for an encoder: {problem}. Use encoder 'mlp'.")
    last = shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4)
    channels, height, width = (shape[2], shape[0], shape[1]) if last else shape
    return last, channels, height, width


@dataclass(frozen=True)
class _Image:
    leaf: Leaf
    first: int
    """Its first byte in a row."""

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.leaf.space.shape is not None
        return self.leaf.space.shape


class PackedObservations(spaces.Box):
    """The rows that observations of `source` are packed into; for those who know nothing of it, a Box.

    Args:
        source: the environment's own observation space.
        options: of each choice in an action, where there are masks; they follow the numbers.
        mask_is_observed: the mask is `observation["action_mask"]`, and no number to learn from; else it comes beside.
    """

    def __init__(self, source: spaces.Space, options: Sequence[int] = (), *, mask_is_observed: bool = False) -> None:
        """Lay out the row.

        Raises:
            UserError: if there is nothing to learn from, or the mask has another length than the actions.
        """
        self.source = source
        self.options = tuple(options)
        self.mask_is_observed = mask_is_observed
        every = list(leaves(source, "observation"))
        self._mask_leaf = next((leaf for leaf in every if leaf.path == (MASK_KEY,)), None) if mask_is_observed else None
        if mask_is_observed:
            self._check_mask_leaf()
        seen = [leaf for leaf in every if leaf is not self._mask_leaf]
        self._numbers = [leaf for leaf in seen if not is_image(leaf.space)]
        if not seen:
            raise UserError(f"The observation space {source} has nothing but the action mask: nothing to learn from.")
        self._places = [0, *np.cumsum([_n_numbers(leaf.space) for leaf in self._numbers]).tolist()]
        self.n_numbers = self._places[-1]
        self.n_options = sum(self.options)
        first, images = 4 * self.n_numbers + self.n_options, []
        for leaf in (leaf for leaf in seen if is_image(leaf.space)):
            images.append(_Image(leaf, first))
            first += math.prod(leaf.space.shape or ())
        self.images = tuple(images)
        low, high = self._bounds()
        if images:
            super().__init__(0, 255, (first,), np.uint8)
        else:
            none, one = np.zeros(self.n_options, np.float32), np.ones(self.n_options, np.float32)
            super().__init__(np.concatenate([low, none]), np.concatenate([high, one]), dtype=np.float32)

    def _check_mask_leaf(self) -> None:
        n_options = sum(self.options)
        if self._mask_leaf is None or math.prod(self._mask_leaf.space.shape or ()) != n_options:
            found = "is not there" if self._mask_leaf is None else f"is {self._mask_leaf.space}"
            raise UserError(
                f"observation['{MASK_KEY}'] {found}; a mask has one number for each of the {n_options} options of the "
                f"action ({' + '.join(map(str, self.options))}), as in MultiBinary({n_options})."
            )

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest that each number may be."""
        low, high = np.zeros(self.n_numbers, np.float32), np.ones(self.n_numbers, np.float32)
        for leaf, first, last in zip(self._numbers, self._places, self._places[1:], strict=False):
            if isinstance(leaf.space, spaces.Box):
                with np.errstate(over="ignore"):
                    low[first:last], high[first:last] = leaf.space.low.ravel(), leaf.space.high.ravel()
        return low, high

    @property
    def number_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest that each of `numbers` may be, `[F]`."""
        return self._bounds()

    @property
    def measured(self) -> np.ndarray:
        """Which of `numbers` are those of a Box, and not a choice."""
        kinds = [np.full(_n_numbers(leaf.space), isinstance(leaf.space, spaces.Box)) for leaf in self._numbers]
        return np.flatnonzero(np.concatenate(kinds)) if kinds else np.zeros(0, np.int64)

    # --- into a row ---

    def leading_of(self, observation: Any) -> tuple[int, ...]:
        """`()` for one observation of the source, `(N,)` for a batch; by the first array in it.

        Raises:
            PackingError: if it is neither.
        """
        leaf = self._numbers[0] if self._numbers else self.images[0].leaf
        value, shape = np.shape(leaf.of(observation, "observation")), leaf.space.shape or ()
        if value == shape:
            return ()
        if value[1:] != shape or not value:
            many = f"(N{''.join(f', {size}' for size in shape)}{'' if shape else ','})"
            raise PackingError(f"{named('observation', leaf.path)} has shape {value}; expected {shape} or {many}")
        return value[:1]

    def pack(self, observation: Any, action_mask: Any = None, *, ignores_mask: bool = False) -> np.ndarray:
        """One observation as a row; `ignores_mask`: all is allowed, as where an episode is over.

        Raises:
            PackingError: if it does not fit its space in shape or kind, or the mask leaves no action.
        """
        return self.pack_many(observation, action_mask, (), ignores_mask=ignores_mask)

    def pack_many(
        self, observation: Any, action_mask: Any = None, leading: tuple[int, ...] = (), *, ignores_mask: bool = False
    ) -> np.ndarray:
        """Observations whose every part has these leading dimensions, as rows `[*leading, R]`; see `pack`."""
        numbers = np.empty((*leading, self.n_numbers), np.float32)
        for leaf, first, last in zip(self._numbers, self._places, self._places[1:], strict=False):
            value = leaf.of(observation, "observation")
            numbers[..., first:last] = _as_numbers(leaf, value, leading)
        mask = np.ones((*leading, self.n_options), bool)
        if self.options and not ignores_mask:
            given = action_mask if self._mask_leaf is None else self._mask_leaf.of(observation, "observation")
            mask = checked_mask(given, self.options, leading)
        if not self.images:
            return np.concatenate([numbers, mask.astype(np.float32)], -1) if self.n_options else numbers
        pixels = [
            _array_of(image.leaf, image.leaf.of(observation, "observation"), leading).reshape(*leading, -1)
            for image in self.images
        ]
        return np.concatenate([numbers.view(np.uint8), mask.view(np.uint8), *pixels], -1, dtype=np.uint8)

    # --- out of rows ---

    def numbers(self, rows: Any) -> Any:
        """The vector `[..., F]` of rows (NumPy's or torch's, as what is returned), without the mask."""
        if not self.images:
            return rows[..., : self.n_numbers]
        some = rows[..., : 4 * self.n_numbers]
        if isinstance(some, np.ndarray):
            return np.ascontiguousarray(some).view(np.float32)
        import torch  # not needed, and not loaded, where environments are stepped

        # A copy in any case: one row of many bytes counts as contiguous, and keeps a stride that is no multiple of 4.
        return some.clone(memory_format=torch.contiguous_format).view(torch.float32)

    def pixels(self, rows: Any) -> list[Any]:
        """Each image `[..., *shape]` of rows."""
        return [
            rows[..., image.first : image.first + math.prod(image.shape)].reshape(*rows.shape[:-1], *image.shape)
            for image in self.images
        ]

    def mask(self, rows: Any) -> Any:
        """Which options are possible, `[..., n_options]` of bools; None where there are no masks."""
        if not self.options:
            return None
        first = 4 * self.n_numbers if self.images else self.n_numbers
        return rows[..., first : first + self.n_options] != 0

    def blank(self, n: int) -> np.ndarray:
        """`n` rows of zeros in which everything is possible."""
        rows = np.zeros((n, *self.shape), self.dtype)
        first = 4 * self.n_numbers if self.images else self.n_numbers
        rows[:, first : first + self.n_options] = 1
        return rows

    def element(self, place: int) -> str:
        """What one of `numbers` is called: `observation['arm'][3]`."""
        index = int(np.searchsorted(self._places, place, side="right")) - 1
        leaf, within = self._numbers[index], place - self._places[index]
        name = named("observation", leaf.path)
        if not isinstance(leaf.space, (spaces.Box, spaces.MultiBinary)):
            return name
        shape = leaf.space.shape or ()
        return name + (f"[{', '.join(str(int(k)) for k in np.unravel_index(within, shape))}]" if shape else "")

    def __eq__(self, other: object) -> bool:
        """Rows of the same space, packed alike."""
        return (
            isinstance(other, PackedObservations)
            and (self.source, self.options) == (other.source, other.options)
            and self.mask_is_observed == other.mask_is_observed
        )

    __hash__ = None

    def __repr__(self) -> str:
        """The space that they are rows of."""
        return f"{self.source}" + (" with action masks" if self.options else "")


def checked_mask(action_mask: Any, options: Sequence[int], leading: tuple[int, ...] = ()) -> np.ndarray:
    """A mask as bools `[*leading, sum(options)]`.

    Raises:
        PackingError: if there is none, it is of another shape, is not of 0 and 1, or forbids every option of a choice.
    """
    n_options = sum(options)
    if action_mask is None:
        raise PackingError(f"there is no {MASK_KEY}; it must say of each of {n_options} options whether it is possible")
    flat = _whole_mask(action_mask, options, leading)
    if flat.shape != (*leading, n_options):
        raise PackingError(
            f"the {MASK_KEY} has shape {flat.shape}, not one number for each of {n_options} options (if it means "
            "something else, train with --action-mask none)"
        )
    allowed = flat != 0
    if flat.dtype.kind not in "biuf" or not (allowed == flat).all():
        raise PackingError(f"the {MASK_KEY} must hold True and False, or 1 and 0, not {flat.ravel()[:5].tolist()} ...")
    first = 0
    for index, size in enumerate(options):
        if not allowed[..., first : first + size].any(-1).all():
            which = f" of choice {index}" if len(options) > 1 else ""
            raise PackingError(f"the {MASK_KEY} forbids every action{which}: at least one must be possible")
        first += size
    return allowed


def _whole_mask(action_mask: Any, options: Sequence[int], leading: tuple[int, ...]) -> np.ndarray:
    """A mask as one array: as it is, or put together from one piece for each choice."""
    try:
        pieces = [np.asarray(piece) for piece in action_mask]
        shapes = [(*leading, size) for size in options]
        if len(options) > 1 and isinstance(action_mask, (tuple, list)) and [piece.shape for piece in pieces] == shapes:
            return np.concatenate(pieces, -1)
        array = np.asarray(action_mask)
    except (ValueError, TypeError) as error:
        raise PackingError(f"the {MASK_KEY} cannot be made an array: {in_words(error)}") from error
    is_several = not leading and array.size == sum(options)  # such as [options, 1], or that of a matrix of bits
    return array.ravel() if is_several else array


def _n_numbers(space: spaces.Space) -> int:
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return math.prod(space.shape or ())


def _array_of(leaf: Leaf, value: Any, leading: tuple[int, ...]) -> np.ndarray:
    """A value as an array of numbers, `[*leading, *shape]`.

    Raises:
        PackingError: if it is none.
    """
    name, shape = named("observation", leaf.path), (*leading, *(leaf.space.shape or ()))
    try:
        array = np.asarray(value)
    except Exception as error:  # what a value of any class raises while it is converted
        raise PackingError(
            f"{name} is a {type(value).__name__} that cannot be made an array: {in_words(error)}"
        ) from error
    if array.dtype.kind not in "fiub":
        raise PackingError(f"{name} is a {type(value).__name__}, not an array of numbers of shape {shape}")
    if array.shape != shape:
        raise PackingError(f"{name} has shape {array.shape}, not {shape}")
    if is_image(leaf.space) and array.dtype != np.uint8:
        if not ((array >= 0) & (array <= 255) & (array % 1 == 0)).all():
            raise PackingError(f"{name} has pixels that are no whole numbers from 0 to 255")
        return array.astype(np.uint8)
    return array


def _as_numbers(leaf: Leaf, value: Any, leading: tuple[int, ...]) -> np.ndarray:
    """A value as numbers `[*leading, F]`: a choice among n as n numbers of which one is 1."""
    array = _array_of(leaf, value, leading)
    space = leaf.space
    if isinstance(space, spaces.Box):
        with np.errstate(over="ignore"):
            return array.reshape(*leading, -1).astype(np.float32)
    if isinstance(space, spaces.MultiBinary):
        first, sizes = np.zeros(1, np.int64), np.full(1, 2)
    elif isinstance(space, spaces.Discrete):
        first, sizes = np.array([int(space.start)]), np.array([int(space.n)])
    else:
        assert isinstance(space, spaces.MultiDiscrete)
        first, sizes = np.asarray(space.start).ravel().astype(np.int64), space.nvec.ravel().astype(np.int64)
    choices = array.reshape(*leading, -1)
    wrong = ~((choices >= first) & (choices < first + sizes) & (choices % 1 == 0))
    if wrong.any():
        value = choices[wrong][0].item()
        raise PackingError(f"{named('observation', leaf.path)} is {value}, which is not in its space {space}")
    if isinstance(space, spaces.MultiBinary):
        return choices.astype(np.float32)
    numbers = np.zeros((*leading, int(sizes.sum())), np.float32)
    places = (choices - first).astype(np.int64) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    np.put_along_axis(numbers, places, 1.0, -1)
    return numbers


# --- actions --------------------------------------------------------------------------------------------------------


class PackedActions(spaces.Box):
    """The rows that actions of a Dict or a Tuple are packed into, in the environment's own numbers (float64)."""

    def __init__(self, source: spaces.Space) -> None:
        """Lay out the row.

        Raises:
            UserError: if a part cannot be learned.
        """
        self.source = source
        self.leaves = tuple(leaves(source, "action"))
        if not self.leaves:
            raise UserError(
                f"action_space is {source}: it holds no numbers. Let it have at least one choice or number."
            )
        sizes = [math.prod(leaf.space.shape or ()) for leaf in self.leaves]
        self._places = [0, *np.cumsum(sizes).tolist()]
        super().__init__(-np.inf, np.inf, (self._places[-1],), np.float64)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each leaf."""
        return tuple(last - first for first, last in zip(self._places, self._places[1:], strict=False))

    def pack_many(self, action: Any, leading: tuple[int, ...] = ()) -> np.ndarray:
        """Actions whose every part has these leading dimensions, as rows `[*leading, A]`.

        Raises:
            PackingError: if a part is missing or of another shape.
        """
        rows = np.empty((*leading, self._places[-1]))
        for leaf, first, last in zip(self.leaves, self._places, self._places[1:], strict=False):
            value = np.asarray(leaf.of(action, "action"))
            if value.shape != (*leading, *(leaf.space.shape or ())):
                shape = (*leading, *(leaf.space.shape or ()))
                raise PackingError(f"{named('action', leaf.path)} has shape {value.shape}, not {shape}")
            rows[..., first:last] = value.reshape(*leading, -1)
        return rows

    def unpack(self, rows: np.ndarray) -> Any:
        """The actions of rows `[..., A]`, each part in its own kind of number with the same leading dimensions."""
        leading = rows.shape[:-1]
        parts: dict[Path, Any] = {}
        for leaf, first, last in zip(self.leaves, self._places, self._places[1:], strict=False):
            shape = (*leading, *(leaf.space.shape or ()))
            part = rows[..., first:last].reshape(shape).astype(leaf.space.dtype)
            # An environment that is given one choice expects a number, as its space's own samples are.
            parts[leaf.path] = part[()] if isinstance(leaf.space, spaces.Discrete) else part
        return rebuilt(self.source, parts, ())

    def sample(self, mask: Any = None, probability: Any = None) -> np.ndarray:
        """A row of a random action."""
        return self.pack_many(self.source.sample(mask, probability))

    def seed(self, seed: Any = None) -> Any:
        """Seed the source, which is what is sampled."""
        return self.source.seed(seed) if hasattr(self, "source") else super().seed(seed)

    def __eq__(self, other: object) -> bool:
        """Rows of the same space."""
        return isinstance(other, PackedActions) and self.source == other.source

    __hash__ = None

    def __repr__(self) -> str:
        """The space that they are rows of."""
        return f"{self.source}"


def rebuilt(space: spaces.Space, parts: dict[Path, Any], path: Path) -> Any:
    """A value of a space from what is at its leaves."""
    if isinstance(space, spaces.Dict):
        return {key: rebuilt(inner, parts, (*path, key)) for key, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(rebuilt(inner, parts, (*path, index)) for index, inner in enumerate(space.spaces))
    return parts[path]
