"""Training in several processes: each watches a copy of itself, which trains (`training.watcher`)."""

import json
import os

from keras_sd import __version__, interruption
from keras_sd.errors import installed_version
from keras_sd.files.json_files import parse_json
from keras_sd.training import rendezvous, watcher

# What may differ between processes, and where the options came from.
_OWN = {"coordinator", "coordinator_timeout", "process_id", "config_file"}
_PACKAGES = ("jax", "jaxlib", "keras", "numpy")


def watch(method, options):
    """Watch a copy of this process, where several train together; return in the copy, and otherwise at once.

    Args:
        method: the training command's name.
        options: of the command, as the user has given them.

    Raises:
        UserError: the processes do not meet, or differ in options or versions.
        SystemExit: in the watching process, when all processes have ended.
    """
    given = {name: options[name] for name in ("coordinator", "num_processes", "process_id")}
    address = rendezvous.check_processes(options["distribution"], **given)
    count, index = options["num_processes"], options["process_id"]
    has_jax = os.environ.get("KERAS_BACKEND") == "jax"  # otherwise `distribution.start` refuses
    if address is None or count == 1 or not has_jax or not interruption.is_watching():
        return
    facts = {name: value for name, value in options.items() if name not in _OWN}
    versions = {package: installed_version(package) for package in _PACKAGES}
    facts |= {"method": method, "versions": {"keras_sd": __version__} | versions}
    facts = parse_json(json.dumps(facts, default=str), "options")
    peers = rendezvous.meet(address, count, index, options["coordinator_timeout"], facts)
    child = interruption.fork()
    if child is None:
        for peer in peers.values():
            peer.close()
        return
    end = watcher.follow(child, index, peers)
    if not end.has_spoken:
        interruption.set_run_folder(options["output_dir"], options["resume_from_checkpoint"])
        command = interruption.command_to_resume()
        how = "there is no checkpoint yet, start again"
        if command:
            how = f"resume all, this one with: {command}"
        # On a line of its own: the copy may have left a bar without an end.
        interruption.tell(f"\n{interruption.program()}: error: {end}, which ends the run; {how}")
    raise SystemExit(end.exit_code)
