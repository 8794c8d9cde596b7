"""What every benchmark's JSON tells beside its figures: machine, versions, commit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def parser(text: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=text)
    result.add_argument("--output", type=Path, help="write the JSON to this file, too")
    return result


def about() -> dict[str, Any]:
    import diffusers

    import prfl_fast

    folder = Path(__file__).parent
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "prfl_fast"], cwd=folder.parent, capture_output=True)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "prfl_fast": prfl_fast.__version__,
        "commit": (answer.stdout.strip() or None) and answer.stdout.strip() + ("+" if changed.stdout else ""),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(figures: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(figures, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")
