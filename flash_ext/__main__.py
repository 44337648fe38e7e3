"""python -m flash_ext info | demo"""

import argparse
import sys


def info(options):
    from .info import describe

    print(describe())
    return 0


def demo(options):
    from .demo import run

    return run(options)


def parser():
    top = argparse.ArgumentParser(
        prog="python -m flash_ext",
        description="Exact attention for PyTorch. Without a command: info.",
    )
    commands = top.add_subparsers(title="commands", metavar="{info,demo}")
    top.set_defaults(run=info)

    about = "version, build, instruction set, threads, devices, and which backends are usable and why"
    commands.add_parser("info", help=about, description=about[0].upper() + about[1:] + ".").set_defaults(run=info)

    about = "a real sentence encoder on flash_ext: the same answers, then speed and memory against PyTorch's attention"
    command = commands.add_parser(
        "demo",
        help=about,
        description=about[0].upper()
        + about[1:]
        + ". Needs pip install 'flash_ext[demo]'; no network, no GPU. About a minute.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=demo)
    command.add_argument("--query", action="append", metavar="TEXT", help="search for this instead; may be repeated")
    command.add_argument(
        "--texts", metavar="FILE", help="search in the lines of this file instead of the passages that come along"
    )
    command.add_argument("--threads", type=positive, metavar="N", help="threads, instead of torch's choice")
    command.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        metavar="N",
        default=[256, 512, 1024, 2048, 4096],
        help="sequence lengths to measure attention at",
    )
    command.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="measurements of each, of which the median is taken"
    )
    command.add_argument(
        "--output", default="demo-results/flash_ext_demo.png", metavar="PNG", help="where the plot goes"
    )
    command.add_argument("--no-speed", action="store_true", help="only the encoder's results, no measurements")
    return top


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def main(arguments=None):
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
