"""The files for clusters are ones that Kubernetes, JobSet and a shell accept, with commands that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from keras_sd.cli.train.main import train

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "cluster"
JOBSETS = sorted(FOLDER.glob("*.yaml"))
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}

# jobset.x-k8s.io/v1alpha2, the fields that are used; `template` is a Job without its type.
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"], "properties": {"name": NAME}},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"enableDNSHostnames": {"type": "boolean"}, "subdomain": NAME},
                },
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {
                                        "type": "string",
                                        "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                                    },
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                *("BackoffLimitExceeded", "DeadlineExceeded"),
                                                *("FailedIndexes", "MaxFailedIndexesExceeded"),
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": NAME,
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


def check_training(words, run):
    """Checks that a training command takes the words, and gives the options that processes need."""
    assert words[:3] == ["python", "-m", "keras_sd.train"]
    command = train.get_command(click.Context(train), words[3])
    context = command.make_context(words[3], words[4:])
    assert context.params["output_dir"] == run
    assert context.params["distribution"] == "fsdp" and context.params["coordinator"]
    return context.params


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)
def test_jobsets(path):
    jobset = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(jobset, SCHEMA)
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": workers["name"]}}
    kubernetes_validate.validate(job | workers["template"], "1.34", strict=True)
    spec = workers["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    # What bash starts, with an `exec` that prints.
    (script,) = container["args"]
    printed = subprocess.run(
        [*container["command"], script.replace("exec python", "printf '%s\\n' python")],
        env={"PATH": "/usr/bin:/bin", "JOB_COMPLETION_INDEX": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    options = check_training(printed.stdout.splitlines(), variables["RUN"])
    assert options["process_id"] == 1 and options["num_processes"] == spec["completions"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    host = f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert options["coordinator"] == f"{host}:{port}" and jobset["spec"]["network"]["enableDNSHostnames"]
    (count,) = container["resources"]["limits"].values()
    assert options["train_batch_size"] % (count * spec["completions"]) == 0


def test_slurm(tmp_path):
    script = FOLDER / "slurm.sh"
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    text = script.read_text(encoding="utf-8")
    directives = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert {"--nodes=2", "--ntasks-per-node=1", "--signal=TERM@300"} <= set(directives)
    # Stand-ins for Slurm's commands; srun starts each task.
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nSLURM_PROCID=1 exec "$@"\n')
    (tmp_path / "python").write_text("#!/bin/bash\nprintf '%q ' python \"$@\"\n")
    for name in ("scontrol", "srun", "python"):
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"

    def started():
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RUN": str(run)}
        environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
        return check_training(shlex.split(done.stdout), str(run))

    options = started()
    assert (options["coordinator"], options["num_processes"], options["process_id"]) == ("node1:29500", 2, 1)
    assert options["resume_from_checkpoint"] is None
    (run / "checkpoint-2").mkdir(parents=True)
    assert started()["resume_from_checkpoint"] == "latest"
