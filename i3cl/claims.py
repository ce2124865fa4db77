"""Which job a folder belongs to: what it was begun with is written into it, and anything else is refused.

A run directory holds `settings.yaml`, and `annotations.json` with a hash of the content of every annotation file that the
settings name, so that labels which were replaced under a run are noticed before it continues, and of the weights that a training
starts from. Other folders hold one JSON file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml
from pydantic import ValidationError

from i3cl import storage
from i3cl.config import Settings, SourceSettings, to_yaml
from i3cl.errors import UserError

_REMEDY = "give another name=… or remove the folder"
_ANNOTATIONS = "annotations.json"
_READ = 1 << 22
"""Bytes hashed at a time."""
_TOGETHER = 16
"""Parts read at the same time: on S3 a read is mostly waiting."""
CHECKPOINT_FILES = ("settings.yaml", "weights.safetensors")
"""The files of a checkpoint directory on which what it finds depends."""


def claim(path: str, identity: Mapping[str, Any], holds: str, absent: Mapping[str, Any] | None = None) -> None:
    """Write `identity` into the new JSON file `path`, or compare it with the file that is there.

    holds: what the folder then holds, for the message; absent: the values of keys that either side may lack.
    UserError that names the first difference, or a file that is not JSON.
    """
    folder = path.rpartition("/")[0]
    there = read(path)
    if there is None:
        if storage.write_text_new(path, json.dumps(identity, indent=1) + "\n"):
            return
        # Another driver was faster.
        there = read(path)
    here = json.loads(json.dumps({**(absent or {}), **identity}))
    if isinstance(there, dict):
        there = {**(absent or {}), **there}
    difference = first_difference(there, here)
    if difference:
        raise UserError(f"{folder}: holds {holds} ({difference}); {_REMEDY}")


def read(path: str) -> Any:
    """What was claimed in the JSON file `path`; None when it is not there. UserError when it is damaged."""
    text = storage.read_text_if_there(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise UserError(f"{path}: damaged; remove the folder and give the command again") from None


def claim_run(
    run: str,
    settings: Settings,
    sections: Sequence[str],
    weights: Mapping[str, tuple[str, str]] | None = None,
    free: Sequence[tuple[str, str]] = (),
) -> None:
    """Write settings and hashes of their annotation files into a new run directory, or compare them with what is there.

    Args:
        run: The run directory.
        settings: What the run is begun or continued with.
        sections: Of the settings, which must be the same when the run continues, and whose annotation files must be.
        weights: Settings key -> (what the settings name, where that lies): the weights that a training is about to start from,
            whose hashes are written. None: it has started, and what is written about them stays.
        free: (section, key) of settings that may change when the run continues.

    Raises:
        UserError: Something differs; the message names the first difference. An annotation file that is not there is not
            compared: whoever needs it names it.
    """
    _claim_settings(run, settings, sections, free)
    path = storage.join(run, _ANNOTATIONS)
    there = read(path) or {}
    sources = dict(_annotation_files(settings, sections))
    if weights is None:
        here = {key: value for key, value in there.items() if key not in sources}
    else:
        here = {key: recorded(name, url) for key, (name, url) in weights.items()}
    for key, url in sources.items():
        before = there.get(key)
        now = version(url)
        if before is not None and (now is None or now == before["version"]):
            here[key] = before
            continue
        if now is None:
            continue
        here[key] = {"file": url, "version": now, "sha256": content_hash(url)}
        if before is not None and before["sha256"] != here[key]["sha256"]:
            raise UserError(
                f"{run}: was begun with other labels: {url} ({key}) has changed since; put the earlier file back, {_REMEDY}"
            )
    if here != there:
        storage.write_text_atomic(path, json.dumps(here, indent=1) + "\n")


def inputs_of(run: str) -> dict[str, dict[str, str]] | None:
    """Settings key -> file and sha256 of what a training run was begun with; None when that is not recorded."""
    found = read(storage.join(run, _ANNOTATIONS))
    if not isinstance(found, dict):
        return None
    return {key: {"file": each["file"], "sha256": each["sha256"]} for key, each in found.items()}


def recorded(url: str, found_at: str | None = None) -> dict[str, str]:
    """File and sha256 of something, as records name what an artefact was made from.

    found_at: where it lies, where `url` is a name. UserError as `content_hash`.
    """
    return {"file": url, "sha256": content_hash(found_at or url)}


def first_difference(there: Any, here: Any, key: str = "") -> str | None:
    """The first key in which two trees differ, with both values, in words; None when they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            found = first_difference(there.get(name), here.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if there == here else f"{key}: {_short(there)} there, {_short(here)} here"


def content_hash(url: str) -> str:
    """SHA-256 of the content of a file, of a Parquet folder's parts in the order of their names, or of a checkpoint directory.

    Of a checkpoint directory settings and weights count. UserError when one of its files, or the file itself, is not there.
    """
    digest = hashlib.sha256()
    found = parts(url)
    if found == [url]:
        _update(digest, url)
    elif found:
        with ThreadPoolExecutor(_TOGETHER) as pool:
            for start in range(0, len(found), _TOGETHER):
                some = found[start : start + _TOGETHER]
                for part, data in zip(some, pool.map(storage.read_bytes, some), strict=True):
                    digest.update(part.rpartition("/")[2].encode() + b"\0" + data)
    else:
        # Training may start from a directory that holds weights alone.
        for name in CHECKPOINT_FILES:
            file = storage.join(url, name)
            if name == CHECKPOINT_FILES[-1] or storage.is_file(file):
                _update(digest, file)
    return digest.hexdigest()


def files_hash(urls: Sequence[str]) -> str:
    """SHA-256 of the names, without their folders, and the content of several files in this order."""
    digest = hashlib.sha256()
    for url in urls:
        digest.update(url.rpartition("/")[2].encode(errors="surrogateescape") + b"\0")
        _update(digest, url)
    return digest.hexdigest()


def parts(url: str) -> list[str]:
    """The file itself, or the Parquet parts of a folder in the order of their names. What begins with _ or . is not data."""
    if storage.is_file(url):
        return [url]
    return [storage.join(url, name) for name in storage.list_dir(url) if is_part(name)]


def is_part(name: str) -> bool:
    """Whether a file name is that of a Parquet part; what begins with _ or . is not data."""
    return name.endswith(".parquet") and name[0] not in "._"


def _update(digest: Any, file: str) -> None:
    with storage.open_read(file) as stream:
        while data := stream.read(_READ):
            digest.update(data)


def _claim_settings(run: str, settings: Settings, sections: Sequence[str], free: Sequence[tuple[str, str]]) -> None:
    path = storage.join(run, "settings.yaml")
    if not storage.exists(path) and storage.write_text_new(path, to_yaml(settings)):
        return
    # Through the tree, so that a setting which is newer than that run counts with its default.
    try:
        there = Settings.model_validate(yaml.safe_load(storage.read_text(path))).model_dump(mode="json")
    except (yaml.YAMLError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a settings file ({reason}); {_REMEDY}") from None
    here = settings.model_dump(mode="json")
    for section, key in free:
        there[section].pop(key)
        here[section].pop(key)
    for section in sections:
        difference = first_difference(there.get(section), here[section], section)
        if difference:
            raise UserError(f"{run}: holds a run with other settings ({difference}); {_REMEDY}")


def _annotation_files(settings: Settings, sections: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(settings key, path) of every annotation file that the sections name."""
    sources: dict[str, SourceSettings | None] = {}
    if "data" in sections:
        sources |= {f"data.train.{number}.annotations": source for number, source in enumerate(settings.data.train)}
        sources["data.validation.annotations"] = settings.data.validation
    if "label" in sections:
        sources["label.source.annotations"] = settings.label.source
    if "selftrain" in sections:
        sources["selftrain.unlabelled_truth.annotations"] = settings.selftrain.unlabelled_truth
    for key, source in sources.items():
        if source is not None:
            yield key, storage.absolute(storage.join(settings.data_root, source.annotations))


def version(url: str) -> str | None:
    """Something that changes whenever the content may have; None when there is nothing. Much cheaper than the hash."""
    files = parts(url) or [storage.join(url, name) for name in CHECKPOINT_FILES]
    with ThreadPoolExecutor(_TOGETHER) as pool:
        versions = list(pool.map(storage.version, files))
    if not any(versions):
        return None
    return "; ".join(str(version) for version in versions)


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
