"""Which curves belong on which picture, and what to call them. Only data: whatever draws reads from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proximo.report.records import Row


@dataclass(frozen=True)
class Line:
    """One metric; `label` tells it from the others of its panel."""

    metric: str
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    """What is drawn, in plain words."""
    hint: str
    """How to read it."""
    y_label: str
    """Quantity, with its unit in brackets."""
    lines: tuple[Line, ...]
    is_noisy: bool = True
    """Draw a trend over the values, and leave wild values outside of the picture."""
    may_be_log: bool = False
    """A logarithmic axis where positive values span several powers of ten."""
    floor: float | None = None
    """Lowest value that the axis ever shows."""
    ceiling: float | None = None
    """Highest value that the axis ever shows."""
    reference: str | None = None
    """A setting whose value is drawn as a dashed line, where the run has one."""
    level: float | None = None
    """A value worth a thin line."""
    from_zero: bool = False
    """Let the axis begin at 0, where what counts is how large a value is and not how it wavers."""
    in_percent: bool = False
    """Label the axis in percent."""
    in_overview: bool = False
    """Show it on the overview as well."""

    def is_in(self, rows: Sequence[Row]) -> bool:
        """Whether the run measures any of these metrics, even if it has no value yet."""
        return any(line.metric in row for line in self.lines for row in (*rows[:1], *rows[-1:]))


@dataclass(frozen=True)
class Chart:
    """One picture: a file name without its suffix, and panels side by side."""

    name: str
    panels: tuple[Panel, ...]


CHARTS = (
    Chart(
        "returns",
        (
            Panel(
                "Episode return",
                "mean of the last 100 episodes, in the environment's own rewards",
                "return (sum of rewards)",
                (Line("return_mean"),),
                is_noisy=False,
                in_overview=True,
            ),
            Panel(
                "Episode length",
                "mean of the last 100 episodes",
                "length (steps)",
                (Line("length_mean"),),
                is_noisy=False,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "cloning",
        (
            Panel(
                "Log-probability of demonstrated actions",
                "mean over a step; where the held-out curve falls again, the best weights are those before",
                "log-probability (nats)",
                (Line("log_prob_learned", "learned from"), Line("log_prob_held_out", "held out")),
                is_noisy=False,
                in_overview=True,
            ),
            Panel(
                "How good the critic is on held-out returns",
                "1: it foresees them; 0: no better than their mean",
                "share of the variance explained",
                (Line("value_r2_held_out"),),
                is_noisy=False,
                floor=-1.0,
                ceiling=1.0,
                level=0.0,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "losses",
        (
            Panel(
                "Policy loss",
                "what the policy minimizes; it hovers near 0 and need not fall",
                "policy loss",
                (Line("policy_loss"),),
                level=0.0,
                in_overview=True,
            ),
            Panel(
                "Value loss",
                "mean squared error of the critic; it grows with the returns",
                "value loss (reward²)",
                (Line("value_loss"),),
                may_be_log=True,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "kl",
        (
            Panel(
                "How far an update moves the policy",
                "KL divergence from the policy that collected, mean of the last epoch",
                "approx_kl (nats)",
                (Line("approx_kl"),),
                reference="target_kl",
                from_zero=True,
                in_overview=True,
            ),
            Panel(
                "The largest move within an update",
                "KL divergence, the highest of all minibatches",
                "approx_kl_max (nats)",
                (Line("approx_kl_max"),),
                reference="target_kl",
                from_zero=True,
            ),
        ),
    ),
    Chart(
        "clip_fraction",
        (
            Panel(
                "Clip fraction",
                "share of steps whose probability ratio has left 1 ± clip_epsilon",
                "share of steps",
                (Line("clip_fraction"),),
                from_zero=True,
                in_percent=True,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "entropy",
        (
            Panel(
                "Entropy: how random the policy is",
                "discrete actions: 0 is certain; continuous actions go below 0",
                "entropy (nats)",
                (Line("entropy"),),
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "explained_variance",
        (
            Panel(
                "Explained variance: how good the critic is",
                "1: it foresees the returns; 0: no better than their mean; below: worse",
                "explained variance",
                (Line("explained_variance"),),
                floor=-1.0,
                ceiling=1.0,
                level=0.0,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "exploration",
        (
            Panel(
                "Intrinsic reward: how new what is seen is",
                "the predictor's error at what follows a step, in standard deviations of its returns",
                "intrinsic reward",
                (Line("intrinsic_reward_mean"),),
                may_be_log=True,
            ),
            Panel(
                "Explained variance of the intrinsic critic",
                "1: it foresees the intrinsic returns; 0: no better than their mean; below: worse",
                "explained variance",
                (Line("intrinsic_explained_variance"),),
                floor=-1.0,
                ceiling=1.0,
                level=0.0,
            ),
        ),
    ),
    Chart(
        "schedules",
        (
            Panel(
                "Learning rate",
                "step size of Adam",
                "learning_rate",
                (Line("learning_rate"),),
                is_noisy=False,
                from_zero=True,
            ),
            Panel(
                "Clip range",
                "how far the probability ratio may move with reward for it",
                "clip_epsilon",
                (Line("clip_epsilon"),),
                is_noisy=False,
                from_zero=True,
            ),
        ),
    ),
    Chart(
        "speed",
        (
            Panel(
                "Speed",
                "collecting and updating together",
                "environment steps per second",
                (Line("steps_per_second"),),
                from_zero=True,
                in_overview=True,
            ),
            Panel(
                "Where the time goes",
                "per iteration",
                "seconds",
                (Line("seconds_collecting", "collecting"), Line("seconds_updating", "updating")),
                from_zero=True,
            ),
        ),
    ),
)
"""The pictures of a control run; `cloning` is that of one cloned from data."""
