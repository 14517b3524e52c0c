"""`python -m packlib reproduce | advise | isolation | strategies | tables`"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings

COMMANDS = {  # name: (module that has add_arguments(parser) and command(arguments) -> text, help)
    "reproduce": ("packlib.lab.reproduce", "run a preset's notebooks through papermill, resuming where it stopped"),
    "advise": ("packlib.lab.advice", "say whether packing will pay on a data set"),
    "isolation": ("packlib.isolation_command", "say whether packed examples see each other in a model"),
    "strategies": ("packlib.lab.strategies", "list the batching strategies"),
    "tables": ("packlib.lab.readme", "write the tables of README.md from the published records"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; what a command says goes to standard output, progress to standard error."""
    parser = argparse.ArgumentParser(prog="python -m packlib", description="Padding versus packing: measure, plan, prove.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    name = next((a for a in (argv if argv is not None else sys.argv[1:]) if not a.startswith("-")), None)
    modules = {}
    for command, (module, text) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text)
        if command == name:  # the others' imports are not paid for
            modules[command] = importlib.import_module(module)
            modules[command].add_arguments(sub)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("packlib").setLevel(logging.INFO)
    logging.getLogger("papermill").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        print(modules[arguments.name].command(arguments))
    except KeyboardInterrupt:
        print("interrupted; every finished run has its record, call again to go on", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
