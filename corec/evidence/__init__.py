"""Evidence of relevance for every candidate, and the combiner, which turns it into one score without a language model."""

from corec.controls import Prepared, Vocabulary
from corec.data import Tables
from corec.evidence.combiner import Combined, combine, save
from corec.evidence.features import NAMES, Evidence, Similarities, gather, similarity_tables, weighted_values
from corec.evidence.pools import Wide, widen
from corec.params import Params

__all__ = [
    "NAMES",
    "Combined",
    "Evidence",
    "Similarities",
    "Wide",
    "combine",
    "gather",
    "make",
    "save",
    "similarities_of",
    "similarity_tables",
    "weighted_values",
    "widen",
]


def similarities_of(tables: Tables, vocabulary: Vocabulary, params: Params) -> Similarities:
    """Compute the similarities of the items of a run, with those of their titles if ``evidence.text`` names a language model.

    Parameters
    ----------
    tables
        Tables of stage 01.
    vocabulary
        Attributes under control.
    params
        Parameters of the run.

    Raises
    ------
    CorecError
        If the language model cannot be loaded.
    """
    titles = None
    if params.evidence.text:
        from corec.evidence.text import title_embeddings  # imports transformers, which the rest does not need

        titles = title_embeddings(tables.items["title"].tolist(), params.evidence.text)
    return similarity_tables(tables, vocabulary, params.evidence, titles)


def make(tables: Tables, prepared: Prepared, similar: Similarities, params: Params) -> tuple[dict[str, Evidence], Combined]:
    """Compute the evidence of the candidates of all splits, and fit the combiner.

    Parameters
    ----------
    tables
        Tables of stage 01.
    prepared
        Result of stage 03.
    similar
        Result of :func:`similarities_of`.
    params
        Parameters of the run: its section ``evidence``, and the seed.

    Raises
    ------
    CorecError
        If too few windows have their true next item among the candidates.
    """
    found = {split: gather(tables, pools, similar, params.evidence) for split, pools in prepared.pools.items()}
    users = tables.windows.set_index("window")["user"].loc[prepared.pools["train"].window].to_numpy()
    return found, combine(found, prepared.pools, users, params.evidence, params.seed)
