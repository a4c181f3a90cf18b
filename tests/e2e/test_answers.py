"""What a finished model answers, by the commands that ask it."""

import json
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.serving.models import find
from configs.storage.files import digest_file
from configs.storage.manifests import require_manifest


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy(model, tokenizer, prompt, tokens):
    """What a model may answer greedily: with all tokens that tie, up to how merging and batches round."""
    paths = [prompt]
    for _ in range(tokens):
        with torch.no_grad():
            scores = [(path, model(input_ids=path).logits[0, -1]) for path in paths]
        paths = [
            torch.cat([path, next_one.view(1, 1)], dim=1)
            for path, found in scores
            for next_one in (found >= found.max() - 1e-4).nonzero()
        ]
    return [tokenizer.decode(path[0, prompt.shape[1] :], skip_special_tokens=True) for path in paths]


def test_a_run_and_its_merged_model_answer_a_file_alike(tiny_run, siloweave, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "What is"}\n{"text": 1}\n{"text": "the <|endoftext|> king"}\n')
    siloweave("merge", str(tiny_run.directory), "--output", str(tmp_path / "merged"), cwd=tmp_path)
    settings = str(tiny_run.directory / "config.toml")
    for name, model in {"run": [str(tiny_run.directory)], "merged": ["merged", "-c", settings]}.items():
        files = ("--input", "in.jsonl", "--output", f"{name}.jsonl", "--max-new-tokens", "8")
        done = siloweave("predict", *model, *files, "--json", cwd=tmp_path)
        said = json.loads(done.stdout)
        assert (said["records"], said["bad"]) == (3, 1)
    model, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.backend_tokenizer.encode_special_tokens = True  # in a text they are text
    ours, merged = (rows_of(tmp_path / f"{name}.jsonl") for name in ("run", "merged"))
    assert [row["text"] for row in ours] == [row["text"] for row in merged] == ["What is", "the <|endoftext|> king"]
    for one, other in zip(ours, merged, strict=True):
        prompt = tokenizer(one["text"], return_tensors="pt").input_ids
        may_be = greedy(model.eval(), tokenizer, prompt, 8)
        assert one.keys() == other.keys()
        assert {one["prediction"], other["prediction"]} <= set(may_be) - {""}
        assert one["prediction"] + "x" not in may_be


def test_a_run_is_pruned_and_its_certificate_speaks_of_the_result(tiny_run, siloweave, tmp_path):
    federation = tiny_run.directory / "federated"
    options = ("--method", "prune", "--share", "0.5", "--output", str(tmp_path / "pruned"), "--json")
    done = siloweave("optimise", str(tiny_run.directory), *options, cwd=tiny_run.root)
    assert done.returncode == 0, done.stderr
    said, pruned = json.loads(done.stdout), tmp_path / "pruned"
    assert said["inputs"]["federated"] == require_manifest(federation, "federated", "federate").content_digest
    assert said["inputs"]["certificate"] == digest_file(pruned / "certificate.json")
    assert (said["read"], said["records"] > 20) == ("the public silos", True)
    assert said["after"]["zeros"] > said["before"]["zeros"] + 0.1
    assert said["after"]["bits_per_char"] != said["before"]["bits_per_char"]  # of so little training it may be better
    final = json.loads((tiny_run.directory / "evaluation.json").read_text())["federated"][-1]
    assert said["before"]["bits_per_char"] == pytest.approx(final["bits_per_char"], rel=1e-4)
    epsilon = json.loads((federation / "certificate.json").read_text())["headline"]["epsilon"]
    assert find(str(pruned), None).claim.epsilon == epsilon
    again = siloweave("optimise", str(tiny_run.directory), *options, cwd=tiny_run.root)
    assert (again.returncode, "pruned: exists; give a path" in again.stderr) == (2, True)
    (tmp_path / "in.jsonl").write_text('{"text": "What is"}\n')
    settings = str(tiny_run.directory / "config.toml")
    files = ("--input", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", "4")
    assert siloweave("predict", str(pruned), "-c", settings, *files, cwd=tmp_path).returncode == 0
    assert rows_of(tmp_path / "out.jsonl")[0]["prediction"]


def test_a_chat_says_what_the_model_gives_away(tiny_run):
    command = [str(tiny_run.programs / "siloweave"), "chat", str(tiny_run.directory), "--decode", "max_new_tokens=8"]
    said = b"What is\n/reset\nbad \xff byte\n/exit\n"
    done = subprocess.run(command, input=said, capture_output=True, timeout=120, check=True)
    lines = done.stdout.decode().splitlines()
    epsilon = json.loads((tiny_run.directory / "federated" / "certificate.json").read_text())["headline"]["epsilon"]
    assert lines[0].startswith(f"privacy: epsilon {epsilon:.4g} at delta ")
    assert "no chat template" in lines[1]
    assert done.stdout.decode().count("> ") >= 4
    assert not done.stderr


def test_prompts_of_a_file_are_answered_in_order(tiny_run, siloweave, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is\n\nthe king\n")
    options = ("--prompts", str(prompts), "--decode", "beams=2", "--decode", "max_new_tokens=6", "--json")
    texts = json.loads(siloweave("generate", "-c", "tiny", *options, cwd=tiny_run.root).stdout)["texts"]
    assert [text[:7] for text in texts] == ["What is", "the kin"]
