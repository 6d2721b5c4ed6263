"""The report of a run: one HTML file without any network, and the table for the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from experiments.errors import RunFolderError
from experiments.report.page import render
from experiments.report.reading import load
from experiments.report.terminal import text_table

__all__ = ["text_table", "write"]


def write(out_dir: Path, target: Path | None = None) -> Path:
    """Writes the report of a run, finished or not.

    The same folder gives the same bytes.

    Args:
        out_dir: folder of the run (`summary.json`, `arms/`, `config.yaml`, `environment.json`).
        target: file to write; `out_dir/report.html` by default.

    Returns:
        The file that was written.

    Raises:
        RunFolderError: the folder holds no run.
    """
    try:
        run = load(Path(out_dir))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{out_dir}: there is no run to report",
            found="neither summary.json nor arms/",
            expected="the folder that `heteroq run` wrote",
            remedy="name that folder: heteroq report DIR",
        ) from error
    path = Path(target) if target is not None else Path(out_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(render(run), encoding="utf-8")
    os.replace(partial, path)
    return path
