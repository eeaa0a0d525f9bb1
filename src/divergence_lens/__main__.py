"""The process of the command line: `divergence-lens`, or `python -m divergence_lens`."""

from divergence_lens.cli.interrupts import handle_interrupts


def main() -> None:
    """Run the command line; from here on, Ctrl-C ends it with one line."""
    handle_interrupts()
    from divergence_lens.cli.main import app

    app(prog_name="divergence-lens")


if __name__ == "__main__":  # the workers of a study import this module under another name
    main()
