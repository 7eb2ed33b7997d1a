"""The commands that look at runs: `proximo evaluate`, `watch` and `report`. cli.py imports them when one is typed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from proximo.cli_arguments import EvaluateArguments, ReportArguments, WatchArguments, parse
from proximo.errors import UserError, tell
from proximo.runs import files
from proximo.runs.directory import is_language_run, open_run


def evaluate_command(words: list[str]) -> tuple[int, str]:
    """Exit code and output of `proximo evaluate`."""
    if any(word.partition("=")[0] == "--against" for word in words):
        from proximo.cli_models import compare_command

        return compare_command(words)
    from proximo.saved_run import evaluate_opened, open_policy, rate_opened, skipped_in_words
    from proximo.training.agents_config import SelfPlayConfig

    given = parse(EvaluateArguments, words, "evaluate")
    if is_language_run(given.run):
        raise UserError(
            f"{given.run} is a language run, and is compared with another model: proximo evaluate {given.run} "
            "--against MODEL --reward REWARD --prompts FILE"
        )
    config, policy, checkpoint = open_policy(open_run(given.run), given.checkpoint)
    if checkpoint.skipped:
        tell(f"proximo: {skipped_in_words(checkpoint)}")
    if isinstance(config, SelfPlayConfig):
        rated = rate_opened(
            config,
            checkpoint,
            given.env,
            episodes=given.episodes,
            seed=given.seed,
            allow_import=given.allow_import,
        )
        return _ratings(rated, open_run(given.run), as_json=given.json)
    result = evaluate_opened(
        config,
        policy,
        checkpoint.step,
        given.env,
        episodes=given.episodes,
        seed=given.seed,
        deterministic=not given.stochastic,
        allow_import=given.allow_import,
    )
    if given.json:
        return 0, json.dumps(result)
    how = "most likely actions" if result["deterministic"] else "sampled actions"
    return 0, (
        f"{result['env_id']}, policy of step {result['step']:,}: "
        f"{result['episodes']} episodes, {how}, seed {result['seed']}\n"
        f"return  {result['return_mean']:.2f} +- {result['return_std']:.2f}"
        f"  (from {result['return_min']:.2f} to {result['return_max']:.2f})\n"
        f"length  {result['length_mean']:.1f} steps"
        f"{_by_agent(result)}"
    )


def _ratings(rated: dict[str, Any], run: Any, *, as_json: bool) -> tuple[int, str]:
    """The ratings of a self-play run in words, as a picture, and kept for the page of the run."""
    from proximo.report.ratings import draw_ratings, keep_ratings

    picture = draw_ratings(rated, rated["env_id"], run.report)
    keep_ratings(rated, run)
    if as_json:
        return 0, json.dumps(rated | {"picture": str(picture)})
    widest = max(len(player["name"]) for player in rated["players"])
    lines = [
        f"{player['name']:<{widest}}  {player['rating']:7.0f} +- {player['standard_error']:.0f}"
        for player in rated["players"]
    ]
    return 0, (
        f"{rated['env_id']}, self-play: {rated['games_per_pair']} games of each pair, sampled moves, seed "
        f"{rated['seed']}\nElo ratings, with standard errors:\n" + "\n".join(lines) + "\n"
        f"latest against random: {rated['wins']} won, {rated['draws']} drawn, {rated['losses']} lost "
        f"(score {rated['score_mean']:.3f} +- {rated['score_standard_error']:.3f})\n{picture}"
    )


def _by_agent(result: dict[str, Any]) -> str:
    """What each agent scored, and all together, where there are several."""
    if "agents" not in result:
        return ""
    agents = ((agent, "-" if mean is None else f"{mean:.2f}") for agent, mean in result["agents"].items())
    each = "".join(f"\n  {agent}  {mean}" for agent, mean in agents)
    return f" (the return above is the mean over agents)\nteam    {result['team_return_mean']:.2f}, of{each}"


def watch_command(words: list[str]) -> tuple[int, str]:
    """Exit code and output of `proximo watch`."""
    from proximo.collect.several import make_several
    from proximo.models.control import RowActor
    from proximo.report.video import record_video
    from proximo.saved_run import make_for, open_policy, run_environment, skipped_in_words
    from proximo.training.agents_config import AgentsConfig, SelfPlayConfig
    from proximo.training.agents_evaluate import FilmedAgents, filmed
    from proximo.training.evaluate import check_same_spaces
    from proximo.training.selfplay import FilmedGame

    given = parse(WatchArguments, words, "watch")
    directory = open_run(given.run)
    config, policy, checkpoint = open_policy(directory, given.checkpoint)
    if checkpoint.skipped:
        tell(f"proximo: {skipped_in_words(checkpoint)}")
    env_id, factory = run_environment(config, given.env, allow_import=given.allow_import)

    def make_filmed() -> Any:
        if isinstance(config, SelfPlayConfig):
            return FilmedGame(config, factory, policy)
        if isinstance(config, AgentsConfig):
            kwargs = config.environment.env_kwargs | {"render_mode": "rgb_array"}
            return FilmedAgents(make_several(factory, env_id, kwargs, "parallel"), config)
        env = make_for(config, factory, render_mode="rgb_array")
        check_same_spaces(env_id, env, policy)
        return env

    path = record_video(
        filmed(policy) if isinstance(config, AgentsConfig) else RowActor(policy),
        make_filmed,
        directory.videos / f"step_{checkpoint.step}-seed{given.seed}",
        n_episodes=given.episodes,
        seed=given.seed,
        deterministic=not given.stochastic,
    )
    return 0, json.dumps({"video": str(path)}) if given.json else str(path)


def report_command(words: list[str]) -> tuple[int, str]:
    """Exit code and output of `proximo report`."""
    from proximo.baselines import baselines_of
    from proximo.report.folder import is_report
    from proximo.report.report import report_json, write_report

    given = parse(ReportArguments, words, "report")
    if not given.runs:
        raise UserError("proximo report needs one or more run directories.")
    # `proximo report runs/CartPole-v1/*` also names the report that the same command wrote before.
    reports = [path for path in given.runs if is_report(Path(path))]
    if reports and len(reports) < len(given.runs):
        tell(f"proximo: left out, since they are reports: {', '.join(map(str, reports))}")
        given = replace(given, runs=tuple(path for path in given.runs if path not in reports))
    runs = [open_run(path) for path in given.runs]
    report = write_report(runs, given.out, baselines=baselines_of(runs))
    if given.tensorboard is not None:
        _to_tensorboard(runs, given.tensorboard)
    if given.json:
        return 0, json.dumps(report_json(report))
    return 0, f"{report.text}\nOpen this page in a browser: {report.page}"


def _to_tensorboard(runs: list[Any], folder: Path) -> None:
    from proximo.loggers.following import export_events
    from proximo.report.records import run_names

    for run, name in zip(runs, run_names(runs), strict=True):
        export_events(run, files.expanded(folder) / name)
    tell(f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}")
