"""`siloweave serve` as a process: OpenAI's own client, clients that go away or hang, and an end under load."""

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import grpc
import httpx
import openai
import pytest
from served_models import CONTEXT, a_federation, a_labelling_run, a_model
from service_client import SECRET
from service_process import WAIT_S, client, idle, serving

from cluster.serving.rpc import serving_pb2 as pb
from cluster.serving.rpc import serving_pb2_grpc

TOKENS = 300  # of an answer that lasts for a while


def prompt_tokens(url):
    """Of all requests that were accepted."""
    lines = httpx.get(f"{url}/metrics", timeout=WAIT_S).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('siloweave_tokens_total{kind="prompt"'))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return a_model(tmp_path_factory.mktemp("models") / "ship")


@pytest.fixture(scope="module")
def service(base, tiny_run, tmp_path_factory):
    run = a_federation(tmp_path_factory.mktemp("runs") / "clinic", base, 1)
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("key-of-the-clinic-0001\n")
    keys.chmod(0o600)
    with serving(base, run, tiny_run.directory, "--slots", 2, "--api-keys", keys) as (process, said):
        yield process, said["url"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        assert SECRET not in errors
        assert errors.splitlines() == ["serve: stopped"]


KEY = "key-of-the-clinic-0001"


def test_openais_client_gets_models_texts_and_chats(service, tiny_run):
    _, url = service
    found = {one.id: one for one in client(url, KEY).models.list()}
    assert list(found) == ["ship", "clinic", "tiny"]
    certificate = json.loads((tiny_run.directory / "federated" / "certificate.json").read_text())
    privacy = found["tiny"].privacy
    assert privacy["epsilon"] == certificate["headline"]["epsilon"]
    assert f"certificate {privacy['certificate']}" in privacy["line"]
    assert found["ship"].privacy["epsilon"] is None
    asked = {"prompt": f"the {SECRET} ship", "max_tokens": 20, "temperature": 0}
    texts = {}
    for name in found:
        whole = client(url, KEY).completions.create(model=name, **asked)
        events = client(url, KEY).completions.create(model=name, stream=True, **asked)
        texts[name] = whole.choices[0].text
        assert "".join(event.choices[0].text for event in events) == texts[name]
    assert texts["ship"] != texts["clinic"]
    dialogue = [{"role": "user", "content": SECRET}]
    chat = {"model": "clinic", "messages": dialogue, "seed": 3, "max_completion_tokens": 20}
    spoken = client(url, KEY).chat.completions.create(**chat)
    events = client(url, KEY).chat.completions.create(stream=True, stream_options={"include_usage": True}, **chat)
    *pieces, last = list(events)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == spoken.choices[0].message.content
    assert last.usage == spoken.usage


def test_openais_client_understands_refusals(service):
    _, url = service
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        client(url).models.list()
    with pytest.raises(openai.NotFoundError, match="no such model here"):
        client(url, KEY).completions.create(model="none", prompt="a")
    with pytest.raises(openai.BadRequestError, match="shorten one of them"):
        client(url, KEY).completions.create(model="ship", prompt="a", max_tokens=CONTEXT)


def test_who_goes_away_or_does_not_listen_frees_the_slot(service):
    _, url = service
    asked = {"model": "ship", "prompt": "the old ship", "max_tokens": CONTEXT - 10, "temperature": 0}
    leaving = client(url, KEY).completions.create(stream=True, **asked)
    next(iter(leaving))
    leaving.close()
    with pytest.raises(openai.APITimeoutError):  # gone while it waits for the whole
        client(url, KEY).with_options(timeout=0.1).completions.create(**asked)
    body = json.dumps({**asked, "stream": True})
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as deaf:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        deaf.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        assert deaf.recv(12) == b"HTTP/1.1 200"  # and reads no more
        idle(url)


def test_what_is_accepted_is_finished_after_sigterm_and_no_more_is_taken(base):
    with (
        serving(base, "--slots", 2, "--grpc-port", 0) as (process, said),
        ThreadPoolExecutor(6) as clients,
        grpc.insecure_channel(said["grpc"]) as channel,
    ):
        stub = serving_pb2_grpc.ServingStub(channel)
        url, begun = said["url"], Barrier(3)

        def stream(number):
            asked = {"model": "ship", "prompt": "the old ship", "max_tokens": TOKENS, "seed": number}
            events = iter(client(url).completions.create(stream=True, **asked))
            first = next(events)
            if number < 2:
                begun.wait(timeout=WAIT_S)
            return "".join(event.choices[0].text for event in (first, *events)), number

        def stream_by_grpc(number):
            how = pb.Sampling(max_tokens=TOKENS, seed=number)
            request = pb.CompletionRequest(model="ship", prompt="the old ship", sampling=how)
            return "".join(piece.text for piece in stub.StreamComplete(request, timeout=WAIT_S)), number

        going = [clients.submit(stream, number) for number in range(2)]
        begun.wait(timeout=WAIT_S)  # both slots are taken, and what comes now waits
        prompt_tokens_of_one = prompt_tokens(url) / 2
        waiting = [clients.submit(stream, number) for number in range(2, 4)]
        waiting.append(clients.submit(stream_by_grpc, 4))
        while prompt_tokens(url) < 5 * prompt_tokens_of_one:
            pass
        os.kill(process.pid, signal.SIGTERM)
        while httpx.get(f"{url}/health", timeout=WAIT_S).json()["status"] != "stopping":
            pass
        with pytest.raises(openai.InternalServerError, match="is stopping") as refused:
            client(url).completions.create(model="ship", prompt="a")
        assert refused.value.status_code == 503
        with pytest.raises(grpc.RpcError, match="is stopping") as turned_away:
            stub.Complete(pb.CompletionRequest(model="ship", prompt="a"), timeout=WAIT_S)
        assert turned_away.value.code() is grpc.StatusCode.UNAVAILABLE
        texts = [future.result(timeout=WAIT_S) for future in (*going, *waiting)]
        assert [number for _, number in texts] == [0, 1, 2, 3, 4]
        assert all(text for text, _ in texts)
        assert process.wait(timeout=WAIT_S) == 0


def test_a_model_that_gives_labels_is_served_alone(base, tmp_path):
    run, _, _ = a_labelling_run(tmp_path / "reviews", base, "classification", ("bad", "good"))
    with serving(run) as (process, said):
        asked = {"model": "reviews", "records": [{"text": f"the {SECRET} ship"}, {"text": "an island"}]}
        found = httpx.post(f"{said['url']}/predict", json=asked, timeout=WAIT_S).json()["predictions"]
        assert [sum(one["probabilities"].values()) for one in found] == pytest.approx([1, 1], abs=1e-5)
        assert all(one["answer"] == max(one["probabilities"], key=one["probabilities"].get) for one in found)
        with pytest.raises(openai.BadRequestError, match="ask it at /predict"):
            client(said["url"]).completions.create(model="reviews", prompt=SECRET)
        assert httpx.get(said["url"], timeout=WAIT_S).text.startswith("<!doctype html>")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, errors) == (0, "serve: stopped\n")


def test_a_taken_port_and_a_missing_model_end_with_one_line(siloweave, base, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        taken = siloweave("serve", str(base), "--port", port, cwd=tmp_path)
    assert (taken.returncode, taken.stdout) == (2, "")
    assert taken.stderr == f"error: --port {port}: 127.0.0.1 has a service there already; give another port, or 0\n"
    open_to_all = siloweave("serve", str(base), "--host", "0.0.0.0", cwd=tmp_path)
    assert open_to_all.returncode == 2
    assert open_to_all.stderr.endswith("give --api-keys too\n")
