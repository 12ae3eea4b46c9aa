"""The process in which a command runs Ray: `python -m keras_sd.cli.ray_program`; see `ray_cluster`.

It reads requests from standard input and answers on standard output, both in JSON lines. What Ray prints goes
to standard error. It ends when its input does.

Ray copies the classes and functions of a main program to the workers, so those below import this package only
inside: a worker that lacks it says so.
"""

import _thread
import json
import logging
import os
import platform
import queue
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

_TOKEN = Path("~/.ray/auth_token")
_RESTARTS = 10  # of a worker that died
_RETRIES = 3  # of a task whose worker died
_OBJECT_STORE = 80 * 2**20  # bytes of shared memory, about the smallest that Ray takes; tasks are small
_END_SECONDS = 10.0


class Worker:
    """A process of the cluster; Ray Data hands it one block of tasks after another."""

    def __init__(self, request):
        self._failure = self._run = None
        try:
            from keras_sd.cli.ray_cluster import failure_of, open_worker
        except ImportError as error:
            self._failure = {
                "fault": f"Ray worker on {platform.node()}: {error}; use the same Python packages on all "
                "machines of the cluster"
            }
            return
        self._failure_of = failure_of
        try:
            self._run = open_worker(request)
        except Exception as error:
            self._failure = failure_of(error)

    def __call__(self, batch):
        return {"answer": [json.dumps(self._answer(json.loads(task))) for task in batch["task"]]}

    def _answer(self, task):
        if self._failure is not None:
            return self._failure
        try:
            return {"result": self._run(task)}
        except Exception as error:
            return self._failure_of(error)


def main():
    """Connect with a cluster, and answer requests."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    requests, is_busy = queue.SimpleQueue(), threading.Event()
    threading.Thread(target=_read, args=(requests, is_busy), daemon=True).start()

    def send(message):
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        is_busy.set()
        settings = requests.get()
        _prepare(settings["address"])
        import ray  # which takes a while on a busy machine

        send({"imported": ray.__version__})
        cluster = _connect(settings)
        send(cluster)
        is_busy.clear()
        while (request := requests.get()) is not None:
            is_busy.set()
            {"call": _call, "run": _run}[request["request"]](request, cluster, send)
            is_busy.clear()
    except KeyboardInterrupt:
        pass
    except Exception as error:
        send(_fault(error))
        raise
    finally:
        import ray

        ray.shutdown()


def _read(requests, is_busy):
    """Put all requests into a queue. At their end interrupt the main thread, if it is waiting for Ray."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)
    if is_busy.is_set():
        _thread.interrupt_main()
    time.sleep(_END_SECONDS)
    os._exit(1)


def _connect(settings):
    """Connect with the cluster of an address, or start one."""
    import ray

    address, workers = settings["address"], settings["workers"]

    options = {"runtime_env": {"env_vars": settings["variables"]}, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": max(os.cpu_count() or 1, workers or 1), "include_dashboard": False}
        options |= {"object_store_memory": _OBJECT_STORE, "_temp_dir": settings["folder"]}
    ray.init(address=address, log_to_driver=False, **options)
    machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    workers = (workers or gpus or len(machines)) if gpus or cpus else 0
    described = f"{_counted(len(machines), 'machine')}, {_counted(cpus, 'CPU')}, {_counted(gpus, 'GPU')}"
    return {"workers": workers, "has_gpus": gpus > 0, "described": f"{described}; {workers} at work"}


def _prepare(address):
    """Set Ray's variables of this process: no report of usage, and the token of the cluster.

    By default Ray writes a token for local clusters into the home folder, and a client does not look for it.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == "local":
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    elif {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or _TOKEN.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _counted(count, noun):
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _resources(cluster):
    return {"num_gpus": 1} if cluster["has_gpus"] else {"num_cpus": 1}


def _call(request, cluster, send):
    """Let a worker call a function."""
    import ray

    def call():
        from keras_sd.cli.ray_cluster import function_of

        return function_of(request["function"])()

    function = ray.remote(**_resources(cluster), max_retries=_RETRIES)(call)
    send({"result": ray.get(function.remote())})


def _run(request, cluster, send):
    """Run tasks, and send what workers answer. Ray Data starts a worker that died again, and its task."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    tasks = [{"task": json.dumps(task)} for task in request["tasks"]]
    # A worker that is busy has no second task waiting, which another one could begin.
    size = min(cluster["workers"], len(tasks))
    pool = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
    answers = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        Worker,
        fn_constructor_args=(request["open"],),
        batch_size=1,
        compute=pool,
        max_restarts=_RESTARTS,
        max_task_retries=_RETRIES,
        scheduling_strategy="SPREAD",
        **_resources(cluster),
    )
    for row in answers.iter_rows():
        send(json.loads(row["answer"]))
    send({"end": True})


def _fault(error):
    import ray

    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
        text = (
            f"Ray: workers died again and again ({type(error).__name__}); what is written stays. If memory "
            "is short, use fewer workers or a smaller batch size"
        )
        return {"fault": text}
    if isinstance(error, ray.exceptions.RayTaskError):
        return {"bug": str(error)}
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return {"fault": line}


if __name__ == "__main__":
    main()
