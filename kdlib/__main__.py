"""python -m kdlib COMMAND: the commands of the course."""

from __future__ import annotations

import argparse
import json
import sys

from kdlib.errors import KdlibError


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

    law = commands.add_parser(
        "laws", help="hold every loss to the laws of a distillation loss"
    )
    law.add_argument("--peers", action="store_true", help="other libraries' losses too")
    law.add_argument("--json", action="store_true", help="JSON on stdout")
    law.set_defaults(run=laws)

    bench = commands.add_parser("bench", help="time the fused loss and its rivals")
    bench.add_argument("what", choices=["loss"])
    bench.add_argument("--device", help="cuda, mps or cpu")
    bench.add_argument("--out", help="write the result to this file as JSON")
    bench.add_argument("--json", action="store_true", help="JSON on stdout")
    bench.set_defaults(run=bench_loss)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KdlibError as error:
        print(f"kdlib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nStopped. What was finished is kept; the same command goes on.",
            file=sys.stderr,
        )
        return 130


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


def bench_loss(arguments) -> None:
    from kdlib import bench

    result = bench.bench_loss(
        arguments.device,
        out=arguments.out,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(result) if arguments.json else bench.table(result))


if __name__ == "__main__":
    sys.exit(main())
