"""What is always the same about each kind of problem that `check.py` can find: why it matters, how to mend it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Advice(NamedTuple):
    """The fixed texts of one kind."""

    severity: Severity
    why: str
    mend: str


ADVICE: dict[str, Advice] = {
    # --- making it, and what it declares ---
    "make-raised": Advice("error", "Without the environment there is nothing to learn from.", "See the message."),
    "not-an-environment": Advice(
        "error",
        "Proximo calls reset(seed=...) and step(action) as gymnasium.Env defines them.",
        "Derive the class from gymnasium.Env (`import gymnasium as gym`; the old `gym` package is another one).",
    ),
    "second-raised": Advice(
        "error",
        "Training makes n_envs environments in one process, and resuming makes them again.",
        "Let every instance have its own ports, files and windows; or train with --n-envs 1.",
    ),
    "space-unsupported": Advice(
        "error",
        "The spaces tell how large the networks must be.",
        "Set self.observation_space (a Box) and self.action_space (a Discrete, or a Box of floats) in __init__.",
    ),
    "action-bounds": Advice(
        "warning",
        "-1 and 1 of the policy are mapped onto the bounds: with very wide ones nearly every action is extreme; "
        "without any, actions begin around 0 with standard deviation 1, whatever size is useful.",
        "Declare the range in which actions are useful in __init__, best spaces.Box(-1, 1, ...), and scale in step().",
    ),
    # --- calling it ---
    "raised": Advice("error", "Training stops at the first exception.", "Mend the line shown."),
    "reset-signature": Advice(
        "error",
        "Every episode is begun with reset(seed=...), and wrappers such as a time limit pass options= on.",
        "Write `def reset(self, *, seed=None, options=None):` and begin with `super().reset(seed=seed)` in reset().",
    ),
    "reset-values": Advice(
        "error",
        "The first part is read as the observation, the second as the info.",
        "End reset() with `return observation, {}`.",
    ),
    "step-values": Advice(
        "error",
        "The old gym's `done` has become two values, since a time limit must not be learned as an end.",
        "End step() with `return observation, reward, terminated, truncated, info`: terminated if the task ended "
        "by itself, truncated if it was cut from outside.",
    ),
    # --- observations ---
    "observation-shape": Advice(
        "error",
        "The networks are built for what the space declares.",
        "Mend self.observation_space in __init__, or what reset() and step() return.",
    ),
    "observation-dtype": Advice(
        "warning",
        "Proximo converts it at every step; other tools refuse it, and space.contains() is False.",
        "Return np.asarray(observation, dtype=self.observation_space.dtype) in reset() and step(), or declare the "
        "type you mean.",
    ),
    "observation-cut": Advice(
        "error",
        "The policy would see none of what is behind the decimal point; training stops at it.",
        "Declare self.observation_space with dtype=np.float32 in __init__.",
    ),
    "not-finite": Advice(
        "error",
        "One such number makes every weight NaN; training stops at it.",
        "Look in step() for a division by 0, a square root or logarithm of a negative number, or a value that grows "
        "without limit. The seed and step above lead there again.",
    ),
    "observation-bounds": Advice(
        "error",
        "A space that does not hold is mostly a mistake in units or in an index; training stops at it.",
        "Widen low/high of self.observation_space in __init__, or clip the observation in step(); "
        "--on-space-violation warn lets training go on.",
    ),
    "observation-reused": Advice(
        "warning",
        "Proximo copies observations at once, but whoever keeps one (other tools, your own code) sees it change.",
        "Return self.state.copy() (whatever the array is called) in reset() and step().",
    ),
    "observation-scale": Advice(
        "warning",
        "A network learns slowly from inputs that are far from 1, and overlooks the small ones beside the large.",
        "Train with --normalize-observations, or bring the values to about [-1, 1] in reset() and step().",
    ),
    "observation-constant": Advice(
        "warning",
        "A value that never changes tells the policy nothing. (Random play may just not get to where it does.)",
        "If it should change, look at where it is written in step().",
    ),
    # --- rewards ---
    "reward-not-a-number": Advice("error", "The reward must be one number.", "Return float(reward) in step()."),
    "reward-constant": Advice(
        "warning",
        "Where no action earns more than another there is nothing to learn; if a rare reward exists, learning waits "
        "until chance finds it.",
        "Reward progress too in step() (a little for coming nearer), or make the goal easier to find at first.",
    ),
    "reward-scale": Advice(
        "warning",
        "The value function has to reach numbers of that size: large ones drown the policy's loss, small ones are "
        "lost in its errors.",
        "Train with --normalize-rewards, or scale the reward in step().",
    ),
    # --- ends ---
    "end-type": Advice(
        "warning",
        "Proximo takes the integers 0 and 1 for False and True; other tools refuse them.",
        "Return bool(terminated), bool(truncated) in step().",
    ),
    "end-value": Advice(
        "error",
        "Whether an episode has ended must not be a guess; training stops at it.",
        "Return bool(terminated), bool(truncated) in step().",
    ),
    "end-both": Advice(
        "warning",
        "Such an end counts as terminated: what lies behind a time limit is then learned to be worth nothing.",
        "In step() let `terminated` mean that the task itself ended, and `truncated` that time ran out.",
    ),
    "end-like-time-limit": Advice(
        "warning",
        "If that is a time limit, it must be `truncated`: a terminated state is learned to be worth nothing.",
        "In step() return terminated=False, truncated=True where only time ran out; or leave the limit out and train "
        "with --max-episode-steps.",
    ),
    "endless": Advice(
        "warning",
        "Returns are counted per episode: none would be shown, and a stuck environment stays stuck.",
        "Train with --max-episode-steps 1000 (say), or let step() end the episode.",
    ),
    # --- repeatability, seeds, actions, speed ---
    "not-repeatable": Advice(
        "warning",
        "A resumed run cannot come back to the same step, a fault cannot be replayed, results cannot be compared.",
        "Draw every random number from self.np_random after super().reset(seed=seed) in reset(); set everything that "
        "an episode changes anew there; share nothing between instances; do not change `action` in place.",
    ),
    "seed-ignored": Advice(
        "warning",
        "All environments play the same episode, so n_envs of them show no more than one. Harmless if the task is "
        "meant to be without chance.",
        "Otherwise draw the start from self.np_random after super().reset(seed=seed) in reset().",
    ),
    "action-ignored": Advice(
        "warning", "Nothing the policy does makes a difference.", "Look at what step() does with `action`."
    ),
    "slow": Advice(
        "warning",
        "The environment, not learning, will take most of the time.",
        "Train with --vectorization workers, which spreads the environments over the cores.",
    ),
}
