"""A student of fewer layers, and what it learns: its teacher's words for public text, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from small_models import FAMILIES, IDS, a_model, logits

from configs.errors import InputError
from trainer.data.packing import TokenFile
from trainer.models.load import read_model
from trainer.models.recurrent import RecurrentForCausalLM
from trainer.optimisation.distilling import distil, divergence, student_of
from trainer.tasks.text import CausalTask


@pytest.mark.parametrize(("family", "task"), [("llama", "causal"), ("gpt2", "chat"), ("bert", "classification")])
def test_a_student_has_evenly_spaced_layers_and_loads_again(family, task, tmp_path):
    teacher = a_model(family, layers=5)
    whole = logits(teacher)
    student = student_of(teacher, task, 0.4)
    assert torch.equal(logits(teacher), whole)
    parts = FAMILIES[family][0].split(".1.")
    for place, of in enumerate((0, 2, 4)):
        own, other = (
            model.get_submodule(f"{parts[0]}.{number}.{parts[1]}").weight
            for model, number in ((student, place), (teacher, of))
        )
        assert torch.equal(own, other)
    student.save_pretrained(tmp_path)
    assert torch.allclose(logits(read_model(tmp_path, "here")), logits(student), atol=1e-5)
    assert read_model(tmp_path, "here").config.num_hidden_layers == 3


def test_a_student_writes_with_a_cache_what_it_writes_without_one():
    student = student_of(a_model("llama", layers=4), "causal", 0.5)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(student.generate(IDS, **settings, use_cache=use) for use in (True, False)))


def test_what_has_no_student_is_refused():
    with pytest.raises(InputError, match=r"--share 0\.1: of 2 layers that is none"):
        student_of(a_model("llama"), "causal", 0.1)
    with pytest.raises(InputError, match="not known for a LlamaForCausalLM of the task 'translation'"):
        student_of(a_model("llama"), "translation", 0.5)


def test_a_recurrent_student_loads_again(tmp_path):
    torch.manual_seed(0)
    config = RecurrentForCausalLM.config_class(vocab_size=50, hidden_size=16, num_hidden_layers=3)
    student = student_of(RecurrentForCausalLM(config).eval(), "causal", 0.5)
    student.save_pretrained(tmp_path)
    assert torch.allclose(logits(read_model(tmp_path, "here")), logits(student), atol=1e-5)


def test_the_divergence_is_kullback_and_leiblers():
    torch.manual_seed(0)
    said, told = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    p, q = torch.distributions.Categorical(logits=told), torch.distributions.Categorical(logits=said)
    by_token = torch.distributions.kl_divergence(p, q)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert divergence(said, told).item() == pytest.approx(by_token.mean().item(), rel=1e-5)
    assert divergence(said, told, mask).item() == pytest.approx(by_token[mask.bool()].mean().item(), rel=1e-5)
    assert divergence(told, told).item() == pytest.approx(0, abs=1e-6)
    p, q = torch.distributions.Bernoulli(logits=told[0]), torch.distributions.Bernoulli(logits=said[0])
    several = torch.distributions.kl_divergence(p, q).sum(dim=1).mean()
    assert divergence(said[0], told[0], several=True).item() == pytest.approx(several.item(), rel=1e-5)


class _Words:
    eos_token_id = bos_token_id = 0
    all_special_ids = ()

    def __len__(self):
        return 50


def test_a_student_learns_what_its_teacher_says_and_the_teacher_stays(tmp_path):
    torch.manual_seed(0)
    np.random.default_rng(0).integers(0, 50, 64 * 16).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    file = TokenFile(tmp_path / "tokens.bin", 16, np.dtype(np.uint16))
    teacher, losses = a_model("llama", layers=3), []
    before, student = copy.deepcopy(teacher.state_dict()), student_of(teacher, "causal", 0.34)
    distil(teacher, student, CausalTask(_Words(), 16), None, file, 80, 0, lambda _step, loss: losses.append(loss))
    assert len(losses) == 80
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    again = student_of(teacher, "causal", 0.34)
    distil(teacher, again, CausalTask(_Words(), 16), None, file, 80, 0)
    assert torch.allclose(logits(again), logits(student), atol=1e-4), "the same seed, the same student"
