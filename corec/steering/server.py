"""``corec demo``: the steering demonstration in a browser, served by voila."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from corec import CorecError, paths, profiles, stages

NOTEBOOK = "00_steering.ipynb"


def prepare(profile: Path) -> Path:
    """Write a copy of the notebook of the demonstration for a run whose stage 04 has finished; returns the copy.

    Raises
    ------
    CorecError
        If the stage has not finished with these parameters.
    """
    import papermill

    settings = profiles.load(profile)
    try:
        stages.check(settings, "reranker")
    except CorecError as error:
        raise CorecError(f"{error} `corec run {profile} --only reranker` runs all of them.") from None
    copy = paths.stage_dir(settings.run, "reranker").parent / NOTEBOOK
    source = paths.root() / "notebooks" / NOTEBOOK
    papermill.execute_notebook(
        str(source), str(copy), parameters={"profile": str(profiles.find(profile))}, prepare_only=True, progress_bar=False
    )
    return copy


def serve(profile: Path, port: int, browser: bool) -> int:
    """Serve the demonstration of a run until it is interrupted; returns the exit status of the server.

    Parameters
    ----------
    profile
        Parameters of the run.
    port
        Port on this machine.
    browser
        Whether to open a browser.

    Raises
    ------
    CorecError
        If the run has no finished stage 04, or the port is in use.
    """
    copy = prepare(profile)
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise CorecError(f"Port {port} cannot be used ({error.strerror}): give another one with --port.") from None
    print(f"the demonstration is at http://localhost:{port}/ (end it with Ctrl-C)", flush=True)
    command = [sys.executable, "-m", "voila", str(copy), f"--port={port}", "--Voila.ip=127.0.0.1", "--Voila.log_level=WARN"]
    command += ["--Voila.port_retries=0", *([] if browser else ["--no-browser"])]
    with subprocess.Popen(command, env=os.environ | {"COREC_ROOT": str(paths.root())}) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            server.wait(20)
            return 0
