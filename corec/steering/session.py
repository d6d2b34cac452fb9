"""What the steering demonstration shows of one run: users, candidates, and scores under any request."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from corec import CorecError, controls, data, paths, reranker, scores, stages
from corec.params import Params
from corec.reranker import engine


class Session:
    """A finished run, opened to answer requests of its test users one at a time.

    Parameters
    ----------
    settings
        Parameters of the run.
    most
        Largest number of test users; those whose true next item was retrieved come first.

    Raises
    ------
    CorecError
        If stage 04 of the run has not finished, or its re-ranker cannot cache a prefix.
    """

    def __init__(self, settings: Params, most: int = 200) -> None:
        stages.check(settings, "reranker")
        if settings.reranker.request_position == "before":
            raise CorecError(
                f"Run {settings.run!r} cannot be steered: its requests precede the candidates, so no prefix can be cached. "
                "Choose a profile with `reranker.request_position: after`, such as params/ml-100k.yaml."
            )
        self.settings, self.tables = settings, data.load(settings.run)
        self.prepared = controls.load(settings.run)
        self.vocabulary, self.pools = self.prepared.vocabulary, self.prepared.pools["test"]
        self.examples = reranker.load_examples(self.tables.windows, self.prepared, scores.load_evidence(settings.run))
        folder = paths.stage_dir(settings.run, "reranker")
        model = reranker.load(folder, self.tables.items, self.vocabulary, settings.reranker)
        self.model = engine.merge(model)
        self.titles = ["", *self.tables.items["title"]]
        order = np.argsort(self.pools.truth < 0, kind="stable")[:most]
        self.places = [int(place) for place in order]
        self.opened: tuple[int, engine.Prefix] | None = None  # place of the user, and the cached prefix

    def about(self) -> str:
        """One sentence about the run."""
        settings = self.settings
        alone = "" if settings.reranker.prior else "COREC is the language model alone here, without the score of the retriever. "
        return (
            f"Run {settings.run}: {settings.data.dataset}, K = {settings.controls.k} candidates of SASRec, re-ranker "
            f"{settings.reranker.backbone}. {alone}Choose constraints; the language model answers each request."
        )

    def users(self) -> list[dict[str, Any]]:
        """Users of the demonstration: ``id``, the place of the window, and ``name``."""
        owner = self.tables.windows.set_index("window")["user"]
        return [{"id": str(place), "name": f"user {owner[self.pools.window[place]]}"} for place in self.places]

    def row(self, place: int, request: Sequence[int]) -> reranker.Row:
        """The prompt of a user with one request."""
        pools = self.pools.take(np.array([place]))
        return reranker.make_rows(self.model, self.examples, pools, [np.array([list(request)], dtype=int)])[0]

    def open(self, place: int) -> dict[str, Any]:
        """Compute and cache the prefix of a user.

        Returns
        -------
        ``history`` (titles), ``candidates`` (``title values rank truth``; `rank` is that of SASRec, from 0), ``attributes``,
        ``values`` (``id attribute label count``; `count` is the number of candidates that have the value), ``tokens`` of the
        prefix, and ``ms``, the time to compute it.
        """
        start = time.perf_counter()
        row = self.row(place, [])
        self.opened = (place, engine.prefill(self.model, row))
        ms = 1000 * (time.perf_counter() - start)
        items = self.pools.candidates[place]
        values = [self.vocabulary.values_of[item] for item in items]
        own = [[int(value) for value in each if value >= 0] for each in values]
        count = np.bincount(np.concatenate([np.array(each, dtype=int) for each in own]), minlength=len(self.vocabulary.labels))
        names = [attribute.name for attribute in self.vocabulary.attributes]
        return {
            "history": [self.titles[item] for item in self.examples.history[self.pools.window[place]]],
            "candidates": [
                {
                    "title": self.titles[item],
                    "values": own[i],
                    "rank": int(self.pools.retriever_rank[place, i]),
                    "truth": bool(self.pools.truth[place] == i),
                }
                for i, item in enumerate(items)
            ],
            "attributes": names,
            "values": [
                {"id": value, "attribute": names[self.vocabulary.attribute_of[value]], "label": label, "count": int(count[value])}
                for value, label in enumerate(self.vocabulary.labels)
            ],
            "tokens": len(row.prefix),
            "ms": ms,
        }

    def answer(self, place: int, request: Sequence[int]) -> dict[str, Any]:
        """Score the candidates of a user under a request, from the cached prefix.

        Parameters
        ----------
        place
            Place of the user's window among the test windows.
        request
            Value numbers of the constraints.

        Returns
        -------
        ``request``, ``prior`` and ``relevance`` [K], ``control`` (for each constraint its ``name`` and its ``values`` [K] at
        strength 1), and ``ms``, the time of the language model.

        Raises
        ------
        CorecError
            If a value does not exist.
        """
        if unknown := [value for value in request if not 0 <= value < len(self.vocabulary.labels)]:
            raise CorecError(f"There is no value {unknown[0]}: give numbers from 0 to {len(self.vocabulary.labels) - 1}.")
        if self.opened is None or self.opened[0] != place:
            self.open(place)
        assert self.opened is not None
        start = time.perf_counter()
        row = self.row(place, request)
        parts, prior = engine.answer_parts(self.model, self.opened[1], row)
        gated = (
            np.zeros(parts.relevance.shape[-1])
            if prior is None or parts.gate is None
            else (parts.gate[0, 0] * prior[0]).cpu().numpy()
        )
        if parts.match is not None:
            each = (self.settings.reranker.control_logits * parts.match[0, 0].sigmoid()).cpu().numpy()[: len(request)]
            control = [{"name": self.vocabulary.name(value), "values": each[j].tolist()} for j, value in enumerate(request)]
        else:
            control = [{"name": "request", "values": parts.control[0, 0].cpu().numpy().tolist()}]
        return {
            "request": [int(value) for value in request],
            "prior": gated.tolist(),
            "relevance": parts.relevance[0, 0].cpu().numpy().tolist(),
            "control": control,
            "ms": 1000 * (time.perf_counter() - start),
        }
