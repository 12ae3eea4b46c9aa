"""Numbers from the reference libraries, computed in processes of their own.

torch and TensorFlow do not share a process here: a snippet runs in a process beside, and tensors go in and
out through safetensors files. The processes are forked from one that has imported the libraries.
"""

import contextlib
import multiprocessing
import sys
import textwrap
import traceback
import types
from pathlib import Path

from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.reference_libraries"])


def run_reference(script, arrays, tmp_path):
    """Runs a snippet of torch code and returns what it computed.

    The snippet finds `torch`, `sys`, safetensors' `load_file` and `save_file`, `inputs` (tensors by name),
    `folder` (`tmp_path`, for other files), `randomize(module)` and `store_weights(module, group="weights")`,
    and fills the dictionary `outputs` with tensors.

    Args:
        script: Python source; common indentation is removed.
        arrays: dictionary of NumPy arrays.
        tmp_path: an existing folder.

    Returns:
        A dictionary of NumPy arrays.
    """
    tmp_path = Path(tmp_path)
    failure = tmp_path / "reference-failure.txt"
    save_file(arrays, tmp_path / "inputs.safetensors")
    process = start_process(_run, textwrap.dedent(script), tmp_path, failure)
    assert exit_code(process) == 0, failure.read_text(encoding="utf-8")
    return load_file(tmp_path / "outputs.safetensors")


def start_process(function, *arguments):
    """Starts a function in a forked process."""
    process = CONTEXT.Process(target=function, args=arguments)
    # The process that the others are forked from finds its module from where it is started, which must not be
    # where some test happens to be.
    with contextlib.chdir(ROOT):
        process.start()
    return process


def exit_code(process, seconds=SECONDS):
    """Waits for the end of a forked process, which is killed if it takes longer."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the forked program took more than {seconds} s")
    return process.exitcode


def group_of(outputs, group="weights"):
    """The outputs below `group/`, by the rest of their names."""
    prefix = group + "/"
    return {name.removeprefix(prefix): array for name, array in outputs.items() if name.startswith(prefix)}


def _run(script, folder, failure):
    """What the process does; one that fails says why in the file `failure`."""
    try:
        _compute(script, folder)
    except BaseException:
        failure.write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _compute(script, folder):
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    outputs = {}

    def randomize(module, scale=0.1):
        """Draws all weights anew, so that no zero or small initial value hides a fault."""
        for name, parameter in module.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * scale + gain)
        return module.eval()

    def store_weights(module, group="weights"):
        """Puts a module's parameters into the outputs, under `group/name`."""
        outputs.update({f"{group}/{name}": tensor for name, tensor in module.state_dict().items()})

    inputs = load_file(folder / "inputs.safetensors")
    program = sys.modules["__main__"] = types.ModuleType("__main__")  # pickles name classes by their module
    vars(program).update(
        torch=torch,
        sys=sys,
        load_file=load_file,
        save_file=save_file,
        folder=folder,
        inputs=inputs,
        outputs=outputs,
        randomize=randomize,
        store_weights=store_weights,
    )
    exec(compile(script, str(folder / "reference program"), "exec"), vars(program))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in program.outputs.items()}
    save_file(tensors, folder / "outputs.safetensors")
