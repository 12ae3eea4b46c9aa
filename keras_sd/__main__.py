"""`python -m keras_sd` is the command `keras-sd`."""


def main():
    """Runs the command line as a program: exit code 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        from keras_sd.cli.main import main as run

        run()
    except KeyboardInterrupt:  # before `run_command` deals with it
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
