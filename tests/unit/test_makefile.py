"""The Makefile, where a mistake would show only in another set-up than ours."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("make") is None, reason="no make: install it (Debian: apt-get install make)")
def test_each_set_of_extras_has_a_stamp_without_commas(tmp_path):
    command = ["make", "--dry-run", "setup", "EXTRAS=dev,intel-opencl", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert f"touch {tmp_path}/.installed-dev-intel-opencl\n" in done.stdout
