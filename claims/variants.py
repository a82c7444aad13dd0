"""Entries of the zoo that are listed with more than one set of arguments."""

from __future__ import annotations

from claims import text, vision

ENTRIES = {
    f"digits_labels {labels}": (vision.digits_labels, "ViTForImageClassification", {"labels": labels})
    for labels in vision.LABELS
    if labels != "parity"
} | {"decoder_domain instruct": (text.decoder_domain, "LlamaForCausalLM", {"start": "instruct"})}
