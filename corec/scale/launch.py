"""Fine-tuning on several devices, as ``accelerate launch`` starts it (see ``params/launch/``)."""

import argparse
import sys
from pathlib import Path

import torch

from corec import CorecError, controls, data, machine, paths, profiles, reranker, stages
from corec.reranker import devices as parallel


def main(arguments: list[str] | None = None) -> int:
    """Fine-tune on all processes of ``accelerate launch``; returns the exit status.

    It takes stages 01 to 03 of the run as the notebooks left them, and leaves a checkpoint with which notebook 4, run with the
    same parameters, goes on: there nothing is trained again.
    """
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m corec.scale.launch", description="Fine-tune the re-ranker of a run on several devices."
    )
    parser.add_argument("--params", type=Path, required=True, help="parameter file, e.g. params/amazon-electronics.yaml")
    given = parser.parse_args(arguments)
    try:
        settings = profiles.load(given.params)
        stages.check(settings, "controls")
        devices = parallel.join()
        tables, prepared = data.load(settings.run), controls.load(settings.run)
        examples = reranker.load_examples(tables.windows, prepared)
        devices.share(min(settings.reranker.batch_size, len(prepared.pools["train"].window)))
        fast = devices.agreed(float(machine.resolve_dtype(settings.reranker.dtype) == torch.bfloat16))
        own = settings.reranker.model_copy(update={"dtype": "bfloat16" if fast else "float32"})  # the same on all
        with parallel.one_first():
            device = "cpu" if devices.sharded else None
            model = reranker.build(tables.items, prepared.table, own, settings.seed, device=device)
        if devices.sharded:
            parallel.shard(model.causal, devices)
            model.head.to(parallel.here())
        folder = paths.stage_dir(settings.run, "reranker")
        folder.mkdir(parents=True, exist_ok=True)
        curve = reranker.train(model, examples, settings, folder, devices=devices)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    if devices.first:
        print(
            f"{len(curve)} steps on {devices.size} processes are kept in {folder / 'checkpoint.pt'}: notebooks/04_reranker.ipynb "
            "with the same parameters goes on from there."
        )
    parallel.leave(devices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
