"""Fine-tuning on several devices, started by ``accelerate launch`` (see ``params/launch/``)."""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from corec import CorecError, controls, data, machine, profiles, reranker, scores, stages
from corec.checked import exit_status
from corec.reranker import devices


def join() -> Accelerator:
    """Join the process group of ``accelerate launch`` (one process if started without it).

    Raises
    ------
    CorecError
        If the launch requests DeepSpeed, or more processes than there are GPUs.
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
    """Leave the process group after all files are written; without a GPU, this ends the process.

    On a normal exit, the threads of gloo sometimes abort the process ("terminate called without an active exception").
    """
    if torch.cuda.is_available():
        accelerator.end_training()
    elif accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def fine_tune(file: Path) -> None:
    """Fine-tune the re-ranker of a run on all processes.

    Requires stages 01 to 03 of the run. Writes the checkpoint from which notebook 04, with the same parameters, continues without
    further training.

    Parameters
    ----------
    file
        YAML file of the run.

    Raises
    ------
    CorecError
        If a parameter is wrong, a stage is missing, or :func:`corec.reranker.train` fails.
    """
    settings = profiles.load(file)
    stages.check(settings, "controls")
    accelerator = join()
    tables, prepared = data.load(settings.run), controls.load(settings.run)
    examples = reranker.load_examples(tables.windows, prepared, scores.load_evidence(settings.run))
    windows = min(settings.reranker.batch_size, len(prepared.pools["train"].window))
    devices.share(windows, accelerator.process_index, accelerator.num_processes)
    dtype = devices.agree(str(machine.resolve_dtype(settings.reranker.dtype)).removeprefix("torch."))  # the same on all
    params = settings.reranker.model_copy(update={"dtype": dtype})
    with accelerator.local_main_process_first():  # downloads
        model = reranker.build(tables.items, prepared.vocabulary, params, settings.seed, device="cpu")
    if not devices.asked_for("ACCELERATE_USE_FSDP"):  # sharded layers are moved one at a time
        model.model.to(accelerator.device)
        model.head.to(accelerator.device)
    folder = stages.attach(settings, "reranker")
    curve = reranker.train(model, examples, settings, folder, accelerator=accelerator)
    accelerator.print(
        f"{len(curve)} steps on {accelerator.num_processes} processes are saved in {folder / 'checkpoint.pt'}: "
        "notebooks/04_reranker.ipynb with the same parameters continues from there."
    )
    leave(accelerator)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m corec.scale.launch", description="Fine-tune the re-ranker of a run on several devices."
    )
    parser.add_argument("--params", type=Path, required=True, help="parameter file, e.g. params/amazon-electronics.yaml")
    given = parser.parse_args(arguments)
    return exit_status(lambda: fine_tune(given.params))


if __name__ == "__main__":
    sys.exit(main())
