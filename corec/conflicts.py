"""Parameters of different sections that do not go together.

`params` is a :class:`corec.params.Params` everywhere; that class calls :func:`conflict`, so it is not imported here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from corec import CorecError


def conflict(params: Any) -> str | None:
    """Describe the first conflict between sections of `params` as a sentence with a remedy; None if there is none."""
    return in_candidates(params) or in_evidence(params) or in_reranker(params) or in_study(params)


def in_candidates(params: Any) -> str | None:
    """Conflicts of the numbers of candidates and cut-offs."""
    if params.sasrec.top_k < params.controls.k:
        return (
            f"parameter 'sasrec.top_k' is {params.sasrec.top_k}, fewer than the {params.controls.k} candidates of "
            "controls.k: raise sasrec.top_k or lower controls.k."
        )
    if (k := params.figures.k) not in params.evaluation.ks or k >= params.controls.k:
        return (
            f"parameter 'figures.k' is {k}: choose one of evaluation.ks ({params.evaluation.ks}) below controls.k "
            f"({params.controls.k})."
        )
    return None


def in_evidence(params: Any) -> str | None:
    """Conflicts of the evidence, the pools and the prior."""
    pool, without = params.controls.pool, params.evidence.combiner == "none"
    if params.reranker.prior and without:
        return (
            "parameter 'reranker.prior' needs the scores of a combiner: set evidence.combiner to 'linear', 'lambdarank' or "
            "'best'."
        )
    if (wide := pool != ["sasrec"]) and len(set(pool)) != len(pool):
        return f"parameter 'controls.pool' is {pool}: list each source once."
    if wide and (not pool or without):
        return (
            "parameter 'controls.pool' lists sources that are merged by evidence: list at least one, and set "
            "evidence.combiner to 'linear', 'lambdarank' or 'best'."
        )
    if "text" in pool and params.evidence.text is None:
        return "parameter 'controls.pool' lists 'text': set evidence.text to a language model, or leave it out."
    if not without and not params.data.held_back:
        return (
            "parameter 'evidence.combiner' needs training windows that no statistic has seen: set data.held_back to 4 or "
            "more, or evidence.combiner to 'none'."
        )
    return None


def in_reranker(params: Any) -> str | None:
    """Conflicts of the re-ranker's training with other sections."""
    reranker, width = params.reranker, 2 * params.sasrec.hidden
    for k in reranker.curriculum_k:
        if not 2 <= k <= params.controls.k:
            return f"parameter 'reranker.curriculum_k' lists {k}: list numbers from 2 to controls.k ({params.controls.k})."
    if reranker.curriculum_k and (reranker.prior or reranker.soft_width):
        return (
            "parameter 'reranker.curriculum_k' makes pools that have no prior and no soft tokens: set reranker.prior to false "
            "and reranker.soft_width to 0."
        )
    if reranker.soft_width not in (0, width) or (reranker.soft_width and reranker.readout == "index"):
        return (
            f"parameter 'reranker.soft_width' is {reranker.soft_width}: set it to 0, or to twice sasrec.hidden ({width}) and "
            "reranker.readout to 'late' or 'candidate'."
        )
    if reranker.loss == "truth" and (
        params.controls.train_truth == "any" or reranker.curriculum_steps or not reranker.truth_bonus
    ):
        return (
            "parameter 'reranker.loss' 'truth' needs the true next item in every training prompt: set controls.train_truth "
            "to 'retrieved' or 'inserted', reranker.curriculum_steps to 0, and reranker.truth_bonus to true."
        )
    return None


def in_study(params: Any) -> str | None:
    """Conflicts of the studies with the retriever."""
    surface, most = params.study.surface, min(50, params.sasrec.top_k)
    if len(set(surface)) < len(surface) or any(not 2 <= k <= most for k in surface):
        return f"parameter 'study.surface' is {surface}: list different numbers from 2 to {most} (sasrec.top_k, at most 50)."
    if surface and params.figures.k >= min(surface):
        return (
            f"parameter 'study.surface' lists {min(surface)}: list numbers above figures.k ({params.figures.k}), the cut-off of "
            "its metrics."
        )
    if params.study.texts and params.evidence.combiner == "none":
        return (
            "parameter 'study.texts' compares combiners: set evidence.combiner to 'linear', 'lambdarank' or 'best', or leave it "
            "empty."
        )
    if surface and params.controls.pool != ["sasrec"]:
        return "parameter 'study.surface' needs the candidates of SASRec: set controls.pool to [sasrec], or leave it empty."
    return None


def in_missing(params: Any) -> str | None:
    """Conflicts of the stage `missing_metadata` with other sections, which do not matter for the other stages."""
    reranker = params.reranker
    if reranker.control != "constraints" or reranker.loss != "listwise" or reranker.control_target != "graded":
        return (
            "stage 'missing_metadata' needs the probability of each constraint: set reranker.control to 'constraints', "
            "reranker.loss to 'listwise' and reranker.control_target to 'graded'."
        )
    if params.controls.pool != ["sasrec"]:
        return "stage 'missing_metadata' needs candidates that do not depend on the attributes: set controls.pool to [sasrec]."
    if 1 not in params.controls.n_tokens:
        return "stage 'missing_metadata' compares attributes by requests of one constraint: add 1 to controls.n_tokens."
    return None


def with_prior(params: Any, stage: str) -> str | None:
    """Conflicts of a stage that compares COREC with the combiner and needs the probability of each constraint."""
    if not params.reranker.prior or params.evidence.combiner == "none":
        return f"stage '{stage}' compares with the combiner: set evidence.combiner to 'best' and reranker.prior to true."
    if params.reranker.control != "constraints":
        return f"stage '{stage}' needs the probability of each constraint: set reranker.control to 'constraints'."
    return None


def in_transfer(params: Any) -> str | None:
    """Conflicts of the stage `transfer` with other sections, which do not matter for the other stages."""
    if 1 not in params.controls.n_tokens:
        return "stage 'transfer' compares tokens by requests of one constraint: add 1 to controls.n_tokens."
    if not (params.study.transfers() or params.study.unseen):
        return "stage 'transfer' has nothing to compare: set study.source, study.transfer_steps or study.unseen."
    return None


def in_saturation(params: Any) -> str | None:
    """Conflicts of the stage `saturation` with other sections, which do not matter for the other stages."""
    reranker = params.reranker
    if reranker.values != "token" or reranker.lr_rows == 0 or reranker.row_contrast:
        return (
            "stage 'saturation' trains the tokens of the values with and without a contrast: set reranker.values to 'token', "
            "reranker.lr_rows above 0 and reranker.row_contrast to 0."
        )
    return with_prior(params, "saturation")


def in_language(params: Any) -> str | None:
    """Conflicts of the stage `language` with other sections, which do not matter for the other stages."""
    if params.controls.scheme != "movielens" or params.controls.attributes is not None:
        return (
            "stage 'language' has sentences about films: use a run on MovieLens with controls.scheme 'movielens' and "
            "controls.attributes null."
        )
    return with_prior(params, "language")


def in_sessions(params: Any) -> str | None:
    """Conflicts of the stage `sessions` with other sections, which do not matter for the other stages."""
    if params.reranker.request_position != "after":
        return "stage 'sessions' keeps the prefix between the turns: set reranker.request_position to 'after'."
    if params.controls.attributes is not None and len(params.controls.attributes) < 3:
        return "stage 'sessions' has requests of three attributes: add attributes to controls.attributes, or set it to null."
    return with_prior(params, "sessions")


OF_STAGES: dict[str, Callable[[Any], str | None]] = {
    "missing_metadata": in_missing,
    "transfer": in_transfer,
    "saturation": in_saturation,
    "conflicts": partial(with_prior, stage="conflicts"),
    "language": in_language,
    "sessions": in_sessions,
    "simulated_users": partial(with_prior, stage="simulated_users"),
}


def of_stage(params: Any, stage: str) -> str | None:
    """Conflicts of a stage with other sections (:data:`OF_STAGES`); None if there is none."""
    return OF_STAGES[stage](params) if stage in OF_STAGES else None


def require(params: Any, stage: str) -> None:
    """Raise CorecError if the parameters do not fit a stage (see :func:`of_stage`)."""
    if fault := of_stage(params, stage):
        raise CorecError(fault[0].upper() + fault[1:])
