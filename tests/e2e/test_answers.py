"""What a finished model answers, by the commands that ask it."""

import json
import subprocess


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    ours, merged = (rows_of(tmp_path / f"{name}.jsonl") for name in ("run", "merged"))
    assert ours == merged
    assert [row["text"] for row in ours] == ["What is", "the <|endoftext|> king"]
    assert all(row["prediction"] for row in ours)


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
