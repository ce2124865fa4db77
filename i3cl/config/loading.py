"""Settings from files and the command line: ``extends:``, ``key.sub=value`` and the catalogue of data sets."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from i3cl.config.settings import CatalogueEntry, Settings
from i3cl.errors import SettingsError

PACKAGED = next((p for p in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs") if p.is_dir()), None)
"""Folder of the recipes that are installed with the package; in a checkout, its folder configs/."""
_NOT_RECIPES = {"datasets"}


class _Loader(yaml.SafeLoader):
    """YAML of plain values, without two surprises of PyYAML.

    A key may stand once only: of several, PyYAML would keep the last without a word. A number is decimal, or begins with 0x or
    0b: PyYAML takes 0100 for 64 and 1:30 for 90.
    """

    # When the tree is composed, because merging (<<) adds keys to a mapping later.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} occurs twice", key.start_mark)
            seen.add(name)
        return node


_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _INT] for first, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789"))


def _from_yaml(text: str) -> Any:
    """The value of a YAML text. YAMLError or ValueError for other text."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()


def load_settings(config: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """The settings from a recipe and ``key.sub=value`` overrides.

    Args:
        config: path of a YAML file, or the name of a packaged recipe such as ``quickstart`` or ``r50/mixtrain``.
        overrides: the value of a text setting is taken as it stands; any other value is YAML.

    Raises:
        SettingsError: one line that names file, key and remedy.
    """
    path = find_recipe(config) if config is not None else None
    tree: dict[str, Any] = _read_tree(path, ()) if path is not None else {}
    origin = str(path) if path is not None else "command line"
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise SettingsError(f"command line: {text!r} is not key=value, e.g. train.steps=500")
        tree = _merge(tree, _nested(key.strip(), _parse(key.strip(), value)))
    return _validate(tree, origin, {text.partition("=")[0].strip() for text in overrides})


def find_recipe(config: str | Path) -> Path:
    """The file of a recipe: a path as it is, or the name of a packaged one. SettingsError for an unknown name."""
    path = Path(config)
    if path.exists() or path.suffix or PACKAGED is None:
        return path
    packaged = PACKAGED / f"{config}.yaml"
    if str(config) in recipe_names():
        return packaged
    hint = (
        _did_you_mean(str(config), recipe_names()) or f"; packaged are quickstart, realtext, r50/mixtrain and others: {PACKAGED}"
    )
    raise SettingsError(f"{config}: no such settings file and no packaged recipe{hint}")


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted: quickstart, r50/mixtrain, ..."""
    if PACKAGED is None:
        return []
    found = (path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.yaml"))
    return sorted(name for name in found if name not in _NOT_RECIPES)


def setting_names() -> list[str]:
    """Dotted keys of all settings that have one value."""
    return list(_leaves(Settings, ""))


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None and get_origin(field.annotation) not in (tuple, list, dict):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _parse(key: str, value: str) -> Any:
    """The value of an override: text as it stands where the setting is text or may be one, else YAML."""
    kind = _kind(key)
    if kind is not None and _is_text(kind):
        if NoneType in get_args(kind) and value.strip() in ("", "null", "~"):
            return None
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            try:
                quoted = _from_yaml(value)
            except yaml.YAMLError:
                return value
            return quoted if isinstance(quoted, str) else value
        return value
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        # label.members.NAME=CHECKPOINT: a name such as 20240105 is text. null takes a member out.
        if value.strip() in ("null", "~"):
            return None
        try:
            group = _from_yaml(value)
        except (yaml.YAMLError, ValueError):
            return value
        return group if isinstance(group, dict) and value.lstrip().startswith("{") else value
    try:
        return _from_yaml(value)
    except yaml.composer.ComposerError as error:
        raise SettingsError(f"command line: {key}: the value {value!r} is not YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError):
        raise SettingsError(f"command line: {key}: the value {value!r} is not YAML; put it in quotes") from None


def _kind(key: str) -> Any:
    """The annotation of the setting that a dotted key names; None when there is none."""
    kind: Any = Settings
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        model = _model_in(kind)
        if model is None or part not in model.model_fields:
            return None
        kind = model.model_fields[part].annotation
    return kind


def _is_text(kind: Any) -> bool:
    """Whether a setting holds text and nothing else, apart from null."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _is_text(get_args(kind)[0])
    if origin in (Union, UnionType):
        return all(_is_text(part) for part in get_args(kind) if part is not NoneType)
    if origin is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    return kind is str


def with_overrides(settings: Settings, overrides: dict[str, Any], origin: str) -> Settings:
    """A new tree with dotted keys changed. `origin` names, in an error, the place where the overrides stand.

    Which settings were given and which are defaults stays known (pydantic's `model_fields_set`).
    """
    tree = settings.model_dump(exclude_unset=True)
    for key, value in overrides.items():
        tree = _merge(tree, _nested(key, value))
    return _validate(tree, origin, set())


def to_yaml(settings: Settings) -> str:
    """The resolved tree; `load_settings` reads it back to an equal one."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        name = path.with_suffix("").as_posix().removeprefix("configs/")
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else _did_you_mean(name, recipe_names())
        hint = hint or "; give a path, or the name of a recipe in configs/"
        raise SettingsError(f"{path}: no such settings file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}); it must be a UTF-8 YAML file") from None
    try:
        tree = _from_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45 looks like a date
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SettingsError(f"{path}: {where}not valid YAML ({_reason(error)})") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: must be a mapping of settings, not a {type(tree).__name__}")
    return tree


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise SettingsError(f"{path}: extends itself; remove the circle {' -> '.join(p.name for p in seen)}")
    tree = _read_mapping(path)
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("catalogue"), str):
        tree["data"] = {**data, "catalogue": str(path.parent / data["catalogue"])}
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise SettingsError(f"{path}: extends: must be the path of a YAML file, not {parent!r}")
    return _merge(_read_tree(path.parent / parent, (*seen, path.resolve())), tree)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else, lists too, is replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _with_named_sources(tree: dict[str, Any], origin: str, overridden: set[str]) -> dict[str, Any]:
    """The tree with every source that names a data set of the catalogue spelled out as annotations and images."""
    data = tree.get("data")
    path = data.get("catalogue") if isinstance(data, dict) else None
    known: dict[str, CatalogueEntry] = {}

    def spelled_out(source: dict[str, Any], key: str) -> dict[str, Any]:
        where = f"{_origin(key, origin, overridden)}: {key}"
        if not isinstance(path, str):
            raise SettingsError(f"{where}.dataset: data.catalogue names no file; add data.catalogue=configs/datasets.yaml")
        known.update(known or _read_catalogue(Path(path)))
        name, weighted = str(source["dataset"]), source.get("weighted", False)
        if not isinstance(weighted, bool):
            raise SettingsError(f"{where}.weighted: must be true or false, not {weighted!r}")
        if name not in known:
            hint = _did_you_mean(name, known) or f"; it has {', '.join(known)}"
            raise SettingsError(f"{where}.dataset: {path} has no data set {name!r}{hint}")
        if "annotations" in source or "images" in source:
            raise SettingsError(f"{where}: give either dataset, or annotations and images")
        annotations = known[name].weighted if weighted else known[name].annotations
        if annotations is None:
            remedy = "take weighted: false" if weighted else "take weighted: true"
            raise SettingsError(f"{where}: {name} has no {'weighted' if weighted else 'plain'} annotations in {path}; {remedy}")
        rest = {k: v for k, v in source.items() if k not in ("dataset", "weighted")}
        return {"annotations": annotations, "images": known[name].images, **rest}

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            if value.get("dataset") is not None and "." in key:  # a section at the top of the tree is not a source
                return spelled_out(value, key)
            return {name: walk(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [walk(inner, f"{key}.{index}") for index, inner in enumerate(value)]
        return value

    tree = walk(tree, "")
    if isinstance(path, str):
        tree["data"]["catalogue"] = None
    return tree


def _read_catalogue(path: Path) -> dict[str, CatalogueEntry]:
    known = {}
    for name, entry in _read_mapping(path).items():
        try:
            known[str(name)] = CatalogueEntry.model_validate(entry)
        except ValidationError as error:
            key = ".".join(map(str, (name, *error.errors()[0]["loc"])))
            raise SettingsError(f"{path}: {key}: {error.errors()[0]['msg']}; {_ENTRY}") from None
    return known


_ENTRY = "a data set is {images: FOLDER, annotations: FILE.json, weighted: FILE.json}"


def _origin(key: str, origin: str, overridden: set[str]) -> str:
    """Where a key was set: the command line, or the file `origin`."""
    given = any(key == name or key.startswith(name + ".") or name.startswith(key + ".") for name in overridden)
    return "command line" if given else origin


def _validate(tree: dict[str, Any], origin: str, overridden: set[str]) -> Settings:
    try:
        tree = _with_named_sources(tree, origin, overridden)
    except RecursionError:
        raise SettingsError(f"{origin}: a YAML alias (*) stands inside its own anchor (&); write the value itself") from None
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        # A misspelt key comes before what is then missing.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        location = [str(part) for part in first["loc"]]
        key = ".".join(location)
        origin = _origin(key, origin, overridden)
        if first["type"] == "extra_forbidden":
            raise SettingsError(f"{origin}: {key}: unknown key{_nearest(location)}") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "too_short":
            raise SettingsError(f"{origin}: {key}: is empty; give at least one value, or leave the key out") from None
        given = first.get("input")
        shown = "" if isinstance(given, dict | BaseModel) else f", not {_shown(given)}"
        if first["type"] == "string_type" and not isinstance(given, dict | list | tuple | NoneType):
            shown += f"; put it in quotes, '{_shown(given)}'"
        raise SettingsError(f"{origin}: {key or 'settings'}: {message[0].lower() + message[1:]}{shown}") from None


def _shown(value: Any) -> str:
    """A value as a YAML file has it: a date is 2024-05-01, a text in quotes."""
    return str(value) if isinstance(value, datetime.date) else repr(value)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _nearest(location: list[str]) -> str:
    model: Any = Settings
    for part in location[:-1]:
        if part.isdigit() or not isinstance(model, type) or not issubclass(model, BaseModel):
            continue
        model = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
        if model is None:
            return ""
    names = list(model.model_fields)
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    prefix = ".".join(location[:-1])
    if near:
        return f"; did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    return f"; known here: {', '.join(names)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as tuple[SourceSettings, ...] or SourceSettings | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
