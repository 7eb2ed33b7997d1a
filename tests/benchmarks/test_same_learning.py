import numpy as np
import pytest
import same_learning
from same_learning import Band, command_for, curve_of, within


def band(mean: list[float], low: list[float], high: list[float]) -> Band:
    return Band("eager", np.array(mean), np.array(low), np.array(high), 5)


def test_each_mean_must_lie_within_the_other_interval() -> None:
    one = band([10, 10, 10], [8, 8, 9], [12, 12, 11])
    other = band([11, 13, 11], [9, 11, 10.5], [13, 15, 12])
    # The second: 13 is above [8, 12]. The third: 10 is below [10.5, 12], though 11 is within [9, 11].
    assert within(one, other).tolist() == [True, False, False]
    assert within(other, one).tolist() == [True, False, False]
    assert same_learning.verdict("Task", one, other)[-2:] == ["NO", "33 %"]


def test_a_curve_is_read_at_the_grid_and_begins_with_the_first_episode() -> None:
    returns = [(100, None), (200, 10.0), (400, 30.0), (1000, 30.0)]
    curve = curve_of([{"env_steps": at, "return_mean": value} for at, value in returns], 1000)
    assert len(curve) == same_learning.N_POINTS
    at = {round(step): value for step, value in zip(same_learning.grid(1000), curve, strict=True)}
    assert (at[20], at[200], at[300], at[400], at[1000]) == (10.0, 10.0, 20.0, 30.0, 30.0)


def test_bands_over_seeds() -> None:
    rows = [{"curve": [value, 5.0]} for value in (0.0, 1.0, 2.0, 3.0, 100.0)]
    found = Band.of("fused", rows)
    assert found.mean.tolist() == [2.0, 5.0]
    assert found.low[0] < 2.0 < found.high[0]
    assert (found.low[1], found.high[1], found.n_seeds) == (5.0, 5.0, 5)


def test_a_run_with_a_checkpoint_is_resumed_and_one_without_is_put_aside(tmp_path) -> None:
    folder = tmp_path / "run"
    assert command_for(folder, "CartPole-v1", "eager", 3, 100)[0] == "train"
    folder.mkdir()
    assert command_for(folder, "CartPole-v1", "eager", 3, 100)[0] == "train"
    assert [path.name.split("-")[:2] for path in tmp_path.iterdir()] == [["run", "unfinished"]]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_1\n")
    assert command_for(folder, "CartPole-v1", "eager", 3, 100) == ["resume", str(folder), "--quiet", "--json"]


def test_a_run_that_fails_says_why(tmp_path) -> None:
    said = same_learning.train_one("NoSuchTask-v1", "eager", 0, 100, tmp_path, tmp_path / "results.jsonl")
    assert "exit 2" in said
    assert "NoSuchTask-v1" in said
    assert not (tmp_path / "results.jsonl").exists()


def test_the_verdict_of_a_task_is_printed(tmp_path, capsys: pytest.CaptureFixture) -> None:
    results = tmp_path / "results.jsonl"
    assert not same_learning.tell(results, ["eager", "fused"], write=False)
    for path, shift in (("eager", 0.0), ("fused", 0.5)):
        for seed in range(5):
            curve = [seed + shift] * same_learning.N_POINTS
            about = dict(env_id="CartPole-v1", update_path=path, seed=seed, total_steps=100_000)
            same_learning.add_row(results, about | {"curve": curve})
    capsys.readouterr()
    assert same_learning.tell(results, ["eager", "fused"], write=False)
    assert "| CartPole-v1 | fused | 2.0 [" in capsys.readouterr().out
