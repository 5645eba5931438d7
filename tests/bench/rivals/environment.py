"""The rivals' own virtual environment: made once from pinned requirements, made again when those change."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
FOLDER = HERE.parents[2] / ".venv-rivals"
SERVE_REQUIREMENTS = HERE / "requirements-serve.txt"
SERVE_FOLDER = HERE.parents[2] / ".venv-rivals-serve"
"""The servers want other versions than the rivals of scoring."""
RIVALS = ("opencv_floor", "daft", "tf_data", "ray_recipe")
_SCRIPTS = {"daft": "daft_openvino"}


def interpreter(folder: Path = FOLDER, requirements: Path = REQUIREMENTS) -> str:
    """Path of the environment's Python, after the environment was made where it was missing or out of date.

    Raises:
        subprocess.CalledProcessError: pip could not install; its own words are on standard error.
    """
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if not (python.exists() and stamp.exists() and stamp.read_text(encoding="ascii") == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.write(f"making {folder.name} for the rivals, once\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(requirements)], check=True)
        stamp.write_text(wanted, encoding="ascii")
    return str(python)


def script(rival: str) -> str:
    """Path of the rival's script."""
    return str(HERE / f"{_SCRIPTS.get(rival, rival)}.py")
