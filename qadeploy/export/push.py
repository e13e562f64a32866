"""Uploads a run or a bundle to the Hugging Face hub, in one commit, with its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.errors import InputError
from qadeploy.extras import import_extra
from qadeploy.inference.bundle import CARD, MANIFEST, is_bundle, open_bundle
from qadeploy.inference.hub import PREFIX, hub_errors
from qadeploy.options import check, option
from qadeploy.training.runs import CHECKPOINT_FILES, Run, find_run
from qadeploy.training.saves import files_in, foreign_files

REPORT = "report.html"


@dataclass(frozen=True, slots=True)
class PushOptions:
    """Where and how something is uploaded."""

    private: bool = option(False, "Make the repository private, if it does not exist yet.")
    revision: str | None = option(None, "Branch to upload to; it is created if needed.", shown="main")
    report: bool = option(
        False, f"Also upload the run's {REPORT}, which quotes questions, contexts and answers of the data."
    )


@dataclass(frozen=True, slots=True)
class Pushed:
    """An upload: the repository and branch, the URL and hash of the commit, and the files."""

    repo: str
    url: str
    commit: str
    files: list[str]
    is_bundle: bool
    branch: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {"repo": self.repo, "url": self.url, "commit": self.commit, "files": self.files}

    def lines(self) -> list[str]:
        """The outcome as text."""
        at, revision = (f"@{self.branch}", f" --model-revision {self.branch}") if self.branch else ("", "")
        if self.is_bundle:
            use = f"qadeploy ask {PREFIX}{self.repo}{at}"
        else:
            use = f"qadeploy train --base {self.repo}{revision}"
        return [*(f"  {name}" for name in self.files), f"{self.url}: {len(self.files)} files", f"to use it: {use} ..."]


def push(source: str, repo: str, chosen: PushOptions) -> Pushed:
    """Uploads the checkpoint of a run with its card and, if chosen, its report; or a bundle.

    The repository is created if needed. The token is that of HF_TOKEN or of a login.

    Args:
        source: A run or a bundle.
        repo: ORG/NAME.
        chosen: Where and how to upload.

    Returns:
        What was uploaded.

    Raises:
        InputError: ``source`` is neither, the repository's name is invalid, or there is no report to upload.
        BundleError: The bundle is damaged.
        CheckpointError: The run is not finished.
        HubError: The hub cannot be reached or refuses.
        MissingExtraError: huggingface_hub is not installed.
    """
    check(chosen)
    repo = repo.removeprefix(PREFIX)
    files = files_to_push(source, chosen.report)
    library = import_extra("huggingface_hub", "qadeploy push", "hub")
    with hub_errors(repo):
        hub = library.HfApi(library_name="qadeploy")
        hub.create_repo(repo, private=chosen.private, exist_ok=True)
        if chosen.revision:
            hub.create_branch(repo, branch=chosen.revision, exist_ok=True)
        made = hub.create_commit(
            repo,
            [library.CommitOperationAdd(name, str(path)) for name, path in files.items()],
            commit_message=f"Upload {Path(source).resolve().name} with qadeploy",
            revision=chosen.revision,
        )
    return Pushed(repo, made.commit_url, made.oid, [*files], is_bundle(source), chosen.revision)


def files_to_push(source: str, report: bool = False) -> dict[str, Path]:
    """The files to upload, by their names in the repository.

    Args:
        source: A run or a bundle.
        report: Whether the run's report is one of them.

    Raises:
        InputError: ``source`` is neither a run nor a bundle, or there is no report.
        BundleError: The bundle is damaged.
        CheckpointError: The run is not finished.
    """
    if is_bundle(source):
        if report:
            raise InputError(f"{source}: is a bundle, which has no {REPORT}: leave out --report")
        bundle = open_bundle(source)
        return {name: bundle.folder / name for name in (MANIFEST, *bundle.checked.files)}
    run = find_run(source)
    if run.record is None:
        raise InputError(f"{source}: is a checkpoint without a run, so it has no model card: give a run or a bundle")
    folder = run.checkpoint.parent
    beside = (CARD, *([REPORT] if report else []))
    if missing := [name for name in beside if not (folder / name).is_file()]:
        raise InputError(f"{folder}: has no {missing[0]}: train again" + (", or leave out --report" if report else ""))
    return {name: run.checkpoint / name for name in _own(run)} | {name: folder / name for name in beside}


def _own(run: Run) -> list[str]:
    """The files of the run's checkpoint, without foreign ones."""
    recorded = (run.record or {}).get(CHECKPOINT_FILES)
    found = files_in(run.checkpoint)
    foreign = foreign_files(run.checkpoint) if recorded is None else [name for name in found if name not in recorded]
    return [name for name in found if name not in foreign]
