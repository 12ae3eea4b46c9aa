"""Trains one good run and three bad ones with the bundled model, for the pictures of the training guide.

    python tools/bad_runs.py --folder bench/bad-runs

Then `keras-sd plot` draws them. The runs differ in one option each: a learning rate that is far too high,
eight images in place of thousands, and another prediction type than the model was trained with.
"""

import argparse
import subprocess
import sys
from pathlib import Path

STEPS = 300
COMMON = (
    *("text-to-image", "--dataset-name", "openmoji", "--max-train-steps", STEPS, "--train-batch-size", 16),
    *("--lr-scheduler", "constant", "--lr-warmup-steps", 20, "--ema-decay", 0.98, "--evaluation-steps", 0),
    *("--validation-steps", 25, "--validation-examples", 48),
)
RUNS = {
    "good": ("--learning-rate", 2e-4),
    "learning-rate-too-high": ("--learning-rate", 0.02),
    "overfitted": ("--learning-rate", 2e-4, "--max-train-samples", 8),
    "wrong-prediction-type": ("--learning-rate", 2e-4, "--prediction-type", "v_prediction"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("bench/bad-runs"), help="for the run folders")
    folder = parser.parse_args().folder
    for name, options in RUNS.items():
        if (folder / name / "model").exists():
            continue
        resumed = ["--resume-from-checkpoint", "latest"] if (folder / name / "run.json").exists() else []
        arguments = [*COMMON, *options, "--output-dir", folder / name, *resumed]
        command = [sys.executable, "-m", "keras_sd.train", *map(str, arguments)]
        subprocess.run(command, check=False)  # a run that diverges ends with an error, and its log stays


if __name__ == "__main__":
    main()
