"""`siloweave serve` as a process, and who asks it."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

WAIT_S = 300.0  # ends a wait for what will not come, however slow the machine is


@contextmanager
def serving(*arguments):
    """The command, until it serves; with its address and what it has said of its models."""
    command = [str(Path(sys.executable).with_name("siloweave")), "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        assert said, process.stderr.read()
        yield process, json.loads(said)
    finally:
        process.kill()
        process.wait()


def client(url, key="no key"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


def idle(url, key="no key"):
    """Waits until no request has a slot, nor waits for one."""
    while True:
        found = httpx.get(f"{url}/health", timeout=WAIT_S).json()
        if found["running"] == found["waiting"] == 0:
            return
