"""The script `edgecompose-export`, and `python -m edgecompose_export`."""

from edgecompose.cli.terminal import signals


def main() -> None:
    """Run the command; signals are dealt with before anything large is imported."""
    signals.exit_at_once()
    from edgecompose.cli.terminal.streams import prepare_streams

    prepare_streams()
    from edgecompose_export.cli import main as command

    command()


if __name__ == "__main__":
    main()
