"""Readers of text files: plain text, jsonl (plain, gzip, zstandard) and parquet; `files.read_documents` chooses one."""
