"""python -m kdlib COMMAND: the commands of the course."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

from kdlib.errors import KdlibError

# Names as build_cache.build and RemoteTeacher have them; their defaults stand there.
CACHE_OPTIONS = (
    ("k", int, "entries that are kept of each position"),
    ("tail", str, 'the rest becomes "bucket", "zero" or "renormalize"; or "sampled"'),
    ("temperature", float, "of the training to come"),
    ("max_length", int, "tokens of prompt and response"),
    ("truncate_context", str, 'the end that is cut: "left", "right" or "never"'),
    ("precision", str, 'of the teacher: "auto", "fp32", "bf16" or "fp16"'),
    ("batch_size", int, "examples that the teacher reads at a time"),
    ("shard_size", int, "examples in a file"),
    ("seed", int, 'of tail "sampled"'),
    ("tokenizer", str, "for a URL: the served model's tokenizer"),
)
SERVER_OPTIONS = (
    ("model", str, "the model's name there"),
    ("workers", int, "requests under way at a time"),
    ("timeout", float, "seconds to wait for an answer"),
    ("retries", int, "how often to ask again"),
)
# Names as evaluate_command.run has them.
EVALUATE_OPTIONS = (
    ("teacher", str, "a model's folder or name, or cached targets for these data"),
    ("tokenizer", str, "of cached targets, where it is not the student's"),
    ("teacher_max_length", int, "tokens of the teacher's prompt and the response"),
    ("student_max_length", int, "tokens of the student's prompt and the response"),
    ("truncate_context", str, 'the end that is cut: "left", "right" or "never"'),
    ("precision", str, 'of the teacher: "auto", "fp32", "bf16" or "fp16"'),
    ("batch_size", int, "examples at a time"),
)
INTERRUPTED = "Stopped. What was finished is kept; the same command goes on."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    quick = commands.add_parser(
        "quickstart", help="distil the shipped teacher into a small student"
    )
    quick.add_argument("--out", default="quickstart", help="folder for the results")
    quick.add_argument("--seed", type=int, default=0)
    quick.add_argument(
        "--seconds", type=float, help="aim for a run of about this length"
    )
    quick.add_argument("--json", action="store_true", help="one JSON object on stdout")
    quick.set_defaults(run=quickstart)

    trains = commands.add_parser(
        "train",
        help="distil as a TOML or YAML file says: notebooks/experiments/fr_long.toml",
    )
    trains.add_argument("config", help="the file")
    trains.add_argument("--out", help="folder of the run (default: runs/NAME)")
    trains.add_argument(
        "--shard",
        action="store_true",
        help="under torchrun: split the models among the processes (FSDP2), which "
        "else have a copy each (DDP)",
    )
    trains.add_argument("--json", action="store_true", help="JSON on stdout")
    trains.set_defaults(run=train)

    cache = commands.add_parser(
        "cache", help="write a teacher's targets once, to train from them later"
    )
    cache.add_argument("teacher", help="a model's folder or name, or a server's URL")
    cache.add_argument("data", help="a JSONL file, or localize:LOCALE:FORM:SPLIT")
    cache.add_argument("out", help="folder of the cache")
    add_options(cache, CACHE_OPTIONS)
    for name, kind, help in SERVER_OPTIONS:
        flag = "--server-" + name.replace("_", "-")
        cache.add_argument(flag, type=kind, help=f"for a URL: {help}")
    cache.add_argument("--json", action="store_true", help="JSON on stdout")
    cache.set_defaults(run=build_cache)

    judge = commands.add_parser(
        "evaluate", help="compare a saved student with the answers and with its teacher"
    )
    judge.add_argument("student", help="the folder student/ of a run; any model")
    judge.add_argument("data", help="a JSONL file, or localize:LOCALE:FORM:SPLIT")
    add_options(judge, EVALUATE_OPTIONS)
    judge.add_argument("--json", action="store_true", help="JSON on stdout")
    judge.set_defaults(run=evaluate)

    law = commands.add_parser(
        "laws", help="hold every loss to the laws of a distillation loss"
    )
    law.add_argument("--peers", action="store_true", help="other libraries' losses too")
    law.add_argument("--json", action="store_true", help="JSON on stdout")
    law.set_defaults(run=laws)

    bench = commands.add_parser("bench", help="time kdlib and its rivals")
    benches = bench.add_subparsers(dest="what", required=True)
    loss = benches.add_parser("loss", help="the fused loss: cuda, mps or cpu")
    loss.set_defaults(run=bench_loss)
    loop = benches.add_parser("train", help="the training loop: cuda or cpu")
    loop.add_argument("--preset", help="shapes: issue (a GPU's default) or small")
    loop.add_argument("--steps", type=int, help="timed steps in a round")
    loop.add_argument("--rounds", type=int, help="how often all rows take their turn")
    loop.set_defaults(run=bench_train)
    for kind in (loss, loop):
        kind.add_argument("--device")
        kind.add_argument("--out", help="write the result to this file as JSON")
        kind.add_argument("--json", action="store_true", help="JSON on stdout")

    doctors = commands.add_parser(
        "doctor",
        help="what is wrong with a run, or with the first batch of a run to come",
        epilog="Status 0: nothing found; 1: findings; 2: it could not look.",
    )
    doctors.add_argument("path", help="a run's folder, or a settings file of `train`")
    doctors.add_argument(
        "--floor",
        type=float,
        help="of a run: nats a token that no student can go below (0 where both sides "
        "read the same)",
    )
    doctors.add_argument("--json", action="store_true", help="JSON on stdout")
    doctors.set_defaults(run=doctor)

    far = commands.add_parser(
        "progress", help="which exercises are right, tried and open, and the next step"
    )
    far.add_argument(
        "folder", nargs="?", default="exercises", help="of notebooks, as you saved them"
    )
    far.set_defaults(run=progress)

    claim = commands.add_parser(
        "ledger", help="list the course's claims, or run one's experiment again"
    )
    claim.add_argument("claim", nargs="?", help="the id of the claim to run again")
    claim.add_argument(
        "--scale",
        choices=["small", "full"],
        default="small",
        help="small takes minutes on a CPU; full is what the result file was made with",
    )
    claim.add_argument("--json", action="store_true", help="JSON on stdout")
    claim.set_defaults(run=ledger)

    board = commands.add_parser(
        "leaderboard",
        help="check a class's board (JSONL): every entry against its result file",
        epilog="Status 0: every entry holds; 1: some do not; 2: it could not look.",
    )
    board.add_argument("board", help="the file; chapter 14 says what is in it")
    board.add_argument("--add", metavar="RESULT", help="enter this result file")
    board.add_argument("--name", help="with --add: under which name")
    board.set_defaults(run=leaderboard)

    arguments = parser.parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except KdlibError as error:
        print(f"kdlib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `| head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or INTERRUPTED}", file=sys.stderr)
        # The shell's convention; training says which signal it was.
        return 128 + getattr(stop, "signal", signal.SIGINT)


def add_options(parser, options) -> None:
    """Flags that are left out of the result where they are not given."""
    for name, kind, help in options:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=help)


def quickstart(arguments) -> None:
    from kdlib import models, quickstart

    models.quiet_transformers()

    seconds = quickstart.SECONDS if arguments.seconds is None else arguments.seconds
    facts = quickstart.run(
        arguments.out,
        seed=arguments.seed,
        seconds=seconds,
        say=lambda line: print(line, file=sys.stderr),
    )
    if arguments.json:
        print(json.dumps(facts))
    else:
        print(quickstart.report(facts))


def train(arguments) -> None:
    from kdlib import models, train_command

    models.quiet_transformers()
    facts = train_command.run(
        arguments.config, arguments.out, shard=arguments.shard, say=to_stderr
    )
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one answers
        print(json.dumps(facts) if arguments.json else train_command.report(facts))


def build_cache(arguments) -> None:
    from kdlib import build_cache, models
    from kdlib.run_plan import API_KEY

    models.quiet_transformers()
    given = vars(arguments)
    options = {name: given[name] for name, *_ in CACHE_OPTIONS if name in given}
    server = {name: given[f"server_{name}"] for name, *_ in SERVER_OPTIONS}
    server["api_key"] = os.environ.get(API_KEY)
    manifest = build_cache.build(
        arguments.teacher,
        arguments.data,
        arguments.out,
        server={name: value for name, value in server.items() if value is not None},
        say=to_stderr,
        **options,
    )
    if arguments.json:
        print(json.dumps(manifest))


def evaluate(arguments) -> None:
    from kdlib import evaluate_command, models
    from kdlib.evaluate import table

    models.quiet_transformers()
    given = vars(arguments)
    options = {name: given[name] for name, *_ in EVALUATE_OPTIONS if name in given}
    facts = evaluate_command.run(arguments.student, arguments.data, **options)
    print(json.dumps(facts) if arguments.json else table(facts["validation"]))


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def laws(arguments) -> int:
    from kdlib import leaderboard

    rows = leaderboard.leaderboard() if arguments.peers else leaderboard.own()
    if arguments.json:
        print(json.dumps(leaderboard.as_json(rows)))
    elif arguments.peers:
        print(leaderboard.render(rows))
    else:
        print(leaderboard.render_laws(rows))
    return 1 if leaderboard.broken(rows) else 0


def progress(arguments) -> None:
    from kdlib import progress as read

    print(read.report(read.progress(arguments.folder)))


def doctor(arguments) -> int:
    from kdlib import doctor_command, models
    from kdlib.doctor import report

    models.quiet_transformers()
    findings = doctor_command.examine(arguments.path, arguments.floor)
    if arguments.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        print(report(findings))
        if unseen := doctor_command.unseen(arguments.path):
            to_stderr(f"Not looked at: {', '.join(unseen)}.")
    return 1 if findings else 0


def leaderboard(arguments) -> int:
    from kdlib import class_leaderboard
    from kdlib.errors import ArgumentError

    if bool(arguments.add) != bool(arguments.name and arguments.name.strip()):
        raise ArgumentError(
            f"--add {arguments.add}, --name {arguments.name}", "give both, or neither"
        )
    if arguments.add:
        class_leaderboard.add(arguments.board, arguments.name, arguments.add)
    good, bad = class_leaderboard.check(arguments.board)
    if good:
        print(class_leaderboard.table(good))
    for problem in bad:
        to_stderr(problem)
    return 1 if bad else 0


def bench_loss(arguments) -> None:
    from kdlib import bench

    result = bench.bench_loss(arguments.device, out=arguments.out, log=to_stderr)
    print(json.dumps(result) if arguments.json else bench.table(result))


def bench_train(arguments) -> None:
    from kdlib import bench_train

    names = ("preset", "steps", "rounds", "out")
    given = {name: getattr(arguments, name) for name in names}
    result = bench_train.bench_train(
        arguments.device,
        **{name: value for name, value in given.items() if value is not None},
        log=to_stderr,
    )
    print(json.dumps(result) if arguments.json else bench_train.table(result))


def ledger(arguments) -> int:
    from kdlib import claims

    if arguments.claim is None:
        known = claims.load()
        if arguments.json:
            rows = [vars(c) | {"interval": vars(c.interval())} for c in known.values()]
            print(json.dumps(rows))
        else:
            print(claims.table(known))
        return 0
    claim = claims.find(arguments.claim)
    found = claims.rerun(claim, small=arguments.scale == "small", say=to_stderr)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(claims.report(found))
    return 1 if found["verdict"] == "contradicted" else 0


if __name__ == "__main__":
    sys.exit(main())
