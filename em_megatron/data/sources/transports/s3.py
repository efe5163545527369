"""Objects of S3 and of stores that speak like it, through s3fs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from em_megatron.data.retry import PASSING_STATUSES
from em_megatron.data.sources.transports.base import CHUNK, Download, Transport, connection_fault, file_system

RIGHTS = (
    "check bucket and folder, and give credentials as for the AWS tools (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...), "
    "AWS_ENDPOINT_URL for a store other than Amazon's, or FSSPEC_S3_ANON=true for a public bucket"
)


class S3Transport(Transport):
    """s3://BUCKET/FOLDER, with the endpoint and credentials of the environment."""

    @contextmanager
    def open(self, name: str, start: int) -> Iterator[Download]:
        fs, root = self._file_system()
        from fsspec.asyn import sync

        bucket, key, _ = fs.split_path(f"{root.rstrip('/')}/{name}")
        part = {"Range": f"bytes={start}-"} if start else {}
        try:
            answer = fs.call_s3("get_object", Bucket=bucket, Key=key, **part)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._fault(name, error) from error
        body, offset = answer["Body"], start if "ContentRange" in answer else 0

        def chunks() -> Iterator[bytes]:
            try:
                while chunk := sync(fs.loop, body.read, CHUNK):
                    yield chunk
            except Exception as error:
                raise self._fault(name, error) from error

        try:
            yield Download(offset, offset + answer["ContentLength"], chunks())
        finally:
            fs.loop.call_soon_threadsafe(body.close)

    def _file_system(self) -> tuple[Any, str]:
        # Trying again is done here, with warnings; three loops around each other would multiply the waits.
        limits = {
            "connect_timeout": self._timeout,
            "read_timeout": self._timeout,
            "retries": {"total_max_attempts": 1},
        }
        fs, root = file_system(self._address, {"config_kwargs": limits})
        fs.retries = 1
        return fs, root

    def _fault(self, name: str, error: Exception) -> Exception:
        """What an exception of s3fs or botocore means: unknown ones may pass."""
        from botocore import exceptions

        final = (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.ProfileNotFound,
            exceptions.ParamValidationError,
            ValueError,  # an endpoint that is no address
        )
        status = _status(error)
        refused = status is not None and status not in PASSING_STATUSES - {416}
        if isinstance(error, final) or (refused and not isinstance(error, TimeoutError)):
            return self._refused(name, error, RIGHTS)
        return connection_fault(error, self._timeout)


def _status(error: Exception) -> int | None:
    """The HTTP status of the answer that an exception of s3fs came from."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None
