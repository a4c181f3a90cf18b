"""The public corpora of a run, by name."""

from configs.data_settings import PUBLIC, CorpusSettings, DataSettings


def corpora(data: DataSettings) -> dict[str, CorpusSettings]:
    """All public corpora: ``data.public`` and those of ``data.corpora``."""
    return {PUBLIC: data.public, **data.corpora}


def field_of(corpus: str) -> str:
    """The setting that names a corpus' source."""
    return "data.public.source" if corpus == PUBLIC else f"data.corpora.{corpus}.source"
