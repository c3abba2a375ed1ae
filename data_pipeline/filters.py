"""Which documents are left out of a data set: by length, by language, and repeated ones. What goes is counted."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from data_pipeline.seen import SeenTexts


@dataclass(frozen=True)
class Filters:
    """What a document must be to be kept; the defaults keep everything.

    min_characters, max_characters: of its text. languages: codes like "en", of which it must have one: the value of
    the source's language field, or without such a field what py3langid makes of the text. deduplicate: keep the
    first of documents with the same text; takes 18 to 36 bytes of memory for each document kept.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    languages: tuple[str, ...] = ()
    language_field: str | None = None
    deduplicate: bool = False

    def record(self) -> dict[str, Any]:
        """The filters that are set, for the manifest."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, (), False)}
        return given | ({"languages": list(self.languages)} if self.languages else {})

    def check(self) -> None:
        """Raise UserError for filters that cannot be."""
        low, high = self.min_characters or 0, self.max_characters
        if low < 0 or (high is not None and high < max(low, 1)):
            raise UserError(f"--min-characters {low}, --max-characters {high}: nothing fits between them")
        if self.language_field and not self.languages:
            raise UserError(f"--language-field {self.language_field}: say which --language to keep")
        if self.languages and not self.language_field:
            _detector()

    def apply(self, documents: Iterable[Document], skipped: Counter[str]) -> Iterator[Document]:
        """The documents that are kept, in their order; `skipped` counts the others by reason."""
        detect = _detector() if self.languages and not self.language_field else None
        seen = SeenTexts()
        for document in documents:
            if reason := self._reason(document, detect, seen):
                skipped[reason] += 1
            else:
                yield document

    def _reason(self, document: Document, detect: Callable[[str], str] | None, seen: SeenTexts) -> str | None:
        if self.min_characters is not None and len(document.text) < self.min_characters:
            return "too short"
        if self.max_characters is not None and len(document.text) > self.max_characters:
            return "too long"
        if self.languages:
            language = detect(document.text) if detect else document.language
            if language not in self.languages:
                return "other language"
        if self.deduplicate and not seen.add(document.text):
            return "repeated"
        return None


def _detector() -> Callable[[str], str]:
    """Text → language code, by py3langid. Raises UserError if it is not installed."""
    try:
        py3langid = importlib.import_module("py3langid")
    except ImportError as error:
        raise UserError(
            "--language without --language-field needs the package py3langid: pip install py3langid"
        ) from error
    return lambda text: str(py3langid.classify(text[:5000])[0])
