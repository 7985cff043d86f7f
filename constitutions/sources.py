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

FOLDER = Path(__file__).parent
PARTS = ("critique", "judging", "prose", "examples")
MOST_BYTES = 1 << 20
DEEPEST = 16  # files, from one that includes to one that is included

# {{word}} is the word in braces; {word} is a placeholder.
PLACEHOLDER = re.compile(r"\{\{([A-Za-z_][A-Za-z0-9_-]*)\}\}|\{([A-Za-z_][A-Za-z0-9_-]*)\}")
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


class ConstitutionError(ValueError):
    """What is wrong with a constitution, where, and what to do."""

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


@dataclass(frozen=True)
class File:
    """A file that has been read. `origin` is what messages call it; `path` is None for a text that came another way."""

    origin: str
    text: str
    values: Mapping[str, Any]
    path: Path | None = None

    def line(self, *place: str | int) -> int:
        return line_of(self.text, place)


@dataclass(frozen=True)
class Place:
    """Where an entry of a part stands: in which file, and as the how-manieth entry of that part there."""

    file: File
    part: str
    index: int

    @property
    def origin(self) -> str:
        return self.file.origin

    def line(self, *keys: str | int) -> int:
        return self.file.line(self.part, self.index, *keys)


@dataclass(frozen=True)
class Gathered:
    """The values of a file with its includes, and where each entry of each part came from."""

    main: File
    values: dict[str, Any]
    places: dict[tuple[str, int], Place] = field(default_factory=dict)

    def located(self, place: Sequence[str | int]) -> tuple[str, tuple[str | int, ...], int]:
        """(file, place within that file, line) of a place in the values."""
        found = self.places.get((str(place[0]), place[1])) if len(place) > 1 and isinstance(place[1], int) else None
        file, inside = (self.main, tuple(place)) if not found else (found.file, (found.part, found.index, *place[2:]))
        return file.origin, inside, file.line(*inside)


# Reading


def names() -> list[str]:
    """The shipped constitutions."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_file(wanted: str, beside: Path | None = None) -> File:
    """A shipped constitution by name, or a file by path (relative to `beside`, the folder of the file that includes it)."""
    path = FOLDER / f"{wanted}.toml" if wanted in names() else (beside or Path()) / wanted
    data = read_bytes(path)
    if data is None:
        raise ConstitutionError(
            f"there is no constitution {wanted!r}",
            f"neither a file nor one of the shipped ones: {', '.join(names())}",
            nearest(wanted, names()) or "give the path of a TOML file, or one of these names",
        )
    return read_text(data, str(path), path.resolve())


def read_bytes(path: Path) -> bytes | None:
    """What is in a file, up to a little more than may be; None when there is no file to read (a pipe is none)."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            return stream.read(MOST_BYTES + 1)
    except (OSError, ValueError):
        return None


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names; empty when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else ""


def read_text(data: str | bytes, origin: str, path: Path | None = None) -> File:
    """The TOML values in a text or in its bytes."""
    if len(data) > MOST_BYTES:
        raise ConstitutionError(
            f"{origin} is longer than {MOST_BYTES} bytes",
            "every run's manifest carries its constitution in full",
            "is it the right file?",
        )
    text = decoded(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"), origin)
    try:
        return File(origin, text, tomllib.loads(text), path)
    except (ValueError, RecursionError) as error:  # a ValueError too: an integer of thousands of digits
        raise ConstitutionError(f"{origin} is not TOML", str(error) or "nested too deeply", "mend that line") from error


def decoded(data: bytes, origin: str) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        looks = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "LATIN1")
        raise ConstitutionError(
            f"{origin}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8",
            f"a constitution is UTF-8; this file may be {looks}",
            f"save it as UTF-8, or type: iconv -f {looks} -t UTF-8 OLD > NEW",
        ) from error


# Includes and terms


def gather(main: File) -> Gathered:
    """The entries of the included files, each file once and before the one that includes it, then the file's own."""
    values = {key: value for key, value in main.values.items() if key not in (*PARTS, "include", "terms")}
    gathered = Gathered(main, values)
    for file, terms in files_of(main, {}, (), set()):
        for part in PARTS:
            if part not in file.values:
                continue
            there = gathered.values.setdefault(part, [])
            for index, entry in enumerate(entries(file, part)):
                place = Place(file, part, index)
                gathered.places[part, len(there)] = place
                there.append(filled(entry, terms, place))
    return gathered


def entries(file: File, part: str) -> list[Any]:
    found = file.values[part]
    if isinstance(found, list):
        return found
    raise ConstitutionError(
        f"{file.origin}, line {file.line(part)}: {part} is no list", "it holds entries, each a table", f"write [[{part}]]"
    )


def files_of(
    file: File, given: Mapping[str, str], trail: tuple[Path, ...], seen: set[Path]
) -> Iterator[tuple[File, Mapping[str, str]]]:
    """A file's includes, then the file, each with its terms; terms of the file that includes (`given`) come before its own."""
    terms = {**terms_of(file), **given}
    if file.path:
        trail = (*trail, file.path)
        seen.add(file.path)
    for number, wanted in enumerate(included(file)):
        at = f"{file.origin}, line {line_with(file, wanted)}"
        try:
            found = read_file(wanted, file.path.parent if file.path else None)
        except ConstitutionError as error:
            raise ConstitutionError(f"{at}: include {number + 1}: {error.what}", error.why, error.fix) from error
        assert found.path
        if found.path in trail:
            circle = " -> ".join(path.name for path in (*trail[trail.index(found.path) :], found.path))
            raise ConstitutionError(
                f"{at}: include goes round in a circle", circle, f"take {wanted!r} out of one of these files"
            )
        if len(trail) >= DEEPEST:
            raise ConstitutionError(
                f"{at}: more than {DEEPEST} files include each other",
                "more than anybody can follow",
                "let one file include the others side by side",
            )
        if found.path not in seen:
            check_fragment(found)
            yield from files_of(found, terms, trail, seen)
    yield file, terms


def included(file: File) -> list[str]:
    wanted = file.values.get("include", [])
    if isinstance(wanted, list) and all(isinstance(one, str) and one for one in wanted):
        return wanted
    raise ConstitutionError(
        f"{file.origin}, line {file.line('include')}: include is no list of names",
        "it names shipped constitutions, or files relative to this one",
        'write: include = ["default", "more.toml"]',
    )


def terms_of(file: File) -> dict[str, str]:
    terms = file.values.get("terms", {})
    if not isinstance(terms, dict):
        raise ConstitutionError(
            f"{file.origin}, line {file.line('terms')}: terms is no table",
            "it names words for placeholders",
            "write [terms], and NAME = 'WORDS' below it",
        )
    for name, words in terms.items():
        if not isinstance(words, str) or not PLACEHOLDER.fullmatch(f"{{{name}}}"):
            raise ConstitutionError(
                f"{file.origin}, line {line_with(file, name, file.line('terms'))}: the term {name} cannot be used",
                "a term is a name (letters, digits, _ and -) and the words that stand for {name} in the principles",
                'write: NAME = "WORDS"',
            )
    return terms


TOP = ("name", "version", "description", "selection", "judge_with", "include", "terms", *PARTS)


def check_fragment(file: File) -> None:
    """An included file needs no name of its own, but what it says must be known: it is part of this constitution."""
    for key in file.values:
        if key not in TOP:
            raise unknown_key(f"{file.origin}, line {file.line(key)}: {key}", key, TOP)


def unknown_key(where: str, key: str, known: Sequence[str]) -> ConstitutionError:
    fix = nearest(key, known) or f"allowed here: {', '.join(known)}"
    return ConstitutionError(f"{where} is unknown", "there is no such key", fix)


def filled(entry: Any, terms: Mapping[str, str], place: Place) -> Any:
    """An entry with the placeholders in its texts replaced."""
    if not isinstance(entry, dict):
        return entry
    return {key: fill(value, terms, place, key) if isinstance(value, str) else value for key, value in entry.items()}


def fill(text: str, terms: Mapping[str, str], place: Place, key: str) -> str:
    def words(match: re.Match[str]) -> str:
        literal, name = match.groups()
        if literal:
            return f"{{{literal}}}"
        if name in terms:
            return terms[name]
        fix = nearest(name, terms) or f'add to the file: [terms] and {name} = "..."'
        known = ", ".join(f"{{{term}}}" for term in sorted(terms)) or "none"
        raise ConstitutionError(
            f"{place.origin}, line {line_with(place.file, match[0], place.line(key))}:"
            f" {key} has the unknown placeholder {{{name}}}",
            f"a placeholder stands for one of the file's [terms]; here these are: {known}",
            f"{fix} For the word in braces itself write {{{{{name}}}}}",
        )

    return PLACEHOLDER.sub(words, text)


def escaped(text: str) -> str:
    """A text whose braces mean themselves: what `fill` makes the text of again."""
    return re.sub(PLACEHOLDER.pattern.partition("|")[2], r"{{\1}}", text)


# Lines


def outline(text: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that do not begin inside a string of several lines."""
    open_with = ""
    for number, line in enumerate(text.split("\n"), 1):
        if not open_with:
            yield number, line
        for quotes in re.findall(r'"""|\'\'\'', line):
            open_with = "" if open_with == quotes else open_with or quotes


def line_of(text: str, place: Sequence[str | int]) -> int:
    """The line of a key: of the n-th [[table]], and in it of the key, as far as the file has them."""
    lines = list(outline(text))
    name = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
    key, header = (re.compile(rf"\s*{lead}\s*[\"']?{re.escape(name)}\b") for lead in ("", r"\[+"))
    start, inside = 0, False
    if len(place) > 1 and isinstance(place[1], int):
        table = re.compile(rf"\s*\[\[\s*{re.escape(str(place[0]))}\s*\]\]")
        tables = [i for i, (_, line) in enumerate(lines) if table.match(line)]
        inside = place[1] < len(tables)
        start = tables[place[1]] if inside else 0
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


def line_with(file: File, words: str, start: int = 1) -> int:
    """The first line from `start` on that has these words."""
    lines = file.text.split("\n")
    return next((n for n in range(start, len(lines) + 1) if words in lines[n - 1]), start)
