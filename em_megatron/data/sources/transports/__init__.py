"""Ways to the files of a corpus that is not on this machine."""

from em_megatron.data.sources.transports.base import Download, Transport
from em_megatron.data.sources.transports.http import HttpTransport
from em_megatron.data.sources.transports.other import FsspecTransport
from em_megatron.data.sources.transports.pipe import PREFIX, PipeTransport
from em_megatron.data.sources.transports.s3 import S3Transport

__all__ = ["Download", "Transport", "open_transport"]

BY_PROTOCOL: dict[str, type[HttpTransport | S3Transport]] = {
    "http": HttpTransport,
    "https": HttpTransport,
    "s3": S3Transport,
    "s3a": S3Transport,
}


def open_transport(location: str, timeout: float) -> Transport:
    """The transport for an address; nothing is fetched yet. timeout: seconds without a byte that are a fault.

    Raises DataError for a command without {}.
    """
    if location.startswith(PREFIX):
        return PipeTransport(location, timeout)
    protocol = location.partition("://")[0].lower()
    return BY_PROTOCOL.get(protocol, FsspecTransport)(location, timeout)
