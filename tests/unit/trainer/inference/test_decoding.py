"""Settings of decoding that mean nothing are refused, by name."""

import math

import pytest

from configs.errors import InputError
from trainer.inference.decoding import Decoding, with_settings


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give 1 or more"),
        ({"temperature": -0.1}, "temperature is -0.1; give 0 or more"),
        ({"temperature": math.nan}, "temperature is nan; give 0 or more"),
        ({"temperature": math.inf}, "temperature is inf; give 0 or more"),
        ({"top_k": -1}, "top_k is -1; give 0"),
        ({"top_p": 0.0}, "top_p is 0.0; give a number above 0"),
        ({"top_p": 1.1}, "top_p is 1.1; give a number above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; give a number above 0"),
        ({"beams": 0}, "beams is 0; give 1 to 64"),
        ({"stop": ("",)}, "stop is"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"beams": 2, "temperature": 0.5}, "temperature is 0.5 with 2 beams, which draw nothing"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, line):
    with pytest.raises(InputError) as refused:
        Decoding(**settings)
    assert str(refused.value).startswith(line)


def test_settings_are_read_as_a_person_writes_them():
    found = with_settings(
        Decoding(temperature=0.8), ["beams=4", "stop=Q: =", 'stop="\\n"', "top_p=1", "max_new_tokens=7"]
    )
    assert found == Decoding(7, temperature=0.0, beams=4, stop=("Q: =", "\n"))


@pytest.mark.parametrize("text", ["top_k", "colour=red", "top_k=1.5", "top_p=much", 'stop="', "=1", "beams=9999"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(InputError, match=r"; give |: give "):
        with_settings(Decoding(), [text])
