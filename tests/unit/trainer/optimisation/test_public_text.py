"""Which text a student may read: the one that its base model was pretrained on, and never the silos' records."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs.errors import InputError
from configs.load import load
from configs.schema.data import overlaps
from configs.storage.manifests import Manifest, commit_manifest
from trainer.data.packing import train_tokens
from trainer.optimisation.public_text import public_windows


def a_run(folder, corpus_of_the_base=None):
    (folder / "corpus").mkdir()
    np.arange(640, dtype=np.uint16).tofile(folder / "corpus" / train_tokens("public"))
    corpus = commit_manifest(folder / "corpus", Manifest("corpus", "made-up"))
    (folder / "model").mkdir()
    inputs = {"corpus": corpus_of_the_base or corpus.content_digest}
    commit_manifest(folder / "model", Manifest("model", "made-up", inputs=inputs))
    return folder, corpus


def settings(public, private, declared_public=False):
    declared = str(declared_public).lower()
    return load(
        "tiny",
        [f'data.public.source="{public}"', f'data.private.source="{private}"', f"data.private.public={declared}",
         *([] if declared_public else ["evaluate.without_dp=false"])],
    )  # fmt: skip


def test_the_text_is_the_corpus_of_the_base_model(tmp_path):
    run, corpus = a_run(tmp_path)
    file, manifest = public_windows(settings("/texts/a", "/records/b"), run)
    assert manifest.content_digest == corpus.content_digest
    assert file.windows(np.array([0])).tolist() == [list(range(file.windows(np.array([0])).shape[1]))]


def test_without_that_corpus_there_is_no_text(tmp_path):
    with pytest.raises(InputError, match="give the model where it lies in its run"):
        public_windows(settings("/texts/a", "/records/b"), None)
    run, _ = a_run(tmp_path, "0" * 64)
    with pytest.raises(InputError, match=r"corpus: is not the corpus of .*model; put that one back"):
        public_windows(settings("/texts/a", "/records/b"), run)
    (run / "model" / "manifest.json").unlink()
    commit_manifest(run / "model", Manifest("model", "made-up", inputs={"source": "0" * 64}))
    with pytest.raises(InputError, match="was imported, so there is none"):
        public_windows(settings("/texts/a", "/records/b"), run)


@pytest.mark.parametrize("public", ["/records/b", "/records", "/records/b/part.jsonl", "/texts/../records/b"])
def test_the_silos_records_are_refused(public, tmp_path):
    run, _ = a_run(tmp_path)
    with pytest.raises(InputError, match=r"data.public.source is .*, where the silos' records are"):
        public_windows(settings(public, "/records/b"), run)
    public_windows(settings(public, "/records/b", declared_public=True), run)


def test_sources_are_compared_by_where_they_are():
    def of(source, split="train"):
        return SimpleNamespace(source=source, split=split)

    assert overlaps(of("hf:a"), of("hf:a"))
    assert not overlaps(of("hf:a"), of("hf:a", "test"))
    assert not overlaps(of("embedded:plays"), of("/records/b"))
    assert not overlaps(of("/records/bb"), of("/records/b"))
    assert overlaps(of("/records/a:b"), of("/records/../records"))
    assert overlaps(of("embedded:plays"), of("embedded:plays", "test"))  # which has no splits


@pytest.mark.parametrize("split", ["train[:50%]", "train[1:2]", "train+test", "all", "", "train", "Train", "test[:1]"])
def test_a_split_that_is_part_or_sum_of_others_is_not_apart_from_them(split):
    one, other = SimpleNamespace(source="hf:a/b", split="train"), SimpleNamespace(source="hf:a/b", split=split)
    assert overlaps(one, other)
    assert overlaps(other, one)


def test_a_dataset_has_several_names(tmp_path):
    def meet(one, other, *splits):
        first, second = splits or ("train", "train")
        sources = SimpleNamespace(source=one, split=first), SimpleNamespace(source=other, split=second)
        assert overlaps(*sources) == overlaps(*reversed(sources))
        return overlaps(*sources)

    for name in ("hf:plays", "hf:Folk/Plays", "hf:folk/plays/", "hf:hf://datasets/folk/plays"):
        assert meet("hf:folk/plays", name), name
        assert not meet("hf:folk/plays", name, "train", "test"), name
    assert not meet("hf:folk/plays", "hf:folk/displays")
    assert not meet("hf:folk/plays", "hf:others/plays")
    assert not meet("hf:folk/plays", str(tmp_path))
    # A folder of this machine, read by way of `datasets` or without.
    (tmp_path / "below").mkdir()
    (tmp_path / "other-name").symlink_to(tmp_path / "below")
    for name in (tmp_path, f"hf:{tmp_path}", f"hf:{tmp_path}/below", f"hf:{tmp_path}/other-name"):
        assert meet(str(name), f"hf:{tmp_path}/below"), name
    assert not meet(f"hf:{tmp_path}", f"hf:{tmp_path}", "train", "test")
    assert meet(f"hf:{tmp_path}", f"hf:{tmp_path}/below", "train", "test")
    assert meet(str(tmp_path), f"hf:{tmp_path}", "train", "test")
