"""Bundles on the Hugging Face hub: downloads ``hub:ORG/NAME[@REVISION]`` to a plain folder, and converts errors.

The files come through the cache of huggingface_hub, whose snapshots are symbolic links. A bundle must not contain links, so
the files are hard-linked or copied to a folder in ``$QADEPLOY_CACHE``, once per commit. Loading verifies them as in any folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qadeploy.errors import HubError, InputError
from qadeploy.extras import import_extra
from qadeploy.files import cache_folder, replace_folder, temporary_folder

PREFIX = "hub:"
_LOGIN = "set HF_TOKEN, or log in with hf auth login"
_NETWORK = ("requests", "httpx", "httpcore", "urllib3")


def is_hub(name: str | Path) -> bool:
    """Whether this names a bundle on the hub."""
    return str(name).startswith(PREFIX)


def fetch_bundle(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """Downloads a bundle of the hub, unless it is in the cache.

    Args:
        name: ``hub:ORG/NAME`` or ``hub:ORG/NAME@REVISION``.
        revision: Its branch, tag or commit; None uses the one in ``name`` or, by default, main.
        files: The files of a bundle. Only these are downloaded.

    Returns:
        A folder named NAME, in a folder named after the commit. Its contents are not verified.

    Raises:
        InputError: The name is not a repository's, there are two revisions, or there is no folder for a cache.
        HubError: The hub cannot be reached, lacks the repository or the revision, or refuses the token.
        MissingExtraError: huggingface_hub is not installed.
    """
    repo, at, named = name.removeprefix(PREFIX).partition("@")
    if at and not named:
        raise InputError(f"{name}: names no revision: give a branch, tag or commit after the @, or leave it out")
    if revision is not None and named:
        raise InputError(f"{name}: names a revision already: leave out {revision!r}")
    cache = cache_folder()
    if cache is None:
        raise InputError(f"{name}: there is no home folder to keep it in: set QADEPLOY_CACHE")
    library = import_extra("huggingface_hub", name, "hub")
    with hub_errors(name):
        found = library.snapshot_download(repo, revision=revision or named or None, allow_patterns=[*files])
    snapshot = Path(found)
    place = cache.joinpath("bundles", *repo.split("/"), snapshot.name, repo.rpartition("/")[2])
    held = [file for file in files if (snapshot / file).is_file()]  # loading reports missing files
    if not all((place / file).is_file() for file in held):  # an earlier download may have been cut short
        with temporary_folder(place) as work:
            for file in held:
                source = (snapshot / file).resolve()
                try:
                    os.link(source, work / file)
                except OSError:  # on another file system
                    shutil.copyfile(source, work / file)
            replace_folder(work, place)
    return place


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Converts errors of huggingface_hub in the block to HubError or InputError, with advice; ``name`` is the repository."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise InputError(f"{name}: is not the name of a repository: give ORG/NAME") from error
    except errors.GatedRepoError as error:
        raise HubError(f"{name}: is gated: accept its terms on the hub, and {_LOGIN}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name}: there is no such revision: name a branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: the hub has no such repository, or it needs a login: check the name, or {_LOGIN}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(f"{name}: the hub cannot be reached, and it is not in the cache: check the network") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        what = {401: f"does not accept the token: {_LOGIN}", 403: f"does not allow it: {_LOGIN}, with write access"}
        raise HubError(f"{name}: the hub {what.get(status, f'answers with HTTP {status}: try again later')}") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"{name}: there is no token: {_LOGIN}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _NETWORK:
            raise HubError(f"{name}: the hub cannot be reached: check the network") from error
        raise
