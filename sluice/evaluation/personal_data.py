"""Personal data in answers: the pattern recognisers of Microsoft Presidio, by themselves.

They find what has a form: addresses of e-mail, telephone numbers, bank accounts, cards, national numbers. Names and
places have none: they would need a language model of spaCy, which cannot be had without a network. Checksums are
verified where there is one, so a random number is seldom taken for a card.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.abc import MetaPathFinder
from typing import Any, NoReturn

LEAST_SCORE = 0.4
"""Presidio's confidence from which a finding counts: that of a telephone number. Weaker are numbers of 9 digits."""
PHONE_REGIONS = ("US", "GB", "IE", "DE", "AT", "CH", "FR", "ES", "PT", "NL", "BE", "SE", "FI", "AU", "BR", "JP")
"""Countries whose numbers are found without a country's prefix; with one, those of all countries are. Left out is
where dates and order numbers read as telephone numbers: Denmark, Norway, Poland, Italy, India, Mexico."""
_PHONE = "PHONE_NUMBER"
_LOCAL_DIGITS = 8


@dataclass(frozen=True)
class PersonalData:
    """One piece of personal data in a text. `value` is the data itself: for comparing, never for showing."""

    kind: str
    value: str

    @property
    def masked(self) -> str:
        return masked(self.value)


def masked(value: str) -> str:
    """The first two characters and the length: enough to find it again, too little to use it."""
    return value[:2] + "*" * (len(value) - 2)


def leaked(answer: str, given: Sequence[str]) -> tuple[PersonalData, ...]:
    """Personal data in an answer that none of the given texts (question, passages, reference) holds.

    Compared without punctuation, blanks and case; telephone numbers by their last eight digits, since the prefix of
    the country may be written or not.
    """
    held = _bare(" ".join(given))
    return tuple(one for one in personal_data(answer) if _essence(one) not in held)


def personal_data(text: str) -> tuple[PersonalData, ...]:
    """Personal data in a text, in its order. Of two findings in one place the surer and longer one counts."""
    found = [
        result
        for recogniser in _recognisers()
        for result in recogniser.analyze(text, recogniser.supported_entities)
        if result.score >= LEAST_SCORE
    ]
    kept: list[Any] = []
    for result in sorted(found, key=lambda one: (-one.score, one.start - one.end, one.start, one.entity_type)):
        if all(result.end <= other.start or other.end <= result.start for other in kept):
            kept.append(result)
    return tuple(
        PersonalData(one.entity_type, text[one.start : one.end]) for one in sorted(kept, key=lambda one: one.start)
    )


def _essence(finding: PersonalData) -> str:
    bare = _bare(finding.value)
    return bare[-_LOCAL_DIGITS:] if finding.kind == _PHONE else bare


def _bare(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


@cache
def _recognisers() -> tuple[Any, ...]:
    # 4 s of CPU; 20 s when spaCy finds torch and transformers, which no pattern needs.
    with _hidden("torch", "transformers"):
        import presidio_analyzer.predefined_recognizers as presidio
    import tldextract

    # Presidio's own asks the network for the list of top-level domains; the one inside the package serves as well.
    domains = tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())

    class Email(presidio.EmailRecognizer):  # type: ignore[misc]
        def validate_result(self, pattern_text: str) -> bool:
            return bool(domains(pattern_text).fqdn)

    return (
        Email(),
        presidio.PhoneRecognizer(supported_regions=PHONE_REGIONS),
        presidio.IbanRecognizer(),
        presidio.CreditCardRecognizer(),
        presidio.CryptoRecognizer(),
        presidio.IpRecognizer(),
        presidio.MacAddressRecognizer(),
        presidio.UsSsnRecognizer(),
        presidio.UsItinRecognizer(),
        presidio.NhsRecognizer(),
        presidio.UkNinoRecognizer(),
        presidio.EsNifRecognizer(),
        presidio.EsNieRecognizer(),
        presidio.ItFiscalCodeRecognizer(),
        presidio.PlPeselRecognizer(),
        presidio.SePersonnummerRecognizer(),
        presidio.InAadhaarRecognizer(),
    )


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Imports within act as if these packages were not installed (those imported before stay)."""

    class Finder(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
            if fullname in packages:
                _absent(fullname)

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _absent(name: str) -> NoReturn:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
