"""An AI judge as the reward: `--reward judge` asks whatever answers at an OpenAI-compatible address.

    python examples/judge.py

So that this needs no network and no key, the judge here is a server of twenty lines in this process, which counts
animals. With a model of your own behind vLLM, llama.cpp or Ollama, leave it out and give judge_url its address:

    proximo align --model runs/sft --reward judge --judge-url http://127.0.0.1:8000/v1 \
        --judge-model NAME --judge-rubric rubric.txt --prompts prompts.jsonl
"""

from __future__ import annotations

import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tiny_model import ANIMALS, save_tiny_model, write_rows

import proximo
from proximo.runs.metrics import read_metrics

RUBRIC = "Give 0 to 10 points: two for each different animal that the response names."


class Judge(BaseHTTPRequestHandler):
    """Answers a chat request with a score, as the prompt of the judge asks for it."""

    def do_POST(self) -> None:
        """Read the response in the last message, between the lines that mark it; answer {"score": ...}."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"].partition("===== RESPONSE")[2]
        said = json.dumps({"score": min(10, 2 * len(set(asked.split()) & set(ANIMALS)))})
        answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words: object) -> None:
        """Say nothing of each request."""


def main(n_iterations: int = 25) -> tuple[float, float]:
    """Align a tiny model to the judge; return the mean score at first and at last."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rubric.txt").write_text(RUBRIC)
        run = proximo.align(
            save_tiny_model(folder / "model"),
            "judge",
            write_rows(folder / "prompts.jsonl", ({"prompt": f"i see the {word}"} for word in ANIMALS)),
            judge_url=f"http://127.0.0.1:{server.server_port}/v1",
            judge_model="counts-animals",
            judge_rubric=str(folder / "rubric.txt"),
            algorithm="grpo",
            run_dir=folder / "run",
            n_iterations=n_iterations,
            prompts_per_iteration=8,
            responses_per_prompt=8,
            max_new_tokens=8,
            learning_rate=1e-2,
            threads=1,
            quiet=True,
        )
        rows = read_metrics(run.path / "metrics.jsonl")
    server.shutdown()
    first, last = float(rows[0]["reward_mean"] or 0.0), float(rows[-1]["reward_mean"] or 0.0)
    print(f"the judge's mean score: {first:.2f} at first, {last:.2f} after {n_iterations} iterations")
    return first, last


if __name__ == "__main__":
    main()
