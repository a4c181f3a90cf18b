"""What a refusal says, to a person and to a program, and that it says so in another process too."""

import pickle

from configs.errors import LARGEST_ECHO, PolicyRefusal


def parts(refusal):
    return str(refusal), refusal.rule, refusal.asked, refusal.allowed


def test_a_refusal_repeats_what_was_asked_in_part_only():
    asked = "x" * LARGEST_ECHO
    refusal = PolicyRefusal.of("max_lora_rank", asked + "beyond", "1 to 8")
    assert parts(refusal) == (f"max_lora_rank: asked {asked}, allowed 1 to 8", "max_lora_rank", asked, "1 to 8")


def test_a_refusal_with_words_of_its_own_begins_with_its_rule():
    refusal = PolicyRefusal.of("closed", "run-1", "an open run", "run run-1 is closed")
    assert parts(refusal) == ("closed: run run-1 is closed", "closed", "run-1", "an open run")


def test_a_refusal_travels_between_processes_whole():
    for refusal in (PolicyRefusal.of("rule", "9", "8"), PolicyRefusal("words", rule="rule", asked="9", allowed="8")):
        travelled = pickle.loads(pickle.dumps(refusal))
        assert type(travelled) is PolicyRefusal
        assert parts(travelled) == parts(refusal)
        assert travelled.exit_status == 3
