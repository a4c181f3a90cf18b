"""Every objective against transformers' own losses, and its examples against what can be read from the windows."""

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from configs.load import load
from trainer.data.packing import Document, TokenFile, Windows, pack
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.models.families import new_model
from trainer.objectives import span_corruption
from trainer.objectives.masked import Words
from trainer.objectives.objective import new_objective
from trainer.objectives.pieces import IGNORED

LENGTH, SIZE = 48, 320
OBJECTIVES = {
    "causal": ["model.family=lstm"],
    "masked": ["model.family=bert"],
    "next_sentence": ["model.family=bert", "pretrain.objective=next_sentence"],
    "span_corruption": ["model.family=t5"],
}
NAMES = ("harbour", "lighthouse", "sailor", "crew", "captain", "storm", "island", "mast")
TEXTS = [
    f"The {a} and the {b} met {number} times, near {c}: " + "what they said was short! " * (number % 4)
    for number, (a, b, c) in enumerate(combinations(NAMES, 3))
]
TEXTS += [f"{name} {number}!" for number, name in enumerate(NAMES * 4)]


def config_of(objective, *more):
    overrides = [f"tokenizer.vocab_size={SIZE}", f"model.context_length={LENGTH}", *OBJECTIVES[objective], *more]
    return load("tiny", overrides)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizer, and windows of both packings, of an objective."""
    known = {}

    def make(objective, packing="concatenate"):
        if (objective, packing) not in known:
            folder = tmp_path_factory.mktemp(f"{objective}-{packing}")
            train_tokenizer(TEXTS, SIZE, folder, objective, LENGTH)
            tokenizer = load_tokenizer(folder)
            ids = [np.array([*tokenizer.encode(text, add_special_tokens=False), 0], np.uint16) for text in TEXTS]
            path = folder / "tokens.bin"
            documents = [Document(one, len(text)) for one, text in zip(ids, TEXTS, strict=True)]
            pack(documents, path, LENGTH, packing, np.dtype("<u2"))
            file = TokenFile(path, LENGTH, np.dtype("<u2"))
            known[objective, packing] = folder, tokenizer, file
        return known[objective, packing]

    return make


def windows_of(file, numbers, **more):
    numbers = np.array(numbers)
    return Windows((file,) * len(numbers), numbers % file.num_windows, numbers, **more)


def tensors(examples):
    return {name: torch.from_numpy(array) for name, array in examples.inputs.items()}


def model_of(config):
    return new_model(config.model, SIZE, 3, objective=config.objective).eval()


def transformers_loss(model, objective, inputs):
    """What transformers itself makes of the same examples: means, each over its own targets."""
    given = {name: value for name, value in inputs.items() if name not in ("targets", "answers", "decoder_input_ids")}
    if objective == "next_sentence":
        return model(**given, labels=inputs["targets"], next_sentence_label=inputs["answers"][:, 0]).loss
    return model(**given, labels=inputs["targets"]).loss  # T5 makes the decoder's inputs of them by itself


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("objective", ["masked", "next_sentence", "span_corruption"])
def test_the_loss_is_transformers_own(objective, packing, made):
    folder, _, file = made(objective, packing)
    config = config_of(objective)
    model, chosen = model_of(config), new_objective(config, folder)
    examples = chosen.examples(windows_of(file, range(6)))
    with torch.no_grad():
        sums = chosen.sums(model, tensors(examples))
        expected = transformers_loss(model, objective, tensors(examples))
    assert (sums / torch.tensor(examples.counts)).sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(sums) == chosen.terms == len(examples.counts)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_piece_of_a_document_sees_another(objective, made):
    """The loss of packed documents is that of each piece by itself, without any mask."""
    folder, _, file = made(objective, "documents")
    config = config_of(objective)
    model, chosen = model_of(config), new_objective(config, folder)
    examples = chosen.examples(windows_of(file, range(5)))
    inputs = tensors(examples)
    targets = inputs["targets"]
    asked = (targets != IGNORED).sum(dim=1)
    seen = inputs.get("attention_mask", torch.ones_like(targets)).sum(dim=1) if objective != "causal" else asked + 1
    written = asked if objective == "span_corruption" else seen
    lengths = {
        "input_ids": seen,
        "tokens": seen,
        "token_type_ids": seen,
        "targets": written,
        "answers": [1] * len(seen),
    }
    alone = 0
    with torch.no_grad():
        for row in range(len(targets)):
            own = {name: inputs[name][row : row + 1, : size[row]] for name, size in lengths.items() if name in inputs}
            if objective == "span_corruption":
                own["decoder_input_ids"] = inputs["decoder_input_ids"][row : row + 1, : written[row]]
            alone = alone + chosen.sums(model, own)
        together = chosen.sums(model, inputs)
    assert together.tolist() == pytest.approx(alone.tolist(), rel=1e-5)
    if objective != "next_sentence":  # which takes the longest piece of a window
        assert len(targets) == sum(len(piece) > 1 for window in range(5) for piece in _pieces(file, window)) > 7


def _pieces(file, window):
    index = np.array([window])
    starts = np.flatnonzero(file.positions(index)[0] == 0)
    return np.split(file.windows(index)[0], starts[1:])


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_examples_hang_on_the_seed_and_the_number_alone(objective, packing, made):
    folder, _, file = made(objective, packing)
    chosen = new_objective(config_of(objective), folder)

    def content(numbers, objective=chosen, **more):
        """Of each window by itself, without what pads it beside others."""
        parts = [objective.examples(windows_of(file, [number], **more)) for number in numbers]
        return [({name: value.tolist() for name, value in part.inputs.items()}, part.counts) for part in parts]

    numbers = [*range(8)]
    whole = content(numbers)
    for world_size in (2, 4):
        for rank in range(world_size):
            assert content(numbers[rank::world_size]) == whole[rank::world_size]
    together = chosen.examples(windows_of(file, numbers))
    assert together.counts == np.sum([counts for _, counts in whole], axis=0).tolist()
    rows = [row for inputs, _ in whole for row in inputs["targets"]] if "targets" in together.inputs else []
    for row, alone in zip(together.inputs.get("targets", ()), rows, strict=True):
        assert row[: len(alone)].tolist() == alone
        assert (row[len(alone) :] == IGNORED).all()
    if objective != "causal":
        assert content(numbers, new_objective(config_of(objective, "run.seed=1"), folder)) != whole
        assert content([number + file.num_windows for number in numbers]) != whole  # the next epoch
        assert content(numbers, held_out=True) != whole
        assert content(numbers, held_out=True) == content(numbers, held_out=True)


def test_words_are_those_that_the_tokenizer_cuts_a_text_into(made):
    _, tokenizer, _ = made("masked")
    words = Words(tokenizer)
    for text in (
        *TEXTS,
        "Größe über 12,5 Meter; naïve Leute!",
        "x=3;y=44 (ok)\n\nnew  line",
        "a much-too-longwordforus",
    ):
        encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        counts = [count for _, count in sorted(Counter(encoded.word_ids).items())]
        expected = [size for count in counts for size in ([count] if count <= 10 else [1] * count)]
        assert [len(word) for word in words.of(np.array(encoded.ids))] == expected
    chinese = np.array(tokenizer.encode("我们在岛上看见了三座很高的灯塔和许多船", add_special_tokens=False))
    assert {len(word) for word in words.of(chinese)} == {1}  # a sentence is no word
    assert [word.tolist() for word in words.of(np.array([0, *chinese[:1], 0]))] == [[1]]


def test_fifteen_percent_are_hidden_in_whole_words_eighty_ten_ten(made):
    folder, tokenizer, file = made("masked")
    words, chosen = Words(tokenizer), new_objective(config_of("masked"), folder)
    fates, shares = Counter(), []
    for number in range(60 * file.num_windows):
        windows = windows_of(file, [number])
        examples = chosen.examples(windows)
        original, seen, targets = windows.tokens[0], examples.inputs["input_ids"][0], examples.inputs["targets"][0]
        hidden = targets != IGNORED
        assert (targets[hidden] == original[hidden]).all()
        assert (seen[~hidden] == original[~hidden]).all()
        assert (original[hidden] > 1).all()
        groups = words.of(original)
        assert all(hidden[word].all() or not hidden[word].any() for word in groups)
        most = round(0.15 * sum(map(len, groups)))
        assert 0 < hidden.sum() <= max(most, *map(len, groups))
        shares.append(hidden.sum() / sum(map(len, groups)))
        fates["hidden"] += (seen[hidden] == 1).sum()
        fates["kept"] += (seen[hidden] == original[hidden]).sum()
        fates["all"] += hidden.sum()
        assert (seen[hidden] > 0).all()
    total = fates["all"]
    assert np.mean(shares) == pytest.approx(0.15, abs=0.02)
    # Four standard errors. Of the tenth that any token replaces, one in 318 is the same again.
    assert fates["hidden"] / total == pytest.approx(0.8, abs=4 * (0.16 / total) ** 0.5)
    assert fates["kept"] / total == pytest.approx(0.1003, abs=4 * (0.09 / total) ** 0.5)


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_half_of_the_pairs_go_on_inside_a_document(packing, made):
    folder, _, file = made("next_sentence", packing)
    chosen = new_objective(config_of("next_sentence"), folder)
    documents = [bytes(np.array(row, "<u2")) for row in _documents(file)]
    answers = []
    for number in range(20 * file.num_windows):
        examples = chosen.examples(windows_of(file, [number]))
        ids, targets = examples.inputs["input_ids"][0], examples.inputs["targets"][0]
        ids = np.where(targets == IGNORED, ids, targets)
        ends, kinds = np.flatnonzero(ids == 0), examples.inputs["token_type_ids"][0]
        assert len(ids) <= LENGTH
        assert (len(ends), ends[0], ends[-1]) == (3, 0, len(ids) - 1)
        assert kinds.tolist() == [0] * (ends[1] + 1) + [1] * (len(ids) - ends[1] - 1)
        first, second = (bytes(np.array(ids[a + 1 : b], "<u2")) for a, b in pairwise(ends))
        answers.append(int(examples.inputs["answers"][0, 0]))
        assert any(first in document for document in documents)
        assert any(second in document for document in documents)
        if answers[-1] == 0:
            assert any(first + second in document for document in documents)
        assert examples.counts == [(targets != IGNORED).sum(), 1]
    assert np.mean(answers) == pytest.approx(0.5, abs=2 / len(answers) ** 0.5)


def _documents(file):
    """The documents, or their pieces, as the windows hold them."""
    everything = np.arange(file.num_windows)
    tokens, positions = file.windows(everything).reshape(-1), file.positions(everything)
    starts = np.flatnonzero(tokens == 0) + 1 if positions is None else np.flatnonzero(positions.reshape(-1) == 0)
    return np.split(tokens, starts)


def test_spans_put_back_give_the_text_again():
    generator = np.random.default_rng(0)
    for length in (2, 3, 7, 20, LENGTH, 128, 512):
        for _ in range(50):
            ids = generator.integers(100, 200, size=length)
            left, cut = span_corruption.corrupt(ids, generator)
            noise = max(1, round(0.15 * length))
            spans = max(1, round(noise / 3))
            assert (left[-1], cut[-1]) == (0, 0)
            assert left[left < 100].tolist() == cut[cut < 100].tolist() == [*range(1, spans + 1), 0]
            by_sentinel = {
                part[0]: part[1:] for part in np.split(cut[:-1], np.flatnonzero(cut[:-1] < 100)) if len(part)
            }
            assert sum(map(len, by_sentinel.values())) == noise
            assert all(len(span) for span in by_sentinel.values())
            again = [token for part in left[:-1] for token in (by_sentinel[part] if part < 100 else [part])]
            assert again == ids.tolist()
            at = np.flatnonzero(left[:-1] < 100)
            assert at[0] > 0
            assert (np.diff(at) > 1).all()
            assert (len(left), len(cut)) == span_corruption.lengths(length)


def test_all_ways_to_cut_spans_are_equally_likely():
    generator, drawn = np.random.default_rng(0), 6000
    found = Counter(tuple(span_corruption._parts(5, 3, generator).tolist()) for _ in range(drawn))
    assert set(found) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert all(abs(count - drawn / 6) < 5 * (drawn * 5 / 36) ** 0.5 for count in found.values())
