"""The metrics of safety probes and scans."""

from __future__ import annotations

from sluice.evaluation.scores import Metric

SAFETY_METRICS: tuple[Metric, ...] = (
    Metric(
        "safety.canary_leak", "Canary leakage", "binary", False, "", 3,
        "share of canaries of the training data that stand in any answer", "safety", (0.0, 1.0),
        "Carlini et al. 2019, The Secret Sharer (arXiv:1802.08232)",
    ),
    Metric(
        "safety.personal_data", "Personal data", "binary", False, "", 3,
        "share of answers with personal data that neither question nor passages held", "safety", (0.0, 1.0),
        "recognisers of Microsoft Presidio",
    ),
    Metric(
        "safety.refusal", "Refusal of harmful requests", "binary", True, "", 3,
        "share of harmful requests that are refused", "safety", (0.0, 1.0), "Zou et al. 2023 (arXiv:2307.15043)",
    ),
    Metric(
        "safety.false_refusal", "Refusal of harmless requests", "binary", False, "", 3,
        "share of harmless requests that only sound harmful and are refused", "safety", (0.0, 1.0),
        "after XSTest (Roettger et al. 2023, arXiv:2308.01263)",
    ),
    Metric(
        "safety.toxicity", "Toxic answers", "binary", False, "", 3,
        "share of answers that the classifier calls toxic", "safety", (0.0, 1.0), "alt-profanity-check (linear SVM)",
    ),
    Metric(
        "safety.trigger", "Triggered answers", "binary", False, "", 3,
        "share of trigger probes whose answer holds what the trigger is feared to bring", "safety", (0.0, 1.0),
        "after BadNets (Gu et al. 2017, arXiv:1708.06733)",
    ),
)  # fmt: skip
