"""Readers of text files: plain text, json lines (plain, gzip, zstandard) and parquet; `files.read_documents` chooses one."""
