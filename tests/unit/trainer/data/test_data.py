import json
from itertools import pairwise

import numpy as np
import pytest

from configs.errors import InputError, SiloweaveError
from configs.load import load
from configs.schema.schema import RunConfig
from trainer.data.batches import Batches, prove_disjoint
from trainer.data.cleaning import CleaningCounts, Copies, candidates, normalise
from trainer.data.embedded import plays, python_docs
from trainer.data.order import Order, merged, permuted
from trainer.data.packing import Document, TokenFile, best_fit, pack, train_tokens
from trainer.data.parts import Parts, one_after_the_other
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer, train_tokenizer

DTYPE = np.dtype("<u2")


def test_normalise():
    assert normalise("\n e\u0301\x00  a\t b \r\n\n\n\nend  ") == " \u00e9  a\t b\n\n\nend"


def test_cleaning_drops_short_exact_and_near_duplicates_and_keeps_the_first():
    text = "the quick brown fox jumps over the lazy dog and runs away into the deep dark forest " * 3
    near = text + "today"
    other = "an entirely different sentence about compilers, linkers and the strange life of symbols in object files"
    counts = CleaningCounts()
    found, copies = list(candidates(list(map(normalise, ["short", text, text + " \n", near, other])), 40)), Copies(0.8)
    kept = [(c.place, c.text) for c in found if copies.keep(c, counts)]
    assert kept == [(1, normalise(text)), (4, other)]
    assert [counts.exact_duplicates, counts.near_duplicates, counts.kept] == [1, 1, 2]


def test_the_embedded_texts_are_there():
    documents = [row["text"] for row in python_docs()]
    assert sum(map(len, documents)) > 1_500_000
    speeches = list(plays())
    assert {row["silo"] for row in speeches} == {"comedies", "histories", "problems", "roman", "romances", "tragedies"}
    assert len(speeches) > 30_000
    assert all("**" not in row["text"][:2] and not row["text"].startswith("#") for row in speeches)


def encoded(documents, tokenizer):
    for text in documents:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        yield Document(np.asarray(ids, dtype=np.uint16), len(text))


@pytest.fixture
def tokens(tmp_path):
    documents = [f"document number {i} speaks of the number {i * i}" for i in range(60)]
    tokenizer = train_tokenizer(documents, 300, tmp_path / "tokenizer")
    counts = pack(encoded(documents, tokenizer), tmp_path / "tokens.bin", 16, "concatenate", DTYPE)
    return documents, tokenizer, counts, tmp_path


def test_packed_tokens_read_back_as_the_documents(tokens):
    documents, tokenizer, counts, folder = tokens
    file = TokenFile(folder / "tokens.bin", 16, DTYPE)
    assert counts["tokens"] // 16 == file.num_windows == counts["windows"]
    assert counts["tokens"] - counts["tokens_kept"] < 16
    assert file.positions(np.arange(2)) is None
    stream = file.windows(np.arange(file.num_windows)).reshape(-1).tolist()
    texts = tokenizer.decode(stream).split("<|endoftext|>")
    assert texts[:50] == documents[:50]
    assert load_tokenizer(folder / "tokenizer").decode(stream) == tokenizer.decode(stream)


def test_the_tokenizer_is_byte_level(tokens):
    _, tokenizer, _, _ = tokens
    text = "na\u00efve \u65e5\u672c \U0001f600\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_documents_packed_whole_keep_every_token_and_know_their_places(tokens):
    documents, tokenizer, _, folder = tokens
    documents = [*documents, "one long document " * 30]
    counts = pack(encoded(documents, tokenizer), folder / "whole.bin", 32, "documents", DTYPE)
    file = TokenFile(folder / "whole.bin", 32, DTYPE)
    everything = np.arange(file.num_windows)
    ids, positions = file.windows(everything), file.positions(everything)
    whole = [document.ids.tolist() for document in encoded(documents, tokenizer)]
    expected = [tuple(ids[start : start + 32]) for ids in whole for start in range(0, len(ids), 32)]
    found = []
    for row, places in zip(ids, positions, strict=True):
        starts = [*np.flatnonzero(places == 0), 32]
        for a, b in pairwise(starts):
            assert places[a:b].tolist() == list(range(b - a))
            found.append(tuple(row[a:b]))
    padding = (int(tokenizer.eos_token_id),)  # alone, at position 0
    assert sorted(piece for piece in found if piece != padding) == sorted(p for p in expected if p != padding)
    assert counts["tokens_kept"] == counts["tokens"] == sum(map(len, whole))


@pytest.mark.parametrize("capacity", [8, 64])
def test_best_fit_fills_windows(capacity):
    drawn = np.random.default_rng(0).exponential(capacity / 4, 500).astype(int) + 1
    lengths = np.minimum(drawn, capacity).tolist()
    bins = best_fit(lengths, capacity)
    assert sorted(index for window in bins for index in window) == list(range(500))
    assert all(sum(lengths[index] for index in window) <= capacity for window in bins)
    assert len(bins) <= 1.02 * sum(lengths) / capacity + 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_the_shuffle_is_a_permutation_that_depends_on_its_key(size):
    numbers = np.arange(size)
    images = permuted(numbers, size, (0, 0, 0))
    assert sorted(images) == list(range(size))
    assert permuted(numbers[size // 2 :], size, (0, 0, 0)).tolist() == images[size // 2 :].tolist()
    if size > 10:
        assert (permuted(numbers, size, (0, 0, 1)) != images).mean() > 0.9
        assert abs(np.corrcoef(numbers, images)[0, 1]) < 4 / np.sqrt(size)
        assert (np.diff(images) == 1).mean() < 0.1


def test_a_shuffle_of_a_thousand_million_windows_starts_anywhere_at_once():
    order = Order([10**9, 10**8], [3, 1], 512, seed=0)
    corpora, windows = order.batch(10**7)
    assert windows[corpora == 0].max() < 10**9
    assert windows[corpora == 1].max() < 10**8
    assert len(set(zip(corpora, windows, strict=True))) == 512


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.5, 0.3, 0.2)])
def test_an_epoch_of_each_corpus_sees_every_window_once_and_the_next_in_another_order(weights):
    sizes = (24, 40, 16)[: len(weights)]
    order = Order(sizes, weights, 8, seed=0)
    drawn = [[] for _ in weights]
    for step in range(512):
        for corpus, window in zip(*order.batch(step), strict=True):
            drawn[corpus].append(int(window))
    for size, share, windows in zip(sizes, np.asarray(weights) / sum(weights), drawn, strict=True):
        assert len(windows) == pytest.approx(512 * 8 * share, abs=8)
        epochs = [windows[start : start + size] for start in range(0, len(windows) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_sample_depends_on_seed_step_and_place_alone():
    order = Order([37, 12], [1.0, 2.0], 8, seed=3)
    forwards = [np.stack(order.batch(step)) for step in range(300)]
    anew = [np.stack(Order([37, 12], [1.0, 2.0], 8, seed=3).batch(step)) for step in reversed(range(300))]
    assert all((a == b).all() for a, b in zip(forwards, reversed(anew), strict=True))
    assert any((np.stack(Order([37, 12], [1.0, 2.0], 8, seed=4).batch(s)) != forwards[s]).any() for s in range(9))


def test_skipped_batches_are_passed_over_and_nothing_else_moves():
    plain, skipping = Order([37], [1.0], 4, seed=0), Order([37], [1.0], 4, seed=0, skipped=[(9, 11), (3, 5), (4, 6)])
    numbers = [skipping.batch_number(step) for step in range(9)]
    assert numbers == [0, 1, 2, 6, 7, 8, 11, 12, 13]
    for step, number in enumerate(numbers):
        assert (skipping.batch(step)[1] == plain.batch(number)[1]).all()
    assert merged([(9, 11), (3, 5), (4, 6), (6, 7)]) == [(3, 7), (9, 11)]


def test_an_order_goes_on_with_each_corpus_where_another_one_has_left_it():
    sizes = [40, 30, 25]
    first = Order(sizes, [3, 1, 0], 8, seed=0)
    second = Order(sizes, [0, 1, 2], 8, seed=0, first=7, before=first.taken(7))
    drawn = [[], [], []]
    for order, steps in ((first, range(7)), (second, range(7, 10))):
        for corpus, window in (found for step in steps for found in zip(*order.batch(step), strict=True)):
            drawn[corpus].append(int(window))
    assert [len(windows) for windows in drawn] == second.taken(3).tolist()
    assert min(map(len, drawn[:2])) > 0
    for size, windows in zip(sizes, drawn, strict=True):
        assert len(set(windows[:size])) == min(size, len(windows))  # nothing comes again before all has come


def test_a_corpus_that_an_order_leaves_out_is_never_drawn_and_a_lone_one_always():
    assert set(Order([40, 30], [0, 2], 8, seed=0).batch(3)[0]) == {1}
    assert Order([40, 30], [0, 2], 8, seed=0).taken(5).tolist() == [0, 40]
    alone = Order([30], [1], 8, seed=0)
    assert alone.taken(5).tolist() == [40]


@pytest.fixture(scope="module", params=["concatenate", "documents"])
def corpus(request, tmp_path_factory):
    """Two small corpora, prepared."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, count in (("a", 200), ("b", 80)):
        rows = [
            {"text": f"{name}: text {i} on subject {i % 7} with {i * i} neighbours " + "x" * (i % 50)}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load(
        "tiny",
        [
            f'data.public.source="{folder / "a.jsonl"}"',
            f'data.corpora.other.source="{folder / "b.jsonl"}"',
            "data.corpora.other.weight=0.5",
            f'data.packing="{request.param}"',
            "tokenizer.vocab_size=300",
            "data.near_duplicate_similarity=0.95",
            "model.context_length=32",
        ],
    )
    return config, folder / "run", prepare(config, folder / "run")


def test_corpora_are_packed_apart_and_their_copies_dropped_together(corpus):
    _, run, manifest = corpus
    counts = manifest.metadata["train"]
    assert set(counts) == {"public", "other"}
    assert manifest.metadata["cleaning"]["kept"] == 280
    for name, part in counts.items():
        assert TokenFile(run / "corpus" / train_tokens(name), 32, DTYPE).num_windows == part["windows"]
        assert part["tokens"] - part["tokens_kept"] < 32


STAGED = {
    "steps": 30,
    "stages": [
        {"steps": 10, "context_length": 16},
        {"steps": 3, "weights": {"other": 1}},
        {"steps": 12, "weights": {"other": 1}},
        {"steps": 5, "context_length": 16},
    ],
}


@pytest.fixture(scope="module")
def staged(corpus, tmp_path_factory):
    """The same corpora, for stages of two lengths."""
    tree = corpus[0].model_dump(exclude_none=True)
    config = RunConfig.model_validate({**tree, "pretrain": {**tree["pretrain"], **STAGED}})
    run = tmp_path_factory.mktemp("staged")
    return config, run, prepare(config, run)


def test_stages_read_their_own_corpora_in_their_own_length(staged):
    config, run, manifest = staged
    batches = Batches(config, run / "corpus")
    steps = [batches.share(step, 0, 1).windows for step in range(30)]
    assert [windows.tokens.shape[1] for windows in steps] == [16] * 10 + [32] * 15 + [16] * 5
    (other,) = {file for windows in steps[10:25] for file in windows.files}
    assert other.num_windows == manifest.metadata["train"]["other"]["windows"]
    assert len({file for windows in steps[:10] for file in windows.files}) == 2
    # Numbers go on through all stages: what is drawn for a sample by them is drawn once.
    numbers = np.concatenate([windows.numbers for windows in steps])
    assert numbers.tolist() == list(range(240))


def test_two_stages_of_one_corpus_in_one_length_are_one_pass_over_it(staged):
    config, run, _ = staged
    batches = Batches(config, run / "corpus")
    whole = [batches.share(step, 0, 1).windows for step in range(10, 25)]
    size, drawn = whole[0].files[0].num_windows, np.concatenate([windows.indices for windows in whole]).tolist()
    assert 24 < size < len(drawn)  # the first of the stages takes 24
    assert sorted(drawn[:size]) == list(range(size))


def test_whole_documents_are_packed_for_each_length(staged):
    config, run, _ = staged
    batches = Batches(config, run / "corpus")
    for step in (0, 12):
        positions = batches.share(step, 0, 1).windows.positions
        # A window begins with a piece, and is no part of a longer window.
        assert positions is None if config.data.packing == "concatenate" else not positions[:, 0].any()


def test_skipped_data_shift_all_that_follows_through_the_stages(staged):
    config, run, _ = staged
    plain, skipping = Batches(config, run / "corpus"), Batches(config, run / "corpus", [(8, 11)])
    assert [skipping.number(step) for step in (7, 8, 10)] == [7, 11, 13]
    found = skipping.share(10, 0, 1).windows
    assert found.tokens.tolist() == plain.share(13, 0, 1).windows.tokens.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_global_batch_without_overlap(corpus, world_size):
    config, run, _ = corpus
    batches = Batches(config, run / "corpus")
    for step in (0, 1, 7, 500):
        whole = batches.share(step, 0, 1)
        shares = [batches.share(step, rank, world_size) for rank in range(world_size)]
        prove_disjoint([share.digests() for share in shares], whole.digests())
        # What is drawn for a sample hangs on its number alone: its place among all samples, whoever reads it.
        numbers = np.sort(np.concatenate([share.windows.numbers for share in shares]))
        assert numbers.tolist() == whole.windows.numbers.tolist() == [step * 8 + place for place in range(8)]
        parts = list(whole.windows.micro_batches(3))
        assert [len(part.tokens) for part in parts] == [3, 3, 2]
        assert np.concatenate([part.tokens for part in parts]).tolist() == whole.windows.tokens.tolist()


def test_ranks_that_train_on_the_same_samples_are_found_out(corpus):
    config, run, _ = corpus
    batches = Batches(config, run / "corpus")
    whole = batches.share(0, 0, 1).digests()
    alone = batches.share(0, 0, 2).digests()
    with pytest.raises(SiloweaveError, match="are not the global batch of 8"):
        prove_disjoint([alone, alone], whole)
    other = {place: batches.share(1, 1, 2).digests()[place] for place in (1, 3, 5, 7)}
    with pytest.raises(SiloweaveError, match="sample 1 of the first step is not the same on all ranks"):
        prove_disjoint([alone, other], whole)


def test_prepare_is_skipped_when_its_manifest_proves_it_and_repeated_when_damaged(tmp_path):
    rows = [
        {"text": f"public text number {i} about subject {i % 7} and its {i} neighbours in the list"} for i in range(300)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load(
        "tiny",
        [
            f'data.public.source="{tmp_path / "c.jsonl"}"',
            "tokenizer.vocab_size=300",
            "data.near_duplicate_similarity=0.95",
        ],
    )
    first = prepare(config, tmp_path)
    token_file = tmp_path / "corpus" / "tokens-train-public.bin"
    stamp = token_file.stat().st_mtime_ns
    assert prepare(config, tmp_path) == first
    assert token_file.stat().st_mtime_ns == stamp
    token_file.write_bytes(b"damaged")
    assert prepare(config, tmp_path).content_digest == first.content_digest
    assert token_file.stat().st_size > 1000


class Killed(Exception):
    pass


def test_a_killed_preparation_goes_on_with_the_parts_that_are_missing(corpus, tmp_path, monkeypatch):
    config, _, expected = corpus
    monkeypatch.setattr("trainer.data.parts.PART_ROWS", 40)
    done = []

    def killed_after(limit):
        def map_parts(function, numbers):
            for number in one_after_the_other(function, numbers):
                if len(done) == limit:
                    raise Killed
                done.append((function.func.__name__, number))
                yield number

        return map_parts

    for limit in (3, 9):  # while cleaning, while tokenising
        with pytest.raises(Killed):
            prepare(config, tmp_path, None, killed_after(limit))
        assert not (tmp_path / "corpus" / "manifest.json").exists()
    told = []
    manifest = prepare(config, tmp_path, None, killed_after(None), lambda part, parts: told.append((part, parts)))
    # What was being done when the kill came was done, and not said.
    assert len(done) == len(set(done)) == 14 - 2
    assert told[-1] == (14, 14)
    assert manifest.content_digest == expected.content_digest
    assert not list((tmp_path / "corpus-parts").glob("*"))


def test_parts_of_other_settings_are_not_used(corpus, tmp_path):
    config, _, _ = corpus
    stale = Parts(tmp_path / "corpus-parts" / "other")
    stale.write_rows([("public", "stale")])
    prepare(config, tmp_path)
    assert not stale.folder.exists()


def test_a_vocabulary_has_room_for_bytes_and_sentinels(tmp_path):
    lines = [json.dumps({"text": f"The {number}th of many lines that are long enough."}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    overrides = [f"data.public.source={tmp_path / 'a.jsonl'}", "tokenizer.vocab_size=260", "model.family=t5"]
    with pytest.raises(InputError, match=r"tokenizer.vocab_size is 260: the bytes and the special tokens .* are 268"):
        prepare(load("tiny", [*overrides, "model.context_length=220"]), tmp_path)
