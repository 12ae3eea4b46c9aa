"""`python -m keras_sd.train [METHOD] [OPTIONS]` trains; the methods are in `keras_sd.cli.train`."""


def main():
    """Runs the training command as a program, as `keras_sd.__main__` runs the others."""
    try:
        from keras_sd.cli.train.main import main as run

        run()
    except KeyboardInterrupt:  # before `run_command` deals with it
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
