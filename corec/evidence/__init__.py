"""Evidence of relevance for every candidate, and the combiner, which turns it into one score without a language model."""

from corec.controls import Prepared
from corec.data import Tables
from corec.evidence.combiner import Combined, combine, save
from corec.evidence.features import NAMES, Evidence, gather, similarity_tables
from corec.params import Params

__all__ = ["NAMES", "Combined", "Evidence", "combine", "gather", "make", "save", "similarity_tables"]


def make(tables: Tables, prepared: Prepared, params: Params) -> tuple[dict[str, Evidence], Combined]:
    """Compute the evidence of the candidates of all splits, and fit the combiner.

    Parameters
    ----------
    tables
        Tables of stage 01.
    prepared
        Result of stage 03.
    params
        Parameters of the run: its section ``evidence``, and the seed.

    Raises
    ------
    CorecError
        If too few windows have their true next item among the candidates, or the language model of the titles cannot be loaded.
    """
    titles = None
    if params.evidence.text:
        from corec.evidence.text import title_embeddings  # imports transformers, which the rest does not need

        titles = title_embeddings(tables.items["title"].tolist(), params.evidence.text)
    similar = similarity_tables(tables, prepared.vocabulary, params.evidence, titles)
    found = {split: gather(tables, pools, similar, params.evidence) for split, pools in prepared.pools.items()}
    users = tables.windows.set_index("window")["user"].loc[prepared.pools["train"].window].to_numpy()
    return found, combine(found, prepared.pools, users, params.evidence, params.seed)
