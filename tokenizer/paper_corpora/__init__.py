"""The corpora of the paper: PG-19, Proof-Pile, and the long documents of FineWeb-Edu, fetched and made plain text.

`python -m tokenizer.paper_corpora --help` says how; docs/paper_corpora.md has the commands of each corpus.
"""
