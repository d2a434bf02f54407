"""The Hugging Face hub as a source of weights, by huggingface_hub, and distrusted.

A reference is resolved to a commit once and everything is read at that commit; hashes come with
the listing (SHA-256 of large files, git's hash of small ones). HF_ENDPOINT may name any mirror: it
is sent the token, nobody else is, whatever it redirects to, and its listing is bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

os.environ["HF_HUB_DISABLE_XET"] = "1"  # another protocol to other hosts, with its own tokens
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import httpx2
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from tandem_worker.models.fetching import BrokenTransferError, RemoteFile, WeightsError
from tandem_worker.models.files import POOLING

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 60.0
MAX_FILES = 20_000
MAX_LISTING_BYTES = 64 * 2**20
_POOLING_FOLDER = POOLING.partition("/")[0]
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_HINTS = {
    401: "give a token in weights.secretRef (HF_TOKEN); if there is one, check the name too",
    403: "give a token with access in weights.secretRef, and accept the model's terms",
    404: "check the name and the revision",
}


class Hub:
    """The files of one repository.

    Args:
        reference: ``org/name[@revision]``.
        env: HF_ENDPOINT and HF_TOKEN.
    """

    def __init__(self, reference: str, env: Mapping[str, str]) -> None:
        self.name, _, self.revision = reference.partition("@")
        self.endpoint = (env.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._token: str | bool = env.get("HF_TOKEN") or False
        self._origin = _origin(httpx2.URL(self.endpoint))
        self._what = f"hf://{reference}"
        self.commit = ""
        huggingface_hub.set_client_factory(self._client)
        self._api = huggingface_hub.HfApi(endpoint=self.endpoint, token=self._token)

    def close(self) -> None:
        """Close the connections, which huggingface_hub keeps for the process."""
        huggingface_hub.close_session()

    def resolve(self, commit: str = "") -> None:
        """Learn the commit that the reference names now; one that is given is kept.

        Raises:
            WeightsError: the hub does not know the repository or refuses.
        """
        with self._told():
            if not commit:
                info = self._api.model_info(
                    self.name, revision=self.revision or None, timeout=TIMEOUT_S
                )
                commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise WeightsError(f"{self._what}: the hub names no commit, but {commit[:64]!r}")
        self.commit = commit

    def listing(self) -> dict[str, RemoteFile]:
        """The files at the root of the resolved commit, by name; all pages of the listing.

        Of those in folders the pooling's alone.

        Raises:
            WeightsError: the listing fails or does not end.
        """
        files: dict[str, RemoteFile] = {}
        with self._told():
            tree = self._api.list_repo_tree(self.name, revision=self.commit, recursive=False)
            for number, entry in enumerate(itertools.islice(tree, MAX_FILES + 1)):
                if number == MAX_FILES:
                    raise WeightsError(
                        f"{self._what} lists more than {MAX_FILES} files; no model has so many"
                    )
                if isinstance(entry, huggingface_hub.RepoFile) and "/" not in entry.path:
                    files[entry.path] = self._file(entry)
                elif entry.path == _POOLING_FOLDER:
                    nested = self._api.list_repo_tree(
                        self.name, _POOLING_FOLDER, revision=self.commit, recursive=False
                    )
                    for found in itertools.islice(nested, MAX_FILES):
                        if isinstance(found, huggingface_hub.RepoFile) and found.path == POOLING:
                            files[POOLING] = self._file(found)
        return files

    def _file(self, entry: Any) -> RemoteFile:
        name, size = str(entry.path), int(entry.size)
        if size < 0:
            raise WeightsError(f"{self._what}: {name!r} is listed with {size} bytes")
        if entry.lfs is not None:
            return RemoteFile(name, int(entry.lfs.size), "sha256", str(entry.lfs.sha256))
        return RemoteFile(name, size, "git", str(entry.blob_id))

    @contextlib.contextmanager
    def open(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """See :class:`tandem_worker.models.fetching.Source`."""
        url = huggingface_hub.hf_hub_url(
            self.name, file.name, revision=self.commit, endpoint=self.endpoint
        )
        headers = {"accept-encoding": "identity"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        if offset:
            headers["range"] = f"bytes={offset}-"
        try:
            session = huggingface_hub.get_session()
            with session.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
                status = response.status_code
                if status in _HINTS:
                    raise WeightsError(
                        f"{self._what}: {file.name}: HTTP {status}; {_HINTS[status]}"
                    )
                if status not in (200, 206):
                    raise BrokenTransferError(f"HTTP {status}")
                begins = offset if status == 206 else 0
                if status == 206 and not _begins_at(response.headers, offset):
                    raise BrokenTransferError("the server answered with another range")
                yield begins, response.iter_raw()
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # this machine's disk, not the network
            raise BrokenTransferError(str(error) or type(error).__name__) from error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Translate huggingface_hub's errors."""
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            hint = _HINTS.get(status, "try again later")
            raise WeightsError(f"{self._what}: HTTP {status}; {hint}") from error
        except HFValidationError as error:
            raise WeightsError(f"{self._what} is no hf://org/name[@revision]: {error}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled, OSError) as error:
            raise WeightsError(
                f"{self._what}: no connection to {self.endpoint} ({error}); check the network"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{self._what}: {self.endpoint} answers as no Hugging Face hub does "
                f"({type(error).__name__})"
            ) from error

    def _client(self) -> httpx2.Client:
        """What huggingface_hub makes its requests with."""
        return httpx2.Client(
            event_hooks={"request": [self._keep_token_home], "response": [_bound]},
            follow_redirects=True,
            max_redirects=10,
            timeout=TIMEOUT_S,
        )

    def _keep_token_home(self, request: httpx2.Request) -> None:
        request.headers["accept-encoding"] = "identity"
        if _origin(request.url) != self._origin:
            for name in ("authorization", "cookie"):
                request.headers.pop(name, None)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _begins_at(headers: Any, offset: int) -> bool:
    return str(headers.get("content-range", "")).startswith(f"bytes {offset}-")


class _Bounded(httpx2.SyncByteStream):
    """A body that ends with an error beyond a number of bytes."""

    def __init__(self, stream: Any, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes

    def __iter__(self) -> Iterator[bytes]:
        left = self._max_bytes
        for chunk in self._stream:
            left -= len(chunk)
            if left < 0:
                raise WeightsError(
                    f"the hub's listing exceeds {self._max_bytes >> 20} MiB; no model's is so long"
                )
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _bound(response: httpx2.Response) -> None:
    """Listings are read whole, so they are bounded; files are counted by who writes them."""
    if "/resolve/" not in response.request.url.path and response.request.url.path.startswith(
        "/api"
    ):
        response.stream = _Bounded(response.stream, MAX_LISTING_BYTES)
    if response.headers.get("content-encoding", "identity") != "identity":
        raise WeightsError("the hub compresses although it was asked not to; use another mirror")
