"""From what a person writes to an environment, or to words that help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import DependencyNotInstalled

from proximo.collect.make import find_factory, make_env, names_code
from proximo.errors import UserError
from tests.environments import Forever, Noisy

SOURCE = """
import gymnasium as gym
import numpy as np
from helper_of_this_file import SIZE

LEVELS = 3

class WalkingRobot(gym.Env):
    def __init__(self, render_mode=None, size=SIZE):
        self.render_mode, self.size = render_mode, size
        self.observation_space = gym.spaces.Box(-1, 1, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.size, np.float32), {}

    def step(self, action):
        return np.zeros(self.size, np.float32), 0.0, False, False, {}

def build(**kwargs):
    return WalkingRobot(size=7, **kwargs)

class Plain:
    pass

gym.register("OwnRobot-v0", entry_point=WalkingRobot)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the command is run, with a file of the user's in it."""
    (tmp_path / "my_robot.py").write_text(SOURCE)
    (tmp_path / "helper_of_this_file.py").write_text("SIZE = 4\n")
    package = tmp_path / "garden_of_robots"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "walking.py").write_text(SOURCE)
    (package / "broken.py").write_text("raise RuntimeError('no robot today')\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    registered = dict(gym.registry)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "robot" in name or "helper_of_this_file" in name:
            del sys.modules[name]
    gym.registry.clear()
    gym.registry.update(registered)


def made(env_id: str, **kwargs: Any) -> gym.Env:
    return make_env(find_factory(env_id), env_id, kwargs)


def refusal(env_id: str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        made(env_id, **kwargs)
    return str(caught.value)


class TestIds:
    def test_an_id_makes_its_environment(self):
        env = made("CartPole-v1", sutton_barto_reward=True)
        assert env.spec is not None
        assert (env.spec.id, env.spec.max_episode_steps) == ("CartPole-v1", 500)

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("CartPol-v1", "CartPole-v1"),
            ("cartpole-v1", "CartPole-v1"),
            ("Cart-Pole-v1", "CartPole-v1"),
            ("CartPole", "CartPole-v1"),
            ("CartPole-v9", "CartPole-v1"),
            ("LunarLander-v2", "LunarLander-v3"),
            ("HalfCheeta-v5", "HalfCheetah-v5"),
            ("HalfCheetah-v6", "HalfCheetah-v5"),
            ("MountainCarContinous-v0", "MountainCarContinuous-v0"),
        ],
    )
    def test_a_misspelt_one_gets_the_nearest(self, wrong, right):
        message = refusal(wrong)
        assert f"There is no environment {wrong!r}. Did you mean" in message
        assert right in message

    def test_a_version_that_is_not_there_gets_those_that_are(self):
        assert "Did you mean CartPole-v0 or CartPole-v1?" in refusal("CartPole-v7")

    def test_one_like_no_other_gets_no_guess_but_the_way_to_find_out(self):
        message = refusal("Qwzx")
        assert "Did you mean" not in message
        assert "my_file.py:MyEnv" in message
        assert "pprint_registry" in message

    def test_only_what_has_a_colon_imports_code(self):
        assert [names_code(name) for name in ("CartPole-v1", "a.py:B", "a.b:C", "ale_py:ALE/Pong-v5")] == [
            False,
            True,
            True,
            True,
        ]

    def test_arguments_that_do_not_fit_are_told(self):
        message = refusal("CartPole-v1", colour="red")
        assert "CartPole-v1 could not be made with {'colour': 'red'}" in message


class TestMissingPackages:
    """As if the package were not installed: importing it raises what Gymnasium or Python raises then."""

    @staticmethod
    def refusal(monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Exception | None = None) -> str:
        def make(*_: object, **__: object) -> gym.Env:
            raise error from cause

        monkeypatch.setattr(gym, "make", make)
        monkeypatch.setitem(gym.registry, "Absent-v0", EnvSpec("Absent-v0", entry_point="nowhere:Absent"))
        return refusal("Absent-v0")

    @pytest.mark.parametrize(
        ("said", "extra"),
        [
            ('Box2D is not installed, you can install it by run `pip install "gymnasium[box2d]"`', "box2d"),
            ('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`', "mujoco"),
            ('pygame is not installed, run `pip install "gymnasium[classic-control]"`', "video"),
        ],
    )
    def test_the_exact_command_is_given(self, monkeypatch, said, extra):
        message = self.refusal(monkeypatch, DependencyNotInstalled(said))
        assert f'Install it with: pip install -c constraints.txt -e ".[{extra}]"' in message
        assert "Absent-v0 needs" in message

    def test_from_the_error_behind_the_error_too(self, monkeypatch):
        cause = ModuleNotFoundError("No module named 'Box2D'", name="Box2D")
        message = self.refusal(monkeypatch, DependencyNotInstalled("a package is missing"), cause)
        assert 'pip install -c constraints.txt -e ".[box2d]"' in message

    def test_a_package_of_the_users_own_is_named(self, monkeypatch):
        message = self.refusal(monkeypatch, ModuleNotFoundError("No module named 'robosuite'", name="robosuite"))
        assert "robosuite" in message
        assert "constraints.txt" not in message

    def test_for_real(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "Box2D", None)
        for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
            monkeypatch.delitem(sys.modules, name)
        message = refusal("LunarLander-v3")
        assert 'Install it with: pip install -c constraints.txt -e ".[box2d]"' in message

    def test_an_environment_that_has_moved_away_is_not_to_be_had_by_an_extra(self):
        message = refusal("HalfCheetah-v3")
        assert "gymnasium-robotics" in message
        assert "pip install" not in message


class TestFiles:
    def test_a_class_in_a_file_with_its_neighbours(self, folder):
        env = made("my_robot.py:WalkingRobot")
        assert env.observation_space.shape == (4,)
        assert made(f"{folder}/my_robot.py:WalkingRobot", size=2).observation_space.shape == (2,)

    def test_a_function_in_a_file(self, folder):
        assert made("my_robot.py:build").observation_space.shape == (7,)

    def test_an_environment_that_the_file_registers(self, folder):
        assert made("my_robot.py:OwnRobot-v0").observation_space.shape == (4,)

    def test_the_same_file_is_imported_once(self, folder):
        first, second = (find_factory(f"{prefix}my_robot.py:WalkingRobot") for prefix in ("", "./"))
        assert first is second

    def test_two_files_of_the_same_name_are_two(self, folder):
        other = folder / "elsewhere"
        other.mkdir()
        (other / "my_robot.py").write_text(SOURCE.replace("from helper_of_this_file import SIZE", "SIZE = 9"))
        assert made("elsewhere/my_robot.py:WalkingRobot").observation_space.shape == (9,)
        assert made("my_robot.py:WalkingRobot").observation_space.shape == (4,)

    def test_the_search_path_is_left_as_it_was(self, folder):
        before = list(sys.path)
        find_factory("my_robot.py:WalkingRobot")
        find_factory("garden_of_robots.walking:WalkingRobot")
        assert sys.path in (before, [*before, str(folder)])  # a file's own folder, last, as for a script

    def test_a_neighbour_that_is_imported_only_when_it_is_needed(self, folder):
        late = SOURCE.replace(
            "self.render_mode, self", "from elsewhere_helper import SIZE as size; self.render_mode, self"
        )
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "elsewhere_helper.py").write_text("SIZE = 6\n")
        (elsewhere / "late_robot.py").write_text(late.replace("from helper_of_this_file import SIZE", "SIZE = 4"))
        assert made("elsewhere/late_robot.py:WalkingRobot").observation_space.shape == (6,)

    def test_a_file_that_is_not_there_gets_the_nearest(self, folder):
        message = refusal("my_robots.py:WalkingRobot")
        assert f"There is no file {folder}/my_robots.py. Did you mean my_robot.py" in message

    @pytest.mark.parametrize("place", ["~nosuchuser/x.py", "x" * 300 + ".py", "x\0.py"])
    def test_a_name_that_no_file_can_have(self, folder, place):
        assert "There is no file" in refusal(f"{place}:WalkingRobot")

    def test_a_folder_that_is_not_there(self, folder):
        assert "There is no file" in refusal("nowhere/my_robot.py:WalkingRobot")

    def test_a_class_that_is_not_there_gets_the_nearest(self, folder):
        message = refusal("my_robot.py:WalkingRobt")
        assert "no class, function or registered environment named 'WalkingRobt'. Did you mean WalkingRobot?" in message

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("def f(:\n", "SyntaxError"),
            ("raise RuntimeError('no robot today')", "RuntimeError: no robot today"),
            ("import a_package_nobody_has", "a_package_nobody_has"),
            ("import sys; sys.exit(4)", "SystemExit: 4"),
        ],
    )
    def test_a_file_that_cannot_be_imported_says_why(self, folder, text, said):
        (folder / "bad_robot.py").write_text(text)
        for _ in range(2):
            message = refusal("bad_robot.py:Robot")
            assert "bad_robot.py could not be imported" in message
            assert said in message

    def test_an_interrupt_while_importing_is_an_interrupt(self, folder):
        (folder / "slow_robot.py").write_text("raise KeyboardInterrupt")
        with pytest.raises(KeyboardInterrupt):
            find_factory("slow_robot.py:Robot")

    def test_what_is_no_class_is_refused(self, folder):
        assert "LEVELS is a int, not a class or function" in refusal("my_robot.py:LEVELS")

    def test_what_makes_no_environment_is_refused(self, folder):
        message = refusal("my_robot.py:Plain")
        assert "made a Plain, which is not a gymnasium.Env" in message

    def test_a_file_without_a_class_says_how_to_name_one(self, folder):
        assert "my_file.py:MyEnv" in refusal("my_robot.py")


class TestModules:
    def test_a_class_in_a_module_of_this_folder(self, folder):
        assert made("garden_of_robots.walking:WalkingRobot", size=3).observation_space.shape == (3,)

    def test_gymnasiums_own_way_to_import_and_make(self, folder):
        assert made("garden_of_robots.walking:OwnRobot-v0").spec.id == "OwnRobot-v0"

    def test_a_module_that_is_installed(self):
        assert type(made("gymnasium.envs.classic_control.cartpole:CartPoleEnv")).__name__ == "CartPoleEnv"

    def test_a_module_that_is_not_there(self, folder):
        message = refusal("garden_of_robots.running:Robot")
        assert "'garden_of_robots.running' could not be imported" in message
        assert "the folder where the command is run" in message

    def test_a_class_that_is_not_there(self, folder):
        assert "Did you mean WalkingRobot?" in refusal("garden_of_robots.walking:WalkingRobo")

    def test_a_module_that_raises_says_so(self, folder):
        assert "no robot today" in refusal("garden_of_robots.broken:Robot")

    def test_a_module_that_leaves_says_so(self, folder):
        (folder / "garden_of_robots" / "leaving.py").write_text("raise SystemExit('no robot today')")
        assert "SystemExit: no robot today" in refusal("garden_of_robots.leaving:Robot")


class TestCallables:
    def test_a_class_or_function_makes_environments(self):
        assert isinstance(make_env(Noisy, "Noisy", {"length": 3}), Noisy)
        assert isinstance(make_env(lambda: Forever(), "mine", {}), Forever)

    def test_what_it_raises_is_told(self):
        def broken() -> gym.Env:
            raise ValueError("the arm is stuck")

        with pytest.raises(UserError, match="mine could not be made with no arguments: ValueError: the arm is stuck"):
            make_env(broken, "mine", {})

    def test_that_it_leaves_is_told(self):
        with pytest.raises(UserError, match="mine could not be made with no arguments: SystemExit: 0"):
            make_env(lambda: sys.exit(0), "mine", {})

    def test_its_own_words_are_kept(self):
        def particular() -> gym.Env:
            raise UserError("Only on Tuesdays.")

        with pytest.raises(UserError, match=r"^Only on Tuesdays\.$"):
            make_env(particular, "mine", {})

    def test_what_is_no_environment_is_refused(self):
        with pytest.raises(UserError, match=r"mine made a dict, which is not a gymnasium\.Env"):
            make_env(dict, "mine", {})

    def test_a_time_limit_truncates(self):
        env = make_env(Forever, "mine", {}, max_episode_steps=3)
        env.reset(seed=0)
        ends = [env.step(0)[2:4] for _ in range(3)]
        assert ends == [(False, False), (False, False), (False, True)]

    def test_a_time_limit_can_be_longer_than_the_environments_own(self):
        env = make_env(find_factory("Pendulum-v1"), "Pendulum-v1", {}, max_episode_steps=300)
        env.reset(seed=0)
        action = env.action_space.sample()
        assert [env.step(action)[3] for _ in range(300)] == [False] * 299 + [True]

    def test_the_way_to_render_is_passed_on(self):
        env = make_env(find_factory("CartPole-v1"), "CartPole-v1", {}, render_mode="rgb_array")
        assert env.render_mode == "rgb_array"
