"""Tokens per second of the service's engine beside transformers' generate, and the service under many clients.

python benchmarks/serving.py --json serving.json                     # a Llama of 27M random parameters
python benchmarks/serving.py --model runs/mine/model
python benchmarks/serving.py --load runs/tiny --clients 64 --seconds 60 --json load.json

Both sides write the same number of greedy tokens after the same prompts (the tokens are compared), in one process, in
turns whose order is drawn anew in each repetition. ``--load`` starts ``siloweave serve`` and has clients ask it without
a pause: what they wait for, what fails, and what the service's memory does.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from figures import setting, spread, spreads

from trainer.inference.batching import Engine, EngineLimits, Output, Voice
from trainer.inference.lanes import Lane
from trainer.inference.sampling import Sampling
from trainer.models.load import load_model

PROMPT, WRITTEN, TOGETHER = 64, 64, 8


def model_of(folder: Path | None) -> Any:
    """A model that somebody has made, or one of random weights."""
    if folder is not None:
        return load_model(folder)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1376, "vocab_size": 8192}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, max_position_embeddings=512, **sizes)).eval()


class Sides:
    """The engine and transformers with one model, and what each writes after some prompts."""

    def __init__(self, model: Any, written: int) -> None:
        from tokenizers import Tokenizer, models

        self.model, self.written = model, written
        draw = random.Random(0)
        vocabulary = model.config.vocab_size
        self.prompts = [[draw.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(TOGETHER)]
        words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(vocabulary)}, unk_token="<0>"))
        limits = EngineLimits(TOGETHER, TOGETHER * (PROMPT + written), TOGETHER)
        self.engine = Engine({"model": Voice(Lane(model), words)}, limits)
        # A word of the made-up tokenizer reads <number>: what comes out says which tokens were chosen.
        self.texts: dict[int, str] = {}

    def _ask(self, number: int, first: list[float] | None = None) -> threading.Event:
        done, pieces = threading.Event(), []

        def came(output: Output) -> None:
            if first is not None and not first:
                first.append(time.perf_counter())
            pieces.append(output.text)
            if output.finish:
                self.texts[number] = "".join(pieces)
                done.set()

        how = Sampling(max_new_tokens=self.written)
        self.engine.submit("model", self.prompts[number], how, came, continued=False)
        return done

    def engine_alone(self) -> None:
        """One request after the other."""
        for number in range(TOGETHER):
            self._ask(number).wait()

    def engine_together(self) -> None:
        """All at once."""
        for done in [self._ask(number) for number in range(TOGETHER)]:
            done.wait()

    def generate_alone(self) -> list[list[int]]:
        """One prompt after the other, by transformers."""
        return [self._generated([prompt])[0] for prompt in self.prompts]

    def generate_together(self) -> list[list[int]]:
        """One batch of prompts of one length, by transformers: the most that a fixed batch can do."""
        return self._generated(self.prompts)

    def _generated(self, prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": self.written, "eos_token_id": None}
        with torch.inference_mode():
            found: list[list[int]] = self.model.generate(ids, do_sample=False, pad_token_id=0, **given).tolist()
        return found

    def first_token(self) -> float:
        """Seconds from a request to its first piece of text, the service idle."""
        came: list[float] = []
        began = time.perf_counter()
        self._ask(0, came).wait()
        return came[0] - began

    def plain_forward(self) -> float:
        """Seconds of one pass over the prompt."""
        began = time.perf_counter()
        with torch.inference_mode():
            self.model(torch.tensor([self.prompts[0]]))
        return time.perf_counter() - began

    def check(self) -> None:
        """Both have chosen the same tokens."""
        self.engine_alone()
        for number, row in enumerate(self.generate_alone()):
            told = [int(word.strip("<>")) for word in self.texts[number].split()]
            if told != row[PROMPT:]:
                raise SystemExit(f"prompt {number}: the engine and generate have written different tokens")


def rates(sides: Sides, repetitions: int) -> dict[str, Any]:
    """Tokens per second of each way, and the ratios that the aims are about."""
    ways: dict[str, Callable[[], Any]] = {
        "engine, alone": sides.engine_alone,
        "engine, 8 at once": sides.engine_together,
        "generate, alone": sides.generate_alone,
        "generate, a batch of 8": sides.generate_together,
    }
    found, first = [], []
    for repetition in range(repetitions):
        rate = {}
        for name in random.Random(repetition).sample(sorted(ways), len(ways)):
            began = time.perf_counter()
            ways[name]()
            rate[name] = TOGETHER * sides.written / (time.perf_counter() - began)
        found.append(rate)
        first.append(sides.first_token() / statistics.median(sides.plain_forward() for _ in range(3)))
        print({name: round(value, 1) for name, value in rate.items()}, flush=True)
    alone = [rate["engine, alone"] / rate["generate, alone"] for rate in found]
    together = [rate["engine, 8 at once"] / rate["engine, alone"] for rate in found]
    batch = [rate["engine, 8 at once"] / rate["generate, a batch of 8"] for rate in found]
    return {
        "tokens per second": spreads(found),
        "engine alone / generate alone": spread(alone),
        "8 at once / one after the other": spread(together),
        "8 at once / generate's batch of 8": spread(batch),
        "first token / a forward pass of the prompt": spread(first),
    }


class Load:
    """Clients that ask a service without a pause."""

    def __init__(self, run: Path, clients: int, seconds: float) -> None:
        self.clients, self.seconds = clients, seconds
        command = [sys.executable, "-m", "siloweave", "serve", f"model={run}", "--port", "0", "--slots", "8", "--json"]
        self.process = psutil.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]
        self.firsts: list[float] = []
        self.wholes: list[float] = []
        self.failures: list[str] = []

    def _client(self, until: float) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < until:
                try:
                    self._request(client)
                except httpx.HTTPError as error:
                    self.failures.append(type(error).__name__)

    def _request(self, client: httpx.Client) -> None:
        asked = {"model": "model", "prompt": "It was", "max_tokens": 32, "stream": True, "temperature": 0.8}
        began, first = time.monotonic(), 0.0
        with client.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != httpx.codes.OK:
                self.failures.append(str(response.status_code))
                return
            for line in response.iter_lines():
                if line.startswith("data:") and not first:
                    first = time.monotonic() - began
        self.firsts.append(first)
        self.wholes.append(time.monotonic() - began)

    def run(self) -> dict[str, Any]:
        """What clients waited for, and the service's memory from a quarter of the time on."""
        until = time.monotonic() + self.seconds
        threads = [threading.Thread(target=self._client, args=[until]) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        memory = []
        while time.monotonic() < until:
            time.sleep(self.seconds / 20)
            memory.append(self.process.memory_info().rss / 2**20)
        for thread in threads:
            thread.join()
        self.process.terminate()
        status = self.process.wait(120)
        return {
            "clients": self.clients,
            "answers": len(self.wholes),
            "failures": self.failures,
            "exit status after SIGTERM": status,
            "seconds to the first token": percentiles(self.firsts),
            "seconds of an answer": percentiles(self.wholes),
            "MiB after a quarter of the time": memory[len(memory) // 4],
            "MiB at the end": memory[-1],
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """Half, 99 of 100, and all of the values are at most so large."""
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "maximum": ordered[-1],
    }


def main() -> None:
    """Measures one of the two and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a decoder; default: random weights")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--written", type=int, default=WRITTEN, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--load", type=Path, help="a finished run: measure the service under many clients instead")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    before = setting(["torch", "transformers"])
    if given.load is not None:
        found = {"load": Load(given.load, given.clients, given.seconds).run()}
    else:
        torch.set_num_threads(given.threads)
        sides = Sides(model_of(given.model), given.written)
        sides.check()
        found = {"figures": rates(sides, given.repetitions), "threads": given.threads}
        sides.engine.close()
    text = json.dumps({**before, **found}, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text)


if __name__ == "__main__":
    main()
