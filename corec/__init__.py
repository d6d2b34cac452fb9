"""Reproduction of COREC: token-controlled re-ranking for sequential recommendation (arXiv 2511.17913).

There is one package or module for each stage: ``data``, ``sasrec``, ``controls``, ``reranker``, ``evaluation``, ``figures``.
Others are ``params`` and ``profiles`` (parameters and their sources), ``paths`` and ``stages`` (files of a run, and the records
of its stages), ``studies`` (comparisons), ``scale`` (several devices), ``bench`` (benchmarks) and ``reproduce`` (all
notebooks).
"""

__version__ = "0.1.0"


class CorecError(Exception):
    """An error that the user can correct; the message is one sentence that names the cause and the remedy."""

    def _render_traceback_(self) -> list[str]:
        """Traceback in IPython: the message only."""
        return [f"{type(self).__name__}: {self}"]
