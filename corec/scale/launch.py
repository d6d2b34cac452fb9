"""Fine-tuning on several devices, as ``accelerate launch`` starts it (see ``params/launch/``)."""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from corec import CorecError, controls, data, machine, paths, profiles, reranker, stages
from corec.reranker import devices


def join() -> Accelerator:
    """Meet the other processes of ``accelerate launch`` (none when started without it).

    Raises
    ------
    CorecError
        When the launch asks for DeepSpeed, or for more processes than there are GPUs.
    """
    if devices.asked_for("ACCELERATE_USE_DEEPSPEED"):
        raise CorecError(
            "The launch asks for DeepSpeed, which would shard a few hundred megabytes of optimiser state only: launch with "
            "params/launch/ddp.yaml, or with params/launch/fsdp.yaml to shard the weights."
        )
    started, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and started > cards:
        raise CorecError(f"{started} processes for {cards} GPUs: give accelerate launch --num_processes {cards}.")
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # loading a backbone takes a while
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patient])


def leave(accelerator: Accelerator) -> None:
    """Part from the other processes once all is written; without a GPU this ends the process.

    gloo's threads now and then abort a process that ends in the ordinary way ("terminate called without an active exception").
    """
    if torch.cuda.is_available():
        accelerator.end_training()
    elif accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def fine_tune(file: Path) -> None:
    """Fine-tune the re-ranker of the run of a parameter file on all processes.

    It takes stages 01 to 03 of the run as the notebooks left them, and leaves a checkpoint with which notebook 4, run with the
    same parameters, goes on: there nothing is trained again.

    Raises
    ------
    CorecError
        For wrong parameters, missing stages, or what :func:`corec.reranker.train` raises.
    """
    settings = profiles.load(file)
    stages.check(settings, "controls")
    accelerator = join()
    tables, prepared = data.load(settings.run), controls.load(settings.run)
    examples = reranker.load_examples(tables.windows, prepared)
    windows = min(settings.reranker.batch_size, len(prepared.pools["train"].window))
    devices.share(windows, accelerator.process_index, accelerator.num_processes)
    dtype = devices.agree(str(machine.resolve_dtype(settings.reranker.dtype)).removeprefix("torch."))  # the same on all
    params = settings.reranker.model_copy(update={"dtype": dtype})
    with accelerator.local_main_process_first():  # downloads
        model = reranker.build(tables.items, prepared.vocabulary, params, settings.seed, device="cpu")
    if not devices.asked_for("ACCELERATE_USE_FSDP"):  # layers that are sharded go to their devices one by one
        model.model.to(accelerator.device)
        model.head.to(accelerator.device)
    folder = paths.stage_dir(settings.run, "reranker")
    curve = reranker.train(model, examples, settings, folder, accelerator=accelerator)
    accelerator.print(
        f"{len(curve)} steps on {accelerator.num_processes} processes are kept in {folder / 'checkpoint.pt'}: "
        "notebooks/04_reranker.ipynb with the same parameters goes on from there."
    )
    leave(accelerator)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m corec.scale.launch", description="Fine-tune the re-ranker of a run on several devices."
    )
    parser.add_argument("--params", type=Path, required=True, help="parameter file, e.g. params/amazon-electronics.yaml")
    try:
        fine_tune(parser.parse_args(arguments).params)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
