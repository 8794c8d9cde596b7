"""Command line: one thin function a command. Numbers, defaults and work live in the rooms below."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import prfl_fast

EXIT_FAILED = 1  # the command ran and what it checked does not hold
EXIT_USAGE = 2  # what was asked for cannot be done as asked
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted.

    ``arguments`` are the words after the program's name (``sys.argv[1:]`` when not given).
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ImportError, OSError, ValueError) as error:
        # What a user can mend is raised as one of these, with a sentence that says how.
        if options.traceback:
            raise
        print(f"prfl-fast {options.command}: {error}", file=sys.stderr)
        print("(--traceback shows where it was raised)", file=sys.stderr)
        return EXIT_USAGE


def demo(options: argparse.Namespace) -> int:
    """Train the demo and write its report; see :func:`prfl_fast.demo.run.run_demo`."""
    from prfl_fast.demo.run import run_demo
    from prfl_fast.demo.settings import DemoSettings

    # Flags that were not given are absent, so every default stands in DemoSettings alone.
    given = {name: value for name, value in vars(options).items() if name not in {"command", "run", "traceback"}}
    run_demo(DemoSettings(**given))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Say what is installed, what is missing and what that costs; with ``--gradients`` check exactness too."""
    from prfl_fast.doctor import examine, render, to_json

    if options.model is not None and not options.gradients:
        raise ValueError("--model names the config of the gradient check: give --gradients with it")
    findings = examine(gradients=options.gradients, model=options.model)
    print(to_json(findings) if options.json else render(findings))
    return 0 if findings.healthy else EXIT_FAILED


def compile_kernels(options: argparse.Namespace) -> int:
    """Compile the Triton kernels without a GPU; see :func:`prfl_fast.compile.compile_kernels`."""
    from prfl_fast import compile as compiling

    given = {"architectures": options.arch} if options.arch is not None else {}
    result = compiling.compile_kernels(ops=options.op, report=options.report, **given)
    print(compiling.summary(result))
    return EXIT_FAILED if compiling.spilling(result) else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def bench(options: argparse.Namespace) -> int:
    """Time ops and headlines beside what people use today; see :func:`prfl_fast.benchmarks.run.run`."""
    from prfl_fast.benchmarks.registry import BENCHMARKS

    if options.list:
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:<15} {', '.join(benchmark.devices):<10} {benchmark.measures}")
        return 0
    from prfl_fast.benchmarks.run import Report, failed, run, setting_for

    reports: list[Report] = []
    setting = setting_for(options.device, options.seconds, options.tiny)
    show = _to_stderr if options.json else print
    try:
        run(options.names, setting, reports, output=options.output, show=show, tell=_to_stderr)
    finally:  # Ctrl-C: the rows so far
        if options.json and reports:
            print(json.dumps(reports, indent=2))
    return EXIT_FAILED if failed(reports) else 0


def encode(options: argparse.Namespace) -> int:
    """Videos and labels to latents and text states; see :func:`prfl_fast.training.data.encode.encode`."""
    from prfl_fast.training.data.encode import EncodeSettings, describe
    from prfl_fast.training.data.encode import encode as run_encode

    given = {k: v for k, v in vars(options).items() if k not in {"command", "run", "traceback", "strict"}}
    length = given.pop("max_sequence_length", None)
    extra = {} if length is None else {"max_sequence_length": length}
    report = run_encode(EncodeSettings(**given, pipeline_options=extra))
    print(describe(report))
    return EXIT_FAILED if not report.total or (report.left_out and options.strict) else 0


def validate(options: argparse.Namespace) -> int:
    """Read every entry of encoded data; see :func:`prfl_fast.training.data.validate.validate`."""
    from prfl_fast.training.data.validate import describe, to_json
    from prfl_fast.training.data.validate import validate as run_validate

    report = run_validate(options.path, root=options.root, caption=options.caption, image=options.image)
    print(to_json(report) if options.json else describe(report))
    return EXIT_FAILED if report.findings else 0


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prfl-fast", description="Exact reward gradients through the whole sampling chain, in bounded memory."
    )
    parser.add_argument("--version", action="version", version=f"prfl-fast {prfl_fast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="align a small video model with a latent process reward and write a report",
        description="Trains on the CPU in minutes and writes a self-contained index.html and summary.json.",
        argument_default=argparse.SUPPRESS,
    )
    command.set_defaults(run=demo)
    command.add_argument("--output", metavar="DIR", help="where the report goes")
    command.add_argument("--clips", metavar="DIR", help="take the moving pictures from these videos (extra: video)")
    command.add_argument("--from-scratch", action="store_true", help="train the base model instead of loading it")
    command.add_argument("--study", action="store_true", help="the long comparison: seeds, equal time, equal updates")
    command.add_argument("--tiny", action="store_true", help="every stage with next to no work: a smoke test")
    command.add_argument("--seed", type=int, help="seed of everything drawn")
    command.add_argument("--seconds", type=float, help="training time of each arm, in seconds")
    command.add_argument("--memory-budget", metavar="BYTES", help="for the rollout's graph: 200MB, 1GiB, ...")
    _add_traceback(command)

    command = commands.add_parser(
        "doctor",
        help="what is installed, what is missing, what that costs; are the gradients exact here",
        description="Exit code 1 when something that is needed does not work or the gradient check fails.",
    )
    command.set_defaults(run=doctor)
    command.add_argument("--gradients", action="store_true", help="compare with plain autograd on a tiny twin model")
    command.add_argument(
        "--model", metavar="PATH", help="config.json, model folder or pipeline folder that the twin is shrunk from"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_traceback(command)

    command = commands.add_parser(
        "compile",
        help="compile the Triton kernels of production models without a GPU: registers, memory, instructions",
        description="Exit code 1 when a kernel spills registers. Ctrl-C keeps what was done in the report.",
    )
    command.set_defaults(run=compile_kernels)
    command.add_argument("--arch", type=_names, metavar="NAMES", help="sm_80,sm_90,sm_100 (all of them by default)")
    command.add_argument("--op", type=_names, metavar="NAMES", help="these ops alone, e.g. modulated_norm,qk_norm_rope")
    command.add_argument("--report", metavar="FILE", help="write all numbers to this JSON file")
    _add_traceback(command)

    command = commands.add_parser(
        "bench",
        help="time ops and chains beside what people use today, and check that they are right",
        description="Results are checked before they are timed. Exit code 1 when one is wrong.",
    )
    command.set_defaults(run=bench)
    command.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (none: all that the device can)")
    command.add_argument("--list", action="store_true", help="say which there are and stop")
    command.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1 (none: the GPU if any)")
    command.add_argument("--seconds", type=float, default=1.0, help="for each measurement of an op (1)")
    command.add_argument("--output", metavar="DIR", help="write a JSON file per benchmark, again after each row")
    command.add_argument("--json", action="store_true", help="print the JSON; what goes on is told on stderr")
    command.add_argument("--tiny", action="store_true", help="next to no work: a smoke test")
    _add_traceback(command)

    _add_encode(commands)
    _add_validate(commands)
    return parser


def _add_encode(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "encode",
        help="videos and labels to latents and text states that training reads",
        description="Goes on with what is in the folder. Exit code 1 when there is nothing that could be encoded.",
        argument_default=argparse.SUPPRESS,
    )
    command.set_defaults(run=encode, strict=False)
    command.add_argument("videos", metavar="VIDEOS", help="a folder, searched below too, or one file")
    command.add_argument(
        "--labels", metavar="CSV", required=True, help="columns video, prompt, start and stop (seconds), labels"
    )
    command.add_argument("--model", metavar="PATH_OR_ID", required=True, help="Wan, HunyuanVideo, LTX or CogVideoX")
    command.add_argument("--output", metavar="DIR", required=True, help="where shards and index go")
    command.add_argument(
        "--buckets", nargs="+", metavar="HxWxF", help="height x width x frames (none: the pipeline's own, both ways)"
    )
    command.add_argument("--fps", type=float, help="frames a second of the clips (none: what the model is made for)")
    command.add_argument("--clips", type=int, metavar="N", help="at most N clips of each line of the CSV (1)")
    command.add_argument("--clips-per-shard", type=int, metavar="N", help="written together (64)")
    command.add_argument("--dtype", metavar="DTYPE", help="of the text states (bfloat16)")
    command.add_argument("--vae-dtype", metavar="DTYPE", help="of the VAE and the latents (float32)")
    command.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (none: the GPU if any)")
    command.add_argument("--vae-tiling", action="store_true", help="less memory, slightly other latents")
    command.add_argument("--max-sequence-length", type=int, metavar="N", help="tokens of the text (the pipeline's)")
    command.add_argument("--strict", action="store_true", help="exit code 1 when anything was left out")
    _add_traceback(command)


def _add_validate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "validate",
        help="read and check every entry of encoded data before anything trains",
        description="Exit code 1 when an entry is broken, missing, not finite or of the wrong shape.",
    )
    command.set_defaults(run=validate)
    command.add_argument("path", metavar="DATA", help="a folder of prfl-fast encode, or a published .list")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--root", metavar="DIR", help=".list: the folder that its files lie in (the list's own)")
    command.add_argument("--caption", choices=("short", "long"), help=".list: which caption (short)")
    command.add_argument("--image", action="store_true", default=None, help=".list: image to video's arrays too")
    _add_traceback(command)


def _add_traceback(command: argparse.ArgumentParser) -> None:
    command.add_argument("--traceback", action="store_true", default=False, help="show where an error was raised")


if __name__ == "__main__":
    sys.exit(main())
