"""Lists of files of data sets on the Hugging Face hub, with their sizes and checksums."""

from urllib.parse import quote

from em_megatron.data.manifest import DataError
from tokenizer.paper_corpora.download import get_json
from tokenizer.paper_corpora.recipe import SourceFile, checked_name

BASE_URL = "https://huggingface.co"
REVISION = "main"


def list_files(base_url: str, repository: str, folder: str = "") -> list[SourceFile]:
    """All files below a folder of a data set, without their splits.

    The hub publishes the sha256 of files that it keeps in its large file storage, which data files are.
    Raises DataError.
    """
    below = f"/{quote(folder.strip('/'))}" if folder.strip("/") else ""
    url: str | None = f"{base_url}/api/datasets/{repository}/tree/{REVISION}{below}?recursive=true"
    files: list[SourceFile] = []
    while url:
        entries, following = get_json(url)
        try:
            files += [file_of(entry, base_url, repository) for entry in entries if entry["type"] == "file"]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{url} is not a list of the hub ({error!r}); give another --base-url") from None
        url = following
    return files


def file_of(entry: dict[str, object], base_url: str, repository: str) -> SourceFile:
    """A file as an entry of the hub's list describes it."""
    name = checked_name(str(entry["path"]))
    large = entry.get("lfs")
    checksum = ("sha256", str(large["oid"])) if isinstance(large, dict) else None
    url = f"{base_url}/datasets/{repository}/resolve/{REVISION}/{quote(name)}"
    return SourceFile(name, "", url, int(str(entry["size"])), checksum)
