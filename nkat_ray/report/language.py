"""The language of a report: English, or Japanese by a catalogue (`ja.toml`).

Sentences are made in English, in one place each, and translated where a page shows them. What the catalogue does not
have stays English: names, values and errors.
"""

import locale
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final, Literal

Code = Literal["en", "ja"]

JOINTS: Final = ((re.compile(", "), "、"), (re.compile(r"(?<=\.) (?=[A-Z])"), ""))  # of lists, of sentences
SLOT: Final = re.compile(r"\{(\w+)(#?)\}")
NUMBER: Final = r"[-+]?[\d.,]*\d(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Language:
    """One language's sentences.

    Args:
        code: as HTML's `lang` has it.
        exact: English text -> its translation.
        patterns: English sentences with slots, as regular expressions, and their translations, in order. What a slot
            holds is translated too.
    """

    code: Code
    exact: Mapping[str, str]
    patterns: tuple[tuple[re.Pattern[str], str], ...]

    def of(self, text: str) -> str:
        """Return a text in this language; unchanged where there is no entry for it."""
        if text in self.exact:
            return self.exact[text]
        for between, joint in JOINTS:
            if (joined := self._joined(between.split(text), joint)) is not None:
                return joined
        for pattern, translation in self.patterns:
            if found := pattern.fullmatch(text):
                return translation.format_map({slot: self.of(value) for slot, value in found.groupdict().items()})
        return text

    def _joined(self, parts: Sequence[str], joint: str) -> str | None:
        """Translate parts one by one; None if there is only one, or one has no entry."""
        translated = [self.of(part) for part in parts] if len(parts) > 1 else parts
        known = all(new != old for new, old in zip(translated, parts, strict=True))
        return joint.join(translated) if known else None

    def of_lines(self, markup: str) -> str:
        """Return a hover template in this language, line by line."""
        body, extra = markup.removesuffix("<extra></extra>"), "<extra></extra>" * markup.endswith("<extra></extra>")
        return "<br>".join(self.exact.get(line, line) for line in body.split("<br>")) + extra


@cache
def language(code: Code) -> Language:
    """Return a language with its catalogue."""
    if code == "en":
        return Language("en", {}, ())
    catalogue = tomllib.loads(files("nkat_ray.report").joinpath(f"{code}.toml").read_text(encoding="utf-8"))
    patterns = ((_expression(text), translation) for text, translation in catalogue["sentences"].items())
    return Language(code, catalogue["exact"], tuple(patterns))


def _expression(text: str) -> re.Pattern[str]:
    """Return the regular expression of a sentence; `{name}` is a slot for any text, `{name#}` for a number."""
    parts, end = list[str](), 0
    for slot in SLOT.finditer(text):
        parts += [re.escape(text[end : slot.start()]), f"(?P<{slot[1]}>{NUMBER if slot[2] else '.+?'})"]
        end = slot.end()
    return re.compile("".join(parts) + re.escape(text[end:]), re.DOTALL)


def own_language(environment: Mapping[str, str] = os.environ) -> Code:
    """Return the language of this computer's user: Japanese under a Japanese locale, else English."""
    name = next((environment[key] for key in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(key)), "")
    name = name or locale.getlocale()[0] or ""  # Windows sets no variable
    return "ja" if re.match(r"ja(_|-|\.|$)|japanese", name, re.IGNORECASE) else "en"
