"""Reads YAML that nobody vouches for: limited in size, depth and aliases, with the line of every key and value.

Differences to PyYAML's SafeLoader, on purpose: `1e-3` is a number; only `true` and `false` are booleans (`no`, `on`
stay text); `1:30` and dates stay text; `010` is refused (8 or 10?); so are duplicate keys, tags, merge keys and
several documents in a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 5_000  # keys, values and containers, aliases counted as often as they are used
MAX_NUMBER_LENGTH = 64  # characters of a number

_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_OCTAL_TRAP = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", ".Inf", "+.Inf", ".INF", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True)
class Finding:
    """Something wrong in the text, at a line counted from 1; None where no line applies."""

    line: int | None
    message: str


class YamlError(ValueError):
    """The text cannot be read at all; `finding` says where and why."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.finding = Finding(line, message)


@dataclass(slots=True)
class Node:
    """A value with its line; `items` of a list, `entries` of a mapping by key, or else a scalar `value`."""

    line: int
    value: Any = None
    items: list[Node] | None = None
    entries: dict[str, tuple[int, Node]] | None = None  # key: (line of the key, value)
    size: int = 1  # nodes below and this one
    height: int = 0  # levels below this one

    def plain(self) -> Any:
        """The value as scalars, lists and dictionaries."""
        if self.entries is not None:
            return {key: node.plain() for key, (_, node) in self.entries.items()}
        if self.items is not None:
            return [node.plain() for node in self.items]
        return self.value


@dataclass(frozen=True)
class Document:
    """A whole file: its root and what is wrong with it although it could be read (duplicate keys, tags …)."""

    root: Node
    findings: tuple[Finding, ...]

    def line(self, path: tuple[str | int, ...]) -> int:
        """The line of the key or list item at `path`, or of the nearest container that exists."""
        node, line = self.root, self.root.line
        for part in path:
            if node.entries is not None and isinstance(part, str) and part in node.entries:
                line, node = node.entries[part]
            elif node.items is not None and isinstance(part, int) and part < len(node.items):
                node = node.items[part]
                line = node.line
            else:
                break
        return line


@dataclass(slots=True)
class _Open:
    """A container whose end has not been reached."""

    node: Node
    anchor: str | None
    key: str | None = None
    key_line: int = 0
    wants_key: bool = True


@dataclass(slots=True)
class _Composer:
    """Builds nodes from parser events, without recursion, and stops at the first limit that is passed."""

    findings: list[Finding] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, Node] = field(default_factory=dict)
    root: Node | None = None
    documents: int = 0
    nodes: int = 0

    def feed(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise YamlError(line, "a second document begins here; allowed: one document in a file")
        elif isinstance(event, yaml.AliasEvent):
            self._add(self._alias(str(event.anchor), line), line)
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event, line)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._start(event, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = self.stack.pop()
            if closed.anchor:
                self.anchors[closed.anchor] = closed.node
            self._add(closed.node, closed.node.line, counted=True)

    def _scalar(self, event: Any, line: int) -> None:
        self._refuse_tag(event, line)
        plain, is_key = event.implicit[0], self._is_key()
        value = event.value if is_key or not plain else self._resolve(event.value, line)
        node = Node(line, value=value)
        if event.anchor:
            self.anchors[event.anchor] = node
        self._add(node, line)

    def _start(self, event: Any, line: int) -> None:
        self._refuse_tag(event, line)
        if len(self.stack) >= MAX_DEPTH:
            raise YamlError(line, f"nested more than {MAX_DEPTH} levels deep")
        if self._is_key():
            raise YamlError(line, "a list or mapping stands where a key belongs; a text that holds { or [ needs quotes")
        self._count(1, line)
        mapping = isinstance(event, yaml.MappingStartEvent)
        node = Node(line, entries={}) if mapping else Node(line, items=[])
        self.stack.append(_Open(node, event.anchor))
        if event.anchor:
            self.anchors.pop(event.anchor, None)

    def _alias(self, anchor: str, line: int) -> Node:
        node = self.anchors.get(anchor)
        if node is None:
            inside = any(opened.anchor == anchor for opened in self.stack)
            raise YamlError(line, f"*{anchor} refers to {'itself' if inside else 'an anchor that does not exist'}")
        if len(self.stack) + node.height > MAX_DEPTH:
            raise YamlError(line, f"nested more than {MAX_DEPTH} levels deep through *{anchor}")
        return node

    def _count(self, size: int, line: int) -> None:
        self.nodes += size
        if self.nodes > MAX_NODES:
            raise YamlError(line, f"more than {MAX_NODES} keys and values, aliases counted as often as they are used")

    def _is_key(self) -> bool:
        return bool(self.stack) and self.stack[-1].node.entries is not None and self.stack[-1].wants_key

    def _add(self, node: Node, line: int, counted: bool = False) -> None:
        """Put a finished `node` into the innermost open container."""
        if not counted:
            self._count(node.size, line)
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        if self._is_key():
            if not isinstance(node.value, str):
                raise YamlError(line, "an alias stands where a key belongs")
            parent.key, parent.key_line, parent.wants_key = node.value, line, False
            return
        if parent.node.entries is not None:
            self._entry(parent, node)
        elif parent.node.items is not None:
            parent.node.items.append(node)
        parent.node.size += node.size
        parent.node.height = max(parent.node.height, node.height + 1)

    def _entry(self, parent: _Open, node: Node) -> None:
        entries, key, line = parent.node.entries, parent.key or "", parent.key_line
        assert entries is not None
        parent.wants_key = True
        if key == "<<":
            self.findings.append(Finding(line, "merge keys (<<) are not available; write the settings out"))
        elif key in entries:
            self.findings.append(Finding(line, f"{key} is given twice, first on line {entries[key][0]}"))
        else:
            entries[key] = (line, node)

    def _refuse_tag(self, event: Any, line: int) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.findings.append(Finding(line, f"the tag {tag[:60]} is not allowed; write the value without a tag"))

    def _resolve(self, text: str, line: int) -> object:
        """A plain scalar by the core schema of YAML 1.2; what is no null, boolean or number is text."""
        if text in _SPECIAL:
            return _SPECIAL[text]
        if not (_FLOAT.fullmatch(text) or _BASED.fullmatch(text)):
            return text
        if len(text) > MAX_NUMBER_LENGTH:
            self.findings.append(Finding(line, f"a number of {len(text)} characters; allowed: {MAX_NUMBER_LENGTH}"))
            return 0
        if _OCTAL_TRAP.fullmatch(text):
            decimal = int(text)
            self.findings.append(Finding(line, f"{text} with a leading zero is ambiguous (octal?); write {decimal}"))
            return decimal
        if _BASED.fullmatch(text):
            return int(text, 0)
        return int(text) if _INTEGER.fullmatch(text) else float(text)


def read(path: Path) -> Document:
    """The document in the file at `path`.

    Raises:
        YamlError: there is no such file, it is too large, not UTF-8, not YAML, or past a limit.
    """
    if path.is_dir():
        raise YamlError(None, "is a folder; a YAML file is wanted")
    if not path.is_file():
        raise YamlError(None, "does not exist" if not path.exists() else "is not a regular file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise YamlError(None, f"cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise YamlError(None, f"is larger than {MAX_BYTES:,} bytes, the most that is read")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise YamlError(line, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from error
    return parse(text)


def parse(text: str) -> Document:
    """The one document in `text`.

    Raises:
        YamlError: the text is empty, not YAML, or past a limit. Smaller faults are the document's `findings`.
    """
    composer = _Composer()
    for event in _events(text):
        composer.feed(event)
    if composer.root is None:
        raise YamlError(1, "is empty")
    return Document(composer.root, tuple(composer.findings))


def _events(text: str) -> Iterator[Any]:
    """Parser events of `text`, one by one, so that a limit stops the parser early."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        yield from yaml.parse(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        raise _translated(error, text) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = ord(error.character) if isinstance(error.character, str) else int(error.character)
        raise YamlError(line, f"a character that YAML does not allow: U+{code:04X}") from error
    except UnicodeError as error:
        raise YamlError(None, "not UTF-8") from error
    except RecursionError as error:  # PyYAML without its C part
        raise YamlError(None, "nested too deep") from error


def _translated(error: yaml.MarkedYAMLError, text: str) -> YamlError:
    """The parser's complaint in words that say what to do, at the line where the fault begins."""
    problem, context = str(error.problem or ""), str(error.context or "")
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else None
    opened = error.context_mark.line + 1 if error.context_mark is not None else line
    if "cannot start any token" in problem and mark is not None:
        lines = text.splitlines()
        character = lines[mark.line][mark.column : mark.column + 1] if mark.line < len(lines) else ""
        if character == "\t":
            return YamlError(line, "a tab where YAML wants spaces")
        return YamlError(line, f"a value cannot begin with {character}; put it in quotes")
    if "mapping values are not allowed" in problem:
        return YamlError(line, "a colon that does not fit here; a text that holds ': ' needs quotes")
    if "quoted scalar" in context:
        return YamlError(opened, "a quote that is opened here is not closed")
    if "flow sequence" in context or "flow mapping" in context:
        bracket = "[" if "sequence" in context else "{"
        return YamlError(opened, f"a {bracket} that is opened here is not closed, or a comma is missing (line {line})")
    if "expected ':'" in problem:
        return YamlError(opened, "a key without ': ' and a value")
    if "block mapping" in context or "block collection" in context:
        return YamlError(line, "indented differently from the lines it belongs with, or a '- ' or ': ' is missing")
    return YamlError(line, f"not valid YAML: {problem or context or error}")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would be read back as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    special = text in _SPECIAL or _FLOAT.fullmatch(text) or _BASED.fullmatch(text)
    style = "'" if special else None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(value: object) -> str:
    """`value` as YAML that `parse` reads back equal; keys keep their order."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return text
