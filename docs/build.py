"""Write the result pages of figures/ from their CSV files, joined tables of several runs, and the tables of README.md and docs/.

With ``--check`` nothing is written: files that differ are named, and the exit status is their number.
"""

import sys
from pathlib import Path

from corec import pages
from corec.studies import missing_report, texts

ROOT = Path(__file__).parents[1]


def pages_of_figures() -> dict[Path, str]:
    """The result pages of all folders in figures/ that hold CSV files."""
    folders = [folder for folder in sorted((ROOT / "figures").iterdir()) if folder.is_dir()]
    return {path: text for folder in folders for path, text in pages.pages_of(folder).items()}


def documents() -> dict[Path, str]:
    """README and the documentation with their tables."""
    return {path: pages.embed(path.read_text(), ROOT) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def main() -> int:
    """Write, or with ``--check`` compare; returns how many files differ."""
    check, stale = "--check" in sys.argv, 0
    if not check:
        texts.join(ROOT / "figures")
        missing_report.join(ROOT / "figures")
    for make in (pages_of_figures, documents):
        for path, text in make().items():
            if not path.exists() or path.read_text() != text:
                stale += 1
                print(f"{path.relative_to(ROOT)}: {'does not agree with its CSV files' if check else 'written'}")
                if not check:
                    path.write_text(text)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main())
