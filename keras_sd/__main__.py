"""`python -m keras_sd` is the command `keras-sd`."""

import importlib


def main(commands="keras_sd.cli.main"):
    """Run a command line as a program: exit code 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        commands: the module with its `main`.
    """
    try:
        importlib.import_module(commands).main()
    except KeyboardInterrupt:  # before `run_command` deals with it
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
