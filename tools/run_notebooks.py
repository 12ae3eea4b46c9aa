"""Makes the notebooks from their scripts and executes them: `python tools/run_notebooks.py [NAMES…]`.

`notebooks/NN_name.py`, a jupytext percent script, becomes `notebooks/NN_name.ipynb` with its outputs, run
from top to bottom in a fresh kernel of this interpreter. What would differ from one machine or run to the
next (times of execution, versions of the kernel, ids of cells) is left out, so that differences can be read.
"""

import ast
import subprocess
import tempfile
import time
from pathlib import Path

import click
import jupytext
import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from keras_sd import UserError
from keras_sd.cli.program import run_command
from keras_sd.files.writing import replaced

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"

# What `--smallest` sets in place of the constants in a notebook's cell tagged `parameters`.
SMALLEST = {
    "01_how_stable_diffusion_works": {"NUM_INFERENCE_STEPS": 4},
    "02_ddim_from_scratch": {
        "IMAGE_SIZE": 16,
        "CHANNELS": (8,),
        "TRAINING_STEPS": 4,
        "EVALUATIONS": 2,
        "SAMPLES": 10,
        "SAMPLING_STEPS": 2,
    },
    "03_sampling_methods": {"STEP_COUNTS": (2, 3), "REFERENCE_STEPS": 6, "NUM_SEEDS": 2},
    "04_random_walks": {"NUM_INFERENCE_STEPS": 3, "GRID_SIDE": 4},  # all in batches of 8, compiled once
    "05_create_captions": {"IMAGES": 20},
    "06_fine_tune": {
        "TRAINING_STEPS": 2,
        "TRAIN_BATCH_SIZE": 4,
        "TRAINING_IMAGES": 16,
        "KID_IMAGES": 6,
        "NUM_INFERENCE_STEPS": 2,
    },
    "07_dreambooth_and_textual_inversion": {
        "CLASS_IMAGES": 4,
        "DREAMBOOTH_STEPS": 2,
        "INVERSION_STEPS": 2,
        "SAMPLES": 8,
        "CLASS_SAMPLES": 8,
        "NUM_INFERENCE_STEPS": 2,
    },
    "08_super_resolution": {
        "TEST_IMAGES": 4,
        "NUM_INFERENCE_STEPS": 2,
        "STEP_COUNTS": (1, 2),
        "NOISE_LEVELS": (0, 40),
        "NUM_SEEDS": 4,
        "PROMPTS": ("red heart",),
    },
    "09_xla_and_speed": {
        "NUM_INFERENCE_STEPS": 2,
        "NUM_IMAGES": 1,
        "TURNS": 1,
        "PRECISIONS": ("bfloat16",),
        "TRAINING_BATCH": 2,
        "DEVICE_STEPS": 2,
    },
    "10_bring_and_take_weights": {"NUM_INFERENCE_STEPS": 2, "PROMPTS": ("red heart",)},
    "11_your_own_photographs": {
        "CROPS": 4,
        "BUCKETS": 3,
        "TRAIN_BATCH_SIZE": 2,
        "TRAINING_STEPS": 2,
        "VALIDATION_STEPS": 2,
        "FEW_STEPS": 2,
        "NUM_INFERENCE_STEPS": 2,
    },
    "12_several_devices": {
        "VIRTUAL_DEVICES": 2,
        "WIDTH": 16,
        "KINDS": ("fsdp",),
        "TRAIN_BATCH_SIZE": 2,
        "IMAGES": 4,
        "STEPS": 2,
    },
}

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@click.command()
@click.argument("names", nargs=-1)
@click.option("--smallest", is_flag=True, help="Only see that all cells run, with the smallest settings.")
@click.option("--output-dir", type=click.Path(file_okay=False, path_type=Path), help="Beside the scripts.")
def run_notebooks(names, smallest, output_dir):
    """Execute the notebooks NAMES, such as 01_how_stable_diffusion_works; all of them by default."""
    if smallest and output_dir is None:
        raise UserError("--smallest: would replace the notebooks' images; name a folder with --output-dir")
    for source in sources(names):
        begun = time.perf_counter()
        run_notebook(source, (output_dir or source.parent) / f"{source.stem}.ipynb", smallest)
        click.echo(f"{source.stem}: {time.perf_counter() - begun:.0f} s")


def sources(names=(), folder=FOLDER):
    """Return the scripts of these notebooks, or of all, in order.

    Raises:
        UserError: there is no such notebook.
    """
    known = {path.stem: path for path in sorted(folder.glob("[0-9]*.py"))}
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no such notebook; use {', '.join(known)}")
    return [path for name, path in known.items() if name in names or not names]


def run_notebook(source, output, smallest=False):
    """Execute one script as a notebook and write it; on a failure nothing is written.

    Args:
        source: the percent script; its folder is the kernel's working directory.
        output: the `.ipynb`; its folder is made if there is none.
        smallest: sets the constants in `SMALLEST`.

    Raises:
        UserError: a cell fails, or `SMALLEST` has a constant that the notebook has not.
    """
    notebook = read_script(source)
    if smallest:
        _set_parameters(notebook, source.stem, SMALLEST.get(source.stem, {}))
    execute(notebook, source)
    with replaced(output) as staging:
        nbformat.write(notebook, staging)


def read_script(source):
    """Return the notebook of a percent script, without outputs and with stable ids and metadata."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02}"
    return notebook


def _set_parameters(notebook, name, values):
    """Insert a cell that sets these constants after the one tagged `parameters`, as papermill does."""
    if not values:
        return
    place = next((i for i, cell in enumerate(notebook.cells) if "parameters" in _tags(cell)), None)
    if place is None:
        raise UserError(f"{name}: has no cell tagged parameters; add one, or take it out of SMALLEST")
    statements = ast.parse(notebook.cells[place].source).body
    assigned = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    known = {target.id for target in assigned if isinstance(target, ast.Name)}
    unknown = values.keys() - known
    if unknown:
        raise UserError(f"{name}: has no parameters {', '.join(sorted(unknown))}; mend SMALLEST")
    text = "\n".join(f"{constant} = {value!r}" for constant, value in values.items())
    cell = nbformat.v4.new_code_cell(text, id="smallest", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(place + 1, cell)


def _tags(cell):
    return cell.metadata.get("tags", ())


class _ThisInterpreter(KernelSpecManager):
    """Knows one kernel, that of the running interpreter, whatever kernels are installed."""

    def get_kernel_spec(self, kernel_name):
        # What libraries in C++ write on their own, such as TensorFlow's log, stays out of the notebook.
        return KernelSpec(**get_kernel_dict(extra_arguments=["--IPKernelApp.capture_fd_output=False"]))


def execute(notebook, source):
    """Run all cells in place, in the script's folder.

    Raises:
        UserError: a cell fails; the line names it, counted from 1 over all cells.
    """
    places = {cell.id: index for index, cell in enumerate(notebook.cells)}
    running = []
    sockets = tempfile.TemporaryDirectory()
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(
            kernel_spec_manager=_ThisInterpreter(), transport="ipc", ip=str(Path(sockets.name, "kernel"))
        ),
        timeout=None,
        resources={"metadata": {"path": str(source.parent)}},
        coalesce_streams=True,
        record_timing=False,
        on_cell_start=lambda cell, cell_index: running.append(cell.id),
    )
    try:
        client.execute(cleanup_kc=True, stderr=subprocess.DEVNULL)
    except (CellExecutionError, DeadKernelError) as error:
        place = places[running[-1]] + 1 if running else 1
        fault = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
        raise UserError(f"{source.name}: cell {place} failed with {fault}; mend it and run again") from error
    finally:
        sockets.cleanup()
    notebook.metadata = nbformat.from_dict(METADATA)


if __name__ == "__main__":
    run_command(run_notebooks, "run_notebooks.py")
