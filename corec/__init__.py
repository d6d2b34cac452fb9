"""COREC, reproduced: token-controlled re-ranking for sequential recommendation (arXiv 2511.17913).

One module per notebook: ``data``, ``sasrec``, ``controls``, ``reranker``, ``evaluation``, ``figures``;
beside them ``params`` (what a run may be told), ``paths`` (where it keeps things), ``archives`` and
``backbones`` (what it downloads) and ``reproduce`` (all notebooks in order).
"""

__version__ = "0.1.0"


class CorecError(Exception):
    """An error that the user can mend; its text is one sentence with the name and the remedy."""
