"""Technical documents: the manuals of Django and SQLAlchemy, in reStructuredText."""

import re

from tokenizer.domains.domain import Domain
from tokenizer.sdists import Sdist

DJANGO = Sdist("Django", "5.2", "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89")
SQLALCHEMY = Sdist("sqlalchemy", "2.0.41", "edba70118c4be3c2b1f90754d308d0b79c6fe2c0fdc52d8ddf603916f83f4db9")
MEMBER = re.compile(r"(Django-5\.2/docs|sqlalchemy-2\.0\.41/doc/build)/(.+)\.(txt|rst)", re.IGNORECASE)


def chosen(member: str) -> str | None:
    """PACKAGE-path-with-dashes.txt of a page of the manuals."""
    match = MEMBER.fullmatch(member)
    return None if match is None else f"{match[1].partition('-')[0].lower()}-{match[2].replace('/', '-')}.txt"


DOMAIN = Domain(
    name="manuals",
    what="pages of 12 kB and more of the manuals of Django 5.2 and SQLAlchemy 2.0.41, changes and release notes included",
    licence="BSD-3-Clause (Copyright (c) Django Software Foundation and individual contributors); "
    "MIT (Copyright 2005-2025 SQLAlchemy authors and contributors)",
    archives=(DJANGO, SQLALCHEMY),
    chosen=chosen,
    min_bytes=12_000,
    sha256="de30e72a15a391c8de1c1b67d7cc9f1aec41ebc7130dad75e2cdb91429225f37",
)
