"""SHA-256 of files, and downloads of published files that are checked by it."""

import hashlib
import http.client
import urllib.request

from keras_sd import interruption
from keras_sd.errors import UserError
from keras_sd.files.writing import replaced

TIMEOUT_SECONDS = 20
_CHUNK = 2**20


def file_hash(path):
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, path, sha256, remedy):
    """Fetch a file from the web; it appears under its name once it is whole and has the right SHA-256.

    Args:
        url: the address; proxies are those of the environment.
        path: where the file is written. Its folder is created if necessary.
        sha256: the SHA-256 in hexadecimal.
        remedy: for messages, what to do in place of downloading.

    Raises:
        UserError: the file could not be fetched or written, or is another one.
    """
    digest = hashlib.sha256()
    with interruption.phase(f"downloading {url}"), replaced(path) as staging, open(staging, "wb") as file:
        for chunk in _chunks(url, path, remedy):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != sha256:
            raise UserError(f"{url}: sent a damaged file or another one (its SHA-256 differs); {remedy}")


def _chunks(url, path, remedy):
    try:
        # `urlopen` would go on with the proxies that were set at its first call.
        with urllib.request.build_opener().open(url, timeout=TIMEOUT_SECONDS) as reply:
            while chunk := reply.read(_CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise UserError(
            f"{path}: not found, and {url} could not be downloaded ({reason:.200}); {remedy}"
        ) from error
