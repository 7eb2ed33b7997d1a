"""The moving picture of the README: one LunarLander run, and the same episode flown by four of its checkpoints.

    python benchmarks/learning_picture.py --run-dir runs/learning-picture      # trains for some minutes, then draws
    python benchmarks/learning_picture.py --run-dir runs/learning-picture      # again: only draws

All four fly episode 0 of evaluation with the most likely actions: same ground, same first push. The moments are the
first checkpoint, the two nearest to 15 and 35 per cent of the run, and the last one; nothing is picked by its looks. In
the picture time goes 1.2 times as fast as it does. Needs the extra box2d.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib
from PIL import Image, ImageDraw, ImageFont

import proximo
from proximo.runs import names
from proximo.runs.directory import RunDirectory

ENV_ID, SEED, EPISODE = "LunarLander-v3", 1, 0
SETTINGS: dict[str, Any] = dict(
    total_steps=400_000,
    rollout_length=256,
    n_envs=16,
    batch_size=128,
    n_epochs=6,
    learning_rate=7e-4,
    checkpoint_every=25_000,
    keep_every=25_000,
)
MOMENTS = (0.0, 0.15, 0.35, 1.0)
EVERY, FRAMES_PER_SECOND = 3, 20  # 60 steps a second; the lander's own pace is 50
LONGEST = 170  # frames
WIDTH, HEIGHT, TITLE = 360, 240, 34
STANDS_STILL = 1500
"""Milliseconds that the last frame stays."""
GAP, COLOURS = 6, 64
INK, PAPER, GOOD, BAD = (235, 235, 240), (16, 16, 24), (120, 220, 120), (250, 120, 100)
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures" / "learning.gif")
    given = parser.parse_args()
    if not given.run_dir.exists():
        proximo.train(ENV_ID, run_dir=given.run_dir, seed=SEED, **SETTINGS)
    run = RunDirectory(given.run_dir)
    flights = [fly(run, step) for step in moments(run)]
    longest = min(LONGEST, max(len(flight) for flight in flights))
    frames = [grid([flight[min(index, len(flight) - 1)] for flight in flights]) for index in range(longest)]
    write(given.out, frames)
    print(f"{given.out}: {len(frames)} frames, {given.out.stat().st_size / 1e6:.2f} MB")


def moments(run: RunDirectory) -> list[int]:
    """The steps of the checkpoints that are nearest to the moments."""
    steps = sorted({names.step_of(name) for name in names.all_in(run.checkpoints)})
    return [min(steps, key=lambda step: abs(step - share * steps[-1])) for share in MOMENTS]


def fly(run: RunDirectory, step: int) -> list[Image.Image]:
    """One episode of the policy of a checkpoint; each picture has the return so far."""
    policy = proximo.load(run.path, checkpoint=str(step))
    env = gymnasium.make(ENV_ID, render_mode="rgb_array")
    observation, _ = env.reset(seed=EPISODE)
    total, frames, n_steps, is_over = 0.0, [], 0, False
    while not is_over and len(frames) < LONGEST:
        if n_steps % EVERY == 0:
            frames.append(panel(env.render(), step, total))
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        total, is_over = total + float(reward), terminated or truncated
        n_steps += 1
    frames.append(panel(env.render(), step, total, is_over=is_over))
    env.close()
    return frames


def panel(picture: Any, step: int, total: float, *, is_over: bool = False) -> Image.Image:
    """A frame of the episode under its title; the return is bright once it is final."""
    image = Image.new("RGB", (WIDTH, HEIGHT + TITLE), PAPER)
    image.paste(Image.fromarray(picture).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), (0, TITLE))
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(FONT, 17)
    draw.text((10, 7), "before training" if step == 0 else f"after {step:,} steps", INK, font)
    colour = INK if not is_over else GOOD if total >= 0 else BAD
    draw.text((WIDTH - 10, 7), f"return {total:+.0f}", colour, font, anchor="ra")
    return image


def grid(panels: list[Image.Image]) -> Image.Image:
    """Four panels, two by two."""
    whole = Image.new("RGB", (2 * WIDTH + GAP, 2 * (HEIGHT + TITLE) + GAP), PAPER)
    for index, one in enumerate(panels):
        whole.paste(one, (index % 2 * (WIDTH + GAP), index // 2 * (HEIGHT + TITLE + GAP)))
    return whole


def write(path: Path, frames: list[Image.Image]) -> None:
    """A GIF that begins again after the last frame has stood still; one set of colours for all frames."""
    tall = Image.new("RGB", (frames[0].width, 4 * frames[0].height))
    for index in range(4):
        tall.paste(frames[index * (len(frames) - 1) // 3], (0, index * frames[0].height))
    for index, colour in enumerate((GOOD, BAD)):  # of letters alone, which are few points
        tall.paste(colour, (0, index * TITLE, WIDTH, (index + 1) * TITLE))
    colours = tall.quantize(COLOURS, dither=Image.Dither.NONE)
    drawn = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    durations = [1000 // FRAMES_PER_SECOND] * (len(drawn) - 1) + [STANDS_STILL]
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn[0].save(path, save_all=True, append_images=drawn[1:], duration=durations, loop=0, optimize=False)


if __name__ == "__main__":
    main()
