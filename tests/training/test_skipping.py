"""Updates that are not finite: left out, their batch kept, and never more than so many in a row."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import proximo
from proximo.algorithms.adam import FlatAdam
from proximo.errors import UserError
from proximo.report.report import write_report
from proximo.runs import files, keeping
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from proximo.training import control, sft
from proximo.training.config import EnvironmentConfig
from proximo.training.control import CLOCK_METRICS, iterate, restore
from proximo.training.environments import make_envs
from proximo.training.sft import SFTConfig
from tests.environments import Identity, Scripted
from tests.tiny_language import save_tiny
from tests.training.aligning import run_in, trained
from tests.training.running import begin, config_with, differing, tensors_of, train

ONE_BAD = [(1.0, False, False)] * 40 + [(1e30, True, False)] + [(1.0, False, False)] * 59


def bad_once(**settings):
    return config_with(n_envs=1, rollout_length=25, batch_size=25, total_steps=100, checkpoint_every=25, **settings)


class TestControl:
    def test_one_bad_update_is_left_out_and_the_run_goes_on(self, tmp_path, capfd):
        run = train(bad_once(keep_checkpoints=9), lambda: Scripted(ONE_BAD), tmp_path)
        assert [row.get("update_skipped", False) for row in run.rows] == [False, True, False, False]
        assert run.state.skipped_in_a_row == 0
        assert all(torch.isfinite(p).all() for p in run.state.policy.parameters())
        steps = sorted(int(path.name.removeprefix("step_")) for path in run.run.checkpoints.glob("step_*"))
        assert steps == [25, 75, 100]  # none right after an update that was left out
        assert "iteration 2: the value loss is inf" in capfd.readouterr().err

    def test_it_can_be_shown_and_reported(self, tmp_path, capfd):
        config = dataclasses.replace(bad_once(), environment=EnvironmentConfig(n_envs=1))
        run = proximo.train(lambda: Scripted(ONE_BAD), config, run_dir=tmp_path / "run")
        assert "100 steps" in capfd.readouterr().err
        assert write_report([RunDirectory(run.path)]).pictures

    def test_its_batch_is_kept(self, tmp_path):
        train(bad_once(), lambda: Scripted(ONE_BAD), tmp_path)
        batch = load_file(tmp_path / "non-finite-iteration2.safetensors")
        assert batch["rewards"].shape == (1, 25)
        assert batch["rewards"].max() == torch.tensor(1e30)
        assert {"observations", "actions", "log_probs", "values", "next_values", "mask"} <= batch.keys()

    def test_what_was_not_learned_from_moves_no_normalizer(self, tmp_path):
        config = bad_once(normalize_observations=True, normalize_rewards=True, clip_reward=1e35)
        run = begin(config, lambda: Scripted([(1e200, False, False)] * 25), tmp_path)
        run.state.policy.return_variance.fill_(1e-20)  # so that the scaled reward overflows
        before = {name: buffer.clone() for name, buffer in run.state.policy.named_buffers()}
        row = next(iterate(config, run.run, run.state, run.envs))
        assert row["update_skipped"]
        assert all(torch.equal(buffer, before[name]) for name, buffer in run.state.policy.named_buffers())

    def test_too_many_in_a_row_end_the_run_with_the_last_checkpoint_from_before_them(self, tmp_path):
        config = bad_once(max_skipped_updates=1)
        script = [(1.0, False, False)] * 25 + [(1e30, False, False)] * 75
        run = begin(config, lambda: Scripted(script), tmp_path)
        with pytest.raises(UserError, match="iteration 3, 2 times in a row"):
            list(iterate(config, run.run, run.state, run.envs))
        assert newest_checkpoint(run.run.checkpoints).step == 25
        assert (tmp_path / "non-finite-iteration2.safetensors").exists()
        assert (tmp_path / "non-finite-iteration3.safetensors").exists()

    def test_both_paths_of_the_update_see_an_infinite_loss_with_a_finite_gradient(self, tmp_path):
        for path in ("eager", "fused"):
            run = train(bad_once(update_path=path), lambda: Scripted(ONE_BAD), tmp_path / path)
            assert [row.get("update_skipped", False) for row in run.rows] == [False, True, False, False]

    def test_a_resumed_run_leaves_out_what_the_undisturbed_one_does(self, tmp_path):
        config = bad_once(keep_checkpoints=9)
        whole = train(config, lambda: Scripted(ONE_BAD), tmp_path / "whole")
        part = begin(config, lambda: Scripted(ONE_BAD), tmp_path / "part")
        for row in iterate(config, part.run, part.state, part.envs):
            if row["iteration"] == 1:
                break
        envs = make_envs(config, lambda: Scripted(ONE_BAD))
        state, _ = restore(config, newest_checkpoint(part.run.checkpoints), envs)
        rows = list(iterate(config, part.run, state, envs))
        assert [row.get("update_skipped", False) for row in rows] == [True, False, False]
        assert differing(tensors_of(state), tensors_of(whole.state)) == []
        assert [{k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in rows] == [
            {k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in whole.rows[1:]
        ]


class FullDisk:
    """Refuses to write from one call of `write_synced` on, for so many calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, begins: int, lasts: int) -> None:
        self.calls, self.begins, self.ends = 0, begins, begins + lasts
        self.write = files.write_synced
        monkeypatch.setattr(files, "write_synced", self)

    def __call__(self, path: Path, data: bytes) -> None:
        self.calls += 1
        if self.begins < self.calls <= self.ends:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.write(path, data)


class TestFullDisk:
    def test_training_goes_on_and_ends_where_it_would_have(self, tmp_path, monkeypatch, capfd):
        config = config_with(checkpoint_every=32)
        whole = train(config, Identity, tmp_path / "whole")
        monkeypatch.setattr(keeping, "WAITS", (0.0,) * 7)
        FullDisk(monkeypatch, begins=2, lasts=2)
        other = train(config, Identity, tmp_path / "other")
        assert differing(tensors_of(other.state), tensors_of(whole.state)) == []
        assert "No space left on device" in capfd.readouterr().err
        assert newest_checkpoint(other.run.checkpoints).step == 128
        assert len(read_metrics(other.run.metrics_path)) == 4
        assert not list(other.run.checkpoints.glob(".tmp*"))

    def test_a_refused_save_does_not_count_as_saved(self, tmp_path, monkeypatch):
        run = begin(config_with(), Identity, tmp_path)
        run.state.recent_returns.append(1.0)
        run.state.env_steps = 32
        FullDisk(monkeypatch, begins=0, lasts=1)
        with pytest.raises(UserError, match="No space"):
            control.save(run.config, run.run, run.state, run.envs)
        assert run.state.saved_at_step == 0
        assert run.state.best_return is None


class TestLanguage:
    def test_align_leaves_out_an_update_and_keeps_its_batch(self, tmp_path, config_with, monkeypatch):
        step, calls = FlatAdam.clipped_step, []

        def poisoned(self: FlatAdam, most: float) -> float:
            calls.append(0)
            if len(calls) == 1:
                self.gradient[0] = torch.nan
            return step(self, most)

        monkeypatch.setattr(FlatAdam, "clipped_step", poisoned)
        state, rows = trained(config_with(n_iterations=2), tmp_path / "run")
        assert [row.get("update_skipped", False) for row in rows] == [True, False]
        assert all(torch.isfinite(p).all() for p in state.policy.parameters())
        assert "ref_log_probs" in load_file(tmp_path / "run" / "non-finite-iteration1.safetensors")

    def test_sft_keeps_the_texts(self, tmp_path):
        data = tmp_path / "data.jsonl"
        data.write_text(
            "".join(json.dumps({"text": f"the cat sees {w}"}) + "\n" for w in ("red", "blue", "one", "two"))
        )
        config = SFTConfig(model=str(save_tiny(tmp_path / "m")), data=str(data), batch_size=2, hold_out=0.0, threads=1)
        state = sft.start(config)
        with torch.no_grad():
            state.policy.actor.lm_head.weight[0, 0] = torch.nan
        rows = list(sft.iterate(config, run_in(tmp_path / "run"), state))
        assert [row["update_skipped"] for row in rows] == [True, True]
        kept = json.loads((tmp_path / "run" / "non-finite-iteration1.json").read_text())
        assert len(kept["token_ids"]) == 2
        assert RunDirectory(tmp_path / "run").metrics_path.exists()
