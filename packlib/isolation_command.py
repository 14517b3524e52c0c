"""`python -m packlib isolation MODEL`: is my packing contaminated?"""

import argparse
import json
from contextlib import ExitStack

import torch

from packlib.attention import KERNELS, flash_stand_in, register_attention
from packlib.isolation import ContaminationError, check_isolation
from packlib.small_models import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="Hub name, local path, or a model_type of transformers (built small)")
    parser.add_argument("--attention", help="attn_implementation; flash_attention_2 runs without the flash-attn package")
    parser.add_argument("--kernel", choices=["auto", *KERNELS], help="run on this kernel, through packlib_varlen")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--strict", action="store_true", help="fail on a leak")


def command(arguments: argparse.Namespace) -> str:
    """The report as text or JSON. Raises ContaminationError on a leak if `--strict`."""
    register_attention()
    with ExitStack() as stack:
        if arguments.attention == "flash_attention_2":
            stack.enter_context(flash_stand_in())
        dtype = getattr(torch, arguments.dtype)
        model = load_model(arguments.model, arguments.attention, dtype).to(arguments.device)
        report = check_isolation(model, kernel=arguments.kernel)
    text = json.dumps(report.to_dict(), indent=1) if arguments.json else str(report)
    if arguments.strict and report.verdict == "leak":
        raise ContaminationError(text)
    return text
