"""A unit has several examples, and a step takes one."""

from privacy.mechanism.sampler import one_example_each
from privacy.mechanism.streams import Streams


def test_a_unit_gives_one_of_its_examples_by_a_draw_of_its_own():
    """Uniformly, and whatever the other units have."""
    streams = Streams(bytes(32), "ab" * 32)
    units = [["a"], ["b", "c", "d"], [], ["e", "f"]]
    drawn = [one_example_each(streams, step, units, range(4)) for step in range(3000)]
    assert {len(found) for found in drawn} == {3}  # nothing of a unit without examples
    assert {found[0] for found in drawn} == {"a"}
    for place, letters in ((1, "bcd"), (2, "ef")):
        counts = [sum(found[place] == letter for found in drawn) for letter in letters]
        expected = 3000 / len(letters)
        assert max(abs(count - expected) for count in counts) < 6 * expected**0.5
    others = [["x", "y"], units[1], ["z"], units[3]]
    assert [found[1:] for found in drawn] == [
        [found[1], found[3]] for found in (one_example_each(streams, step, others, range(4)) for step in range(3000))
    ]


def test_units_of_one_example_are_drawn_as_they_stand():
    assert one_example_each(Streams(bytes(32), "ab" * 32), 0, [[5], [6], [7]], [0, 2]) == [5, 7]


def test_what_a_unit_draws_to_change_its_example_is_its_own_alone():
    """Whoever else is chosen, whatever they have and however much they draw."""

    def augment(example, chance):
        return example, chance.random(len(example)).tolist()

    def of(units, chosen, step=3):
        found = one_example_each(Streams(bytes(32), "ab" * 32), step, units, chosen, augment)
        return {place: drawn for place, (_, drawn) in zip(chosen, found, strict=True)}

    units = [["aaa"], ["bbbb"], ["cc"]]
    alone, together = of(units, [1]), of(units, [0, 1, 2])
    assert alone[1] == together[1] == of([["x" * 99], units[1]], [0, 1])[1]
    assert len({draw for drawn in together.values() for draw in drawn}) == 9
    assert not set(of(units, [1], step=4)[1]) & set(alone[1])


def test_changes_choose_no_other_example():
    streams, units = Streams(bytes(32), "ab" * 32), [["a", "b", "c"]] * 50
    plain = one_example_each(streams, 0, units, range(50))
    assert one_example_each(streams, 0, units, range(50), lambda example, _: example) == plain
