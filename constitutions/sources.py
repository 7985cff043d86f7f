"""The files of a constitution: bytes to TOML values, includes and terms filled in, and where each entry stands.

`gather` makes of a file and of those that it includes one table of values, as if everything stood in one file; the model in
`constitutions.loader` checks it. Everything that can be wrong with a file is a `ConstitutionError`: what and where, why, and
what to do.
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
_MAX_INCLUDE_DEPTH = 16  # files, from one that includes to one that is included

# {{word}} is the word in braces; {word} is a placeholder.
_PLACEHOLDER_PATTERN = re.compile(r"\{\{([A-Za-z_][A-Za-z0-9_-]*)\}\}|\{([A-Za-z_][A-Za-z0-9_-]*)\}")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


class ConstitutionError(ValueError):
    """What is wrong with a constitution, where, and what to do."""

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


@dataclass(frozen=True)
class ConstitutionFile:
    """A file that has been read. `origin` is what messages call it; `path` is None for a text that came another way."""

    origin: str
    text: str
    values: Mapping[str, Any]
    path: Path | None = None

    def find_line(self, *place: str | int) -> int:
        return find_key_line(self.text, place)


@dataclass(frozen=True)
class SourceLocation:
    """Where an entry of a part stands: in which file, and as the how-manieth entry of that part there."""

    file: ConstitutionFile
    part: str
    index: int

    @property
    def origin(self) -> str:
        return self.file.origin

    def find_line(self, *keys: str | int) -> int:
        return self.file.find_line(self.part, self.index, *keys)


@dataclass(frozen=True)
class MergedConstitution:
    """The values of a file with its includes, and where each entry of each part came from."""

    main_file: ConstitutionFile
    values: dict[str, Any]
    locations: dict[tuple[str, int], SourceLocation] = field(default_factory=dict)

    def locate(self, key_path: Sequence[str | int]) -> tuple[str, tuple[str | int, ...], int]:
        """(file, place within that file, line) of a place in the values."""
        found = (
            self.locations.get((str(key_path[0]), key_path[1])) if len(key_path) > 1 and isinstance(key_path[1], int) else None
        )
        file, inside = (
            (self.main_file, tuple(key_path)) if not found else (found.file, (found.part, found.index, *key_path[2:]))
        )
        return file.origin, inside, file.find_line(*inside)


# Reading


def list_shipped_constitutions() -> list[str]:
    """The shipped constitutions."""
    return sorted(path.stem for path in CONSTITUTIONS_FOLDER.glob("*.toml"))


def read_constitution_file(name_or_path: str, base_folder: Path | None = None) -> ConstitutionFile:
    """A shipped constitution by name, or a file by path (relative to `beside`, the folder of the file that includes it)."""
    path = (
        CONSTITUTIONS_FOLDER / f"{name_or_path}.toml"
        if name_or_path in list_shipped_constitutions()
        else (base_folder or Path()) / name_or_path
    )
    data = read_file_bytes(path)
    if data is None:
        raise ConstitutionError(
            f"there is no constitution {name_or_path!r}",
            f"neither a file nor one of the shipped ones: {', '.join(list_shipped_constitutions())}",
            suggest_nearest(name_or_path, list_shipped_constitutions())
            or "give the path of a TOML file, or one of these names",
        )
    return parse_toml(data, str(path), path.resolve())


def read_file_bytes(path: Path) -> bytes | None:
    """What is in a file, up to a little more than may be; None when there is no file to read (a pipe is none)."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            return stream.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError):
        return None


def suggest_nearest(name: str, known_names: Iterable[str]) -> str:
    """A question that names the nearest of the known names; empty when none is near."""
    near = difflib.get_close_matches(name, list(known_names), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else ""


def parse_toml(data: str | bytes, origin: str, path: Path | None = None) -> ConstitutionFile:
    """The TOML values in a text or in its bytes."""
    if len(data) > _MAX_FILE_BYTES:
        raise ConstitutionError(
            f"{origin} is longer than {_MAX_FILE_BYTES} bytes",
            "every run's manifest carries its constitution in full",
            "is it the right file?",
        )
    text = decode_utf8(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"), origin)
    try:
        return ConstitutionFile(origin, text, tomllib.loads(text), path)
    except (ValueError, RecursionError) as error:  # a ValueError too: an integer of thousands of digits
        raise ConstitutionError(f"{origin} is not TOML", str(error) or "nested too deeply", "mend that line") from error


def decode_utf8(data: bytes, origin: str) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        looks = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "LATIN1")
        raise ConstitutionError(
            f"{origin}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8",
            f"a constitution is UTF-8; this file may be {looks}",
            f"save it as UTF-8, or type: iconv -f {looks} -t UTF-8 OLD > NEW",
        ) from error


# Includes and terms


def merge_includes(main: ConstitutionFile) -> MergedConstitution:
    """The entries of the included files, each file once and before the one that includes it, then the file's own."""
    values = {key: value for key, value in main.values.items() if key not in (*_SECTIONS, "include", "terms")}
    gathered = MergedConstitution(main, values)
    for file, terms in _iterate_files(main, {}, (), set()):
        for part in _SECTIONS:
            if part not in file.values:
                continue
            there = gathered.values.setdefault(part, [])
            for index, entry in enumerate(_get_entries(file, part)):
                place = SourceLocation(file, part, index)
                gathered.locations[part, len(there)] = place
                there.append(_fill_entry(entry, terms, place))
    return gathered


def _get_entries(file: ConstitutionFile, part: str) -> list[Any]:
    found = file.values[part]
    if isinstance(found, list):
        return found
    raise ConstitutionError(
        f"{file.origin}, line {file.find_line(part)}: {part} is no list", "it holds entries, each a table", f"write [[{part}]]"
    )


def _iterate_files(
    file: ConstitutionFile, outer_terms: Mapping[str, str], include_path: tuple[Path, ...], seen_paths: set[Path]
) -> Iterator[tuple[ConstitutionFile, Mapping[str, str]]]:
    """A file's includes, then the file, each with its terms; terms of the file that includes (`given`) come before its own."""
    terms = {**_get_terms(file), **outer_terms}
    if file.path:
        include_path = (*include_path, file.path)
        seen_paths.add(file.path)
    for number, wanted in enumerate(_get_includes(file)):
        at = f"{file.origin}, line {_find_line_containing(file, wanted)}"
        try:
            found = read_constitution_file(wanted, file.path.parent if file.path else None)
        except ConstitutionError as error:
            raise ConstitutionError(f"{at}: include {number + 1}: {error.what}", error.why, error.fix) from error
        assert found.path
        if found.path in include_path:
            circle = " -> ".join(path.name for path in (*include_path[include_path.index(found.path) :], found.path))
            raise ConstitutionError(
                f"{at}: include goes round in a circle", circle, f"take {wanted!r} out of one of these files"
            )
        if len(include_path) >= _MAX_INCLUDE_DEPTH:
            raise ConstitutionError(
                f"{at}: more than {_MAX_INCLUDE_DEPTH} files include each other",
                "more than anybody can follow",
                "let one file include the others side by side",
            )
        if found.path not in seen_paths:
            _check_included_file(found)
            yield from _iterate_files(found, terms, include_path, seen_paths)
    yield file, terms


def _get_includes(file: ConstitutionFile) -> list[str]:
    wanted = file.values.get("include", [])
    if isinstance(wanted, list) and all(isinstance(one, str) and one for one in wanted):
        return wanted
    raise ConstitutionError(
        f"{file.origin}, line {file.find_line('include')}: include is no list of names",
        "it names shipped constitutions, or files relative to this one",
        'write: include = ["default", "more.toml"]',
    )


def _get_terms(file: ConstitutionFile) -> dict[str, str]:
    terms = file.values.get("terms", {})
    if not isinstance(terms, dict):
        raise ConstitutionError(
            f"{file.origin}, line {file.find_line('terms')}: terms is no table",
            "it names words for placeholders",
            "write [terms], and NAME = 'WORDS' below it",
        )
    for name, words in terms.items():
        if not isinstance(words, str) or not _PLACEHOLDER_PATTERN.fullmatch(f"{{{name}}}"):
            raise ConstitutionError(
                f"{file.origin}, line {_find_line_containing(file, name, file.find_line('terms'))}: the term {name} cannot be used",
                "a term is a name (letters, digits, _ and -) and the words that stand for {name} in the principles",
                'write: NAME = "WORDS"',
            )
    return terms


_TOP_LEVEL_KEYS = ("name", "version", "description", "selection", "judge_with", "include", "terms", *_SECTIONS)


def _check_included_file(file: ConstitutionFile) -> None:
    """An included file needs no name of its own, but what it says must be known: it is part of this constitution."""
    for key in file.values:
        if key not in _TOP_LEVEL_KEYS:
            raise make_unknown_key_error(f"{file.origin}, line {file.find_line(key)}: {key}", key, _TOP_LEVEL_KEYS)


def make_unknown_key_error(where: str, key: str, allowed_keys: Sequence[str]) -> ConstitutionError:
    fix = suggest_nearest(key, allowed_keys) or f"allowed here: {', '.join(allowed_keys)}"
    return ConstitutionError(f"{where} is unknown", "there is no such key", fix)


def _fill_entry(entry: Any, terms: Mapping[str, str], location: SourceLocation) -> Any:
    """An entry with the placeholders in its texts replaced."""
    if not isinstance(entry, dict):
        return entry
    return {
        key: _fill_placeholders(value, terms, location, key) if isinstance(value, str) else value
        for key, value in entry.items()
    }


def _fill_placeholders(text: str, terms: Mapping[str, str], location: SourceLocation, key: str) -> str:
    def words(match: re.Match[str]) -> str:
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
            f"a placeholder stands for one of the file's [terms]; here these are: {known}",
            f"{fix} For the word in braces itself write {{{{{name}}}}}",
        )

    return _PLACEHOLDER_PATTERN.sub(words, text)


def escape_braces(text: str) -> str:
    """A text whose braces mean themselves: what `fill` makes the text of again."""
    return re.sub(_PLACEHOLDER_PATTERN.pattern.partition("|")[2], r"{{\1}}", text)


# Lines


def _iterate_code_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that do not begin inside a string of several lines."""
    open_with = ""
    for number, line in enumerate(text.split("\n"), 1):
        if not open_with:
            yield number, line
        for quotes in re.findall(r'"""|\'\'\'', line):
            open_with = "" if open_with == quotes else open_with or quotes


def find_key_line(text: str, key_path: Sequence[str | int]) -> int:
    """The line of a key: of the n-th [[table]], and in it of the key, as far as the file has them."""
    lines = list(_iterate_code_lines(text))
    name = next((str(part) for part in reversed(key_path) if isinstance(part, str)), "")
    key, header = (re.compile(rf"\s*{lead}\s*[\"']?{re.escape(name)}\b") for lead in ("", r"\[+"))
    start, inside = 0, False
    if len(key_path) > 1 and isinstance(key_path[1], int):
        table = re.compile(rf"\s*\[\[\s*{re.escape(str(key_path[0]))}\s*\]\]")
        tables = [i for i, (_, line) in enumerate(lines) if table.match(line)]
        inside = key_path[1] < len(tables)
        start = tables[key_path[1]] if inside else 0
    within = True  # the entry's own lines, or those before the first table
    for i in range(start, len(lines)):
        number, line = lines[i]
        if line.lstrip().startswith("["):
            within = i == start and inside
            if inside and i > start:
                break
            if header.match(line):
                return number
        elif within and key.match(line):
            return number
    return lines[start][0] if lines else 1


def _find_line_containing(file: ConstitutionFile, words: str, start: int = 1) -> int:
    """The first line from `start` on that has these words."""
    lines = file.text.split("\n")
    return next((n for n in range(start, len(lines) + 1) if words in lines[n - 1]), start)
