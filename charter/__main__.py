"""Start the command line for `charter` and `python -m charter`."""

import signal


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process without a traceback. `charter.cli.main` replaces this handler.

    If the parent process has set SIGINT to be ignored, as shells do for background commands, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command line."""
    end_on_interrupt()  # before the imports, which take most of the start
    from charter.cli import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
