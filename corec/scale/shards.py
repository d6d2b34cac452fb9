"""Score the windows of a run in several processes or on several machines, each a shard.

Shard 3 of 8: ``python -m corec.scale.shards --params params/amazon-electronics.yaml --shard 3 --of 8``.

Before it, the re-ranker is fine-tuned (:mod:`corec.scale.launch`); afterwards notebook 04, with the same parameters, joins the
shards instead of scoring. The scores are the same, bit for bit, on machines with the same processor.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from corec import CorecError, controls, data, profiles, reranker, scores, stages
from corec.checked import exit_status
from corec.reranker import engine


def score(file: Path, number: int, of: int) -> None:
    """Score one shard of all windows that notebook 04 scores.

    Parameters
    ----------
    file
        YAML file of the run.
    number, of
        Number of the shard, from 0, and number of shards.

    Raises
    ------
    CorecError
        If a parameter is wrong, a stage is missing, the number is not that of a shard, or the re-ranker is not fine-tuned yet.
    """
    if not 0 <= number < of:
        raise CorecError(f"--shard is {number}: give a number from 0 to {of - 1}, below --of.")
    settings = profiles.load(file)
    stages.check(settings, "controls")
    folder = stages.attach(settings, "reranker")
    if not (folder / "checkpoint.pt").exists():
        raise CorecError(f"{folder / 'checkpoint.pt'} is missing: fine-tune the re-ranker first, with corec.scale.launch.")
    tables, prepared = data.load(settings.run), controls.load(settings.run)
    examples = reranker.load_examples(tables.windows, prepared, scores.load_evidence(settings.run))
    params, models = settings.reranker, {}
    trained = reranker.build(tables.items, prepared.vocabulary, params, settings.seed)
    done = reranker.train(trained, examples, settings, folder, stop_after=1)  # computes nothing if the checkpoint has a step
    if len(done) < params.curriculum_steps + params.steps and done["seconds"].iloc[-1] < 60 * params.max_minutes:
        reason = f"{folder / 'checkpoint.pt'} has only {len(done)} steps"
        raise CorecError(f"{reason}: finish the fine-tuning first, with corec.scale.launch.")
    models["corec"] = engine.merge(trained)
    if params.zero_shot:
        models["zero-shot"] = engine.merge(reranker.zero_shot(tables.items, prepared.vocabulary, params))
    for name, model in models.items():
        for split in ["test"] if params.prior or name == "zero-shot" else ["valid", "test"]:
            reranker.score_split(model, examples, split, settings.controls, folder / "shards", (number, of))
            print(f"{name}, {split}: shard {number} of {of} -> {folder / 'shards'}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m corec.scale.shards", description="Score one shard of the windows of a run.")
    parser.add_argument("--params", type=Path, required=True, help="parameter file, e.g. params/amazon-electronics.yaml")
    parser.add_argument("--shard", type=int, required=True, help="number of the shard, from 0")
    parser.add_argument("--of", type=int, required=True, help="number of shards")
    given = parser.parse_args(arguments)
    return exit_status(lambda: score(given.params, given.shard, given.of))


if __name__ == "__main__":
    sys.exit(main())
