"""What a model writes: a text that goes on with the prompt, or an answer below it; or nothing, where it learnt none."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from configs.schema.tasks import TaskSpec
from trainer.data.embedded import python_docs
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.generation import generate
from trainer.tasks.classification import ClassificationTask
from trainer.tasks.task import WritingTask
from trainer.tasks.text import CausalTask


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((row["text"] for row, _ in zip(python_docs(), range(20), strict=False)), 300, folder)
    return load_tokenizer(folder)


def small(seed=1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return AutoModelForCausalLM.from_config(config).eval()


def written(task, tokenizer, prompt, seed=0):
    pieces = []
    text = generate(small(), task, tokenizer, prompt, 12, 0.8, seed, pieces.append)
    assert "".join(pieces) == text
    return text


def test_a_text_goes_on_with_its_prompt_and_is_the_same_for_a_seed(tokenizer):
    task = CausalTask(tokenizer, 64)
    text = written(task, tokenizer, "What is")
    assert text.startswith("What is")
    assert len(text) > len("What is")
    assert text == written(task, tokenizer, "What is")
    assert text != written(task, tokenizer, "What is", seed=1)


def test_what_a_prompt_spells_is_text(tokenizer):
    opening = CausalTask(tokenizer, 64).opening("a <|endoftext|> b")
    assert opening.ends == (tokenizer.eos_token_id,)
    assert tokenizer.eos_token_id not in opening.ids[1:]


def test_a_task_with_labels_teaches_no_writing(tokenizer):
    spec = TaskSpec(name="classification", labels=("no", "yes"))
    assert not isinstance(ClassificationTask(tokenizer, 64, spec), WritingTask)
