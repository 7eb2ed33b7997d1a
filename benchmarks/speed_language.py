"""Response tokens per second: PPO and GRPO beside TRL's trainers, sampling beside `transformers.generate`.

    python -m venv trl18  && trl18/bin/pip install torch==2.13.0 trl==1.8.0      # the last with a PPOTrainer
    python -m venv trl116 && trl116/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/speed_language.py --trl-ppo trl18/bin/python --trl-grpo trl116/bin/python
    python benchmarks/speed_language.py --profile tiny       # where the time of an iteration of PPO goes

All programs get the same Llama, prompts and settings: an iteration is 64 responses of exactly 32 tokens to prompts of
8 to 16 tokens, scored, and learned from in 4 epochs of one minibatch; float32, a reference and a KL to it. PPO: policy,
reference, critic and reward are separate models of one size. GRPO: 8 prompts x 8 responses and a function that scores.
Programs take turns, `--rounds` times, each in a process of its own; a process warms up and then reports the median of
its iterations. The table has medians over rounds and the ratio's range over paired rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed_language.jsonl"
SIZES = {
    "tiny-random": dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, vocab_size=32_000),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512),
    "small": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, vocab_size=8192),
}
N_RESPONSES, N_TOKENS, N_EPOCHS, N_PER_PROMPT = 64, 32, 4, 8
WARM, MEASURED = 1, 3
BETA = 0.05
PAIRS = {"ppo": ("proximo_ppo", "trl_ppo"), "grpo": ("proximo_grpo", "trl_grpo"), "sampling": ("sample", "generate")}
REQUIRED = {"ppo": 3.0, "grpo": 2.0, "sampling": 1.4}


# --- what every program is given ----------------------------------------------------------------------------------


def write_task(folder: Path, size: str) -> None:
    """Policy, scalar model and tokenizer of this size, and prompts."""
    import tokenizers
    import torch
    import transformers

    shape: dict[str, Any] = SIZES[size]
    words = ["<pad>", "<eos>"] + [f"w{number}" for number in range(shape["vocab_size"] - 2)]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    common: dict[str, Any] = dict(
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None
    )
    config: Any = transformers.LlamaConfig(**shape, **common, pad_token_id=0, eos_token_id=1)
    config.num_labels = 1
    torch.manual_seed(0)
    for name, kind in (("model", "LlamaForCausalLM"), ("reward", "LlamaForSequenceClassification")):
        getattr(transformers, kind)(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lengths = torch.randint(8, 17, (512,)).tolist()
    drawn = [torch.randint(2, shape["vocab_size"], (length,)).tolist() for length in lengths]
    rows = [json.dumps({"prompt": " ".join(words[token] for token in tokens)}) for tokens in drawn]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def half_of_long_words(completions: list[str], **_: Any) -> list[float]:
    """A function reward that costs nothing: the share of words with an even length."""
    return [sum(len(word) % 2 == 0 for word in text.split()) / max(1, len(text.split())) for text in completions]


# --- the programs: each returns seconds per iteration -------------------------------------------------------------


def proximo_align(folder: Path, algorithm: str) -> list[float]:
    from dataclasses import replace

    from proximo.collect.generate import GenerationConfig
    from proximo.runs.directory import new_run
    from proximo.training import align
    from proximo.training.align_config import ALGORITHMS, AlignConfig

    is_ppo = algorithm != "grpo"
    chosen = replace(ALGORITHMS["ppo" if is_ppo else "grpo"], n_epochs=N_EPOCHS, batch_size=N_RESPONSES)
    config = AlignConfig(
        model=str(folder / "model"),
        reward=(str(folder / "reward"),) if is_ppo else (),
        prompts=str(folder / "prompts.jsonl"),
        algorithm=chosen,
        generation=GenerationConfig(max_new_tokens=N_TOKENS, stop_at_eos=False),
        beta=BETA,
        kl_in="reward" if is_ppo else "loss_k3",
        n_iterations=WARM + MEASURED + 2,  # the last one writes a checkpoint; the one before it may be profiled
        prompts_per_iteration=N_RESPONSES if is_ppo else N_RESPONSES // N_PER_PROMPT,
        responses_per_prompt=1 if is_ppo else N_PER_PROMPT,
        n_samples=0,
        checkpoint_every=WARM + MEASURED + 2,
    )

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        del prompts
        return half_of_long_words(responses)

    state = align.start(config, reward=None if is_ppo else score)
    try:
        moments = [time.perf_counter()]
        for row in align.iterate(config, new_run("speed", 0, folder / "run"), state):
            moments.append(time.perf_counter())
            if row["iteration"] == WARM + MEASURED:
                break
        if algorithm == "profile":
            print_shares(partial(next, align.iterate(config, new_run("speed", 0, folder / "profile"), state)))
    finally:
        state.reward.close()
    return [after - before for before, after in pairwise(moments)]


def print_shares(iteration: Callable[[], object]) -> None:
    """Where the time of one iteration goes: the share of each operation of torch."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        iteration()
    found = sorted(profiled.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in found)
    for one in found[:12]:
        print(f"{100 * one.self_cpu_time_total / total:5.1f} %  {one.count:6,} calls  {one.key}")


def clock(every: int) -> tuple[Any, list[float]]:
    """A callback of transformers' trainer that notes the time every so many optimizer steps."""
    import transformers

    moments = [time.perf_counter()]

    class Clock(transformers.TrainerCallback):
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1
            if self.steps % every == 0:
                moments.append(time.perf_counter())

    return Clock(), moments


def trl_ppo(folder: Path) -> list[float]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rows = datasets.Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in prompts]})
    callback, moments = clock(1)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=N_RESPONSES,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=N_EPOCHS,
            local_rollout_forward_batch_size=N_RESPONSES,
            total_episodes=N_RESPONSES * (WARM + MEASURED),
            response_length=N_TOKENS,
            num_sample_generations=0,
            kl_coef=BETA,
            learning_rate=1e-5,
            temperature=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
        ),
        processing_class=tokenizer,
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_model=transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        value_model=transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        train_dataset=rows,
        eval_dataset=rows.select(range(N_RESPONSES)),
        callbacks=[callback],
    )
    moments[0] = time.perf_counter()
    trainer.train()
    return [after - before for before, after in pairwise(moments)]


def trl_grpo(folder: Path) -> list[float]:
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    rows = datasets.Dataset.from_json(str(folder / "prompts.jsonl"))
    callback, moments = clock(N_EPOCHS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    model.generation_config.eos_token_id = None  # responses of exactly the same length, as everywhere here
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=half_of_long_words,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=N_RESPONSES,
            gradient_accumulation_steps=1,
            num_generations=N_PER_PROMPT,
            num_iterations=N_EPOCHS,
            max_steps=N_EPOCHS * (WARM + MEASURED),
            max_completion_length=N_TOKENS,
            generation_kwargs={"min_new_tokens": N_TOKENS},
            beta=BETA,
            learning_rate=1e-5,
            temperature=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
        train_dataset=rows,
        callbacks=[callback],
    )
    moments[0] = time.perf_counter()
    trainer.train()
    return [after - before for before, after in pairwise(moments)]


def prompt_batches(folder: Path, tokenizer: Any) -> list[list[list[int]]]:
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    starts = [N_RESPONSES * (number % (len(ids) // N_RESPONSES)) for number in range(WARM + MEASURED)]
    return [ids[start : start + N_RESPONSES] for start in starts]


def timed(function: Callable[[Any], object], inputs: list[Any]) -> list[float]:
    found = []
    for one in inputs:
        began = time.perf_counter()
        function(one)
        found.append(time.perf_counter() - began)
    return found


def sample(folder: Path) -> list[float]:
    import torch

    from proximo.collect.generate import GenerationConfig
    from proximo.collect.generate import sample as sample_responses
    from proximo.models.folders import load_causal_lm, load_tokenizer
    from proximo.models.language import LanguagePolicy

    tokenizer = load_tokenizer(str(folder / "model"))
    policy = LanguagePolicy(load_causal_lm(str(folder / "model")), sharing="trunk")
    config = GenerationConfig(max_new_tokens=N_TOKENS, stop_at_eos=False)
    generator = torch.Generator().manual_seed(0)
    return timed(
        lambda ids: sample_responses(policy, tokenizer, ids, config, generator), prompt_batches(folder, tokenizer)
    )


def generate(folder: Path) -> list[float]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    settings = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS)

    @torch.no_grad()
    def answer(ids: list[list[int]]) -> None:
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        made = model.generate(**padded, **settings)
        assert made.shape[1] == padded["input_ids"].shape[1] + N_TOKENS

    return timed(answer, prompt_batches(folder, tokenizer))


PROGRAMS: dict[str, Callable[[Path], list[float]]] = {
    "proximo_ppo": lambda folder: proximo_align(folder, "ppo"),
    "proximo_grpo": lambda folder: proximo_align(folder, "grpo"),
    "profile": lambda folder: proximo_align(folder, "profile"),
    "trl_ppo": trl_ppo,
    "trl_grpo": trl_grpo,
    "sample": sample,
    "generate": generate,
}


# --- taking turns ---------------------------------------------------------------------------------------------------


def tokens_per_second(program: str, python: str, size: str) -> float:
    """Run a program in a process of its own; the median over its measured iterations."""
    with tempfile.TemporaryDirectory() as name:
        write_task(Path(name), size)
        ran = subprocess.run(
            [python, __file__, "--program", program, "--folder", name], capture_output=True, text=True, check=False
        )
    if ran.returncode:
        sys.exit(f"{program} failed:\n{ran.stderr[-3000:]}")
    seconds = json.loads(ran.stdout.splitlines()[-1])["seconds"]
    return N_RESPONSES * N_TOKENS / statistics.median(seconds[WARM:])


def packages_of(python: str) -> str:
    """The versions that a comparison rests on, from the environment it runs in."""
    code = "import importlib.metadata as m; print(', '.join(f'{p} {m.version(p)}' for p in ('torch','transformers')))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def measure(size: str, pythons: dict[str, str], rounds: int) -> None:
    from records import circumstances

    for number in range(rounds):
        for task, pair in PAIRS.items():
            if pair[1] not in pythons:
                continue
            order = pair if number % 2 == 0 else pair[::-1]
            rates = {program: tokens_per_second(program, pythons[program], size) for program in order}
            row = {
                "task": task,
                "size": size,
                "round": number,
                "ours": rates[pair[0]],
                "theirs": rates[pair[1]],
                "peer_versions": packages_of(pythons[pair[1]]),
            } | circumstances("transformers")
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{size} {task}: {row['ours']:,.0f} / {row['theirs']:,.0f} = {row['ours'] / row['theirs']:.2f}")


PEERS = {"ppo": "TRL 1.8.0 PPOTrainer", "grpo": "TRL 1.16.0 GRPOTrainer", "sampling": "transformers.generate"}


def write_table() -> None:
    from records import in_words, write_between

    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = [
        "| model | task | peer | peer, tokens/s | Proximo, tokens/s | ratio | per round | required |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for task in PAIRS:
            found = [row for row in rows if (row["size"], row["task"]) == (size, task)]
            if not found:
                continue
            ours, theirs = (statistics.median(row[name] for row in found) for name in ("ours", "theirs"))
            ratios = [row["ours"] / row["theirs"] for row in found]
            required = f"{REQUIRED[task]}" if size != "small" else ""
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(
                f"| {size} | {task} | {PEERS[task]} | {theirs:,.0f} | {ours:,.0f} | "
                f"{statistics.median(ratios):.2f} | {each} | {required} |"
            )
    lines += ["", f"The peers' environments: {'; '.join(sorted({row['peer_versions'] for row in rows}))}."]
    write_between("speed of language", lines + in_words(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-ppo", help="the interpreter of an environment with TRL 1.8.0")
    parser.add_argument("--trl-grpo", help="the interpreter of an environment with TRL 1.16.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--profile", choices=list(SIZES), help="only print where the time of an iteration of PPO goes")
    parser.add_argument("--program", choices=sorted(PROGRAMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        print(json.dumps({"seconds": PROGRAMS[arguments.program](arguments.folder)}))
        return
    if arguments.profile:
        with tempfile.TemporaryDirectory() as name:
            write_task(Path(name), arguments.profile)
            PROGRAMS["profile"](Path(name))
        return
    if not arguments.table:
        here = sys.executable
        pythons = {"proximo_ppo": here, "proximo_grpo": here, "sample": here, "generate": here}
        pythons |= {"trl_ppo": arguments.trl_ppo} if arguments.trl_ppo else {}
        pythons |= {"trl_grpo": arguments.trl_grpo} if arguments.trl_grpo else {}
        for size in arguments.sizes:
            measure(size, pythons, arguments.rounds)
    write_table()


if __name__ == "__main__":
    main()
