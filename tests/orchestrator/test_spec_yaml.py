"""Reading YAML safely: values of scalars, lines, limits, and hostile files refused quickly."""

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import yaml_file
from orchestrator.yaml_file import YamlError, dump, parse, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("5.", 5.0),
        ("-.5", -0.5),
        ("12", 12),
        ("0o17", 15),
        ("0x1f", 31),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("'1e-3'", "1e-3"),
        ("~", None),
        ("null", None),
        ("-.inf", -math.inf),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"key: {text}").root.plain()["key"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse(".nan").root.plain())


def _bomb() -> str:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    return "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + levels


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (_bomb(), 4, "more than 5000 keys and values"),
        ("[" * 20_000, 1, "nested more than 32 levels"),
        ("[" * 20_000 + "]" * 20_000, 1, "nested more than 32 levels"),
        ("{a: " * 20_000, 1, "nested more than 32 levels"),
        ("- " * 20_000, 1, "nested more than 32 levels"),
        ("[\n" * 20_000, 33, "nested more than 32 levels"),
        ("a: [" + "[]," * 300_000 + "]", 1, "more than 5000"),
        ("".join(f"k{i}: 1\n" for i in range(90_000)), 2_500, "more than 5000"),
        ("a: &a [*a]", 1, "refers to itself"),
        ("a: *b", 1, "does not exist"),
        ("a: &a " + "[" * 30 + "]" * 30 + "\nb: [[[[*a]]]]", 2, "nested more than 32 levels deep through *a"),
    ],
    ids=["bomb", "brackets", "closed", "braces", "dashes", "lines", "wide", "keys", "self", "unknown", "deep alias"],
)
def test_hostile_text_is_refused_quickly(text: str, line: int, message: str) -> None:
    started = time.process_time()
    with pytest.raises(YamlError, match=message.replace("*", r"\*")) as caught:
        parse(text)
    assert time.process_time() - started < 0.1
    assert caught.value.finding.line == line


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a is given twice, first on line 1"),
        ("a: !!python/object:os.system x", 1, "the tag !!python/object:os.system is not allowed"),
        ("a: !custom {}", 1, "the tag !custom is not allowed"),
        ("a: 010", 1, "010 with a leading zero is ambiguous (octal?); write 10"),
        ("a: &x {b: 1}\nc: {<<: *x}", 2, "merge keys (<<) are not available; write the settings out"),
        (f"a: {'9' * 5000}", 1, "a number of 5000 characters; allowed: 64"),
    ],
)
def test_findings_do_not_hide_the_rest_of_the_document(text: str, line: int, message: str) -> None:
    found = parse(text + "\nz: 1")
    assert found.findings[0].line == line
    assert found.findings[0].message.startswith(message)
    assert found.root.plain()["z"] == 1


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "is empty"),
        ("# only a comment\n", 1, "is empty"),
        ("a: 1\n---\nb: 2", 2, "a second document"),
        ("a:\n\tb: 1", 2, "a tab where YAML wants spaces"),
        ("a: b: c", 1, "a colon that does not fit"),
        ("a: 1\nb: 'x\nc: 2\n", 2, "a quote that is opened here"),
        ("a: [1, 2\nb: 3\nc: 4", 1, r"a \[ that is opened here is not closed"),
        ("a: {x: 1\nb: 3\n", 1, "a { that is opened here is not closed"),
        ("a: 1\nfoo\nb: 2", 2, "a key without ': '"),
        ("a:\n  b: 1\n c: 2", 3, "indented differently"),
        ("a: @x", 1, "a value cannot begin with @"),
        ("? [a]\n: 1", 1, "where a key belongs"),
        ("a: \x01", 1, "does not allow: U\\+0001"),
        ("a: \udc80", None, "not UTF-8"),
    ],
)
def test_broken_yaml_is_explained_at_its_line(text: str, line: int | None, message: str) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        parse(text)
    assert caught.value.finding.line == line


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    def message(path: Path) -> tuple[int | None, str]:
        with pytest.raises(YamlError) as caught:
            read(path)
        return caught.value.finding.line, caught.value.finding.message

    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: caf\xe9\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (yaml_file.MAX_BYTES + 1))
    assert message(tmp_path / "absent.yaml") == (None, "does not exist")
    assert message(tmp_path) == (None, "is a folder; a YAML file is wanted")
    assert message(latin) == (2, "byte 0xe9 is not UTF-8; save the file as UTF-8")
    assert message(large) == (None, "is larger than 1,000,000 bytes, the most that is read")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read(path).root.plain() == {"a": 1}


def test_lines_of_keys_items_and_aliases() -> None:
    document = parse("a: &x\n  b: 1\n  c:\n    - 5\n    - 6\nd: *x\n")
    assert document.line(("a",)) == 1
    assert document.line(("a", "c")) == 3
    assert document.line(("a", "c", 1)) == 5
    assert document.line(("d",)) == 6
    assert document.line(("a", "absent")) == 1
    assert document.root.plain()["d"] == {"b": 1, "c": [5, 6]}


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_what_is_dumped_is_read_back_equal(value: object) -> None:
    value = {"value": value}
    assert parse(dump(value)).root.plain() == value


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except YamlError as error:
        assert error.finding.message
