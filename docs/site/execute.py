"""Write the executed notebooks of a finished run to ``docs/executed``, and the page of computed answers of the demonstration.

``python docs/site/execute.py`` shows the finished stages of ``params/ml-100k.yaml``; it trains nothing. Outputs above 200 KB
are left out.
"""

import argparse
import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
from PIL import Image

from corec import files, paths, profiles, stages, steering

ROOT = Path(__file__).parents[2]
EXECUTED = ROOT / "docs" / "executed"
LARGEST = 200_000  # bytes of one output
USERS = 5


def with_palette(picture: str) -> str:
    """A PNG picture (base64) with a palette of 256 colours, which takes about a third of the bytes."""
    written = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        written, format="PNG", optimize=True
    )
    return base64.b64encode(written.getvalue()).decode()


def small(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without large outputs, widgets, times and folders of this machine."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # progress bars
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = with_palette(output["data"]["image/png"])
            for kind, value in list(output.get("data", {}).items()):
                if len(str(value)) > LARGEST:
                    output["data"] = {"text/plain": f"(an output of {len(str(value)) // 1000} KB is left out)"}
                    break
                if isinstance(value, str) and kind.startswith("text"):
                    output["data"][kind] = value.replace(f"{paths.root()}/", "")
            if "text" in output:
                output["text"] = output["text"].replace(f"{paths.root()}/", "")
    return notebook


def main() -> int:
    """Execute the notebooks whose stages have finished; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the executed notebooks of a finished run to docs/executed.")
    parser.add_argument("profile", nargs="?", default="params/ml-100k.yaml", help="parameter file of the run")
    profile = parser.parse_args().profile
    settings = profiles.load(profile)
    os.environ.pop("COREC_AGAIN", None)
    if stages.finished(settings, "figures") is None:  # or a stage before it
        raise SystemExit(f"Run {settings.run!r} has not finished: `corec run {profile}` runs the missing and outdated stages.")
    looked = [*stages.ancestors("figures"), "figures"]
    EXECUTED.mkdir(exist_ok=True)
    for name in ["00_steering", *(stages.NOTEBOOKS[stage] for stage in looked)]:
        path = EXECUTED / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as folder:
            executed = papermill.execute_notebook(
                str(ROOT / "notebooks" / path.name),
                str(Path(folder) / path.name),
                parameters={"profile": profile},
                cwd=str(paths.root()),
                progress_bar=False,
            )
        files.write_text(path, nbformat.writes(small(executed)))
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB", flush=True)
    session = steering.Session(settings)
    page = steering.html(steering.collect(session, session.places[:USERS]))
    files.write_text(EXECUTED / "steering.html", page)
    print(f"docs/executed/steering.html: {len(page) / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
