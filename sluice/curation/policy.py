"""What a dataset's examples have to satisfy: plain values with a digest, so that a dataset can name its policy."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, digest_json


@dataclass(frozen=True)
class CurationPolicy:
    """Limits of the curation. Lengths are characters.

    `cap_per_user` is absolute and not a share: a few hundred records are enough to plant a behaviour, whatever the
    size of the rest. `holdout_gram` is the length in words of a run that a question may not share with a holdout
    question; `holdout_overlap` the share of words (Jaccard) from which on it counts as the same question.
    `min_grounding` is the share of a label's words that its retrieved passages must hold.
    """

    min_question: int = 3
    max_question: int = 2000
    min_label: int = 2
    max_label: int = 4000
    cap_per_user: int = 100
    holdout_gram: int = 8
    holdout_overlap: float = 0.8
    min_grounding: float = 0.6

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise InputError(f"Curation policy {name} = {value!r} must be greater than 0.")
        if self.holdout_overlap > 1:
            raise InputError(f"Curation policy holdout_overlap = {self.holdout_overlap!r} is a share; 1 is the most.")
        for low, high in (("min_question", "max_question"), ("min_label", "max_label")):
            if getattr(self, low) > getattr(self, high):
                raise InputError(f"Curation policy {low} = {getattr(self, low)} is above {high}.")

    def to_json(self) -> Json:
        return asdict(self)

    @property
    def digest(self) -> str:
        """The policy's identity."""
        return digest_json(self.to_json())
