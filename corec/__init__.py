"""COREC, reproduced: token-controlled re-ranking for sequential recommendation (arXiv 2511.17913).

One package or module for each stage: ``data``, ``sasrec``, ``controls``, ``reranker``, ``evaluation``, ``figures``. Beside
them ``params`` and ``profiles`` (what may be set, and from where), ``paths`` and ``stages`` (where a run keeps its files, and
what each stage records), ``studies`` (comparisons), ``scale`` (several devices), ``bench`` (timings) and ``reproduce`` (all
notebooks).
"""

__version__ = "0.1.0"


class CorecError(Exception):
    """An error that the user can correct; its text is one sentence with the name and the remedy."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the traceback: the sentence alone."""
        return [f"{type(self).__name__}: {self}"]
