"""Source files of SymPy, a computer algebra system in Python: long files that use again what they defined far above."""

import re

from tokenizer.domains.domain import Domain
from tokenizer.sdists import Sdist

SYMPY = Sdist("sympy", "1.14.0", "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517")
MEMBER = re.compile(r"sympy-1\.14\.0/sympy/(.+)\.py")


def chosen(member: str) -> str | None:
    """path-with-dashes.txt of a Python file of the package, None for its tests."""
    match = MEMBER.fullmatch(member)
    return None if match is None or "/tests/" in member else match[1].replace("/", "-") + ".txt"


DOMAIN = Domain(
    name="code",
    what="Python source files of SymPy 1.14.0 of 12 kB and more, without its tests",
    licence="BSD-3-Clause (Copyright (c) 2006-2023 SymPy Development Team)",
    archives=(SYMPY,),
    chosen=chosen,
    min_bytes=12_000,
    sha256="4f75109b6de1e9d2780a8aad49a47108399b40722487b4c8b185676eb57074f7",
)
