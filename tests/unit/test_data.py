import numpy as np
import pytest

from configs.load import load
from trainer.data.cleaning import CleaningCounts, clean, normalise
from trainer.data.embedded import plays, python_docs
from trainer.data.packing import Cursor, TokenFile, pack
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer, train_tokenizer


def test_normalise():
    assert normalise("e\u0301\x00  a\t b \r\n\n\n\nend  ") == "\u00e9 a b\n\nend"


def test_cleaning_drops_short_exact_and_near_duplicates_and_keeps_the_first():
    text = "the quick brown fox jumps over the lazy dog and runs away into the deep dark forest " * 3
    near = text + "today"
    other = "an entirely different sentence about compilers, linkers and the strange life of symbols in object files"
    counts = CleaningCounts()
    kept = list(clean(["short", text, "  " + text, near, other], 40, 0.8, counts))
    assert kept == [normalise(text), other]
    assert counts.as_dict() == {"read": 5, "too_short": 1, "exact_duplicates": 1, "near_duplicates": 1, "kept": 2}


def test_the_embedded_texts_are_there():
    documents = [row["text"] for row in python_docs()]
    assert sum(map(len, documents)) > 1_500_000
    speeches = list(plays())
    assert {row["silo"] for row in speeches} == {"comedies", "histories", "problems", "roman", "romances", "tragedies"}
    assert len(speeches) > 30_000
    assert all("**" not in row["text"][:2] and not row["text"].startswith("#") for row in speeches)


@pytest.fixture
def tokens(tmp_path):
    documents = [f"document number {i} speaks of the number {i * i}" for i in range(60)]
    tokenizer = train_tokenizer(documents, 300, tmp_path / "tokenizer")
    counts = pack(documents, tokenizer, tmp_path / "tokens.bin")
    return documents, tokenizer, counts, tmp_path


def test_packed_tokens_read_back_as_the_documents(tokens):
    documents, tokenizer, counts, folder = tokens
    file = TokenFile(folder / "tokens.bin", 16)
    assert counts["tokens"] // 16 == file.num_windows
    stream = file.windows(np.arange(file.num_windows)).reshape(-1).tolist()
    texts = tokenizer.decode(stream).split("<|endoftext|>")
    assert texts[:50] == documents[:50]
    assert load_tokenizer(folder / "tokenizer").decode(stream) == tokenizer.decode(stream)


def test_the_tokenizer_is_byte_level(tokens):
    _, tokenizer, _, _ = tokens
    text = "na\u00efve \u65e5\u672c \U0001f600\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_global_batch_without_overlap(world_size):
    windows, batch = 37, 8
    alone = Cursor(windows, batch, seed=3)
    expected = [alone.rank_windows(step, 0, 1).tolist() for step in range(20)]
    cursors = [Cursor(windows, batch, seed=3) for _ in range(world_size)]
    for step in range(20):
        parts = [cursor.rank_windows(step, rank, world_size).tolist() for rank, cursor in enumerate(cursors)]
        assert [parts[i % world_size][i // world_size] for i in range(batch)] == expected[step]


def test_an_epoch_sees_every_window_once_and_the_next_in_another_order():
    cursor = Cursor(24, 8, seed=0)
    epochs = [[cursor.window(step, i) for step in range(3 * e, 3 * e + 3) for i in range(8)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
    assert Cursor(24, 8, seed=0).window(4, 5) == cursor.window(4, 5)


def test_prepare_is_skipped_when_its_manifest_proves_it_and_repeated_when_damaged(tmp_path):
    import json

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
    token_file = tmp_path / "corpus" / "tokens-train.bin"
    stamp = token_file.stat().st_mtime_ns
    assert prepare(config, tmp_path) == first
    assert token_file.stat().st_mtime_ns == stamp
    token_file.write_bytes(b"damaged")
    assert prepare(config, tmp_path).content_digest == first.content_digest
    assert token_file.stat().st_size > 1000
