"""Export: the policy as one ONNX file, which acts without Proximo and without torch, and acts the same.

python examples/export.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import onnxruntime

import proximo


def main(total_steps: int = 50_000, episodes: int = 5) -> tuple[int, int]:
    """Train, export, and let the file play; return how many actions were compared, and how many differed."""
    with tempfile.TemporaryDirectory() as folder:
        run = proximo.train("CartPole-v1", seed=1, total_steps=total_steps, run_dir=Path(folder) / "run")
        exported = proximo.export(run)
        print(f"{exported.path.name}: {exported.path.stat().st_size:,} bytes")
        session = onnxruntime.InferenceSession(exported.path.read_bytes())
        policy, env = run.policy, gymnasium.make("CartPole-v1")
        n_compared = n_different = 0
        for episode in range(episodes):
            observation, _ = env.reset(seed=episode)
            total, done = 0.0, False
            while not done:
                (actions,) = session.run(["action"], {"observation": np.asarray(observation)[np.newaxis]})
                n_compared += 1
                n_different += int(actions[0] != policy(observation))
                observation, reward, terminated, truncated, _ = env.step(actions[0])
                total, done = total + float(reward), terminated or truncated
            print(f"episode {episode}: return {total:.0f}")
    print(f"{n_compared} actions of the file; {n_different} of them are not those of the policy")
    return n_compared, n_different


if __name__ == "__main__":
    main()
