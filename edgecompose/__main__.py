"""The script `edgecompose`, and `python -m edgecompose`."""

from edgecompose.cli.terminal import signals


def main() -> None:
    """Run the command; signals are dealt with before anything large is imported."""
    signals.exit_at_once()
    from edgecompose.cli.terminal.streams import prepare_streams

    prepare_streams()
    from edgecompose.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
