"""Read the files of a constitution: parse TOML, resolve includes and terms, and record the location of each entry.

`merge_includes` merges a file and its included files into one dictionary. The classes in `constitutions.loader` validate this
dictionary. Every error in a file raises a `ConstitutionError` with the location, the reason and the fix.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONSTITUTIONS_FOLDER = Path(__file__).parent
_SECTIONS = ("critique", "judge", "prose", "examples")
_MAX_FILE_BYTES = 1 << 20
_MAX_INCLUDE_DEPTH = 16  # maximum number of files in a chain of includes

# {word} is a placeholder; {{word}} is the literal text {word}.
_PLACEHOLDER_PATTERN = re.compile(r"\{\{([A-Za-z_][A-Za-z0-9_-]*)\}\}|\{([A-Za-z_][A-Za-z0-9_-]*)\}")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


class ConstitutionError(ValueError):
    """An error in a constitution. Its three lines state what happened (with the location), why, and what to do."""

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


@dataclass(frozen=True)
class ConstitutionFile:
    """A parsed file. `origin` is its name in error messages. `path` is None if the text was not read from a file."""

    origin: str
    text: str
    values: Mapping[str, Any]
    path: Path | None = None

    def find_line(self, *key_path: str | int) -> int:
        """Return the line number of a key (see `find_key_line`)."""
        return find_key_line(self.text, key_path)


@dataclass(frozen=True)
class SourceLocation:
    """The location of an entry: the file, the part of the file (such as `judge`), and the index of the entry in this part."""

    file: ConstitutionFile
    part: str
    index: int

    @property
    def origin(self) -> str:
        return self.file.origin

    def find_line(self, *keys: str | int) -> int:
        """Return the line number of a key of the entry."""
        return self.file.find_line(self.part, self.index, *keys)


@dataclass(frozen=True)
class MergedConstitution:
    """The merged values of a file and its included files, and the location of each entry."""

    main_file: ConstitutionFile
    values: dict[str, Any]
    locations: dict[tuple[str, int], SourceLocation] = field(default_factory=dict)

    def locate(self, key_path: Sequence[str | int]) -> tuple[str, tuple[str | int, ...], int]:
        """Return the file name, the key path in this file, and the line number for a key path in the merged values."""
        is_entry = len(key_path) > 1 and isinstance(key_path[1], int)
        location = self.locations.get((str(key_path[0]), int(key_path[1]))) if is_entry else None
        if location is None:
            file, path_in_file = self.main_file, tuple(key_path)
        else:
            file, path_in_file = location.file, (location.part, location.index, *key_path[2:])
        return file.origin, path_in_file, file.find_line(*path_in_file)


# Reading


def list_shipped_constitutions() -> list[str]:
    """Return the names of the shipped constitutions."""
    return sorted(path.stem for path in CONSTITUTIONS_FOLDER.glob("*.toml"))


def read_constitution_file(name_or_path: str, base_folder: Path | None = None) -> ConstitutionFile:
    """Read a shipped constitution by name, or a file by its path relative to `base_folder`. Raise ConstitutionError."""
    path = (
        CONSTITUTIONS_FOLDER / f"{name_or_path}.toml"
        if name_or_path in list_shipped_constitutions()
        else (base_folder or Path()) / name_or_path
    )
    data = read_file_bytes(path)
    if data is None:
        raise ConstitutionError(
            f"there is no constitution {name_or_path!r}",
            f"it is not a file, and the shipped constitutions are: {', '.join(list_shipped_constitutions())}",
            suggest_nearest(name_or_path, list_shipped_constitutions())
            or "give the path of a TOML file, or one of these names",
        )
    return parse_toml(data, str(path), path.resolve())


def read_file_bytes(path: Path) -> bytes | None:
    """Return the content of a regular file, or None if the file cannot be read. Read at most one byte above the size limit."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            return stream.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError):
        return None


def suggest_nearest(name: str, known_names: Iterable[str]) -> str:
    """Return "did you mean NAME?" with the most similar known name, or an empty string if no name is similar."""
    matches = difflib.get_close_matches(name, list(known_names), n=1, cutoff=0.4)
    return f"did you mean {matches[0]}?" if matches else ""


def parse_toml(data: str | bytes, origin: str, path: Path | None = None) -> ConstitutionFile:
    """Parse TOML text or bytes. Raise ConstitutionError if the text is too long, not UTF-8 or not TOML."""
    if len(data) > _MAX_FILE_BYTES:
        raise ConstitutionError(
            f"{origin} is longer than {_MAX_FILE_BYTES} bytes",
            "the manifest of every run contains its whole constitution",
            "check that this is the right file",
        )
    text = decode_utf8(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"), origin)
    try:
        return ConstitutionFile(origin, text, tomllib.loads(text), path)
    except (ValueError, RecursionError) as error:  # an integer with thousands of digits raises a plain ValueError
        raise ConstitutionError(f"{origin} is not valid TOML", str(error) or "nested too deeply", "fix that line") from error


def decode_utf8(data: bytes, origin: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raise ConstitutionError for other encodings."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "LATIN1")
        raise ConstitutionError(
            f"{origin}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8",
            f"a constitution must be UTF-8; this file may be {encoding}",
            f"save it as UTF-8, or type: iconv -f {encoding} -t UTF-8 OLD > NEW",
        ) from error


# Includes and terms


def merge_includes(main: ConstitutionFile) -> MergedConstitution:
    """Merge the entries of a file and its included files. Each included file is merged once, before the including file."""
    values = {key: value for key, value in main.values.items() if key not in (*_SECTIONS, "include", "terms")}
    merged = MergedConstitution(main, values)
    for file, terms in _iterate_files(main, {}, (), set()):
        for part in _SECTIONS:
            if part not in file.values:
                continue
            entries = merged.values.setdefault(part, [])
            for index, entry in enumerate(_get_entries(file, part)):
                location = SourceLocation(file, part, index)
                merged.locations[part, len(entries)] = location
                entries.append(_fill_entry(entry, terms, location))
    return merged


def _get_entries(file: ConstitutionFile, part: str) -> list[Any]:
    entries = file.values[part]
    if isinstance(entries, list):
        return entries
    raise ConstitutionError(
        f"{file.origin}, line {file.find_line(part)}: {part} is not a list",
        "it must be a list of tables",
        f"write [[{part}]]",
    )


def _iterate_files(
    file: ConstitutionFile, outer_terms: Mapping[str, str], include_path: tuple[Path, ...], seen_paths: set[Path]
) -> Iterator[tuple[ConstitutionFile, Mapping[str, str]]]:
    """Yield the included files, and then the file itself. Yield each file together with its terms.

    If a file and an included file define the same term, the definition in the including file is used.
    """
    terms = {**_get_terms(file), **outer_terms}
    if file.path:
        include_path = (*include_path, file.path)
        seen_paths.add(file.path)
    for number, name in enumerate(_get_includes(file)):
        location = f"{file.origin}, line {_find_line_containing(file, name)}"
        try:
            included = read_constitution_file(name, file.path.parent if file.path else None)
        except ConstitutionError as error:
            raise ConstitutionError(f"{location}: include {number + 1}: {error.what}", error.why, error.fix) from error
        assert included.path
        if included.path in include_path:
            cycle = " -> ".join(path.name for path in (*include_path[include_path.index(included.path) :], included.path))
            raise ConstitutionError(f"{location}: circular include", cycle, f"remove {name!r} from one of these files")
        if len(include_path) >= _MAX_INCLUDE_DEPTH:
            raise ConstitutionError(
                f"{location}: the chain of includes is longer than {_MAX_INCLUDE_DEPTH} files",
                "each of these files includes the next one",
                "include the files directly from one file",
            )
        if included.path not in seen_paths:
            _check_included_file(included)
            yield from _iterate_files(included, terms, include_path, seen_paths)
    yield file, terms


def _get_includes(file: ConstitutionFile) -> list[str]:
    names = file.values.get("include", [])
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return names
    raise ConstitutionError(
        f"{file.origin}, line {file.find_line('include')}: include is not a list of names",
        "it must contain names of shipped constitutions, or paths relative to this file",
        'write: include = ["default", "more.toml"]',
    )


def _get_terms(file: ConstitutionFile) -> dict[str, str]:
    terms = file.values.get("terms", {})
    if not isinstance(terms, dict):
        raise ConstitutionError(
            f"{file.origin}, line {file.find_line('terms')}: terms is not a table",
            "it must map placeholder names to text",
            "write [terms], and NAME = 'TEXT' below it",
        )
    for name, replacement in terms.items():
        if not isinstance(replacement, str) or not _PLACEHOLDER_PATTERN.fullmatch(f"{{{name}}}"):
            raise ConstitutionError(
                f"{file.origin}, line {_find_line_containing(file, name, file.find_line('terms'))}: the term {name} cannot be used",
                "a term is a name (letters, digits, _ and -) and the text that replaces {name} in the principles",
                'write: NAME = "TEXT"',
            )
    return terms


_TOP_LEVEL_KEYS = ("name", "version", "description", "selection", "judge_with", "include", "terms", *_SECTIONS)


def _check_included_file(file: ConstitutionFile) -> None:
    """Raise ConstitutionError if an included file has an unknown key. The file does not need a name."""
    for key in file.values:
        if key not in _TOP_LEVEL_KEYS:
            raise make_unknown_key_error(f"{file.origin}, line {file.find_line(key)}: {key}", key, _TOP_LEVEL_KEYS)


def make_unknown_key_error(where: str, key: str, allowed_keys: Sequence[str]) -> ConstitutionError:
    fix = suggest_nearest(key, allowed_keys) or f"allowed here: {', '.join(allowed_keys)}"
    return ConstitutionError(f"{where} is unknown", "there is no such key", fix)


def _fill_entry(entry: Any, terms: Mapping[str, str], location: SourceLocation) -> Any:
    """Replace the placeholders in the strings of an entry."""
    if not isinstance(entry, dict):
        return entry
    return {
        key: _fill_placeholders(value, terms, location, key) if isinstance(value, str) else value
        for key, value in entry.items()
    }


def _fill_placeholders(text: str, terms: Mapping[str, str], location: SourceLocation, key: str) -> str:
    def replace(match: re.Match[str]) -> str:
        literal, name = match.groups()
        if literal:
            return f"{{{literal}}}"
        if name in terms:
            return terms[name]
        fix = suggest_nearest(name, terms) or f'add to the file: [terms] and {name} = "..."'
        known = ", ".join(f"{{{term}}}" for term in sorted(terms)) or "none"
        raise ConstitutionError(
            f"{location.origin}, line {_find_line_containing(location.file, match[0], location.find_line(key))}:"
            f" {key} has the unknown placeholder {{{name}}}",
            f"a placeholder must be one of the [terms] of the file; the terms are: {known}",
            f"{fix} To write the word with braces, use {{{{{name}}}}}",
        )

    return _PLACEHOLDER_PATTERN.sub(replace, text)


def escape_braces(text: str) -> str:
    """Escape braces, so that `_fill_placeholders` returns the original text."""
    return re.sub(_PLACEHOLDER_PATTERN.pattern.partition("|")[2], r"{{\1}}", text)


# Lines


def _iterate_code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that does not start inside a multi-line string."""
    open_quotes = ""
    for number, line in enumerate(text.split("\n"), 1):
        if not open_quotes:
            yield number, line
        for quotes in re.findall(r'"""|\'\'\'', line):
            open_quotes = "" if open_quotes == quotes else open_quotes or quotes


def find_key_line(text: str, key_path: Sequence[str | int]) -> int:
    """Return the line number of a key path. For example, ("judge", 2, "id") is the key `id` in the third [[judge]] table.

    If the key is missing, return the line of the table. If the table is missing, return the first line of the file.
    """
    lines = list(_iterate_code_lines(text))
    name = next((str(part) for part in reversed(key_path) if isinstance(part, str)), "")
    key, header = (re.compile(rf"\s*{prefix}\s*[\"']?{re.escape(name)}\b") for prefix in ("", r"\[+"))
    start, is_in_table = 0, False
    if len(key_path) > 1 and isinstance(key_path[1], int):
        table = re.compile(rf"\s*\[\[\s*{re.escape(str(key_path[0]))}\s*\]\]")
        tables = [i for i, (_, line) in enumerate(lines) if table.match(line)]
        is_in_table = key_path[1] < len(tables)
        start = tables[key_path[1]] if is_in_table else 0
    is_relevant = True  # whether the line is in the entry; if the entry was not found, whether it is before the first table
    for i in range(start, len(lines)):
        number, line = lines[i]
        if line.lstrip().startswith("["):
            is_relevant = i == start and is_in_table
            if is_in_table and i > start:
                break
            if header.match(line):
                return number
        elif is_relevant and key.match(line):
            return number
    return lines[start][0] if lines else 1


def _find_line_containing(file: ConstitutionFile, text: str, start: int = 1) -> int:
    """Return the number of the first line that contains the text, at or after the line `start`."""
    lines = file.text.split("\n")
    return next((n for n in range(start, len(lines) + 1) if text in lines[n - 1]), start)
