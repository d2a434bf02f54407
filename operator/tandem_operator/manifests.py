"""Reads the YAML that `kubectl apply` takes and says file, line, field and rule when it is wrong.

YAML is read as nodes, so that every field keeps its line; checks run on the pydantic types and on
the Python twins of the CEL rules, so that local mode refuses what an apiserver would refuse.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tandem_operator.resources import API_VERSION, GROUP, KINDS, SPECS
from tandem_operator.resources.base import (
    NAME_PATTERN,
    RESERVED_NAME_PATTERN,
    RESERVED_NAME_TEXT,
)
from tandem_operator.resources.field_errors import YamlPath, explain, show_path, suggest
from tandem_operator.resources.pod_patch import misfits
from tandem_operator.resources.rules import violations

# Plain objects that a Tandem resource may point to; they pass through unchecked.
PLAIN_KINDS = {"ConfigMap": "v1", "Secret": "v1"}
ROLES = ("unified", "prefill", "decode")
MAX_FILE_BYTES = 4 * 2**20

# Where the images keep what comes with the source, such as the examples.
IMAGE_ROOT = Path("/opt/tandem")


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a file, in one sentence."""

    file: str
    line: int
    subject: str
    field: str
    message: str

    def __str__(self) -> str:
        parts = [f"{self.file}:{self.line}"]
        parts += [p for p in (self.subject, self.field) if p]
        return ": ".join([*parts, self.message])


class ManifestError(Exception):
    """One or more files cannot be used; str() is one line per problem."""

    def __init__(self, problems: list[Mistake]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems


@dataclass(frozen=True)
class Manifest:
    """One object with defaults filled in, and where it stands."""

    obj: dict[str, Any]
    file: str
    line: int

    @property
    def kind(self) -> str:
        """The object's kind."""
        return str(self.obj["kind"])

    @property
    def name(self) -> str:
        """The object's name."""
        return str(self.obj["metadata"]["name"])


@dataclass
class _Document:
    """A parsed document with the line of every field."""

    file: str
    value: Any
    lines: dict[YamlPath, int] = field(default_factory=dict)
    problems: list[Mistake] = field(default_factory=list)
    subject: str = ""

    def line(self, path: YamlPath) -> int:
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 1)

    def report(self, path: YamlPath, message: str) -> None:
        self.problems.append(
            Mistake(self.file, self.line(path), self.subject, show_path(path), message)
        )


def load_paths(paths: Iterable[str | Path]) -> list[Manifest]:
    """Load files and folders (their *.yaml and *.yml, sorted).

    Raises ManifestError with every problem of every file.
    """
    problems: list[Mistake] = []
    manifests: list[Manifest] = []
    for path in map(Path, paths):
        try:
            files = _files(path)
        except ManifestError as error:
            problems += error.problems
            continue
        for file in files:
            try:
                manifests += load_text(_read(file), str(file), base=file.resolve().parent)
            except ManifestError as error:
                problems += error.problems
    seen: dict[tuple[str, str, str], Manifest] = {}
    for m in manifests:
        key = (m.kind, m.obj["metadata"].get("namespace", "default"), m.name)
        if key in seen:
            first = seen[key]
            problems.append(
                Mistake(
                    m.file,
                    m.line,
                    f"{m.kind}/{m.name}",
                    "metadata.name",
                    f"already defined at {first.file}:{first.line}; rename or remove one",
                )
            )
        seen[key] = m
    if problems:
        raise ManifestError(problems)
    return manifests


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml") and p.is_file())
        if not files:
            raise ManifestError([Mistake(str(path), 1, "", "", "the folder holds no .yaml file")])
        return files
    if not path.exists():
        message = "no such file or folder; check the path"
        if path.parent.is_dir():
            names = [p.name for p in path.parent.iterdir()]
            if close := difflib.get_close_matches(path.name, names, n=1, cutoff=0.8):
                message = f"no such file or folder; did you mean {path.parent / close[0]}?"
        raise ManifestError([Mistake(str(path), 1, "", "", message)])
    return [path]


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ManifestError(
                [Mistake(str(file), 1, "", "", "larger than 4 MiB; split the file")]
            )
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(
            [Mistake(str(file), 1, "", "", f"is not UTF-8 text ({error.reason}); save it as UTF-8")]
        ) from error
    except OSError as error:
        raise ManifestError(
            [Mistake(str(file), 1, "", "", f"cannot be read: {error.strerror}")]
        ) from error


def load_text(text: str, file: str = "<text>", base: Path | None = None) -> list[Manifest]:
    """Load all documents of one YAML text; relative file:// URIs are resolved against base.

    Raises ManifestError with every problem found.
    """
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = error.problem or error.context or "cannot be parsed"
        hint = "; indent with spaces" if "\\t" in repr(reason) else ""
        raise ManifestError([Mistake(file, line, "", "", f"not YAML: {reason}{hint}")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        too_deep = "lists and mappings lie too deep in one another; flatten them"
        reason = too_deep if deep else f"not YAML: {error}"
        raise ManifestError([Mistake(file, 1, "", "", reason)]) from error
    manifests: list[Manifest] = []
    problems: list[Mistake] = []
    for node in nodes:
        if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
            continue
        document = _Document(file, None)
        document.value = _construct(node, (), document, 0)
        if not document.problems:
            for item in _items(document):
                if checked := _check(item, base):
                    manifests.append(checked)
                if item is not document:
                    problems += item.problems
        problems += document.problems
    if not manifests and not problems:
        problems.append(Mistake(file, 1, "", "", "holds no object; add a Model or a Router"))
    if problems:
        raise ManifestError(problems)
    return manifests


def _items(document: _Document) -> list[_Document]:
    """The objects of a document; a List is opened."""
    value = document.value
    if not (isinstance(value, dict) and value.get("kind") == "List"):
        return [document]
    found = []
    for i, item in enumerate(value.get("items") or []):
        lines = {p[2:]: line for p, line in document.lines.items() if p[:2] == ("items", i)}
        found.append(_Document(document.file, item, lines))
    return found


_CONSTRUCTOR = yaml.constructor.SafeConstructor()


def _construct(node: yaml.Node, path: YamlPath, document: _Document, depth: int) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if depth > 64:
        document.report(path[:1], "nested deeper than 64 levels; flatten it")
        return None
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                document.report(path, "a field name must be plain text")
                continue
            if key_node.tag == "tag:yaml.org,2002:merge":
                document.report(path, "merge keys (<<) are not part of Kubernetes YAML; write out")
                continue
            at = (*path, key)
            first = document.lines.get(at)
            document.lines[at] = key_node.start_mark.line + 1
            if key in result:
                document.report(at, f"given twice, first in line {first}; remove one")
            result[key] = _construct(value_node, at, document, depth + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(child, (*path, i), document, depth + 1) for i, child in enumerate(node.value)
        ]
    if node.tag == "tag:yaml.org,2002:timestamp":
        return node.value
    try:
        return _CONSTRUCTOR.construct_object(node)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        document.report(path, f"cannot be read: {problem}")
        return None


def _check(document: _Document, base: Path | None) -> Manifest | None:
    obj = document.value
    if not isinstance(obj, dict):
        document.report((), "an object must be a mapping with apiVersion, kind, metadata and spec")
        return None
    kind, api = obj.get("kind"), obj.get("apiVersion")
    known = [*KINDS, *PLAIN_KINDS]
    if not isinstance(kind, str) or not kind:
        document.report((), f"kind is missing; use one of {', '.join(KINDS)}")
        return None
    if kind not in known:
        document.report(("kind",), f"{kind!r} is not known; {suggest(kind, known)}")
        return None
    wanted = PLAIN_KINDS.get(kind, API_VERSION)
    if api != wanted:
        if api is None:
            document.report((), f"apiVersion is missing; write apiVersion: {wanted}")
        elif isinstance(api, str) and api.startswith(f"{GROUP}/"):
            document.report(
                ("apiVersion",), f"{api!r} is not served; use {wanted}, the only version"
            )
        else:
            document.report(("apiVersion",), f"{api!r} has no kind {kind}; use {wanted}")
        return None
    name = _check_metadata(document, obj, kind)
    if name is None:
        return None
    document.subject = f"{kind}/{name}"
    line = document.line(())
    if kind in PLAIN_KINDS:
        return Manifest(obj, document.file, line)
    if kind == "WorkerPool":
        document.report(("kind",), "WorkerPools are written by the operator; describe a Model")
        return None
    return _check_custom(document, obj, kind, line, base)


def _check_metadata(document: _Document, obj: dict[str, Any], kind: str) -> str | None:
    metadata = obj.get("metadata")
    if not isinstance(metadata, dict):
        document.report(("metadata",), "is missing; write metadata: {name: my-name}")
        return None
    name = metadata.get("name")
    if name is None:
        document.report(("metadata",), f"name is missing; name the {kind}")
        return None
    if not isinstance(name, str) or len(name) > 40 or not re.match(NAME_PATTERN, name):
        dots = isinstance(name, str) and "." in name
        hint = f", such as {name.replace('.', '-')!r}" if dots else ""
        document.report(
            ("metadata", "name"),
            f"{name!r} is not a name; use at most 40 lower-case letters, digits and inner dashes"
            f"{hint}",
        )
        return None
    if re.match(RESERVED_NAME_PATTERN, name) and kind in ("Model", "Router"):
        document.report(("metadata", "name"), RESERVED_NAME_TEXT)
        return None
    for key in ("labels", "annotations"):
        for k, v in (metadata.get(key) or {}).items():
            if not isinstance(v, str):
                document.report(
                    ("metadata", key, k),
                    f"{v!r} is not text; write it quoted: {json.dumps(str(v))}",
                )
    return name


def _check_custom(
    document: _Document, obj: dict[str, Any], kind: str, line: int, base: Path | None
) -> Manifest | None:
    spec_type = SPECS[kind]
    for key in obj:
        if key not in ("apiVersion", "kind", "metadata", "spec", "status"):
            hint = suggest(key, ["spec", "metadata"]) if key != "tiers" else "it belongs in spec"
            document.report((key,), f"unknown field; {hint}")
    if "spec" not in obj and kind != "AutoscalingPolicy":
        document.report((), "spec is missing; say what it should be")
    if document.problems:
        return None
    spec_value = obj.get("spec")
    if spec_value is None:
        spec_value = {}
    if not isinstance(spec_value, dict):
        document.report(("spec",), "must be a mapping of fields")
        return None
    try:
        spec = spec_type.model_validate(spec_value)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            path, message = explain(spec_type, dict(item))
            document.report(("spec", *path), message)
        return None
    checked = {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": obj["metadata"],
        "spec": spec.model_dump(by_alias=True, exclude_none=True, mode="json"),
    }
    for path, patch in _pod_patches(checked["spec"]):
        for below, message in misfits(patch):
            document.report(("spec", *path, *below), message)
    for violation in violations(kind, checked):
        said = "" if violation.value is None else f"is {violation.value!r}, but "
        document.report(violation.path, said + violation.message)
    if not document.problems:
        _resolve_files(document, checked["spec"], ("spec",), base)
    if document.problems:
        return None
    return Manifest(checked, document.file, line)


def _pod_patches(spec: dict[str, Any]) -> Iterator[tuple[YamlPath, dict[str, Any]]]:
    """The podPatch of a Router, or those of a Model's roles."""
    places: list[YamlPath] = [("podPatch",), *((r, "podPatch") for r in ROLES)]
    for path in places:
        found: Any = spec
        for part in path:
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, dict):
            yield path, found


def _resolve_files(
    document: _Document, node: dict[str, Any], path: YamlPath, base: Path | None
) -> None:
    """Make the relative file:// URIs below node absolute and check that they exist."""
    for key, value in node.items():
        if isinstance(value, dict):
            _resolve_files(document, value, (*path, key), base)
        elif isinstance(value, str) and key in ("source", "artifact", "data", "embedding"):
            if value.startswith("image://"):
                _resolve_image(document, node, (*path, key), base)
                continue
            if not value.startswith("file://"):
                continue
            rest = value.removeprefix("file://")
            if rest.startswith("/"):
                continue
            if base is None:
                document.report(
                    (*path, key), f"{value!r} is relative; use file:///absolute/path here"
                )
                continue
            node[key] = f"file://{(base / rest).resolve()}"


def _resolve_image(
    document: _Document, node: dict[str, Any], path: YamlPath, base: Path | None
) -> None:
    """Make an image:/// URI a file:// one: here the image's folder is the checkout.

    What the images hold below /opt/tandem stands in the YAML's folder or in one above it.
    """
    key = str(path[-1])
    inside = Path(node[key].removeprefix("image://"))
    if base is not None and inside.is_relative_to(IMAGE_ROOT):
        rest = inside.relative_to(IMAGE_ROOT)
        for folder in (base, *base.parents):
            if (folder / rest).exists():
                node[key] = f"file://{(folder / rest).resolve()}"
                return
    wanted = inside.relative_to(IMAGE_ROOT) if inside.is_relative_to(IMAGE_ROOT) else inside
    document.report(
        path,
        f"{str(wanted)!r} is not in this folder or one above it, and there are no images here; "
        "use file://",
    )
