import gc
import os
import sys
from types import ModuleType
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from proximo.collect.envs import evaluation_episode_seed
from proximo.collect.make import find_factory, make_env
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig, RowActor
from proximo.report import video
from proximo.report.video import GIF_LONGEST_SIDE, record_video

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("pygame")


class Film(gym.Env):
    """Frames of one colour each, its number; odd sides; ends after `length` steps."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length=10, frame=None, render_mode="rgb_array"):
        self.render_mode = render_mode
        self.length, self.frame, self.steps, self.seeds = length, frame, 0, []

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        self.seeds.append(seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 0.0, self.steps == self.length, False, {}

    def render(self):
        if self.frame is not None:
            return self.frame(self.steps)
        return np.full((65, 97, 3), 20 * self.steps % 256, np.uint8)


class Actor:
    """Always acts the same; remembers how it was asked."""

    def __init__(self, action=0):
        self.action, self.asked, self.firsts = action, [], []

    def __call__(self, observation, *, deterministic, seed, is_first):
        self.asked.append((deterministic, seed))
        self.firsts.append(is_first)
        return self.action


def frames_of(path):
    """Frames of an mp4 as `[n, height, width, 3]`, and what its header says."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return np.stack([np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]), meta


def gif_of(path):
    with Image.open(path) as image:
        lengths = []
        for index in range(image.n_frames):
            image.seek(index)
            lengths.append(image.info["duration"])
        return image.size, image.n_frames, sum(lengths)


@pytest.fixture
def no_encoder(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio", None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)


def test_cartpole_is_filmed_from_its_first_frame_to_its_last(tmp_path):
    env = gym.make("CartPole-v1")
    policy = ActorCritic(env.observation_space, env.action_space, NetworkConfig())
    seed = evaluation_episode_seed(3, 0)
    observation, _ = env.reset(seed=seed)
    n_steps, ended = 0, False
    while not ended:
        observation, _, terminated, truncated, _ = env.step(policy(observation))
        n_steps, ended = n_steps + 1, terminated or truncated

    def make():
        return make_env(find_factory("CartPole-v1"), "CartPole-v1", {}, render_mode="rgb_array")

    path = record_video(RowActor(policy), make, tmp_path / "videos" / "step_1.5", seed=3)
    assert path == tmp_path / "videos" / "step_1.5.mp4"
    frames, meta = frames_of(path)
    assert len(frames) == n_steps + 1
    assert meta["size"] == (600, 400)
    assert meta["fps"] == 50
    assert meta["codec"] == "h264"
    assert "yuv420p" in meta["pix_fmt"]
    assert frames[0].min() < 60  # the cart is black
    assert frames[0].max() > 250
    assert (frames[0] != frames[-1]).any()
    assert [file.name for file in path.parent.iterdir()] == ["step_1.5.mp4"]


def test_frames_are_those_of_the_environment_in_order_cut_to_even_sides(tmp_path):
    frames, meta = frames_of(record_video(Actor(), Film, tmp_path / "film"))
    assert meta["size"] == (96, 64)
    assert meta["fps"] == 20
    assert np.abs(frames.mean(axis=(1, 2, 3)) - 20 * np.arange(11)).max() < 4


def test_episodes_follow_each_other_with_seeds_of_their_own(tmp_path):
    env, actor = Film(4), Actor()
    frames, _ = frames_of(record_video(actor, lambda: env, tmp_path / "film", n_episodes=3, seed=7))
    assert sum(actor.firsts) == 3
    assert actor.firsts[0]
    assert len(frames) == 3 * 5
    evaluated = SerialEnvs(Film, 3, 2**31 + 7)  # what `evaluate --seed 7` plays
    evaluated.reset()
    assert env.seeds == [other.seeds[0] for other in evaluated._envs]
    assert actor.asked == [(True, None)] * 12


def test_sampled_actions_are_seeded_step_by_step(tmp_path):
    actor = Actor()
    record_video(actor, lambda: Film(3), tmp_path / "film", seed=5, deterministic=False)
    assert actor.asked == [(False, 6), (False, 7), (False, 8)]


def test_an_episode_without_an_end_is_cut(tmp_path):
    frames, _ = frames_of(record_video(Actor(), lambda: Film(10**9), tmp_path / "film", n_episodes=5, max_steps=30))
    assert len(frames) == 30 + 1


def test_an_existing_video_is_kept(tmp_path):
    first = record_video(Actor(), lambda: Film(2), tmp_path / "film")
    before = first.read_bytes()
    assert record_video(Actor(), lambda: Film(3), tmp_path / "film") == tmp_path / "film-2.mp4"
    assert first.read_bytes() == before


def test_without_an_encoder_it_is_a_gif_and_says_so(tmp_path, no_encoder):
    told = []
    path = record_video(Actor(), lambda: Film(40), tmp_path / "film", tell=told.append)
    assert path == tmp_path / "film.gif"
    size, n_frames, milliseconds = gif_of(path)
    assert size == (96, 64)
    assert n_frames >= 12  # each different frame; Pillow joins equal ones
    assert milliseconds == 41 * 50
    assert len(told) == 1
    assert 'pip install -c constraints.txt -e ".[video]"' in told[0]


def test_a_gif_is_scaled_down_and_holds_few_frames_for_the_same_time(tmp_path, no_encoder, monkeypatch, capsys):
    monkeypatch.setattr(video, "GIF_MOST_FRAMES", 20)

    def frame(step):
        return np.full((400, 600, 3), 2 * step, np.uint8)

    path = record_video(Actor(), lambda: Film(100, frame), tmp_path / "film")
    size, n_frames, milliseconds = gif_of(path)
    assert size == (GIF_LONGEST_SIDE, GIF_LONGEST_SIDE * 2 // 3)
    assert 10 <= n_frames <= 20
    assert milliseconds == pytest.approx(101 * 50, rel=0.1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "GIF" in captured.err


def test_an_encoder_without_its_program_is_none(tmp_path, monkeypatch):
    broken = ModuleType("imageio_ffmpeg")

    def get_ffmpeg_exe():
        raise RuntimeError("No ffmpeg exe could be found.")

    broken.get_ffmpeg_exe = get_ffmpeg_exe
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", broken)
    assert record_video(Actor(), lambda: Film(2), tmp_path / "film", tell=lambda _: None).suffix == ".gif"


def test_a_missing_pygame_is_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UserError) as caught:
        record_video(Actor(), lambda: gym.make("CartPole-v1", render_mode="rgb_array"), tmp_path / "film")
    assert 'pip install -c constraints.txt -e ".[video]"' in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Blind(Film):
    metadata: ClassVar = {"render_modes": ["human"]}

    def render(self):
        return None


class NoMode(gym.Env):
    observation_space, action_space = Film.observation_space, Film.action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}


def growing(step):
    return np.zeros((8 + 2 * step, 8, 3), np.uint8)


def failing(step):
    return np.full((8, 8, 3), 1 // (2 - step), np.uint8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Blind, "no render_mode 'rgb_array' \\(it offers 'human'\\)"),
        (NoMode, "no render_mode 'rgb_array' \\(it offers none\\)"),
        (lambda: NoMode(render_mode="rgb_array"), "constructor takes no render_mode"),
        (lambda: make_env(NoMode, "mine.py:NoMode", {}, render_mode="rgb_array"), "constructor takes no render_mode"),
        (lambda: make_env(Film, "Film", {"width": 3}, render_mode="rgb_array"), "Film could not be made with .*width"),
        (lambda: sys.exit(3), "could not be made: SystemExit: 3"),
        (lambda: Film(frame=lambda _: None, render_mode=None), "made with render_mode None"),
        (lambda: Film(frame=lambda _: None), "returned None"),
        (lambda: Film(frame=lambda _: "text"), "must return an array"),
        (lambda: Film(frame=lambda _: np.zeros((8, 8, 3))), "float64"),
        (lambda: Film(frame=growing), "change their size, from 8 x 8 to 8 x 10"),
        (lambda: Film(frame=failing), "could not be rendered: ZeroDivisionError"),
    ],
)
def test_environments_that_cannot_be_filmed_are_told_why(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        record_video(Actor(), make, tmp_path / "film")
    assert list(tmp_path.iterdir()) == []


def test_mujoco_without_opengl_names_the_variable_and_the_packages(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(UserError) as caught:
        record_video(
            Actor(np.zeros(1)), lambda: gym.make("InvertedPendulum-v5", render_mode="rgb_array"), tmp_path / "film"
        )
    for words in ("MUJOCO_GL=nonsense", "MUJOCO_GL=egl", "libegl1", "MUJOCO_GL=osmesa", "libosmesa6"):
        assert words in str(caught.value)
    del caught
    gc.collect()
    assert ignored == []  # Gymnasium's half-made viewer keeps quiet when it is deleted


def test_without_a_display_pygame_and_mujoco_are_told_so(tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    record_video(Actor(), lambda: Film(2), tmp_path / "film")
    assert (os.environ["SDL_VIDEODRIVER"], os.environ["MUJOCO_GL"]) == ("dummy", "egl")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    record_video(Actor(), lambda: Film(2), tmp_path / "film")
    assert os.environ["MUJOCO_GL"] == "osmesa"


@pytest.mark.parametrize(("name", "value"), [("n_episodes", 0), ("max_steps", 0), ("seed", -1)])
def test_impossible_numbers_are_refused(tmp_path, name, value):
    with pytest.raises(UserError, match="must be a number"):
        record_video(Actor(), Film, tmp_path / "film", **{name: value})
