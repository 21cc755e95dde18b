"""The command line: ``python -m uscale_jax {grow,shrink,plan} ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax

from uscale_jax import _checkpoint, _hf
from uscale_jax._checkpoint_files import items_of
from uscale_jax._checkpoint_places import located
from uscale_jax._plan import Plan
from uscale_jax._symmetry import AMOUNTS

OK, REFUSED, USAGE = 0, 1, 2

_EPILOG = """\
examples:
  python -m uscale_jax plan models/llama --width 2
      print which tensor becomes what; nothing is written
  python -m uscale_jax grow models/llama models/wide --width 2 --depth 24
      twice as wide, with 24 layers, the same function
  python -m uscale_jax grow models/llama models/mlp --set intermediate_size=11008
  python -m uscale_jax shrink models/wide models/llama --width 1/2 --depth 12
      the way back
  python -m uscale_jax grow checkpoints/100 larger --plan plan.json
      an Orbax checkpoint, by a plan that Plan.to_json wrote

exit codes: 0 done, 1 refused (why is on stderr, and nothing was written), 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of a command line.

    Args:
      arguments: what stands behind ``python -m uscale_jax``; None for that of the process.

    Returns:
      0 done, 1 refused, with the reason on stderr; wrong usage ends the process with 2.

    Example:
      >>> from uscale_jax._command_line import main
      >>> main(["plan", "no/such/directory", "--width", "2"])
      1

    References:
      The functions behind it: ``us.hf.grow``, ``us.hf.shrink``, ``us.hf.plan`` and
      :func:`uscale_jax.resize_checkpoint`.
    """
    options = _parsed(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    return OK


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.plan is not None:
        given = [n for n in ("width", "depth", "set", "architecture") if getattr(options, n)]
        if given:
            parser.error(f"--plan says all sizes; leave out {', '.join(f'--{n}' for n in given)}")
    elif options.width is None and options.depth is None and not options.set:
        parser.error("no sizes: give --width, --depth, --set or --plan")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m uscale_jax",
        description="Makes a larger or smaller model of a model directory of Hugging Face's "
        "transformers (config.json and safetensors), or of an Orbax checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{grow,shrink,plan}")
    grow = _command(commands, "grow", _grow, "write a larger model, the same function")
    grow.add_argument("--symmetry", choices=sorted(AMOUNTS), help="how copies are told apart")
    grow.add_argument("--seed", type=int, default=0, metavar="N", help="for --symmetry (0)")
    shrink = _command(commands, "shrink", _shrink, "write a smaller model")
    shrink.add_argument(
        "--importance",
        choices=("magnitude", "random"),
        help="which units stay; without it units are means of copies, which undoes grow",
    )
    _command(commands, "plan", _plan, "print what would happen, and write nothing")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", metavar="SRC", type=Path, help="the directory there is")
    if name != "plan":
        parser.add_argument("target", metavar="DST", type=Path, help="the one to write")
        parser.add_argument(
            "--quiet", action="store_true", help="no progress on stderr, even on a terminal"
        )
    _add_sizes(parser)
    return parser


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width",
        type=_factor,
        metavar="K",
        help="multiply hidden size, MLP size and numbers of heads: 2, 1.5, 1/2",
    )
    parser.add_argument("--depth", type=_positive, metavar="N", help="number of layers")
    parser.add_argument(
        "--set",
        type=_size,
        action="append",
        default=[],
        metavar="FIELD=N",
        help="a size by its field in config.json; may be repeated",
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        default="interleave",
        metavar="HOW",
        help="which layers new ones are copies of: interleave (default), stack, or 0,0,1,...",
    )
    parser.add_argument(
        "--new-layers",
        choices=("identity", "copy"),
        default="identity",
        help="whether new layers change nothing (default) or are copies, another function",
    )
    parser.add_argument(
        "--architecture", metavar="CLASS", help="class of transformers, if not config.json's"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="for Orbax: Plan.to_json's text")


def _factor(text: str) -> Fraction:
    value = Fraction(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _size(text: str) -> tuple[str, int]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FIELD=N")
    return name, int(value)


def _layers(text: str) -> str | list[int]:
    if text in ("interleave", "stack"):
        return text
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is neither interleave, stack nor numbers")
    return [int(part) for part in text.split(",")]


# What argparse says of text that Fraction and int refuse.
_factor.__name__, _positive.__name__ = "factor", "whole number"


# Commands


def _grow(options: argparse.Namespace) -> None:
    extra: dict[str, Any] = {}
    if options.symmetry is not None:
        extra = {"symmetry": options.symmetry, "key": jax.random.key(options.seed)}
    if options.plan is not None:
        _resize_checkpoint(options, True, **extra)
    else:
        shown = False if options.quiet else None
        _say(_hf.grow(options.source, options.target, progress=shown, **extra, **_sizes(options)))


def _shrink(options: argparse.Namespace) -> None:
    if options.plan is not None:
        if options.importance is not None:
            raise ValueError(
                "--importance takes the model into memory and is for model directories. Fix: a "
                "plan of us.select."
            )
        _resize_checkpoint(options, False)
    else:
        chosen = options.importance
        shown = False if options.quiet else None
        sizes = _sizes(options)
        _say(_hf.shrink(options.source, options.target, importance=chosen, progress=shown, **sizes))


def _plan(options: argparse.Namespace) -> None:
    if options.plan is None:
        print(_hf.plan(options.source, **_sizes(options)))
    else:
        plan = _read_plan(options.plan)
        way = "grows" if _is_small(options.source, plan) else "shrinks"
        print(f"{options.source} {way}, by this plan:\n\n{plan}")


def _sizes(options: argparse.Namespace) -> Mapping[str, Any]:
    layers = {} if options.depth is None else {"num_hidden_layers": options.depth}
    return {
        "width": options.width,
        "depth": options.layers,
        "new_layers": options.new_layers,
        "architecture": options.architecture,
        **layers,
        **dict(options.set),
    }


def _read_plan(file: Path) -> Plan:
    return Plan.from_json(file.read_text(encoding="utf-8"))


def _resize_checkpoint(options: argparse.Namespace, grows: bool, **extra: Any) -> None:
    shown = False if options.quiet else None
    plan = _read_plan(options.plan)
    if _is_small(options.source, plan) != grows:
        right = "shrink" if grows else "grow"
        raise ValueError(
            f"{str(options.source)!r} is of the plan's {'big' if grows else 'small'} model. Fix: "
            f"python -m uscale_jax {right}."
        )
    _say(
        _checkpoint.resize_checkpoint(options.source, options.target, plan, progress=shown, **extra)
    )


def _is_small(source: Path, plan: Plan) -> bool:
    """Whether a checkpoint is of the small model of a plan."""
    trees = _checkpoint.whole(_checkpoint.items(items_of(source.resolve())))
    return located(trees, plan, None, None).grows is not False


def _say(path: Path) -> None:
    print(f"wrote {path}")
