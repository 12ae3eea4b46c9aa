"""`--plan`: what a run would take of each device, by compiling its programs and running none.

The programs for TPUs that are not there are compiled in a process of its own, in which libtpu is the only
one, and JAX computes on the processor.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import click

from keras_sd.cli.command import refuse_unused
from keras_sd.errors import UserError, installed_version, require

HERE = "here"
_CHILD = "KERAS_SD_PLANS"  # set in the process that compiles for TPUs
_TOPOLOGY = re.compile(r"(?P<chip>[^:]*):(?P<layout>[1-9]\d*(x[1-9]\d*){1,2})")
# Their number is that of the axes in which chips are connected.
_EXAMPLES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}
_PACKAGES = ("keras_sd", "keras", "jax", "jaxlib", "libtpu")
_SETTINGS = ("JAX_", "KERAS_", "LIBTPU_", "NVIDIA_TF32", "XLA_")
_WITHOUT_EFFECT = ("JAX_PLATFORMS", "KERAS_HOME", "KERAS_SD_CACHE", _CHILD)
_GIB = 2**30

plan_option = click.option(
    "--plan",
    metavar="here|CHIP:LAYOUT",
    help="Train nothing: compile the run's programs for the devices at hand, or for TPUs that are not there "
    f"({', '.join(_EXAMPLES.values())}), and print what they take of each device.",
)


def check_plan(options):
    """Raise UserError for a plan that cannot be made, before any long work."""
    plan = options["plan"]
    unused = ("coordinator", "process_id", "coordinator_timeout", "resume_from_checkpoint")
    refuse_unused(unused, False, "with --plan, which trains nothing")
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "jax":
        raise UserError(f"--plan {plan}: needs JAX; set KERAS_BACKEND=jax")
    if plan == HERE:
        refuse_unused(["num_processes"], False, f"with --plan {HERE}, which plans for this process")
        return
    chips, examples = chip_count(plan), ", ".join(_EXAMPLES.values())
    if chips is None:
        raise UserError(
            f"--plan {plan}: neither `here` nor a known layout of TPUs; give one such as {examples}"
        )
    processes = options["num_processes"]
    if processes is not None and (processes < 1 or chips % processes):
        raise UserError(
            f"--num-processes {processes}: the {chips} chips of {plan} do not divide among them; give a "
            f"divisor of {chips}"
        )
    require("libtpu")


def chip_count(topology):
    """Return the number of chips of a topology such as "v5e:2x4"; None for one of no known kind."""
    found = _TOPOLOGY.fullmatch(topology)
    if found is None or found["chip"] not in _EXAMPLES:
        return None
    lengths = found["layout"].split("x")
    if len(lengths) != _EXAMPLES[found["chip"]].count("x") + 1:
        return None
    return math.prod(map(int, lengths))


def run_plan(command, options, call):
    """Print what a run takes, from the cache or by compiling its programs.

    Args:
        command: the training command's name.
        options: of the command.
        call: `call(options)` runs the command.

    Raises:
        UserError: bad options, or libtpu fails.
    """
    check_plan(options)
    plan = options["plan"]
    is_elsewhere = plan != HERE and _CHILD not in os.environ
    from keras_sd import backend
    from keras_sd.files.cache import private_folder
    from keras_sd.files.json_files import parse_json

    folder = private_folder("plans")
    entry = None if folder is None else folder / _key(command, options)
    content = None if entry is None else backend.read_entry(entry)
    if content is None and is_elsewhere:
        _run_child(plan)
        return
    if content is None:
        _start(options)
        call(_with_distribution(options))
        content = json.dumps(_found()).encode()
        if entry is not None:
            backend.write_entry(entry, content)
    click.echo(as_text(parse_json(content, "plan"), command, plan))


def _with_distribution(options):
    """Return the options with `--distribution auto` for several chips, which a run has to be given."""
    from keras_sd import backend

    if options["plan"] == HERE or options["distribution"] or len(backend.plan().devices) == 1:
        return options
    print("plan: as with --distribution auto, without which the run uses one chip", file=sys.stderr)
    return options | {"distribution": "auto"}


def _start(options):
    from keras_sd import backend

    if options["plan"] != HERE:
        backend.start_plan(backend.tpu_devices(options["plan"]), options["num_processes"] or 1)
        return
    backend.start_plan(backend.devices_here(several=bool(options["distribution"])))


def _run_child(plan):
    """Start this command once more, as the process that compiles for TPUs; exit with its code."""
    from keras_sd import backend

    environment = os.environ | backend.tpu_environment() | {_CHILD: "1"}
    code = subprocess.call([sys.executable, *sys.orig_argv[1:]], env=environment)
    if code < 0:
        raise UserError(
            f"--plan {plan}: signal {-code} ended the process that compiles; it may have run out of memory"
        )
    if code:
        raise SystemExit(code)


def _key(command, options):
    """Return the name of the kept result: a hash of all that changes it.

    Of files and folders that options name, these are sizes and times of change; the weights are not read.
    What a data set of the hub holds counts by its name alone.
    """
    from keras_sd import presets

    places = {}
    for name, value in options.items():
        if name in ("output_dir", "cache_dir") or not isinstance(value, str | Path):
            continue
        path = Path(value)
        if name.startswith("pretrained") and not path.exists():
            path = presets.find(value, weights=False)
        places[name] = _contents(path)
    if options.get("dataset_config"):
        places["subsets"] = _subsets(options["dataset_config"])
    versions = {package: installed_version(package) for package in _PACKAGES}
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SETTINGS) and not name.startswith(_WITHOUT_EFFECT)
    }
    given = {name: value for name, value in options.items() if name != "output_dir"}
    parts = [command, given, places, versions, settings, _sources(), _devices(options["plan"])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _devices(plan):
    if plan != HERE:
        return None
    from keras_sd import backend

    return [f"{device.platform} {device.device_kind}" for device in backend.devices_here(several=True)]


def _contents(path):
    """Return sizes and times of change of a file, or of all in a folder; None if there is neither."""
    try:
        if path.is_file():
            return [path.stat().st_size, path.stat().st_mtime_ns]
        if not path.is_dir():
            return None
        inside = sorted(one for one in _below(path) if one.is_file())
        return [[str(one.relative_to(path)), one.stat().st_size, one.stat().st_mtime_ns] for one in inside]
    except OSError:  # a text that is too long for a path
        return None


def _below(folder):
    """Yield what is below a folder. Links to folders are followed, as a model's parts may be such."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in files)


def _subsets(path):
    """Return `_contents` of the folders that a file of `--dataset-config` names."""
    from keras_sd.data.dataset_config import read_dataset_config

    subsets = read_dataset_config(Path(path)).subsets
    folders = [place for subset in subsets for place in (subset.place, subset.masks.mask_data_dir)]
    return [None if place is None else _contents(Path(place)) for place in folders]


def _sources():
    """Return a hash of this package's code."""
    digest, package = hashlib.sha256(), Path(__file__).parents[2]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def _found():
    """Return what was planned as JSON values."""
    from keras_sd import backend

    plan = backend.plan()
    return {
        **plan.facts,
        "device_kind": plan.devices[0].device_kind,
        "devices": len(plan.devices),
        "memory": backend.device_bytes() if plan.platform == "gpu" else None,
        "programs": [dataclasses.asdict(program) for program in plan.programs],
    }


def as_text(found, command, plan):
    """Return a plan as lines for a terminal, a table in Markdown among them.

    Args:
        found: JSON values, as a plan keeps them.
        command: the training command's name.
        plan: the value of `--plan`.
    """
    from keras_sd.backend.chips import chip_of

    chip = chip_of(found["device_kind"])
    memory = found["memory"] or (chip and chip.memory)
    count = found["devices"]
    devices = f"{count} x {found['device_kind']}" + ("" if plan == HERE else f" ({plan})")
    shape = " x ".join(map(str, found["sample_shape"]))
    lines = [
        f"{command}, batch size {found['batch_size']}, samples {shape}, mixed precision "
        f"{found['mixed_precision']}, on {devices}; compiled, not run; for each device:",
        "",
        *_table(found["programs"]),
        "",
        *_verdict(found["programs"], memory),
        *_bounds(found, chip),
    ]
    return "\n".join(lines)


def _table(programs):
    from keras_sd.backend.collectives import KINDS

    kinds = [kind for kind in KINDS if any(kind in program["sent"] for program in programs)]
    columns = [
        "program",
        "batch",
        "arguments",
        "temporaries",
        "outputs",
        "sum",
        "TFLOP",
        *kinds,
        "compiled in",
    ]
    rows = [columns, ["---"] * len(columns)]
    for program in programs:
        memory = program["memory"]
        parts = ("arguments", "temporaries", "results")
        sizes = [_size(memory[part]) for part in parts] if memory else ["-"] * 3
        total = sum(memory.values()) if memory else program["needed"]
        rows.append(
            [
                program["title"],
                str(program["batch"]),
                *sizes,
                _size(total) if total else "-",
                f"{program['operations'] / 1e12:.3g}",
                *(_size(program["sent"].get(kind, 0)) for kind in kinds),
                f"{program['seconds']:.0f} s",
            ]
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def _size(count):
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.2f} MiB"


def _verdict(programs, memory):
    """Yield lines on what does and what does not fit into a device's memory."""
    for program in programs:
        if program["needed"] is not None:
            yield (
                f"the {program['title']} does not fit: the compiler finds {_size(program['needed'])} "
                f"needed and {_size(program['available'])} there"
            )
    step = _step(programs)
    if step["memory"] and memory:
        total = sum(step["memory"].values())
        fits = "fits" if total <= memory else "does not fit"
        yield f"the training step {fits}: {_size(total)} of {_size(memory)}"


def _step(programs):
    return next(program for program in programs if program["title"] == "training step")


def _bounds(found, chip):
    """Yield lines on how many images a second the chips' published figures allow."""
    step = _step(found["programs"])
    if chip is None:
        yield f"no bound on images/s: no published figures of {found['device_kind']} are known here"
        return
    seconds = step["operations"] / chip.operations
    yield (
        f"at most {found['batch_size'] / seconds:.4g} images/s on all devices by the "
        f"{chip.operations / 1e12:g} TFLOP/s in bfloat16 that are published of {chip.title} ({chip.source})"
    )
    if step["traffic"]:
        seconds = step["traffic"] / chip.bytes_per_second
        yield (
            f"at most {found['batch_size'] / seconds:.4g} images/s by its {chip.bytes_per_second / 1e9:g} "
            "GB/s, as each argument is read once"
        )
