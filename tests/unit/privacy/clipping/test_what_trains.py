"""Whatever of a model trains, its clipped sum is that of a loop over single records, and the proof at start holds."""

import pytest
import torch
from model_families import VOCABULARY, bert, gpt2, llama, masked, next_token, t5, translated
from per_record import assert_equal, fixed, oracle
from transformers import AutoModelForMaskedLM

from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from privacy.clipping.self_check import prove_per_record_gradients
from trainer.models.adapters import Adaptation, adapted, trainable

FAMILIES = {
    "llama": (llama, next_token),
    "llama, tied": (lambda: llama(tied=True), next_token),
    "gpt2": (gpt2, next_token),
    "bert": (lambda: bert(AutoModelForMaskedLM), masked),
    "t5": (lambda: t5(tied=False), translated),
}
CASES = [
    ("llama", Adaptation(3, 6.0, "full")),
    ("llama", Adaptation(3, 6.0, "head")),
    ("llama", Adaptation(3, 6.0, targets=("q_proj", "lm_head"))),
    ("llama, tied", Adaptation(3, 6.0, "full")),
    ("gpt2", Adaptation(3, 6.0, "full")),
    ("gpt2", Adaptation(3, 6.0, "bitfit")),
    ("gpt2", Adaptation(3, 6.0, targets=("c_attn",))),
    ("bert", Adaptation(3, 6.0, "bitfit")),
    *((family, Adaptation(3, 6.0, base_dtype="bfloat16")) for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_clipped_sum_is_that_of_a_loop_over_single_records(family, how):
    make, losses_of = FAMILIES[family]
    model = adapted(make(), how, seed=2).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in trainable(model).items():
            if "lora_B" in name or name.endswith("bias"):  # zero at the start, and with it A's gradient
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    losses, records = losses_of(model), list(torch.randint(1, VOCABULARY, (7, 9), generator=generator))

    def made_up(_, number):
        return list(torch.randint(1, VOCABULARY, (number, 9), generator=generator))

    with clipping(model, 0.5) as clipper:
        prove_per_record_gradients(clipper, losses, records[:3])
        for units in Together(clipper, losses, len, made_up, 16).cut(records):
            clipper.accumulate(losses, units)
        found = clipper.take()
    assert set(found) == set(trainable(model))
    assert_equal(found, oracle(model, losses, records, fixed(0.5)))
