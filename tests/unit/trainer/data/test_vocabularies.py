"""Vocabularies on both sides of 65,536 entries, from the settings down to a training step."""

import json
import math
import random
import re
import string

import numpy as np
import pytest
from plain_training import plain_losses

from configs.errors import InputError
from configs.load import load
from configs.storage.manifests import MANIFEST
from trainer.data.batches import Batches
from trainer.data.packing import Document, TokenFile, pack, stored_dtype, token_dtype, train_tokens
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer

SIZE = 65_800


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Long words, each of its own letters: nearly every letter is a merge of the tokenizer."""
    folder, chance = tmp_path_factory.mktemp("large"), random.Random(0)
    words = ["".join(chance.choices(string.ascii_lowercase, k=24)) for _ in range(6600)]
    rows = [{"text": " ".join(words[start : start + 20])} for start in range(0, len(words), 20)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load(
        "tiny",
        [
            f'data.public.source="{folder / "text.jsonl"}"',
            'data.packing="documents"',
            f"tokenizer.vocab_size={SIZE}",
            "model.hidden_size=8",
            "model.heads=1",
            "model.layers=1",
            "model.intermediate_size=8",
            "model.context_length=32",
        ],
    )
    return config, folder / "run", prepare(config, folder / "run"), [row["text"] for row in rows]


def test_a_large_vocabulary_reaches_the_windows_whole(large):
    _, run, manifest, texts = large
    assert manifest.metadata["vocab_size"] == SIZE
    assert manifest.metadata["token_dtype"] == stored_dtype(run / "corpus").name == "uint32"
    tokenizer = load_tokenizer(run / "tokenizer")
    file = TokenFile(run / "corpus" / train_tokens("public"), 32, stored_dtype(run / "corpus"))
    found = file.windows(np.arange(file.num_windows))
    assert found.max() > 2**16
    decoded = {text for row in found for text in tokenizer.decode(row).split("<|endoftext|>")}
    assert len(decoded & set(texts)) > 0.9 * len(texts)  # whole but for the held-out ones


def test_a_model_of_a_large_vocabulary_takes_a_step(large):
    config, run, _, _ = large
    assert Batches(config, run / "corpus").share(0, 0, 1).windows.tokens.max() > 2**16
    losses = plain_losses(config, run / "corpus", 2)
    assert losses[1] == pytest.approx(math.log(SIZE), abs=0.2)
    assert losses[2] != losses[1]


def test_an_unknown_type_of_tokens_is_refused_and_a_corpus_without_one_is_read_as_ever(large):
    config, run, manifest, _ = large
    corpus = run / "corpus"
    content = (corpus / MANIFEST).read_text()
    try:
        for name, shown in (("uint64", "'uint64'"), (["uint16"], r"\['uint16'\]"), (None, "None")):
            metadata = {**manifest.metadata, "token_dtype": name}
            (corpus / MANIFEST).write_text(json.dumps({**json.loads(content), "metadata": metadata}))
            wanted = f"^{re.escape(str(corpus))}: token_dtype of its manifest is {shown}, .* `siloweave prepare` again$"
            with pytest.raises(InputError, match=wanted):
                Batches(config, corpus)
        del metadata["token_dtype"]
        (corpus / MANIFEST).write_text(json.dumps({**json.loads(content), "metadata": metadata}))
        assert stored_dtype(corpus) == np.dtype("<u2")
    finally:
        (corpus / MANIFEST).write_text(content)


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize(("entries", "size_bytes"), [(260, 2), (2**16, 2), (2**16 + 1, 4), (2**20, 4)])
def test_the_last_token_of_any_vocabulary_is_read_back(tmp_path, packing, entries, size_bytes):
    dtype = token_dtype(entries)
    ids = np.asarray([0, entries - 1] * 8, dtype)
    counts = pack([Document(ids, 16)], tmp_path / "tokens.bin", 16, packing, dtype)
    assert (tmp_path / "tokens.bin").stat().st_size == 16 * size_bytes
    assert TokenFile(tmp_path / "tokens.bin", 16, dtype).windows(np.arange(counts["windows"])).tolist() == [
        ids.tolist()
    ]


def test_tokens_are_never_cut_to_a_smaller_type(tmp_path):
    wide = Document(np.asarray([2**16], np.uint32), 1)
    with pytest.raises(TypeError, match="safe"):
        pack([wide], tmp_path / "tokens.bin", 1, "concatenate", token_dtype(2**16))


@pytest.mark.parametrize("context_length", [2**16, 2**16 + 3])
def test_places_in_a_long_window_are_read_back(tmp_path, context_length):
    """A place beyond 65,535 was written as another one."""
    ids = np.zeros(context_length, np.uint16)
    pack([Document(ids, 1)], tmp_path / "tokens.bin", context_length, "documents", ids.dtype)
    file = TokenFile(tmp_path / "tokens.bin", context_length, ids.dtype)
    assert file.positions(np.arange(1))[0].tolist() == list(range(context_length))
