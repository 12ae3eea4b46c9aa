"""Numbers from the reference libraries, computed in a process of their own.

torch and TensorFlow do not share a process here: a snippet runs in a subprocess, and tensors go in
and out through safetensors files.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from safetensors.numpy import load_file, save_file

SECONDS = 300

PROLOGUE = """\
import sys
from pathlib import Path

sys.modules["tensorflow"] = None  # a library that looks for it finds none
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
folder = Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")
outputs = {}


def randomize(module, scale=0.1):
    \"\"\"Draws all weights anew, so that no zero or small initial value hides a fault.\"\"\"
    for name, parameter in module.named_parameters():
        gain = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(torch.randn_like(parameter) * scale + gain)
    return module.eval()


def store_weights(module, group="weights"):
    \"\"\"Puts a module's parameters into the outputs, under `group/name`.\"\"\"
    outputs.update({f"{group}/{name}": tensor for name, tensor in module.state_dict().items()})

"""

EPILOGUE = """
save_file(
    {name: tensor.detach().clone().contiguous() for name, tensor in outputs.items()},
    folder / "outputs.safetensors",
)
"""


def run_reference(script, arrays, tmp_path):
    """Runs a snippet of torch code and returns what it computed.

    The snippet finds `torch`, `inputs` (tensors by name), `folder` (`tmp_path`, for other files),
    `randomize(module)` and `store_weights(module, group="weights")`, and fills the dictionary
    `outputs` with tensors.

    Args:
        script: Python source; common indentation is removed.
        arrays: dictionary of NumPy arrays.
        tmp_path: an existing folder.

    Returns:
        A dictionary of NumPy arrays.
    """
    tmp_path = Path(tmp_path)
    save_file(arrays, tmp_path / "inputs.safetensors")
    program = tmp_path / "reference_program.py"
    program.write_text(PROLOGUE + textwrap.dedent(script) + EPILOGUE, encoding="utf-8")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, (
        f"the reference program failed with exit code {done.returncode}:\n{done.stderr}"
    )
    return load_file(tmp_path / "outputs.safetensors")


def group_of(outputs, group="weights"):
    """The outputs below `group/`, by the rest of their names."""
    prefix = group + "/"
    return {name.removeprefix(prefix): array for name, array in outputs.items() if name.startswith(prefix)}
