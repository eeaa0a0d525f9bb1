"""Results on the Hugging Face hub: one file each, and a card that says how to load it.

A student (a delta) lies in a model repository, any other result in a data set repository. Tokens,
endpoints and caches are those of `huggingface_hub`.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

Loaded = TypeVar("Loaded", bound="OnHub")


class OnHub:
    """The methods `push_to_hub` and `from_hub` of a result that can be saved and loaded."""

    _hub_type: ClassVar[str] = "dataset"

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the result to a repository of the Hugging Face hub, which is created if needed.

        A card with the settings and the code that loads the result is added, unless the repository
        has one.

        Args:
            repo_id: "user/name" or "organization/name".
            filename: Name in the repository; by default that of the class, such as
                `effects.safetensors`.
            private: Whether a new repository is private; by default as the hub decides.
            revision: Branch to commit to; the main one by default.
            commit_message: Message of the commit.
            token: A token with write access; by default the one stored by `hf auth login`.

        Returns:
            The URL of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The hub refuses the request.
        """
        from huggingface_hub import HfApi

        result: Any = self  # subclasses have `save` and `metadata`
        kind = type(self).__name__
        name = f"{kind.lower()}.safetensors" if filename is None else filename
        api = HfApi(token=token)
        repo_type = self._hub_type
        api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            result.save(path)
            if not api.file_exists(repo_id, "README.md", repo_type=repo_type, revision=revision):
                Path(folder, "README.md").write_text(_card(result, repo_id, name), encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                repo_type=repo_type,
                revision=revision,
                commit_message=commit_message or f"Add {name}, saved by divergence-lens",
            )
        return str(commit.commit_url)

    @classmethod
    def from_hub(
        cls: type[Loaded],
        repo_id: str,
        *,
        filename: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Loaded:
        """Download a result that `push_to_hub` uploaded, and load it.

        Args:
            repo_id: The repository.
            filename: As for `push_to_hub`.
            revision: Branch, tag or commit; the main branch by default.
            token: A token with read access, for private repositories.
            options: Arguments of `load`.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: There is no such repository or file.
            ValueError: The file is damaged, or holds another kind of result.
        """
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            repo_id,
            f"{cls.__name__.lower()}.safetensors" if filename is None else filename,
            repo_type=cls._hub_type,
            revision=revision,
            token=token,
        )
        load: Any = cls
        loaded: Loaded = load.load(path, **options)
        return loaded


def _card(result: Any, repo_id: str, name: str) -> str:
    """The text of a repository's card: what the file is, how to load it, and its settings."""
    kind = type(result).__name__
    metadata = dict(result.metadata)
    model = metadata.get("model") or {}
    base = str(model.get("name", "")) if isinstance(model, Mapping) else str(model)
    lines = ["---", "library_name: divergence-lens", "tags:", "- divergence-lens"]
    if kind == "Delta" and base.count("/") == 1 and not base.startswith((".", os.sep)):
        lines.append(f"base_model: {base}")
    own_name = "" if name == f"{kind.lower()}.safetensors" else f', filename="{name}"'
    settings = {key: metadata[key] for key in ("model", "settings", "versions") if key in metadata}
    shown = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
    return "\n".join(
        [
            *lines,
            "---",
            "",
            f"# {kind}",
            "",
            f"`{result!r}`",
            "",
            "```python",
            "import divergence_lens as dl",
            "",
            f'result = dl.{kind}.from_hub("{repo_id}"{own_name})',
            "```",
            "",
            "## Settings",
            "",
            "```json",
            shown if len(shown) < 20_000 else shown[:20_000] + "\n... (the file holds all of it)",
            "```",
            "",
        ]
    )
